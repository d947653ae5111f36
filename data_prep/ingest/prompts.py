"""Prompts of captions: short given texts beside the image, one drawn anew whenever a caption is drawn.

Without one, nothing given follows the image of a caption, and Modality-Mutual Attention has nothing to unlock in
pre-training. Captions are tokenised once, without a prompt; the plan draws the prompts, and packing inserts their ids.
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
"""Stands where a draw gets no prompt."""


def prompt_ids(tokenizer: Tokenizer, prompts: Sequence[str]) -> list[list[int]]:
    """Return the token ids of each prompt; the same between an image and a caption as alone."""
    return [tokenizer.encode([Text(prompt)], image_tokens=1).ids.tolist() for prompt in prompts]


def draw_prompts(
    numbers: npt.NDArray[np.int64], prompted: npt.NDArray[np.bool_], prompts: int, seed: int, corpus: str
) -> npt.NDArray[np.int16]:
    """Return which of so many prompts each draw of a corpus gets, by seed, corpus and number of the draw.

    Args:
        numbers: of all draws of the corpus, in any order.
        prompted: by draw, whether its sample takes a prompt.
        prompts: how many there are; 0 for none.
        seed: of the recipe.
        corpus: name of the corpus.

    Returns:
        int16[draws]; ``NO_PROMPT`` where a draw gets none.
    """
    if not prompts:
        return np.full(len(prompted), NO_PROMPT, dtype=np.int16)
    drawn = seeded(seed, corpus, "prompts").integers(prompts, size=len(prompted))
    return np.where(prompted, drawn[numbers], NO_PROMPT).astype(np.int16)


def insert_prompt(sample: Sample, ids: Sequence[int]) -> Sample:
    """Return a sample with given token ids at the place it keeps for its prompt."""
    place, count = sample.prompt_at, len(ids)
    return replace(
        sample,
        input_ids=np.insert(sample.input_ids, [place] * count, ids),
        generated=np.insert(sample.generated, [place] * count, 0),
    )
