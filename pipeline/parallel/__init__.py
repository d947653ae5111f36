"""Ranks as a grid of pipeline stages by data-parallel ranks, and one ZeRO-3 engine per stage."""
