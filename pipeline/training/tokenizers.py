"""Refuses a model whose tokenizer is not the one the packs were made with."""

from __future__ import annotations

import json
from pathlib import Path

from pipeline.config import ConfigError, RunConfig


def check_tokenizer(config: RunConfig, packs_tokenizer: Path) -> None:
    """Compare the vocabulary of ``model.llm.source`` with the packs' tokenizer. Raises ConfigError where ids differ.

    The packs' tokenizer may have more tokens (markers were added at the end); no shared token may have another id.
    Models built from a config have no tokenizer of their own and take the packs'.
    """
    source = Path(config.model.llm.source) / "tokenizer.json"
    if not config.model.llm.source or not source.is_file():
        return
    own, packed = read_vocabulary(source), read_vocabulary(packs_tokenizer / "tokenizer.json")
    wrong = next((token for token, number in own.items() if packed.get(token) != number), None)
    if wrong is not None:
        raise ConfigError(
            f"the packs in {config.data.packs} were made with another tokenizer than model.llm.source="
            f"{config.model.llm.source} has (token {wrong!r} is {packed.get(wrong)} there, {own[wrong]} here): "
            "make the packs again with this model's tokenizer"
        )


def read_vocabulary(path: Path) -> dict[str, int]:
    """Return token -> id of a Hugging Face tokenizer.json, added tokens included. Raises ConfigError if unreadable."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        vocabulary = raw["model"]["vocab"]
        pairs = vocabulary.items() if isinstance(vocabulary, dict) else ((e[0], i) for i, e in enumerate(vocabulary))
        return {**dict(pairs), **{added["content"]: added["id"] for added in raw.get("added_tokens", [])}}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} is not a readable tokenizer.json ({error})") from error
