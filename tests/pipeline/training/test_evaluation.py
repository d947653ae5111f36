"""Evaluation during training: right on every grid, and without a trace in the run."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from data_prep.images.store import ImageStore
from data_prep.packs import PackReader, PackRow, last_answer
from pipeline.checkpoints.checkpoint import checkpoint_folders, prune
from pipeline.config.schema import ConfigError, build_config
from pipeline.data.batches import stage_inputs
from pipeline.model.inputs import IGNORE
from pipeline.parallel.ds_config import complete_ds_config
from pipeline.serving.evaluate import evaluate, scores
from pipeline.serving.export import export_run
from pipeline.serving.model import MultimodalModel, decode_image, load_model
from pipeline.train import main
from pipeline.training.evaluation import HeldOut
from pipeline.training.run.best import ACCURACY, Best, evaluations_up_to
from tests.pipeline.training.runs import curve, flags, metrics, same_bits, train, weights

FAST = [
    "--train.lr", "1e-2", "--train.schedule", "constant", "--train.warmup-steps", "0",
    "--model.llm.config.hidden_size", "96", "--model.llm.config.intermediate_size", "256",
    "--model.llm.config.num_attention_heads", "4", "--model.llm.config.head_dim", "24",
    "--model.llm.config.num_hidden_layers", "4", "--train.global-batch-size", "6", "--train.steps", "12",
]  # fmt: skip
"""After twelve steps some answers are right and some are wrong. Four layers make two virtual stages of two stages."""


def evaluated(demo: Path, *more: str) -> list[str]:
    return [*FAST, "--eval.packs", str(demo / "packs/eval"), "--eval.every-steps", "4", *more]


def evaluations(run_dir: Path) -> list[dict[str, float]]:
    return [line["eval"] for line in metrics(run_dir) if line["eval"]]


@pytest.fixture(scope="module")
def run(small_demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 2 ranks, evaluated after every fourth step, stopped after its first and resumed."""
    run_dir = tmp_path_factory.mktemp("evaluated") / "run"
    words = evaluated(small_demo, "--checkpoint.best", f"val/{ACCURACY}/exist", "--checkpoint.keep-last", "1")
    train(small_demo, run_dir, *words, "--checkpoint.every-steps", "1", "--train.max-hours", "1e-9").check()
    assert len(metrics(run_dir)) == 1
    output = train(small_demo, run_dir, *words, "--checkpoint.every-steps", "1").check().output
    assert "eval 12  val/loss " in output
    return run_dir


@pytest.mark.slow
def test_the_run_is_the_same_to_the_bit(run: Path, small_demo: Path, tmp_path: Path) -> None:
    train(small_demo, tmp_path / "plain", *FAST).check()
    assert curve(run) == curve(tmp_path / "plain")
    assert same_bits(weights(run), weights(tmp_path / "plain"))
    assert [line["step"] for line in metrics(run) if line["eval"]] == [4, 8, 12]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "more"),
    [
        pytest.param(4, ["--parallel.gathered-fraction", "0"], id="2 stages of 2 ranks"),
        pytest.param(2, ["--parallel.schedule", "interleaved", "--parallel.virtual-stages", "2"], id="virtual stages"),
    ],
)
def test_the_grid_does_not_matter(ranks: int, more: list[str], run: Path, small_demo: Path, tmp_path: Path) -> None:
    words = [*evaluated(small_demo), "--parallel.pp", "2", "--train.steps", "4", *more]
    train(small_demo, tmp_path / "run", *words, ranks=ranks).check()
    assert evaluations(tmp_path / "run") == [pytest.approx(evaluations(run)[0], rel=1e-5)]


@pytest.mark.slow
def test_the_numbers_are_those_of_the_model(run: Path, small_demo: Path) -> None:
    """Loss: against logits of every position, in plain words. Accuracy: against greedy decoding by `mma evaluate`."""
    model = load_model(export_run(run, run.parent / "export"))
    packs, found = PackReader(small_demo / "packs/eval"), evaluations(run)[-1]
    decoded = scores(evaluate(model, packs))
    assert 0 < decoded["all"].right < decoded["all"].asked
    assert found[f"val/{ACCURACY}"] == decoded.pop("all").accuracy
    assert {f"val/{ACCURACY}/{name}": score.accuracy for name, score in decoded.items()} == {
        name: value for name, value in found.items() if name.count("/") == 2 and ACCURACY in name
    }
    losses = [loss for row in packs for loss in slow_losses(model, packs, row)]
    assert found["val/loss"] == found["val/loss/vqa_val"] == pytest.approx(np.mean(losses), rel=1e-5)


def slow_losses(model: MultimodalModel, packs: PackReader, row: PackRow) -> list[float]:
    store = ImageStore(packs.directory / packs.manifest.image_store)
    images = [decode_image("", store.read(int(index))) for index in row.image_row]
    pixels = model.spec.towers["vision"].preprocess.batch(images)
    inputs = stage_inputs([row], model.policy, pixels)
    with torch.no_grad():
        hidden = model.stage.model.norm(model.stage.decode(model.stage.embed(inputs), inputs))
        chances = model.stage.lm_head.logits(hidden[0]).log_softmax(-1)
    return [-float(chances[at, label]) for at, label in enumerate(inputs.labels.tolist()) if label != IGNORE]


