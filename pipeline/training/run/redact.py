"""Keeps secrets out of everything a run writes and prints.

A secret is the value of a variable or flag with a word such as TOKEN or KEY in its name, or has the format of a
provider's tokens.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence

from pipeline.config.schema import ConfigError

HIDDEN = "***"
_ENDINGS = {"TOKEN", "KEY", "APIKEY", "JWT", "PASSPHRASE", "CREDENTIAL", "CREDENTIALS"}
_ANYWHERE = {"SECRET", "SECRETS", "PASSWORD", "PASSWD"}
_SHAPES = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{16,}|(?:AKIA|ASIA)[A-Z0-9]{16}|sk-[\w-]{16,}|gh[pousr]_[A-Za-z0-9]{20,}"
    r"|eyJ[\w-]{10,}\.[\w-]{10,}\.[\w-]*)|(?<=://)[^/\s:@]+:[^/\s@]+(?=@)"
)
_SHORTEST = 8
"""Shorter values are words such as "true", which must not be redacted everywhere."""
_LIKELY = 16
"""Shorter values of a configuration are words, such as a model's "bos_token"."""


def is_secret_name(name: str) -> bool:
    """Whether a variable, flag or key of this name holds a secret: ``HF_TOKEN``, ``--wandb-api-key``."""
    words = re.split(r"[^A-Z0-9]+", name.upper())
    return words[-1] in _ENDINGS or not _ANYWHERE.isdisjoint(words)


def redact(text: str) -> str:
    """Return a text with all known secrets hidden."""
    for value in sorted(_secret_values(os.environ), key=len, reverse=True):
        text = text.replace(value, HIDDEN)
    return _SHAPES.sub(HIDDEN, text)


def redact_words(words: Sequence[str]) -> list[str]:
    """Return a command line with the values of secret flags and other secrets hidden."""
    shown, hide = [], False
    for word in words:
        flag, equals, _ = word.partition("=")
        secret = word.startswith("-") and is_secret_name(flag)
        shown.append(HIDDEN if hide else f"{flag}={HIDDEN}" if secret and equals else redact(word))
        hide = secret and not equals
    return shown


def refuse_secrets(tree: Mapping[str, object], prefix: str = "") -> None:
    """Refuse a configuration that contains a secret: checkpoints and exports would copy it. Raises ConfigError."""
    for key, value in tree.items():
        name = prefix + str(key)
        if isinstance(value, Mapping):
            refuse_secrets(value, f"{name}.")
        elif isinstance(value, str) and (redact(value) != value or (is_secret_name(name) and len(value) >= _LIKELY)):
            raise ConfigError(f"{name} contains a secret, which every checkpoint would copy: remove it")


def _secret_values(variables: Mapping[str, str]) -> Iterator[str]:
    for name, value in variables.items():
        if len(value) >= _SHORTEST and is_secret_name(name) and not value.startswith(("/", "~", ".")):
            yield value
