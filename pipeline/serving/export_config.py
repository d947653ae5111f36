"""The model card of an export: everything but the weights, in its ``config.json``.

The file is the language model's own Hugging Face config with one more key, ``mma``, so that other tools can load the
language model from the folder by itself.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from data_prep.common.errors import UserError
from data_prep.common.files import check_format
from data_prep.text.template import Template
from pipeline.model.spec import ModelSpec

FORMAT, VERSION = "mma-export", 2
CONFIG = "config.json"
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True)
class ExportConfig:
    """What a model was and how it is to be asked."""

    spec: ModelSpec
    policy: str
    """Name of the mask policy it was trained with."""
    template: Template
    image_id: int
    pad_id: int
    eos_ids: tuple[int, ...]
    """Ids that end an answer."""
    dtype: str
    """Type of the saved weights, a key of ``DTYPES``."""
    tokenizer: str = "tokenizer"
    """Folder of the tokenizer, inside the export."""
    step: int = 0
    """Optimizer steps the weights have seen."""

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise UserError(f"weights of type {self.dtype!r} are not written here: use one of {', '.join(DTYPES)}")

    @property
    def torch_dtype(self) -> torch.dtype:
        """Type of the saved weights."""
        return DTYPES[self.dtype]

    @classmethod
    def from_meta(cls, meta: Mapping[str, Any], **over: Any) -> ExportConfig:
        """Read what a checkpoint says of its model. Raises UserError when something is missing."""
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
        except (KeyError, TypeError) as error:
            raise UserError(f"the description of the model is incomplete ({error}): save it again") from error

    def to_config(self) -> dict[str, Any]:
        """Return the content of ``config.json``."""
        spec = self.spec.to_dict()
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
        ends = {"eos_token_id": list(self.eos_ids), "pad_token_id": self.pad_id}
        return {**spec["llm"], **ends, "dtype": self.dtype, "mma": own}

    @classmethod
    def load(cls, directory: Path | str) -> ExportConfig:
        """Read an export's card. Raises UserError when the folder is not an export of this version."""
        path = Path(directory) / CONFIG
        if not path.is_file():
            raise UserError(f"{directory} is not an exported model (no {CONFIG}): make one with mma export RUN OUT")
        try:
            own = json.loads(path.read_text(encoding="utf-8"))["mma"]
            check_format(path, own, format=FORMAT, version=VERSION, fix="export the run again")
        except (ValueError, KeyError, TypeError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"{path} does not describe an export of this project: export the run again") from error
        return cls.from_meta(own)
