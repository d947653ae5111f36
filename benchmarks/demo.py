"""Does the demo learn everywhere? Held-out accuracy over seeds and vector widths of the CPU.

    python -m benchmarks.demo --out demos                          5 seeds x 3 widths
    python -m benchmarks.demo --out demos --seeds 0 --widths avx2 --compare causal

The width of vector instructions changes the order of sums, so it changes the last bit of every product, as another CPU
would. Every run is PT and SFT by the shipped recipes, an export and its held-out accuracy. Finished runs are kept: the
same command continues. ``--compare`` trains SFT under another policy as well, from the same PT.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from subprocess import CalledProcessError, run
from typing import Any

import numpy as np

from pipeline.study.statistics import estimate

WIDTHS = {
    "default": {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41", "MKL_ENABLE_INSTRUCTIONS": "SSE4_2"},
    "avx2": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"},
    "avx512": {
        "ATEN_CPU_CAPABILITY": "avx512",
        "ONEDNN_MAX_CPU_ISA": "AVX512_CORE",
        "MKL_ENABLE_INSTRUCTIONS": "AVX512",
    },
}
"""What each width sets for torch's own kernels, oneDNN and MKL."""
FAMILIES = ("colour", "count", "exist")
POLICY = "mma"


@dataclass(frozen=True)
class Trial:
    """One demo: a seed at a vector width."""

    out: Path
    seed: int
    width: str
    ranks: int
    packs: Path

    @property
    def folder(self) -> Path:
        """Where its runs lie."""
        return self.out / f"{self.width}-{self.seed}"

    def made(self, policy: str) -> Path:
        """Return the file with its scores, answers and seconds."""
        return self.folder / f"{policy}.json"

    def measure(self, policy: str) -> None:
        """Train and evaluate, unless that is done."""
        if self.made(policy).is_file():
            return
        began = time.monotonic()
        self._train("pt", self.folder / "pt")
        sft = self.folder / policy
        self._train("sft", sft, "--init-from", str(self.folder / "pt"), "--mask.policy", policy)
        self._call("evaluate", "--model", str(sft), "--packs", str(self.packs / "eval"))
        (found,) = json.loads((sft / "export/evaluation.json").read_text()).values()
        self.made(policy).write_text(json.dumps({**found, "seconds": time.monotonic() - began}))

    def _train(self, stage: str, folder: Path, *flags: str) -> None:
        words = ["--ranks", str(self.ranks), "--recipe", f"demo_{stage}", "--run-dir", str(folder)]
        words += ["--train.seed", str(self.seed), "--data.packs", str(self.packs / stage)]
        self._call("train", *words, "--log.tensorboard", "false", *flags)

    def _call(self, *words: str) -> None:
        env = {**os.environ, "OMP_NUM_THREADS": "1", **WIDTHS[self.width]}
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / "log.txt").open("a") as log:
            run([sys.executable, "-m", "pipeline.cli", *words], env=env, stdout=log, stderr=log, check=True)


def lines(trials: Sequence[Trial], policy: str) -> Iterator[str]:
    """Yield the table of the finished trials under a policy, and its extremes."""
    yield "| seed | vectors | " + " | ".join(FAMILIES) + " | all | minutes |"
    yield "|---|---|" + "---:|" * (len(FAMILIES) + 2)
    columns: list[list[float]] = []
    for trial in trials:
        if not trial.made(policy).is_file():
            continue
        found = json.loads(trial.made(policy).read_text())
        scores = [100 * found["scores"][name]["accuracy"] for name in (*FAMILIES, "all")]
        columns.append([*scores, found["seconds"] / 60])
        yield _line(trial.seed, trial.width, columns[-1])
    if columns:
        yield _line("", "lowest", np.min(columns, axis=0))
        yield _line("", "highest", np.max(columns, axis=0))


def _line(seed: object, width: str, numbers: Sequence[float]) -> str:
    return f"| {seed} | {width} | " + " | ".join(f"{number:.1f}" for number in numbers) + " |"


def difference(trials: Sequence[Trial], policy: str) -> str:
    """Return the mean difference of accuracy to another policy, paired by run and question, with its interval."""
    pairs = [[_right(trial, each) for each in (POLICY, policy)] for trial in trials if trial.made(policy).is_file()]
    found = estimate(100 * np.array([ours - theirs for ours, theirs in pairs]))
    return (
        f"{POLICY} - {policy}: {found.mean:+.1f} points, 95 % interval {found.low:+.1f} to {found.high:+.1f} "
        f"({len(pairs)} pairs of runs, bootstrap over runs and questions)"
    )


def _right(trial: Trial, policy: str) -> np.ndarray[Any, np.dtype[np.float64]]:
    answers = json.loads(trial.made(policy).read_text())["answers"]
    return np.array([answer["right"] for answer in answers], dtype=np.float64)  # in the order of the held-out packs


def main(argv: Sequence[str] | None = None) -> int:
    """Run what is missing and print the tables; 1 if a run failed."""
    options = _parser().parse_args(argv)
    data = options.data or options.out / "data"
    run([sys.executable, "-m", "data_prep", "demo", str(data)], check=True)
    trials = [
        Trial(options.out, seed, width, options.ranks, data / "packs")
        for seed, width in product(options.seeds, options.widths)
    ]
    policies = [POLICY, *([options.compare] if options.compare else [])]

    def measure(trial: Trial) -> str:
        """Return what went wrong, or nothing."""
        try:
            for policy in policies:
                trial.measure(policy)
        except CalledProcessError:
            return f"{trial.folder}/log.txt ends with an error"
        print(f"{trial.folder.name} is done", flush=True)
        return ""

    with ThreadPoolExecutor(options.at_once) as pool:
        failed = [problem for problem in pool.map(measure, trials) if problem]
    for policy in policies:
        print(f"\n{policy}\n\n" + "\n".join(lines(trials, policy)))
    if options.compare and not failed:
        print(f"\n{difference(trials, options.compare)}")
    print("\n".join(failed), file=sys.stderr)
    return 1 if failed else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of all runs")
    parser.add_argument("--data", type=Path, help="demo data (default: OUT/data, drawn if missing)")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(5)))
    parser.add_argument("--widths", nargs="+", choices=WIDTHS, default=list(WIDTHS))
    parser.add_argument("--ranks", type=int, default=2, help="ranks of a run (default: 2)")
    parser.add_argument("--at-once", type=int, default=1, help="runs at the same time (default: 1)")
    parser.add_argument("--compare", metavar="POLICY", help="another mask policy for SFT: causal")
    return parser


if __name__ == "__main__":
    sys.exit(main())
