"""Random packed rows, and every policy reimplemented in plain Python from its definition."""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import strategies as st

from pipeline.masks import Sidecars, parse_layout

GRID = (3, 4)
"""Images of the random rows have 12 tokens, so policies that need a grid run on all of them."""

_runs = st.one_of(
    st.just(f"V{GRID[0] * GRID[1]}"),
    st.builds("{}{}".format, st.sampled_from("SQAWU"), st.integers(1, 7)),
)
_segments = st.lists(_runs, min_size=1, max_size=9).map(" ".join)
_padding = st.sampled_from(["", "P1", "P70"])
layouts = st.builds(
    lambda segments, padding: " | ".join(segments) + " " + padding,
    st.lists(_segments, min_size=1, max_size=3),
    _padding,
)
rows: st.SearchStrategy[Sidecars] = layouts.map(parse_layout)


@dataclass(frozen=True)
class Token:
    segment: int
    modality: int
    instance: int
    generated: int


class PlainRow:
    """A row as a list of tokens; derived columns are computed by walking over it."""

    def __init__(self, sidecars: Sidecars) -> None:
        columns = (sidecars.segment, sidecars.modality, sidecars.instance, sidecars.generated)
        self.tokens = [Token(*values) for values in zip(*(column.tolist() for column in columns), strict=True)]

    def commit(self, i: int) -> int:
        if self.tokens[i].generated or self.tokens[i].segment == 0:
            return i
        last = i
        while last + 1 < len(self.tokens) and self._given_in(last + 1, self.tokens[i].segment):
            last += 1
        return last

    def _given_in(self, j: int, segment: int) -> bool:
        return self.tokens[j].segment == segment and not self.tokens[j].generated

    def is_first_turn(self, i: int) -> bool:
        segment = self.tokens[i].segment
        return not any(token.generated for token in self.tokens[: i + 1] if token.segment == segment)

    def ring(self, i: int) -> int:
        first = i
        while first > 0 and self.tokens[first - 1].instance == self.tokens[i].instance:
            first -= 1
        row, column = divmod(i - first, GRID[1])
        return min(row, GRID[0] - 1 - row, column, GRID[1] - 1 - column)

    def unlocks(self, name: str, i: int, j: int) -> bool:
        """The predicate of a policy for a later token j, without its clamp."""
        a, b = self.tokens[i], self.tokens[j]
        media_sees_text = a.modality != 0 and b.modality == 0
        same_medium = a.instance >= 0 and a.instance == b.instance
        match name:
            case "causal":
                return False
            case "mma" | "image_to_answer":
                return media_sees_text
            case "mma_general" | "mma_unclamped":
                return a.modality != b.modality
            case "mma_general_instance":
                return a.instance != b.instance
            case "mma_aki":
                return a.modality == 1 and b.modality == 0 and self.is_first_turn(i)
            case "mixed":
                return same_medium
            case "mma_mixed":
                return media_sees_text or same_medium
            case "prefix":
                return not a.generated and not b.generated
            case "future_v2v" | "image_tokens":
                return a.modality != 0 and b.modality != 0
            case "future_full":
                return a.modality != 0 and not b.generated
        raise AssertionError(name)

    def allows(self, name: str, i: int, j: int) -> bool:
        a, b = self.tokens[i], self.tokens[j]
        if a.segment == 0 or a.segment != b.segment:
            return i == j
        if name == "cca":
            inside = a.modality == 1 and a.instance == b.instance
            return self.ring(j) <= self.ring(i) if inside else j <= i
        leaks = name in ("mma_unclamped", "image_to_answer", "image_tokens")
        return j <= i or (self.unlocks(name, i, j) and (leaks or j <= self.commit(i)))

    def mask(self, name: str) -> list[list[bool]]:
        size = range(len(self.tokens))
        return [[self.allows(name, i, j) for j in size] for i in size]
