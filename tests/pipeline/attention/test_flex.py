"""FlexAttention's block mask, computed from run bounds, against the dense mask cut into blocks."""

from __future__ import annotations

import warnings

import pytest
import torch

from pipeline.attention import attend, build_plan
from pipeline.attention.flex import BLOCK
from pipeline.masks import POLICIES, Sidecars, dense_mask, get_policy, parse_layout
from tests.pipeline.attention.tensors import distance

NAMES = [name for name, policy in POLICIES.items() if not policy.needs_grid]
LAYOUTS = [
    pytest.param("V12 Q5 A4 | Q3 A2", id="less-than-a-block"),
    pytest.param("S4 V144 Q300 A90 | V144 V144 Q40 A5", id="blocks-inside-a-segment"),
    pytest.param("V400 Q400 A20 W300 Q10 A90", id="whole-blocks-unlocked"),
]


def blocks(row: Sidecars, name: str) -> torch.Tensor:
    """The dense mask as bool[blocks, blocks, pairs], rows past the end seeing themselves."""
    side = -(-len(row) // BLOCK)
    padded = torch.eye(side * BLOCK, dtype=torch.bool)
    padded[: len(row), : len(row)] |= dense_mask(get_policy(name, allow_leak=True), row)
    return padded.view(side, BLOCK, side, BLOCK).permute(0, 2, 1, 3).flatten(2)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", NAMES)
def test_blocks_are_exact(name: str, layout: str) -> None:
    row = parse_layout(layout)
    mask = build_plan(get_policy(name, allow_leak=True), row).block_mask
    exact = blocks(row, name)
    listed, whole = mask.to_dense()[0, 0].bool(), torch.zeros(exact.shape[:2], dtype=torch.bool)
    for line, (count, columns) in enumerate(
        zip(mask.full_kv_num_blocks[0, 0], mask.full_kv_indices[0, 0], strict=True)
    ):
        whole[line, columns[:count].long()] = True
    assert listed.equal(exact.any(-1))
    assert whole.equal(exact.all(-1))


@pytest.mark.parametrize("layout", [*LAYOUTS[:1], pytest.param("V100 Q30 A9 | V9 Q3 A2 P150", id="padding")])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("softcap", [None, 0.5])
def test_the_output_is_that_of_the_dense_mask(name: str, layout: str, softcap: float | None) -> None:
    row = parse_layout(layout)
    plan, real = build_plan(get_policy(name, allow_leak=True), row), row.segment > 0
    q, k, v = (torch.randn(1, heads, len(row), 16, dtype=torch.float64) for heads in (4, 2, 2))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # flex warns that it is not compiled on the CPU
        found = attend(q, k, v, plan, backend="flex", softcap=softcap)
    exact = attend(q, k, v, plan, backend="dense", softcap=softcap)
    assert distance(found[:, :, real], exact[:, :, real]) <= 1e-6
