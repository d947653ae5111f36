"""LoRA (arXiv 2106.09685): linear layers of decoder and tower keep their weights and learn a low-rank update.

``y = W x + b + s B A x`` with A [rank, in] and B [out, rank]; s = alpha / rank, or alpha / sqrt(rank) with rsLoRA
(arXiv 2312.03732). Names and files are those of `peft`: ``MODULE.lora_A.weight`` and ``MODULE.lora_B.weight`` beside
``MODULE.weight``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from fnmatch import fnmatchcase
from importlib.util import find_spec

import torch
from torch import nn
from torch.nn import functional as F

from data_prep.common.errors import did_you_mean
from pipeline.config.schema import ConfigError, LoraConfig

A, B = "lora_A.weight", "lora_B.weight"
_BITSANDBYTES = "bitsandbytes"


def is_adapter(name: str) -> bool:
    """Whether a parameter's name is that of an adapter."""
    return name.endswith((A, B))


def scaling(lora: LoraConfig) -> float:
    """Return s, the factor of the update."""
    return lora.alpha / (math.sqrt(lora.rank) if lora.rslora else lora.rank)


class LoraLinear(nn.Linear):
    """A linear layer with its update; the weight keeps its name, so that files of the base model fit."""

    def __init__(self, base: nn.Linear, lora: LoraConfig) -> None:
        """Take the weight and bias of ``base``; A and B are empty until :func:`draw_adapters` fills them."""
        super().__init__(base.in_features, base.out_features, bias=base.bias is not None, device="meta")
        self.weight, self.bias = base.weight, base.bias
        self.scaling = scaling(lora)
        self.lora_A = nn.Linear(base.in_features, lora.rank, bias=False, device="meta")
        self.lora_B = nn.Linear(lora.rank, base.out_features, bias=False, device="meta")

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Return [..., out] of [..., in]. A and B are modules of their own, as ZeRO-3 gathers by module."""
        update: torch.Tensor = self.lora_B(self.lora_A(input))
        return F.linear(input, self.weight, self.bias) + update * self.scaling


def merged_update(a: torch.Tensor, b: torch.Tensor, lora: LoraConfig) -> torch.Tensor:
    """Return s B A, fp32 [rows of B, in]; any rows of B give those of the update."""
    return scaling(lora) * (b.float() @ a.float())


def add_adapters(root: nn.Module, lora: LoraConfig) -> None:
    """Replace the targets that ``root`` holds by `LoraLinear`. Raises ConfigError for one that is not linear."""
    for name in lora.targets:
        parent, _, own = name.rpartition(".")
        try:
            base = root.get_submodule(name)
        except AttributeError:  # of another stage
            continue
        if not isinstance(base, nn.Linear) or isinstance(base, LoraLinear):
            raise ConfigError(f"model.lora: {name} is not a linear layer: save the model again")
        setattr(root.get_submodule(parent), own, LoraLinear(base, lora))


@torch.no_grad()
def draw_adapters(name: str, unit: nn.Module, seed_of: Callable[[str], int]) -> None:
    """Initialise the adapters of a unit as peft does: A uniform in +-1/sqrt(in), B zero, so that nothing changes yet.

    Values depend on ``seed_of`` the global name alone, so every split into stages starts equal.
    """
    for own, module in unit.named_modules(prefix=name):
        if isinstance(module, LoraLinear):
            generator = torch.Generator().manual_seed(seed_of(f"{own}.{A}"))
            bound = 1.0 / math.sqrt(module.in_features)
            drawn = torch.empty(module.lora_A.weight.shape).uniform_(-bound, bound, generator=generator)
            module.lora_A.weight.copy_(drawn)
            module.lora_B.weight.zero_()


def adapter_shapes(
    lora: LoraConfig | None, shapes: Mapping[str, tuple[int, ...]]
) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield (global name, shape) of every adapter, from the shapes of the base.

    Raises ConfigError for a target that the base does not have.
    """
    for name in lora.targets if lora else ():
        shape = shapes.get(f"{name}.weight", ())
        if lora is None or len(shape) != 2:
            raise ConfigError(f"model.lora: the model has no linear layer {name}: save the model again")
        yield f"{name}.{A}", (lora.rank, shape[1])
        yield f"{name}.{B}", (shape[0], lora.rank)


def resolve(lora: LoraConfig, modules: Iterable[tuple[str, nn.Module]]) -> LoraConfig | None:
    """Return LoRA with the global names of its targets; None without LoRA.

    Args:
        lora: the recipe's section.
        modules: (global name, module) of tower and decoder layers.

    Raises:
        ConfigError: a target matches no linear layer, or quantization is asked for.
    """
    if lora.quantization != "none":
        raise ConfigError(f"model.lora.quantization={lora.quantization} {_why_not_quantized()}: set it to none")
    if not lora.rank:
        return None
    linear = [name for name, module in modules if isinstance(module, nn.Linear)]
    for target in lora.targets:
        if not any(_is_target(target, name) for name in linear):
            known = dict.fromkeys([*(name.rpartition(".")[2] for name in linear), *linear])
            raise ConfigError(f"model.lora.targets: '{target}' matches no linear layer{did_you_mean(target, known)}")
    names = [name for name in linear if any(_is_target(target, name) for target in lora.targets)]
    return lora.model_copy(update={"targets": names})


def _is_target(target: str, name: str) -> bool:
    """Whether a target is a layer's last words, as in peft, or a pattern of its global name."""
    return name == target or name.endswith(f".{target}") or fnmatchcase(name, target)


def _why_not_quantized() -> str:
    if find_spec(_BITSANDBYTES) is None:
        return "needs bitsandbytes, which is not installed"
    return "is not supported: stages shard weights of plain types only, not the 4- and 8-bit blocks of bitsandbytes"
