"""Families of decoders and vision towers: one descriptor each, which owns all that is special about the family."""
