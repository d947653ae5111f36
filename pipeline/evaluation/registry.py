"""All benchmarks by name, and the choice a user makes among them."""

from __future__ import annotations

from data_prep.common.errors import UserError, did_you_mean
from data_prep.common.plugins import Registry, must_be
from pipeline.evaluation.benchmark import Benchmark
from pipeline.evaluation.benchmarks.cvbench import CV_BENCH_2D, CV_BENCH_3D
from pipeline.evaluation.benchmarks.llava_w import LLAVA_W
from pipeline.evaluation.benchmarks.mathvista import MATHVISTA
from pipeline.evaluation.benchmarks.mmbench import MMBENCH
from pipeline.evaluation.benchmarks.mme import MME_C, MME_P
from pipeline.evaluation.benchmarks.mmmu import MMMU
from pipeline.evaluation.benchmarks.mmvet import MM_VET
from pipeline.evaluation.benchmarks.own import OWN
from pipeline.evaluation.benchmarks.pope import POPE
from pipeline.evaluation.benchmarks.realworldqa import REALWORLDQA
from pipeline.evaluation.benchmarks.seed import SEED_I

PAPER: tuple[Benchmark, ...] = (
    *(MME_P, MME_C, MMBENCH, SEED_I, LLAVA_W, MMMU, MATHVISTA, POPE, MM_VET, REALWORLDQA, CV_BENCH_2D, CV_BENCH_3D),
)
"""The columns of the paper's Table 1, in its order."""
BENCHMARKS: Registry[Benchmark] = Registry(
    "mma.metrics", "benchmark", {one.name: one for one in (*PAPER, *OWN)}, must_be(Benchmark)
)
"""Benchmarks, each with its metric, by name."""
ALL = "all"


def chosen(names: str) -> tuple[Benchmark, ...]:
    """Return the benchmarks of a comma-separated list; ``all`` means the paper's.

    Raises:
        UserError: a name is unknown.
    """
    if names == ALL:
        return PAPER
    listed = [name.strip() for name in names.split(",") if name.strip()]
    for name in listed or [names]:
        if name not in BENCHMARKS:
            known = ", ".join((ALL, *BENCHMARKS))
            raise UserError(f"unknown benchmark {name!r}{did_you_mean(name, BENCHMARKS)}; known: {known}")
    return tuple(BENCHMARKS[name] for name in dict.fromkeys(listed))
