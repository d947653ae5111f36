"""Benchmarks of data preparation; ``python -m benchmarks.data --help``."""
