"""YAML files of the user: read safely, environment variables filled in."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import yaml

from data_prep.common.errors import UserError


class _Loader(yaml.SafeLoader):
    """The safe loader, which takes 1e-6 for the number it is (YAML 1.1 asks for 1.0e-6), and refuses a key given twice.

    YAML forbids such a mapping, but the safe loader takes the last and forgets the others in silence.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Return a mapping. Raises YAMLError where a key stands twice."""
        seen = set[str]()
        for key, _ in node.value:  # before merge keys (<<) are spread: what they bring may be given anew
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise yaml.YAMLError(f"the key {key.value!r} stands twice (line {key.start_mark.line + 1})")
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)
_VARIABLE = re.compile(r"\$\{(\w+)(?::-([^}]*))?\}")


def read_yaml(text: str, where: str) -> Any:
    """Return what a YAML text says. Raises UserError, beginning with ``where``, when it is not YAML."""
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise UserError(f"{where}: not valid YAML: {' '.join(str(error).split())}") from error


def read_mapping(path: Path) -> dict[str, Any]:
    """Read a YAML file that holds a mapping. Raises UserError when it is not YAML, or something else."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from error
    raw = read_yaml(text, str(path))
    if not isinstance(raw, dict):
        raise UserError(f"{path}: a recipe is a mapping of sections, not a {type(raw).__name__}")
    return raw


def expand(value: Any, where: str) -> Any:
    """Replace ``${VAR}`` and ``${VAR:-default}`` in every text of a tree.

    Raises UserError naming the key, after ``where``, when a variable is not set and has no default.
    """
    if isinstance(value, dict):
        return {key: expand(item, f"{where}: {key}") for key, item in value.items()}
    if isinstance(value, list):
        return [expand(item, where) for item in value]
    return _VARIABLE.sub(lambda match: _variable(match, where), value) if isinstance(value, str) else value


def _variable(match: re.Match[str], where: str) -> str:
    name, default = match.group(1), match.group(2)
    found = os.environ.get(name) or default
    if found is None:
        raise UserError(f"{where} uses ${{{name}}}, which is not set: export {name}=... or pass the value as a flag")
    return found
