"""Prompt templates: an example becomes pieces of text, special tokens and images, each given or generated.

Templates are data: a *dialect* says how a model family writes a turn. Training and inference call the same code
(``pieces`` begins with exactly what ``prompt_pieces`` returns), so they cannot disagree.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Literal, TypeAlias, get_args

from data_prep.errors import UserError, did_you_mean
from data_prep.example import Example, Part, Role, Turn
from data_prep.packs import Manifest
from data_prep.quarantine import BadSample

EOS = "<eos>"
"""Stands for the tokenizer's own end-of-text token, whatever it is called there."""
Order: TypeAlias = Literal["image_first", "text_first", "as_written"]
ROLES: tuple[Role, ...] = get_args(Role)


@dataclass(frozen=True, slots=True)
class Text:
    """Ordinary text; it never yields a special token, whatever it spells."""

    text: str
    generated: bool = False


@dataclass(frozen=True, slots=True)
class Special:
    """One special token, by its name in the tokenizer."""

    token: str
    generated: bool = False


@dataclass(frozen=True, slots=True)
class Image:
    """The place of image ``index`` (reading order within the example)."""

    index: int


Piece: TypeAlias = Text | Special | Image


@dataclass(frozen=True, slots=True)
class Dialect:
    """How a model family writes a conversation."""

    headers: Mapping[str, tuple[Piece, ...]]
    """What opens a turn, by role."""
    end: str
    """The special token that ends a turn; supervised where the turn is generated."""
    start: tuple[Piece, ...] = ()
    """What opens the conversation."""
    between: str = ""
    """Text between the end of a turn and the next header."""
    joint: str = ""
    """Text between an image and what follows it inside a turn."""

    @property
    def specials(self) -> tuple[str, ...]:
        """Names of all special tokens the dialect writes."""
        pieces = [*self.start, *(piece for header in self.headers.values() for piece in header)]
        names = [piece.token for piece in pieces if isinstance(piece, Special)]
        return tuple(dict.fromkeys([*names, self.end]))


_LLAMA3_HEADERS: Mapping[str, tuple[Piece, ...]] = {
    role: (Special("<|start_header_id|>"), Text(role), Special("<|end_header_id|>"), Text("\n\n")) for role in ROLES
}
DIALECTS: Mapping[str, Dialect | None] = {
    "caption": None,
    "plain": Dialect({role: (Special(f"<{role}>"),) for role in ROLES}, "<end>"),
    "phi3": Dialect(
        {role: (Special(f"<|{role}|>"), Text("\n")) for role in ROLES}, "<|end|>", between="\n", joint="\n"
    ),
    "llama3": Dialect(_LLAMA3_HEADERS, "<|eot_id|>", start=(Special("<|begin_of_text|>"),), joint="\n"),
    "qwen": Dialect(
        {role: (Special("<|im_start|>"), Text(f"{role}\n")) for role in ROLES}, "<|im_end|>", between="\n", joint="\n"
    ),
}
"""Registered templates; ``caption`` writes documents only, the others write documents and conversations."""


@dataclass(frozen=True, slots=True)
class Template:
    """A named template with its settings.

    Raises:
        UserError: the name is not registered, or ``system`` is given to a template without turns.
    """

    name: str
    system: str = ""
    """System turn put before conversations that bring none; empty for no system turn."""
    prompt: str = ""
    """Given text between the images of a document and what is generated."""
    order: Order = "image_first"
    """Where the images of a user turn go: before its text, after it, or where the corpus has them."""

    def __post_init__(self) -> None:
        if self.name not in DIALECTS:
            known = ", ".join(DIALECTS)
            raise UserError(f"template {self.name!r} is unknown{did_you_mean(self.name, DIALECTS)}: use one of {known}")
        if self.system and self.dialect is None:
            raise UserError(f"template {self.name!r} has no turns, so system={self.system!r} has no place: remove it")

    @property
    def dialect(self) -> Dialect | None:
        """How turns are written; None where the template writes documents only."""
        return DIALECTS[self.name]

    @property
    def specials(self) -> tuple[str, ...]:
        """Special tokens the tokenizer must know."""
        return (EOS, *(self.dialect.specials if self.dialect else ()))

    @property
    def ends(self) -> tuple[str, ...]:
        """Special tokens that end a generated turn."""
        return (EOS,) if self.dialect is None else (self.dialect.end, EOS)

    def pieces(self, example: Example) -> list[Piece]:
        """Return a whole example for training. Raises BadSample where the template cannot write its kind."""
        if example.kind == "document":
            return self._document(example.turns)
        return self._chat(example.turns)

    def prompt_pieces(self, turns: Sequence[Turn]) -> list[Piece]:
        """Return what the model is given at inference: everything up to and including the assistant's header.

        A last assistant turn in ``turns`` (the answer) is dropped.
        """
        asked = turns[:-1] if turns and turns[-1].role == "assistant" else turns
        if self.dialect is None:
            return self._document(asked, open_ended=True)
        dialect = self.dialect
        before = [Text(dialect.between)] if dialect.between and self._with_system(asked) else []
        return [*self._chat(asked), *before, *dialect.headers["assistant"]]

    def _document(self, turns: Sequence[Turn], *, open_ended: bool = False) -> list[Piece]:
        numbers = count()
        given = [part for turn in turns if turn.role != "assistant" for part in turn.parts]
        pieces = list(_parts(given, numbers, generated=False))
        if self.prompt:
            pieces.append(Text(self.prompt))
        for turn in turns:
            if turn.role == "assistant":
                pieces += _parts(turn.parts, numbers, generated=True)
        return pieces if open_ended else [*pieces, Special(EOS, generated=True)]

    def _with_system(self, turns: Sequence[Turn]) -> Sequence[Turn]:
        if not self.system or (turns and turns[0].role == "system"):
            return turns
        return [Turn("system", (self.system,)), *turns]

    def _chat(self, turns: Sequence[Turn]) -> list[Piece]:
        dialect = self.dialect
        if dialect is None:
            raise BadSample("wrong-template", f"template {self.name!r} cannot write a conversation")
        numbers = count()
        pieces = list(dialect.start)
        for position, turn in enumerate(self._with_system(turns)):
            generated = turn.role == "assistant"
            if position and dialect.between:
                pieces.append(Text(dialect.between))
            pieces += dialect.headers[turn.role]
            pieces += _parts(self._arranged(turn, dialect.joint), numbers, generated=generated)
            pieces.append(Special(dialect.end, generated))
        return pieces

    def _arranged(self, turn: Turn, joint: str) -> Sequence[Part]:
        if turn.role != "user" or self.order == "as_written":
            return turn.parts
        images = [part for part in turn.parts if not isinstance(part, str)]
        text = "".join(part for part in turn.parts if isinstance(part, str)).strip()
        if self.order == "image_first":
            return [*(part for image in images for part in (image, joint)), text]
        return [text, *(part for image in images for part in (joint, image))]


def _parts(parts: Iterable[Part], numbers: Iterator[int], *, generated: bool) -> Iterator[Piece]:
    """Yield the pieces of parts in order; images are numbered as they come and are always given."""
    for part in parts:
        if not isinstance(part, str):
            yield Image(next(numbers))
        elif part:
            yield Text(part, generated)


def template_of(manifest: Manifest) -> Template:
    """Return the template that packs were written with, for writing prompts at inference."""
    settings = manifest.recipe
    return Template(
        manifest.template,
        system=settings.get("system", ""),
        prompt=settings.get("prompt", ""),
        order=settings.get("order", "image_first"),
    )
