"""A quick look at a corpus before its samples are read: a wrong image folder should be one error, not a million."""

from __future__ import annotations

from data_prep.common.errors import UserError
from data_prep.corpora.base import Corpus
from data_prep.example import Reject

PROBED = 50
"""Samples looked at in the beginning, in the middle and at the end of a corpus."""
TOLERANT = 0.9
"""From this ``max_bad_fraction`` on nothing is checked: all probed samples of a usable corpus may lack their images."""


def require_some_images(place: str, corpus: Corpus, max_bad_fraction: float) -> None:
    """Check that not every probed sample lacks its images.

    Args:
        place: the corpus in the recipe, such as ``corpora.vqav2``.
        corpus: its reader.
        max_bad_fraction: of the recipe.

    Raises:
        UserError: none of the probed images exists.
    """
    if max_bad_fraction >= TOLERANT:
        return
    missing = []
    for item in corpus.probe(PROBED):
        if isinstance(item, Reject):
            if item.code == "missing-image":
                missing.append(str(item.missing_file or item.detail))
            continue
        for image in item.images:
            if image.data is not None or image.path is None or image.path.is_file():
                return
            missing.append(str(image.path))
    if missing:
        raise UserError(
            f"{place}: none of the {len(missing)} probed images found under {corpus.root}, first: {missing[0]}; "
            "fix the recipe's root or the corpus's image folder"
        )
