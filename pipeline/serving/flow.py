"""Adaptive information flow (AIF, arXiv 2604.15809): at inference, text stops reading the image tokens it needs least.

A first pass records how strongly text attends to each image token in each layer. Tokens on which attention rests in a
few layers matter; those with attention spread evenly over the layers are background. The answer is then generated with
the reads of the background cut: no text query sees those keys, in any layer. Image tokens still see each other. The
weights do not change, and the cut removes pairs only, so everything proved about the policy still holds.

Here I is the number of image tokens of a prompt and L the number of layers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

import torch

from pipeline.attention.hf import WATCH

Heads = Literal["mean", "max"]
Rounding = Literal["down", "up"]
STEPS = 10
"""Ratios tried: 1/10 to 9/10 of the image tokens."""


@dataclass(frozen=True)
class AdaptiveFlow:
    """The options that the paper leaves open."""

    heads: Heads = "mean"
    """How the heads' attention probabilities become one."""
    rounding: Rounding = "down"
    """How many tokens a ratio drops when it is no whole number."""


@dataclass
class Profile:
    """The largest attention probability that a text query gives to each token, layer by layer."""

    text: torch.Tensor
    """bool[B, P]: tokens of the prompt whose queries count; those after the prompt do, too."""
    heads: Heads
    layers: dict[int, torch.Tensor] = field(default_factory=dict)
    """float[B, P] by layer: d of the paper, for every key of the prompt."""

    def __call__(
        self,
        layer: int,
        q_BHTD: torch.Tensor,
        k_BHkKD: torch.Tensor,
        mask: torch.Tensor | None,
        scaling: float,
        softcap: float | None,
    ) -> None:
        """Look at one attention call of a layer."""
        prompt = self.text.shape[1]
        counted = self.text if q_BHTD.shape[2] == prompt else None
        keys = k_BHkKD.repeat_interleave(q_BHTD.shape[1] // k_BHkKD.shape[1], dim=1)
        logits = (q_BHTD.float() @ keys.float().transpose(2, 3)) * scaling
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        if mask is not None:
            logits = logits.masked_fill(~mask[..., : logits.shape[-1]], float("-inf"))
        weights_BTK = _reduced(logits.softmax(-1), self.heads)[..., :prompt]
        if counted is not None:
            weights_BTK = weights_BTK * counted[:, :, None]
        seen = weights_BTK.amax(1)
        self.layers[layer] = torch.maximum(self.layers[layer], seen) if layer in self.layers else seen

    def of_images(self, row: int, visual: torch.Tensor) -> torch.Tensor:
        """Return D, [L, I]: the values of the image tokens of a row, float64."""
        stacked = torch.stack([self.layers[layer][row] for layer in sorted(self.layers)])
        return stacked[:, visual].double()


@contextmanager
def profiling(text: torch.Tensor, heads: Heads) -> Iterator[Profile]:
    """Record the attention of everything that runs inside; ``text`` as in :class:`Profile`."""
    profile = Profile(text, heads)
    token = WATCH.set(profile)
    try:
        yield profile
    finally:
        WATCH.reset(token)


def entropy(d_LI: torch.Tensor) -> torch.Tensor:
    """Return the entropy of each image token's attention over the layers (Eq. 4), [I]; log L if nothing attends to it.

    0 means one layer, log L means all layers alike.
    """
    total = d_LI.sum(0)
    p_LI = d_LI / total.clamp_min(torch.finfo(d_LI.dtype).tiny)
    spread = -torch.special.xlogy(p_LI, p_LI).sum(0)
    return torch.where(total > 0, spread, math.log(len(d_LI)))


def dropped(d_LI: torch.Tensor, rounding: Rounding = "down") -> torch.Tensor:
    """Return which image tokens text stops reading, bool[I] (Eq. 5).

    For each ratio r = 0.1, ..., 0.9, the r I tokens of highest entropy are dropped, and S(r) is the entropy of the mean
    attention over the tokens kept. The ratio whose S differs most from that of all tokens is taken; the smaller of two
    equals.
    """
    mean = d_LI.mean(0)
    count = len(mean)
    order = torch.argsort(entropy(d_LI), descending=True, stable=True)
    whole, best, number = _spread(mean), -1.0, 0
    for step in range(1, STEPS):
        drop = step * count // STEPS if rounding == "down" else -(-step * count // STEPS)
        change = abs(_spread(mean[order[drop:]]) - whole)
        if drop < count and change > best + 1e-12:
            best, number = change, drop
    result = torch.zeros(count, dtype=torch.bool, device=mean.device)
    result[order[:number]] = True
    return result


def cut(prefill_BNPP: torch.Tensor, text_BP: torch.Tensor, dropped_BP: torch.Tensor) -> torch.Tensor:
    """Return the mask of a prompt without the reads of dropped tokens by text, bool[B, N, P, P]."""
    return prefill_BNPP & ~(text_BP[:, None, :, None] & dropped_BP[:, None, None, :])


def _reduced(weights_BHTK: torch.Tensor, heads: Heads) -> torch.Tensor:
    return weights_BHTK.mean(1) if heads == "mean" else weights_BHTK.amax(1)


def _spread(mean: torch.Tensor) -> float:
    """Return the entropy of what is kept, normalised to 1."""
    total = mean.sum()
    q = mean / total if total > 0 else mean
    return float(-torch.special.xlogy(q, q).sum())
