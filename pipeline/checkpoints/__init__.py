"""Sharded checkpoints: what one says of itself, how it is written, and how any grid of ranks loads it."""
