"""What data preparation takes from the folder of an existing vision-language model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from data_prep.common.errors import UserError, did_you_mean, one_line, short_repr
from data_prep.text.chat_template import chat_format_of
from data_prep.text.template import ImageMarks
from data_prep.vlms import REFUSED_VLMS, VLMS, Vlm


@dataclass(frozen=True)
class VlmFolder:
    """The folder of a model: its tokenizer, its image token, the tokens of an image and the chat template."""

    path: Path
    family: Vlm
    config: Mapping[str, Any]

    @classmethod
    def open(cls, path: Path) -> VlmFolder:
        """Read ``config.json``. Raises UserError for a folder without one, or with a model that is not supported."""
        config = _read(path / "config.json")
        name = config.get("model_type")
        if name not in VLMS:
            reason = REFUSED_VLMS.get(str(name), "") or f"known: {', '.join(VLMS)}"
            raise UserError(
                f"model: {path} holds model_type {short_repr(name)}, which is not supported"
                f"{did_you_mean(str(name), VLMS)}: {reason}"
            )
        family = VLMS[str(name)]
        try:
            problem = family.problem(config)
        except (KeyError, TypeError, ValueError, AttributeError, IndexError, ZeroDivisionError) as error:
            problem = f"its config.json is damaged ({type(error).__name__}: {one_line(error)}): copy the folder again"
        if problem:
            raise UserError(f"model: {path}: {problem}")
        return cls(path, family, config)

    @property
    def image_tokens(self) -> int:
        """Tokens of one image. Raises UserError for a damaged config."""
        try:
            return self.family.image_tokens(self.config)
        except (KeyError, TypeError, ValueError, IndexError, ZeroDivisionError) as error:
            raise UserError(
                f"model: {self.path / 'config.json'} does not tell the tokens of an image ({one_line(error)})"
            ) from error

    @cached_property
    def image_token(self) -> str:
        """Name of the token at every position of an image. Raises UserError where the tokenizer has no such token."""
        try:
            wanted = self.family.image_id(self.config)
            return next(name for name, index in self._added().items() if index == wanted)
        except (KeyError, TypeError, ValueError, StopIteration) as error:
            raise UserError(
                f"model: the image token of {self.path / 'config.json'} is none of the added_tokens of tokenizer.json: "
                "copy the folder again"
            ) from error

    @property
    def image_marks(self) -> ImageMarks:
        """What stands around an image. Raises UserError where the tokenizer lacks one of these tokens."""
        before, after = (tuple(side) for side in self.family.marks())
        for text, special in (*before, *after):
            if special and text not in self._added():
                raise UserError(f"model: the tokenizer in {self.path} has no token {text}: copy the folder again")
        return (before, after) if before or after else ()

    def chat_format(self, system: str) -> str:
        """Return the chat format of the model's chat template, as JSON; see `chat_format_of` for errors.

        Where the tokenizer begins every sequence with a token that the template does not write, so does the format.
        """
        found = json.loads(chat_format_of(self.path, system, self.family.written(self.image_token)))
        first = self._first_token()
        opening = found["start"] or found["headers"].get("system", found["headers"]["user"])
        if first and [first, True] != opening[0]:
            found["start"] = [[first, True], *found["start"]]
        return json.dumps(found, sort_keys=True)

    def _first_token(self) -> str:
        import tokenizers

        fast = tokenizers.Tokenizer.from_file(str(self.path / "tokenizer.json"))
        added = fast.encode("", add_special_tokens=True).tokens
        return str(added[0]) if added else ""

    def _added(self) -> dict[str, int]:
        listed = _read(self.path / "tokenizer.json").get("added_tokens", [])
        return {str(token["content"]): int(token["id"]) for token in listed}


def _read(path: Path) -> dict[str, Any]:
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(
            f"model: {path} cannot be read ({one_line(error)}): give the folder of a vision-language model; "
            "`hf download ORG/NAME` prints that of a model of the Hub"
        ) from error
    if not isinstance(raw, dict):
        raise UserError(f"model: {path} is not a JSON object: copy the folder again")
    return raw
