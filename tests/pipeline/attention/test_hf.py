"""The plug on real Hugging Face decoders: plans against dense masks, the no-leak theorem, and decoding."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
import transformers

from data_prep.common.errors import UserError
from pipeline.attention import AttentionPlan, build_plan, register
from pipeline.masks import (
    POLICIES,
    Policy,
    Sidecars,
    commit_index,
    dense_mask,
    get_policy,
    parse_layout,
    position_ids,
    prove,
)

LAYOUT = "S2 V9 Q5 A4 Q3 A2 | V9 V9 Q2 A3 | Q4 A5 P6"
SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "pad_token_id": 0,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Mistral": {"sliding_window": None},
    "Qwen2": {},
    "Qwen3": {"head_dim": 8},
    "Phi3": {},
    "Gemma2": {"head_dim": 8, "query_pre_attn_scalar": 24, "attn_logit_softcapping": 1.5, "sliding_window": 4096},
    "Gemma3": {"head_dim": 8, "query_pre_attn_scalar": 24, "sliding_window": 4096},
}


def decoder(family: str, **changes: Any) -> Any:
    """A small float64 decoder with random weights, seeded."""
    torch.manual_seed(0)
    text = "Text" if family == "Gemma3" else ""
    config = getattr(transformers, f"{family}{text}Config")(**SIZES, **FAMILIES[family] | changes)
    return getattr(transformers, f"{family}ForCausalLM")(config).double().eval().model


def run_layers(
    model: Any, hidden: torch.Tensor, mask: AttentionPlan | torch.Tensor, positions: torch.Tensor
) -> torch.Tensor:
    """Call the layers one by one, as a pipeline stage does; hidden is [1, T, C] after the last layer."""
    kinds = getattr(model.config, "layer_types", None) or [None] * len(model.layers)
    per_kind = "layer_type" in inspect.signature(model.rotary_emb.forward).parameters
    for layer, kind in zip(model.layers, kinds, strict=True):
        rotary = model.rotary_emb(hidden, positions, *([kind] if per_kind else []))
        hidden = layer(hidden, attention_mask=mask, position_ids=positions, position_embeddings=rotary)
    return hidden


@pytest.fixture(scope="module", autouse=True)
def registered() -> None:
    assert register() == register() == "mma"


@pytest.fixture
def row() -> Sidecars:
    return parse_layout(LAYOUT)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("policy", ["mma", "mma_mixed"])
def test_layers_under_a_plan_equal_layers_under_a_dense_mask(family: str, policy: str, row: Sidecars) -> None:
    model, real = decoder(family), row.segment > 0
    hidden = torch.randn(1, len(row), SIZES["hidden_size"], dtype=torch.float64)
    positions = position_ids(row)[None]
    mask = dense_mask(policy, row)[None, None]
    if family == "Gemma2":  # its soft cap needs the eager implementation, which adds its mask
        model.set_attn_implementation("eager")
        mask = torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, float("-inf"))
    else:
        model.set_attn_implementation("sdpa")
    exact = run_layers(model, hidden, mask, positions)
    model.set_attn_implementation("mma")
    found = run_layers(model, hidden, build_plan(policy, row), positions)
    causal = run_layers(model, hidden, build_plan("causal", row), positions)
    torch.testing.assert_close(found[:, real], exact[:, real], rtol=1e-5, atol=1e-5)  # norms run in float32
    assert (causal - found)[:, real].abs().max() > 1e-2


SAFE = [name for name, policy in POLICIES.items() if not policy.leaks]


@pytest.mark.parametrize("policy", SAFE)
def test_no_token_beyond_the_commit_index_moves_a_hidden_state_by_a_bit(policy: str, row: Sidecars) -> None:
    """The theorem on three layers of Llama: h(i) does not change when every token beyond c(i) is replaced."""
    model = decoder("Llama")
    model.set_attn_implementation("mma")
    plan, commit, positions = (
        build_plan(get_policy(policy, grid=(3, 3)), row),
        commit_index(row),
        position_ids(row)[None],
    )
    hidden = torch.randn(1, len(row), SIZES["hidden_size"], dtype=torch.float64)
    states = run_layers(model, hidden, plan, positions)
    for boundary in commit[row.segment > 0].unique().tolist():
        changed = hidden.clone()
        changed[:, boundary + 1 :] += torch.randn_like(changed[:, boundary + 1 :])
        keeps = (commit <= boundary) & (row.segment > 0)
        assert run_layers(model, changed, plan, positions)[:, keeps].equal(states[:, keeps])


def every_question(i: Any, j: Any) -> Any:
    return (i.modality == 1) & (j.modality == 0) & (j.generated == 0)


@pytest.mark.parametrize(
    "policy",
    [
        get_policy("mma_unclamped", allow_leak=True),
        get_policy("image_to_answer", allow_leak=True),
        Policy("every_question", "images read the questions of all turns", every_question, leaks=True),
    ],
    ids=lambda policy: policy.name,
)
def test_a_proved_leak_exists_in_a_real_model(policy: Policy) -> None:
    """The path's last token gets a gradient from the prediction at its first one, from the proved layer on."""
    row = parse_layout("V4 Q2 A3 Q2 A2")
    path = prove(policy, row, layers=3).leak
    assert path is not None
    model = decoder("Llama")
    model.set_attn_implementation("mma")
    layers = model.layers
    for depth in range(1, len(layers) + 1):
        model.layers = layers[:depth]
        hidden = torch.randn(1, len(row), SIZES["hidden_size"], dtype=torch.float64, requires_grad=True)
        out = run_layers(model, hidden, build_plan(policy, row), position_ids(row)[None])
        (gradient,) = torch.autograd.grad(out[0, path.tokens[0]].sum(), hidden)
        assert bool(gradient[0, path.tokens[-1]].abs().max() > 0) == (depth >= path.layer)


