"""Pictures of a row's mask, as PNG or in the terminal; they show what a policy unlocks beyond causal attention."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.style import Style
from rich.text import Text

from data_prep.common.errors import UserError
from data_prep.common.modalities import TEXT
from pipeline.masks.layout import LETTERS
from pipeline.masks.policies import Policy, dense_mask, get_policy
from pipeline.masks.sidecars import IntArray, Sidecars, run_starts, token_table

MAX_TOKENS = 16_384
PANELS_PER_LINE = 3
PANEL_PIXELS, DPI = 960, 150
SIDE = PANEL_PIXELS / DPI
LEFT, TOP, RIGHT, BOTTOM, LEGEND = 0.55, 1.15, 0.15, 0.15, 1.0
"""Inches: the margins of a mask, and the height of the legend."""
FOOTNOTE = "a row of a mask is a token, coloured where it sees the token of the column; 1.2 is turn 2 of sample 1"
RGB = npt.NDArray[np.float64]


class Cell(IntEnum):
    """Kind of a pair (row, column) of the mask."""

    HIDDEN = 0
    CAUSAL = 1
    UNLOCKED = 2
    LEAK = 3
    CLOSED = 4


CELLS = {
    Cell.HIDDEN: ("#ffffff", "hidden"),
    Cell.CAUSAL: ("#c3d0e4", "visible, causal"),
    Cell.UNLOCKED: ("#f28e2b", "unlocked by the policy"),
    Cell.LEAK: ("#d62728", "unlocked beyond the commit index (leak)"),
    Cell.CLOSED: ("#e9dcf2", "earlier but hidden by the policy"),
}
SIGNS = {Cell.HIDDEN: " ", Cell.CAUSAL: ".", Cell.UNLOCKED: "#", Cell.LEAK: "!", Cell.CLOSED: "-"}
KINDS = {
    "S": ("#76838f", "system text", "white"),
    "Q": ("#4e79a7", "given text", "white"),
    "A": ("#59a14f", "generated text", "white"),
    "V": ("#b07aa1", "image", "white"),
    "W": ("#3f9c95", "video", "white"),
    "U": ("#9c755f", "audio", "white"),
    "P": ("#d9d9d9", "padding", "#555555"),
}
"""By letter of a layout: colour, meaning, and colour of a label on it."""

_BY_MODALITY = sorted((kind.modality, letter) for letter, kind in LETTERS.items() if kind.modality)


@dataclass(frozen=True)
class Run:
    """Tokens [start, end) that are drawn as one: a medium, a run of given or generated text, or padding."""

    start: int
    end: int
    letter: str
    """A key of ``KINDS``."""

    @property
    def label(self) -> str:
        """The run in a layout string."""
        return f"{self.letter}{self.end - self.start}"


def cells(policy: Policy, sidecars: Sidecars) -> npt.NDArray[np.uint8]:
    """Return uint8[T, T] of ``Cell``: every pair of the mask, compared with causal attention.

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


