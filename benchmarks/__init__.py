"""Benchmarks; run them from the repository root as modules, for example ``python -m benchmarks.attention``."""
