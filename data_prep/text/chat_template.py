"""The tokenizer's own chat template as a `ChatFormat`: ``template: tokenizer``.

Samples are never rendered by the template's program: text that spells a special token would become one. Instead the
template renders a few probe conversations, a chat format is derived from the text around their known words, and that
format must then reproduce other probes exactly: the text, what is generated, and the prompt of every answer.

Answers are located by the template's ``{% generation %}`` marks. Without marks, an answer is what a conversation adds
to its own prompt (``add_generation_prompt``), provided that each rendered prompt is a prefix of the conversation. A
template that a chat format cannot reproduce is refused with the reason.

The template of a vision-language model is given contents in parts, and further probes with images.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeAlias

from data_prep.common.errors import UserError, one_line
from data_prep.example import Example, ImageRef, Role, Turn
from data_prep.text.jinja_sandbox import Content, Message, Rendering, Request, TemplateError, render
from data_prep.text.template import CHAT_FORMATS, OWN, Image, Piece, Template, Text

Token: TypeAlias = tuple[str, bool]
"""Text, or the name of a special token (True)."""
Span: TypeAlias = tuple[int, int]
_WORDS = (
    "QuietSystem",
    "FirstQuestion",
    "FirstAnswer",
    "SecondQuestion",
    "SecondAnswer",
    "ThirdQuestion",
    "ThirdAnswer",
)
_OTHER_WORDS = (
    "Be brief.\nAnswer in 3 words.",
    "1. What?\n\n2. Why?",
    "- a ring\n- a box",
    "Sure?",
    "Yes: {it} is 100%.",
)
_ROLES: tuple[Role, ...] = ("system", "user", "assistant", "user", "assistant", "user", "assistant")
_SETTINGS = {"bos_token": "", "eos_token": "", "date_string": "26 Jul 2024"}
_MARKED = re.compile(r"\{%-?\s*generation\s*-?%\}")
_MAX_BYTES = 1 << 20


class _Refused(Exception):  # noqa: N818 - becomes a UserError that names the folder
    """Why a chat template cannot be used."""


def chat_format_of(folder: Path, system: str, image: str = "") -> str:
    """Return the chat format of a tokenizer's chat template, as JSON for ``Template.own``.

    Args:
        folder: with ``tokenizer.json`` and a chat template.
        system: system turn of the pack set. Without one, the template must not add one of its own.
        image: what the template of a vision-language model writes for an image; empty for a language model's.

    Raises:
        UserError: there is no chat template, it cannot be rendered, or a chat format cannot reproduce it.
    """
    try:
        source, specials, settings = _read(folder)
        return _derive(source, specials, tuple(sorted(settings.items())), bool(system), image)
    except (_Refused, TemplateError) as problem:
        names = ", ".join(name for name in CHAT_FORMATS if name not in ("caption", "plain"))
        raise UserError(f"{folder}: its chat template {problem}; use a template by name ({names})") from None


def _read(folder: Path) -> tuple[str, tuple[str, ...], dict[str, str]]:
    """Return the template's source, the names of the special tokens, and the template's variables."""
    try:
        added = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8")).get("added_tokens", [])
        specials = tuple(token["content"] for token in added if token.get("special"))
        config_file = folder / "tokenizer_config.json"
        config = json.loads(config_file.read_text(encoding="utf-8")) if config_file.is_file() else {}
        separate = folder / "chat_template.jinja"
        source = separate.read_text(encoding="utf-8") if separate.is_file() else config.get("chat_template")
        older = folder / "chat_template.json"  # where processors of earlier releases kept theirs
        if source is None and older.is_file():
            source = json.loads(older.read_text(encoding="utf-8"))["chat_template"]
        if isinstance(source, list):  # several, by name
            source = next((one["template"] for one in source if one.get("name") == "default"), None)
        named = {key: config.get(key) for key in ("bos_token", "eos_token")}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(
            f"{folder}: template=tokenizer needs a readable tokenizer.json ({one_line(error)}); copy it again"
        ) from error
    if not isinstance(source, str):
        raise _Refused("is missing")
    if len(source) > _MAX_BYTES:
        raise _Refused(f"is larger than {_MAX_BYTES:,} characters")
    names = {key: value.get("content") if isinstance(value, dict) else value for key, value in named.items()}
    return source, specials, _SETTINGS | {key: value for key, value in names.items() if isinstance(value, str)}


def _probes() -> list[tuple[Message, ...]]:
    """Return conversations of one to three exchanges with a system turn, then the same ones without."""
    first = [tuple(zip(_ROLES[:count], _WORDS[:count], strict=True)) for count in (3, 5, 7)]
    probes = [*first, tuple(zip(_ROLES[:5], _OTHER_WORDS, strict=True))]
    return [*probes, *(probe[1:] for probe in probes)]


def _image_probes(*, has_system: bool) -> list[tuple[Message, ...]]:
    """Return conversations with one image, two images, and an image in the second question."""
    system = (("system", _WORDS[0]),) if has_system else ()
    first, second = _WORDS[1:3], _WORDS[3:5]
    turns = {
        count: (("user", (*[None] * count, first[0])), ("assistant", first[1])) for count in (1, 2)
    }  # fmt: skip
    later = (("user", first[0]), ("assistant", first[1]), ("user", (None, second[0])), ("assistant", second[1]))
    return [(*system, *turns[1]), (*system, *turns[2]), (*system, *later)]


@dataclass(frozen=True, slots=True)
class _Rendered:
    """What a template writes."""

    marked: bool
    """Whether it marks what is generated."""
    renderings: Mapping[Request, Rendering]
    in_parts: bool
    """The template takes contents in parts."""

    @classmethod
    def of(cls, source: str, settings: Mapping[str, str], *, in_parts: bool, has_system: bool) -> _Rendered:
        """Render all probes, with every beginning of them that ends before or after an answer."""
        images = _image_probes(has_system=has_system) if in_parts else []
        requests = dict.fromkeys(
            _request(probe[:end], prompt, in_parts=in_parts)
            for probe in [*_probes(), *images]
            for place in _answers(probe)
            for end, prompt in ((place, True), (place + 1, False))
        )
        found = dict(zip(requests, render(source, settings, list(requests)), strict=True))
        return cls(bool(_MARKED.search(source)), found, in_parts)

    def text(self, messages: tuple[Message, ...], *, prompt: bool = False) -> str:
        """Return the text of a conversation, or of the prompt of its next answer."""
        found = self.renderings[_request(messages, prompt, in_parts=self.in_parts)]
        if found.error:
            raise _Refused(f"refuses a plain conversation ({found.error})")
        return found.text

    def takes(self, messages: tuple[Message, ...]) -> bool:
        """Return whether the template accepts a conversation."""
        return not self.renderings[_request(messages, in_parts=self.in_parts)].error

    def generated(self, messages: tuple[Message, ...]) -> list[Span]:
        """Return what is generated: one span of characters per answer.

        Raises:
            _Refused: nothing is marked, or the prompts are not prefixes of the conversation.
        """
        whole = self.text(messages)
        if self.marked:
            spans = list(self.renderings[_request(messages, in_parts=self.in_parts)].generated)
            if not any(end > start for start, end in spans):
                raise _Refused("marks no text as generated ({% generation %}), so nothing would be supervised")
            return spans
        return [self._added(whole, messages, place) for place in _answers(messages)]

    def _added(self, whole: str, messages: tuple[Message, ...], place: int) -> Span:
        """Return the span that the answer at ``place`` adds to its prompt."""
        prompt, answered = self.text(messages[:place], prompt=True), self.text(messages[: place + 1])
        which = f"up to turn {place + 1} of {len(messages)}"
        for name, part in (("its prompt", prompt), ("the conversation", answered)):
            if not whole.startswith(part):
                raise _Refused(
                    f"has no {{% generation %}} marks, and {name} {which} is written in another way inside a longer "
                    "conversation, so answers cannot be located"
                )
        return len(prompt), len(answered)


def _request(messages: tuple[Message, ...], prompt: bool = False, *, in_parts: bool) -> Request:
    if in_parts:
        messages = tuple((role, (said,) if isinstance(said, str) else said) for role, said in messages)
    return Request(messages, prompt)


def _answers(messages: Sequence[Message]) -> list[int]:
    return [place for place, (role, _) in enumerate(messages) if role == "assistant"]


@lru_cache(maxsize=8)
def _derive(
    source: str, specials: tuple[str, ...], settings: tuple[tuple[str, str], ...], has_system: bool, image: str
) -> str:
    """Return the first candidate that reproduces every probe; raise the reason of the first that does not."""
    rendered = _Rendered.of(source, dict(settings), in_parts=bool(image), has_system=has_system)
    probes = _probes()
    with_system, without = probes[: len(probes) // 2], probes[len(probes) // 2 :]
    if not rendered.takes(with_system[0]):
        rendered.text(without[0])
        if has_system:
            raise _Refused("takes no system turn: remove system")
        with_system = []
    checked = [*with_system, *([] if has_system else without)]
    reasons = []
    for candidate in _candidates(rendered, specials, checked[1]):
        try:
            if image:
                candidate = _with_images(candidate, rendered, image, has_system=has_system)
            own = json.dumps(candidate, sort_keys=True)
            for messages in [*checked, *(_image_probes(has_system=has_system) if image else ())]:
                _compare(own, rendered, messages, image)
        except _Refused as problem:
            reasons.append(problem)
        else:
            return own
    raise reasons[0]


def _candidates(
    rendered: _Rendered, specials: Sequence[str], messages: tuple[Message, ...]
) -> Iterator[dict[str, Any]]:
    """Yield chat formats that fit the text around the words of a conversation of two exchanges."""
    text, words = rendered.text(messages), [str(content) for _, content in messages]
    lines = rendered.in_parts
    if re.findall("|".join(_WORDS), text) != words:
        raise _Refused("does not write every turn once, in order")
    around = re.split("|".join(words), text)
    before_answer, before_question = around[-4], around[-3]
    start = rendered.generated(messages)[0][0]
    prefix = text[start : text.index(words[-3])] if start < text.index(words[-3]) else ""
    if not before_answer.endswith(prefix) or any(special for _, special in _tokens(prefix, specials)):
        raise _Refused(
            "marks other text as generated than an answer and the end of its turn"
            if rendered.marked
            else "has no {% generation %} marks and does not write the header of an answer as a prompt "
            "(add_generation_prompt), so answers cannot be located"
        )
    end, between, user = _split_turns(_tokens(before_question, specials, lines=lines))
    footer, assistant = _split_answer(_tokens(before_answer.removesuffix(prefix), specials, lines=lines), between)
    chat_format: dict[str, Any] = {
        "headers": {"user": user, "assistant": assistant},
        "end": end,
        "start": [],
        "turn_separator": between,
        "image_separator": "\n",
    }
    chat_format |= {"answer_prefix": prefix} if prefix else {}
    footers = {} if footer == [(end, True)] else {"user": footer}
    opening = _tokens(around[0], specials, lines=lines)
    if len(messages) % 2 == 0:
        yield _with_start(chat_format, opening, user) | ({"footers": footers} if footers else {})
        return
    after_system = _tokens(around[1], specials, lines=lines)
    if not any(special for _, special in after_system):  # the system text begins the user's turn
        yield (
            _with_start(chat_format, opening, user)
            | {"system_joiner": around[1]}
            | ({"footers": footers} if footers else {})
        )
        return
    closing = _without_suffix(after_system, [*([(between, False)] if between else []), *user])
    footers |= {} if closing == [(end, True)] else {"system": closing}
    chat_format |= {"footers": footers} if footers else {}
    for place in dict.fromkeys((max(0, len(opening) - len(user)), 1, 0)):
        headers = {**chat_format["headers"], "system": opening[place:]}
        yield chat_format | {"headers": headers, "start": opening[:place]}


def _with_images(chat_format: dict[str, Any], rendered: _Rendered, image: str, *, has_system: bool) -> dict[str, Any]:
    """Return a chat format with the text around images, from a question with no, one and two images."""
    one, two, later = map(rendered.text, _image_probes(has_system=has_system))
    word, user = _WORDS[1], list(chat_format["headers"]["user"])
    plain = later[: later.index(word)]  # up to the first question, which has no image
    before, *after = one[: one.index(word)].split(image)
    if len(after) != 1 or len(parts := two[: two.index(word)].split(image)) != 3 or not plain.startswith(before):
        raise _Refused(f"does not write {image} once for an image before the text of its turn")
    text_start = plain.removeprefix(before)
    if text_start:
        text, special = user[-1]
        if special or not text.endswith(text_start):
            raise _Refused("begins a turn with an image in another way than a turn without")
        user[-1] = (text.removesuffix(text_start), False)
    headers = {**chat_format["headers"], "user": [piece for piece in user if piece[0]]}
    return chat_format | {
        "headers": headers, "text_start": text_start, "image_separator": after[0], "image_gap": parts[1]
    }  # fmt: skip


def _with_start(chat_format: dict[str, Any], opening: list[Token], user: list[Token]) -> dict[str, Any]:
    return chat_format | {"start": _without_suffix(opening, user)}


def _without_suffix(tokens: list[Token], suffix: list[Token]) -> list[Token]:
    if tokens[len(tokens) - len(suffix) :] != suffix:
        raise _Refused("opens the first turn of a user in another way than the next ones")
    return tokens[: len(tokens) - len(suffix)]


def _tokens(text: str, specials: Sequence[str], *, lines: bool = False) -> list[Token]:
    """Split text at the special tokens it spells, the longest first; with ``lines`` also after leading line breaks.

    Idefics 3 ends a turn with a special token and a line break, and begins the next one with plain text.
    """
    if not specials:
        raise _Refused("knows no special token")
    names = "|".join(re.escape(name) for name in sorted(specials, key=len, reverse=True))
    found = [part for part in re.split(f"({names})", text) if part]
    if lines:
        found = [each for part in found for each in re.split(r"(^\n+)(?=[^\n])", part) if each]
    return [(part, part in specials) for part in found]


def _split_turns(tokens: list[Token]) -> tuple[str, str, list[Token]]:
    """Split the text between an answer and the next question: end of turn, separator, header of the user."""
    if not tokens or not tokens[0][1]:
        raise _Refused("ends turns without a special token")
    rest = tokens[1:]
    between = rest[0][0] if rest and not rest[0][1] else ""
    header = rest[1:] if between else rest
    if not header:
        raise _Refused("opens turns without a special token")
    return tokens[0][0], between, header


def _split_answer(tokens: list[Token], between: str) -> tuple[list[Token], list[Token]]:
    """Split the text between a question and its answer: end of the user's turn, header of the assistant."""
    if not tokens or not tokens[0][1]:
        raise _Refused("ends turns without a special token")
    footer, rest = tokens[:1], tokens[1:]
    if between:
        if rest[:1] != [(between, False)]:
            raise _Refused("separates turns in several ways")
        rest = rest[1:]
        if not rest:
            raise _Refused("opens turns without a special token")
    return footer, rest


