"""YAML files of the user: read safely and within limits, environment variables filled in.

Values are text, numbers, booleans, null, lists and mappings, and nothing else: a date stays text. A file that would
expand beyond all bounds (aliases of aliases), contains itself, is nested too deeply, or holds numbers or characters
that no setting can hold is refused with its line.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import yaml

from data_prep.common.errors import UserError, one_line

MAX_BYTES = 1 << 20
"""Largest YAML text that is read; long lists (prompts) belong in files of their own."""
MAX_DEPTH = 32
"""Deepest nesting of lists and mappings."""
MAX_NODES = 100_000
"""Most values after all aliases are expanded."""
MAX_DIGITS = 40
"""Longest number: more digits than any setting has, and far fewer than Python takes long to parse."""
_NUMBERS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")
_TAGS = frozenset(
    f"tag:yaml.org,2002:{name}" for name in ("str", "int", "float", "bool", "null", "seq", "map", "merge")
)


class _Loader(yaml.SafeLoader):
    """A stricter safe loader.

    It reads 1e-6 as a number (YAML 1.1 demands 1.0e-6) and 2026-01-31 as text, and it refuses duplicate keys: YAML
    forbids them, but the safe loader silently keeps the last.
    """

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self._depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        """Compose one value. Raises YAMLError if it is nested too deeply."""
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise yaml.YAMLError(f"nested deeper than {MAX_DEPTH} levels (line {self.line + 1})")
        node: yaml.Node | None = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def get_single_data(self) -> Any:
        """Return the value of the document. Raises YAMLError if a value is outside the limits."""
        node = self.get_single_node()
        if node is None:
            return None
        _count(node, {})
        return self.construct_document(node)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Return a mapping. Raises YAMLError if a key occurs twice."""
        seen = set[str]()
        for key, _ in node.value:  # before merge keys (<<) are expanded: the mapping may override what they bring
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise yaml.YAMLError(f"the key {key.value!r} occurs twice (line {key.start_mark.line + 1})")
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith(":timestamp")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)
_VARIABLE = re.compile(r"\$\{(\w+)(?::-([^}]*))?\}")
_UNENCODABLE = re.compile("[\0\ud800-\udfff]")


def _count(node: yaml.Node, sizes: dict[int, int]) -> int:
    """Check a node and return the number of values in it, aliases expanded.

    Args:
        node: at most ``MAX_DEPTH`` levels deep, unless it contains itself.
        sizes: of nodes seen so far by identity; 0 for those being counted.

    Raises:
        YAMLError: a value is outside the limits.
    """
    line = node.start_mark.line + 1
    if id(node) in sizes:
        if not sizes[id(node)]:
            raise yaml.YAMLError(f"a value contains itself through an alias (line {line})")
        return sizes[id(node)]
    sizes[id(node)] = 0
    if node.tag not in _TAGS:
        raise yaml.YAMLError(f"the tag {node.tag.removeprefix('tag:yaml.org,2002:')!r} is not supported (line {line})")
    if isinstance(node, yaml.ScalarNode):
        _check_scalar(node, line)
    children = [part for item in node.value for part in (item if isinstance(item, tuple) else (item,))]
    size = 1 + sum(_count(child, sizes) for child in children if isinstance(child, yaml.Node))
    if size > MAX_NODES:
        raise yaml.YAMLError(f"aliases expand to more than {MAX_NODES:,} values (line {line})")
    sizes[id(node)] = size
    return size


def _check_scalar(node: yaml.ScalarNode, line: int) -> None:
    if node.tag in _NUMBERS and len(node.value) > MAX_DIGITS:
        raise yaml.YAMLError(f"a number of {len(node.value):,} characters (line {line})")
    if found := _UNENCODABLE.search(node.value):
        raise yaml.YAMLError(f"the character U+{ord(found.group()):04X} is not allowed (line {line})")


def read_yaml(text: str, where: str) -> Any:
    """Return the value of a YAML text. Raises UserError, beginning with ``where``, if it is not YAML within limits."""
    try:
        return yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: "1__" is a number to the resolver only
        raise UserError(f"{where}: not valid YAML: {one_line(error)}") from error


def read_mapping(path: Path) -> dict[str, Any]:
    """Read a YAML file that holds a mapping. Raises UserError if it is unreadable, not YAML, or another value."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
        text = data.decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from error
    if len(data) > MAX_BYTES:
        raise UserError(f"{path}: larger than {MAX_BYTES:,} bytes: is it a recipe?")
    raw = read_yaml(text, str(path))
    if not isinstance(raw, dict):
        raise UserError(f"{path}: a recipe is a mapping of sections, not a {type(raw).__name__}")
    return raw


def expand(value: Any, where: str) -> Any:
    """Replace ``${VAR}`` and ``${VAR:-default}`` in every text of a tree.

    Raises UserError naming every key, after ``where``, whose variable is not set and has no default.
    """
    unset = list[str]()
    expanded = _expand(value, where, unset)
    if unset:
        raise UserError("\n".join(dict.fromkeys(unset)))
    return expanded


def _expand(value: Any, where: str, unset: list[str]) -> Any:
    if isinstance(value, dict):
        return {key: _expand(item, f"{where}: {key}", unset) for key, item in value.items()}
    if isinstance(value, list):
        return [_expand(item, where, unset) for item in value]
    return _VARIABLE.sub(lambda match: _variable(match, where, unset), value) if isinstance(value, str) else value


def _variable(match: re.Match[str], where: str, unset: list[str]) -> str:
    name, default = match.group(1), match.group(2)
    found = os.environ.get(name) or default
    if found is None:
        unset.append(f"{where} uses ${{{name}}}, which is not set: export {name}=... or pass the value as a flag")
    return found or ""
