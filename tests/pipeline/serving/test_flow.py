"""Adaptive information flow: entropy and ratio by hand, exact cuts, and generation as teacher forcing has it."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from data_prep.text.encoding import Encoded
from pipeline.attention.hf import WATCH
from pipeline.config.schema import GateConfig
from pipeline.masks import commit_index, dense_mask, parse_layout
from pipeline.serving.flow import AdaptiveFlow, cut, dropped, entropy
from pipeline.serving.model import MultimodalModel, load_model
from pipeline.serving.prefill import PromptBatch
from tests.pipeline.serving.helpers import CONVERSATIONS, make_export

NEW = 6


def test_entropy_by_hand() -> None:
    d = torch.tensor([[1.0, 0.5, 0.0, 0.3], [0.0, 0.5, 0.0, 0.1], [0.0, 0.5, 0.0, 0.0]]).double()
    found = entropy(d).tolist()
    mixed = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert found == pytest.approx([0.0, math.log(3), math.log(3), mixed])


@pytest.mark.parametrize(
    ("rounding", "numbers"), [("down", [0, 0, 1, 1, 2, 2, 3, 3, 4]), ("up", [1, 1, 2, 2, 3, 3, 4, 4, 5])]
)
def test_the_ratio_by_hand(rounding: str, numbers: list[int]) -> None:
    """Five tokens, ordered by entropy 4 > 2 > 0 > 1 > 3; the ratio is the one whose S moves farthest."""
    share = [0.75, 0.9, 0.6, 1.0, 0.5]
    mean = [0.1, 0.4, 0.2, 0.3, 0.5]
    d = torch.tensor([[2 * m * s for m, s in zip(mean, share, strict=True)],
                      [2 * m * (1 - s) for m, s in zip(mean, share, strict=True)]]).double()  # fmt: skip
    order = [4, 2, 0, 1, 3]

    def spread(kept: list[int]) -> float:
        q = [mean[token] / sum(mean[token] for token in kept) for token in kept]
        return -sum(x * math.log(x) for x in q)

    changes = {drop: abs(spread(order[drop:]) - spread(order)) for drop in numbers if drop < 5}
    best = max(changes, key=lambda drop: (round(changes[drop], 9), -drop))
    assert best > 0
    found = dropped(d, rounding)  # type: ignore[arg-type]
    assert found.nonzero().flatten().tolist() == sorted(order[:best])


def test_no_attention_drops_nothing_and_one_token_is_kept() -> None:
    assert not dropped(torch.zeros(3, 7).double()).any()
    assert not dropped(torch.rand(3, 1).double(), "up").any()


def test_a_cut_removes_pairs_only_and_leaves_media_alone() -> None:
    row = parse_layout("Q1 V4 Q2 A2 V3 Q2")
    mask = dense_mask("mma_mixed", row)
    text, ignored = row.modality == 0, torch.zeros(len(row), dtype=torch.bool)
    ignored[[2, 3, 10]] = True
    found = cut(mask[None, None], text[None], ignored[None])[0, 0]
    assert not (found & ~mask).any() and (found[~text] == mask[~text]).all()
    assert not found[text][:, ignored].any() and (found[text][:, ~ignored] == mask[text][:, ~ignored]).all()
    # Fewer pairs reach no further: the closure stays within the commit index, as that of the policy does.
    reach = torch.matrix_power(found.double(), 8) > 0
    assert (torch.arange(len(row))[None] <= commit_index(row)[:, None])[reach].all()


def probabilities(q: torch.Tensor, k: torch.Tensor, mask: torch.Tensor, scaling: float) -> torch.Tensor:
    logits = q @ k.repeat_interleave(2, 1).transpose(2, 3) * scaling
    return logits.masked_fill(~mask, float("-inf")).softmax(-1)


def batch_of(model: MultimodalModel) -> PromptBatch:
    prompts = [model.prompt(turns) for turns in CONVERSATIONS]
    return PromptBatch.of(model.policy, [(p.sidecars, model.stage.embed(model.inputs(p))[0]) for p in prompts])


def full_logits(model: MultimodalModel, row: int, ids: torch.Tensor, ignored: torch.Tensor) -> torch.Tensor:
    """Logits of a prompt and its answer in one pass under the cut mask, by the family's own model."""
    prompt = model.prompt(CONVERSATIONS[row])
    new = {
        "ids": ids.numpy(),
        "modality": 0 * ids.numpy(),
        "instance": 0 * ids.numpy() - 1,
        "generated": 0 * ids.numpy() + 1,
    }
    joined = {name: np.concatenate([getattr(prompt.encoded, name), values]) for name, values in new.items()}
    whole = type(prompt)(Encoded(**joined), prompt.images)
    sidecars = whole.sidecars
    own = torch.nn.functional.pad(ignored[len(ignored) - len(prompt.encoded) :], (0, len(ids)))
    mask = dense_mask(model.policy, sidecars) & ~((sidecars.modality == 0)[:, None] & own[None])
    inputs = model.inputs(whole)
    out = model.llm(
        inputs_embeds=model.stage.embed(inputs), attention_mask=mask[None, None],
        position_ids=inputs.position_ids[None], use_cache=False,
    )  # fmt: skip
    return out.logits[0, len(prompt.encoded) - 1 :]


