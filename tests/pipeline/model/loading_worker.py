"""One rank of `test_loading`: builds a sharded model from a folder and records its peak memory."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from pipeline.config.schema import RunConfig
from pipeline.model.build import build_stage
from pipeline.model.spec import ModelSpec
from pipeline.model.stage import Stage
from pipeline.model.weights import WeightSource
from pipeline.parallel.ds_config import complete_ds_config, read_ds_config
from pipeline.parallel.groups import create_groups
from pipeline.parallel.launch import fill_rank_variables, start_processes, stop_processes
from pipeline.parallel.topology import Topology
from pipeline.parallel.zero3 import sharder
from tests.pipeline.model.helpers import tiny_spec

LLM: dict[str, Any] = {
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 72,
    "num_attention_heads": 8,
    "vocab_size": 8192,
}


def resident_bytes(field: str) -> int:
    """Read VmRSS (now) or VmHWM (the most since it was set back) of this process, mapped file pages included."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(field)).split()[1])


class Loader:
    """Builds models on this rank."""

    def __init__(self) -> None:
        self.topology = Topology(dist.get_world_size(), dist.get_rank(), 1)
        ds_config = complete_ds_config(
            read_ds_config("ds_configs/zero3.json"), RunConfig(), microbatch_rows=1, bf16=True
        )
        self.shard = sharder(self.topology, create_groups(self.topology), ds_config)

    def load(self, spec: ModelSpec) -> Stage:
        return build_stage(
            spec, layers=range(spec.layers), first=True, last=True, dtype=torch.bfloat16, device="cpu", seed=3,
            source=WeightSource.open(spec), reads=self.topology.dp_rank == 0, shard=self.shard,
        )  # fmt: skip

    def measure(self, folder: Path) -> dict[str, Any]:
        self.load(tiny_spec())  # libraries are mapped, buffers of the connections are there
        spec = replace(tiny_spec(**LLM), llm_source=str(folder))
        Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM back
        before = resident_bytes("VmRSS")
        stage = self.load(spec)
        peak = resident_bytes("VmHWM") - before
        shards = {name: param.ds_tensor for name, param in stage.named_parameters()}  # type: ignore[attr-defined]
        own = sum(shard.numel() * shard.element_size() for shard in shards.values())
        return {"peak": peak, "own": own, "sums": {name: float(shard.double().sum()) for name, shard in shards.items()}}


def main() -> None:
    fill_rank_variables()
    start_processes(120)
    folder, out = Path(sys.argv[-2]), Path(sys.argv[-1])
    (out / f"{dist.get_rank()}.json").write_text(json.dumps(Loader().measure(folder)))
    stop_processes()


if __name__ == "__main__":
    main()
