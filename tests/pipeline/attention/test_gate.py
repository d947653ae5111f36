"""The bias of query-key pairs over visual keys: widened attention against the additive form, and where features lie."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from data_prep.common.errors import UserError
from pipeline.attention import attend, build_plan
from pipeline.attention.gate import FUSED, PROJECTIONS, GatedKeys, PairGate, QueryKey, attach_gate, gate_of, gate_shape
from pipeline.masks import dense_mask, parse_layout
from tests.pipeline.attention.tensors import distance

ROW = parse_layout("Q2 V6 Q3 A2 V5 Q1 A2 | V4 U3 Q2 A3 P5")
HEADS, KV_HEADS, SIZE, RANK = 4, 2, 8, 5
SIZES = {"heads": HEADS, "kv_heads": KV_HEADS, "head_size": SIZE}
SCALING = 0.7


def make_gate(heads: str = "all", per: str = "head") -> PairGate:
    gate = PairGate(gate_shape(SIZES, rank=RANK, heads=heads, per=per)).double()
    gate.reset(torch.Generator().manual_seed(0))
    with torch.no_grad():
        gate.strength.copy_(torch.randn(len(gate.strength), dtype=torch.float64) * 2)
    return gate


def leaf(heads: int, *, features: bool = False) -> torch.Tensor:
    shape = (1, len(ROW), heads, SIZE) if features else (1, heads, len(ROW), SIZE)
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


def bias_of(gate: PairGate, p: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """The bias [H, T, T] by its definition, one head at a time."""
    shape, bias = gate.shape, []
    for head in range(HEADS):
        group = head // (HEADS // KV_HEADS)
        owner = group if shape.per_group else head
        if owner not in shape.chosen:
            bias.append(torch.zeros(len(ROW), len(ROW), dtype=torch.float64))
            continue
        own = shape.chosen.index(owner)
        queries = p[0, :, head] @ gate.query[own].T
        keys = t[0, :, group] @ gate.key[shape.groups.index(group)].T
        bias.append(gate.strength[own] * (queries @ keys.T) / RANK**0.5 * (ROW.modality != 0))
    return torch.stack(bias)


def additive(gate: PairGate, tensors: tuple[torch.Tensor, ...], softcap: float | None, policy: str) -> torch.Tensor:
    q, k, v, p, t = tensors
    k, v = (x.repeat_interleave(HEADS // KV_HEADS, 1) for x in (k, v))
    logits = SCALING * q @ k.transpose(2, 3) + bias_of(gate, p, t)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return logits.masked_fill(~dense_mask(policy, ROW), float("-inf")).softmax(-1) @ v


def widened(
    gate: PairGate, tensors: tuple[torch.Tensor, ...], softcap: float | None, policy: str, backend: str
) -> torch.Tensor:
    q, k, v, p, t = tensors
    plan = build_plan(policy, ROW)
    gate.keep("query", p, heads_first=False)
    gate.keep("key", t, heads_first=False)
    q, k, v = gate.widen(q, k, v, plan.visual[None], SCALING)
    assert q.shape[-1] == k.shape[-1] == v.shape[-1] and q.shape[-1] % 8 == 0
    return attend(q, k, v, plan, backend=backend, scaling=SCALING, softcap=softcap)[..., :SIZE]


@pytest.mark.parametrize(("heads", "per"), [("all", "head"), ("1,2", "head"), ("all", "kv_group"), ("1", "kv_group")])
@pytest.mark.parametrize(
    ("backend", "policy", "softcap"),
    [("runsplit", "mma", None), ("runsplit", "mixed", 3.0), ("lse", "mma", None), ("dense", "prefix", None)],
)
def test_outputs_and_all_gradients_are_those_of_the_additive_form(
    heads: str, per: str, backend: str, policy: str, softcap: float | None
) -> None:
    torch.manual_seed(1)
    gate = make_gate(heads, per)
    tensors = leaf(HEADS), leaf(KV_HEADS), leaf(KV_HEADS), leaf(HEADS, features=True), leaf(KV_HEADS, features=True)
    wanted = (*tensors, *gate.parameters())
    real = ROW.segment > 0
    gradient = torch.randn(1, HEADS, len(ROW), SIZE, dtype=torch.float64) * real[:, None]
    outs = widened(gate, tensors, softcap, policy, backend), additive(gate, tensors, softcap, policy)
    found, exact = ([out.detach()[:, :, real], *torch.autograd.grad(out, wanted, gradient)] for out in outs)
    assert max(distance(a, b) for a, b in zip(found, exact, strict=True)) <= 1e-12
    assert all(value.abs().max() > 0 for value in found)


def test_flex_adds_the_same_bias() -> None:
    torch.manual_seed(1)
    gate = make_gate()
    tensors = tuple(x.detach() for x in (leaf(HEADS), leaf(KV_HEADS), leaf(KV_HEADS)))
    tensors += leaf(HEADS, features=True).detach(), leaf(KV_HEADS, features=True).detach()
    real = ROW.segment > 0
    with torch.no_grad():
        found, exact = widened(gate, tensors, None, "mma", "flex"), additive(gate, tensors, None, "mma")
    assert distance(found[:, :, real], exact[:, :, real]) <= 1e-12


def test_text_columns_have_no_bias_and_a_new_gate_none_at_all() -> None:
    gate = make_gate()
    p, t = leaf(HEADS, features=True), leaf(KV_HEADS, features=True)
    visual = build_plan("mma", ROW).visual[None]
    queries, keys = gate(p, t, visual, SCALING)
    bias = SCALING * queries @ keys.repeat_interleave(2, 1).transpose(2, 3)
    torch.testing.assert_close(bias[0], bias_of(gate, p, t))
    assert bias[..., ~visual[0]].abs().max() == 0 and (bias[..., visual[0]] != 0).all()
    gate.reset(torch.Generator().manual_seed(0))
    queries, _ = gate(p, t, visual, SCALING)
    assert queries.abs().max() == 0


class _Plain:
    def __init__(self) -> None:
        self.kept: list[torch.Tensor] = []

    def update(self, key: torch.Tensor, value: torch.Tensor, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        self.kept.append(key)
        return torch.cat(self.kept, dim=2), value

    def get_seq_length(self, layer: int) -> int:
        return sum(key.shape[2] for key in self.kept)


class _Gated(GatedKeys, _Plain):
    pass


def test_a_cache_filled_in_pieces_holds_the_dimensions_of_one_filled_at_once() -> None:
    gate, t, k = make_gate(), leaf(KV_HEADS, features=True).detach(), leaf(KV_HEADS).detach()
    visual = ROW.modality != 0
    whole = torch.cat([k, gate(None, t, visual[None], 1.0)[1]], dim=-1)
    cache = _Gated()
    cache.gates, cache.visual = [gate], visual[None, :20]  # the rest is text
    whole[:, :, 20:, SIZE:] = 0
    for start, stop in ((0, 7), (7, 20), (20, 21), (21, len(ROW))):
        gate.keep("key", t[:, start:stop], heads_first=False)
        keys, _ = cache.update(k[:, :, start:stop], k[:, :, start:stop], 0)
    torch.testing.assert_close(keys, whole)
    assert keys[..., SIZE:][:, :, 20:].abs().max() == 0


@pytest.mark.parametrize("heads", ["4", "-1", "", "one", "0,9"])
def test_heads_the_model_lacks_are_refused(heads: str) -> None:
    with pytest.raises(UserError, match="model's 4 heads"):
        gate_shape(SIZES, rank=RANK, heads=heads, per="head")
    with pytest.raises(UserError, match="model's 2 groups of query heads"):
        gate_shape(SIZES, rank=RANK, heads="2", per="kv_group")


@pytest.mark.parametrize("taps", [None, FUSED, QueryKey("q_norm", "k_norm"), PROJECTIONS])
def test_attention_of_unknown_shape_is_refused(taps: Any) -> None:
    attention = nn.Module()
    attention.q_proj, attention.k_proj = nn.Linear(4, 4), nn.Linear(4, 4)
    if taps == PROJECTIONS:  # projections alone are not the queries where a norm follows
        attention.q_norm = nn.LayerNorm(4)
    with pytest.raises(UserError, match=r"model\.gate: .*kind to none"):
        attach_gate(attention, gate_shape(SIZES, rank=RANK, heads="all", per="head"), taps)
    assert gate_of(attention) is None
