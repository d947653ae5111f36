"""Quarantine: every unusable sample is rejected with a reason code, counted per corpus and listed in a file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from data_prep.common.errors import UserError

CODES: Mapping[str, str] = {
    "bad-json": "the row or member is not JSON",
    "bad-row": "the row cannot be decoded from its Parquet or Arrow file",
    "too-large": "the row, tar member or image file exceeds the size limit of a reader",
    "unsupported-media": "the sample contains video or audio, which is not supported",
    "missing-key": "a required key is missing or has the wrong type",
    "missing-image": "the image file does not exist or cannot be read",
    "unsafe-path": "a path is absolute, contains '..' or is a link out of its folder",
    "empty-text": "the caption or question is empty",
    "no-answer": "the sample has no answer to learn",
    "bad-box": "the box is empty after clipping to the image",
    "duplicate-id": "an earlier sample of this corpus has the same id",
    "bad-encoding": "the text is not valid UTF-8, or contains NUL or a lone surrogate",
    "bad-label": "the label, role or index is not one the format allows",
    "empty-file": "the image file has no bytes",
    "not-an-image": "the bytes are in no supported image format",
    "broken-image": "the image is truncated or damaged",
    "image-bomb": "the image exceeds the decompression-bomb limit of pixels",
    "tiny-image": "the image is smaller than 2 x 2 pixels",
    "odd-pixels": "the pixel format cannot be converted to RGB",
    "damaged-tar": "the tar is damaged; the samples after the damage are lost until it is downloaded again",
    "too-long": "the sample exceeds the token limits of its pack set",
    "too-many-images": "the sample has more images than its pack set allows",
    "no-target": "no token of the sample would be supervised",
    "wrong-template": "a conversation cannot be written by a template for documents",
}
"""Closed list of reject codes: code -> one-line meaning."""
DAMAGED_FILES = frozenset({"damaged-tar"})
"""Codes of a raw file that is lost from some place on, not of one sample."""


REPAIRS: Mapping[str, str] = {
    "image-dropped": "an image of an interleaved document was missing or broken and was dropped",
    "misnamed-image": "an image has another format than its file name says",
}
"""Closed list of repairs, which are counted while the sample is kept: code -> one-line meaning."""


class BadSample(Exception):  # noqa: N818 - an outcome of one sample, not a fault of the program
    """One sample cannot be used; carries its code (a key of ``CODES``) and a detail that helps to fix it.

    ``missing_file`` is the file it lacks, if any.
    """

    def __init__(self, code: str, detail: str = "", missing_file: Path | None = None) -> None:
        assert code in CODES, code
        super().__init__(f"{code}: {detail}" if detail else code)
        self.code = code
        self.detail = detail
        self.missing_file = missing_file


@dataclass(frozen=True, slots=True)
class Tally:
    """Counts of a corpus's samples; always ``seen == kept + rejected``."""

    kept: int = 0
    codes: Mapping[str, int] = field(default_factory=dict)
    """Rejected samples by reason code."""
    repairs: Mapping[str, int] = field(default_factory=dict)
    """Repairs in kept samples, by the codes of ``REPAIRS``."""

    @property
    def rejected(self) -> int:
        """Number of rejected samples."""
        return sum(self.codes.values())

    @property
    def seen(self) -> int:
        """Number of samples in the raw files; a conversation may yield several (``turns: expand``)."""
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
    """Check the rejected fraction of every corpus.

    Args:
        tallies: recipe key of a corpus -> tallies of its shards.
        limit: largest fraction of samples, or of tars, that a corpus may lose.
        listing: the list of rejects, for the message.

    Raises:
        UserError: a corpus lost more than ``limit`` of its samples or of its tars, or all samples.
    """
    for place, shards in tallies.items():
        tally = add_tallies(shards)
        if tally.seen == 0:
            raise UserError(f"{place}: its raw files contain no samples; check its paths")
        fraction = tally.rejected / tally.seen
        if tally.kept == 0 or fraction > limit:
            raise UserError(
                f"{place}: {tally.rejected} of {tally.seen} samples ({fraction:.1%}) were rejected, "
                f"above max_bad_fraction={limit:g}: {tally.describe_codes()}; "
                f"see `mma-prep rejects {listing.parent}`; fix the data or raise max_bad_fraction"
            )
        damaged = sum("damaged-tar" in shard.codes for shard in shards)  # one reject, however many samples are lost
        if damaged / len(shards) > limit:
            raise UserError(
                f"{place}: {damaged} of {len(shards)} tars are damaged, above max_bad_fraction={limit:g}; "
                f"`mma-prep rejects {listing.parent}` lists them: download them again or raise max_bad_fraction"
            )
