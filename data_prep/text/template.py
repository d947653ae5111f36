"""Prompt templates: turn an example into pieces of text, special tokens and images, each given or generated.

Templates are data: a `ChatFormat` describes how a model family writes a turn. Training and inference share the code:
``pieces`` begins with exactly what ``prompt_pieces`` returns.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Literal, TypeAlias, get_args

from data_prep.common.errors import UserError, did_you_mean
from data_prep.example import Example, Part, Role, Turn
from data_prep.packs import Manifest
from data_prep.quarantine import BadSample
from data_prep.text.turns import Turns

EOS = "<eos>"
"""Alias of the tokenizer's own end-of-text token."""
AKI_CHUNK_END = "<|endofchunk|>"
"""Token that the released AKI writes after every caption."""
Order: TypeAlias = Literal["image_first", "text_first", "as_written"]
ROLES: tuple[Role, ...] = get_args(Role)


@dataclass(frozen=True, slots=True)
class Text:
    """Ordinary text; never encoded as a special token, even if it spells one."""

    text: str
    generated: bool = False
    isolated: bool = False
    """Encoded separately from neighbouring text, so an earlier answer keeps the ids it had when generated."""


@dataclass(frozen=True, slots=True)
class Special:
    """One special token, by its name in the tokenizer."""

    token: str
    generated: bool = False


@dataclass(frozen=True, slots=True)
class Image:
    """The position of image ``index`` (reading order within the example)."""

    index: int


Piece: TypeAlias = Text | Special | Image
ImageMarks: TypeAlias = tuple[tuple[tuple[str, bool], ...], ...]
"""Pieces before and after an image, each (text, whether it names a special token); empty for none."""


@dataclass(frozen=True, slots=True)
class ChatFormat:
    """How a model family writes a conversation."""

    headers: Mapping[str, tuple[Piece, ...]]
    """What begins a turn, by role."""
    end: str
    """The special token that ends a turn; supervised where the turn is generated."""
    start: tuple[Piece, ...] = ()
    """What begins the conversation."""
    turn_separator: str = ""
    """Text between the end of a turn and the next header."""
    image_separator: str = ""
    """Text between an image and the content after it inside a turn."""
    footers: Mapping[str, tuple[Piece, ...]] = field(default_factory=dict)
    """What ends a turn, by role, where it is not ``end``."""
    system_joiner: str | None = None
    """Set if the system text has no turn of its own: it begins the first user turn, followed by this text."""
    answer_prefix: str = ""
    """Generated text before every answer."""
    image_gap: str | None = None
    """Text between two images inside a turn; None: ``image_separator``."""
    text_start: str = ""
    """Text before the content of a user's turn that begins with text."""

    @property
    def takes_system(self) -> bool:
        """Whether conversations may begin with a system turn."""
        return "system" in self.headers or self.system_joiner is not None

    @property
    def specials(self) -> tuple[str, ...]:
        """Names of all special tokens this format writes."""
        parts = (self.start, *self.headers.values(), *self.footers.values())
        pieces = [piece for part in parts for piece in part]
        names = [piece.token for piece in pieces if isinstance(piece, Special)]
        return tuple(dict.fromkeys([*names, self.end]))


