"""An existing vision-language model as a starting point: ``model.source``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_prep.common.errors import did_you_mean, one_line, short_repr
from data_prep.vlms import IMAGE_PROCESSOR, PROCESSOR, REFUSED_VLMS, VLMS, Vlm
from pipeline.config.schema import ConfigError, ConnectorConfig, ModelConfig
from pipeline.model.families.configs import folder_config
from pipeline.model.limits import read_json
from pipeline.model.preprocess import FILTERS


@dataclass(frozen=True)
class StartingPoint:
    """A vision-language model as its folder describes it; a run keeps this, so that it can write the layout back."""

    family: Vlm
    config: Mapping[str, Any]
    """Content of ``config.json``."""
    files: Mapping[str, Any] = field(default_factory=dict)
    """Contents of the processor's JSON files, by name."""
    source: str = ""
    """Folder of its weights; empty in saved models, which hold them."""

    @classmethod
    def read(cls, model: ModelConfig) -> StartingPoint:
        """Read the folder ``model.source``.

        Raises ConfigError for a folder that holds no supported model, or a section that the folder already describes.
        """
        for key, given in (
            ("llm.source", model.llm.source), ("vision.source", model.vision.source),
            ("extra_vision", model.extra_vision), ("connector", model.connector != ConnectorConfig()),
        ):  # fmt: skip
            if given:
                raise ConfigError(
                    f"model.source={model.source} and model.{key} both describe that part: remove model.{key}, or take "
                    "model.llm.source and model.vision.source from the folder instead of model.source"
                )
        config = folder_config("model", model.source)
        family = vlm_family(f"model.source={model.source}", config)
        folder = Path(model.source)
        files = {name: read_json(folder / name) for name in family.files() if (folder / name).is_file()}
        return cls(family, config, files, model.source)

    @property
    def connector(self) -> ConnectorConfig:
        """The section ``model.connector`` that the model has."""
        return ConnectorConfig.model_validate(self.family.connector(self.config))

    @property
    def image_processor(self) -> Mapping[str, Any]:
        """Settings of its image processor; transformers 5 saves them inside those of the processor.

        Raises ConfigError where they are not a mapping.
        """
        settings = self.files.get(PROCESSOR, {}).get("image_processor") or self.files.get(IMAGE_PROCESSOR) or {}
        if not isinstance(settings, Mapping):
            raise ConfigError(f"model.source={self.source}: {PROCESSOR}: image_processor is no mapping: copy it again")
        return settings

    def files_for(self, side_px: int) -> dict[str, Any]:
        """Return the processor's files, by name, that make every image one square of ``side_px``, as training does."""
        settings = {**self.image_processor, **self.family.one_square(side_px)}
        if self.files.get(PROCESSOR, {}).get("image_processor"):
            return {**self.files, PROCESSOR: {**self.files[PROCESSOR], "image_processor": settings}}
        return {**self.files, IMAGE_PROCESSOR: settings}

    @property
    def resample(self) -> str:
        """The filter with which its processor resizes images. Raises ConfigError for one that is not supported."""
        code = self.image_processor.get("resample", int(FILTERS["bicubic"]))
        for name, known in FILTERS.items():
            if code == int(known):
                return name
        raise ConfigError(
            f"model.source={self.source}: its processor's resample={short_repr(code)} is not supported: set it to "
            + ", ".join(f"{int(known)} ({name})" for name, known in FILTERS.items())
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON-ready description, without the source folder."""
        return {"config": dict(self.config), "files": dict(self.files)}

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> StartingPoint:
        """Rebuild one from :meth:`to_dict`. Raises ConfigError, or KeyError when it is damaged."""
        return cls(vlm_family("saved model", raw["config"]), raw["config"], raw["files"])


def vlm_family(where: str, config: Mapping[str, Any]) -> Vlm:
    """Return the descriptor of a model. Raises ConfigError for one that is not supported, with the reason."""
    name = config.get("model_type")
    if name not in VLMS:
        reason = REFUSED_VLMS.get(str(name))
        raise ConfigError(
            f"{where}: model_type {short_repr(name)} is not supported as a starting point"
            + (f": {reason}" if reason else f"{did_you_mean(str(name), VLMS)}; known: {', '.join(VLMS)}")
        )
    family = VLMS[str(name)]
    try:
        problem = family.problem(config)
        if not problem:  # whatever is read later is read once here, so that damage is named at once
            family.text(config), family.vision(config), family.connector(config), family.image_tokens(config)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, ZeroDivisionError) as error:
        problem = f"its config.json is damaged ({type(error).__name__}: {one_line(error)}): copy the folder again"
    if problem:
        raise ConfigError(f"{where}: {problem}")
    return family
