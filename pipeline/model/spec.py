"""The model of a recipe, resolved and checked once; everything that builds or loads a model starts here."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from data_prep.common.errors import one_line
from pipeline.config.schema import ConfigError, ModelConfig
from pipeline.model.connectors import Connector, Features, Grid, read_connector, read_saved_connector
from pipeline.model.families.configs import config_from_dict, llm_config, vision_config
from pipeline.model.families.llm import LlmFamily
from pipeline.model.families.registry import LLM_FAMILIES, VISION_FAMILIES
from pipeline.model.families.vision import VisionFamily
from pipeline.model.limits import read_bounded
from pipeline.model.preprocess import Preprocess


@dataclass(frozen=True)
class ModelSpec:
    """A model by the configs of its vision tower, connector and language model."""

    llm: PreTrainedConfig
    vision: PreTrainedConfig
    connector: Connector
    preprocess: Preprocess
    image_tokens: int
    """Tokens of one image after the connector."""
    vision_frozen: bool = True
    """The vision tower is not trained."""
    llm_source: str = ""
    """Folder with the language model's weights; empty = from scratch."""
    vision_source: str = ""
    """Folder with the vision tower's weights; empty = from scratch."""

    @classmethod
    def resolve(cls, config: ModelConfig, *, vocab_size: int, image_tokens: int | None) -> ModelSpec:
        """Check a recipe's model section against the packs it will be trained on.

        Args:
            config: the recipe's ``model`` section.
            vocab_size: embedding rows that the packs' token ids need.
            image_tokens: tokens of one image in the packs; None = as many as the connector makes.

        Raises:
            ConfigError: naming the key and the fix.
        """
        spec = cls(
            llm=llm_config(config.llm, vocab_size=vocab_size),
            vision=(vision := vision_config(config.vision)),
            connector=read_connector(config.connector),
            preprocess=_preprocess(config.vision.source, vision),
            image_tokens=image_tokens or 0,
            vision_frozen=config.vision.frozen,
            llm_source=config.llm.source,
            vision_source=config.vision.source,
        )
        spec.connector.check(spec.features)
        if image_tokens is None:
            return replace(spec, image_tokens=spec.connector_tokens)
        spec._check_image_tokens()
        return spec

    def _check_image_tokens(self) -> None:
        made = self.connector_tokens
        if made != self.image_tokens:
            rows, columns = self.grid
            raise ConfigError(
                f"model.connector.kind={self.connector.kind} makes {made} tokens of {rows} x {columns} patches, but an "
                f"image takes {self.image_tokens} tokens in the packs: {self.connector.fix_for(self.image_tokens)}, "
                f"or rebuild the packs with image_tokens {made}"
            )

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
        return int(getattr(self.llm, "head_dim", None) or self.llm.hidden_size // self.llm.num_attention_heads)

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
    def grid(self) -> Grid:
        """Patches of the tower as (rows, columns)."""
        return self.vision_family.grid(self.vision, self.preprocess.size_px)

    @property
    def patches(self) -> int:
        """Patch features of one image."""
        return self.features.patches

    @property
    def features(self) -> Features:
        """Width and grid of the tower's patch features."""
        return Features(int(self.vision.hidden_size), self.grid)

    @property
    def connector_tokens(self) -> int:
        """Tokens the connector produces for one image; equals ``image_tokens`` in a checked spec."""
        return self.connector.tokens(self.grid)

    @property
    def mask_grid(self) -> Grid | None:
        """Grid of the image tokens for mask policies that need one; None when the connector keeps none."""
        return self.connector.grid(self.grid)

    def meta_llm(self) -> PreTrainedModel:
        """Return the whole language model on the meta device. Raises ConfigError when its config cannot be built."""
        with torch.device("meta"), _config_errors("model.llm"):
            return self.llm_family.build(self.llm)

    def meta_vision(self) -> PreTrainedModel:
        """Return the vision tower on the meta device, without the parts whose output is unused.

        Raises ConfigError when its config cannot be built.
        """
        with torch.device("meta"), _config_errors("model.vision"):
            return self.vision_family.build(self.vision)

    def meta_connector(self) -> nn.Module:
        """Return the connector on the meta device."""
        with torch.device("meta"):
            return self.connector.build(self.features, self.width)

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON-ready description from which the model can be rebuilt; source folders are omitted."""
        return {
            "llm": json.loads(self.llm.to_json_string(use_diff=False)),
            "vision": json.loads(self.vision.to_json_string(use_diff=False)),
            "connector": self.connector.to_dict(),
            "preprocess": self.preprocess.to_dict(),
            "image_tokens": self.image_tokens,
            "vision_frozen": self.vision_frozen,
        }

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> ModelSpec:
        """Rebuild a spec from :meth:`to_dict`. Raises ConfigError for a damaged or refused description."""
        try:
            spec = cls(
                llm=config_from_dict(raw["llm"], LLM_FAMILIES),
                vision=config_from_dict(raw["vision"], VISION_FAMILIES),
                connector=read_saved_connector(raw["connector"]),
                preprocess=Preprocess.from_dict(raw["preprocess"]),
                image_tokens=int(raw["image_tokens"]),
                vision_frozen=bool(raw["vision_frozen"]),
            )
            spec.connector.check(spec.features)
            if spec.preprocess.size_px != (side := spec.vision_family.size_px(spec.vision)):
                raise ValueError(f"preprocess.size_px {spec.preprocess.size_px}, image_size {side}")
            if spec.connector_tokens != spec.image_tokens:
                raise ValueError(f"image_tokens {spec.image_tokens}, but its connector gives {spec.connector_tokens}")
            return spec
        except ConfigError:
            raise
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise ConfigError(
                f"the saved model description is damaged ({one_line(error)}): export or save the model again"
            ) from error


@contextmanager
def _config_errors(key: str) -> Iterator[None]:
    """Report what transformers finds only while building (an unknown activation, say) as an error of the config."""
    try:
        yield
    except (KeyError, ValueError, TypeError, AttributeError, RuntimeError, ZeroDivisionError) as error:
        raise ConfigError(f"{key}: its config cannot be built ({type(error).__name__}: {one_line(error)})") from error


def _preprocess(source: str, vision: PreTrainedConfig) -> Preprocess:
    """Return mean and std from the tower's folder if it states them, else those its family was trained with."""
    path = Path(source) / "preprocessor_config.json"
    family = VISION_FAMILIES[vision.model_type]
    try:
        saved = json.loads(read_bounded(path)) if source and path.is_file() else {}
        mean = saved.get("image_mean", family.mean)
        std = saved.get("image_std", family.std)
        return Preprocess(family.size_px(vision), _channels(mean), _channels(std))
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise ConfigError(f"{path} is damaged ({one_line(error)}): copy it again, or remove it") from error


def _channels(values: Any) -> tuple[float, float, float]:
    """Return one number per channel. Raises ValueError or TypeError."""
    red, green, blue = map(float, values)
    return red, green, blue
