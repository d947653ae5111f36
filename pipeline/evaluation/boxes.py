"""Boxes in answers and their overlap."""

from __future__ import annotations

import re
from typing import TypeAlias

Box: TypeAlias = tuple[float, float, float, float]
"""x1, y1, x2, y2."""
_NUMBER = re.compile(r"-?\d+(?:\.\d+)?|-?\.\d+")


def find_box(text: str) -> Box | None:
    """Return the first four numbers of a text as a box; None unless there are four with x1 < x2 and y1 < y2."""
    numbers = [float(found) for found in _NUMBER.findall(text)[:4]]
    if len(numbers) < 4 or numbers[0] >= numbers[2] or numbers[1] >= numbers[3]:
        return None
    return numbers[0], numbers[1], numbers[2], numbers[3]


def iou(one: Box, other: Box) -> float:
    """Return the intersection over union of two boxes, 0..1."""
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    common = max(0.0, width) * max(0.0, height)
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (one, other)]
    return common / (sum(areas) - common)
