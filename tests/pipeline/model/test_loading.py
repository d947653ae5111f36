"""Host memory while loading: a rank holds at most its own shards and the unit being read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from pipeline.model.weights import global_shapes
from tests.launch import ROOT, run
from tests.pipeline.model.helpers import tiny_spec
from tests.pipeline.model.loading_worker import LLM

pytestmark = pytest.mark.slow
RANKS, FILES = 2, 3


def save_random_llm(folder: Path) -> tuple[dict[str, float], int]:
    """Write a language model as several safetensors files; return the sum of each tensor, and all bytes."""
    torch.manual_seed(0)
    shapes = {n: s for n, s in global_shapes(tiny_spec(**LLM)) if n.startswith(("model.", "lm_head."))}
    names, sums, files = list(shapes), {}, {}
    for part in range(FILES):
        own = names[part * len(names) // FILES : (part + 1) * len(names) // FILES]
        tensors = {name: torch.randn(shapes[name], dtype=torch.bfloat16) for name in own}
        save_file(tensors, folder / f"model-{part}.safetensors")
        sums |= {name: float(tensor.double().sum()) for name, tensor in tensors.items()}
        files |= dict.fromkeys(own, f"model-{part}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    return sums, 2 * sum(torch.Size(shape).numel() for shape in shapes.values())


def test_a_rank_holds_its_shards_and_one_unit(tmp_path: Path) -> None:
    sums, model = save_random_llm(tmp_path)
    worker = ROOT / "tests/pipeline/model/loading_worker.py"
    # Tensors of real models are so large that the C library gives each back to the system; these must be told to be.
    env = {"PYTHONPATH": str(ROOT), "MALLOC_MMAP_THRESHOLD_": "65536"}
    run(RANKS, worker, str(tmp_path), str(tmp_path), env=env, timeout_s=500).check()
    ranks = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(RANKS)]
    unit = 2 * LLM["vocab_size"] * LLM["hidden_size"]
    for rank in ranks:  # a unit as it is mapped, filled and sent, and what the allocator keeps between units
        assert rank["peak"] > 0.9 * rank["own"], "the measurement saw the loading"
        assert rank["peak"] <= rank["own"] + 6 * unit < 0.65 * model
    for name, total in sums.items():
        assert sum(rank["sums"][name] for rank in ranks) == pytest.approx(total, rel=1e-9, abs=1e-6)
