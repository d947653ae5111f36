"""A learned bias of query-key pairs over visual keys ("rave-style"), added to the logits before the softmax.

The score of query i and key j becomes

    s_ij = scaling * <q_i, k_j> + [j visual] * g_h * <U_h p_i, W_h t_j> / sqrt(rank)

with q, k the rotated queries and keys, and p, t the same before the rotary embedding (after the query and key norms of
families that have them). U and W are rank x head size, g is one number per head. g starts at 0, and the first step of a
model with new gates is that of the model without, to the bit.

The idea, a pair gate over visual keys from features before the rotary embedding, is that of RAVE (arXiv 2605.18359).
Its exact form is not public; the bilinear form, its rank, its start and which heads share weights are ours.

A bilinear bias needs no kernel of its own: ``rank`` more dimensions of queries and keys carry it, and values are padded
with zeros. So every attention backend runs it, and a KV cache of wider keys holds it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from data_prep.common.errors import UserError

NAME = "pair_gate"
"""Attribute of a layer's attention module that holds its gate; part of the names of its parameters."""
MULTIPLE = 8
"""Kernels want head sizes that are a multiple of this."""


class QueryKey(NamedTuple):
    """The modules of a family's attention whose outputs are queries and keys before the rotary embedding."""

    query: str
    key: str
    """The same as ``query`` where one module returns queries, keys and values side by side."""
    heads_first: bool = False
    """The outputs are [B, H, T, D], not [B, T, H, D] or [B, T, H * D]."""


PROJECTIONS = QueryKey("q_proj", "k_proj")
FUSED = QueryKey("qkv_proj", "qkv_proj")
NORMS = QueryKey("q_norm", "k_norm")


