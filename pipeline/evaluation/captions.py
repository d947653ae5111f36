"""CIDEr-D (Vedantam et al. 2015) of captions, from its definition.

The reference implementation splits words with Stanford's PTB tokenizer; this one takes runs of letters, digits and
apostrophes in lower case, which differs on rare forms only ("can't" stays one word).
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TypeAlias

MAX_N, SIGMA = 4, 6.0
_WORD = re.compile(r"\w+(?:'\w+)*")
Ngram: TypeAlias = tuple[str, ...]
Vector: TypeAlias = Mapping[Ngram, float]


def caption_words(text: str) -> list[str]:
    """Split a caption into lower-case words without punctuation."""
    return _WORD.findall(text.lower())


def _counts(words: Sequence[str]) -> list[Counter[Ngram]]:
    """Count n-grams for each n from 1 to 4."""
    return [Counter(tuple(words[at : at + n]) for at in range(len(words) - n + 1)) for n in range(1, MAX_N + 1)]


def cider(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """Return the CIDEr-D of each candidate, 0..10.

    Args:
        candidates: one caption per image.
        references: the reference captions of each image; document frequencies count images.
    """
    counted = [[_counts(caption_words(text)) for text in own] for own in references]
    frequency: Counter[Ngram] = Counter()
    for own in counted:
        frequency.update({ngram for counts in own for by_n in counts for ngram in by_n})
    log_images = math.log(max(1, len(references)))

    def weigh(counts: Counter[Ngram]) -> Vector:
        return {ngram: tf * (log_images - math.log(max(1, frequency[ngram]))) for ngram, tf in counts.items()}

    scores = []
    for text, own in zip(candidates, counted, strict=True):
        candidate = _counts(caption_words(text))
        total = sum(
            _similarity(weigh(candidate[n]), weigh(reference[n])) * _penalty(candidate, reference)
            for reference in own
            for n in range(MAX_N)
        )
        scores.append(10 * total / MAX_N / len(own))
    return scores


def _similarity(candidate: Vector, reference: Vector) -> float:
    """Return the cosine of two TF-IDF vectors, the candidate's entries clipped to the reference's."""
    norms = [math.sqrt(sum(value**2 for value in vector.values())) for vector in (candidate, reference)]
    common = sum(
        min(value, reference.get(ngram, 0.0)) * reference.get(ngram, 0.0) for ngram, value in candidate.items()
    )
    return common / (norms[0] * norms[1]) if all(norms) else 0.0


def _penalty(candidate: Sequence[Counter[Ngram]], reference: Sequence[Counter[Ngram]]) -> float:
    """Return the Gaussian penalty of a difference in length, counted in bigrams as the reference code does."""
    difference = candidate[1].total() - reference[1].total()
    return math.exp(-(difference**2) / (2 * SIGMA**2))
