"""Sampling against the probabilities computed the slow way."""

from __future__ import annotations

import math
import random
from collections import Counter

import pytest
import torch

from pipeline.server.sampling import Sampling, choose

LOGITS = torch.tensor([[2.0, 1.0, 0.5, 0.4, -1.0, -3.0]])
DRAWS = 4000


def slow_probabilities(temperature: float, top_p: float) -> dict[int, float]:
    weights = {index: math.exp(logit / temperature) for index, logit in enumerate(LOGITS[0].tolist())}
    total, kept, reached = sum(weights.values()), {}, 0.0
    for index in sorted(weights, key=lambda index: -weights[index]):
        if reached < top_p:
            kept[index] = weights[index] / total
            reached += kept[index]
    return {index: probability / sum(kept.values()) for index, probability in kept.items()}


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.5, 1.0), (1.0, 0.7), (2.0, 0.6), (1.0, 1e-6)])
def test_tokens_are_drawn_with_their_probabilities(temperature: float, top_p: float) -> None:
    generator = random.Random(3)
    batch = LOGITS.expand(DRAWS, -1)
    drawn = Counter(choice.id for choice in choose(batch, [Sampling(temperature, top_p)] * DRAWS, [generator] * DRAWS))
    wanted = slow_probabilities(temperature, top_p)
    assert set(drawn) <= set(wanted)
    for index, probability in wanted.items():
        tolerance = 5 * math.sqrt(probability * (1 - probability) / DRAWS) + 1e-9
        assert abs(drawn[index] / DRAWS - probability) <= tolerance, (index, drawn[index] / DRAWS, probability)


def test_temperature_0_takes_the_first_most_likely_token() -> None:
    tied = torch.tensor([[1.0, 3.0, 3.0], [0.0, -1.0, 5.0]], dtype=torch.bfloat16)
    assert [choice.id for choice in choose(tied, [Sampling(), Sampling(0.0, 0.1)], [random.Random()] * 2)] == [1, 2]


def test_a_seed_decides_whatever_else_is_in_the_batch() -> None:
    sampling = Sampling(1.0, seed=11)

    def tokens(rows: int) -> list[int]:
        generator = sampling.generator()
        others = [random.Random(5) for _ in range(rows - 1)]
        samplings = [Sampling(1.5, 0.9)] * (rows - 1) + [sampling]
        return [choose(LOGITS.expand(rows, -1), samplings, [*others, generator])[-1].id for _ in range(20)]

    assert tokens(1) == tokens(4)
    assert len(set(tokens(1))) > 1


def test_log_probabilities_are_those_of_the_model() -> None:
    (choice,) = choose(LOGITS, [Sampling(0.1, 0.5, seed=1, top_logprobs=3)], [random.Random(1)])
    wanted = torch.log_softmax(LOGITS[0], -1)
    assert choice.logprob == pytest.approx(float(wanted[choice.id]))
    assert [index for index, _ in choice.top] == [0, 1, 2]
    assert [value for _, value in choice.top] == pytest.approx(wanted[:3].tolist())
    (plain,) = choose(LOGITS, [Sampling()], [random.Random(1)])
    assert plain.logprob is None and plain.top == ()
