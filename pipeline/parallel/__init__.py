"""Ranks as a grid of pipeline stages by data-parallel replicas, and one ZeRO-3 engine per stage."""
