"""Seeded scenes of coloured shapes with questions that cannot be answered without looking.

Answers are balanced by construction. Each question family is a deck of cards, one per (question, answer) pair. Every
scene is dealt one card from each family and composed to satisfy all three. A deck deals all of its cards before it
repeats one, so all answers to a given question string are equally frequent: the question alone reveals nothing.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import ClassVar, Generic, NamedTuple, TypeAlias, TypeVar

SHAPES = ("circle", "square", "triangle", "ring")
COLOURS = ("red", "green", "blue", "yellow")
SIZES = ("small", "big")
GRID = 4
FEWEST, MOST = 4, 8
MAX_COUNT = 4
Pair: TypeAlias = tuple[str, str]


class Look(NamedTuple):
    """What an object looks like, independent of its position."""

    size: str
    colour: str
    shape: str

    @property
    def pair(self) -> Pair:
        """Colour and shape: the subject of *exist* and *count* questions."""
        return self.colour, self.shape

    def __str__(self) -> str:
        return f"{self.size} {self.colour} {self.shape}"


LOOKS = tuple(Look(*look) for look in product(SIZES, COLOURS, SHAPES))


class Thing(NamedTuple):
    """An object in a cell of the grid (row-major), shifted by ``dx, dy`` pixels in -1..1."""

    look: Look
    cell: int
    dx: int
    dy: int

    @property
    def place(self) -> str:
        """Position in words."""
        row, column = divmod(self.cell, GRID)
        return f"row {row + 1} column {column + 1}"


@dataclass(frozen=True, slots=True)
class ColourCard:
    """``what colour is the big ring?``: only one object has this size and shape."""

    size: str
    shape: str
    colour: str
    family: ClassVar[str] = "colour"

    @property
    def question(self) -> str:
        """The exact question string."""
        return f"what colour is the {self.size} {self.shape}?"

    @property
    def answer(self) -> str:
        """The answer: a colour, each equally likely."""
        return self.colour

    @property
    def claim(self) -> tuple[Pair, bool]:
        """A colour and shape, and whether the scene must hold them together."""
        return (self.colour, self.shape), True

    def holds(self, looks: Sequence[Look]) -> bool:
        """Return whether the question is well posed in the scene and has this answer."""
        return [look.colour for look in looks if (look.size, look.shape) == (self.size, self.shape)] == [self.colour]


@dataclass(frozen=True, slots=True)
class ExistCard:
    """``is there a red circle?``: if the answer is no, the scene still holds the colour and the shape separately."""

    colour: str
    shape: str
    present: bool
    family: ClassVar[str] = "exist"

    @property
    def question(self) -> str:
        """The exact question string."""
        return f"is there a {self.colour} {self.shape}?"

    @property
    def answer(self) -> str:
        """The answer, yes or no, equally likely."""
        return "yes" if self.present else "no"

    @property
    def claim(self) -> tuple[Pair, bool]:
        """A colour and shape, and whether the scene must hold them together."""
        return (self.colour, self.shape), self.present

    def holds(self, looks: Sequence[Look]) -> bool:
        """Return whether the question is well posed in the scene and has this answer."""
        colour_seen = any(look.colour == self.colour for look in looks)
        shape_seen = any(look.shape == self.shape for look in looks)
        together = any(look.pair == (self.colour, self.shape) for look in looks)
        return colour_seen and shape_seen and together == self.present


@dataclass(frozen=True, slots=True)
class CountCard:
    """``how many red circles are there?``: 0 to 4, equally likely."""

    colour: str
    shape: str
    number: int
    family: ClassVar[str] = "count"

    @property
    def question(self) -> str:
        """The exact question string."""
        return f"how many {self.colour} {self.shape}s are there?"

    @property
    def answer(self) -> str:
        """The answer as a digit."""
        return str(self.number)

    @property
    def claim(self) -> tuple[Pair, bool]:
        """A colour and shape, and whether the scene must hold them together."""
        return (self.colour, self.shape), self.number > 0

    def holds(self, looks: Sequence[Look]) -> bool:
        """Return whether the question has this answer in the scene."""
        return sum(look.pair == (self.colour, self.shape) for look in looks) == self.number


Card: TypeAlias = ColourCard | ExistCard | CountCard
CardT = TypeVar("CardT", ColourCard, ExistCard, CountCard)


@dataclass(frozen=True, slots=True)
class Scene:
    """Description of one picture: its objects in reading order and one question per family."""

    things: tuple[Thing, ...]
    cards: tuple[Card, ...]

    @property
    def looks(self) -> list[Look]:
        """The objects' looks without their positions."""
        return [thing.look for thing in self.things]

    def caption(self) -> str:
        """List every object with its position, in reading order."""
        return "; ".join(f"{thing.place}: a {thing.look}" for thing in self.things)

    def unique_things(self) -> list[Thing]:
        """Return the objects with a unique look, for referring expressions."""
        return [thing for thing in self.things if self.looks.count(thing.look) == 1]


