"""Prefill alone, decode together: requests that come and go get the tokens and logits of ``generate``."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from pipeline.config.schema import GateConfig
from pipeline.serving.model import MultimodalModel, Prompt, load_model
from pipeline.serving.steps import GROWTH_TOKENS, StepModel
from tests.pipeline.serving.helpers import CONVERSATIONS, make_export

NEW = {0: 9, 1: 4, 2: 12, 3: 6}
"""New tokens of each conversation."""
ARRIVAL = {0: 0, 1: 2, 2: 3, 3: 5}
"""Decoding step before which each conversation arrives."""


@dataclass
class Row:
    number: int
    position: int
    ids: list[int] = field(default_factory=list)
    logits: list[torch.Tensor] = field(default_factory=list)

    def take(self, logits: torch.Tensor) -> None:
        self.logits.append(logits)
        self.ids.append(int(logits.argmax()))


def continuous(model: MultimodalModel, prompts: list[Prompt]) -> dict[int, Row]:
    """Greedy decoding of prompts that arrive one by one and leave at different times."""
    steps = StepModel(model)
    cache, active, done = steps.cache(), [], {}
    for step in range(40):
        for number, prompt in enumerate(prompts):
            if ARRIVAL[number] == step:
                first = steps.prefill(steps.prepare(prompt, NEW[number]))
                assert cache.add(first, len(prompt.encoded) + NEW[number]) == len(active)
                row = Row(number, first.next_position)
                row.take(first.logits)
                active.append(row)
        if not active:
            continue
        logits = steps.decode(cache, [row.ids[-1] for row in active], [row.position for row in active])
        for row, own in zip(active, logits, strict=True):
            row.position += 1
            row.take(own)
        for place in range(len(active) - 1, -1, -1):
            if len(active[place].ids) == NEW[active[place].number]:
                cache.remove(place)
                done[active[place].number] = active[place]
                active[place] = active[-1]
                active.pop()
    assert cache.capacity == (0, 0) and all(layer.keys is None for layer in cache.layers)
    return done


def assert_equals_generate(model: MultimodalModel) -> None:
    prompts = [model.prompt(turns) for turns in CONVERSATIONS]
    rows = continuous(model, prompts)
    for number, prompt in enumerate(prompts):
        options = {"min_new_tokens": NEW[number], "output_logits": True, "return_dict_in_generate": True}
        out = model.generate_ids([prompt], max_new_tokens=NEW[number], eos_token_id=None, **options)
        assert rows[number].ids == out.sequences[0].tolist()
        wanted = torch.cat(out.logits)
        assert (torch.stack(rows[number].logits) - wanted).abs().max() <= 1e-5


@pytest.mark.parametrize("family", ["llama", "phi3", "qwen3", "gemma2", "gemma3_text", "granite", "smollm3"])
def test_requests_that_come_and_go_get_the_tokens_of_generate(family: str, tmp_path: Path) -> None:
    assert_equals_generate(load_model(make_export(tmp_path, family)))


@pytest.mark.parametrize(("family", "window"), [("gemma2", 40), ("gemma3_text", 40), ("mistral", 40), ("phi3", 40)])
def test_a_window_shorter_than_the_answer_is_kept(family: str, window: int, tmp_path: Path) -> None:
    model = load_model(make_export(tmp_path, family, sliding_window=window))
    prompts = [model.prompt(turns) for turns in CONVERSATIONS]
    assert max(len(prompt.encoded) + NEW[number] for number, prompt in enumerate(prompts)) > window
    assert_equals_generate(model)


@pytest.mark.parametrize("policy", ["causal", "mma_general", "prefix", "mma+0:1=mixed+2:3=causal"])
def test_every_policy_is_prefilled_with_its_own_mask(policy: str, tmp_path: Path) -> None:
    assert_equals_generate(load_model(make_export(tmp_path, policy=policy)))


def test_gates_keep_their_dimensions_in_the_cache(tmp_path: Path) -> None:
    model = load_model(make_export(tmp_path, gate=GateConfig(kind="rave_style", rank=5)))
    assert_equals_generate(model)
    assert StepModel(model).bytes_per_token == 4 * 3 * 2 * (8 + 5 + 8)  # fp32, layers, key heads, key + value


def test_concentric_positions_continue_as_in_generate(tmp_path: Path) -> None:
    assert_equals_generate(load_model(make_export(tmp_path, policy="cca", patch_tokens=True)))


def test_the_cache_grows_and_keeps_what_it_holds(tmp_path: Path) -> None:
    model = load_model(make_export(tmp_path))
    steps = StepModel(model)
    cache = steps.cache()
    first = steps.prefill(steps.prepare(model.prompt(CONVERSATIONS[0]), 1))
    cache.add(first, 40)
    assert cache.capacity == (1, GROWTH_TOKENS)
    before = cache.layers[0].keys[0, :, : cache.lengths[0]].clone()
    cache.add(steps.prefill(steps.prepare(model.prompt(CONVERSATIONS[2]), 1)), GROWTH_TOKENS + 1)
    assert cache.capacity == (2, 2 * GROWTH_TOKENS)
    assert torch.equal(cache.layers[0].keys[0, :, : cache.lengths[0]], before)
    held = sum(x.nbytes for layer in cache.layers for x in (layer.keys, layer.values))
    assert held == 2 * 2 * GROWTH_TOKENS * steps.bytes_per_token
