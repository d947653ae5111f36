"""A small drawn world in the official raw formats: the first run follows the same path as real data."""

from data_prep.demo.world import write_world

__all__ = ["write_world"]
