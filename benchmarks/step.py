"""One training step of AKI-4B with random weights on one GPU: packed rows, against padded samples as the paper trains.

Run from the repository root: ``python -m benchmarks.step [--tokens 4096 8192 16384] [--json OUT]``; ``--tiny`` runs a
small model anywhere. Both ways use the same modules, engine (ZeRO-3, AdamW, checkpointed layers) and samples: an image
of 144 tokens, a question, an answer; their losses are compared before anything is timed. *Packed* is this project's
step: samples end to end, one attention plan a row. *Padded* is the shape of the official recipe: 4 samples a batch,
each padded to 656 slots, under a dense 4-D mask.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from benchmarks.rows import IMAGE_TOKENS, make_row
from pipeline.attention import build_plan
from pipeline.attention.hf import NAME
from pipeline.commands.estimate import build_workload_estimate
from pipeline.config.schema import ModelConfig, RunConfig
from pipeline.masks import Sidecars, dense_mask, position_ids
from pipeline.model.build import build_stage
from pipeline.model.counts import ParamCounts
from pipeline.model.inputs import IGNORE, StageInputs
from pipeline.model.spec import ModelSpec
from pipeline.model.stage import Stage
from pipeline.parallel.ds_config import Sharding, complete_ds_config, read_ds_config
from pipeline.parallel.groups import create_groups
from pipeline.parallel.launch import device_of_rank, fill_rank_variables, start_processes, stop_processes
from pipeline.parallel.topology import Topology
from pipeline.parallel.zero3 import Zero3Stage, sharder
from pipeline.training.engine import parameter_groups
from pipeline.training.metrics import peak_flops

BATCH, SLOTS = 4, 656
POLICY = "mma"
AKI_4B = {
    "llm": {  # Phi-3.5-mini within its short regime
        "model_type": "phi3", "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 32064, "max_position_embeddings": 4096,
        "sliding_window": None,
    },
    "vision": {  # SigLIP so400m/14, 384 px
        "model_type": "siglip_vision_model", "hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27,
        "num_attention_heads": 16, "image_size": 384, "patch_size": 14,
    },
}  # fmt: skip
TINY = {
    "llm": AKI_4B["llm"] | {
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 4, "vocab_size": 512, "pad_token_id": 0,
    },
    "vision": AKI_4B["vision"] | {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 56,
    },
}  # fmt: skip


class Padded(NamedTuple):
    """A batch of B samples of up to S slots, on the device."""

    input_ids: torch.Tensor
    """int64[B, S]."""
    positions: torch.Tensor
    """int64[B, S]."""
    mask: torch.Tensor
    """bool[B, 1, S, S]."""
    labels: torch.Tensor
    """int64[B, S], shifted."""
    image_positions: torch.Tensor
    """int64[images * 144], into the flattened batch."""
    pixels: torch.Tensor


class BothWays(nn.Module):
    """A full model that runs packed rows and padded batches."""

    def __init__(self, stage: Stage) -> None:
        super().__init__()
        self.stage = stage
        self._attention = next(iter(stage.model.layers.values())).self_attn.config

    def forward(self, hidden: None, inputs: StageInputs | Padded, layers: None = None) -> torch.Tensor:
        """Return the summed loss of the supervised tokens."""
        packed = isinstance(inputs, StageInputs)
        self._attention._attn_implementation = NAME if packed else "sdpa"
        return self.stage(None, inputs) if packed else self._padded(inputs)  # type: ignore[no-any-return, arg-type]

    def _padded(self, batch: Padded) -> torch.Tensor:
        stage, model = self.stage, self.stage.model
        embeds_BSD = model.embed_tokens(batch.input_ids)
        images = stage.image_tokens(batch.pixels, embeds_BSD)
        hidden_BSD = embeds_BSD.flatten(0, 1).index_copy(0, batch.image_positions, images).view_as(embeds_BSD)
        options = {
            "attention_mask": batch.mask, "position_ids": batch.positions,
            "position_embeddings": stage.rotary.to(hidden_BSD.device)(hidden_BSD, batch.positions),
        }  # fmt: skip
        for layer in model.layers.values():
            hidden_BSD = checkpoint(layer, hidden_BSD, use_reentrant=False, preserve_rng_state=False, **options)
        supervised = (batch.labels.flatten() != IGNORE).nonzero().squeeze(1)
        hidden_ND = model.norm(hidden_BSD.flatten(0, 1).index_select(0, supervised))
        return stage.lm_head(hidden_ND, batch.labels.flatten()[supervised])  # type: ignore[no-any-return]


def draw(sidecars: Sidecars, spec: ModelSpec) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return ids int64[T], shifted labels int64[T] and pixels [images, 3, S, S] of a row."""
    generator = torch.Generator().manual_seed(len(sidecars))
    ids = torch.randint(1, spec.vocab_rows, (len(sidecars),), generator=generator)
    labels = torch.full_like(ids, IGNORE)
    same = (sidecars.segment[1:] == sidecars.segment[:-1]) & (sidecars.segment[1:] > 0)
    predicts = same & (sidecars.generated[1:] == 1)
    labels[:-1][predicts] = ids[1:][predicts]
    side = spec.preprocess.size_px
    return ids, labels, torch.randn(int(sidecars.instance.max()) + 1, 3, side, side, generator=generator)


