"""Dirty data: every unusable sample is rejected with a reason code, counted per corpus and listed in a file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from data_prep.common.errors import UserError

CODES: Mapping[str, str] = {
    "bad-json": "the line or member is not JSON",
    "missing-key": "a key the format demands is absent or of another type",
    "missing-image": "the image file does not exist or cannot be read",
    "unsafe-path": "a path is absolute, climbs with '..' or is a link",
    "empty-text": "the caption or question is empty",
    "no-answer": "there is no answer to learn",
    "bad-box": "the box is empty after clipping to the image",
    "duplicate-id": "the id was seen before in this corpus",
    "bad-encoding": "the text is not valid UTF-8, or holds NUL or a lone surrogate",
    "bad-label": "the label is none of the format's labels",
    "empty-file": "the image file holds no bytes",
    "not-an-image": "the bytes are of no image format that is read",
    "broken-image": "the image is truncated or damaged",
    "image-bomb": "the image has more pixels than the decompression-bomb limit",
    "tiny-image": "the image is smaller than 2 x 2 pixels",
    "odd-pixels": "the pixel format cannot be turned into RGB",
    "damaged-tar": "the tar cannot be read from some place on: what follows there is lost until it is downloaded again",
    "too-long": "the sample does not fit the token limits of its packs",
    "too-many-images": "the sample holds more images than its packs allow",
    "no-target": "no token of the sample would be supervised",
    "wrong-template": "a conversation met a template that writes documents only",
}
"""Closed list of reasons: code -> one-line meaning."""
DAMAGED_FILES = frozenset({"damaged-tar"})
"""Codes of a raw file that is lost from some place on, not of one sample."""


REPAIRS: Mapping[str, str] = {
    "image-dropped": "an image of an interleaved document is missing or broken, and was left out",
    "misnamed-image": "an image is of another format than its file name says",
}
"""Closed list of what is mended and counted, the sample being kept: code -> one-line meaning."""


class BadSample(Exception):  # noqa: N818 - an outcome of one sample, not a fault of the program
    """One sample cannot be used; carries its code (a key of ``CODES``) and words that help to mend it.

    ``sought`` is the file that is missing, where one is.
    """

    def __init__(self, code: str, detail: str = "", sought: Path | None = None) -> None:
        assert code in CODES, code
        super().__init__(f"{code}: {detail}" if detail else code)
        self.code = code
        self.detail = detail
        self.sought = sought


@dataclass(frozen=True, slots=True)
class Tally:
    """What became of the samples that a corpus's raw files give; always ``seen == kept + rejected``."""

    kept: int = 0
    codes: Mapping[str, int] = field(default_factory=dict)
    """Rejected samples by reason code."""
    repairs: Mapping[str, int] = field(default_factory=dict)
    """What was mended in kept samples, by the codes of ``REPAIRS``."""

    @property
    def rejected(self) -> int:
        """Samples that were rejected, over all codes."""
        return sum(self.codes.values())

    @property
    def seen(self) -> int:
        """Samples that the raw files give; a conversation may give several (``turns: expand``)."""
        return self.kept + self.rejected

    def describe_codes(self) -> str:
        """Return ``12 broken-image, 3 too-long``, most frequent first."""
        ordered = sorted(self.codes.items(), key=lambda item: (-item[1], item[0]))
        return ", ".join(f"{count} {code}" for code, count in ordered)


def add_tallies(tallies: Iterable[Tally]) -> Tally:
    """Return the sum of several tallies."""
    kept, codes, repairs = 0, Counter[str](), Counter[str]()
    for tally in tallies:
        kept += tally.kept
        codes.update(tally.codes)
        repairs.update(tally.repairs)
    return Tally(kept, dict(sorted(codes.items())), dict(sorted(repairs.items())))


def check_bad_fraction(tallies: Mapping[str, Sequence[Tally]], limit: float, listing: Path) -> None:
    """Check what became of corpora; ``tallies`` holds those of a corpus's units under the key a user knows it by.

    Raises:
        UserError: a corpus lost more than ``limit`` of its samples or of its tars, or all samples.
    """
    for place, units in tallies.items():
        tally = add_tallies(units)
        if tally.seen == 0:
            raise UserError(f"{place}: the raw files hold no sample at all; mend its paths")
        fraction = tally.rejected / tally.seen
        if tally.kept == 0 or fraction > limit:
            raise UserError(
                f"{place}: {tally.rejected} of {tally.seen} samples ({fraction:.1%}) were rejected, "
                f"above max_bad_fraction={limit:g}: {tally.describe_codes()}; "
                f"`mma-prep rejects {listing.parent}` shows what {listing.name} lists; "
                "mend the data or raise max_bad_fraction"
            )
        damaged = sum("damaged-tar" in unit.codes for unit in units)  # each is one reject, whatever it held
        if damaged / len(units) > limit:
            raise UserError(
                f"{place}: {damaged} of {len(units)} tars are damaged, above max_bad_fraction={limit:g}; "
                f"`mma-prep rejects {listing.parent}` names them: download them again, or raise max_bad_fraction"
            )
