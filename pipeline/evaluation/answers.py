"""The answers of one benchmark on disk: JSON lines, appended batch by batch, read back to resume.

A file begins with the conditions under which its answers were given. Answers under other conditions (another model,
prompt or data file) are moved aside, never mixed and never deleted.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import IO, Any

from data_prep.common.folder_lock import FolderLock

FORMAT, VERSION = "mma-bench-answers", 1
_NAMES = {"model": "model", "prompt": "prompt", "data": "data files", "generation": "generation settings"}


@dataclass(frozen=True)
class Conditions:
    """What answers depend on. Every field is a hash or a short text."""

    model: str
    """Sha256 over the files of the export."""
    prompt: str
    """Sha256 over the text of all questions."""
    data: str
    """Sha256 over the images and reference answers of all questions."""
    generation: str
    """Settings of generation, as text."""

    def differences(self, other: Mapping[str, Any]) -> list[str]:
        """Return the names of the fields that differ from a file's header."""
        return [word for name, word in _NAMES.items() if other.get(name) != getattr(self, name)]


@dataclass(frozen=True)
class Answer:
    """One answer, identified by the hash of its question."""

    hash: str
    id: str
    answer: str
    problem: str = ""
    """Why the model could not be asked (the prompt exceeds its positions); the answer is then empty."""


_FIELDS = tuple(field.name for field in fields(Answer))


class AnswerStore:
    """All answers of a benchmark under the same conditions, from any number of shards."""

    def __init__(self, folder: Path, conditions: Conditions, say: Callable[[str], None]) -> None:
        """Read what is there; files under other conditions are moved aside with a message."""
        self.folder, self.conditions = folder, conditions
        self._say = say
        self.answers: dict[str, Answer] = {}
        for path in sorted(folder.glob("answers-*.jsonl")):
            self._read(path)

    def reload(self) -> None:
        """Read the answers that other shards have written since."""
        for path in sorted(self.folder.glob("answers-*.jsonl")):
            self._read(path)

    def missing(self, hashes: Iterable[str]) -> list[str]:
        """Return the questions without an answer."""
        return [one for one in hashes if one not in self.answers]

    @contextmanager
    def writer(self, shard: tuple[int, int]) -> Iterator[Callable[[Iterable[Answer]], None]]:
        """Yield a function that appends answers durably to the file of a shard.

        Raises:
            UserError: another process is answering the same shard.
        """
        path = self.folder / f"answers-{shard[0]:05d}-of-{shard[1]:05d}.jsonl"
        busy = f"{{holder}} is answering shard {shard[0]}/{shard[1]} in {{folder}}: wait for it, or stop it"
        lock = FolderLock(path.with_name(f".{path.stem}.lock"), busy, "start every shard only once")
        with lock.hold(self._say), self._open(path) as file:

            def append(answers: Iterable[Answer]) -> None:
                for one in answers:
                    self.answers[one.hash] = one
                    file.write(json.dumps(asdict(one)) + "\n")
                file.flush()
                os.fsync(file.fileno())

            yield append

    def _open(self, path: Path) -> IO[str]:
        """Open a shard's file for appending, without the incomplete last line that a crash may leave."""
        if path.is_file():
            data = path.read_bytes()
            whole = data[: data.rfind(b"\n") + 1]
            if whole:
                if len(whole) < len(data):
                    os.truncate(path, len(whole))
                return path.open("a", encoding="utf-8")
        file = path.open("w", encoding="utf-8")
        file.write(json.dumps({"format": FORMAT, "version": VERSION, **asdict(self.conditions)}) + "\n")
        return file

    def _read(self, path: Path) -> None:
        try:
            lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        except FileNotFoundError:  # another shard has moved it aside
            return
        header = _parse(lines[0]) if lines else {}
        if header.get("format") != FORMAT or header.get("version") != VERSION:
            if lines and lines[0].endswith("\n"):
                self._move_aside(path, ["format of the file"])
            return
        if differences := self.conditions.differences(header):
            self._move_aside(path, differences)
            return
        for line in lines[1:]:
            raw = _parse(line)
            if line.endswith("\n") and all(isinstance(raw.get(name), str) for name in _FIELDS):
                self.answers.setdefault(raw["hash"], Answer(**{name: raw[name] for name in _FIELDS}))

    def _move_aside(self, path: Path, differences: list[str]) -> None:
        number = next(n for n in range(1, 1 << 20) if not path.with_name(f"old-{n}-{path.name}").exists())
        kept = path.with_name(f"old-{number}-{path.name}")
        try:
            path.rename(kept)
        except FileNotFoundError:  # another shard was faster
            return
        changed = " and ".join(differences)
        self._say(f"{path.parent.name}: another {changed}: starting afresh; the old answers are kept in {kept.name}")


def _parse(line: str) -> dict[str, Any]:
    try:
        raw = json.loads(line)
    except ValueError:
        return {}
    return raw if isinstance(raw, dict) else {}
