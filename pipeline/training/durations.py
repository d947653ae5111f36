"""Durations for people."""

from __future__ import annotations


def clock(seconds: float) -> str:
    """Return a duration as ``42s``, ``3m07s`` or ``5h12m``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    return f"{whole // 60}m{whole % 60:02d}s" if whole < 3600 else f"{whole // 3600}h{whole % 3600 // 60:02d}m"
