"""Caption prompts: short given texts beside the image, one drawn at random for every draw of a caption.

Without a prompt, no given text follows the image of a caption, and Modality-Mutual Attention unlocks nothing in
pre-training. Captions are tokenised once, without a prompt; the plan draws the prompts and packing inserts their ids.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from data_prep.common.seeding import seeded
from data_prep.ingest.samples import Sample
from data_prep.text.template import Text
from data_prep.text.tokenizer import Tokenizer

NO_PROMPT = -1
"""Marks a draw without a prompt."""


def prompt_ids(tokenizer: Tokenizer, prompts: Sequence[str]) -> list[list[int]]:
    """Return the token ids of each prompt; they are the same alone as between an image and a caption."""
    return [tokenizer.encode([Text(prompt)], image_tokens=1).ids.tolist() for prompt in prompts]


class PromptDraws:
    """Which prompt each draw of a corpus gets, determined by seed, corpus and draw number; draws come in order."""

    def __init__(self, prompts: int, seed: int, corpus: str) -> None:
        """Start at a corpus's first draw.

        Args:
            prompts: number of prompts.
            seed: of the recipe.
            corpus: name of the corpus.
        """
        self._prompts, self._generator = prompts, seeded(seed, corpus, "prompts")

    def take(self, prompted: npt.NDArray[np.bool_]) -> npt.NDArray[np.int16]:
        """Return the prompts of the next draws, int16[draws]; ``NO_PROMPT`` where a draw gets none.

        Args:
            prompted: whether the sample of each draw takes a prompt.
        """
        if not self._prompts:
            return np.full(len(prompted), NO_PROMPT, dtype=np.int16)
        drawn = self._generator.integers(self._prompts, size=len(prompted))
        return np.where(prompted, drawn, NO_PROMPT).astype(np.int16)


def insert_prompt(sample: Sample, ids: Sequence[int]) -> Sample:
    """Return a sample with token ids inserted at its prompt position."""
    place, count = sample.prompt_at, len(ids)
    return replace(
        sample,
        input_ids=np.insert(sample.input_ids, [place] * count, ids),
        generated=np.insert(sample.generated, [place] * count, 0),
    )
