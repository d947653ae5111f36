"""Choice of the next token of each row of a batch, and its log-probabilities."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Sampling:
    """How one request's tokens are chosen."""

    temperature: float = 0.0
    """0: the most likely token, as `mma generate` does."""
    top_p: float = 1.0
    """Sample from the smallest set of most likely tokens whose probability reaches this (arXiv 1904.09751)."""
    seed: int | None = None
    """The same seed gives the same answer, whatever else is in the batch."""
    top_logprobs: int | None = None
    """Report log-probabilities, and those of so many most likely tokens; None: report none."""

    def generator(self) -> random.Random:
        """Return the request's own source of random numbers."""
        return random.Random(self.seed)


@dataclass(frozen=True)
class Choice:
    """One chosen token."""

    id: int
    logprob: float | None = None
    """Natural logarithm of its probability before temperature and top_p; None unless asked for."""
    top: tuple[tuple[int, float], ...] = ()
    """The most likely tokens with their log-probabilities."""


def choose(logits_BV: torch.Tensor, samplings: Sequence[Sampling], generators: Sequence[random.Random]) -> list[Choice]:
    """Choose one token per row.

    Args:
        logits_BV: logits, in any dtype; all arithmetic is fp32.
        samplings: of each row.
        generators: of each row; one number is drawn for each sampled token.

    Returns:
        One choice per row.
    """
    logits_BV = logits_BV.float()
    ids = logits_BV.argmax(-1).tolist()
    for row, sampling in enumerate(samplings):
        if sampling.temperature > 0:
            ids[row] = _sample(logits_BV[row], sampling, generators[row].random())
    return [
        Choice(index) if sampling.top_logprobs is None else _with_logprobs(logits_BV[row], index, sampling.top_logprobs)
        for row, (index, sampling) in enumerate(zip(ids, samplings, strict=True))
    ]


def _sample(logits_V: torch.Tensor, sampling: Sampling, uniform: float) -> int:
    """Sample by inversion: ``uniform`` in [0, 1) picks the token."""
    probs_V, ids_V = torch.softmax(logits_V / sampling.temperature, -1).sort(descending=True, stable=True)
    reached_V = probs_V.double().cumsum(-1)
    # A token is kept while the tokens before it have not reached top_p; the first one always is.
    kept = 1 + int((reached_V[:-1] < sampling.top_p).sum())
    place = int((reached_V[:kept] <= uniform * reached_V[kept - 1]).sum())
    return int(ids_V[min(place, kept - 1)])


def _with_logprobs(logits_V: torch.Tensor, index: int, top: int) -> Choice:
    logprobs_V = torch.log_softmax(logits_V, -1)
    values, ids = logprobs_V.topk(min(top, len(logprobs_V)))
    return Choice(index, float(logprobs_V[index]), tuple(zip(ids.tolist(), values.tolist(), strict=True)))
