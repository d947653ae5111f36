"""Every fuzz target for a second: seeds, past finds, then mutations. A longer search: ``python -m tests.fuzz``."""

from __future__ import annotations

import random

import pytest

from data_prep.common.errors import UserError
from tests.fuzz.engine import Target, attempt, search, target_names
from tests.fuzz.mutate import mutated


@pytest.mark.parametrize("name", target_names())
def test_a_reader_survives_hostile_bytes(name: str) -> None:
    tried, find = search(Target.load(name), seconds=1.0, seed=0)
    assert find is None, f"after {tried} inputs: {find.why}\n{find.data[:200]!r}"


def test_the_fuzzer_finds_what_it_looks_for() -> None:
    def fragile(data: bytes) -> None:
        if data.startswith(b"{"):
            raise UserError("expected")
        if b"\xff" in data:
            raise KeyError(data)

    target = Target("fragile", fragile, (), (b"{", b"abc"))
    tried, find = search(target, seconds=20, seed=1)
    assert find is not None and tried > 1
    assert attempt(target, b"{\xff") is None and attempt(target, b"\xff")


def test_mutations_depend_on_the_seed_alone() -> None:
    corpus = [b"a seed", b"", b"another" * 100]
    first, again = ([mutated(corpus, [b"token"], random.Random(seed)) for seed in range(50)] for _ in range(2))
    assert first == again and len(set(first)) > 25
