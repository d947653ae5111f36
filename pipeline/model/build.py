"""Builds a stage one unit at a time, so a rank never holds more than one unsharded layer."""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Callable, Sequence

import torch
from torch import nn
from transformers import PreTrainedModel

from pipeline.attention.gate import PairGate, is_gate
from pipeline.model.connectors.base import NormedConnector
from pipeline.model.lora import draw_adapters, is_adapter
from pipeline.model.spec import ModelSpec
from pipeline.model.stage import Stage
from pipeline.model.trainable import Trainable
from pipeline.model.weights import WeightSource

INITIALISED = "_is_hf_initialized"
_ROWS_AT_ONCE = 4_096


def build_stage(
    spec: ModelSpec,
    *,
    layers: Sequence[int],
    first: bool,
    last: bool,
    dtype: torch.dtype,
    device: torch.device | str,
    seed: int,
    source: WeightSource | None = None,
    reads: bool = True,
    shard: Callable[[nn.Module], None] | None = None,
    trains: Callable[[str], bool] | None = None,
    gradient_checkpointing: int = 0,
) -> Stage:
    """Build the stage of decoder layers ``layers``.

    Each unit (an encoder block, the connector, the embedding, a decoder layer, the norm, the head) is allocated,
    filled, cast and passed to ``shard`` before the next one, so the host memory of a rank holds its own shards and one
    unit. Values drawn from scratch depend only on ``seed`` and the unit's global name, so every split into stages gives
    the same model to the bit.

    Args:
        spec: the model.
        layers: global indices of the decoder layers, ascending; one run of layers, or several virtual stages.
        first: add the vision towers, the connector and the embedding.
        last: add the final norm and the head.
        dtype: dtype of the parameters; values are drawn in fp32 and cast.
        device: where units are moved before they are sharded.
        seed: seed of everything that starts from scratch.
        source: pretrained weights; parts it lacks start from scratch.
        reads: whether this rank fills the units; if False they are zeros, to be overwritten by a broadcast.
        shard: called with each finished unit (ZeRO-3 partitions it there).
        trains: whether the parameter of a global name is trained; default: everything but a frozen tower.
        gradient_checkpointing: k: recompute every k-th decoder layer in the backward pass; 0 = none.

    Returns:
        The stage, in training mode.

    Raises:
        UserError: a weight file cannot be read.
    """
    trains = trains or Trainable.everything_of(spec).trains
    llm = spec.meta_llm()
    towers = {name: tower.meta() for name, tower in spec.towers.items()} if first else {}
    stage = Stage(
        spec,
        llm,
        [*towers.values()],
        layers=layers,
        first=first,
        last=last,
        gradient_checkpointing=gradient_checkpointing,
    )
    for name, unit in stage.units():
        family = next((tower for own, tower in towers.items() if name.startswith(f"{own}.")), llm)
        if not reads or _in_source(name, unit, source):  # only values drawn from scratch need fp32 first
            _cast(unit, dtype)
        unit.to_empty(device="cpu")
        _fill(name, unit, family, seed=seed, source=source, reads=reads)
        if reads and isinstance(unit, NormedConnector) and not _in_source(name, unit, source):
            nn.init.constant_(unit.norm.weight, _text_scale(stage.model.embed_tokens, llm, seed=seed, source=source))
        _cast(unit, dtype)
        for own, param in unit.named_parameters():
            param.requires_grad_(param.requires_grad and trains(f"{name}.{own}"))  # a family's constants stay
        unit.to(device)
        if source is not None:
            source.close()
        if shard is not None:
            shard(unit)
    if stage.shares_head:
        stage.lm_head.register_parameter("weight", stage.model.embed_tokens.get_parameter("weight"))
    return stage.train()


@torch.no_grad()
def _text_scale(embedding: nn.Module, llm: PreTrainedModel, *, seed: int, source: WeightSource | None) -> float:
    """Return the root mean square of the text embeddings with which the model starts, from a copy that is dropped."""
    name, copied = "model.embed_tokens", copy.deepcopy(embedding).to_empty(device="cpu")
    _fill(name, copied, llm, seed=seed, source=source, reads=True)
    weight = copied.get_parameter("weight")
    squares = 0.0
    for ids in torch.split(torch.arange(len(weight)), _ROWS_AT_ONCE):
        squares += float(copied(ids).double().square().sum())
    return math.sqrt(squares / weight.numel())


def _in_source(name: str, unit: nn.Module, source: WeightSource | None) -> bool:
    """Whether a source has a unit; gates and adapters may be missing, which most pretrained decoders have not."""
    own = [own for own, _ in unit.named_parameters() if not (is_gate(own) or is_adapter(own))]
    return source is not None and all(f"{name}.{parameter}" in source for parameter in own)


def _cast(unit: nn.Module, dtype: torch.dtype) -> None:
    """Change the dtype of a unit's parameters; buffers keep theirs."""
    for param in unit.parameters():
        param.data = param.data.to(dtype)


@torch.no_grad()
def _fill(
    name: str, unit: nn.Module, family: PreTrainedModel | None, *, seed: int, source: WeightSource | None, reads: bool
) -> None:
    """Set the values of a unit's parameters and buffers, on the CPU."""
    # A head tied to an embedding on another stage must start with the same values.
    drawn_as = "model.embed_tokens" if name == "lm_head" and family is not None and _is_tied(family) else name
    loaded = _in_source(name, unit, source)
    for own, param in unit.named_parameters():
        # transformers' initialisers skip parameters with this mark and fill only buffers
        if loaded or not reads or is_adapter(own):
            setattr(param, INITIALISED, True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_seed_of(seed, drawn_as))
        if name == "connector":
            unit.apply(_reset)
        else:
            assert family is not None
            unit.apply(family._init_weights)
    _reset_gates(name, unit, seed)
    for own, param in unit.named_parameters():
        is_new = is_gate(own) and (source is None or f"{name}.{own}" not in source)
        if not (reads or is_new):
            param.zero_()
        elif loaded and not (is_new or is_adapter(own)) and source is not None:
            source.fill(f"{name}.{own}", param)
        vars(param).pop(INITIALISED, None)
    draw_adapters(name, unit, lambda own: _seed_of(seed, own))


def _is_tied(family: PreTrainedModel) -> bool:
    return bool(family.config.tie_word_embeddings)


def _reset_gates(name: str, unit: nn.Module, seed: int) -> None:
    """Draw new gates on every rank, apart from the other values, which are the same with and without gates.

    A checkpoint from before a gate fills everything else.
    """
    for own, module in unit.named_modules():
        if isinstance(module, PairGate):
            module.reset(torch.Generator().manual_seed(_seed_of(seed, f"{name}.{own}")))


def _reset(module: nn.Module) -> None:
    reset: Callable[[], None] | None = getattr(module, "reset_parameters", None)
    if reset is not None:
        reset()


def _seed_of(seed: int, name: str) -> int:
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return int.from_bytes(digest[:8], "little") % (1 << 63)