@dataclass(frozen=True)
class GateShape:
    """Sizes of a gate."""

    heads: int
    kv_heads: int
    head_size: int
    rank: int
    chosen: tuple[int, ...]
    """Query heads that have a gate, ascending; groups of them with ``per_group``."""
    per_group: bool = False
    """All query heads that share a key head share U and g as well."""

    @property
    def groups(self) -> tuple[int, ...]:
        """Key heads that have a W, ascending: keys are projected once for all query heads that read them."""
        if self.per_group:
            return self.chosen
        return tuple(sorted({head // (self.heads // self.kv_heads) for head in self.chosen}))


class PairGate(nn.Module):
    """The gate of one layer; its parameters are used only in its own forward, as ZeRO-3 requires."""

    def __init__(self, shape: GateShape) -> None:
        """Allocate a gate; :meth:`reset` gives it values."""
        super().__init__()
        self.shape = shape
        size = (shape.rank, shape.head_size)
        self.query = nn.Parameter(torch.empty(len(shape.chosen), *size))
        """U."""
        self.key = nn.Parameter(torch.empty(len(shape.groups), *size))
        """W."""
        self.strength = nn.Parameter(torch.empty(len(shape.chosen)))
        """g."""
        self._features: dict[str, torch.Tensor] = {}
        self.is_open = False
        """Whether some g was not 0 when the gate last ran; then it is not looked at again."""

    @torch.no_grad()
    def reset(self, generator: torch.Generator) -> None:
        """Draw U and W with variance 1 / head size, on the CPU in fp32, and set g to 0."""
        for weight in (self.query, self.key):
            drawn = torch.randn(weight.shape, generator=generator) * self.shape.head_size**-0.5
            weight.copy_(drawn.to(weight.dtype))
        self.strength.zero_()

    def forward(
        self, p_BTHD: torch.Tensor | None, t_BTHkD: torch.Tensor | None, visual_BT: torch.Tensor | None, scaling: float
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Return the additional dimensions of queries [B, H, T, rank] and of keys [B, H_kv, T, rank].

        Args:
            p_BTHD: queries before the rotary embedding; None: no queries.
            t_BTHkD: keys before the rotary embedding; None: no keys.
            visual_BT: bool, True for media tokens; other keys get zeros.
            scaling: factor of the logits, which also multiplies the additional dimensions.
        """
        queries = keys = None
        self.is_open = self.is_open or bool(self.strength.any())  # the host waits for this until g has changed
        if p_BTHD is not None:
            weight = self.query * (self.strength / (self.shape.rank**0.5 * scaling))[:, None, None]
            heads = self.shape.kv_heads if self.shape.per_group else self.shape.heads
            weight = _spread(weight, self.shape.chosen, heads).repeat_interleave(self.shape.heads // heads, dim=0)
            queries = torch.einsum("bthd,hrd->bhtr", p_BTHD, weight)
        if t_BTHkD is not None:
            assert visual_BT is not None
            weight = _spread(self.key, self.shape.groups, self.shape.kv_heads)
            keys = torch.einsum("bthd,hrd->bhtr", t_BTHkD, weight) * visual_BT[:, None, :, None]
        return queries, keys

    def keep(self, name: str, output: torch.Tensor, heads_first: bool) -> None:
        """Keep queries or keys before the rotary embedding until this layer's attention call reads them."""
        heads = self.shape.heads if name == "query" else self.shape.kv_heads
        if heads_first:
            output = output.transpose(1, 2)
        self._features[name] = output.reshape(*output.shape[:2], heads, self.shape.head_size)

    def take(self, name: str) -> torch.Tensor:
        """Return what was kept, once: [B, T, H, D]."""
        return self._features.pop(name)

    def closed(
        self, wide: tuple[torch.Tensor, torch.Tensor, torch.Tensor], size: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return widened queries, keys and values through which gradients reach the gate only."""
        q, k, v = (torch.cat([x[..., :size].detach(), x[..., size:]], dim=-1) for x in wide)
        return q, k, v.detach()

    def widen(
        self,
        q_BHTD: torch.Tensor,
        k_BHkKD: torch.Tensor,
        v_BHkKD: torch.Tensor,
        visual_BT: torch.Tensor | None,
        scaling: float,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return queries, keys and values of a common, larger head size, whose attention includes the bias.

        Args:
            q_BHTD: rotated queries.
            k_BHkKD: rotated keys, or keys that a :class:`GatedKeys` cache has widened.
            v_BHkKD: values.
            visual_BT: bool, True for media tokens; None where the cache has widened the keys.
            scaling: factor of the logits.
        """
        size, rank = q_BHTD.shape[-1], self.shape.rank
        if k_BHkKD.shape[-1] == size + rank:  # the cache has taken the keys
            queries, _ = self(self.take("query"), None, None, scaling)
        else:
            assert visual_BT is not None, "a gate needs to know which keys are visual"
            queries, keys = self(self.take("query"), self.take("key"), visual_BT, scaling)
            k_BHkKD = torch.cat([k_BHkKD, keys], dim=-1)
        pad = -(size + rank) % MULTIPLE
        q_BHTD = F.pad(torch.cat([q_BHTD, queries], dim=-1), (0, pad))
        return q_BHTD, F.pad(k_BHkKD, (0, pad)), F.pad(v_BHkKD, (0, rank + pad))


def gated(
    attend: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor],
    gate: PairGate,
    qkv: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    visual_BT: torch.Tensor | None,
    scaling: float,
) -> torch.Tensor:
    """Attend with the bias of a gate; out[B, T, H, D].

    Wider products may round in another order. So while g is 0, the result and every other gradient are those of plain
    attention, and the wider one only gives g its gradient.

    Args:
        attend: queries, keys and values to out[B, T, H, D].
        gate: of the layer.
        qkv: rotated queries, keys and values.
        visual_BT: as in :meth:`PairGate.widen`.
        scaling: factor of the logits.
    """
    size = qkv[0].shape[-1]
    if visual_BT is None:
        return attend(*gate.widen(*qkv, visual_BT, scaling))[..., :size]
    wide = gate.widen(*qkv, visual_BT, scaling)
    if gate.is_open:
        return attend(*wide)[..., :size]
    plain = attend(*qkv)
    biased = attend(*gate.closed(wide, size))[..., :size]
    return plain + (biased - biased.detach())


def attach_gate(attention: nn.Module, shape: GateShape, taps: QueryKey | None) -> None:
    """Give a layer's attention a gate, and let it see queries and keys before the rotary embedding.

    Raises UserError where the family's modules are not known.
    """
    undeclared = hasattr(attention, "q_norm") and taps == PROJECTIONS
    if taps is None or undeclared or not all(hasattr(attention, name) for name in taps[:2]):
        raise UserError(
            f"model.gate: where {type(attention).__name__} has its queries and keys before the rotary embedding is not "
            "known: set model.gate.kind to none, or use another decoder family"
        )
    gate = PairGate(shape)
    setattr(attention, NAME, gate)
    for name, tap in (("query", taps.query), ("key", taps.key)):
        attention.get_submodule(tap).register_forward_hook(_tap(gate, name, taps))


def gate_of(attention: nn.Module) -> PairGate | None:
    """Return the gate of a layer's attention, if it has one."""
    return getattr(attention, NAME, None)


def is_gate(parameter: str) -> bool:
    """Whether a parameter of this name, global or within a layer, belongs to a gate."""
    return NAME in parameter.split(".")


class GatedKeys:
    """Mixin of a transformers cache: it stores keys with the gate's dimensions, so later queries find the bias.

    A cache holds rotated keys, from which the gate's dimensions cannot be computed any more.
    """

    gates: Sequence[PairGate] = ()
    """By layer; empty for a model without gates."""
    visual: torch.Tensor | None = None
    """bool[B, P]: which tokens of the prompt are media; None: none is. Later tokens are text."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store the new tokens' keys and values, and return all; keys are [B, H_kv, K, D + rank] with gates."""
        if self.gates:
            gate, tokens = self.gates[layer_idx], key_states.shape[2]
            start: int = self.get_seq_length(layer_idx)  # type: ignore[attr-defined]
            visual = self._visual(key_states, start, tokens)
            _, keys = gate(None, gate.take("key"), visual, 1.0)
            key_states = torch.cat([key_states, keys], dim=-1)
        stored: tuple[torch.Tensor, torch.Tensor]
        stored = super().update(key_states, value_states, layer_idx, *args, **kwargs)  # type: ignore[misc]
        return stored

    def _visual(self, like: torch.Tensor, start: int, tokens: int) -> torch.Tensor:
        """Return bool[B, tokens] from token ``start``; beams repeat the rows of a prompt."""
        if self.visual is None:
            return torch.zeros(like.shape[0], tokens, dtype=torch.bool, device=like.device)
        own = self.visual[:, start : start + tokens].to(like.device)
        own = F.pad(own, (0, tokens - own.shape[1]))
        return own.repeat_interleave(like.shape[0] // own.shape[0], dim=0)


def _tap(gate: PairGate, name: str, taps: QueryKey) -> Callable[[nn.Module, Any, torch.Tensor], None]:
    """Return a forward hook that keeps a module's output for the gate."""
    size = gate.shape.head_size
    queries, keys = gate.shape.heads * size, gate.shape.kv_heads * size
    fused = {"query": slice(0, queries), "key": slice(queries, queries + keys)}

    def keep(module: nn.Module, args: Any, output: torch.Tensor) -> None:
        gate.keep(name, output[..., fused[name]] if taps.query == taps.key else output, taps.heads_first)

    return keep


def _spread(weight: torch.Tensor, chosen: tuple[int, ...], heads: int) -> torch.Tensor:
    """Return [heads, rank, D] with zeros for heads that are not chosen."""
    if len(chosen) == heads:
        return weight
    index = torch.tensor(chosen, device=weight.device)
    return weight.new_zeros(heads, *weight.shape[1:]).index_copy(0, index, weight)


def gate_shape(sizes: Mapping[str, int], *, rank: int, heads: str, per: str) -> GateShape:
    """Return a gate's sizes.

    Args:
        sizes: ``heads``, ``kv_heads`` and ``head_size`` of the decoder.
        rank: additional dimensions.
        heads: ``all``, or numbers such as ``0,3,7``.
        per: ``head``, or ``kv_group`` for one gate per group of query heads that share a key head.

    Raises:
        UserError: a number is no head of the model.
    """
    count = sizes["kv_heads"] if per == "kv_group" else sizes["heads"]
    try:
        chosen = tuple(range(count)) if heads == "all" else tuple(sorted({int(text) for text in heads.split(",")}))
    except ValueError:
        chosen = ()
    if not chosen or not 0 <= chosen[0] <= chosen[-1] < count:
        what = "groups of query heads" if per == "kv_group" else "heads"
        raise UserError(f"model.gate.heads={heads}: write all, or numbers of the model's {count} {what}, such as 0,1")
    return GateShape(**sizes, rank=rank, chosen=chosen, per_group=per == "kv_group")
