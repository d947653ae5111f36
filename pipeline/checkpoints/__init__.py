"""Sharded checkpoints: their manifest, how all ranks write one, and how any grid of ranks loads it."""
