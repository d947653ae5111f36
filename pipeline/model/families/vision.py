"""What a family of vision towers needs beyond its transformers code: one descriptor per ``model_type``.

B images, P patches, D feature width. Parameters have the tower's own names after ``vision.``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_MAPPING

from pipeline.model.families.llm import Piece

Channels = tuple[float, float, float]


class VisionFamily:
    """A family of towers that turns square images into one feature per patch.

    The defaults fit a tower with ``embeddings`` and ``encoder.layers``. A subclass changes what differs.
    """

    mean: Channels = (0.5, 0.5, 0.5)
    """Per channel, for values in 0..1; used where the tower's folder states none."""
    std: Channels = (0.5, 0.5, 0.5)
    """Per channel, for values in 0..1."""
    resample: str = "bicubic"
    """Filter that resizes its images, see `pipeline.model.preprocess`."""
    encoder: str = "encoder.layers"
    """Path of the list of its blocks."""
    not_read = re.compile(r"$^")
    """Tensors of a folder, without prefix, that no connector needs."""

    last_norm: bool | None = None
    """Whether its features have passed a last norm that its blocks' outputs have not; None: stock LLaVA cannot hold the
    tower. See `pipeline.serving.llava_files`."""
    extra_keys: frozenset[str] = frozenset()
    """Keys that its config reads but does not declare."""

    fewest_layers = 0
    """A tower without layers is a patch embedding."""
    native: bool = False
    """Whether it reads images of their own sizes, see :meth:`packed`."""

    def __init__(self, model_type: str, *, composites: tuple[str, ...] = (), prefixes: tuple[str, ...] = ()) -> None:
        """Describe a family.

        Args:
            model_type: of its transformers config.
            composites: ``model_type`` of models that hold this tower, under the key ``vision_config``.
            prefixes: what the tower's tensors may be called within such models.
        """
        self.model_type, self.composites, self.prefixes = model_type, composites, prefixes

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.model_type!r})"

    @property
    def config_class(self) -> type[PreTrainedConfig]:
        """The family's transformers config."""
        found: type[PreTrainedConfig] = CONFIG_MAPPING[self.model_type]
        return found

    @property
    def model_class(self) -> type[PreTrainedModel]:
        """The family's transformers model."""
        found: type[PreTrainedModel] = MODEL_MAPPING[self.config_class]
        return found

    # ---- config

    def prepared(self, raw: Mapping[str, Any]) -> dict[str, Any]:
        """Return the config's keys, with those that training needs otherwise than published."""
        return dict(raw)

    def problem(self, config: PreTrainedConfig) -> str:
        """Return why images cannot be turned into patches with this config, naming the key; ``""`` if they can."""
        image, patch = config.image_size, config.patch_size
        if not isinstance(image, int) or not isinstance(patch, int):
            return "image_size and patch_size must be whole numbers (square images)"
        if image < patch:
            return f"image_size {image} is smaller than patch_size {patch}"
        return ""

    def size_px(self, config: PreTrainedConfig) -> int:
        """Side of the square images it was trained on, in pixels."""
        return int(config.image_size)

    def grid(self, config: PreTrainedConfig, size_px: int) -> tuple[int, int]:
        """Patches of an image of ``size_px`` x ``size_px`` as (rows, columns)."""
        side = size_px // int(config.patch_size)
        return side, side

    def extra_tokens(self, config: PreTrainedConfig) -> int:
        """Features before those of the patches: class token, registers."""
        return 0

    # ---- modules

    def build(self, config: PreTrainedConfig, *, whole: bool = False) -> PreTrainedModel:
        """Build the tower; called on the meta device.

        Args:
            config: of the tower.
            whole: keep parts whose output is unused, so that a starting point can be written back with all its weights.
        """
        return self.model_class(config)

    def blocks(self, tower: nn.Module) -> nn.ModuleList:
        """Return its encoder blocks."""
        found = tower.get_submodule(self.encoder)
        assert isinstance(found, nn.ModuleList)
        return found

    def units(self, tower: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        """Yield (name within the tower, module) of what is built, filled and sharded as one unit."""
        outer = self.encoder.split(".")[0]
        for name, module in tower.named_children():
            if name == outer:
                yield from ((f"{self.encoder}.{index}", block) for index, block in enumerate(self.blocks(tower)))
            else:
                yield name, module

    def after(self, tower: nn.Module, layers: Sequence[int]) -> list[str]:
        """Return the names within the tower of the units after all of these blocks, whose output nothing reads."""
        names, blocks = [name for name, _ in self.units(tower)], len(self.blocks(tower))
        return names[names.index(f"{self.encoder}.{max(index % blocks for index in layers)}") + 1 :]

    # ---- forward

    def features(
        self, tower: nn.Module, config: PreTrainedConfig, pixels_B3SS: torch.Tensor, layers: Sequence[int] = ()
    ) -> torch.Tensor:
        """Return the features of the patches [B, P, D], row by row.

        With ``layers`` they are the outputs of these blocks side by side, [B, P, layers x D]; else the tower's output.
        """
        side = pixels_B3SS.shape[-1]
        rows, columns = self.grid(config, side)
        outputs: dict[int, torch.Tensor] = {}

        def keep(index: int) -> Callable[..., None]:
            return lambda _, inputs, out: outputs.update({index: out[0] if isinstance(out, tuple) else out})

        hooks = [self.blocks(tower)[index].register_forward_hook(keep(index)) for index in layers]
        try:
            out = self.call(tower, pixels_B3SS, resized=side != self.size_px(config))
        finally:
            for hook in hooks:
                hook.remove()
        out = torch.cat([outputs[index] for index in layers], dim=-1) if layers else out
        return out[:, -rows * columns :]  # class token and registers come first

    def call(self, tower: nn.Module, pixels_B3SS: torch.Tensor, *, resized: bool) -> torch.Tensor:
        """Return all features; ``resized`` images need interpolated position embeddings (bicubic, as in DINO)."""
        options = {"interpolate_pos_encoding": True} if resized else {}
        features: torch.Tensor = tower(pixel_values=pixels_B3SS, **options).last_hidden_state
        return features

    def packed(self, tower: nn.Module, patches_N3SS: torch.Tensor, layout: Any) -> torch.Tensor:
        """Return the features of the patches of images of their own sizes, [N, D]; `native` families only."""
        raise NotImplementedError

    # ---- weights

    def pieces(self, name: str) -> Iterator[Piece]:
        """Yield where a parameter may lie in a folder, without prefix, the likeliest first."""
        yield Piece(name)

    def unread(self, key: str, config: PreTrainedConfig) -> bool:
        """Return whether a folder's tensor, without prefix, is rightly not read: text half, pooling, later blocks."""
        block = re.match(re.escape(self.encoder) + r"\.(\d+)\.", key)
        if block:
            return int(block[1]) >= int(config.num_hidden_layers)
        return bool(self.not_read.match(key))
