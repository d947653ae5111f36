"""``plan``: the plan step on AKI's corpora, and its packing beside other ways to pack the same draws."""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from bisect import bisect_left, insort
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from benchmarks.data.aki import Ints, make_workspace
from benchmarks.data.memory import Peak, measured
from data_prep.common.events import EVENTS_FILE, EventLedger
from data_prep.ingest.samples import read_stats
from data_prep.ingest.step import require_ingested
from data_prep.ingest.workspace import Workspace
from data_prep.planning.packing import pack_in_order, pack_windows, packing_efficiency
from data_prep.planning.step import PackingPlan, plan_path
from data_prep.recipe import Recipe

DRAWS = 1_600_000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--lengths", nargs="+", type=int, default=[1024, 2048, 4096, 8192])
    parser.add_argument("--draws", type=int, default=DRAWS)
    parser.add_argument("--step-only", action="store_true", help="do not compare other ways to pack")
    parser.add_argument("--scale", type=float, default=1.0, help="fraction of the published corpus sizes")


def run(options: argparse.Namespace) -> Iterator[str]:
    """Yield the tables, line by line."""
    with tempfile.TemporaryDirectory() as folder:
        yield "| row length | draws | whole plan step: s | draws / s | own (resident) MiB | full |"
        yield "|---:|---:|---:|---:|---:|---:|"
        for seq_len in options.lengths:
            recipe = make_workspace(Path(folder), seq_len, options.draws, options.scale)
            peak, made = _whole_step(recipe, Path(folder) / f"recipe-{seq_len}.yaml")
            tokens = sum(audit.tokens for audit in made.audits.values())
            cells = [
                f"{seq_len:,}",
                f"{len(made.row):,}",
                f"{peak.seconds:.0f}",
                f"{len(made.row) / peak.seconds:,.0f}",
            ]
            yield f"| {' | '.join(cells)} | {peak} | {tokens / (made.rows * seq_len):.2%} |"
        if options.step_only:
            return
        tokens_of_draws = _tokens(recipe, made)
    yield ""
    yield "| packing alone | row length | samples / s | full |"
    yield "|---|---:|---:|---:|"
    for seq_len in options.lengths:
        for name, pack in _PACKERS.items():
            seconds, rows = _timed(pack, tokens_of_draws, seq_len)
            full = packing_efficiency(tokens_of_draws, rows, seq_len)
            yield f"| {name} | {seq_len:,} | {len(rows) / seconds:,.0f} | {full:.2%} |"
        yield from _trl(tokens_of_draws, seq_len)


def _whole_step(recipe: Recipe, path: Path) -> tuple[Peak, PackingPlan]:
    """Run ``mma-prep plan`` in a process of its own, after ingest; return what it took, and the plan."""
    space = Workspace(recipe)
    require_ingested(space, EventLedger(space.out / EVENTS_FILE))  # builds the store, as the end of ingest does
    shutil.rmtree(space.packs("sft"), ignore_errors=True)
    peak = measured(["plan", str(path)])
    return peak, PackingPlan.load(plan_path(space.packs("sft")))


def _tokens(recipe: Recipe, made: PackingPlan) -> Ints:
    """Return the tokens of every draw, in blended order."""
    space = Workspace(recipe)
    outputs = [
        output
        for variant in space.variants(require_ingested(space, EventLedger(space.out / EVENTS_FILE)).tokenizer_sha256)
        for output in variant.outputs
    ]
    kept = [output.report().tally.kept for output in outputs]
    starts = np.cumsum([0, *kept])
    stats = [read_stats(output, count)["tokens"] for output, count in zip(outputs, kept, strict=True)]
    tokens = np.empty(len(made.row), dtype=np.int64)
    tokens[made.draw] = np.concatenate(stats)[starts[made.shard] + made.index]
    return tokens


def _timed(pack: Callable[[Ints, int], Ints], tokens: Ints, seq_len: int) -> tuple[float, Ints]:
    start = time.process_time()
    rows = pack(tokens, seq_len)
    return time.process_time() - start, rows


def best_fit_decreasing(tokens: Ints, seq_len: int) -> Ints:
    """All samples by decreasing length, each into the fullest row it fits: what TRL calls ``bfd``."""
    rows = np.empty(len(tokens), dtype=np.int64)
    frees: list[int] = []
    open_rows: dict[int, list[int]] = {}
    count = 0
    for sample in np.argsort(-tokens, kind="stable").tolist():
        size = int(tokens[sample])
        at = bisect_left(frees, size)
        free = frees[at] if at < len(frees) else seq_len
        if at == len(frees):
            row, count = count, count + 1
        else:
            row = open_rows[free].pop()
            if not open_rows[free]:
                del frees[at]
        if not open_rows.setdefault(free - size, []):
            insort(frees, free - size)
        open_rows[free - size].append(row)
        rows[sample] = row
    return rows


_PACKERS: dict[str, Callable[[Ints, int], Ints]] = {
    "this project": lambda tokens, seq_len: pack_windows(tokens, np.ones_like(tokens), seq_len, None, 0),
    "next fit": lambda tokens, seq_len: pack_in_order(tokens, np.ones_like(tokens), seq_len, None),
    "best fit decreasing": best_fit_decreasing,
}


def _trl(tokens: Ints, seq_len: int) -> Iterator[str]:
    """TRL's own ``bfd`` with its defaults on the first draws, where TRL is installed; it moves token ids as well."""
    try:
        from trl import pack_dataset
    except ImportError:
        return
    import pyarrow as pa
    from datasets import Dataset

    tokens = tokens[:50_000]
    ends = np.cumsum(np.append(0, tokens)).astype(np.int32)
    ids = pa.ListArray.from_arrays(pa.array(ends), pa.array(np.zeros(ends[-1], dtype=np.int32)))
    start = time.process_time()
    packed = pack_dataset(Dataset(pa.table({"input_ids": ids})), seq_len, "bfd")
    seconds = time.process_time() - start
    full = int(tokens.sum()) / (len(packed) * seq_len)
    yield f"| TRL, with ids, {len(tokens):,} draws | {seq_len:,} | {len(tokens) / seconds:,.0f} | {full:.2%} |"