@pytest.mark.parametrize("family", ["Llama", "Gemma2", "Gemma3"])
def test_the_same_model_decodes_with_a_cache(family: str) -> None:
    """Left-padded prompts decoded together equal each prompt read alone in one pass by the model's own attention."""
    model = decoder(family)
    ids = torch.tensor([[0, 0, 5, 6, 7], [8, 9, 10, 11, 12]])
    mask = (ids != 0).long()
    model.set_attn_implementation("mma")
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    prompt = {"input_ids": ids[:, :4], "attention_mask": mask[:, :4], "position_ids": positions[:, :4]}
    first = model(**prompt, use_cache=True)
    step = {"input_ids": ids[:, 4:], "attention_mask": mask, "position_ids": positions[:, 4:]}
    rest = model(**step, past_key_values=first.past_key_values)
    found = torch.cat([first.last_hidden_state, rest.last_hidden_state], 1)
    model.set_attn_implementation("eager")
    for line, words in zip(found, ids, strict=True):
        alone = model(input_ids=words[words != 0][None]).last_hidden_state[0]
        torch.testing.assert_close(line[words != 0], alone, rtol=1e-5, atol=1e-5)


def test_gradient_checkpointing_recomputes_under_the_same_plan(row: Sidecars) -> None:
    model = decoder("Llama")
    model.set_attn_implementation("mma")
    hidden, plan = torch.randn(1, len(row), SIZES["hidden_size"], dtype=torch.float64), build_plan("mma", row)
    gradients = []
    for checkpointing in (False, True):
        model.zero_grad()
        if checkpointing:
            model.train()
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        run_layers(model, hidden, plan, position_ids(row)[None]).square().sum().backward()
        gradients.append(model.layers[0].self_attn.q_proj.weight.grad.clone())
    assert gradients[0].equal(gradients[1])


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("Mistral", {"sliding_window": 20}, "sliding window of 20 tokens is shorter than a packed sample of 25"),
        ("Llama", {"attention_dropout": 0.1}, r"attention dropout 0\.1 is not supported"),
    ],
)
def test_unsupported_layers_are_refused(family: str, changes: dict[str, Any], message: str, row: Sidecars) -> None:
    model = decoder(family, **changes)
    model.set_attn_implementation("mma")
    model.train()
    hidden = torch.zeros(1, len(row), SIZES["hidden_size"], dtype=torch.float64)
    with pytest.raises(UserError, match=message):
        run_layers(model, hidden, build_plan("mma", row), position_ids(row)[None])