def draw_png(policies: Sequence[Policy], sidecars: Sidecars, path: Path, letters: str | None = None) -> None:
    """Draw the masks of one row side by side in a PNG file.

    Rows and columns are tokens (row i sees column j); the bands along both axes name media, text and ``sample.turn``.

    Args:
        policies: one panel each.
        sidecars: the row, of T tokens.
        path: the file; its folder is created.
        letters: a key of ``KINDS`` per token; default: :func:`token_letters`.

    Raises:
        UserError: the row is too long to draw, or an image does not fit a policy's grid.
        OSError: the file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    across = 2 if len(policies) == 4 else min(len(policies), PANELS_PER_LINE)
    down = -(-len(policies) // across)
    width, height = across * (LEFT + SIDE + RIGHT), down * (TOP + SIDE + BOTTOM) + LEGEND
    figure = Figure(figsize=(width, height), dpi=DPI)
    runs = runs_of(sidecars, letters)
    shown: set[int] = set()
    for place, policy in enumerate(policies):
        line, column = divmod(place, across)
        left, bottom = column * (LEFT + SIDE + RIGHT) + LEFT, height - (line + 1) * (TOP + SIDE) - line * BOTTOM
        axes = figure.add_axes((left / width, bottom / height, SIDE / width, SIDE / height))
        grid = cells(policy, sidecars)
        shown |= set(np.unique(grid).tolist())
        _draw_panel(axes, policy, sidecars, grid, runs)
    _draw_legend(figure, shown, {run.letter for run in runs}, across)
    path.parent.mkdir(parents=True, exist_ok=True)
    FigureCanvasAgg(figure).print_png(str(path))


def thumbnail(policy: Policy, sidecars: Sidecars, size: int) -> bytes:
    """Return the mask alone as PNG bytes, at most ``size`` pixels wide. Raises UserError for rows too long to draw."""
    from PIL import Image

    shown = (_colours(cells(policy, sidecars), size) * 255).round().astype(np.uint8)
    stream = io.BytesIO()
    Image.fromarray(shown, "RGB").save(stream, "PNG")
    return stream.getvalue()


def terminal(policy: Policy, sidecars: Sidecars, columns: int, letters: str | None = None) -> Text:
    """Return the mask as coloured half blocks, at most ``columns`` wide; longer rows are averaged down.

    ``letters`` as in :func:`draw_png`. Raises UserError for rows too long to draw.
    """
    size = max(1, min(len(sidecars), columns - 2))
    pooled = _colours(cells(policy, sidecars), size)
    letters = _pooled_letters(letters or token_letters(sidecars), size)
    text = Text().append(f"{policy.name}: {policy.summary}\n", style="bold")
    text.append(f"  {letters}\n", style="dim")
    for line in range(0, size, 2):
        text.append(letters[line] + " ", style="dim")
        for column in range(size):
            upper, lower = pooled[line, column], pooled[min(line + 1, size - 1), column]
            text.append("▀", Style(color=_hex(upper), bgcolor=_hex(lower) if line + 1 < size else None))
        text.append("\n")
    return text


def plain(policy: Policy, sidecars: Sidecars, columns: int, letters: str | None = None) -> str:
    """Return the mask in ASCII, for files, pipes and terminals without colours, at most ``columns`` wide.

    Packed samples are separated by ``|``. In longer rows a character stands for several pairs and shows their rarest
    kind. ``letters`` as in :func:`draw_png`. Raises UserError for rows too long to draw.
    """
    bars = int(run_starts(sidecars.segment.numpy()).sum()) - 1
    size = max(1, min(len(sidecars), columns - 2 - bars))
    grid, letters = cells(policy, sidecars), _pooled_letters(letters or token_letters(sidecars), size)
    edges = np.linspace(0, len(sidecars), size + 1).round().astype(int)[:-1]
    shown = np.maximum.reduceat(np.maximum.reduceat(grid, edges, axis=0), edges, axis=1)
    cuts = np.flatnonzero(run_starts(sidecars.segment.numpy()[edges])).tolist()[1:]
    lines = [f"{policy.name}: {policy.summary}", f"  {_barred(letters, cuts)}"]
    for line, (letter, row) in enumerate(zip(letters, shown, strict=True)):
        if line in cuts:
            lines.append(f"  {_barred('-' * size, cuts, '+')}")
        lines.append(f"{letter} {_barred(''.join(SIGNS[Cell(cell)] for cell in row), cuts)}".rstrip())
    return "\n".join([*lines, ""])


def _barred(line: str, cuts: Sequence[int], bar: str = "|") -> str:
    """Return a line with a bar before each place in ``cuts``."""
    return bar.join(line[start:end] for start, end in pairwise([0, *cuts, len(line)]))


def terminal_legend(*, colours: bool = True) -> Text:
    """Return the legend of :func:`terminal` (colours and letters), or of :func:`plain` (signs and letters)."""
    text = Text()
    for cell, (colour, meaning) in CELLS.items():
        text.append("■ " if colours else f"'{SIGNS[cell]}' ", Style(color=colour)).append(f"{meaning}  ")
    return text.append(
        "\n" + ", ".join(f"{letter} {meaning}" for letter, (_, meaning, _) in KINDS.items()), style="dim"
    )


def token_letters(sidecars: Sidecars) -> str:
    """Return a key of ``KINDS`` per token. Sidecars do not mark system text: its tokens are Q, given text."""
    table = token_table(sidecars)
    text = np.where(table.generated == 1, "A", "Q")
    media = np.array(["Q", *(letter for _, letter in _BY_MODALITY)])[table.modality]
    return "".join(np.where(table.segment == 0, "P", np.where(table.modality == TEXT, text, media)))


def runs_of(sidecars: Sidecars, letters: str | None = None) -> list[Run]:
    """Return the row's runs in order; ``letters`` as in :func:`draw_png`."""
    table, letters = token_table(sidecars), letters or token_letters(sidecars)
    columns = (table.segment, table.modality, table.instance, table.generated, np.array(list(letters)))
    starts = np.flatnonzero(run_starts(*columns)).tolist()
    return [Run(start, end, letters[start]) for start, end in pairwise([*starts, len(table)])]


