"""The model of a recipe, resolved and checked once; everything that builds or loads a model starts here."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from data_prep.common.errors import one_line
from data_prep.media.spec import AnyresImages, Extent, Header, MediaSpec, NativeImages
from pipeline.attention.gate import GateShape, attach_gate, gate_shape
from pipeline.config.schema import ConfigError, GateConfig, LoraConfig, ModelConfig
from pipeline.model import lora as lora_layers
from pipeline.model.connectors import CONNECTORS, Connector, Features, Grid, read_connector, read_saved_connector
from pipeline.model.families.configs import config_from_dict, llm_config
from pipeline.model.families.llm import LlmFamily
from pipeline.model.families.registry import LLM_FAMILIES, VISION_FAMILIES
from pipeline.model.families.vision import VisionFamily
from pipeline.model.hub import local_sources
from pipeline.model.preprocess import Preprocess
from pipeline.model.starting_point import StartingPoint
from pipeline.model.towers import Tower, config_errors


@dataclass(frozen=True)
class ModelSpec:
    """A model by the configs of its vision tower, connector and language model."""

    llm: PreTrainedConfig
    vision: PreTrainedConfig
    connector: Connector
    preprocess: Preprocess
    image_tokens: int
    """Tokens of one image, or of one tile (anyres), after the connector."""
    vision_frozen: bool = True
    """The vision tower is not trained."""
    llm_source: str = ""
    """Folder with the language model's weights; empty = from scratch."""
    vision_source: str = ""
    """Folder with the vision tower's weights; empty = from scratch."""
    whole_tower: bool = False
    """The vision tower keeps parts whose output is unused (`Tower.whole`)."""
    extra_towers: tuple[Tower, ...] = ()
    """Further vision towers, for connectors that read several."""
    lora: LoraConfig | None = None
    """Adapters, with the global names of all layers that have one."""
    gate: GateConfig = field(default_factory=GateConfig)
    """Bias of query-key pairs in every decoder layer."""
    media: MediaSpec | None = None
    """How images become tokens; None: each is one view."""
    start: StartingPoint | None = None
    """The vision-language model that all parts come from."""

    @classmethod
    def resolve(
        cls, config: ModelConfig, *, vocab_size: int, image_tokens: int | None, media: MediaSpec | None = None
    ) -> ModelSpec:
        """Check a recipe's model section against the packs it will be trained on.

        Args:
            config: the recipe's ``model`` section.
            vocab_size: embedding rows that the packs' token ids need.
            image_tokens: tokens of one image, or of one tile, in the packs; None = as many as the connector makes.
            media: how images become tokens in the packs; None = each is one view.

        Raises:
            ConfigError: naming the key and the fix.
        """
        config = local_sources(config)
        start = StartingPoint.read(config) if config.source else None
        vision = Tower.resolve(config.vision, "model.vision", start)
        extra = [Tower.resolve(own, f"model.extra_vision.{place}") for place, own in enumerate(config.extra_vision)]
        spec = cls(
            llm=llm_config(
                config.llm, vocab_size=vocab_size, base=None if start is None else start.family.text(start.config)
            ),
            vision=vision.config,
            connector=read_connector(config.connector if start is None else start.connector),
            preprocess=vision.preprocess,
            image_tokens=image_tokens or 0,
            vision_frozen=config.vision.frozen,
            llm_source=config.llm.source,
            vision_source=vision.source,
            extra_towers=tuple(extra),
            gate=config.gate,
            media=media,
            start=start,
            whole_tower=vision.whole,
        )
        spec._check_gates(config)
        spec._check_media()
        spec._check_connector()
        spec = replace(spec, lora=lora_layers.resolve(config.lora, spec._layers()))
        if image_tokens is None:
            return replace(spec, image_tokens=spec.connector_tokens)
        spec._check_image_tokens()
        return spec

    def _check_connector(self) -> None:
        if self.extra_towers and not self.connector.several_towers:
            several = ", ".join(kind for kind, each in CONNECTORS.items() if each.several_towers)
            raise ConfigError(
                f"model.extra_vision needs a connector that reads several towers, but model.connector.kind is "
                f"{self.connector.kind}: remove it, or use {several}"
            )
        self._check_tower_layers(self.connector.tower_layers)
        self.connector.check(self.features)

    def _check_tower_layers(self, layers: tuple[int, ...]) -> None:
        blocks = int(self.vision.num_hidden_layers)
        if wrong := [index for index in layers if not -blocks <= index < blocks]:
            raise ConfigError(f"model.connector.layers: the tower has {blocks} blocks, but no block {wrong[0]}: fix it")

    @cached_property
    def unread(self) -> tuple[str, ...]:
        """Global names of the units of the tower that nothing reads; they stay as they are."""
        layers = self.connector.tower_layers
        tower = self.towers["vision"]
        return tuple(f"vision.{name}" for name in tower.family.after(tower.meta(), layers)) if layers else ()

    def _layers(self) -> Iterator[tuple[str, nn.Module]]:
        """Yield (global name, module) of every module of the towers and of the decoder layers."""
        for name, tower in self.towers.items():
            yield from tower.meta().named_modules(prefix=name)
        yield from self.llm_family.parts(self.meta_llm()).layers.named_modules(prefix="model.layers")

    def _check_image_tokens(self) -> None:
        made = self.connector_tokens
        if made != self.image_tokens:
            rows, columns = self.grid
            raise ConfigError(
                f"model.connector.kind={self.connector.kind} makes {made} tokens of {rows} x {columns} patches, but an "
                f"image takes {self.image_tokens} tokens in the packs: {self.connector.fix_for(self.image_tokens)}, "
                f"or rebuild the packs with image_tokens {made}"
            )

    def _check_media(self) -> None:
        """Refuse images that the tower does not read as the packs count them. Raises ConfigError."""
        image = self.media_spec.image
        if isinstance(image, AnyresImages) and image.tile_px != self.preprocess.size_px:
            raise ConfigError(
                f"the tower reads images of {self.preprocess.size_px} pixels, but a tile has {image.tile_px} in the "
                f"packs: set model.vision.size_px to {image.tile_px}, or rebuild the packs with media.image.tile_px "
                f"{self.preprocess.size_px}"
            )
        if isinstance(image, NativeImages):
            self._check_native(image)

    def _check_native(self, image: NativeImages) -> None:
        """Refuse a tower or connector that cannot read images of their own sizes. Raises ConfigError."""
        if not self.vision_family.native:
            raise ConfigError(
                f"the packs hold images of their own sizes (media.image.kind=native), which a tower of type "
                f"{self.vision.model_type} does not read: use a SigLIP 2 NaFlex tower, or rebuild the packs"
            )
        if int(self.vision.patch_size) != image.patch_px:
            raise ConfigError(
                f"the tower reads patches of {self.vision.patch_size} pixels, the packs have {image.patch_px}: rebuild "
                f"them with media.image.patch_px {self.vision.patch_size}"
            )
        if self.extra_towers or self.connector.tower_layers:
            raise ConfigError(
                "images of their own sizes (media.image.kind=native) need one tower, read at its end: remove "
                "model.extra_vision and model.connector.layers"
            )
        block = image.merge, image.merge
        if self.connector.grid(block) != (1, 1):
            raise ConfigError(
                f"model.connector.kind={self.connector.kind} does not make one token of {image.merge} x {image.merge} "
                "patches, as the packs count them (media.image.merge): use mlp for merge 1, or pixel_shuffle with "
                "factor, or attention_pool with window, equal to merge"
            )

    @property
    def media_spec(self) -> MediaSpec:
        """How media become tokens; equal to that of the packs the model is trained on."""
        return self.media or MediaSpec.fixed(max(1, self.image_tokens))

    def extents(self, sizes: Iterable[tuple[int, int]]) -> list[Extent]:
        """Return the tokens of images of these (width, height) in pixels."""
        return [self.media_spec.image.extent(Header(*size)) for size in sizes]

    def views(self, media_tokens: int) -> float:
        """Return how many images of the tower's own size make as many tokens: the unit of its work."""
        return media_tokens / self.connector_tokens

    def check_segments(self, longest: int) -> None:
        """Check that the longest packed sample, of ``longest`` tokens, fits the model's positions.

        Raises ConfigError when it does not.
        """
        limit = self.longest_segment
        if limit is not None and longest > limit:
            raise ConfigError(
                f"the packs hold a sample of {longest} tokens, but this {self.llm.model_type} supports {limit} "
                "(max_position_embeddings, or a longrope model's short regime): rebuild the packs with shorter samples"
            )

    @cached_property
    def longest_segment(self) -> int | None:
        """Longest sample in tokens; None: any."""
        return self.llm_family.longest_segment(self.llm)

    @property
    def llm_family(self) -> LlmFamily:
        """All that is special about the language model's family."""
        return LLM_FAMILIES[self.llm.model_type]

    @property
    def vision_family(self) -> VisionFamily:
        """All that is special about the tower's family."""
        return VISION_FAMILIES[self.vision.model_type]

    @property
    def width(self) -> int:
        """Hidden width of the language model."""
        return int(self.llm.hidden_size)

    @property
    def head_size(self) -> int:
        """Width of one attention head of the language model."""
        return self.llm_family.head_size(self.llm)

    @property
    def layers(self) -> int:
        """Number of decoder layers."""
        return int(self.llm.num_hidden_layers)

    @property
    def vocab_rows(self) -> int:
        """Rows of the embedding and of the head."""
        return int(self.llm.vocab_size)

    @property
    def tied(self) -> bool:
        """Whether the embedding and the head are one weight."""
        return bool(self.llm.tie_word_embeddings)

    @property
    def towers(self) -> Mapping[str, Tower]:
        """All vision towers, by the name under which a stage holds them."""
        first = Tower(self.vision, self.preprocess, self.vision_source, self.whole_tower)
        return {"vision": first} | {f"extra_vision.{place}": tower for place, tower in enumerate(self.extra_towers)}

    @property
    def grid(self) -> Grid:
        """Patches of the first tower as (rows, columns)."""
        return self.features.grid

    @property
    def patches(self) -> int:
        """Patch features of one image in the first tower."""
        return self.features.patches

    @property
    def features(self) -> Features:
        """Width and grid of the patch features of the first tower, and of the others.

        Where images have their own sizes, the grid is that of the patches of one token.
        """
        first, *others = (tower.features for tower in self.towers.values())
        width = first.width * max(1, len(self.connector.tower_layers))
        image = self.media_spec.image
        grid = (image.merge, image.merge) if isinstance(image, NativeImages) else first.grid
        return first._replace(width=width, grid=grid, others=tuple(others))

    @property
    def connector_tokens(self) -> int:
        """Tokens the connector produces for one image; equals ``image_tokens`` in a checked spec."""
        return self.connector.tokens(self.grid)

    @property
    def mask_grid(self) -> Grid | None:
        """Grid of the image tokens for mask policies that need one; None where an image has none, or its own."""
        return self.connector.grid(self.grid) if self.media is None else None

    def meta_llm(self) -> PreTrainedModel:
        """Return the whole language model on the meta device. Raises ConfigError when its config cannot be built."""
        with torch.device("meta"), config_errors("model.llm"):
            llm = self.llm_family.build(self.llm)
            if (shape := self._gate_shape()) is not None:
                for layer in self.llm_family.parts(llm).layers:
                    attach_gate(layer.get_submodule("self_attn"), shape, self.llm_family.query_key)
        return llm

    def _check_gates(self, config: ModelConfig) -> None:
        """Refuse gates that cannot be trained, or that the decoder cannot have. Raises UserError."""
        if self.gate.kind != "none" and config.lora.rank:
            raise ConfigError(
                "model.gate and model.lora cannot be combined: LoRA trains adapters only, so gates would stay at zero: "
                "set model.gate.kind to none, or model.lora.rank to 0"
            )
        self.meta_llm()

    def _gate_shape(self) -> GateShape | None:
        """Return the sizes of each layer's gate, if the model has gates. Raises UserError where it cannot have them."""
        if self.gate.kind == "none":
            return None
        if self.llm_family.query_key is None:
            raise ConfigError(
                f"model.gate: {self.llm.model_type} has no one place of its queries and keys before the rotary "
                "embedding: set model.gate.kind to none, or use another decoder family"
            )
        heads = int(self.llm.num_attention_heads)
        sizes = {
            "heads": heads,
            "kv_heads": int(getattr(self.llm, "num_key_value_heads", None) or heads),
            "head_size": self.head_size,
        }
        return gate_shape(sizes, rank=self.gate.rank, heads=self.gate.heads, per=self.gate.per)

    def meta_connector(self) -> nn.Module:
        """Return the connector on the meta device."""
        with torch.device("meta"):
            return self.connector.build(self.features, self.width)

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON-ready description from which the model can be rebuilt; source folders are omitted."""
        return {
            "llm": json.loads(self.llm.to_json_string(use_diff=False)),
            **self.towers["vision"].to_dict(),
            "connector": self.connector.to_dict(),
            "image_tokens": self.image_tokens,
            "vision_frozen": self.vision_frozen,
            "extra_towers": {str(place): tower.to_dict() for place, tower in enumerate(self.extra_towers)},
            "lora": self.lora.model_dump() if self.lora else None,
            "gate": self.gate.model_dump(),
            **({} if self.media is None else {"media": self.media.model_dump(mode="json")}),
            **({} if self.start is None else {"start": self.start.to_dict()}),
        }

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> ModelSpec:
        """Rebuild a spec from :meth:`to_dict`. Raises ConfigError for a damaged or refused description."""
        try:
            vision = Tower.from_dict(raw)
            spec = cls(
                llm=config_from_dict(raw["llm"], LLM_FAMILIES),
                vision=vision.config,
                connector=read_saved_connector(raw["connector"]),
                preprocess=vision.preprocess,
                image_tokens=int(raw["image_tokens"]),
                vision_frozen=bool(raw["vision_frozen"]),
                whole_tower=vision.whole,
                start=StartingPoint.from_dict(raw["start"]) if raw.get("start") else None,
                extra_towers=tuple(Tower.from_dict(own) for own in raw.get("extra_towers", {}).values()),
                lora=LoraConfig.model_validate(raw["lora"]) if raw.get("lora") else None,
                gate=GateConfig.model_validate(raw.get("gate", {})),  # older descriptions have none
                media=MediaSpec.model_validate(raw["media"]) if raw.get("media") else None,
            )
            spec._check_media()
            spec._check_connector()
            if spec.connector_tokens != spec.image_tokens:
                raise ValueError(f"image_tokens {spec.image_tokens}, but its connector gives {spec.connector_tokens}")
            return spec
        except ConfigError:
            raise
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise ConfigError(
                f"the saved model description is damaged ({one_line(error)}): export or save the model again"
            ) from error
