"""Which tokens are supervised: the one rule that packing, labels and the leak proof share."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt


def predicts_target(segment: npt.NDArray[Any], generated: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
    """Mark the positions whose next token is supervised: generated, and in the same packed sample.

    Args:
        segment: int[L], the packed sample of each token; 0 = padding.
        generated: int[L], 1 where the model writes.

    Returns:
        bool[L]; the last position of a row predicts nothing. Their number is the row's supervised tokens: every
        generated token but the first of a segment, which nothing predicts.
    """
    marks = np.zeros(len(segment), dtype=np.bool_)
    marks[:-1] = (generated[1:] == 1) & (segment[1:] == segment[:-1]) & (segment[1:] > 0)
    return marks
