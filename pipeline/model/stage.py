"""A pipeline stage: some decoder layers, plus the vision tower, connector and embedding, or the norm and head.

T packed tokens of one micro-batch, D hidden width. Parameter names are global and the same in every split:
``vision.*``, ``connector.*``, ``model.embed_tokens.weight``, ``model.layers.<i>.*``, ``model.norm.weight``,
``lm_head.weight``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from data_prep.media.spec import NativeImages
from pipeline.attention import register
from pipeline.config.schema import is_recomputed
from pipeline.model.inputs import IGNORE, StageInputs
from pipeline.model.lora import add_adapters
from pipeline.model.loss import LMHead
from pipeline.model.patches import PatchLayout
from pipeline.model.spec import ModelSpec


class Decoder(nn.Module):
    """The stage's part of the language model, under the parameter names of the whole model."""

    embed_tokens: nn.Module
    norm: nn.Module

    def __init__(self, layers: dict[int, nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({str(index): layer for index, layer in layers.items()})


class Stage(nn.Module):
    """Decoder layers; the first stage adds vision tower, connector and embedding, the last one norm and head.

    Modules are the family's own, on the meta device until `pipeline.model.build` fills them. The forward pass uses a
    parameter only inside the module that owns it, as ZeRO-3 requires.
    """

    def __init__(
        self,
        spec: ModelSpec,
        llm: PreTrainedModel,
        towers: Sequence[PreTrainedModel],
        *,
        layers: Sequence[int],
        first: bool,
        last: bool,
        gradient_checkpointing: int = 0,
    ) -> None:
        """Lay out a stage.

        Args:
            spec: the model.
            llm: the whole language model on the meta device; the stage takes its modules.
            towers: the vision towers on the meta device, as the spec has them; none unless ``first``.
            layers: global indices of its decoder layers, ascending; one run of layers, or several virtual stages.
            first: holds vision tower, connector and embedding.
            last: holds the final norm, the head and the loss.
            gradient_checkpointing: k: recompute every k-th decoder layer of the model in the backward pass; 0 = none.
        """
        super().__init__()
        self.spec, self.first, self.last = spec, first, last
        self.gradient_checkpointing = gradient_checkpointing
        llm.config._attn_implementation = register()
        parts = spec.llm_family.parts(llm)
        self.model = Decoder({index: parts.layers[index] for index in layers})
        if first:
            self.vision = towers[0]
            if len(towers) > 1:
                self.extra_vision = nn.ModuleList(towers[1:])
            self.connector = spec.meta_connector()
            self.model.embed_tokens = parts.embed_tokens
        if last:
            self.model.norm = parts.norm
            with torch.device("meta"):
                self.lm_head = _head(spec)
        if spec.lora is not None:
            add_adapters(self, spec.lora)
        # Kept in a tuple, outside the module tree: casting the stage to bf16 must not round the rotary frequencies.
        self._rotary = (spec.llm_family.rotary(llm, spec.llm),)

    def units(self) -> Iterator[tuple[str, nn.Module]]:
        """Yield (global name, module) of each module that is built, filled and sharded as one unit."""
        if self.first:
            for name, tower in self.spec.towers.items():
                units = tower.family.units(self.get_submodule(name))
                yield from ((f"{name}.{own}", unit) for own, unit in units)
            yield "connector", self.connector
            yield "model.embed_tokens", self.model.embed_tokens
        yield from ((f"model.layers.{index}", layer) for index, layer in self.model.layers.items())
        if self.last:
            yield "model.norm", self.model.norm
            if not self.shares_head:
                yield "lm_head", self.lm_head

    def blocks(self) -> Iterator[nn.Module]:
        """Yield the vision tower's encoder blocks and the decoder layers."""
        if self.first:
            for name, tower in self.spec.towers.items():
                yield from tower.family.blocks(self.get_submodule(name))
        yield from self.model.layers.values()

    @property
    def rotary(self) -> nn.Module:
        """The family's rotary embedding, which has no parameters."""
        rotary: nn.Module = self._rotary[0]
        return rotary

    @property
    def shares_head(self) -> bool:
        """Whether the head's weight is this stage's embedding weight."""
        return self.spec.tied and self.first and self.last

    @property
    def tied_copy(self) -> nn.Parameter | None:
        """This stage's copy of the trained weight shared by embedding and head on different stages; else None."""
        if not self.spec.tied or self.first == self.last:
            return None
        weight = (self.model.embed_tokens if self.first else self.lm_head).get_parameter("weight")
        return weight if weight.requires_grad else None

    def trains(self, tower: str) -> bool:
        """Whether anything in a vision tower of this name is trained; first stage only."""
        return any(param.requires_grad for param in self.get_submodule(tower).parameters())

    def train(self, mode: bool = True) -> Stage:
        """Set training mode; a frozen tower stays in evaluation mode."""
        super().train(mode)
        for name in self.spec.towers if self.first else ():
            self.get_submodule(name).train(mode and self.trains(name))
        return self

    def forward(self, hidden: torch.Tensor | None, inputs: StageInputs, layers: range | None = None) -> torch.Tensor:
        """Run one micro-batch through the stage, or through one of its virtual stages.

        Args:
            hidden: [1, T, D] from the previous virtual stage; None for the one with the model's first layer.
            inputs: the micro-batch, on the stage's device.
            layers: decoder layers of the virtual stage; None = all layers of the stage.

        Returns:
            Hidden states [1, T, D] in the stage's dtype; after the model's last layer the *sum* of the losses of the
            supervised tokens, a scalar of at least fp32, or with ``inputs.per_token`` the scores of each, [n, 2].
        """
        hidden_1TD = self.decode(self.embed(inputs) if hidden is None else hidden, inputs, layers)
        if not self.last or (layers is not None and layers.stop < self.spec.layers):
            return hidden_1TD
        supervised = inputs.supervised
        if supervised is None:
            supervised = (inputs.labels != IGNORE).nonzero().squeeze(1)
        hidden_ND = self.model.norm(hidden_1TD[0].index_select(0, supervised))
        labels_N = inputs.labels.index_select(0, supervised)
        return self.lm_head(hidden_ND, labels_N, per_token=inputs.per_token)  # type: ignore[no-any-return]

    def embed(self, inputs: StageInputs) -> torch.Tensor:
        """Return the token embeddings [1, T, D] with image tokens inserted; first stage only."""
        embeds_1TD: torch.Tensor = self.model.embed_tokens(inputs.input_ids[None])
        images_MD = self.image_tokens(inputs.pixels, embeds_1TD, inputs.extra_pixels, inputs.layout)
        if inputs.pixels is None:
            assert not len(inputs.image_positions), "image positions without pixels"
            return embeds_1TD + images_MD.sum() * 0.0
        return embeds_1TD[0].index_copy(0, inputs.image_positions, images_MD)[None]

    def image_tokens(
        self,
        pixels: torch.Tensor | None,
        like: torch.Tensor,
        extra: Sequence[torch.Tensor] = (),
        layout: PatchLayout | None = None,
    ) -> torch.Tensor:
        """Return image tokens [views * image_tokens, D] in the dtype of ``like``; each tower sees all views at once.

        Without images, a blank image is processed instead: ZeRO-3 hangs when a rank skips a module.

        Args:
            pixels: [views, 3, S, S] of the first tower: uint8, or normalised floats.
            like: a tensor of the stage's dtype on its device.
            extra: of the further towers.
            layout: of the images whose patches the pixels are, for models of images of their own sizes.
        """
        if isinstance(image := self.spec.media_spec.image, NativeImages):
            return self._native_tokens(pixels, like, layout, image)
        sides = [tower.preprocess.size_px for tower in self.spec.towers.values()]
        blank = (torch.zeros(1, 3, side, side, device=like.device) for side in sides)
        given = blank if pixels is None else (pixels, *extra)
        features, layers = [], self.spec.connector.tower_layers
        for (name, tower), own in zip(self.spec.towers.items(), given, strict=True):
            module = self.get_submodule(name)
            own = (tower.preprocess.normalize(own) if own.dtype == torch.uint8 else own).to(like.dtype)
            with torch.set_grad_enabled(torch.is_grad_enabled() and self.trains(name)):
                features.append(tower.family.features(module, tower.config, own, layers))
        return self.connector(*features).flatten(0, 1)  # type: ignore[no-any-return]

    def _native_tokens(
        self, pixels: torch.Tensor | None, like: torch.Tensor, layout: PatchLayout | None, image: NativeImages
    ) -> torch.Tensor:
        """Return the tokens of images of their own sizes [M, D]; without images, that of a blank image."""
        merge, side = image.merge, image.patch_px
        if pixels is None or layout is None:
            pixels = torch.zeros(merge**2, 3, side, side, device=like.device)
            layout = PatchLayout.of([(merge, merge)], merge).to(like.device)
        tower = self.spec.towers["vision"]
        own = (tower.preprocess.normalize(pixels) if pixels.dtype == torch.uint8 else pixels).to(like.dtype)
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.trains("vision")):
            features_NC = tower.family.packed(self.vision, own, layout)
        return self.connector(layout.blocks(features_NC)).flatten(0, 1)  # type: ignore[no-any-return]

    def decode(self, hidden_1TD: torch.Tensor, inputs: StageInputs, layers: range | None = None) -> torch.Tensor:
        """Run decoder layers, by default all of the stage's: [1, T, D] -> [1, T, D]."""
        run = [(int(name), layer) for name, layer in self.model.layers.items() if not layers or int(name) in layers]
        scale = self.spec.llm_family.input_scale(self.spec.llm)
        if run[0][0] == 0 and scale is not None:
            hidden_1TD = hidden_1TD * scale
        positions_1T = inputs.position_ids[None]
        rotary = self._rotary_embeddings(hidden_1TD, positions_1T)
        for index, layer in run:
            options = {
                "attention_mask": inputs.plan.at(index),
                "position_ids": positions_1T,
                "position_embeddings": rotary[self._rotary_kind(index)],
            }
            if is_recomputed(index, self.gradient_checkpointing) and torch.is_grad_enabled():
                hidden_1TD = checkpoint(layer, hidden_1TD, use_reentrant=False, preserve_rng_state=False, **options)
            else:
                hidden_1TD = layer(hidden_1TD, **options)
        return hidden_1TD

    def _rotary_kind(self, index: int) -> str:
        return self.spec.llm_family.rotary_kind(self.spec.llm, index)

    def _rotary_embeddings(self, hidden_1TD: torch.Tensor, positions_1T: torch.Tensor) -> dict[str, Any]:
        """Return (cos, sin) by kind of layer; families with a single rotary embedding have the kind ""."""
        rotary, family = self.rotary.to(hidden_1TD.device), self.spec.llm_family
        kinds = {self._rotary_kind(int(index)) for index in self.model.layers}
        return {kind: family.position_embeddings(rotary, hidden_1TD, positions_1T, kind) for kind in kinds}


def _head(spec: ModelSpec) -> LMHead:
    return LMHead(
        spec.width,
        spec.vocab_rows,
        scale=spec.llm_family.logit_scale(spec.llm),
        softcap=spec.llm_family.logit_softcap(spec.llm),
    )