_LLAMA3_HEADERS: Mapping[str, tuple[Piece, ...]] = {
    role: (Special("<|start_header_id|>"), Text(role), Special("<|end_header_id|>"), Text("\n\n")) for role in ROLES
}
_CHATML = ChatFormat(
    {role: (Special("<|im_start|>"), Text(f"{role}\n")) for role in ROLES},
    "<|im_end|>",
    turn_separator="\n",
    image_separator="\n",
)
_GEMMA_ROLES = {"user": "user", "assistant": "model"}
CHAT_FORMATS: Mapping[str, ChatFormat | None] = {
    "caption": None,
    "plain": ChatFormat({role: (Special(f"<{role}>"),) for role in ROLES}, "<end>"),
    "phi3": ChatFormat(
        {role: (Special(f"<|{role}|>"), Text("\n")) for role in ROLES},
        "<|end|>",
        turn_separator="\n",
        image_separator="\n",
    ),
    "llama3": ChatFormat(_LLAMA3_HEADERS, "<|eot_id|>", start=(Special("<|begin_of_text|>"),), image_separator="\n"),
    "qwen": _CHATML,
    "chatml": _CHATML,
    "gemma": ChatFormat(
        {role: (Special("<start_of_turn>"), Text(f"{name}\n")) for role, name in _GEMMA_ROLES.items()},
        "<end_of_turn>",
        start=(Special("<bos>"),),
        turn_separator="\n",
        image_separator="\n",
        system_joiner="\n\n",
    ),
    "vicuna": ChatFormat(
        {"user": (Text("USER: "),), "assistant": (Text("ASSISTANT:"),)},
        "</s>",
        start=(Special("<s>"),),
        image_separator="\n",
        footers={"user": (Text(" "),)},
        system_joiner="\n\n",
        answer_prefix=" ",
    ),
    "mistral": ChatFormat(
        {"system": (Special("[SYSTEM_PROMPT]"),), "user": (Special("[INST]"),), "assistant": ()},
        "</s>",
        start=(Special("<s>"),),
        image_separator="\n",
        footers={"system": (Special("[/SYSTEM_PROMPT]"),), "user": (Special("[/INST]"),)},
    ),
}
"""Templates by name. ``caption`` writes documents only; the others write documents and conversations.

``gemma`` is Gemma 2 and 3; ``mistral`` is Mistral's V7-Tekken format (Mistral Small 3 and later; without a system turn
also V3-Tekken: Nemo, Pixtral); ``vicuna`` is LLaVA-1.5's. No name adds a default system turn: set ``system``.
"""
OWN = "tokenizer"
"""Name of the template that follows the tokenizer's own chat template (``data_prep.text.chat_template``)."""


@functools.lru_cache(maxsize=8)
def _chat_format_from_json(own: str) -> ChatFormat:
    """Parse a chat format from JSON; a piece is ``[text, is_special]``."""
    raw = json.loads(own)

    def pieces(listed: Sequence[tuple[str, bool]]) -> tuple[Piece, ...]:
        return tuple(Special(text) if special else Text(text) for text, special in listed)

    def by_role(table: Mapping[str, Sequence[tuple[str, bool]]]) -> dict[str, tuple[Piece, ...]]:
        return {role: pieces(listed) for role, listed in table.items()}

    return ChatFormat(
        by_role(raw["headers"]),
        raw["end"],
        pieces(raw["start"]),
        raw["turn_separator"],
        raw["image_separator"],
        by_role(raw.get("footers", {})),
        raw.get("system_joiner"),
        raw.get("answer_prefix", ""),
        raw.get("image_gap"),
        raw.get("text_start", ""),
    )