def packed_row(sidecars: Sidecars, spec: ModelSpec, device: torch.device) -> StageInputs:
    """Return a row as the trainer passes it to the model."""
    ids, labels, pixels = (tensor.to(device) for tensor in draw(sidecars, spec))
    places = (sidecars.instance >= 0).nonzero().squeeze(1).to(device)
    plan = build_plan(POLICY, sidecars).to(device)
    return StageInputs(ids, position_ids(sidecars).to(device), plan, labels, places, pixels)


def whole_batches(tokens: int) -> Sidecars:
    """Pack samples into a row of at most ``tokens`` tokens, as many as padded batches hold."""
    sidecars = make_row("short VQA", tokens)
    samples = int(sidecars.segment.max()) // BATCH * BATCH
    if not samples:
        raise SystemExit(f"--tokens {tokens} holds fewer than {BATCH} samples: give more")
    end = int((sidecars.segment == samples).nonzero().max()) + 1
    return Sidecars(*(getattr(sidecars, name)[:end] for name in Sidecars.__dataclass_fields__))


def padded_batches(sidecars: Sidecars, spec: ModelSpec, device: torch.device) -> Iterator[Padded]:
    """Yield a row's samples in batches of four, each padded to 656 slots."""
    ids, labels, pixels = draw(sidecars, spec)
    allowed = dense_mask(POLICY, sidecars)
    for first in range(1, int(sidecars.segment.max()) + 1, BATCH):
        own = [(sidecars.segment == number).nonzero().squeeze(1) for number in range(first, first + BATCH)]
        batch_ids, batch_labels = torch.zeros(BATCH, SLOTS).long(), torch.full((BATCH, SLOTS), IGNORE)
        mask, medium = torch.eye(SLOTS).bool().repeat(BATCH, 1, 1, 1).clone(), torch.zeros(BATCH, SLOTS).bool()
        for place, rows in enumerate(own):
            batch_ids[place, : len(rows)], batch_labels[place, : len(rows)] = ids[rows], labels[rows]
            mask[place, 0, : len(rows), : len(rows)] = allowed[rows][:, rows]
            medium[place, : len(rows)] = sidecars.instance[rows] >= 0
        shown = sorted({int(i) for rows in own for i in sidecars.instance[rows] if i >= 0})
        positions = torch.arange(SLOTS).expand(BATCH, -1).contiguous()
        places = medium.flatten().nonzero().squeeze(1)
        tensors = (batch_ids, positions, mask, batch_labels, places, pixels[shown])
        yield Padded(*(tensor.to(device) for tensor in tensors))


@dataclass(frozen=True)
class Engine:
    """A model under ZeRO-3 on this one rank."""

    stage: Zero3Stage
    spec: ModelSpec
    config: RunConfig
    sharding: Sharding
    device: torch.device

    @classmethod
    def build(cls, options: argparse.Namespace) -> Engine:
        """Build the model with random weights; the optimizer's are AdamW's."""
        device, raw = device_of_rank(), TINY if options.tiny else AKI_4B
        model = ModelConfig.model_validate({key: {"config": value} for key, value in raw.items()})
        spec = ModelSpec.resolve(model, vocab_size=raw["llm"]["vocab_size"], image_tokens=IMAGE_TOKENS)  # type: ignore[call-overload]
        config = RunConfig.model_validate(
            {"model": model, "log": {"tensorboard": False}, "train": {"global_batch_size": 1}}
        )
        bf16 = device.type == "cuda"
        user = read_ds_config(options.deepspeed)
        sharding = Sharding.of(user, config.parallel)
        ds_config = complete_ds_config(user, config, microbatch_rows=1, bf16=bf16)
        topology = Topology(1, 0, 1)
        groups = create_groups(topology)
        whole = build_stage(
            spec, layers=range(spec.layers), first=True, last=True, dtype=torch.bfloat16 if bf16 else torch.float32,
            device=device, seed=0, shard=sharder(topology, groups, ds_config), gradient_checkpointing=True,
        )  # fmt: skip
        module = BothWays(whole)
        optimizer = torch.optim.AdamW(parameter_groups(module, config.train), lr=1e-6, fused=bf16)
        stage = Zero3Stage(
            module, optimizer, topology=topology, groups=groups, ds_config=ds_config,
            gathered_fraction=sharding.gathered_fraction,
            reduce_once=sharding.reduce_once,
        )  # fmt: skip
        return cls(stage, spec, config, sharding, device)

    def seconds(self, work: Callable[[], object]) -> float:
        """Return the seconds of one call, including the device's work."""
        self._wait()
        began = time.perf_counter()
        work()
        self._wait()
        return time.perf_counter() - began

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def forward_backward(self, microbatches: list[Any]) -> None:
        with self.stage.accumulate():
            for inputs in microbatches:
                self.stage.backward(self.stage.forward(None, inputs) * 1e-3)

    @torch.no_grad()
    def loss(self, microbatches: list[Any]) -> float:
        """Return the summed loss of all supervised tokens."""
        return sum(float(self.stage.forward(None, inputs)) for inputs in microbatches)

    def measure(self, microbatches: list[Any], repeats: int) -> tuple[float, float]:
        """Return the fastest seconds of all forwards and backwards, and of the update, after one step to warm up."""
        times = []
        for _ in range(1 + repeats):
            passes = self.seconds(partial(self.forward_backward, microbatches))
            times.append((passes, self.seconds(partial(self.stage.step, 1e-6))))
        return min(passes for passes, _ in times[1:]), min(update for _, update in times[1:])

    def peak_gib(self) -> float:
        """Return the peak device memory since the last call, in GiB; 0 if the device does not count it."""
        if self.device.type != "cuda":
            return 0.0
        most = torch.cuda.max_memory_allocated(self.device) / 2**30
        torch.cuda.reset_peak_memory_stats(self.device)
        return most


