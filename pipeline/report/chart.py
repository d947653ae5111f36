"""Line charts as inline SVG; colours come from the page, so that they follow its light and dark themes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from data_prep.show.web_page import Html, el
from pipeline.report.history import FloatArray

WIDTH, HEIGHT = 560, 240
LEFT, RIGHT, TOP, BOTTOM = 58, 12, 12, 38
COLOURS = 6
"""Colours of the page's style."""
POINTS = 400
"""Most points of a line: more could not be seen."""


@dataclass(frozen=True)
class Line:
    """One line of a chart."""

    name: str
    x: FloatArray
    y: FloatArray
    """float64, as many as ``x``; not finite = a gap."""
    faint: bool = False
    """The raw values behind a smoothed line of the same colour."""
    colour: int = 0


@dataclass(frozen=True)
class _Axis:
    low: float
    high: float
    start: float
    """Pixel of ``low``."""
    end: float
    log: bool = False

    def place(self, value: float) -> float:
        """Return the pixel of a value."""
        low, high, at = (math.log10(x) if self.log else x for x in (self.low, self.high, value))
        return self.start + (at - low) / (high - low) * (self.end - self.start)

    def ticks(self) -> list[float]:
        """Return round values between both ends."""
        if self.log:
            first, last = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
            every, sizes = max(1, (last - first) // 5), (1, 2, 5) if last - first <= 2 else (1,)
            values = (size * 10.0**power for power in range(first, last + 1, every) for size in sizes)
            return [value for value in values if self.low <= value <= self.high]
        step = _round_step((self.high - self.low) / 4)
        first = math.ceil(self.low / step)
        return [step * number for number in range(first, math.floor(self.high / step) + 1)]


def chart(lines: Sequence[Line], *, x_label: str = "step", log: bool = False) -> Html:
    """Return a chart of the lines on common axes; points that are not finite, and 0 on a log scale, are gaps."""
    shown = [_thinned(line, log=log) for line in lines]
    values = np.concatenate([line.y[np.isfinite(line.y)] for line in shown])
    places = np.concatenate([line.x for line in shown])
    if not len(values):
        return el("p", "no finite value", class_="quiet")
    x_axis = _Axis(float(places.min()), _above(places), LEFT, WIDTH - RIGHT)
    y_axis = _Axis(*_range(values, log=log), HEIGHT - BOTTOM, TOP, log)
    drawn = [el("path", d=_path(line, x_axis, y_axis), class_=f"line c{line.colour % COLOURS}{' faint' * line.faint}")
             for line in shown]  # fmt: skip
    return el("svg", *_axes(x_axis, y_axis, x_label), *drawn, viewBox=f"0 0 {WIDTH} {HEIGHT}", role="img")


def smoothed(values: FloatArray, window: int) -> FloatArray:
    """Return the running mean of the last ``window`` finite values at every point; nan before the first one."""
    good = np.isfinite(values)
    total, count = (np.concatenate([[0.0], np.cumsum(x)]) for x in (np.where(good, values, 0.0), good))
    start = np.maximum(np.arange(1, len(values) + 1) - window, 0)
    sums, counts = (x[1:] - x[start] for x in (total, count))
    return np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)


def _thinned(line: Line, *, log: bool) -> Line:
    y = np.where(line.y > 0, line.y, np.nan) if log else line.y
    if len(y) <= POINTS:
        return Line(line.name, line.x, y, line.faint, line.colour)
    kept = np.unique(np.linspace(0, len(y) - 1, POINTS).astype(np.int64))
    return Line(line.name, line.x[kept], y[kept], line.faint, line.colour)


def _above(places: FloatArray) -> float:
    return max(float(places.max()), float(places.min()) + 1)


def _range(values: FloatArray, *, log: bool) -> tuple[float, float]:
    low, high = float(values.min()), float(values.max())
    if log:
        return low / 1.2, high * 1.2
    margin = (high - low) * 0.05 or abs(high) * 0.1 or 1.0
    return (min(0.0, low) if 0 <= low < high / 2 else low - margin), high + margin


def _round_step(step: float) -> float:
    scale = 10.0 ** math.floor(math.log10(step))
    return next(scale * size for size in (1, 2, 5, 10) if scale * size >= step)


def _path(line: Line, x_axis: _Axis, y_axis: _Axis) -> str:
    words, pen = [], "M"
    for x, y in zip(line.x.tolist(), line.y.tolist(), strict=True):
        if not math.isfinite(y):
            pen = "M"
            continue
        words.append(f"{pen}{x_axis.place(x):.1f} {y_axis.place(y):.1f}")
        pen = "L"
    return "".join(words)


def _axes(x_axis: _Axis, y_axis: _Axis, x_label: str) -> Iterator[Html]:
    for value in y_axis.ticks():
        y = f"{y_axis.place(value):.1f}"
        yield el("path", d=f"M{LEFT} {y}H{WIDTH - RIGHT}", class_="grid")
        yield el("text", _number(value), x=LEFT - 6, y=y, dy="0.35em", text_anchor="end")
    for value in x_axis.ticks():
        yield el("text", _number(value), x=f"{x_axis.place(value):.1f}", y=HEIGHT - BOTTOM + 16, text_anchor="middle")
    yield el("text", x_label, x=WIDTH - RIGHT, y=HEIGHT - 6, text_anchor="end")


def _number(value: float) -> str:
    if value and not 1e-3 <= abs(value) < 1e4:
        return f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e") if abs(value) < 1e4 else f"{value:,.0f}"
    return f"{value:g}"