def _compare(own: str, rendered: _Rendered, messages: tuple[Message, ...], image: str = "") -> None:
    """Refuse a template whose text, generated spans or prompts differ from those of the chat format derived from it."""
    theirs, marked = rendered.text(messages), rendered.generated(messages)
    template = Template(OWN, own=own)
    turns = tuple(Turn(role, _example_parts(said)) for role, said in messages)  # type: ignore[arg-type]
    ours, spans = _written(template.pieces(Example("probe", turns)), image)
    assert template.chat_format is not None
    between, shape = template.chat_format.turn_separator, " ".join(role for role, _ in messages)
    if theirs not in (ours, ours + between):
        hint = ": set system" if messages[0][0] == "user" and "system" in json.loads(own)["headers"] else ""
        raise _Refused(f"writes a conversation of {shape} in a way of its own{hint}")
    for (start, end), (first, last) in zip(spans, marked, strict=False):
        if first != start or last not in (end, end + len(between)):
            raise _Refused("marks other text as generated than an answer and the end of its turn")
    if len(spans) != len(marked) or any(second[0] < first[1] for first, second in pairwise(marked)):
        raise _Refused("does not mark every answer as generated once")
    for place in () if rendered.marked else _answers(messages):
        if rendered.text(messages[:place], prompt=True) != _written(template.prompt_pieces(turns[:place]), image)[0]:
            raise _Refused(f"writes the prompt of turn {place + 1} in a way of its own")


def _example_parts(said: Content) -> tuple[str | ImageRef, ...]:
    return (said,) if isinstance(said, str) else tuple(ImageRef("probe") if part is None else part for part in said)


def _written(pieces: Iterable[Piece], image: str) -> tuple[str, list[Span]]:
    """Return the text of pieces, with ``image`` for an image, and the spans of it that are generated."""
    text, spans = "", list[Span]()
    for piece in pieces:
        if isinstance(piece, Image):
            text += image
            continue
        start, text = len(text), text + (piece.text if isinstance(piece, Text) else piece.token)
        if piece.generated and spans and spans[-1][1] == start:
            spans[-1] = spans[-1][0], len(text)
        elif piece.generated:
            spans.append((start, len(text)))
    return text, spans
