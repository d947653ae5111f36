"""Transformers' Trainer and TRL's SFTTrainer with MMA, from one start, against this project's trainer on its packs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoImageProcessor, AutoProcessor, LlavaForConditionalGeneration, Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

from data_prep.packs import PackReader
from pipeline.hf import MMACallback, PackedCollator, PackedRows
from pipeline.serving.export import export_run
from tests.pipeline.training.runs import metrics, train

pytestmark = pytest.mark.slow

STEPS, ROWS = 20, 4
SAME = [
    "--train.schedule", "constant", "--train.warmup-steps", "0", "--train.global-batch-size", str(ROWS),
    "--parallel.micro-batches", "0",
]  # fmt: skip

TOWER = ["--model.vision.config.num_hidden_layers", "1"]  # the stock class reads the output of a layer


@pytest.fixture(scope="module")
def start(small_demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two steps of pre-training: a run, and its export as a stock LLaVA beside it."""
    folder = tmp_path_factory.mktemp("trainers")
    train(small_demo, folder / "run", *TOWER, "--train.steps", "2", ranks=1, recipe="demo_pt", packs="pt").check()
    export_run(folder / "run", folder / "llava", layout="llava", prefill_causal=True)
    return folder


@pytest.fixture(scope="module")
def own(start: Path, small_demo: Path) -> list[float]:
    """The losses of this project's trainer from that start."""
    words = [*SAME, *TOWER, "--train.steps", str(STEPS), "--init-from", str(start / "run")]
    train(small_demo, start / "own", *words, ranks=1).check()
    return [line["loss"] for line in metrics(start / "own")]


def stock(start: Path) -> Any:
    """The export, loaded by the stock class; the tower is frozen, as in the recipe."""
    model = LlavaForConditionalGeneration.from_pretrained(start / "llava", dtype=torch.float32)
    model.model.vision_tower.requires_grad_(False)
    return model


def prepared(model: Any, start: Path, small_demo: Path) -> dict[str, Any]:
    """The packed rows in their order, with the export's own image processor, and the collator."""
    processor = AutoImageProcessor.from_pretrained(start / "llava")
    folder = small_demo / "packs/sft"
    rows = PackedRows(model, folder, lambda images: processor(images, return_tensors="pt")["pixel_values"])
    seq_len = PackReader(folder).manifest.seq_len
    return {"train_dataset": rows, "data_collator": PackedCollator(model, seq_len=seq_len)}


OPTIONS: dict[str, Any] = {
    "max_steps": STEPS, "per_device_train_batch_size": ROWS // 2, "gradient_accumulation_steps": 2,
    "learning_rate": 1.5e-3, "lr_scheduler_type": "constant", "weight_decay": 0.01, "adam_beta2": 0.98,
    "max_grad_norm": 1.0, "train_sampling_strategy": "sequential", "remove_unused_columns": False, "report_to": [],
    "use_cpu": True, "bf16": False, "logging_steps": 1, "save_strategy": "no", "disable_tqdm": True,
}  # fmt: skip


def losses(trainer: Any) -> list[float]:
    trainer.train()
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


def test_trainer_reaches_the_losses_of_this_projects_trainer(
    start: Path, own: list[float], small_demo: Path, tmp_path: Path
) -> None:
    model = stock(start)
    arguments = TrainingArguments(str(tmp_path), **OPTIONS)
    trainer = Trainer(model, arguments, callbacks=[MMACallback()], **prepared(model, start, small_demo))
    assert losses(trainer) == pytest.approx(own, abs=1e-4)


def test_sft_trainer_reaches_the_losses_of_this_projects_trainer(
    start: Path, own: list[float], small_demo: Path, tmp_path: Path
) -> None:
    model = stock(start)
    arguments = SFTConfig(str(tmp_path), **OPTIONS, dataset_kwargs={"skip_prepare_dataset": True})
    processor = AutoProcessor.from_pretrained(start / "llava")
    given = prepared(model, start, small_demo)
    given["train_dataset"] = given["train_dataset"].as_dataset()
    trainer = SFTTrainer(model, arguments, processing_class=processor, callbacks=[MMACallback()], **given)
    assert losses(trainer) == pytest.approx(own, abs=1e-4)
