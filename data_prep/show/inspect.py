"""Shows packed rows in the terminal: given and generated tokens, images and sources."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import numpy as np
from PIL import Image
from rich.console import Console
from rich.text import Text

from data_prep.common.errors import UserError
from data_prep.images.augment import apply_augmentation, describe_augmentation
from data_prep.images.store import ImageStore, decode_rgb
from data_prep.packs import PackReader, PackRow
from data_prep.show.terminal import plain_console, printable
from data_prep.text.tokenizer import Tokenizer
from data_prep.verify import pack_folders

GIVEN, GENERATED, SHOWN, MARK = "", "bold green", "cyan", "magenta"
LEGEND = Text.assemble(
    "given  ", ("generated (supervised)", GENERATED), "  ", ("roles and ends", MARK), "  ", ("image", SHOWN)
)


@dataclass(frozen=True, slots=True)
class TokenSpan:
    """Consecutive tokens of one kind: an image, special tokens, given or generated text."""

    text: str
    """Decoded; empty for an image."""
    tokens: int
    generated: bool
    special: bool
    instance: int
    """Index into the row's images; -1 for text."""


class PackFolder:
    """A pack folder with its tokenizer and image store.

    Raises UserError if ``directory`` is not a pack folder, or holds several.
    """

    def __init__(self, directory: Path) -> None:
        self.path = _only(pack_folders(directory))
        self.reader = PackReader(self.path)
        self.manifest = self.reader.manifest
        self.tokenizer = Tokenizer.load(self.path / self.manifest.tokenizer)
        store = self.manifest.image_store
        self.store = ImageStore(self.path / store) if store else None

    def token_spans(self, row: PackRow, segment: int) -> Iterator[TokenSpan]:
        """Yield the token spans of one packed sample (counted from 1), in order."""
        places = np.flatnonzero(row.segment == segment)

        def kind(at: int) -> tuple[int, bool, bool]:
            instance = int(row.instance[at])
            special = instance < 0 and self.tokenizer.is_special(int(row.input_ids[at]))
            return instance, bool(row.generated[at]), special

        for (instance, generated, special), group in groupby(places.tolist(), key=kind):
            ids = row.input_ids[list(group)].tolist()
            text = self.tokenizer.decode(ids, specials=True) if instance < 0 else ""
            yield TokenSpan(text, len(ids), generated, special, instance)

    def describe_image(self, row: PackRow, instance: int) -> str:
        """Return ``640x480 px, mirrored`` for an image of a row: upright size and augmentation."""
        size = "x".join(map(str, self.store.size(int(row.image_row[instance])))) if self.store else "?"
        augmentation = "" if row.augmentation is None else describe_augmentation(row.augmentation[instance])
        return f"{size} px, {augmentation}" if augmentation else f"{size} px"

    def image(self, row: PackRow, instance: int) -> Image.Image:
        """Return an image of a row as training sees it. Raises BadImage if it cannot be decoded."""
        assert self.store is not None, "a row with images, but the packs name no image store"
        image = decode_rgb(self.store.read(int(row.image_row[instance])))
        return image if row.augmentation is None else apply_augmentation(image, row.augmentation[instance])


def chosen_rows(text: str, rows: int) -> range:
    """Parse ``N`` or ``A:B`` (rows A to B - 1). Raises UserError if a row does not exist."""
    first, colon, last = text.partition(":")
    flag = f"--row{'s' * bool(colon)} {text}"
    try:
        start = int(first or 0)
        stop = int(last or rows) if colon else start + 1
    except ValueError:
        raise UserError(f"{flag}: write N, or A:B for rows A to B - 1") from None
    if not 0 <= start < stop <= rows:
        raise UserError(f"{flag}: the folder holds rows 0 to {rows - 1}")
    return range(start, stop)


def show_rows(directory: Path, wanted: str = "0", console: Console | None = None) -> None:
    """Print rows of a pack folder, decoded; ``wanted`` as in :func:`chosen_rows`. Raises UserError."""
    console = console or plain_console()
    folder = PackFolder(directory)
    for number in chosen_rows(wanted, len(folder.reader)):
        _show_row(folder, number, console)


def _show_row(folder: PackFolder, number: int, console: Console) -> None:
    row, seq_len = folder.reader[number], folder.manifest.seq_len
    used = int(np.count_nonzero(row.segment))
    console.print(f"row {number} of {len(folder.reader)}: {used} of {seq_len} tokens, {row.n_target} supervised")
    console.print(LEGEND)
    for segment, source in enumerate(row.source, start=1):
        title = f"{segment}: {source.dataset} {source.sample}  draw {source.draw}  {source.family}"
        console.rule(Text(printable(title), style="rule.text"), align="left")
        console.print(_segment_text(folder, row, segment))


def _segment_text(folder: PackFolder, row: PackRow, segment: int) -> Text:
    """Return one packed sample as coloured text; images are described."""
    shown = Text()
    for part in folder.token_spans(row, segment):
        if part.instance >= 0:
            image, about = int(row.image_row[part.instance]), folder.describe_image(row, part.instance)
            tokens = folder.manifest.image_tokens if row.media is None else int(row.media[part.instance, 4])
            words = f"[image {image}: {about}, {part.tokens} of {tokens} tokens]"
            shown.append(words, style=SHOWN)
            continue
        written = GENERATED if part.generated else GIVEN
        shown.append(printable(part.text), style=f"{written} {MARK}".strip() if part.special else written)
    return shown


def _only(folders: Sequence[Path]) -> Path:
    if len(folders) > 1:
        names = ", ".join(str(folder) for folder in folders)
        raise UserError(f"several pack folders here: give one of {names}")
    return folders[0]
