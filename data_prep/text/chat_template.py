"""The tokenizer's own chat template as a dialect: ``template: tokenizer``.

Samples are never written by running a template's program over them: text that spells a special token would become one.
Instead the template writes a few conversations of known words, a dialect is read off what stands around the words, and
the dialect must then write other conversations to the letter as the template does, with the same parts generated. A
template that a dialect cannot express, or that does not mark what the assistant says with ``{% generation %}`` (so that
nothing would be supervised), is refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from data_prep.common.errors import UserError
from data_prep.example import Example, Role, Turn
from data_prep.text.template import OWN, Special, Template, Text

Token = tuple[str, bool]
"""Text, or the name of a special token (True)."""
_SAID = (
    "QuietSystem",
    "FirstQuestion",
    "FirstAnswer",
    "SecondQuestion",
    "SecondAnswer",
    "ThirdQuestion",
    "ThirdAnswer",
)
_ROLES: tuple[Role, ...] = ("system", "user", "assistant", "user", "assistant", "user", "assistant")
_SETTINGS = {"bos_token": "", "eos_token": "", "date_string": "26 Jul 2024"}


class _Refused(Exception):  # noqa: N818 - becomes a UserError that names the folder
    """Why a chat template cannot be used."""


def chat_format_of(folder: Path, system: str) -> str:
    """Return how the chat template of a tokenizer writes turns, as JSON for ``Template.own``.

    Args:
        folder: with ``tokenizer.json`` and a chat template.
        system: of the pack set; without one the template must leave conversations without a system turn as they are.

    Raises:
        UserError: there is no chat template, it marks nothing as generated, or a dialect cannot express it.
    """
    try:
        source, specials, settings = _read(folder)
        own = _derive(source, specials, settings)
        lengths = [range(3), range(5), range(7), *([] if system else [range(1, 3), range(1, 5)])]
        for places in lengths:
            _compare(own, source, settings, [(_ROLES[at], _SAID[at]) for at in places])
    except _Refused as problem:
        raise UserError(f"{folder}: its chat template {problem}; use a template by name (phi3, llama3, qwen)") from None
    return own


def _read(folder: Path) -> tuple[str, list[str], dict[str, str]]:
    """Return the template's source, the special tokens' names, and what its program may ask for."""
    try:
        added = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8")).get("added_tokens", [])
        config_file = folder / "tokenizer_config.json"
        config = json.loads(config_file.read_text(encoding="utf-8")) if config_file.is_file() else {}
    except (OSError, ValueError) as error:
        raise UserError(f"{folder}: template=tokenizer needs a readable tokenizer.json ({error})") from error
    separate = folder / "chat_template.jinja"
    source = separate.read_text(encoding="utf-8") if separate.is_file() else config.get("chat_template")
    if isinstance(source, list):  # several, by name
        source = next((one["template"] for one in source if one.get("name") == "default"), None)
    if not isinstance(source, str):
        raise _Refused("is missing")
    named = {key: config.get(key) for key in ("bos_token", "eos_token")}
    names = {key: value.get("content") if isinstance(value, dict) else value for key, value in named.items()}
    specials = [token["content"] for token in added if token.get("special")]
    return source, specials, _SETTINGS | {key: value for key, value in names.items() if value}


def _render(
    source: str, settings: dict[str, str], said: Sequence[tuple[str, str]]
) -> tuple[str, list[tuple[int, int]]]:
    """Return what the template writes, and where it says that text is generated."""
    from jinja2 import TemplateError
    from transformers.utils.chat_template_utils import render_jinja_template

    messages = [{"role": role, "content": text} for role, text in said]
    try:
        [text], [spans] = render_jinja_template(
            [messages], chat_template=source, return_assistant_tokens_mask=True, **settings
        )
    except TemplateError as error:
        raise _Refused(f"refuses a plain conversation ({error})") from error
    if not any(end > start for start, end in spans):
        raise _Refused("marks no text as generated ({% generation %}), so nothing would be supervised")
    return text, [(start, end) for start, end in spans]


def _derive(source: str, specials: Sequence[str], settings: dict[str, str]) -> str:
    text, _ = _render(source, settings, list(zip(_ROLES[:5], _SAID[:5], strict=True)))
    around = re.split("|".join(_SAID), text)
    if re.findall("|".join(_SAID), text) != list(_SAID[:5]):
        raise _Refused("does not write every turn once, in order")
    before_system, before_user, before_assistant = (_tokens(part, specials) for part in around[:3])
    end, between, user = _split(before_user)
    _, _, assistant = _split(before_assistant)
    opening = len(before_system) - len(user)
    if opening < 0:
        raise _Refused("writes a system turn in another way than a user's")
    headers = {"system": before_system[opening:], "user": user, "assistant": assistant}
    chat_format: dict[str, Any] = {
        "headers": headers,
        "end": end,
        "start": before_system[:opening],
        "turn_separator": between,
    }
    return json.dumps({**chat_format, "image_separator": "\n"}, sort_keys=True)


def _tokens(text: str, specials: Sequence[str]) -> list[Token]:
    """Cut text at the special tokens it spells, the longest first."""
    if not specials:
        raise _Refused("knows no special token")
    names = "|".join(re.escape(name) for name in sorted(specials, key=len, reverse=True))
    return [(part, part in specials) for part in re.split(f"({names})", text) if part]


def _split(tokens: list[Token]) -> tuple[str, str, list[Token]]:
    """Return the end of a turn, what stands between turns, and the header of the next turn."""
    if not tokens or not tokens[0][1]:
        raise _Refused("ends turns without a special token")
    rest = tokens[1:]
    between = rest[0][0] if rest and not rest[0][1] else ""
    header = rest[1:] if between else rest
    if not header:
        raise _Refused("opens turns without a special token")
    return tokens[0][0], between, header


def _compare(own: str, source: str, settings: dict[str, str], said: Sequence[tuple[Role, str]]) -> None:
    """Refuse a template that writes a conversation in another way than the dialect read off it."""
    theirs, marked = _render(source, settings, said)
    template = Template(OWN, own=own)
    pieces = template.pieces(Example("probe", tuple(Turn(role, (text,)) for role, text in said)))
    ours, spans = "", list[tuple[int, int]]()
    for piece in pieces:
        assert isinstance(piece, Text | Special), "a conversation without images"
        start, ours = len(ours), ours + (piece.text if isinstance(piece, Text) else piece.token)
        if piece.generated and spans and spans[-1][1] == start:
            spans[-1] = spans[-1][0], len(ours)
        elif piece.generated:
            spans.append((start, len(ours)))
    assert template.chat_format is not None
    between, shape = template.chat_format.turn_separator, " ".join(role for role, _ in said)
    if theirs not in (ours, ours + between):
        hint = ": set system" if said[0][0] == "user" and _SAID[0] not in theirs else ""
        raise _Refused(f"writes a conversation of {shape} in a way of its own{hint}")
    for (start, end), (first, last) in zip(spans, marked, strict=False):
        if first != start or last not in (end, end + len(between)):
            raise _Refused("marks other text as generated than an answer and the end of its turn")
    if len(spans) != len(marked) or any(second[0] < first[1] for first, second in pairwise(marked)):
        raise _Refused("does not mark every answer as generated once")
