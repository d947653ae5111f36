"""Proof, on the layered attention graph of a row, that no answer leaks and that decoding with a KV cache is exact.

A token's hidden state after L layers depends on the tokens reachable from it in L steps along allowed pairs. Both
questions need only the *latest* reachable token of a kind, so one integer per token is propagated: in each layer it
becomes the maximum over the tokens seen. This is exact and costs O(T + unlocked pairs) per layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from data_prep.common.errors import UserError
from data_prep.common.supervision import predicts_target
from pipeline.masks.policies import Policy, get_policy
from pipeline.masks.sidecars import BoolArray, IntArray, Sidecars, TokenTable, run_starts
from pipeline.masks.spans import TokenSpans, causal_order, token_spans

if TYPE_CHECKING:
    from data_prep.packs import PackReader


@dataclass(frozen=True, slots=True)
class Path:
    """The path along which a token's hidden state comes to depend on a forbidden token."""

    layer: int
    """First layer, counted from 1, after which it does."""
    tokens: tuple[int, ...]
    """Row indices on the path, from the dependent token to the forbidden one: ``layer`` steps."""

    def __str__(self) -> str:
        steps = " -> ".join(str(token) for token in self.tokens)
        return f"token {self.tokens[0]} reads token {self.tokens[-1]} after layer {self.layer} ({steps})"


@dataclass(frozen=True, slots=True)
class Proof:
    """The result of :func:`prove` on one row."""

    policy: str
    layers: int
    targets: int
    """Supervised tokens examined."""
    leak: Path | None
    """From the position that predicts a target to that target or a later answer; None if no answer leaks."""
    inexact: Path | None
    """From a token to one beyond its commit index; None if prefill and cached decoding reproduce training."""

    @property
    def leak_free(self) -> bool:
        """Whether every prediction is independent of its own target and of all later answers."""
        return self.leak is None

    @property
    def kv_exact(self) -> bool:
        """Whether every hidden state depends only on tokens up to its commit index."""
        return self.inexact is None


def prove(policy: Policy | str, sidecars: Sidecars, layers: int) -> Proof:
    """Examine every token of a row under ``layers`` layers of attention.

    Args:
        policy: a policy, or the name of one that neither leaks nor needs a grid; each layer is proved with its own.
        sidecars: the row.
        layers: attention layers of the model, at least 1.

    Raises:
        UserError: the policy is unknown, ``layers`` is below 1, or an image does not fit the policy's grid.
    """
    if layers < 1:
        raise UserError(f"a proof needs at least one layer of attention, got {layers}")
    policy = get_policy(policy) if isinstance(policy, str) else policy
    graphs = {part.name: _Graph.build(part, sidecars) for part in policy.parts}
    stack = [graphs[policy.at(layer).name] for layer in range(layers)]
    table = stack[0].table
    index = np.arange(len(table))
    predicts = predicts_target(table.segment, table.generated)
    answers = np.where((table.generated == 1) & (table.segment > 0), index, -1)
    return Proof(
        policy=policy.name,
        layers=layers,
        targets=int(predicts.sum()),
        leak=_first(stack, answers, lambda reach: predicts & (reach > index)),
        inexact=_first(stack, index, lambda reach: reach > table.commit),
    )


def check_rows(policy: Policy, reader: PackReader, rows: Iterable[int], layers: int) -> int:
    """Prove the policy on these rows of a pack folder; return the number of rows examined.

    Raises UserError naming the first row that leaks and the path along which the answer leaks.
    """
    examined = 0
    for row in rows:
        proof = prove(policy, Sidecars.from_row(reader[row]), layers)
        if proof.leak is not None:
            raise UserError(
                f"mask policy '{policy.name}' leaks answers in row {row} of {reader.directory}: {proof.leak}; "
                "train with a policy that respects the commit index, such as 'mma'"
            )
        examined += 1
    return examined


@dataclass(frozen=True)
class _Graph:
    """One layer of attention between the tokens of a row, in the policy's causal order."""

    table: TokenTable
    spans: TokenSpans
    span: IntArray
    """Index of each token's span."""
    firsts: IntArray
    """Start of each span's unlocked pairs in the list of pairs."""
    order: IntArray
    """Each token's index in the row."""

    @classmethod
    def build(cls, policy: Policy, sidecars: Sidecars) -> _Graph:
        """Split a row into token spans and list the pairs the policy unlocks."""
        table = policy.table(sidecars)
        order = causal_order(policy, table)
        order = np.arange(len(table)) if order is None else order
        table = table[order]
        spans = token_spans(policy, table, run_starts(table.segment) | (table.segment == 0))
        span = np.repeat(np.arange(len(spans)), spans.end - spans.start)
        return cls(table, spans, span, np.flatnonzero(run_starts(spans.left)), order)

    def step(self, reach: IntArray) -> IntArray:
        """Return the maximum of ``reach`` over the tokens each token sees."""
        spans = self.spans
        base = np.cumsum(spans.start == spans.first_key)[self.span] * (len(reach) + 1)
        past = np.maximum.accumulate(reach + base) - base  # a later segment's base hides what came before it
        best = np.maximum.reduceat(reach, spans.start)
        later = np.where(spans.bidirectional, best, -1)
        if len(self.firsts):
            sees = spans.left[self.firsts]
            later[sees] = np.maximum(later[sees], np.maximum.reduceat(best[spans.right], self.firsts))
        latest: IntArray = np.maximum(past, later[self.span])
        return latest

    def sees(self, token: int) -> BoolArray:
        """Mark the tokens that a token sees; bool[T]."""
        spans, span = self.spans, self.span[token]
        seen = np.zeros(len(self.table), dtype=np.bool_)
        seen[spans.first_key[span] : spans.end[span] if spans.bidirectional[span] else token + 1] = True
        for other in spans.right[spans.left == span]:
            seen[spans.start[other] : spans.end[other]] = True
        return seen


def _first(stack: Sequence[_Graph], reach: IntArray, forbidden: Callable[[IntArray], BoolArray]) -> Path | None:
    """Propagate layer by layer until a token reaches a forbidden one, nothing can change, or all layers are done."""
    history = [reach]
    for layer, graph in enumerate(stack, start=1):
        history.append(graph.step(history[-1]))
        if (found := forbidden(history[-1])).any():
            return Path(layer, _trace(stack, int(found.argmax()), history))
        if np.array_equal(history[-1], history[-2]) and all(later is graph for later in stack[layer:]):
            return None
    return None


def _trace(stack: Sequence[_Graph], token: int, history: list[IntArray]) -> tuple[int, ...]:
    """Walk back from a token to the one whose index reached it."""
    tokens, wanted = [token], history[-1][token]
    for layer in reversed(range(len(history) - 1)):
        token = int(np.flatnonzero(stack[layer].sees(token) & (history[layer] == wanted))[0])
        tokens.append(token)
    return tuple(int(stack[0].order[token]) for token in tokens)
