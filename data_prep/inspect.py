"""A packed row in the terminal: what the model is given, what it must write, and where everything came from."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.text import Text

from data_prep.errors import UserError
from data_prep.images import ImageStore
from data_prep.packs import Manifest, PackReader, PackRow
from data_prep.tokenizer import Tokenizer
from data_prep.verify import pack_folders

GIVEN, GENERATED, IMAGE, MARK = "", "bold green", "cyan", "magenta"
LEGEND = f"given  [{GENERATED}]generated (supervised)[/]  [{MARK}]roles and ends[/]  [{IMAGE}]image[/]"


def show_row(directory: Path, number: int, console: Console | None = None) -> None:
    """Print row ``number`` of a pack folder, decoded.

    Raises:
        UserError: ``directory`` is no pack folder, holds several, or has no such row.
    """
    console = console or Console(highlight=False)
    folder = _only(pack_folders(directory))
    reader = PackReader(folder)
    if not 0 <= number < len(reader):
        raise UserError(f"--row {number}: {folder} has rows 0 to {len(reader) - 1}")
    row, manifest = reader[number], reader.manifest
    tokenizer = Tokenizer.load(folder / manifest.tokenizer)
    store = ImageStore(folder / manifest.image_store) if manifest.image_store else None
    used = int(np.count_nonzero(row.segment))
    console.print(f"row {number} of {len(reader)}: {used} of {manifest.length} tokens, {row.n_target} supervised")
    console.print(LEGEND)
    for segment, source in enumerate(row.source, start=1):
        console.rule(f"{segment}: {source.dataset} {source.sample}  draw {source.draw}  {source.family}", align="left")
        console.print(segment_text(row, segment, manifest, tokenizer, store))


def segment_text(
    row: PackRow, segment: int, manifest: Manifest, tokenizer: Tokenizer, store: ImageStore | None
) -> Text:
    """Return one packed sample as coloured text; images are shown by size and place."""
    shown = Text()
    places = np.flatnonzero(row.segment == segment)

    def kind(at: int) -> tuple[int, str]:
        if row.instance[at] >= 0:
            return int(row.instance[at]), IMAGE
        mark = tokenizer.is_special(int(row.input_ids[at]))
        written = GENERATED if row.generated[at] else GIVEN
        return -1, f"{written} {MARK}".strip() if mark else written

    for (instance, style), group in groupby(places.tolist(), key=kind):
        ids = row.input_ids[list(group)].tolist()
        if instance < 0:
            shown.append(tokenizer.decode(ids, specials=True), style=style)
            continue
        image = int(row.image_row[instance])
        size = "x".join(map(str, store.size(image))) if store else "?"
        shown.append(f"[image {image}: {size} px, {len(ids)} of {manifest.image_tokens} tokens]", style=style)
    return shown


def _only(folders: list[Path]) -> Path:
    if len(folders) > 1:
        names = ", ".join(str(folder) for folder in folders)
        raise UserError(f"there are several pack folders: name one of {names}")
    return folders[0]