@dataclass(frozen=True, slots=True)
class Template:
    """A named template with its settings.

    Raises:
        UserError: the name is unknown, or a template without turns is given a setting about turns.
    """

    name: str
    system: str = ""
    """System turn for conversations without one; empty for none."""
    prompts: tuple[str, ...] = ()
    """Given texts; one is put beside the images of a document without given text. Inference uses the first."""
    order: Order = "image_first"
    """Position of images: before or after the text of their user turn (or their document's prompt), or as written.

    With ``as_written`` a document's prompt follows its images.
    """
    turns: Turns = "every"
    """See ``data_prep.text.turns``; with ``expand`` only the last answer is generated."""
    own: str = ""
    """The chat format of the template ``tokenizer``, as JSON."""
    chunk_end: str = ""
    """Special token after every generated text of a document; empty for none."""
    image_marks: ImageMarks = ()
    """What stands before and after the tokens of every image, if anything, as the model's processor writes it."""

    def __post_init__(self) -> None:
        if self.name not in CHAT_FORMATS and not (self.name == OWN and self.own):
            known = [*CHAT_FORMATS, OWN]
            hint = did_you_mean(self.name, known)
            raise UserError(f"template {self.name!r} is unknown{hint}: use one of {', '.join(known)}")
        if self.system and self.chat_format is None:
            raise UserError(f"template {self.name!r} has no turns, so system={self.system!r} cannot be used: remove it")
        if self.turns != "every" and self.chat_format is None:
            raise UserError(f"template {self.name!r} has no turns, so turns={self.turns} cannot be used: remove it")
        if self.system and self.chat_format is not None and not self.chat_format.takes_system:
            raise UserError(f"template {self.name!r} has no system turn, so system={self.system!r} cannot be used")
        if self.order == "text_first" and self.chat_format is None and not self.prompts:
            raise UserError(
                f"template {self.name!r} has no given text to put first: set prompts, or remove order=text_first"
            )
        object.__setattr__(self, "prompts", tuple(self.prompts))  # settings from JSON hold lists
        marks = tuple(tuple((str(text), bool(special)) for text, special in side) for side in self.image_marks)
        object.__setattr__(self, "image_marks", marks)

    @property
    def chat_format(self) -> ChatFormat | None:
        """How turns are written; None if the template writes documents only."""
        return _chat_format_from_json(self.own) if self.own else CHAT_FORMATS[self.name]

    @property
    def specials(self) -> tuple[str, ...]:
        """Special tokens the tokenizer must have."""
        chunk_end = (self.chunk_end,) if self.chunk_end else ()
        marks = dict.fromkeys(text for side in self.image_marks for text, special in side if special)
        return (EOS, *chunk_end, *(self.chat_format.specials if self.chat_format else ()), *marks)

    @property
    def ends(self) -> tuple[str, ...]:
        """Special tokens that end a generated turn."""
        return (EOS,) if self.chat_format is None else (self.chat_format.end, EOS)

    def pieces(self, example: Example, prompt: str = "") -> list[Piece]:
        """Return the pieces of a whole example for training.

        Args:
            example: with ``turns="expand"``, one of its excerpts; only the last answer is supervised.
            prompt: given text for a document that takes a prompt.

        Raises:
            BadSample: the template cannot write this kind of example.
        """
        if example.kind == "document":
            return self._marked(self._document(example.turns, prompt, open_ended=example.continues))
        return self._marked(self._chat(example.turns, answered=True))

    def takes_prompt(self, example: Example) -> bool:
        """Return whether an example takes a prompt: a document of images followed by one text."""
        roles = [turn.role for turn in example.turns]
        captions = roles.count("assistant") == 1 and roles[-1] == "assistant"
        return bool(self.prompts) and example.kind == "document" and captions and _only_images(example.turns)

    def prompt_pieces(self, turns: Sequence[Turn]) -> list[Piece]:
        """Return the prompt for inference: everything up to and including the assistant's header.

        A final assistant turn in ``turns`` (the answer) is dropped.
        """
        asked = turns[:-1] if turns and turns[-1].role == "assistant" else turns
        if self.chat_format is None:
            prompt = self.prompts[0] if self.prompts and _only_images(asked) else ""
            return self._marked(self._document(asked, prompt, open_ended=True))
        chat_format = self.chat_format
        before = [Text(chat_format.turn_separator)] if chat_format.turn_separator and self._with_system(asked) else []
        return self._marked([*self._chat(asked, answered=False), *before, *chat_format.headers["assistant"]])

    def _marked(self, pieces: list[Piece]) -> list[Piece]:
        """Write the marks around every image."""
        if not self.image_marks:
            return pieces
        before, after = (
            [Special(text) if special else Text(text) for text, special in side] for side in self.image_marks
        )
        around = ([*before, piece, *after] if isinstance(piece, Image) else [piece] for piece in pieces)
        return [each for pieces_of_one in around for each in pieces_of_one]

    def _document(self, turns: Sequence[Turn], prompt: str, *, open_ended: bool = False) -> list[Piece]:
        numbers = count()
        pieces: list[Piece] = []
        for turn in turns:
            generated = turn.role == "assistant"
            pieces += _parts(turn.parts, numbers, generated=generated)
            if generated and self.chunk_end:
                pieces.append(Special(self.chunk_end, generated=True))
        if prompt:
            given = next((place for place, piece in enumerate(pieces) if _is_generated(piece)), len(pieces))
            pieces.insert(0 if self.order == "text_first" else given, Text(prompt))
        return pieces if open_ended else [*pieces, Special(EOS, generated=True)]

    def _with_system(self, turns: Sequence[Turn]) -> Sequence[Turn]:
        if not self.system or (turns and turns[0].role == "system"):
            return turns
        return [Turn("system", (self.system,)), *turns]

    def _chat(self, turns: Sequence[Turn], *, answered: bool) -> list[Piece]:
        """Write turns; ``answered`` means that the last turn is the answer to generate."""
        chat_format = self.chat_format
        if chat_format is None:
            raise BadSample("wrong-template", f"template {self.name!r} cannot write a conversation")
        turns = self._with_system(turns)
        if turns and turns[0].role == "system" and not chat_format.takes_system:
            raise BadSample("wrong-template", f"template {self.name!r} has no system turn")
        history = len(turns) - answered if self.turns == "expand" else 0
        numbers, joined, system = count(), chat_format.system_joiner, ""
        pieces = list(chat_format.start)
        for position, turn in enumerate(turns):
            if turn.role == "system" and joined is not None:
                system = "".join(part for part in turn.parts if isinstance(part, str)) + joined
                continue
            if len(pieces) > len(chat_format.start) and chat_format.turn_separator:
                pieces.append(Text(chat_format.turn_separator))
            pieces += chat_format.headers[turn.role]
            if system:
                pieces.append(Text(system))
                system = ""
            if turn.role == "assistant":
                pieces += self._answer(turn, numbers, generated=position >= history)
                continue
            pieces += _parts(self._arranged(turn, chat_format), numbers, generated=False)
            pieces += chat_format.footers.get(turn.role, (Special(chat_format.end),))
        return pieces

    def _answer(self, turn: Turn, numbers: Iterator[int], *, generated: bool) -> list[Piece]:
        """Write an answer with the end of its turn; one that is not generated keeps its ids by standing alone."""
        assert self.chat_format is not None
        prefix = (self.chat_format.answer_prefix,) if self.chat_format.answer_prefix else ()
        said = _parts((*prefix, *turn.parts), numbers, generated=generated, isolated=True)
        return [*said, Special(self.chat_format.end, generated)]

    def _arranged(self, turn: Turn, chat_format: ChatFormat) -> Sequence[Part]:
        if turn.role != "user":
            return turn.parts
        if self.order == "as_written":
            first = turn.parts[0] if turn.parts else ""
            return [chat_format.text_start, *turn.parts] if isinstance(first, str) else turn.parts
        separator, gap = chat_format.image_separator, chat_format.image_gap
        gap = separator if gap is None else gap
        images = [part for part in turn.parts if not isinstance(part, str)]
        text = _sentence([part for part in turn.parts if isinstance(part, str)])
        between = [part for image in images for part in (image, gap)][:-1]
        if not images:
            return [chat_format.text_start, text]
        if self.order == "image_first":
            return [*between, separator, text]
        return [chat_format.text_start, text, separator, *between]