def compare(engine: Engine, tokens: int, repeats: int) -> dict[str, Any]:
    """Measure the same samples packed into one row and padded in batches of four."""
    sidecars = whole_batches(tokens)
    samples, real = int(sidecars.segment.max()), len(sidecars)
    row = packed_row(sidecars, engine.spec, engine.device)
    batches = list(padded_batches(sidecars, engine.spec, engine.device))
    losses = engine.loss([row]), engine.loss(batches)
    if abs(losses[0] / losses[1] - 1) > (1e-5 if engine.device.type == "cpu" else 5e-3):
        raise SystemExit(f"wrong: packed and padded losses of the same samples are {losses}")
    engine.peak_gib()
    packed_s, update_s = engine.measure([row], repeats)
    packed_gib = engine.peak_gib()
    padded_s, _ = engine.measure(batches, repeats)
    images, targets = int(sidecars.instance.max()) + 1, int((row.labels != IGNORE).sum())
    shares = images / real, targets / real
    load = build_workload_estimate(engine.config, engine.sharding, engine.spec, ranks=1, seq_len=real, shares=shares)
    peak = peak_flops(engine.device)
    flops = ParamCounts.of(engine.spec).step_flops(tokens=real, targets=targets, images=images)
    packed_rate, padded_rate = samples / packed_s, samples / padded_s
    return {
        "tokens": real, "samples": samples, "packed_s": packed_s, "update_s": update_s,
        "tokens_per_s": real / packed_s, "packed_samples_per_s": packed_rate, "padded_samples_per_s": padded_rate,
        "ratio": packed_rate / padded_rate, "mfu": flops / packed_s / peak if peak else None,
        "packed_gib": packed_gib, "padded_gib": engine.peak_gib(), "estimated_gib": load.memory(0).total / 2**30,
    }  # fmt: skip


COLUMNS = ("tokens", "samples", "packed ms", "update ms", "tokens / s", "samples / s", "padded samples / s",
           "packed / padded", "MFU", "peak GiB", "estimated GiB", "padded peak GiB")  # fmt: skip


def table_line(found: dict[str, Any]) -> str:
    """Return a result as a row of the Markdown table."""
    cells = [
        f"{found['tokens']:,}", str(found["samples"]), f"{1000 * found['packed_s']:,.0f}",
        f"{1000 * found['update_s']:,.0f}", f"{found['tokens_per_s']:,.0f}", f"{found['packed_samples_per_s']:.2f}",
        f"{found['padded_samples_per_s']:.2f}", f"**{found['ratio']:.2f}**",
        f"{found['mfu']:.1%}" if found["mfu"] else "-",
        *(f"{found[name]:.2f}" if found[name] else "-" for name in ("packed_gib", "estimated_gib", "padded_gib")),
    ]  # fmt: skip
    return "| " + " | ".join(cells) + " |"


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step", description=__doc__)
    parser.add_argument("--tokens", nargs="+", type=int, default=[4096, 8192, 16384], help="tokens of a packed row")
    parser.add_argument("--repeats", type=int, default=5, help="timed steps; the fastest counts (default: 5)")
    parser.add_argument(
        "--deepspeed",
        default="ds_configs/zero3.json",
        help="DeepSpeed file; use an offloading one for GPUs below 100 GB",
    )
    parser.add_argument("--tiny", action="store_true", help="a small model, on any machine")
    parser.add_argument("--json", type=Path, default=None, metavar="OUT", help="write the results here")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Measure, print the table, and optionally write JSON."""
    options = parse(argv)
    fill_rank_variables()
    device_of_rank()
    start_processes(600)
    engine, results = Engine.build(options), []
    print(f"| {' | '.join(COLUMNS)} |\n|{'---:|' * len(COLUMNS)}", flush=True)
    for tokens in options.tokens:
        results.append(compare(engine, tokens, options.repeats))
        print(table_line(results[-1]), flush=True)
    if options.json is not None:
        options.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    stop_processes()


if __name__ == "__main__":
    main()
