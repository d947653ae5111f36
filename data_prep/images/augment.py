"""Augmentation that keeps the text true: which images may be mirrored or cropped, and how they are.

Mirroring makes "the cup on the left" wrong; cropping makes "three cups" wrong. So the text of every sample is searched
for words about sides, orientation, places, counts or written text, and an image is changed only if it has none of them.
(Writing in an image that no text mentions is mirrored, too; the text stays true.) The word lists prefer leaving images
alone. They are English: text with other letters allows nothing, and a corpus in another language with the same letters
must not ask for augmentation. A hash of seed, corpus, sample and draw decides what happens to each image. The result is
written into the pack, so it does not depend on ranks, and a resumed run sees the same pixels.
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
"""Bits of the augmentations a sample allows."""
UNIT = 1000
"""Augmentations are stored in thousandths of the image width and height."""
WHOLE = (0, 0, 0, UNIT, UNIT)
Augmentations = npt.NDArray[np.int16]
"""int16[images, 5]: mirrored (0 or 1), then left, top, width and height of the kept area, in thousandths."""

INSTRUCTIONS = (
    "answer the question using a single word or phrase",
    "answer with the option's letter from the given choices",
)
"""Prompt sentences about the answer, not the image; they are not searched."""
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
    """Augmentation of the images of a corpus, applied only where the text of a sample allows it."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    flip: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Share of draws whose images are mirrored left to right."""
    crop: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Smallest share of the image area that a random crop keeps; 1 for no crops."""

    @property
    def bits(self) -> int:
        """Bits of the augmentations it asks for."""
        return FLIP * (self.flip > 0) + CROP * (self.crop < 1)


def allowed(text: str) -> int:
    """Return the augmentations a text allows: bits of ``FLIP`` and ``CROP``."""
    searched = text.lower()
    for sentence in INSTRUCTIONS:
        searched = searched.replace(sentence, "")
    if _beyond_words(searched):
        return 0
    words = set(_WORD.findall(searched))
    return FLIP * words.isdisjoint(_MIRROR_SHOWS) + CROP * words.isdisjoint(_CROP_SHOWS)


def _beyond_words(text: str) -> bool:
    """Return whether a text holds digits, quotations (mostly of written text) or non-English letters."""
    return bool(
        _MARK.search(text)
        or (("'" in text or "\u2018" in text) and _QUOTED.search(text))
        or (not text.isascii() and _FOREIGN.search(text))
    )


def allowed_by(example: Example) -> int:
    """Return the augmentations that all texts of an example allow; none without images or with annotated boxes."""
    images = example.images
    if not images or any(image.annotated_size is not None for image in images):
        return 0
    return allowed("\n".join(part for turn in example.turns for part in turn.parts if isinstance(part, str)))


def draw_augmentations(augment: Augment, allows: int, images: int, *key: object) -> Augmentations:
    """Return the augmentations of the images of one draw, determined by ``key``; all images are mirrored or none."""
    numbers = seeded(*key, "views").random((images + 1, 4))
    augmentations = np.tile(np.array(WHOLE, dtype=np.int16), (images, 1))
    augmentations[:, 0] = bool(allows & FLIP) and numbers[0, 0] < augment.flip
    if allows & CROP and augment.crop < 1:
        area = augment.crop + (1 - augment.crop) * numbers[1:, 0]
        width = area ** numbers[1:, 1]
        sides = np.ceil(UNIT * np.stack([width, area / width], axis=1)).clip(
            1, UNIT
        )  # rounded up: the kept share is no smaller
        augmentations[:, 1:3] = np.floor((UNIT + 1 - sides) * numbers[1:, 2:])
        augmentations[:, 3:] = sides
    return augmentations


def apply_augmentation(image: Image.Image, augmentation: npt.NDArray[np.int16]) -> Image.Image:
    """Return the augmented image: cropped, then mirrored; the image itself if there is nothing to do."""
    mirrored, left, top, width, height = augmentation.tolist()
    if (width, height) != (UNIT, UNIT):
        sides = np.array([image.width, image.height])
        first = np.array([left, top]) * sides // UNIT
        last = np.maximum(-(-np.array([left + width, top + height]) * sides // UNIT), first + 1)
        image = image.crop((*first.tolist(), *last.tolist()))
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if mirrored else image


def describe_augmentation(augmentation: npt.NDArray[np.int16]) -> str:
    """Return ``mirrored, 93% of its area``; empty for an unchanged image."""
    words = ["mirrored"] if augmentation[0] else []
    kept = int(augmentation[3]) * int(augmentation[4]) / UNIT**2
    return ", ".join([*words, f"{kept:.0%} of its area"] if kept < 1 else words)
