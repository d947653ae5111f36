"""The event ledger: ``events.jsonl`` in a prepared folder or a run folder.

Everything that changes a result without stopping the command (a drop, a fallback, a skip, a repair, a rebuilt or
unverified file) is recorded as one JSON line with a code of ``EVENTS``, a count and the place. ``--strict`` makes
chosen codes fatal.
"""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from data_prep.common.errors import UserError, did_you_mean

EVENTS_FILE = "events.jsonl"
ALL = "all"
_DAMAGED = "ledger-damaged"
_MAX_LINE_BYTES = 1 << 16
EVENTS: Mapping[str, str] = {
    # data preparation
    "sample-rejected": "a raw sample cannot be used and was dropped",
    "sample-repaired": "a raw sample was kept after a repair",
    "answer-dropped": "later answers of a conversation are in no sample",
    "answer-truncated": "an answer was truncated at the token limit and has no end token",
    "image-dropped": "an image was dropped and the rest of its sample kept",
    "raw-file-damaged": "a raw file ends early or is damaged; its samples after the damage are lost",
    "raw-file-changed": "a raw file changed since it was ingested and was read again",
    "image-file-changed": "image files of a shard changed or arrived since it was ingested; it was ingested again",
    "shard-rebuilt": "an ingested shard was damaged, incomplete or out of date and was rebuilt",
    "store-damaged": "an image store was damaged or incomplete; its images are read again",
    "tokenizer-rebuilt": "the tokenizer was damaged or out of date and was rebuilt",
    "plan-rebuilt": "the plan was damaged or out of date and was rebuilt",
    "packs-rebuilt": "packed rows were damaged or out of date and were rebuilt",
    "audit-warning": "the supervision audit of a pack set gave a warning",
    "lock-unavailable": "the file system knows no locks; nothing keeps two writers apart",
    "mpi-unavailable": "MPI cannot be loaded; rank 0 worked alone with local processes",
    # both
    "plugin-used": "code of another package takes part in the result",
    "file-unverified": "a file was read without checking its hash",
    _DAMAGED: "a line of the event ledger cannot be read",
    # training
    "rows-dropped": "rows at the end of the packs do not fill a batch and were dropped",
    "step-skipped": "an optimizer step was skipped",
    "loss-spike": "a loss is far above those of the steps before",
    "checkpoint-damaged": "a checkpoint is damaged and was not used",
    "checkpoint-unhealthy": "a checkpoint was not published because its values are not finite",
    "setting-changed": "a setting that affects the result changed on resume",
    "setting-adjusted": "a setting that does not affect the result changed on resume",
    "watchdog-unavailable": "a rank runs without the watchdog",
    "metrics-damaged": "a line of the run's metrics cannot be read",
    "run-failed": "training ended with an error, a dead rank or a hang",
    "version-untested": "a library's version was not tested with this code",
    "attention-fallback": "attention runs without flash kernels on a GPU, which is slower",
    "weights-unused": "tensors of a model folder are not read, because the model has no part for them",
    "vocabulary-extended": "vocabulary rows that a model folder lacks start at the mean of its rows",
    "config-key-ignored": "a key of a model folder's config.json is ignored, because it could run or fetch code",
    "mask-changed": "the initial weights were trained under another mask policy",
    "memory-oversubscribed": "training started although it needs more memory than the machine has",
}
"""Closed list of events, of both halves: code -> one-line meaning."""


class StrictEvent(UserError):  # noqa: N818 - an event that the user made fatal
    """An event whose code is in ``--strict``. It is in the ledger by the time this is raised."""


class EventLedger:
    """Appends events to a file; several processes may append to the same one.

    Every event is one ``write`` to a file opened with ``O_APPEND``, so lines of several processes do not mix on a
    local file system.

    Raises:
        OSError: from ``record``, when the file cannot be written.
    """

    def __init__(self, path: Path, strict: frozenset[str] = frozenset()) -> None:
        self.path, self.strict = path, strict
        self.recorded = Counter[str]()
        """Events of this object only, by code; the file may hold those of other processes and earlier commands."""

    def record(self, code: str, count: int = 1, **detail: Any) -> None:
        """Append one event.

        Args:
            code: a key of ``EVENTS``.
            count: how often it happened; nothing is recorded for 0.
            detail: where it happened; values that JSON cannot hold are written as text.

        Raises:
            StrictEvent: ``code`` is in ``strict``.
        """
        assert code in EVENTS, code
        if count:
            self._append(code, count, detail)
            self._count(code, count, detail)

    def record_once(self, code: str, count: int = 1, **detail: Any) -> None:
        """Append an event unless the ledger already holds the same one; strictness and ``recorded`` are as ever.

        For a state that every command finds again, such as the rejected samples of an ingested corpus.
        """
        assert code in EVENTS, code
        if not count:
            return
        if (code, count, _plain(detail)) not in ((code, count, rest) for code, count, rest in self._lines()):
            self._append(code, count, detail)
        self._count(code, count, detail)

    def summary(self) -> dict[str, int]:
        """Return the counts of all events in the file, most frequent first; lines that cannot be read count, too."""
        counts = Counter[str]()
        for code, count, _ in self._lines():
            counts[code] += count
        return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))

    def _count(self, code: str, count: int, detail: Mapping[str, Any]) -> None:
        self.recorded[code] += count
        if code in self.strict:
            where = ", ".join(f"{key} {value}" for key, value in detail.items())
            raise StrictEvent(
                f"{code}: {count:,} x {EVENTS[code]}{f' ({where})' if where else ''}; --strict makes it fatal"
            )

    def _append(self, code: str, count: int, detail: Mapping[str, Any]) -> None:
        line = json.dumps({"time": round(time.time(), 3), "code": code, "count": count, **_plain(detail)})
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # not through a link, which may lead out of the folder
        descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        try:
            os.write(descriptor, line.encode() + b"\n")
        finally:
            os.close(descriptor)

    def _lines(self) -> Iterator[tuple[str, int, dict[str, Any]]]:
        """Yield (code, count, detail) of every line; a damaged line is one event of its own."""
        try:
            stream = self.path.open("rb")
        except OSError:
            return
        with stream:
            while line := stream.readline(_MAX_LINE_BYTES):
                yield _parse(line)


def parse_strict(text: str | None) -> frozenset[str]:
    """Parse ``--strict``: codes separated by commas, or ``all``; None is none.

    Raises:
        UserError: a code is not in ``EVENTS``.
    """
    codes = {code.strip() for code in (text or "").split(",")} - {""}
    if ALL in codes:
        return frozenset(EVENTS)
    for code in sorted(codes - set(EVENTS)):
        raise UserError(
            f"--strict {code}: unknown event{did_you_mean(code, EVENTS)}; known: {ALL}, {', '.join(sorted(EVENTS))}"
        )
    return frozenset(codes)


def describe_events(counts: Mapping[str, int]) -> str:
    """Return ``12 sample-rejected, 3 sample-repaired``, most frequent first; empty for no events."""
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{count:,} {code}" for code, count in ordered)


def _plain(detail: Mapping[str, Any]) -> dict[str, Any]:
    """Return details as they are read back from JSON."""
    plain: dict[str, Any] = json.loads(json.dumps(detail, default=str))
    return plain


def _parse(line: bytes) -> tuple[str, int, dict[str, Any]]:
    try:
        event = json.loads(line)
        code, count = event.pop("code"), event.pop("count")
        event.pop("time", None)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return _DAMAGED, 1, {}
    if not isinstance(code, str) or code not in EVENTS or type(count) is not int or not 0 < count < 1 << 63:
        return _DAMAGED, 1, {}
    return code, count, event
