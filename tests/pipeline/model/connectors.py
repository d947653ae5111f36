"""Small connectors of every kind."""

from __future__ import annotations

from typing import Any

TINY: dict[str, dict[str, Any]] = {
    "perceiver": {"latents": 3, "depth": 1, "heads": 2, "head_dim": 4},
    "mlp": {},
    "cabstractor": {"queries": 4, "hidden": 8, "depth": 1},
    "dabstractor": {"queries": 4, "hidden": 8, "depth": 1, "heads": 2, "points": 2, "ff": 8},
    "pixel_shuffle": {},
    "attention_pool": {"heads": 2, "hidden": 8},
    "average_pool": {"window": 2},
    "sva": {"side": 2, "hidden": 8, "depth": 1, "heads": 2},
}
"""Options of a small connector of each kind."""
SECOND: dict[str, Any] = {
    "model_type": "clip_vision_model",
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 48,
    "patch_size": 8,
}
"""Config of a second tower."""
