"""On GPUs: the trainer under every shipped DeepSpeed file, and on two stages, against the CPU's losses."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.launch import ROOT, run
from tests.pipeline.training.runs import flags, metrics

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
FILES = sorted(path.stem for path in (ROOT / "ds_configs").glob("*.json"))
HEADS_OF_8 = ["--model.llm.config.head_dim", "8", "--train.dtype", "fp32"]


def losses(demo: Path, run_dir: Path, *more: str, ranks: int = 1, device: str = "cuda") -> list[float]:
    hidden = {} if device == "cuda" else {"CUDA_VISIBLE_DEVICES": ""}
    words = flags(demo, run_dir, *HEADS_OF_8, *more)
    run(ranks, ROOT / "pipeline/train.py", *words, env={"DS_ACCELERATOR": device, **hidden}, timeout_s=900).check()
    lines = metrics(run_dir)
    assert all(line["applied"] for line in lines)
    return [line["loss"] for line in lines]


@pytest.fixture(scope="module")
def on_cpu(small_demo: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    return losses(small_demo, tmp_path_factory.mktemp("cpu") / "run", device="cpu")


@pytest.mark.parametrize("name", FILES)
def test_a_gpu_trains_as_the_cpu_does(name: str, on_cpu: list[float], small_demo: Path, tmp_path: Path) -> None:
    found = losses(small_demo, tmp_path / "run", "--deepspeed", str(ROOT / f"ds_configs/{name}.json"))
    assert found == pytest.approx(on_cpu, rel=1e-4)


def test_a_gpu_trains_in_bf16_with_flash_attention(small_demo: Path, tmp_path: Path, on_cpu: list[float]) -> None:
    """A head size that flash attention takes; deterministic, so that two runs are equal to the bit."""
    words = ["--model.llm.config.head_dim", "16", "--train.dtype", "bf16", "--train.deterministic", "true"]
    first, second = (losses(small_demo, tmp_path / name, *words) for name in ("first", "second"))
    assert first == second
    assert "attention-fallback" not in (tmp_path / "first/events.jsonl").read_text()
    assert first[0] == pytest.approx(on_cpu[0], rel=0.02)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("schedule", ["1f1b", "gpipe"])
def test_two_gpus_train_as_the_cpu_does(schedule: str, on_cpu: list[float], small_demo: Path, tmp_path: Path) -> None:
    grid = ["--parallel.pp", "2", "--parallel.micro-batches", "4", "--parallel.schedule", schedule]
    assert losses(small_demo, tmp_path / "run", *grid, ranks=2) == pytest.approx(on_cpu, rel=1e-4)
