"""Rows that spoil a step are found and named: by arithmetic, and in a real run over packs that were tampered with."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from data_prep.cli import main as mma_prep
from data_prep.common.errors import UserError
from data_prep.common.events import EVENTS_FILE
from data_prep.common.files import sha256_file, sha256_line
from data_prep.packs import PackReader, PackRow, Source, write_rows
from pipeline.data.order import BatchOrder
from pipeline.parallel.zero3 import StepResult
from pipeline.training.incidents import LEAST, Incidents, LossHistory, Outcome
from pipeline.training.run.folder import RunFolder
from tests.launch import ROOT, run
from tests.pipeline.training.runs import flags

ROWS, STEPS, POISONED, SHUFFLED = 190, 90, 119, 170


def test_a_spike_is_measured_against_what_came_before() -> None:
    history = LossHistory()
    steady = [2.0 + 0.1 * (-1) ** step for step in range(LEAST)]
    assert [history.add(loss) for loss in steady] == [None] * LEAST
    assert history.add(5.0) == pytest.approx(30.0), "3 above the median, in deviations of 0.1"
    assert history.add(math.nan) is None
    after = history.add(2.0)
    assert after is not None and abs(after) < 1.5, "one spike hardly moves the measure"


def test_losses_that_do_not_move_are_no_measure() -> None:
    history = LossHistory([1.0] * LEAST)
    assert history.add(1.0025) == pytest.approx(0.5)


def look(packs: Path, run: Path, *, limit: int, losses: list[float], applied: bool, steps: int = 1) -> None:
    """Show steps of 2 dp ranks x 2 micro-batches x 3 rows to rank 0."""
    config = SimpleNamespace(
        train=SimpleNamespace(max_skipped_steps=limit), log=SimpleNamespace(spike_mads=10.0),
        data=SimpleNamespace(packs=str(packs)),
    )  # fmt: skip
    plan: Any = SimpleNamespace(
        config=config, packs=PackReader(packs), order=BatchOrder(12, 2, 2), topology=SimpleNamespace(rank=0)
    )
    run.mkdir(exist_ok=True)
    incidents = Incidents(plan, RunFolder(str(run)), step=0)
    for step in range(1, steps + 1):
        batch: Any = SimpleNamespace(rows=range(12 * step, 12 * step + 12), targets=100)
        incidents.check(Outcome(step, StepResult(math.nan, applied), batch, losses))


def written(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line, parse_constant=pytest.fail) for line in (run / EVENTS_FILE).read_text().splitlines()]


def test_micro_batches_without_a_finite_loss_are_named_and_too_many_steps_end_the_run(
    small_demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    packs = small_demo / "packs/sft"
    with pytest.raises(
        UserError, match=r"2 steps in a row had a non-finite loss \(last rows 33\.\.35\): lower train.lr"
    ):
        look(packs, tmp_path / "run", limit=2, losses=[1.0, 2.0, 3.0, math.inf], applied=False, steps=5)
    first, last = written(tmp_path / "run")
    assert (first["kind"], first["loss"], first["code"]) == ("loss not finite", None, "step-skipped")
    assert [row["row"] for row in first["rows"]] == [21, 22, 23]
    sources = [[vars_of(source) for source in PackReader(packs)[row].source] for row in (33, 34, 35)]
    assert [row["sources"] for row in last["rows"]] == sources
    said = capsys.readouterr().out
    assert "step 1: loss not finite, update skipped on all ranks (rows 21..23: " in said
    assert f"inspect: mma-prep inspect {packs} --row 21" in said


def vars_of(source: Source) -> dict[str, object]:
    return {"dataset": source.dataset, "sample": source.sample, "draw": source.draw}


def test_where_only_the_gradient_is_not_finite_all_rows_are_named(
    small_demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    look(small_demo / "packs/sft", tmp_path / "run", limit=2, losses=[1.0] * 4, applied=False)
    (line,) = written(tmp_path / "run")
    assert line["kind"] == "gradient not finite" and len(line["rows"]) == 12
    assert "(rows 12..23: " in capsys.readouterr().out


def tampered(demo: Path, out: Path) -> int:
    """Make packs of one row again and again; one with a token nothing else has, one with other answers.

    Returns that token.
    """
    packs = PackReader(demo / "packs/sft")
    shutil.copytree(packs.directory / packs.manifest.tokenizer, out / "tokenizer")
    first = packs[0]
    used = set(first.input_ids.tolist())
    token = next(number for number in reversed(range(packs.manifest.vocab_size)) if number not in used)
    rows = [named(first, number) for number in range(ROWS)]
    rows[POISONED] = with_token(rows[POISONED], token)
    rows[SHUFFLED] = with_other_answers(rows[SHUFFLED], np.array(sorted(used - {packs.manifest.image_id})))
    entry = write_rows(out / "rows-00000.arrow", rows, packs.manifest.seq_len)
    store = (packs.directory / packs.manifest.image_store).resolve()
    counts = {
        "rows": ROWS,
        "tokens": sum(int((row.segment > 0).sum()) for row in rows),
        "targets": sum(row.n_target for row in rows),
        "images": sum(len(row.image_row) for row in rows),
    }
    manifest = replace(packs.manifest, **counts, files=(entry,), tokenizer="tokenizer", image_store=str(store))
    path = out / "manifest.json"
    path.write_text(manifest.to_json())
    path.with_suffix(".sha256").write_bytes(sha256_line(sha256_file(path), path.name))
    return token


def named(row: PackRow, number: int) -> PackRow:
    return replace(row, source=tuple(replace(s, sample=f"{s.sample}-{number}", draw=number) for s in row.source))


def with_token(row: PackRow, token: int) -> PackRow:
    """Put a token into the given text of the first sample."""
    ids = row.input_ids.copy()
    ids[np.flatnonzero((row.segment == 1) & (row.instance < 0) & (row.generated == 0))[0]] = token
    return replace(row, input_ids=ids)


def with_other_answers(row: PackRow, pool: np.ndarray) -> PackRow:
    ids, places = row.input_ids.copy(), row.generated == 1
    ids[places] = np.random.default_rng(0).choice(pool, int(places.sum()))
    return replace(row, input_ids=ids)


@pytest.mark.slow
def test_a_run_over_tampered_rows_names_them(small_demo: Path, tmp_path: Path) -> None:
    packs, run_dir = tmp_path / "packs", tmp_path / "run"
    token = tampered(small_demo, packs)
    more = ["--data.packs", str(packs), "--train.global-batch-size", "2", "--train.steps", str(STEPS)]
    more += ["--log.every-steps", "50", "--checkpoint.every-steps", "0", "--mask.prove-rows", "0", "--train.lr", "1e-2"]
    script = ROOT / "tests/pipeline/parallel/failing_train.py"
    words = ["poisoned-token", str(token), "0", *flags(small_demo, run_dir, *more)]
    output = run(2, script, *words, env={"PYTHONPATH": str(ROOT)}, launcher="srun").check().output
    odd, *spikes = [line for line in written(run_dir) if line["code"] in ("step-skipped", "loss-spike")]
    assert (odd["kind"], odd["step"], odd["code"], odd["loss"]) == ("loss not finite", 60, "step-skipped", None)
    assert [row["row"] for row in odd["rows"]] == [POISONED]
    assert {source["sample"].rpartition("-")[2] for source in odd["rows"][0]["sources"]} == {str(POISONED)}
    assert {line["kind"] for line in spikes} == {"loss spike"}
    worst = max(spikes, key=lambda line: float(line["mads"]))
    assert (worst["step"], worst["rows"][0]["row"], worst["code"]) == (86, SHUFFLED, "loss-spike")
    assert worst["rows"][0]["loss"] > 2 * worst["rows"][1]["loss"]
    command = f"mma-prep inspect {packs} --row {SHUFFLED}"
    assert command in output and f"mma-prep inspect {packs} --row {POISONED}" in output
    assert mma_prep(command.split()[1:]) == 0
