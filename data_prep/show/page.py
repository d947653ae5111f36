"""Packed rows as one HTML page: images, roles, supervision and sources, with statistics of the pack set."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data_prep.common.files import write_atomic
from data_prep.images.store import BadImage
from data_prep.packs import PackRow, Source
from data_prep.show.inspect import PackFolder, TokenSpan, chosen_rows
from data_prep.show.stats import (
    CORPUS_COLUMNS,
    LOG_NOTE,
    binned,
    corpus_notes,
    corpus_rows,
    efficiency,
    log_heights,
    segment_lengths,
)
from data_prep.show.web_page import Html, el, embedded, histogram_svg, join, page, picture, table, tiles


class Masks(NamedTuple):
    """Draws the mask of a row. Masks belong to the trainer, which passes this in."""

    draw: Callable[[PackRow], bytes]
    """Returns a PNG."""
    caption: str


DEFAULT_ROWS = 24
_BINS = 28
_SHORT_CHARACTERS = 30
_KINDS = {
    "given": "given text",
    "generated": "generated: supervised",
    "special": "roles and ends",
    "image": "image",
    "padding": "padding",
}
_SCRIPT = """
"use strict";
const rows = [...document.querySelectorAll("[data-row]")], at = document.getElementById("at");
const corpus = document.getElementById("corpus"), where = document.getElementById("where");
let shown = rows;
function show(n) {
  n = Math.max(0, Math.min(n, shown.length - 1));
  rows.forEach(row => row.hidden = row !== shown[n]);
  at.value = shown[n].dataset.row;
  where.textContent = `${n + 1} of ${shown.length} on this page`;
}
const current = () => shown.findIndex(row => !row.hidden);
function jump(wanted) {  // to the row of this number, or the next one on the page
  const n = shown.findIndex(row => Number(row.dataset.row) >= wanted);
  show(n < 0 ? shown.length - 1 : n);
}
function filter() {
  const has = row => [...row.querySelectorAll("[data-corpus]")].some(one => one.dataset.corpus === corpus.value);
  shown = corpus.value ? rows.filter(has) : rows;
  document.querySelectorAll("[data-corpus]").forEach(one =>
    one.style.opacity = !corpus.value || one.dataset.corpus === corpus.value ? 1 : 0.35);
  show(0);
}
document.getElementById("before").onclick = () => show(current() - 1);
document.getElementById("after").onclick = () => show(current() + 1);
at.onchange = () => jump(Number(at.value));
corpus.onchange = filter;
document.onkeydown = event => {
  if (event.target.tagName === "INPUT" || event.target.tagName === "SELECT") return;
  if (event.key === "ArrowLeft") show(current() - 1);
  if (event.key === "ArrowRight") show(current() + 1);
};
show(0);
"""


def write_inspect_page(directory: Path, out: Path, wanted: str = "", masks: Masks | None = None) -> str:
    """Write the page of a pack folder; return a line that describes it.

    Args:
        directory: a pack folder, or an output folder with one.
        out: HTML file to write.
        wanted: rows as in ``chosen_rows``; empty for ``DEFAULT_ROWS`` rows spread evenly over the folder.
        masks: draws mask thumbnails; None for none.

    Raises:
        UserError: the folder or a row does not exist.
    """
    folder = PackFolder(directory)
    total = len(folder.reader)
    numbers = list(chosen_rows(wanted, total)) if wanted else _spread(total)
    spread = "" if wanted or len(numbers) == total else ", spread evenly; --rows A:B shows others"
    note = f"{len(numbers):,} of {total:,} rows on this page{spread}"
    body = [*_summary(folder), el("h2", "Rows"), *_browser(folder, numbers, note, masks)]
    data = page(f"{folder.path} - packed rows", body, _SCRIPT)
    write_atomic(out, data)
    return f"{out}: {note}, {len(data) / 1e6:.1f} MB"


def _spread(total: int) -> list[int]:
    return sorted({round(place) for place in np.linspace(0, total - 1, min(total, DEFAULT_ROWS))})


def _summary(folder: PackFolder) -> Iterator[Html]:
    manifest = folder.manifest
    yield el("h1", str(folder.path))
    identity = f"plan {manifest.plan_sha256[:12]}, tokenizer {manifest.tokenizer_sha256[:12]}, seed {manifest.seed}"
    yield el("p", f"template {manifest.template}, {identity}", class_="quiet")
    yield tiles(
        [
            (f"{manifest.rows:,}", f"rows of {manifest.seq_len:,} tokens"),
            (f"{efficiency(manifest):.1%}", "of all positions used"),
            (f"{manifest.tokens:,}", "tokens"),
            (f"{manifest.targets / max(1, manifest.tokens):.1%}", "of tokens supervised"),
            (f"{manifest.images:,}", f"images, {manifest.media_spec.image.describe()}"),
            (f"{manifest.max_images:,}", "images in a row at most"),
        ]
    )
    lengths = _histogram(folder)
    notes = (el("p", line, class_="quiet") for line in corpus_notes(manifest))
    yield el(
        "div",
        el("div", el("h2", "Corpora"), table(CORPUS_COLUMNS, corpus_rows(manifest)), *notes),
        el("div", el("h2", "Lengths of packed samples in tokens"), lengths),
        class_="columns",
    )


def _histogram(folder: PackFolder) -> Html:
    counts, edges = binned(segment_lengths(folder.reader), _BINS)
    return histogram_svg(counts, edges, log_heights(counts), LOG_NOTE)


def _browser(folder: PackFolder, numbers: list[int], note: str, masks: Masks | None) -> Iterator[Html]:
    names = sorted({source.dataset for number in numbers for source in folder.reader[number].source})
    choices = [el("option", "all corpora", value=""), *(el("option", name, value=name) for name in names)]
    yield el(
        "nav",
        el("button", "\u2190 previous", id="before"),
        el("button", "next \u2192", id="after"),
        el("label", "row ", el("input", id="at", type="number", min=0, max=len(folder.reader) - 1)),
        el("select", *choices, id="corpus"),
        el("span", id="where"),
    )
    legend = [join([el("i", "\u00a0", class_=f"key bar-{kind}"), " ", words]) for kind, words in _KINDS.items()]
    yield el("p", note, ".", *legend, class_="quiet")
    for number in numbers:
        yield _card(folder, number, masks)


def _card(folder: PackFolder, number: int, masks: Masks | None) -> Html:
    row, seq_len = folder.reader[number], folder.manifest.seq_len
    parts = {segment: list(folder.token_spans(row, segment)) for segment in range(1, len(row.source) + 1)}
    used = int(np.count_nonzero(row.segment))
    summary = f"{used:,} of {seq_len:,} tokens, {row.n_target:,} supervised, {len(row.image_row)} images"
    segments = (_segment(folder, row, at, parts[at], source) for at, source in enumerate(row.source, start=1))
    columns = [el("div", *segments)]
    if masks is not None:
        mask = embedded(masks.draw(row), "png", alt=f"mask of row {number}")
        columns.append(el("figure", mask, el("figcaption", masks.caption), class_="mask"))
    return el(
        "section",
        el("b", f"row {number:,}"),
        " ",
        el("span", summary, class_="quiet"),
        _ribbon(parts, seq_len - used),
        el("div", *columns, class_="beside"),
        class_="card",
        data_row=number,
    )


def _ribbon(parts: dict[int, list[TokenSpan]], padding: int) -> Html:
    """Return a bar of the row: one colour per kind of token, widths in proportion to tokens."""
    pieces = []
    for segment, token_spans in parts.items():
        starts = " starts"
        for kind, group in groupby(token_spans, key=_kind):
            tokens = sum(part.tokens for part in group)
            title = f"sample {segment}: {tokens} tokens, {_KINDS[kind]}"
            pieces.append(el("i", class_=f"bar-{kind}{starts}", style=f"flex-grow:{tokens}", title=title))
            starts = ""
    if padding:
        title = f"{padding} tokens, padding"
        pieces.append(el("i", class_="bar-padding", style=f"flex-grow:{padding}", title=title))
    return el("div", *pieces, class_="ribbon")


def _kind(part: TokenSpan) -> str:
    if part.instance >= 0:
        return "image"
    return "generated" if part.generated else "special" if part.special else "given"


def _segment(folder: PackFolder, row: PackRow, number: int, parts: list[TokenSpan], source: Source) -> Html:
    tokens = sum(part.tokens for part in parts)
    supervised = (
        sum(part.tokens for part in parts if part.generated) - parts[0].generated
    )  # no token predicts the first one
    counted = f"{tokens:,} tokens, {supervised:,} supervised"
    family = f", family {source.family}" if source.family else ""
    about = f" sample {source.sample}, draw {source.draw:,}{family}; {counted}"
    content: list[Html] = []
    for shows, group in groupby(parts, key=lambda part: part.instance >= 0):
        run = list(group)
        content += [_figure(folder, row, part) for part in run] if shows else [_text(run)]
    return el(
        "div",
        el("div", f"{number}. ", el("b", source.dataset), about, class_="source"),
        el("div", *content, class_="content"),
        class_="segment",
        data_corpus=source.dataset,
    )


def _text(parts: list[TokenSpan]) -> Html:
    spans = []
    for part in parts:
        kinds = [name for name, holds in (("generated", part.generated), ("special", part.special)) if holds]
        spans.append(el("span", part.text, class_=" ".join(kinds) or "given"))
    long = sum(len(part.text) for part in parts) > _SHORT_CHARACTERS
    return el("div", *spans, class_="text long" if long else "text")


def _figure(folder: PackFolder, row: PackRow, part: TokenSpan) -> Html:
    image = int(row.image_row[part.instance])
    try:
        shown = picture(folder.image(row, part.instance), alt=f"image {image}")
    except BadImage as problem:
        shown = el("span", f"cannot be shown: {problem}")
    about = folder.describe_image(row, part.instance)
    return el("figure", shown, el("figcaption", f"image {image}: {about}"))