class Deck(Generic[CardT]):
    """Deals all cards equally often, skipping cards that do not fit the current hand."""

    def __init__(self, cards: Sequence[CardT], rng: random.Random) -> None:
        self._cards: Sequence[CardT] = cards
        self._rng = rng
        self._left: list[CardT] = []

    def deal(self, fits: Callable[[CardT], bool]) -> CardT:
        """Deal the next card that fits; if none is left, first add a shuffled full deck."""
        chosen = next((position for position, card in enumerate(self._left) if fits(card)), None)
        if chosen is None:
            self._left += self._rng.sample(self._cards, len(self._cards))
            chosen = next(position for position, card in enumerate(self._left) if fits(card))
        return self._left.pop(chosen)


def agree(card: Card, others: Sequence[Card]) -> bool:
    """Return whether a card is consistent with the others about the presence of a colour and shape."""
    pair, present = card.claim
    return (pair, not present) not in [other.claim for other in others]


def draw_scenes(number: int, seed: str) -> Iterator[Scene]:
    """Yield ``number`` scenes; the same seed yields the same scenes."""
    rng = random.Random(seed)
    counts = Deck([CountCard(*card) for card in product(COLOURS, SHAPES, range(MAX_COUNT + 1))], rng)
    colours = Deck([ColourCard(*card) for card in product(SIZES, SHAPES, COLOURS)], rng)
    exists = Deck([ExistCard(*card) for card in product(COLOURS, SHAPES, (False, True))], rng)
    for _ in range(number):
        count = counts.deal(partial(agree, others=()))
        colour = colours.deal(partial(agree, others=(count,)))
        exist = exists.deal(partial(agree, others=(count, colour)))
        yield Scene(_place(_compose(colour, exist, count, rng), rng), (colour, exist, count))


def _compose(colour: ColourCard, exist: ExistCard, count: CountCard, rng: random.Random) -> list[Look]:
    """Choose objects that satisfy all three cards; the cards are consistent, so this always succeeds."""
    asked_apart = (exist.colour, exist.shape) if not exist.present else None
    asked_number = (count.colour, count.shape)
    beside_anchor = [look for look in LOOKS if (look.size, look.shape) != (colour.size, colour.shape)]
    free = [look for look in beside_anchor if look.pair not in (asked_apart, asked_number)]

    looks = [Look(colour.size, colour.colour, colour.shape)]
    counted = [look for look in beside_anchor if look.pair == asked_number]
    looks += [rng.choice(counted) for _ in range(count.number - (looks[0].pair == asked_number))]
    if exist.present and not exist.holds(looks):
        looks.append(rng.choice([look for look in free if look.pair == (exist.colour, exist.shape)]))
    if not any(look.colour == exist.colour for look in looks):
        looks.append(rng.choice([look for look in free if look.colour == exist.colour]))
    if not any(look.shape == exist.shape for look in looks):
        looks.append(rng.choice([look for look in free if look.shape == exist.shape]))
    looks += [rng.choice(free) for _ in range(rng.randint(FEWEST, MOST) - len(looks))]
    assert all(card.holds(looks) for card in (colour, exist, count)), (colour, exist, count, looks)
    return looks


def _place(looks: Sequence[Look], rng: random.Random) -> tuple[Thing, ...]:
    """Place the objects in distinct cells, slightly off centre; return them in reading order."""
    cells = rng.sample(range(GRID * GRID), len(looks))
    things = [
        Thing(look, cell, rng.randint(-1, 1), rng.randint(-1, 1)) for look, cell in zip(looks, cells, strict=True)
    ]
    return tuple(sorted(things, key=lambda thing: thing.cell))
