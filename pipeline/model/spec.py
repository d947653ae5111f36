"""The model a recipe describes, resolved and checked once; everything that builds or loads a model starts here."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING
from transformers.utils.constants import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from pipeline.config.schema import ConfigError, ConnectorConfig, ModelConfig
from pipeline.model.connector import build_connector
from pipeline.model.families import LLM_FAMILIES, VISION_FAMILIES, config_from_dict, llm_config, vision_config
from pipeline.model.preprocess import Preprocess


@dataclass(frozen=True)
class ModelSpec:
    """Vision tower, connector and language model, by their configs."""

    llm: PreTrainedConfig
    vision: PreTrainedConfig
    connector: ConnectorConfig
    preprocess: Preprocess
    image_tokens: int
    """Tokens the connector gives for one image."""
    vision_frozen: bool = True
    llm_source: str = ""
    """Folder the language model's weights come from; empty = from scratch."""
    vision_source: str = ""

    @classmethod
    def resolve(cls, config: ModelConfig, *, vocab_size: int, image_tokens: int) -> ModelSpec:
        """Check a recipe's model section against the packs it will be trained on.

        Args:
            config: the recipe's ``model`` section.
            vocab_size: embedding rows the packs' token ids need.
            image_tokens: positions one image takes in the packs.

        Raises:
            ConfigError: naming the key and the fix.
        """
        spec = cls(
            llm=llm_config(config.llm, vocab_size=vocab_size),
            vision=(vision := vision_config(config.vision)),
            connector=config.connector,
            preprocess=_preprocess(config.vision.source, vision),
            image_tokens=image_tokens,
            vision_frozen=config.vision.frozen,
            llm_source=config.llm.source,
            vision_source=config.vision.source,
        )
        spec._check_image_tokens()
        return spec

    def _check_image_tokens(self) -> None:
        made = self.patches if self.connector.kind == "mlp" else self.connector.latents
        if made == self.image_tokens:
            return
        if self.connector.kind == "perceiver":
            raise ConfigError(
                f"model.connector.latents={made}, but an image takes {self.image_tokens} tokens in the packs: "
                f"set it to {self.image_tokens}, or make the packs with image_tokens {made}"
            )
        raise ConfigError(
            f"model.connector.kind=mlp gives one token a patch, {made}, but an image takes {self.image_tokens} tokens "
            f"in the packs: use the perceiver with latents={self.image_tokens}, or packs with image_tokens {made}"
        )

    def check_segments(self, longest: int) -> None:
        """Refuse packs whose longest sample of ``longest`` tokens the positions cannot hold. Raises ConfigError."""
        limit = self.longest_segment
        if limit is not None and longest > limit:
            raise ConfigError(
                f"the packs hold a sample of {longest} tokens, and this {self.llm.model_type} was made for {limit} "
                "(max_position_embeddings, or a longrope model's short regime): make the packs with shorter samples"
            )

    @cached_property
    def longest_segment(self) -> int | None:
        """Longest sample in tokens: positions the model was made for, and of longrope models the short regime.

        Longrope switches its frequencies for the whole row when one position passes the short limit, so that a long
        sample would change its neighbours.
        """
        limit: int | None = getattr(self.llm, "max_position_embeddings", None)
        rope = getattr(self.llm, "rope_parameters", None) or {}
        if rope.get("rope_type") == "longrope":
            short = rope.get("original_max_position_embeddings") or limit
            return min(x for x in (limit, short) if x is not None)
        return limit

    @property
    def width(self) -> int:
        """Hidden width of the language model."""
        return int(self.llm.hidden_size)

    @property
    def layers(self) -> int:
        """Decoder layers."""
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
    def grid(self) -> tuple[int, int]:
        """Patches of the tower as (rows, columns)."""
        side = self.vision.image_size // self.vision.patch_size
        return side, side

    @property
    def patches(self) -> int:
        """Patch features of one image."""
        return self.grid[0] * self.grid[1]

    @property
    def mask_grid(self) -> tuple[int, int] | None:
        """Grid of the image tokens, for mask policies that need one; a resampler's tokens have none."""
        return self.grid if self.connector.kind == "mlp" else None

    def meta_llm(self) -> PreTrainedModel:
        """Return the whole language model without memory (meta device)."""
        with torch.device("meta"):
            return MODEL_FOR_CAUSAL_LM_MAPPING[type(self.llm)](self.llm)

    def meta_vision(self) -> PreTrainedModel:
        """Return the vision tower without memory, less the parts whose output nothing reads."""
        with torch.device("meta"):
            tower = MODEL_MAPPING[type(self.vision)](self.vision)
        if self.vision.model_type == "clip_vision_model":
            tower.post_layernorm = nn.Identity()  # CLIP norms only its pooled output with it
        return tower

    def meta_connector(self) -> nn.Module:
        """Return the connector without memory."""
        with torch.device("meta"):
            return build_connector(self.connector, width=int(self.vision.hidden_size), out_width=self.width)

    def to_dict(self) -> dict[str, Any]:
        """Return all that is needed to build the model again, JSON-ready; folders it was loaded from are left out."""
        return {
            "llm": json.loads(self.llm.to_json_string(use_diff=False)),
            "vision": json.loads(self.vision.to_json_string(use_diff=False)),
            "connector": self.connector.model_dump(),
            "preprocess": self.preprocess.to_dict(),
            "image_tokens": self.image_tokens,
            "vision_frozen": self.vision_frozen,
        }

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> ModelSpec:
        """Rebuild what :meth:`to_dict` returned. Raises ConfigError for a damaged description."""
        try:
            return cls(
                llm=config_from_dict(raw["llm"], LLM_FAMILIES),
                vision=config_from_dict(raw["vision"], VISION_FAMILIES),
                connector=ConnectorConfig.model_validate(raw["connector"]),
                preprocess=Preprocess.from_dict(raw["preprocess"]),
                image_tokens=int(raw["image_tokens"]),
                vision_frozen=bool(raw["vision_frozen"]),
            )
        except ConfigError:
            raise
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ConfigError(f"the saved model description is damaged ({error}): export or save it again") from error


def _preprocess(source: str, vision: PreTrainedConfig) -> Preprocess:
    """Take mean and std from the tower's folder where it says them, else what its family was trained with."""
    path = Path(source) / "preprocessor_config.json"
    clip = vision.model_type == "clip_vision_model"
    try:
        said = json.loads(path.read_text(encoding="utf-8")) if source and path.is_file() else {}
        mean = said.get("image_mean", OPENAI_CLIP_MEAN if clip else (0.5, 0.5, 0.5))
        std = said.get("image_std", OPENAI_CLIP_STD if clip else (0.5, 0.5, 0.5))
        return Preprocess(int(vision.image_size), _channels(mean), _channels(std))
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path} is damaged ({error}): copy it anew, or remove it") from error


def _channels(values: Any) -> tuple[float, float, float]:
    """Return a number for each of the three channels. Raises ValueError or TypeError."""
    red, green, blue = map(float, values)
    return red, green, blue
