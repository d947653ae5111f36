"""Pictures of a row's mask: what a policy unlocks beyond causal attention, in a PNG or in the terminal."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.style import Style
from rich.text import Text

from data_prep.common.errors import UserError
from pipeline.masks.layout import LETTERS
from pipeline.masks.policies import Policy, dense_mask, get_policy
from pipeline.masks.sidecars import IntArray, Sidecars, TokenTable, run_starts, token_table

MAX_TOKENS = 16_384
PANELS_PER_LINE = 3
PANEL_PIXELS, DPI = 960, 150
SIDE = PANEL_PIXELS / DPI
LEFT, TOP, RIGHT, BOTTOM, LEGEND = 0.55, 1.15, 0.15, 0.4, 0.75
"""Inches: a mask's side, what surrounds it, and the legend's height."""
RGB = npt.NDArray[np.float64]


class Cell(IntEnum):
    """What a pair (row, column) of the mask is."""

    HIDDEN = 0
    CAUSAL = 1
    UNLOCKED = 2
    LEAK = 3
    CLOSED = 4


CELLS = {
    Cell.HIDDEN: ("#ffffff", "hidden"),
    Cell.CAUSAL: ("#c3d0e4", "visible, causal"),
    Cell.UNLOCKED: ("#f28e2b", "unlocked by the policy"),
    Cell.LEAK: ("#d62728", "unlocked beyond the commit index: leaks"),
    Cell.CLOSED: ("#e9dcf2", "earlier, but hidden by the policy"),
}
SIGNS = {Cell.HIDDEN: " ", Cell.CAUSAL: ".", Cell.UNLOCKED: "#", Cell.LEAK: "!", Cell.CLOSED: "-"}
KINDS = {
    "Q": ("#4e79a7", "given text", "white"),
    "A": ("#59a14f", "generated text", "white"),
    "V": ("#b07aa1", "image", "white"),
    "W": ("#3f9c95", "video", "white"),
    "U": ("#9c755f", "audio", "white"),
    "P": ("#d9d9d9", "padding", "#555555"),
}
"""Colour, meaning, and colour of a label on it."""


@dataclass(frozen=True)
class Run:
    """Tokens [start, end) that are drawn as one: a medium, a stretch of given or generated text, or padding."""

    start: int
    end: int
    letter: str
    """A key of ``KINDS``."""

    @property
    def label(self) -> str:
        """Its part of the layout string."""
        return f"{self.letter}{self.end - self.start}"


def cells(policy: Policy, sidecars: Sidecars) -> npt.NDArray[np.uint8]:
    """Return uint8[T, T] of ``Cell``: each pair of the mask, compared with causal attention in the same segment.

    Raises UserError for rows of more than ``MAX_TOKENS`` tokens.
    """
    if len(sidecars) > MAX_TOKENS:
        raise UserError(f"a picture holds at most {MAX_TOKENS} tokens, the row has {len(sidecars)}: draw a shorter row")
    allowed = dense_mask(policy, sidecars).cpu().numpy()
    causal = dense_mask(get_policy("causal"), sidecars).cpu().numpy()
    table = token_table(sidecars)
    result = np.where(allowed & causal, np.uint8(Cell.CAUSAL), np.uint8(Cell.HIDDEN))
    beyond = np.arange(len(table))[None, :] > table.commit[:, None]
    result[allowed & ~causal] = Cell.UNLOCKED
    result[allowed & beyond] = Cell.LEAK
    result[causal & ~allowed] = Cell.CLOSED
    result[table.segment == 0] = Cell.HIDDEN
    return result


def draw_png(policies: Sequence[Policy], sidecars: Sidecars, path: Path) -> None:
    """Draw the masks of one row side by side into a PNG file.

    Rows and columns are tokens (row i sees column j); the bands along both axes name media, texts and ``sample.turn``.
    Raises UserError for rows too long to draw.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    across = 2 if len(policies) == 4 else min(len(policies), PANELS_PER_LINE)
    down = -(-len(policies) // across)
    width, height = across * (LEFT + SIDE + RIGHT), down * (TOP + SIDE + BOTTOM) + LEGEND
    figure = Figure(figsize=(width, height), dpi=DPI)
    shown: set[int] = set()
    for place, policy in enumerate(policies):
        line, column = divmod(place, across)
        left, bottom = column * (LEFT + SIDE + RIGHT) + LEFT, height - (line + 1) * (TOP + SIDE) - line * BOTTOM
        axes = figure.add_axes((left / width, bottom / height, SIDE / width, SIDE / height))
        grid = cells(policy, sidecars)
        shown |= set(np.unique(grid).tolist())
        _draw_panel(axes, policy, sidecars, grid)
    _draw_legend(figure, shown, {run.letter for run in runs_of(sidecars)}, across)
    path.parent.mkdir(parents=True, exist_ok=True)
    FigureCanvasAgg(figure).print_png(str(path))


def thumbnail(policy: Policy, sidecars: Sidecars, size: int) -> bytes:
    """Return the mask as a bare PNG, at most ``size`` pixels wide. Raises UserError for rows too long to draw."""
    from PIL import Image

    shown = (_colours(cells(policy, sidecars), size) * 255).round().astype(np.uint8)
    stream = io.BytesIO()
    Image.fromarray(shown, "RGB").save(stream, "PNG")
    return stream.getvalue()


def terminal(policy: Policy, sidecars: Sidecars, columns: int) -> Text:
    """Return the mask as coloured half blocks, at most ``columns`` wide; longer rows are averaged down to that."""
    size = max(1, min(len(sidecars), columns - 2))
    pooled = _colours(cells(policy, sidecars), size)
    letters = _letters(sidecars, size)
    text = Text().append(f"{policy.name}: {policy.summary}\n", style="bold")
    text.append("  " + "".join(letters) + "\n", style="dim")
    for line in range(0, size, 2):
        text.append(letters[line] + " ", style="dim")
        for column in range(size):
            upper, lower = pooled[line, column], pooled[min(line + 1, size - 1), column]
            text.append("▀", Style(color=_hex(upper), bgcolor=_hex(lower) if line + 1 < size else None))
        text.append("\n")
    return text


def plain(policy: Policy, sidecars: Sidecars, columns: int) -> str:
    """Return the mask in letters, for files and terminals without colours; a pooled cell shows its rarest kind."""
    size = max(1, min(len(sidecars), columns - 2))
    grid, letters = cells(policy, sidecars), _letters(sidecars, size)
    edges = np.linspace(0, len(sidecars), size + 1).round().astype(int)[:-1]
    shown = np.maximum.reduceat(np.maximum.reduceat(grid, edges, axis=0), edges, axis=1)
    rows = [
        f"{letter} {''.join(SIGNS[Cell(cell)] for cell in row)}" for letter, row in zip(letters, shown, strict=True)
    ]
    return "\n".join([f"{policy.name}: {policy.summary}", "  " + "".join(letters), *rows, ""])


def terminal_legend(*, colours: bool = True) -> Text:
    """Return a line that explains the colours and letters of :func:`terminal`, or the signs of :func:`plain`."""
    text = Text()
    for cell, (colour, meaning) in CELLS.items():
        text.append("■ " if colours else f"'{SIGNS[cell]}' ", Style(color=colour)).append(f"{meaning}  ")
    return text.append(
        "\n" + ", ".join(f"{letter} {meaning}" for letter, (_, meaning, _) in KINDS.items()), style="dim"
    )


def runs_of(sidecars: Sidecars) -> list[Run]:
    """Return the row's runs in order."""
    table = token_table(sidecars)
    starts = np.flatnonzero(run_starts(table.segment, table.modality, table.instance, table.generated)).tolist()
    return [
        Run(start, end, _letter(table, start)) for start, end in zip(starts, [*starts[1:], len(table)], strict=True)
    ]


def _letter(table: TokenTable, token: int) -> str:
    if table.segment[token] == 0:
        return "P"
    if table.modality[token] == 0:
        return "A" if table.generated[token] else "Q"
    return next(letter for letter, kind in LETTERS.items() if kind.modality == table.modality[token])


def _turns(sidecars: Sidecars) -> Iterator[tuple[int, int, str]]:
    """Yield (start, end, ``sample.turn``) of every turn: what is given, and what is generated after it."""
    table = token_table(sidecars)
    turn = table.turn - table.generated
    starts = np.flatnonzero(run_starts(table.segment, turn))
    ends = np.append(starts[1:], len(table))
    for start, end in zip(starts.tolist(), ends.tolist(), strict=True):
        if table.segment[start]:
            yield start, end, f"{table.segment[start]}.{turn[start] + 1}"


def _draw_panel(axes: Any, policy: Policy, sidecars: Sidecars, grid: npt.NDArray[np.uint8]) -> None:
    tokens = len(sidecars)
    axes.imshow(_colours(grid, PANEL_PIXELS), extent=(0, tokens, tokens, 0), interpolation="nearest", aspect="equal")
    if tokens <= 100:
        axes.hlines(range(tokens + 1), 0, tokens, colors="#e4e4e4", linewidths=0.4)
        axes.vlines(range(tokens + 1), 0, tokens, colors="#e4e4e4", linewidths=0.4)
    segment = sidecars.segment.numpy()
    for edge in np.flatnonzero(run_starts(segment)).tolist()[1:]:
        axes.axhline(edge, color="#888888", linewidth=0.7)
        axes.axvline(edge, color="#888888", linewidth=0.7)
    axes.set(
        xticks=[],
        yticks=[],
        xlabel="a row is a token, coloured where it sees the token of the column; 1.2 is turn 2 of sample 1",
    )
    _draw_bands(axes, sidecars)
    axes.text(0.5, 1.13, policy.name, transform=axes.transAxes, ha="center", fontsize=15, fontweight="bold")
    axes.text(0.5, 1.095, policy.summary, transform=axes.transAxes, ha="center", fontsize=8, color="#444444")


def _draw_bands(axes: Any, sidecars: Sidecars) -> None:
    """Draw, along both axes, one band of runs in their colours and one of turns."""
    tokens = len(sidecars)
    for bounds, horizontal in (((0, 1.005, 1, 0.03), True), ((-0.035, 0, 0.03, 1), False)):
        band = axes.inset_axes(bounds)
        band.set(xlim=(0, tokens) if horizontal else (0, 1), ylim=(0, 1) if horizontal else (tokens, 0))
        band.set_axis_off()
        for run in runs_of(sidecars):
            span = band.axvspan if horizontal else band.axhspan
            span(run.start, run.end, facecolor=KINDS[run.letter][0], edgecolor="white", linewidth=0.4)
            _label(band, run.start, run.end, run.label, tokens, horizontal, KINDS[run.letter][2], 0.5)
        for start, end, label in _turns(sidecars):
            _label(band, start, end, label, tokens, horizontal, "#333333", 1.75 if horizontal else -0.75)


def _label(
    band: Any, start: int, end: int, label: str, tokens: int, horizontal: bool, colour: str, height: float
) -> None:
    """Write a label in the middle of its span, in the largest size that fits; leave it out where none does."""
    size = min(9.0, (end - start) / tokens * SIDE * 72 / (len(label) * 0.68))  # points; a digit is 0.64 of its size
    if size < 4.5:
        return
    middle = (start + end) / 2
    place = (middle, height) if horizontal else (height, middle)
    band.text(
        *place, label, ha="center", va="center", color=colour, fontsize=size, rotation=0 if horizontal else 90,
        clip_on=False,
    )  # fmt: skip


def _draw_legend(figure: Any, shown: set[int], letters: set[str], across: int) -> None:
    from matplotlib.patches import Patch

    patches = [
        Patch(facecolor=colour, edgecolor="#999999", label=meaning)
        for cell, (colour, meaning) in CELLS.items()
        if cell in shown
    ]
    patches += [
        Patch(facecolor=colour, label=f"{letter}: {meaning}")
        for letter, (colour, meaning, _) in KINDS.items()
        if letter in letters
    ]
    figure.legend(handles=patches, loc="lower center", ncols=4 if across == 1 else 6, frameon=False, fontsize=9)


def _colours(grid: npt.NDArray[np.uint8], size: int) -> RGB:
    """Return the cells' colours, floats [n, n, 3] in 0..1, averaged down to n = ``size`` where there are more."""
    palette = np.array([[int(colour[n : n + 2], 16) for n in (1, 3, 5)] for colour, _ in CELLS.values()]) / 255
    if len(grid) <= size:
        return np.asarray(palette[grid])
    edges = np.linspace(0, len(grid), size + 1).astype(np.int64)
    area = np.outer(np.diff(edges), np.diff(edges))
    image = np.zeros((size, size, 3))
    for cell in np.unique(grid):
        lines = np.add.reduceat(grid == cell, edges[:-1], axis=0, dtype=np.int32)
        image += (np.add.reduceat(lines, edges[:-1], axis=1) / area)[..., None] * palette[cell]
    return image


def _letters(sidecars: Sidecars, size: int) -> list[str]:
    """Return one letter per column of a terminal view."""
    places: IntArray = np.linspace(0, len(sidecars), size, endpoint=False).astype(np.int64)
    table = token_table(sidecars)
    return [_letter(table, int(place)) for place in places]


def _hex(colour: RGB) -> str:
    red, green, blue = (round(float(x) * 255) for x in colour)
    return f"#{red:02x}{green:02x}{blue:02x}"
