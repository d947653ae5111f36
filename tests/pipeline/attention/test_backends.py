"""Every backend against the dense oracle in float64, output and gradients, on random rows."""

from __future__ import annotations

import logging
import tracemalloc
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from data_prep.common.errors import UserError
from pipeline.attention import attend, build_plan
from pipeline.attention.backends import _flash_fits, choose_backend, slow_path_reason
from pipeline.masks import POLICIES, Sidecars, dense_mask, get_policy, parse_layout
from tests.pipeline.attention.tensors import Inputs, errors
from tests.pipeline.masks.rows import GRID, rows

CAUSAL_KINDS = ("causal", "mma", "mma_general", "mma_aki", "mma_unclamped", "image_to_answer")
"""Policies without bidirectional runs: those the backend ``lse`` supports."""

LAYOUTS = [
    pytest.param("Q5 A3 | Q1 A1", id="no-image"),
    pytest.param("Q5 V9", id="image-last"),
    pytest.param("V1 Q1 A1 V1 Q1", id="one-token-runs"),
    pytest.param("V4 Q1 V5 V3 Q2 W3 U2 Q3 A4", id="many-media"),
    pytest.param("V6 Q3 A2 Q3 A2 V4 Q2 A1 Q1 A1", id="many-turns"),
    pytest.param("V6 Q3 A2 P200", id="padding"),
    pytest.param("V4 Q2 A1 P3 V4 Q2 A2 P70", id="padding-between-rows"),
    pytest.param("V30 Q600 A5", id="longer-than-a-block"),
    pytest.param("P5", id="nothing-but-padding"),
]


@pytest.mark.parametrize("name", POLICIES)
@given(row=rows)
@settings(max_examples=12, deadline=None)
def test_runsplit_is_exact_and_computes_only_allowed_pairs(name: str, row: Sidecars) -> None:
    policy = get_policy(name, allow_leak=True, grid=GRID)
    assert max(errors(policy, row, "runsplit", Inputs.draw(row))) <= 1e-12
    assert build_plan(policy, row).pairs == int(dense_mask(policy, row)[row.segment > 0].sum())


@pytest.mark.parametrize("name", CAUSAL_KINDS)
@given(row=rows)
@settings(max_examples=12, deadline=None)
def test_lse_is_exact(name: str, row: Sidecars) -> None:
    assert max(errors(get_policy(name, allow_leak=True), row, "lse", Inputs.draw(row))) <= 1e-12


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("backend", ["runsplit", "lse", "dense"])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)]
)
def test_backends_agree(layout: str, backend: str, dtype: torch.dtype, tolerance: float) -> None:
    row = parse_layout(layout)
    assert max(errors("mma", row, backend, Inputs.draw(row, dtype=dtype))) <= tolerance


@pytest.mark.parametrize("heads", [(4, 4), (4, 1), (6, 2)])
@pytest.mark.parametrize("backend", ["runsplit", "lse"])
def test_grouped_heads_and_scaling(heads: tuple[int, int], backend: str) -> None:
    row = parse_layout("V6 Q3 A2 | Q2 V4 Q1 A3")
    assert max(errors("mma", row, backend, Inputs.draw(row, heads), scaling=0.7)) <= 1e-12


@pytest.mark.parametrize("policy", ["causal", "mma", "mixed", "prefix"])
def test_soft_capped_logits(policy: str) -> None:
    row = parse_layout("V6 Q3 A2 | Q300 A3")
    inputs = Inputs.draw(row)
    assert max(errors(policy, row, "runsplit", inputs, softcap=0.5)) <= 1e-12
    plan = build_plan(policy, row)
    q, k, v = (x.detach() for x in (inputs.q, inputs.k, inputs.v))
    logits = 0.5 * torch.tanh(q @ k.repeat_interleave(2, 1).transpose(2, 3) * 8**-0.5 / 0.5)
    weights = logits.masked_fill(~plan.dense_mask, float("-inf")).softmax(-1)
    torch.testing.assert_close(attend(q, k, v, plan, softcap=0.5), weights @ v.repeat_interleave(2, 1))


def test_gradients_are_the_same_to_the_bit_every_time() -> None:
    row = parse_layout(" | ".join(["S2 V20 Q9 A8 V20 Q5 A3"] * 4))
    inputs, plan = Inputs.draw(row, dtype=torch.bfloat16), build_plan("mma", row)
    first = inputs.results(plan, "runsplit")
    assert all(a.equal(b) for _ in range(3) for a, b in zip(first, inputs.results(plan, "runsplit"), strict=True))


def test_rows_of_padding_are_finite() -> None:
    row = parse_layout("V3 Q2 A2 P90")
    inputs = Inputs.draw(row)
    assert all(bool(torch.isfinite(x).all()) for x in inputs.results(build_plan("mma", row), "runsplit"))


