"""A small drawn world in the official raw formats: the newcomer's first run takes the same way as real data."""

from data_prep.demo.world import write_world

__all__ = ["write_world"]