def _sentence(texts: Sequence[str]) -> str:
    """Join the texts around images that were moved: with a line break if there was one, else with a space.

    A single text stays exactly as it is: AKI's prompts for multiple-choice questions end with a line break.
    """
    if len(texts) == 1:
        return texts[0]
    whole = ""
    for text in texts:
        bare = whole.rstrip()
        border = whole[len(bare) :] + text[: len(text) - len(text.lstrip())]
        whole = bare + ("\n" if "\n" in border else " ") + text.lstrip()
    return whole.strip()


def _is_generated(piece: Piece) -> bool:
    return not isinstance(piece, Image) and piece.generated


def _only_images(turns: Iterable[Turn]) -> bool:
    """Return whether the given turns hold images and no text."""
    given = [part for turn in turns if turn.role != "assistant" for part in turn.parts if part != ""]
    return bool(given) and not any(isinstance(part, str) for part in given)


def _parts(
    parts: Iterable[Part], numbers: Iterator[int], *, generated: bool, isolated: bool = False
) -> Iterator[Piece]:
    """Yield the pieces of parts in order; images are numbered in order and always given."""
    for part in parts:
        if not isinstance(part, str):
            yield Image(next(numbers))
        elif part:
            yield Text(part, generated, isolated=isolated and not generated)


def template_of(manifest: Manifest) -> Template:
    """Return the template that packs were written with, to write prompts at inference."""
    settings = manifest.recipe
    return Template(
        manifest.template,
        system=settings.get("system", ""),
        prompts=tuple(settings.get("prompts", ())),
        order=settings.get("order", "image_first"),
        turns=settings.get("turns", "every"),
        own=settings.get("chat_format", ""),
        chunk_end=AKI_CHUNK_END if settings.get("aki_parity") else "",
        image_marks=settings.get("image_marks", ()),
    )
