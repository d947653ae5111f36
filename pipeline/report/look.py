"""Pictures and pages of :mod:`pipeline.report.movement`: heat maps over the picture, one per layer and mask."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from data_prep.common.errors import UserError
from data_prep.images.store import ImageStore
from data_prep.packs import PackReader
from data_prep.show.web_page import Html, el, embedded, page, table
from data_prep.show.web_page import picture as thumbnail
from pipeline.report.chart import Line, chart
from pipeline.report.history import FloatArray
from pipeline.report.movement import Movement, movements
from pipeline.serving.evaluate import Question, check_same, prompt_of, questions
from pipeline.serving.model import MultimodalModel

SIDE_PX = 150
STRIP_PX = 18
MAPS = 7
"""Most layers that are drawn; the chart and the table have all of them."""
HEAT = (214, 69, 0)
Grid = tuple[int, int]


@dataclass(frozen=True)
class Look:
    """A picture, two questions, and what they change."""

    model: str
    picture: Image.Image
    questions: tuple[str, str]
    movements: Sequence[Movement]
    grid: Grid | None
    """Image tokens as (rows, columns) over the picture; None: in no order over it."""

    def __post_init__(self) -> None:
        cells = self.movements[0].values_LN.shape[1]
        assert self.grid is None or self.grid[0] * self.grid[1] == cells, "one picture, one token per cell"

    @property
    def layers(self) -> list[int]:
        """The layers that are drawn, 0 = the input of the first: the first and last one, and some between."""
        last = len(self.movements[0].values_LN) - 1
        return sorted(set(np.linspace(0, last, min(MAPS, last + 1)).round().astype(int).tolist()))

    @property
    def largest(self) -> float:
        """The largest movement, which the darkest colour stands for."""
        return max(float(movement.values_LN.max()) for movement in self.movements)


def heat_map(picture: Image.Image, values_N: FloatArray, largest: float, grid: Grid | None) -> Image.Image:
    """Return the faded picture, coloured by the values of its tokens; without a grid a strip of the tokens.

    A token that has not moved has no colour at all.
    """
    share = values_N / largest if largest > 0 else np.zeros_like(values_N)
    if grid is None:
        alpha = Image.fromarray((255 * share[None]).astype(np.uint8)).resize(
            (SIDE_PX, STRIP_PX), Image.Resampling.NEAREST
        )
        back = Image.new("RGB", (SIDE_PX, STRIP_PX), "white")
    else:
        back = _faded(picture)
        cells = Image.fromarray((225 * share.reshape(grid)).astype(np.uint8))
        alpha = cells.resize(back.size, Image.Resampling.NEAREST)
    back.paste(HEAT, (0, 0, *back.size), alpha)
    return back


def section(look: Look) -> Iterator[Html]:
    """Yield the part of a page about one picture."""
    first, second = look.questions
    words = el("div", el("p", f"A: {first}"), el("p", f"B: {second}"))
    yield el("div", thumbnail(look.picture), words, class_="example")
    yield el("p", _legend(look), class_="quiet")
    for movement in look.movements:
        yield el("p", f"mask: {movement.policy}{'' if movement.values_LN.any() else ' (exactly 0 in every layer)'}")
        yield el("div", *(_figure(look, movement, layer) for layer in look.layers), class_="content")
    lines = [
        Line(one.policy, np.arange(len(one.values_LN), dtype=np.float64), one.values_LN.mean(1), colour=colour)
        for colour, one in enumerate(look.movements)
    ]
    keys = [el("span", line.name, class_=f"key k{line.colour}") for line in lines]
    title = el("p", "mean movement of the image tokens after each layer", *keys, class_="quiet")
    yield el("div", el("div", title, chart(lines, x_label="layer")), _table(look), class_="charts")


def _figure(look: Look, movement: Movement, layer: int) -> Html:
    values = movement.values_LN[layer]
    stream = io.BytesIO()
    heat_map(look.picture, values, look.largest, look.grid).save(stream, "PNG")
    name = "input" if layer == 0 else f"layer {layer}"
    caption = f"{name}: mean {values.mean():.2g}"
    image = embedded(stream.getvalue(), "png", alt=f"{movement.policy}, {caption}")
    return el("figure", image, el("figcaption", caption))


def _legend(look: Look) -> str:
    shape = "a strip, one cell per token" if look.grid is None else f"{look.grid[0]} x {look.grid[1]} tokens"
    return (
        "Colour: 1 - cosine between the states of an image token under question A and question B, 0 (none) to "
        f"{look.largest:.3g} (darkest); {shape}. The same weights under both masks."
    )


def _table(look: Look) -> Html:
    header = ["after layer", *(f"{one.policy}: {what}" for one in look.movements for what in ("mean", "largest"))]
    rows = [
        ["input" if layer == 0 else str(layer)]
        + [
            f"{value:.3g}"
            for one in look.movements
            for value in (one.values_LN[layer].mean(), one.values_LN[layer].max())
        ]
        for layer in range(len(look.movements[0].values_LN))
    ]
    return table(header, rows)


def looks(model: MultimodalModel, name: str, packs: PackReader, count: int) -> Iterator[Look]:
    """Yield looks at the first pictures of a pack folder that two questions ask about, at most ``count``.

    Raises UserError for packs of another tokenizer or other image tokens than the model's.
    """
    check_same(model, packs)
    if not packs.manifest.image_store:
        return
    images = ImageStore(packs.directory / packs.manifest.image_store)
    earlier: dict[int, Question] = {}
    for question in questions(packs):
        if len(question.image_rows) != 1 or count < 1:
            continue
        row = question.image_rows[0]
        other = earlier.setdefault(row, question)
        words = _words(model, other), _words(model, question)
        places = [np.flatnonzero(q.prompt.modality) for q in (other, question)]
        if words[0] == words[1] or not np.array_equal(places[0], places[1]):
            continue
        prompts = [prompt_of(q, images) for q in (other, question)]
        yield Look(name, prompts[0].images[0], words, movements(model, *prompts), model.spec.mask_grid)
        del earlier[row]
        count -= 1


def _words(model: MultimodalModel, question: Question) -> str:
    return model.tokenizer.decode(question.prompt.ids[question.prompt.instance < 0].tolist()).strip()


def look_page(look: Look) -> bytes:
    """Return a page about one picture, which loads nothing from a network."""
    title = f"How image states move with the question: {look.model}"
    return page(title, [el("h1", title), el("p", "mma look", class_="quiet"), *section(look)])


def look_png(look: Look) -> bytes:
    """Return the heat maps as one picture: a row per mask, a column per layer."""
    height = SIDE_PX if look.grid is None else _faded(look.picture).height
    cell, label, gap = max(STRIP_PX, height if look.grid else STRIP_PX), 16, 6
    width = gap + len(look.layers) * (SIDE_PX + gap)
    sheet = Image.new("RGB", (width, gap + len(look.movements) * (cell + label + gap)), "white")
    pen = ImageDraw.Draw(sheet)
    for row, movement in enumerate(look.movements):
        top = gap + row * (cell + label + gap)
        for column, layer in enumerate(look.layers):
            left, values = gap + column * (SIDE_PX + gap), movement.values_LN[layer]
            name = "input" if layer == 0 else f"layer {layer}"
            pen.text((left, top), f"{movement.policy}, {name}: {values.mean():.2g}", fill="black")
            sheet.paste(heat_map(look.picture, values, look.largest, look.grid), (left, top + label))
    stream = io.BytesIO()
    sheet.save(stream, "PNG")
    return stream.getvalue()


def write_look(look: Look, out: Path) -> int:
    """Write a page, or a picture where ``out`` ends with ``.png``; return its bytes. Raises UserError if it cannot."""
    content = look_png(look) if out.suffix.lower() == ".png" else look_page(look)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_bytes(content)
    except OSError as error:
        raise UserError(f"{out} cannot be written ({error.strerror}): choose another --out") from error
    return len(content)


def _faded(picture: Image.Image) -> Image.Image:
    """Return the picture in pale grey, SIDE_PX wide."""
    height = max(1, round(SIDE_PX * picture.height / picture.width))
    grey = picture.convert("L").resize((SIDE_PX, height)).convert("RGB")
    return Image.blend(grey, Image.new("RGB", grey.size, "white"), 0.65)
