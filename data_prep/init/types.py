"""``mma-prep types``: the corpus types of a recipe and their options, from the readers themselves."""

from __future__ import annotations

import inspect
import textwrap
import types
from collections.abc import Iterator, Mapping
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from data_prep.common.errors import UserError, did_you_mean
from data_prep.corpora import COMMON_OPTIONS, CORPORA, HoldOut
from data_prep.corpora.base import Input
from data_prep.recipe import CorpusConfig

WIDTH = 100


class Option(NamedTuple):
    """One option of a reader, as text."""

    name: str
    kind: str
    """Type, such as ``text`` or ``a | b``."""
    default: str
    """As written in YAML; ``required`` if there is none."""
    help: str


def describe_types() -> str:
    """Return one line per corpus type."""
    width = max(map(len, CORPORA))
    lines = [f"  {name:{width}}  {_first_sentence(reader)}" for name, reader in sorted(CORPORA.items())]
    return "\n".join(["corpus types (mma-prep types TYPE shows the options of one):", "", *lines])


def describe_type(name: str) -> str:
    """Return the description and the options of a corpus type. Raises UserError if there is no such type."""
    if name not in CORPORA:
        raise UserError(f"unknown corpus type '{name}'{did_you_mean(name, CORPORA)}; known: {', '.join(CORPORA)}")
    text = _plain(inspect.cleandoc(CORPORA[name].__doc__ or ""))
    lines = [f"type: {name}", "", *_wrapped(text, ""), "", "options:"]
    for option in options_of(name):
        lines += [
            "",
            f"  {option.name}: {option.kind} (default: {option.default})".replace("default: required", "required"),
        ]
        lines += _wrapped(option.help, "      ")
    lines += ["", "options of every type:"]
    for option in common_options():
        lines += ["", f"  {option.name}: {option.kind} (default: {option.default})", *_wrapped(option.help, "      ")]
    return "\n".join(lines)


def options_of(name: str) -> list[Option]:
    """Return the options of a corpus type, in the order of the reader."""
    return list(_options(CORPORA[name].model_fields, skip=("root",)))


def common_options() -> list[Option]:
    """Return the options that every corpus type has."""
    held = {name: HoldOut.model_fields[name] for name in COMMON_OPTIONS}
    shared = [option._replace(default="none") if option.default == "required" else option for option in _options(held)]
    augment = {"augment": CorpusConfig.model_fields["augment"]}
    return [*shared, *_options(augment)]


def _options(fields: Mapping[str, FieldInfo], *, skip: tuple[str, ...] = (), prefix: str = "") -> Iterator[Option]:
    for name, field in fields.items():
        if name in skip:
            continue
        nested = next((kind for kind in (field.annotation, *get_args(field.annotation)) if _is_model(kind)), None)
        kind = _kind(field.annotation, field.metadata)
        yield Option(prefix + name, kind, _default(field), _plain(field.description or ""))
        if nested is not None:
            yield from _options(nested.model_fields, prefix=f"{prefix}{name}.")


def _is_model(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def _kind(annotation: Any, metadata: Any = ()) -> str:
    """Return a type in the words of the recipe."""
    marks = [mark.value for mark in metadata if isinstance(mark, Input)]
    if marks:
        return f"path of a {marks[0]}"
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _kind(arguments[0], arguments[1:])
    if origin is Literal:
        return " | ".join(map(str, arguments))
    if origin in (Union, types.UnionType):
        return " | ".join(_kind(argument, metadata) for argument in arguments if argument is not type(None))
    if origin is dict:
        return f"mapping of {_kind(arguments[0])} to {_kind(arguments[1])}"
    if origin in (list, tuple):
        return f"list of {_kind(arguments[0])}"
    if _is_model(annotation):
        return "mapping"
    names = {str: "text", int: "integer", float: "number", bool: "true | false", Path: "path"}
    return names.get(annotation, getattr(annotation, "__name__", str(annotation)))


def _default(field: FieldInfo) -> str:
    value = field.get_default(call_default_factory=False)
    if value is PydanticUndefined:
        return "required" if field.default_factory is None else "built in"
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {item}" for key, item in value.items()) + "}"
    return str(value.value if isinstance(value, Enum) else value) or "''"


def _first_sentence(reader: type[BaseModel]) -> str:
    text = " ".join(_plain(inspect.cleandoc(reader.__doc__ or "")).split("\n\n")[0].split())
    return textwrap.shorten(text, WIDTH, placeholder=" ...")


def _plain(text: str) -> str:
    return text.replace("``", "")


def _wrapped(text: str, indent: str) -> list[str]:
    found = list[str]()
    for paragraph in text.split("\n\n"):
        found += [""] if found else []
        found += textwrap.wrap(" ".join(paragraph.split()), WIDTH, initial_indent=indent, subsequent_indent=indent)
    return found