class LargestTensor(TorchDispatchMode):
    """Records the largest tensor that torch allocates."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        for tensor in _tensors(out):
            self.elements = max(self.elements, tensor.untyped_storage().nbytes() // tensor.element_size())
        return out


def _tensors(value: object) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)


@pytest.mark.parametrize("backend", ["runsplit", "lse"])
@pytest.mark.parametrize("layout", ["V144 Q40 A90 |" * 16, "V144 Q400 A3700"], ids=["short", "one-long-segment"])
def test_no_tensor_of_mask_size_is_allocated(layout: str, backend: str) -> None:
    row = parse_layout(layout)
    tokens, heads, size = len(row), 1, 8
    with LargestTensor() as watch:
        inputs = Inputs.draw(row, (heads, heads), size, torch.float32)
        inputs.results(build_plan("mma", row), backend)
    assert tokens * size <= watch.elements <= tokens * 300 < tokens * tokens


def test_plans_are_built_in_memory_proportional_to_the_row() -> None:
    row = parse_layout("S4 V144 Q40 A90 Q20 A100 |" * 40)
    tracemalloc.start()
    build_plan("mma", row)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak <= 1000 * len(row) < len(row) ** 2


def test_auto_merges_two_calls_where_gathering_would_cost_more(caplog: pytest.LogCaptureFixture) -> None:
    video = build_plan("mma", parse_layout("V4 Q1 " * 15 + "A3"))
    assert video.gather_ratio > 8
    with caplog.at_level(logging.INFO):
        assert choose_backend(video, "cuda") == "lse"
        assert choose_backend(video, "cuda", flash_fits=False) == "runsplit"
        assert choose_backend(video, "cpu") == choose_backend(video, "cpu", softcap=30.0) == "runsplit"
        assert choose_backend(video, "cuda", softcap=30.0) == "flex"
    assert "attention: lse for policy mma on cuda" in caplog.text
    assert choose_backend(build_plan("mixed", video.sidecars), "cuda") == "runsplit"


@pytest.mark.parametrize(
    ("size", "dtype", "fits"),
    [(64, "bfloat16", True), (256, "float16", True), (264, "bfloat16", False), (20, "bfloat16", False),
     (64, "float32", False)],
)  # fmt: skip
def test_flash_is_chosen_only_for_head_sizes_it_supports(size: int, dtype: str, fits: bool) -> None:
    with FakeTensorMode(allow_non_fake_inputs=True):
        q = torch.empty(1, 2, 3, size, dtype=getattr(torch, dtype), device="cuda")
    assert _flash_fits(q) == fits


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (("cpu", torch.float32, 20, 50.0), None),
        (("cuda", torch.bfloat16, 64), None),
        (("cuda", torch.float32, 64), "flash attention needs fp16 or bf16, not float32"),
        (("cuda", torch.bfloat16, 20), "multiple of 8 up to 256, not 20"),
        (("cuda", torch.bfloat16, 256, 50.0), "cannot soft-cap"),
    ],
)
def test_why_flash_kernels_cannot_run(call: tuple[str, torch.dtype, int], reason: str | None) -> None:
    found = slow_path_reason(*call)
    assert found is None if reason is None else reason in (found or "")


def test_a_row_with_too_many_gathered_keys_is_refused_or_merged() -> None:
    row = parse_layout("V1 Q1 " * 200 + "A3")
    inputs, plan = Inputs.draw(row), build_plan("mma", row)
    with pytest.raises(UserError, match=r"gather \d+ keys per token"):
        inputs.results(plan, "runsplit")
    assert max(errors("mma", row, "auto", inputs)) <= 1e-12


@pytest.mark.parametrize(
    ("call", "message"),
    [
        pytest.param({"backend": "flash"}, r"unknown attention backend 'flash'.*known: dense", id="backend"),
        pytest.param({"batch": 2}, r"a plan covers one row.*Sidecars\.concat", id="batch"),
        pytest.param({"tokens": 5}, "plan covers 8 tokens, but the layer has 5 queries", id="length"),
        pytest.param({"key_heads": 3}, "4 query heads cannot share 3 key heads", id="heads"),
        pytest.param({"backend": "lse", "softcap": 1.0}, "'lse' cannot soft-cap", id="lse-softcap"),
        pytest.param(
            {"backend": "lse", "policy": "mixed"}, "bidirectional within a run: use 'runsplit'", id="lse-mixed"
        ),
        pytest.param({"backend": "flex", "policy": "cca"}, "cannot reorder tokens", id="flex-cca"),
    ],
)
def test_mismatched_inputs_are_refused(call: dict[str, object], message: str) -> None:
    options = {"batch": 1, "tokens": 8, "key_heads": 2, "policy": "mma", "backend": "auto", "softcap": None} | call
    plan = build_plan(get_policy(str(options["policy"]), grid=(2, 2)), parse_layout("V4 Q2 A2"))
    q = torch.zeros(options["batch"], 4, options["tokens"], 8)
    k = torch.zeros(options["batch"], options["key_heads"], options["tokens"], 8)
    with pytest.raises(UserError, match=message):
        attend(q, k, k, plan, backend=str(options["backend"]), softcap=options["softcap"])
