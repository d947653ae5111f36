"""The description of a trained model in an export: the key ``mma`` of its ``config.json``.

The rest of the file belongs to the Hugging Face class that loads the export (see `pipeline.serving.hf_files`). The
configs of the language model and the vision tower stand there once, as ``text_config`` and ``vision_config``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from data_prep.common.errors import UserError, one_line
from data_prep.common.files import check_format
from data_prep.text.template import Template
from pipeline.model.spec import ModelSpec

FORMAT, VERSION = "mma-export", 4
FLAT_VERSION = 3
"""Exports whose ``config.json`` is the language model's own, with everything else in the key ``mma``; still read."""
CONFIG = "config.json"
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True)
class ExportConfig:
    """A trained model's architecture, and everything needed to prompt it as in training."""

    spec: ModelSpec
    policy: str
    """Name of its training mask policy."""
    template: Template
    image_id: int
    pad_id: int
    eos_ids: tuple[int, ...]
    """Ids that end an answer."""
    dtype: str
    """Dtype of the saved weights, a key of ``DTYPES``."""
    tokenizer: str = "tokenizer"
    """Tokenizer folder inside the export."""
    step: int = 0
    """Optimizer steps behind the weights."""

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise UserError(f"weights cannot be saved as {self.dtype!r}: use one of {', '.join(DTYPES)}")

    @property
    def torch_dtype(self) -> torch.dtype:
        """Dtype of the saved weights."""
        return DTYPES[self.dtype]

    @classmethod
    def from_meta(cls, meta: Mapping[str, Any], **over: Any) -> ExportConfig:
        """Read the description of a model in a checkpoint or an export. Raises UserError when it is incomplete."""
        try:
            raw = {**meta, **over}
            return cls(
                spec=ModelSpec.from_dict(raw["spec"]),
                policy=str(raw["policy"]),
                template=Template(**raw["template"]),
                image_id=int(raw["image_id"]),
                pad_id=int(raw["pad_id"]),
                eos_ids=tuple(int(index) for index in raw["eos_ids"]),
                dtype=str(raw["dtype"]),
                step=int(raw.get("step", 0)),
            )
        except UserError:
            raise
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise UserError(
                f"the model description is incomplete ({one_line(error)}): save or export the model again"
            ) from error

    def to_config(self) -> dict[str, Any]:
        """Return ``text_config``, ``vision_config`` and ``mma`` of ``config.json``."""
        spec = self.spec.to_dict()
        text, vision = spec.pop("llm"), spec.pop("vision")
        own = {
            "format": FORMAT,
            "version": VERSION,
            "spec": spec,
            "policy": self.policy,
            "template": asdict(self.template),
            "image_id": self.image_id,
            "pad_id": self.pad_id,
            "eos_ids": list(self.eos_ids),
            "dtype": self.dtype,
            "step": self.step,
        }
        return {"text_config": text, "vision_config": vision, "mma": own}

    @classmethod
    def load(cls, directory: Path | str) -> ExportConfig:
        """Read the config of an export. Raises UserError when the folder is not an export of this format version."""
        path = Path(directory) / CONFIG
        if not path.is_file():
            raise UserError(f"{directory} is not an exported model (no {CONFIG}): create one with mma export RUN OUT")
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
            own = raw["mma"]
            if own.get("version") == FLAT_VERSION and own.get("format") == FORMAT:
                return cls.from_meta(own)
            check_format(path, own, format=FORMAT, version=VERSION, fix="export the run again")
            spec = {**own["spec"], "llm": raw["text_config"], "vision": raw["vision_config"]}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"{path} does not describe an export of this project: export the run again") from error
        return cls.from_meta(own, spec=spec)
