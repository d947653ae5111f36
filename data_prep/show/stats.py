"""Statistics of packs, counted from the rows: corpora, lengths, packing efficiency."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from data_prep.common.events import EVENTS_FILE, EventLedger, describe_events
from data_prep.images.augment import UNIT
from data_prep.packs import Manifest, PackReader
from data_prep.planning.audit import turn_notes
from data_prep.quarantine import REPAIRS
from data_prep.show.terminal import plain_console, printable
from data_prep.verify import pack_folders

CORPUS_COLUMNS = ("corpus", "samples", "draws", "epochs", "tokens", "supervised", "share of tokens")
_BAR = 40
_BINS = 12
_LENGTHS = 8
LOG_NOTE = "log scale"


def show_stats(directory: Path, console: Console | None = None) -> None:
    """Print the statistics of one pack folder, or of all in an output folder. Raises UserError."""
    console = console or plain_console()
    events = EventLedger(directory / EVENTS_FILE).summary()
    if events:
        console.print(f"events so far: {describe_events(events)}; see {printable(str(directory / EVENTS_FILE))}")
    for folder in pack_folders(directory):
        reader = PackReader(folder)
        manifest = reader.manifest
        rows = f"{manifest.rows:,} rows of {manifest.seq_len} tokens"
        counts = (
            f": {rows}, {efficiency(manifest):.1%} full, "
            f"{manifest.targets:,} supervised ({manifest.targets / max(1, manifest.tokens):.1%}), "
            f"at most {manifest.max_images} images in a row"
        )
        console.print(Text.assemble("\n", (printable(str(folder)), "bold"), counts))
        console.print(_corpus_table(manifest))
        for line in corpus_notes(manifest):
            console.print(printable(line))
        if line := augmentation_counts(reader):
            console.print(line)
        console.print(f"lengths of packed samples in tokens ({LOG_NOTE})")
        for line in histogram(segment_lengths(reader)):
            console.print("  " + line)


def show_lengths(
    own: Mapping[str, int], found: Mapping[str, Mapping[int, float]], console: Console | None = None
) -> None:
    """Print the row lengths with the best packing efficiency of each pack set, and its own.

    Args:
        own: pack set -> row length in the recipe.
        found: pack set -> row length -> packing efficiency.
        console: output.
    """
    console = console or plain_console()
    for name, full in found.items():
        fullest = sorted(full, key=lambda size: -full[size])[:_LENGTHS]
        table = Table("length", "full", title=f"packs.{name}", title_justify="left")
        for size in sorted({own[name], *fullest}):
            mark = "  in the recipe" if size == own[name] else ""
            table.add_row(f"{size:,}", f"{full[size]:.1%}{mark}")
        console.print(table)


def efficiency(manifest: Manifest) -> float:
    """Return the share of all positions that hold tokens."""
    return manifest.tokens / max(1, manifest.rows * manifest.seq_len)


def corpus_rows(manifest: Manifest) -> Iterator[tuple[str, ...]]:
    """Yield the values of ``CORPUS_COLUMNS`` of each corpus as text."""
    for name, stats in manifest.corpora.items():
        share = stats.tokens / max(1, manifest.tokens)
        supervised = f"{stats.targets:,} ({stats.targets / max(1, stats.tokens):.1%})"
        numbers = (f"{stats.samples:,}", f"{stats.draws:,}", f"{stats.epochs:.2f}", f"{stats.tokens:,}", supervised)
        yield name, *numbers, f"{share:.1%}"


def corpus_notes(manifest: Manifest) -> Iterator[str]:
    """Yield notes about corpora, one line each."""
    for name, stats in manifest.corpora.items():
        for line in turn_notes(stats):
            yield f"{name}: {line}"
        for code, count in stats.repairs.items():
            yield f"{name}: repaired {count:,} x {code}: {REPAIRS.get(code, '')}"


def _corpus_table(manifest: Manifest) -> Table:
    table = Table(*(Column(name, overflow="fold") for name in CORPUS_COLUMNS))
    for column in table.columns[1:]:
        column.justify = "right"
    for row in corpus_rows(manifest):
        table.add_row(*map(printable, row))
    return table


def segment_lengths(reader: PackReader) -> npt.NDArray[np.int64]:
    """Return the lengths of all packed samples in tokens."""
    counts = [np.bincount(reader.segment(index))[1:] for index in range(len(reader))]
    return np.concatenate([*counts, np.empty(0, dtype=np.int64)]).astype(np.int64)


def augmentation_counts(reader: PackReader) -> str:
    """Return a line about augmented images; empty if the recipe asks for no augmentation."""
    sources: dict[str, dict[str, object]] = reader.manifest.recipe.get("sources", {})
    if not any(source.get("augment") for source in sources.values()):
        return ""
    augmentations = np.concatenate([row.augmentation for row in reader if row.augmentation is not None])
    cropped = np.count_nonzero((augmentations[:, 3:] < UNIT).any(axis=1))
    return f"images: {np.count_nonzero(augmentations[:, 0]):,} of {len(augmentations):,} mirrored, {cropped:,} cropped"


def binned(values: npt.NDArray[np.int64], most: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """Return counts and edges of at most ``most`` bins, none narrower than 1."""
    counts, edges = np.histogram(values, bins=min(most, max(1, int(np.ptp(values)) + 1)))
    return counts.astype(np.int64), edges


def log_heights(counts: npt.NDArray[np.int64]) -> list[float]:
    """Return heights of bars on a log scale, 0 for no sample to 1 for the highest: one bar does not hide the others."""
    logs = np.log10(counts.astype(np.float64) + 1)
    return [float(height) for height in logs / max(1e-9, float(logs.max(initial=0)))]


def histogram(values: npt.NDArray[np.int64]) -> Iterator[str]:
    """Yield the lines of a text histogram."""
    counts, edges = binned(values, _BINS)
    heights = log_heights(counts)
    for count, height, low, high in zip(counts.tolist(), heights, edges[:-1], edges[1:], strict=True):
        bar = "#" * round(_BAR * height)
        yield f"{low:6.0f} - {high:6.0f}  {count:9,}  {bar}"
