"""Bounds of every number a model config may hold, in one place, checked before anything is built or allocated.

They exist to reject typos and hostile files at once: each is several times what the largest published model uses.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from data_prep.common.errors import one_line, short_repr
from pipeline.config.schema import ConfigError

LIMITS: Mapping[str, int] = {
    "num_hidden_layers": 1_024,
    "hidden_size": 65_536,
    "intermediate_size": 1 << 20,
    "num_attention_heads": 1_024,
    "num_key_value_heads": 1_024,
    "head_dim": 4_096,
    "vocab_size": 1 << 22,
    "max_position_embeddings": 1 << 28,
    "image_size": 8_192,
    "patch_size": 8_192,
    "num_channels": 16,
    "projection_dim": 65_536,
}
"""Largest value of each size in a Hugging Face config; the smallest is 1."""
MAX_NUMBER = 1 << 31
"""Largest absolute value of any other number in a config."""
MAX_CONFIG_BYTES = 16 << 20
"""Largest ``config.json`` that is read."""
MAX_ITEMS, MAX_TEXT, MAX_DEPTH = 65_536, 4_096, 8
"""Largest length of a list or mapping, length of a string, and nesting depth of a value in a config."""


def check_config_values(where: str, raw: Mapping[str, Any], *, fewest_layers: int = 1) -> None:
    """Check every value of a config against the limits.

    Args:
        where: the config in messages, such as ``model.llm``.
        raw: the config; any JSON-like values.
        fewest_layers: smallest ``num_hidden_layers``; all other sizes are at least 1.

    Raises:
        ConfigError: naming the key, its value and the limit.
    """
    for name, limit in LIMITS.items():
        value, least = raw.get(name), fewest_layers if name == "num_hidden_layers" else 1
        if isinstance(value, (int, float)) and not least <= value <= limit:
            raise ConfigError(f"{where}: {name}={short_repr(value)} is outside {least}..{limit}: fix {name}")
    for name, value in raw.items():
        for problem in _problems(value, MAX_DEPTH):
            raise ConfigError(f"{where}: {short_repr(name)} {problem}: fix {short_repr(name)}")


def read_bounded(path: Path) -> str:
    """Read a text file of at most ``MAX_CONFIG_BYTES``. Raises OSError, or ValueError if it is larger."""
    with path.open("rb") as stream:
        data = stream.read(MAX_CONFIG_BYTES + 1)
    if len(data) > MAX_CONFIG_BYTES:
        raise ValueError(f"larger than {MAX_CONFIG_BYTES >> 20} MiB")
    return data.decode("utf-8")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object of at most ``MAX_CONFIG_BYTES``. Raises ConfigError naming the file."""
    try:
        raw = json.loads(read_bounded(path))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not JSON ({one_line(error)}): copy the folder again") from error
    if not isinstance(raw, dict):
        raise ConfigError(f"{path} is not a JSON object: copy the folder again")
    return raw


def _problems(value: Any, depth: int) -> Iterator[str]:
    if isinstance(value, float) and not math.isfinite(value):
        yield f"holds {value}, which is not a finite number"
    elif isinstance(value, (int, float)) and abs(value) > MAX_NUMBER:
        yield f"holds {short_repr(value)}, above the limit of {MAX_NUMBER}"
    elif isinstance(value, (str, list, tuple, Mapping)):
        limit = MAX_TEXT if isinstance(value, str) else MAX_ITEMS
        if len(value) > limit:
            kind = "characters" if isinstance(value, str) else "items"
            yield f"holds {len(value)} {kind}, above the limit of {limit}"
        elif not isinstance(value, str) and not depth:
            yield f"is nested deeper than {MAX_DEPTH} levels"
        elif not isinstance(value, str):
            for item in value.values() if isinstance(value, Mapping) else value:
                yield from _problems(item, depth - 1)