def _turns(sidecars: Sidecars) -> Iterator[tuple[int, int, str]]:
    """Yield (start, end, ``sample.turn``) of every turn: its given tokens and the generated ones after them."""
    table = token_table(sidecars)
    turn = table.turn - table.generated
    starts = np.flatnonzero(run_starts(table.segment, turn))
    ends = np.append(starts[1:], len(table))
    for start, end in zip(starts.tolist(), ends.tolist(), strict=True):
        if table.segment[start]:
            yield start, end, f"{table.segment[start]}.{turn[start] + 1}"


def _draw_panel(
    axes: Any, policy: Policy, sidecars: Sidecars, grid: npt.NDArray[np.uint8], runs: Sequence[Run]
) -> None:
    tokens = len(sidecars)
    axes.imshow(_colours(grid, PANEL_PIXELS), extent=(0, tokens, tokens, 0), interpolation="nearest", aspect="equal")
    if tokens <= 100:
        axes.hlines(range(tokens + 1), 0, tokens, colors="#e4e4e4", linewidths=0.4)
        axes.vlines(range(tokens + 1), 0, tokens, colors="#e4e4e4", linewidths=0.4)
    segment = sidecars.segment.numpy()
    for edge in np.flatnonzero(run_starts(segment)).tolist()[1:]:
        axes.axhline(edge, color="#888888", linewidth=0.7)
        axes.axvline(edge, color="#888888", linewidth=0.7)
    axes.set(xticks=[], yticks=[])
    _draw_bands(axes, sidecars, runs)
    axes.text(0.5, 1.13, policy.name, transform=axes.transAxes, ha="center", fontsize=15, fontweight="bold")
    axes.text(0.5, 1.095, policy.summary, transform=axes.transAxes, ha="center", fontsize=8, color="#444444")


def _draw_bands(axes: Any, sidecars: Sidecars, runs: Sequence[Run]) -> None:
    """Draw a band of coloured runs and a band of turns along both axes."""
    tokens = len(sidecars)
    for bounds, horizontal in (((0, 1.005, 1, 0.03), True), ((-0.035, 0, 0.03, 1), False)):
        band = axes.inset_axes(bounds)
        band.set(xlim=(0, tokens) if horizontal else (0, 1), ylim=(0, 1) if horizontal else (tokens, 0))
        band.set_axis_off()
        for run in runs:
            span = band.axvspan if horizontal else band.axhspan
            span(run.start, run.end, facecolor=KINDS[run.letter][0], edgecolor="white", linewidth=0.4)
            _label(band, run.start, run.end, run.label, tokens, horizontal, KINDS[run.letter][2], 0.5)
        for start, end, label in _turns(sidecars):
            _label(band, start, end, label, tokens, horizontal, "#333333", 1.75 if horizontal else -0.75)


def _label(
    band: Any, start: int, end: int, label: str, tokens: int, horizontal: bool, colour: str, height: float
) -> None:
    """Write a label in the middle of its span in the largest size that fits; omit it where none does."""
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
    figure.text(0.5, (LEGEND - 0.15) / figure.get_figheight(), FOOTNOTE, ha="center", va="top", fontsize=9)


def _colours(grid: npt.NDArray[np.uint8], size: int) -> RGB:
    """Return the cells' colours, floats [n, n, 3] in 0..1, averaged down to n = ``size`` if there are more."""
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


def _pooled_letters(letters: str, size: int) -> str:
    """Return one letter per column of a terminal view."""
    places: IntArray = np.linspace(0, len(letters), size, endpoint=False).astype(np.int64)
    return "".join(letters[place] for place in places)


def _hex(colour: RGB) -> str:
    red, green, blue = (round(float(x) * 255) for x in colour)
    return f"#{red:02x}{green:02x}{blue:02x}"
