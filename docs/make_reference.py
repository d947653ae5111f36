"""Write docs/reference.md from the code: recipe keys, reader options, commands. ``python docs/make_reference.py``."""

from __future__ import annotations

import argparse
import sys
import types
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from data_prep.corpora import CORPORA
from data_prep.recipe import Recipe
from pipeline.config.schema import RunConfig
from pipeline.model.connectors import CONNECTORS

TARGET = ROOT / "docs/reference.md"


def reference() -> str:
    """Return the whole page."""
    return "\n".join(
        [
            "# Reference",
            "",
            "Generated from the code by `python docs/make_reference.py`; a test compares the two.",
            "",
            "- [Training recipes](#training-recipes): every key is a flag as well (`train.lr` is `--train.lr`)",
            "- [Connectors](#connectors): further keys of `model.connector`, by `kind`",
            "- [Data recipes](#data-recipes)",
            "- [Corpus types](#corpus-types)",
            "- [Commands](#commands)",
            "",
            "## Training recipes",
            "",
            *table(keys(RunConfig)),
            "",
            "## Connectors",
            "",
            *sections(CONNECTORS.built_in, prefix="model.connector."),
            "## Data recipes",
            "",
            *table(keys(Recipe)),
            "",
            "## Corpus types",
            "",
            *sections(CORPORA.built_in, hidden="root"),
            "## Commands",
            "",
            *commands(),
        ]
    )


Row = tuple[str, str, str, str]
"""Key, type, default, meaning."""


def keys(model: type[BaseModel], prefix: str = "") -> Iterator[Row]:
    """Yield every key of a model, those of its sections and of the values of its mappings too."""
    for name, field in model.model_fields.items():
        key = prefix + name
        sections, step = sections_of(field.annotation)
        yield key, type_name(field), default_of(field), one_line(field.description)
        for inner in sections:
            about = f"{typing.get_args(inner.model_fields['kind'].annotation)[0]}: " if len(sections) > 1 else ""
            rows = keys(inner, f"{key}{step}.")
            yield from (
                (own, kind, default, about * (not own.endswith(".kind")) + text) for own, kind, default, text in rows
            )


def sections_of(annotation: Any) -> tuple[list[type[BaseModel]], str]:
    """Return the models that a key may hold, and ``.NAME`` where it holds a mapping of them."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation], ""
    inner = typing.get_args(annotation)
    if typing.get_origin(annotation) is dict and isinstance(inner[1], type) and issubclass(inner[1], BaseModel):
        return [inner[1]], ".NAME"
    return [each for each in inner if isinstance(each, type) and issubclass(each, BaseModel)], ""


def type_name(field: FieldInfo) -> str:
    """Return a field's type in words."""
    limits = [
        f"{sign} {getattr(limit, attribute):g}"
        for limit in field.metadata
        for attribute, sign in (("gt", ">"), ("ge", ">="), ("lt", "<"), ("le", "<="))
        if getattr(limit, attribute, None) is not None
    ]
    return " ".join([_type_name(field.annotation), *(f"({', '.join(limits)})" for _ in limits[:1])])


def _type_name(annotation: Any) -> str:
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Literal:
        return ", ".join(map(str, inner))
    if origin is typing.Annotated:
        return _type_name(inner[0])
    if origin in (typing.Union, types.UnionType):
        return " or ".join(dict.fromkeys("none" if each is type(None) else _type_name(each) for each in inner))
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "section"
    if origin is dict:
        return "mapping"
    if origin in (tuple, list):
        return "list"
    names = {bool: "true or false", int: "integer", float: "number", str: "text", Path: "path"}
    return names.get(annotation, getattr(annotation, "__name__", str(annotation)))


def default_of(field: FieldInfo) -> str:
    """Return a field's default as YAML would have it."""
    value = field.get_default(call_default_factory=True) if not field.is_required() else PydanticUndefined
    if value is PydanticUndefined:
        return "required"
    if isinstance(value, BaseModel):
        return ""
    if value is None or value in ("", (), {}, []):
        return "-"
    return f"`{str(value).lower()}`" if isinstance(value, bool) else f"`{value}`"


def one_line(text: str | None) -> str:
    """Return a description in one line, safe inside a table."""
    return " ".join((text or "").split()).replace("``", "`").replace("|", "\\|")


def table(rows: Iterator[Row]) -> Iterator[str]:
    """Yield a Markdown table."""
    yield "| key | type | default | meaning |"
    yield "|---|---|---|---|"
    for key, kind, default, meaning in rows:
        yield f"| `{key}` | {kind} | {default} | {meaning} |"


def sections(registry: Mapping[str, type[BaseModel]], *, prefix: str = "", hidden: str = "") -> Iterator[str]:
    """Yield a section for each kind of a registry: the first paragraph of its docstring, and its options."""
    for name, kind in registry.items():
        yield f"### `{name}`"
        yield ""
        yield " ".join((kind.__doc__ or "").split("\n\n")[0].split())
        yield ""
        if rows := [row for row in keys(kind, prefix) if row[0] != hidden]:
            yield from table(iter(rows))
            yield ""


def commands() -> Iterator[str]:
    """Yield a section for each command: its help line and its options."""
    from data_prep.cli import build_parser as prep_parser
    from pipeline.cli import build_parser as mma_parser

    for parser in (prep_parser(), mma_parser()):
        helps = {action.dest: action.help for action in choices_of(parser)}
        for name, command in subcommands(parser).items():
            yield f"### `{parser.prog} {name}`"
            yield ""
            summary = one_line((command.description or helps.get(name) or "").split("\n\n")[0])
            yield f"{summary[:1].upper()}{summary[1:].rstrip('.')}."
            yield ""
            yield "| argument | meaning |"
            yield "|---|---|"
            yield from (f"| {shown(action)} | {meaning(action, command)} |" for action in listed(command))
            yield ""


def listed(command: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """Yield the arguments worth a row: recipe keys, which are flags of ``mma train`` too, stand above."""
    for action in command._actions:
        key = any("." in option for option in action.option_strings)
        if action.help not in (None, argparse.SUPPRESS) and action.dest != "help" and not key:
            yield action


def meaning(action: argparse.Action, command: argparse.ArgumentParser) -> str:
    """Return an argument's help with its default filled in."""
    return one_line((action.help or "") % {**vars(action), "prog": command.prog})


def choices_of(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    """Return the help lines of a parser's commands."""
    found = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    return found[0]._choices_actions if found else []


def subcommands(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """Return the commands of a parser."""
    found = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    return dict(found[0].choices) if found else {}


def shown(action: argparse.Action) -> str:
    """Return an argument as one types it."""
    value = action.metavar or (f"{{{','.join(map(str, action.choices))}}}" if action.choices else action.dest.upper())
    value = "" if action.nargs == 0 else f" {value}"
    names = ", ".join(f"`{option}{value}`" for option in action.option_strings)
    return names or f"`{action.metavar or action.dest}`"


if __name__ == "__main__":
    TARGET.write_text(reference(), encoding="utf-8")
    print(f"wrote {TARGET.relative_to(ROOT)}")
