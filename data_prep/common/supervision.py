"""The supervised-token rule, shared by packing, labels and the leak proof."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt


def predicts_target(segment: npt.NDArray[Any], generated: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
    """Mark the positions whose next token is supervised: it is generated and in the same packed sample.

    Args:
        segment: int[L], the packed sample of each token; 0 = padding.
        generated: int[L], 1 for tokens the model generates.

    Returns:
        bool[L]; the last position of a row predicts nothing. The number of marks is the row's supervised-token count:
        all generated tokens except the first token of each segment, which nothing predicts.
    """
    marks = np.zeros(len(segment), dtype=np.bool_)
    marks[:-1] = (generated[1:] == 1) & (segment[1:] == segment[:-1]) & (segment[1:] > 0)
    return marks
