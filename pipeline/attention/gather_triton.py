"""The gather-sum as one Triton kernel; import only where Triton is installed (torch for CUDA brings it)."""

from __future__ import annotations

import torch
import triton  # type: ignore[import-not-found]
import triton.language as tl  # type: ignore[import-not-found]

BLOCK = 1024


@triton.jit  # type: ignore[untyped-decorator]
def _sum_rows(source, bag, offsets, out, width, BLOCK: tl.constexpr) -> None:  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for place in range(tl.load(offsets + row), tl.load(offsets + row + 1)):
        origin = tl.load(bag + place)
        total += tl.load(source + origin * width + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * width + column, total.to(out.dtype.element_ty), mask=inside)


def sum_rows(source_KW: torch.Tensor, bag: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """Return out[T, W]: row t is the sum of ``source[bag[offsets[t]:offsets[t + 1]]]``, in that order, in fp32.

    Args:
        source_KW: contiguous rows of a floating dtype of at most 32 bits.
        bag: int64[K].
        offsets: int64[T + 1].
    """
    rows, width = offsets.numel() - 1, source_KW.shape[1]
    out_TW = source_KW.new_empty(rows, width)
    block = min(BLOCK, triton.next_power_of_2(width))
    _sum_rows[(rows, triton.cdiv(width, block))](source_KW, bag, offsets, out_TW, width, BLOCK=block)
    return out_TW