@pytest.mark.slow
def test_the_best_checkpoint_stays(run: Path) -> None:
    best = json.loads((run / "best.json").read_text())
    values = {line["step"]: line["eval"][best["metric"]] for line in metrics(run) if line["eval"]}
    assert best["value"] == max(values.values()) and best["step"] == min(
        s for s, v in values.items() if v == best["value"]
    )
    kept = {folder.name for folder in checkpoint_folders(run)}
    assert kept >= {Path(best["checkpoint"]).name, "step-00000012"} and len(kept) <= 3


def test_retention_keeps_the_best(tmp_path: Path) -> None:
    for step in range(1, 6):
        (tmp_path / f"checkpoints/step-{step:08d}").mkdir(parents=True)
    prune(tmp_path, 1, newest=tmp_path / "checkpoints/step-00000005", proven=4, best=2)
    assert [int(folder.name[5:]) for folder in checkpoint_folders(tmp_path)] == [5, 4, 2]


def test_better_is_lower_for_a_loss_and_higher_for_an_accuracy() -> None:
    values = [3.0, math.nan, 1.0, 1.0, 2.0]
    for metric, step in (("val/loss", 2), ("val/loss/a", 2), (f"val/{ACCURACY}/x", 0)):
        best = Best.of(metric, [(step, {metric: value}) for step, value in enumerate(values)])
        assert best is not None and best.step == step
    assert Best.of("val/loss", [(1, {"val/loss": math.nan})]) is None


def test_evaluations_are_read_up_to_the_resumed_step(tmp_path: Path) -> None:
    lines = [
        {"step": 1, "eval": None},
        {"step": 2, "eval": {"val/loss": 2.0, "val/loss/a": None}},
        {"step": 4, "eval": {}},
    ]
    text = "\n".join(map(json.dumps, [*lines, {"step": 6, "eval": {"val/loss": 1.0}}])) + '\n{"step": 5, "ev'
    (tmp_path / "metrics.jsonl").write_text(text)
    assert evaluations_up_to(tmp_path / "metrics.jsonl", 5) == [(2, {"val/loss": 2.0})]


@pytest.mark.parametrize(("dp", "microbatches"), [(1, 1), (2, 3), (3, 1), (4, 8)])
def test_every_row_is_evaluated_once(dp: int, microbatches: int, small_demo: Path) -> None:
    held_out = HeldOut("val", PackReader(small_demo / "packs/eval"), 0)
    groups = [list(held_out.groups(dp, rank, microbatches)) for rank in range(dp)]
    assert len({len(own) for own in groups}) == 1, "all ranks take part in as many forwards"
    assert sorted(row for own in groups for group in own for row in group if row >= 0) == list(range(held_out.rows))


def test_the_cap_counts_samples(small_demo: Path) -> None:
    packs = PackReader(small_demo / "packs/eval")
    for samples in (1, 5, 30):
        rows = HeldOut("val", packs, samples).rows
        held = [len(packs.sources(row)) for row in range(rows)]
        assert sum(held[:-1]) < samples <= sum(held)


def test_the_answer_of_a_segment_is_its_last_generated_run(small_demo: Path) -> None:
    row = PackReader(small_demo / "packs/sft")[0]
    for number in range(1, len(row.source) + 1):
        own = [at for at in range(len(row.segment)) if row.segment[at] == number]
        while own and not row.generated[own[-1]]:
            own.pop()
        tail: list[int] = []
        while own and row.generated[own[-1]]:
            tail.insert(0, own.pop())
        found = last_answer(row, number)
        assert (list(found) if found else []) == (tail if own else [])


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--eval.every-steps", "5"], "every_steps=5 needs packs"),
        (["--checkpoint.best", "val/loss"], "checkpoint.best=val/loss needs evaluations"),
        (["--eval.every-steps", "5", "--eval.packs", "a={eval}", "--checkpoint.best", "b/loss"],
         "names no folder of eval.packs (a)"),
        (["--eval.every-steps", "5", "--eval.packs", "{sft}"], "has the rows the run trains on"),
        (["--eval.every-steps", "5", "--eval.packs", "{eval}/.."], "is not a pack folder"),
        (["--log.wandb", "mine"], "log.wandb=mine needs the package wandb: pip install wandb"),
    ],
)  # fmt: skip
def test_wrong_settings_are_one_line(
    more: list[str], message: str, small_demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = {name: str(small_demo / "packs" / name) for name in ("eval", "sft")}
    words = [word.format(**folders) for word in more]
    assert main(flags(small_demo, tmp_path / "run", *words, "--dry-run")) == 2
    assert message in capsys.readouterr().err


def test_a_project_of_wandb_reaches_deepspeed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.parallel.ds_config.find_spec", lambda name: object())
    config = build_config({"log": {"wandb": "mine"}}, "test")
    done = complete_ds_config({"zero_optimization": {"stage": 3}}, config, microbatch_rows=1, bf16=False)
    assert done["wandb"] == {"enabled": True, "project": "mine"}


def test_several_folders_have_names() -> None:
    named = build_config({"eval": {"packs": "val=a, other = b"}}, "test").eval.packs
    assert named == {"val": "a", "other": "b"}
    with pytest.raises(ConfigError, match=r"eval\.packs"):
        build_config({"eval": {"packs": "a/b=c"}}, "test")
