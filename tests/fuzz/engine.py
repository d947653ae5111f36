"""Runs a target on mutated inputs; a find is any exception but UserError, a hang, a crash or too much memory."""

from __future__ import annotations

import hashlib
import importlib
import pkgutil
import random
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from data_prep.common.errors import UserError
from tests.fuzz import targets
from tests.fuzz.mutate import mutated

CORPUS = Path(__file__).parent / "corpus"
LIMIT_S = 10.0
"""Longest time that one input may take."""
SPACE_BYTES = 2 << 30
"""Address space that a run may add."""


@dataclass(frozen=True)
class Target:
    """One reader of untrusted bytes."""

    name: str
    run: Callable[[bytes], None]
    dictionary: Sequence[bytes]
    corpus: Sequence[bytes]
    """Seeds and past finds."""

    @classmethod
    def load(cls, name: str) -> Target:
        """Import the target and read its corpus."""
        module = importlib.import_module(f"{targets.__name__}.{name}")
        files = sorted(path for path in (CORPUS / name).glob("*") if path.is_file())
        made = list(module.seeds()) if hasattr(module, "seeds") else []
        corpus = [*made, *(path.read_bytes() for path in files)]
        assert corpus, f"target {name} has neither seeds() nor files in {CORPUS / name}"
        return cls(name, module.run, tuple(getattr(module, "DICTIONARY", ())), corpus)


@dataclass(frozen=True)
class Find:
    """An input that a reader did not survive."""

    data: bytes
    why: str

    def save(self, target: str) -> Path:
        """Write the input into the corpus, so that it is tried first from now on."""
        path = CORPUS / target / f"find-{hashlib.sha256(self.data).hexdigest()[:12]}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(self.data)
        return path


def target_names() -> list[str]:
    """Return the modules of ``tests.fuzz.targets``."""
    return sorted(module.name for module in pkgutil.iter_modules(targets.__path__))


def attempt(target: Target, data: bytes) -> Find | None:
    """Run one input. Returns None when the reader accepted it or raised UserError."""
    try:
        with _alarm(LIMIT_S):
            target.run(data)
    except UserError:
        return None
    except Exception:
        return Find(data, traceback.format_exc())
    return None


def inputs(target: Target, seed: int) -> Iterator[bytes]:
    """Yield the corpus, then mutations of it without end."""
    yield from target.corpus
    rng = random.Random(f"{target.name} {seed}")
    while True:
        yield mutated(target.corpus, target.dictionary, rng)


def search(target: Target, seconds: float, seed: int, before: Callable[[bytes], None] = len) -> tuple[int, Find | None]:
    """Try inputs until one is a find or the time is over; every input of the corpus is tried.

    Args:
        target: the reader.
        seconds: how long to search.
        seed: of the mutations.
        before: called with each input before it runs.

    Returns:
        Number of inputs tried, and the find.
    """
    start, tried = time.monotonic(), 0
    for data in inputs(target, seed):
        if tried >= len(target.corpus) and time.monotonic() - start > seconds:
            break
        before(data)
        tried += 1
        if find := attempt(target, data):
            return tried, find
    return tried, None


def search_and_report(name: str, seconds: float, seed: int, last: Path) -> None:
    """Search in this process, with little memory; print the result, and exit with 1 on a find.

    The input that is being tried is in the file ``last``, should the process die of it.
    """
    target = Target.load(name)
    limit_space()
    tried, find = search(target, seconds, seed, before=last.write_bytes)
    print(f"{name}: {tried:,} inputs, seed {seed}: {'a find' if find else 'nothing found'}", flush=True)
    if find:
        print(f"{find.why}\ninput in {find.save(name)}", flush=True)
    sys.exit(find is not None)


def limit_space() -> None:
    """Allow this process ``SPACE_BYTES`` more of address space: an allocation beyond it is a MemoryError, a find."""
    pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + SPACE_BYTES,) * 2)


class TooSlowError(Exception):
    """An input took longer than ``LIMIT_S``."""


@contextmanager
def _alarm(seconds: float) -> Iterator[None]:
    def ring(*_: object) -> None:
        raise TooSlowError(f"more than {seconds:g} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
