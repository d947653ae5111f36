"""Shows quarantined samples: counts by reason, and examples with their text and image."""

from __future__ import annotations

import bisect
import json
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table

from data_prep.common.errors import UserError, one_line
from data_prep.common.files import check_sums, read_bounded, sha256_file, write_atomic
from data_prep.corpora.webdataset import read_image
from data_prep.example import MAX_IMAGE_BYTES
from data_prep.images.store import BadImage, decode_rgb
from data_prep.quarantine import CODES
from data_prep.show.terminal import plain_console, printable
from data_prep.show.web_page import Html, el, page, picture, table, tiles

NOTHING = "nothing was rejected"
EXAMPLES = 12
"""Maximum examples of each corpus and reason on a page."""
_TERMINAL_EXAMPLES = 3
_TERMINAL_CHARACTERS = 110
_MAX_IMAGE_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class Rejected:
    """One line of ``rejects.jsonl``."""

    corpus: str
    shard: str
    sample: str
    code: str
    detail: str
    raw: str = ""
    """Start of its text."""
    image: str = ""
    """Path of its image, or of the archive that holds it."""
    member: str = ""
    """Name of the image inside an archive."""

    def picture(self) -> Html | None:
        """Return the image, or None if it cannot be opened."""
        if not self.image:
            return None
        path = Path(self.image)
        try:
            return picture(
                decode_rgb(read_image(path, self.member) if self.member else read_bounded(path, MAX_IMAGE_BYTES)),
                alt="",
            )
        except (OSError, ValueError, KeyError, BadImage):
            return None


@dataclass(slots=True)
class Group:
    """The samples of one corpus rejected for one reason.

    A corpus that two pack sets encode differently is ingested twice, and its rejected samples count twice.
    """

    corpus: str
    code: str
    count: int = 0
    examples: list[tuple[int, Rejected]] = field(default_factory=list)
    """At most ``EXAMPLES``, chosen by a hash of their ids: spread over the corpus, and always the same."""

    def add(self, item: Rejected) -> None:
        """Count a sample, and keep it if it is one of the examples."""
        self.count += 1
        entry = (zlib.crc32(item.sample.encode(errors="replace")), item)
        place = bisect.bisect_left(self.examples, entry[0], key=lambda one: one[0])
        if entry not in self.examples[place : place + 1]:  # another corpus variant may reject it too
            self.examples.insert(place, entry)
            del self.examples[EXAMPLES:]


def _parse(line: bytes) -> Rejected:
    """Parse a line. Raises ValueError, TypeError or RecursionError."""
    raw = json.loads(line)  # not pydantic: names of files may hold lone surrogates
    if not isinstance(raw, dict) or not all(isinstance(value, str) for value in raw.values()):
        raise ValueError("a JSON object of texts belongs here")
    return Rejected(**raw)


def read_rejects(directory: Path) -> list[Group]:
    """Return the rejected samples of an output folder by corpus, most common reason first.

    Raises:
        UserError: ``rejects.jsonl`` is missing, or a line of it is damaged.
    """
    path = directory / "rejects.jsonl"
    if not path.is_file():
        raise UserError(f"{directory}: no rejects.jsonl here; name an output folder in which ingest is complete")
    check_sums(path, sha256_file(path))
    groups: dict[tuple[str, str], Group] = {}
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                item = _parse(line)
            except (ValueError, TypeError, RecursionError) as error:
                raise UserError(
                    f"{path}: line {number} is damaged ({one_line(error)[:200]}); run `mma-prep ingest` again"
                ) from error
            groups.setdefault((item.corpus, item.code), Group(item.corpus, item.code)).add(item)
    return sorted(groups.values(), key=lambda group: (group.corpus, -group.count, group.code))


def show_rejects(directory: Path, console: Console | None = None) -> None:
    """Print reasons and a few examples of each. Raises UserError."""
    console = console or plain_console()
    groups = read_rejects(directory)
    if not groups:
        console.print(printable(f"{directory}: {NOTHING}"))
        return
    counts = Table("corpus", "reason", "samples", "meaning")
    counts.columns[2].justify = "right"
    for row in _counted(groups):
        counts.add_row(*map(printable, row))
    console.print(counts)
    for group in groups:
        console.print(printable(f"\n{group.corpus}: {group.code}"), style="bold")
        for _, item in group.examples[:_TERMINAL_EXAMPLES]:
            for line in (f"{item.sample}: {item.detail}", " ".join(item.raw.split())):
                if line:
                    console.print("  " + printable(line[:_TERMINAL_CHARACTERS]), soft_wrap=True)


def write_rejects_page(directory: Path, out: Path) -> str:
    """Write reasons and examples with their images as one HTML page; return a line that describes it.

    Raises:
        UserError: see :func:`read_rejects`.
    """
    groups = read_rejects(directory)
    data = page(f"{directory} - rejected samples", _body(directory, groups))
    write_atomic(out, data)
    return f"{out}: {sum(group.count for group in groups):,} rejected samples, {len(data) / 1e6:.1f} MB"


def _counted(groups: Sequence[Group]) -> Iterator[tuple[str, ...]]:
    named = ""
    for group in groups:
        yield "" if group.corpus == named else group.corpus, group.code, f"{group.count:,}", CODES.get(group.code, "")
        named = group.corpus


def _body(directory: Path, groups: Sequence[Group]) -> Iterator[Html]:
    yield el("h1", f"{directory}: rejected samples")
    if not groups:
        yield el("p", f"{NOTHING[0].upper()}{NOTHING[1:]}: every raw sample was kept.")
        return
    yield el("p", f"At most {EXAMPLES} examples of each corpus and reason; rejects.jsonl lists all.", class_="quiet")
    corpora = len({group.corpus for group in groups})
    total = sum(group.count for group in groups)
    yield tiles([(f"{total:,}", "samples rejected"), (f"{corpora}", "corpora lost some")])
    yield el("h2", "Reasons")
    rows = [(corpus, code, meaning, count) for corpus, code, count, meaning in _counted(groups)]
    yield table(("corpus", "reason", "meaning", "samples"), rows, texts=3)
    for group in groups:
        yield el("h2", f"{group.corpus}: {group.code} ({group.count:,})")
        yield el("div", *(_example(item) for _, item in group.examples), class_="examples")


def _example(item: Rejected) -> Html:
    shown = item.picture()
    words = el(
        "div",
        el("div", el("b", item.sample), f" in {item.shard}", class_="source"),
        el("span", item.code, class_="code"),
        " ",
        item.detail,
        el("div", item.raw, class_="raw"),
    )
    return el("div", *([el("figure", shown)] if shown else []), words, class_="example")