@pytest.mark.parametrize("heads", ["mean", "max"])
@torch.inference_mode()
def test_the_profile_is_the_attention_of_text_in_every_layer(heads: str, tmp_path: Path) -> None:
    """Against probabilities recomputed for one prompt alone, with the first new token's query."""
    model = load_model(make_export(tmp_path))
    flow = AdaptiveFlow(heads=heads)  # type: ignore[arg-type]
    ignored = model.background(batch_of(model), flow)
    prompt = model.prompt(CONVERSATIONS[1])
    ids = model.generate_ids([prompt], max_new_tokens=1, eos_token_id=None)[0]
    seen: list[torch.Tensor] = []

    def watch(layer: int, q: torch.Tensor, k: torch.Tensor, mask: torch.Tensor, scaling: float, cap: None) -> None:
        weights = (
            (q @ k.repeat_interleave(2, 1).transpose(2, 3) * scaling).masked_fill(~mask, float("-inf")).softmax(-1)
        )
        seen.append(weights[0].mean(0) if heads == "mean" else weights[0].amax(0))

    token = WATCH.set(watch)  # type: ignore[arg-type]
    full_logits(model, 1, ids, torch.zeros(len(prompt.encoded), dtype=torch.bool))
    WATCH.reset(token)
    visual = prompt.sidecars.modality != 0
    text = torch.cat([~visual, torch.tensor([True])])
    d = torch.stack([layer[text].amax(0)[: len(visual)][visual] for layer in seen]).double()
    own = ignored[1, ignored.shape[1] - len(visual) :]
    assert torch.equal(own[visual], dropped(d)) and own.any() and not own[~visual].any()


@pytest.mark.parametrize("family", ["llama", "phi3", "gemma3_text", "gated"])
@torch.inference_mode()
def test_generation_is_teacher_forcing_under_the_cut_mask(family: str, tmp_path: Path) -> None:
    gate = GateConfig(kind="rave_style", rank=4) if family == "gated" else None
    model = load_model(make_export(tmp_path, "qwen3" if family == "gated" else family, gate=gate))
    prompts, flow = [model.prompt(turns) for turns in CONVERSATIONS], AdaptiveFlow()
    ignored = model.background(batch_of(model), flow)
    options = {"min_new_tokens": NEW, "output_logits": True, "return_dict_in_generate": True}
    out = model.generate_ids(prompts, max_new_tokens=NEW, flow=flow, **options)
    logits, moved = torch.stack(out.logits, dim=1), 0.0
    plain = torch.stack(model.generate_ids(prompts, max_new_tokens=NEW, **options).logits, dim=1)
    for row in range(len(prompts)):
        if gate is None:
            wanted = full_logits(model, row, out.sequences[row, :-1], ignored[row])
            assert (logits[row] - wanted).abs().max() <= 1e-5
        assert bool(ignored[row].any()) == bool(prompts[row].images)
        moved = max(moved, float((logits[row, 0] - plain[row, 0]).abs().max()))
    assert moved > 1e-3
    assert torch.equal(logits[2], plain[2])  # a prompt without images


@torch.inference_mode()
def test_cut_tokens_get_exactly_no_attention_from_text(tmp_path: Path) -> None:
    model = load_model(make_export(tmp_path))
    batch = batch_of(model)
    ignored = model.background(batch, AdaptiveFlow())
    text = batch.attention_mask.bool() & ~batch.visual
    steps: list[tuple[int, float]] = []

    def watch(layer: int, q: torch.Tensor, k: torch.Tensor, mask: torch.Tensor, scaling: float, cap: None) -> None:
        weights = (
            (q @ k.repeat_interleave(2, 1).transpose(2, 3) * scaling).masked_fill(~mask, float("-inf")).softmax(-1)
        )
        for row in range(len(weights)):
            queries = text[row] if q.shape[2] == text.shape[1] else torch.tensor([True])
            reads = weights[row][:, queries][..., : text.shape[1]][..., ignored[row]]
            steps.append((q.shape[2], float(reads.sum())))

    token = WATCH.set(watch)  # type: ignore[arg-type]
    model._continue(batch.without_reads(ignored), 3, {"do_sample": False, "eos_token_id": None})
    WATCH.reset(token)
    assert {size for size, _ in steps} == {1, text.shape[1]}
    assert all(total == 0.0 for _, total in steps)
