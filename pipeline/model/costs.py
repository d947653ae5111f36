"""Parameters and FLOPs of a model, counted without building it.

FLOPs are those of matrix products in a forward pass: two per weight and token, and four per head element and allowed
(query, key) pair for attention. Norms, activations and embedding look-ups are left out, as is usual for MFU.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from pipeline.model.spec import ModelSpec


@dataclass(frozen=True)
class Costs:
    """What a model holds, and what a forward pass costs, unit by unit."""

    vision_params: int
    connector_params: int
    embed_params: int
    layer_params: tuple[int, ...]
    """Of each decoder layer."""
    head_params: int
    """Final norm and head; of a tied head only the norm."""
    vision_frozen: bool
    vision_flops: float
    """Of the tower, per image."""
    connector_flops: float
    """Per image."""
    layer_flops: tuple[float, ...]
    """Of each decoder layer, per token, without attention scores."""
    pair_flops: float
    """Of one decoder layer's attention scores, per allowed (query, key) pair."""
    head_flops: float
    """Per supervised token: no other row reaches the head."""

    @classmethod
    def of(cls, spec: ModelSpec) -> Costs:
        """Count a model on the meta device."""
        llm, tower, connector = spec.meta_llm(), spec.meta_vision(), spec.meta_connector()
        layers = list(llm.model.layers)
        head = _params(llm.lm_head)
        heads, head_dim = int(spec.llm.num_attention_heads), _head_dim(spec)
        return cls(
            vision_params=_params(tower),
            connector_params=_params(connector),
            embed_params=_params(llm.model.embed_tokens),
            layer_params=tuple(_params(layer) for layer in layers),
            head_params=_params(llm.model.norm) + (0 if spec.tied else head),
            vision_frozen=spec.vision_frozen,
            vision_flops=_tower_flops(spec, tower),
            connector_flops=_connector_flops(spec, connector),
            layer_flops=tuple(2.0 * _matrices(layer) for layer in layers),
            pair_flops=4.0 * heads * head_dim,
            head_flops=2.0 * spec.width * spec.vocab_rows,
        )

    @property
    def total_params(self) -> int:
        """All parameters; a tied head is counted once."""
        return self.vision_params + self.connector_params + self.llm_params

    @property
    def llm_params(self) -> int:
        """Parameters of the language model."""
        return self.embed_params + sum(self.layer_params) + self.head_params

    @property
    def trained_params(self) -> int:
        """Parameters the optimizer updates."""
        return self.total_params - (self.vision_params if self.vision_frozen else 0)

    def forward_flops(self, *, tokens: int, images: int, targets: int, pairs: int) -> float:
        """FLOPs of a forward pass over so many tokens, images, supervised tokens and allowed attention pairs."""
        return self._trained_flops(tokens, images, targets, pairs) + self._frozen_flops(images)

    def training_flops(self, *, tokens: int, images: int, targets: int, pairs: int) -> float:
        """FLOPs of forward and backward; recomputation is not counted, and a frozen tower only runs forward."""
        return 3 * self._trained_flops(tokens, images, targets, pairs) + self._frozen_flops(images)

    def partition_costs(self, *, tokens: int, images: int, targets: int, pairs: int) -> list[float]:
        """Return training FLOPs of what precedes the decoder layers, of each layer, and of what follows them."""
        tower = (1 if self.vision_frozen else 3) * self.vision_flops * images
        before = tower + 3 * self.connector_flops * images
        layers = [3 * (flops * tokens + self.pair_flops * pairs) for flops in self.layer_flops]
        return [before, *layers, 3 * self.head_flops * targets]

    def _frozen_flops(self, images: int) -> float:
        return self.vision_flops * images if self.vision_frozen else 0.0

    def _trained_flops(self, tokens: int, images: int, targets: int, pairs: int) -> float:
        per_image = self.connector_flops + (0.0 if self.vision_frozen else self.vision_flops)
        attention = self.pair_flops * len(self.layer_flops) * pairs
        return sum(self.layer_flops) * tokens + attention + per_image * images + self.head_flops * targets


def _params(module: nn.Module) -> int:
    return sum(param.numel() for param in module.parameters())


def _matrices(module: nn.Module) -> int:
    """Count weights used in matrix products: those of two and more dimensions, look-up tables left out."""
    tables = {id(child.weight) for child in module.modules() if isinstance(child, nn.Embedding)}
    return sum(param.numel() for param in module.parameters() if param.dim() > 1 and id(param) not in tables)


def _head_dim(spec: ModelSpec) -> int:
    return int(getattr(spec.llm, "head_dim", None) or spec.width // spec.llm.num_attention_heads)


def _tower_flops(spec: ModelSpec, tower: nn.Module) -> float:
    patches, config = spec.patches, spec.vision
    attention = 4.0 * int(config.hidden_size) * patches**2 * int(config.num_hidden_layers)
    return 2.0 * _matrices(tower) * patches + attention


def _connector_flops(spec: ModelSpec, connector: nn.Module) -> float:
    patches, config = spec.patches, spec.connector
    if config.kind == "mlp":
        return 2.0 * _matrices(connector) * patches
    # Keys and values are made of patches and latents; everything else acts on the latents alone.
    inner = config.heads * config.head_dim
    keys_values = 2.0 * config.depth * 2 * inner * int(spec.vision.hidden_size) * patches
    scores = 4.0 * config.depth * inner * config.latents * (patches + config.latents)
    learned = config.latents * int(spec.vision.hidden_size)
    return keys_values + scores + 2.0 * (_matrices(connector) - learned) * config.latents
