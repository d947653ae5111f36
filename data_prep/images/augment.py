"""Augmentation that stays truthful: which samples an image may be mirrored or cropped for, and how it then is.

A mirrored image makes "the cup on the left" a lie, and a cropped one "three cups". So every sample is asked first:
its whole text is searched for words that speak of sides, orientation, places, counts or written text, and only an
image of which none of it speaks is changed. (Writing in an image that no text speaks of is mirrored with it; the text
stays true.) The lists err towards leaving images alone. They are English: text with other letters allows nothing, and
a corpus in another language of the same letters must not ask for augmentation. What is done to an image is decided
for every draw by a hash of seed, corpus, sample and draw, and written into the pack, so it does not depend on ranks,
and a resumed run sees the same pixels.
"""

from __future__ import annotations

import re
from typing import Annotated

import numpy as np
import numpy.typing as npt
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field

from data_prep.common.seeding import seeded
from data_prep.example import Example

FLIP, CROP = 1, 2
"""Bits of what a sample allows."""
UNIT = 1000
"""Views are written in thousandths of an image's width and height."""
WHOLE = (0, 0, 0, UNIT, UNIT)
Augmentations = npt.NDArray[np.int16]
"""int16[images, 5]: mirrored (0 or 1), then left, top, width and height of what is kept, in thousandths."""

INSTRUCTIONS = (
    "answer the question using a single word or phrase",
    "answer with the option's letter from the given choices",
)
"""Sentences of prompts that speak of the answer, not of the image; they are not searched."""
SIDES = """left right leftmost rightmost lefthand righthand leftward rightward leftwards
rightwards side sides sided sideways east west eastern western eastward westward northeast
northwest southeast southwest clockwise counterclockwise anticlockwise starboard
portside"""
ORIENTATION = """orientation oriented facing faces direction directions heading towards toward mirror mirrors mirrored
mirroring reflected reflection flipped rotated rotation turned turning tilted tilting leaning pointing points profile
upside inverted reversed backwards backward chirality handed handedness"""
READING = """read reads reading readable legible text texts letter letters lettering word words writing written
handwriting handwritten wrote spell spells spelled spelling says say saying said name names named number numbers
numeral numerals digit digits font title titles headline label labels labeled labelled logo logos brand brands branded
sign signs signage signboard poster posters banner banners billboard billboards license licence jersey print prints
printed engraved inscription inscribed alphabet language page pages book books newspaper magazine menu keyboard clock
clocks time graffiti tattoo symbol symbols flag flags barcode scoreboard score price prices date dates
calendar document documents receipt ticket map maps chart charts graph graphs plot diagram diagrams quote quotes
quotation slogan message screenshot website subtitle subtitles stamp coin coins banknote"""
PLACES = """top bottom corner corners edge edges border borders center centre middle background foreground behind
front near nearest nearby close closest closer far farther farthest further furthest distance distant next above below
under underneath beneath over between beside besides adjacent opposite upper lower position positioned positions
location located locations where place placed region area box boxes bounding bbox coordinate coordinates pixel pixels
axis axes frame framed visible hidden outside inside whole entire full"""
COUNTING = """count counts counting counted many few several some any all both each every none no total amount
quantity pair pairs couple couples trio dozen dozens single only just lone alone another other others multiple various
group zero one two three four five six seven eight nine ten eleven twelve twenty hundred first second third last more
most less least fewer there"""
_BOXES = "box boxes bounding bbox coordinate coordinates pixel pixels axis axes"
_MIRROR_SHOWS = frozenset(" ".join((SIDES, ORIENTATION, READING, _BOXES)).split())
_CROP_SHOWS = _MIRROR_SHOWS | frozenset(" ".join((PLACES, COUNTING)).split())
_WORD = re.compile(r"[a-z]+")
_MARK = re.compile(r"[\d\"\u201c\u201d\u00ab\u00bb]")
_QUOTED = re.compile(r"(?<!\w)['\u2018][^'\u2019]+['\u2019](?!\w)")
_FOREIGN = re.compile(r"[^\W\d_a-z]")


class Augment(BaseModel):
    """What may be done to the images of a corpus, where the text of a sample allows it."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    flip: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Share of draws whose images are mirrored, left to right."""
    crop: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Smallest share of an image's area that a random crop keeps; 1 for no crops."""

    @property
    def bits(self) -> int:
        """What it asks for."""
        return FLIP * (self.flip > 0) + CROP * (self.crop < 1)


def allowed(text: str) -> int:
    """Return what a text allows to be done to its images: bits of ``FLIP`` and ``CROP``."""
    searched = text.lower()
    for sentence in INSTRUCTIONS:
        searched = searched.replace(sentence, "")
    if _beyond_words(searched):
        return 0
    words = set(_WORD.findall(searched))
    return FLIP * words.isdisjoint(_MIRROR_SHOWS) + CROP * words.isdisjoint(_CROP_SHOWS)


def _beyond_words(text: str) -> bool:
    """Return whether a text holds numbers, quotations (mostly of what is read) or letters English does not have."""
    return bool(
        _MARK.search(text)
        or (("'" in text or "\u2018" in text) and _QUOTED.search(text))
        or (not text.isascii() and _FOREIGN.search(text))
    )


def allowed_by(example: Example) -> int:
    """Return what all texts of an example allow; nothing where it has no image or boxes were drawn on one."""
    images = example.images
    if not images or any(image.annotated_size is not None for image in images):
        return 0
    return allowed("\n".join(part for turn in example.turns for part in turn.parts if isinstance(part, str)))


def draw_augmentations(augment: Augment, allows: int, images: int, *key: object) -> Augmentations:
    """Return the views of one draw's images, by ``key`` alone; all of its images are mirrored, or none."""
    numbers = seeded(*key, "views").random((images + 1, 4))
    augmentations = np.tile(np.array(WHOLE, dtype=np.int16), (images, 1))
    augmentations[:, 0] = bool(allows & FLIP) and numbers[0, 0] < augment.flip
    if allows & CROP and augment.crop < 1:
        area = augment.crop + (1 - augment.crop) * numbers[1:, 0]
        width = area ** numbers[1:, 1]
        sides = np.ceil(UNIT * np.stack([width, area / width], axis=1)).clip(1, UNIT)  # the share kept is no smaller
        augmentations[:, 1:3] = np.floor((UNIT + 1 - sides) * numbers[1:, 2:])
        augmentations[:, 3:] = sides
    return augmentations


def apply_augmentation(image: Image.Image, augmentation: npt.NDArray[np.int16]) -> Image.Image:
    """Return an image as a draw shows it: cropped, then mirrored; the image itself where nothing is to be done."""
    mirrored, left, top, width, height = augmentation.tolist()
    if (width, height) != (UNIT, UNIT):
        sides = np.array([image.width, image.height])
        first = np.array([left, top]) * sides // UNIT
        last = np.maximum(-(-np.array([left + width, top + height]) * sides // UNIT), first + 1)
        image = image.crop((*first.tolist(), *last.tolist()))
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if mirrored else image


def describe_augmentation(augmentation: npt.NDArray[np.int16]) -> str:
    """Return ``mirrored, 93% of its area``; nothing for a whole image."""
    words = ["mirrored"] if augmentation[0] else []
    kept = int(augmentation[3]) * int(augmentation[4]) / UNIT**2
    return ", ".join([*words, f"{kept:.0%} of its area"] if kept < 1 else words)
