"""Why shards are ingested again: raw files that changed, and shard outputs that are damaged.

Every corpus keeps a list of its raw files with sizes and modification times, so a change can be named. The decision
itself rests on the done-markers (``data_prep.ingest.workspace``).
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from data_prep.common.errors import UserError
from data_prep.common.events import EventLedger
from data_prep.common.files import read_hashed, with_hash, write_atomic
from data_prep.ingest import sources
from data_prep.ingest.workspace import ShardOutput, Workspace
from data_prep.progress import Reporter

LISTING = "raw-files.json"
_COPY_HINT = (
    "raw files are identified by name, size and modification time. If this is a copy, stop with Ctrl-C and restore "
    "its times: rsync -a --size-only ORIGINAL/ COPY/"
)
Stat = tuple[int, int]
"""Size in bytes and modification time in ns."""


@dataclass(frozen=True, slots=True)
class RawChanges:
    """Raw files of one corpus that differ from those that were ingested."""

    files: int
    """Raw files of the corpus."""
    changed: dict[str, tuple[Stat, Stat]]
    """Path -> before and now."""

    @property
    def looks_copied(self) -> bool:
        """Whether only modification times differ."""
        return all(before[0] == now[0] for before, now in self.changed.values())

    def describe(self, corpus: str) -> str:
        """Return one line with the first changed file."""
        path, (before, now) = next(iter(self.changed.items()))
        size = "same size" if before[0] == now[0] else f"{before[0]:,} -> {now[0]:,} bytes"
        counts = (
            f"{len(self.changed):,} of {self.files:,} raw files changed since they were ingested and are read again"
        )
        line = f"corpora.{corpus}: {counts}, e.g. {path} ({size}, other modification time)"
        return f"{line}; {_COPY_HINT}" if self.looks_copied else line


def record_raw_changes(space: Workspace, reporter: Reporter) -> None:
    """Report raw files that changed since the last ingest, and update the lists. Raises StrictEvent."""
    for corpus, reader in space.corpora.items():
        path = space.out / "ingest" / corpus / LISTING
        now = _listing(reader.files(), space.recipe.root_dir)
        known = read_hashed(path)
        before = {name: (stat[0], stat[1]) for name, stat in known.items()} if isinstance(known, dict) else {}
        changed = {name: (before[name], stat) for name, stat in now.items() if before.get(name, stat) != stat}
        if changed:
            changes = RawChanges(len(now), changed)
            reporter.say(changes.describe(corpus))
            reporter.events(space.out).record(
                "raw-file-changed", len(changed), corpus=corpus, first=next(iter(changed))
            )
        if now != before:
            write_atomic(path, with_hash(now))


def record_rebuilds(outputs: Iterable[ShardOutput], root: Path, events: EventLedger) -> None:
    """Record shard outputs that exist but are ingested again. Raises StrictEvent."""
    counts: Counter[tuple[str, str]] = Counter()
    firsts: dict[tuple[str, str], str] = {}
    for output in outputs:
        code = _why(output, root)
        if code:
            counts[code, output.corpus] += 1
            firsts.setdefault((code, output.corpus), output.shard)
    for (code, corpus), count in counts.items():
        events.record(code, count, corpus=corpus, first=firsts[code, corpus])


def _why(output: ShardOutput, root: Path) -> str:
    """Return the event of a shard output that is to be rebuilt; empty for a new one and for a changed raw file."""
    if not output.marker.is_file():
        return ""
    try:
        report = output.report()
    except UserError:
        return "shard-rebuilt"
    if report.raw != output.raw:
        return ""  # recorded by file
    return "image-file-changed" if sources.changed_files(output, root) else "shard-rebuilt"


def _listing(files: Iterable[Path], root: Path) -> Mapping[str, Stat]:
    stats = ((os.path.relpath(path, root), path.stat()) for path in files)
    return {name: (about.st_size, about.st_mtime_ns) for name, about in stats}
