"""Packed batches: the model gives every sample what it gives it alone, and a loop trains as with dense masks."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from data_prep.common.errors import UserError
from data_prep.packs import PackReader
from pipeline.hf import PackedCollator, PackedRows, enable_mma
from pipeline.masks import Sidecars, dense_mask
from pipeline.prober import assert_no_leak
from tests.pipeline.hf.models import CLASSES, IMAGE_ID, Rows, tiny

LAYOUTS = ("V4 Q2 A3", "Q1 V4 Q1 V4 Q2 A2 Q1 A2", "Q3 A2", "V4 Q1 A1")
TIGHT = {"rtol": 1e-5, "atol": 1e-5}


def samples(name: str) -> list[dict[str, Any]]:
    """The samples as a trainer's dataset gives them: what a processor made of each alone."""
    made = []
    for number, layout in enumerate(LAYOUTS):
        alone = Rows.of(name, layout)
        ids = alone.ids[0].roll(number) if "V" not in layout else alone.ids[0]
        labels = torch.where(alone.generated[0], ids, -100)
        made.append({"input_ids": ids.tolist(), "labels": labels.tolist(), **alone.media()})
    return made


def as_batch(sample: dict[str, Any]) -> dict[str, Any]:
    columns = {key: torch.tensor([sample[key]]) for key in ("input_ids", "labels")}
    media = {key: value for key, value in sample.items() if key not in columns}
    kinds = (columns["input_ids"] == IMAGE_ID).long()
    return {**columns, **media, **({"mm_token_type_ids": kinds} if "image_grid_thw" in sample else {})}


@pytest.mark.parametrize("name", CLASSES)
def test_a_packed_batch_gives_each_sample_what_it_gets_alone(name: str) -> None:
    model, given = enable_mma(tiny(name)), samples(name)
    batch = PackedCollator(model, seq_len=24)(given)
    assert batch["input_ids"].shape == (2, 24)
    logits, seen = model(**batch).logits, 0
    for row, segment in enumerate(batch["segment"]):
        for number in range(1, int(segment.max()) + 1):
            own = segment == number
            ids = batch["input_ids"][row][own].tolist()
            sample = next(sample for sample in given if sample["input_ids"] == ids)
            assert batch["labels"][row][own].tolist() == sample["labels"]
            torch.testing.assert_close(logits[row][own], model(**as_batch(sample)).logits[0], **TIGHT)
            seen += 1
    assert seen == len(given)


def test_a_first_token_is_never_predicted_from_another_sample() -> None:
    sample = {"input_ids": [5, 6, 7], "labels": [5, 6, 7]}
    batch = PackedCollator(tiny("llava"), seq_len=8)([sample, sample])
    assert batch["labels"].tolist() == [[-100, 6, 7, -100, 6, 7, -100, -100]]


def test_a_plain_loop_trains_as_with_dense_masks() -> None:
    """Twenty steps of AdamW: the model's own loss under MMA against a loop that passes the oracle's mask."""
    mine, stock = tiny("llava").train(), tiny("llava").train()
    batch = PackedCollator(mine, seq_len=24)(samples("llava"))
    enable_mma(mine)
    mask = torch.stack([dense_mask("mma", _sidecars(batch, row)) for row in range(2)])[:, None]
    plain = {key: value for key, value in batch.items() if key not in ("labels", "segment")}
    losses = []
    for model in (mine, stock):
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        for _ in range(20):
            optimizer.zero_grad()
            loss = model(**batch).loss if model is mine else _loss(model(**plain, attention_mask=mask).logits, batch)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert losses[19] < losses[0] / 2
    torch.testing.assert_close(losses[:20], losses[20:], rtol=0, atol=1e-6)


def _loss(logits: torch.Tensor, batch: dict[str, Any]) -> torch.Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())


def _sidecars(batch: dict[str, Any], row: int) -> Sidecars:
    image = (batch["input_ids"][row] == IMAGE_ID).long()
    begins = (image == 1) & (F.pad(image, (1, 0))[:-1] == 0)
    instance = torch.where(image == 1, begins.cumsum(0) - 1, -1)
    return Sidecars(batch["segment"][row], image, instance, (batch["labels"][row] != -100).long())


def test_trainer_trains_a_packed_batch(tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason="transformers.Trainer needs accelerate, which is not installed")
    from transformers import Trainer, TrainingArguments

    model = enable_mma(tiny("llava"))
    arguments = TrainingArguments(
        str(tmp_path), max_steps=5, per_device_train_batch_size=4, remove_unused_columns=False, report_to=[],
        use_cpu=True, logging_steps=1, save_strategy="no",
    )  # fmt: skip
    collator = PackedCollator(model, seq_len=24)
    trainer = Trainer(model, arguments, train_dataset=samples("llava"), data_collator=collator)
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert losses[-1] < losses[0]


def test_this_projects_packs_are_read(small_demo: Path) -> None:
    reader = PackReader(small_demo / "packs/sft")
    model = tiny("llava")
    model.resize_token_embeddings(reader.manifest.vocab_size)
    model.config.image_seq_length = reader.manifest.image_tokens
    seen: list[int] = []

    def preprocess(images: list[Any]) -> torch.Tensor:
        seen.append(len(images))
        return torch.zeros(len(images), 3, 16, 16, dtype=torch.float64)

    rows = PackedRows(model, small_demo / "packs/sft", preprocess)
    batch = PackedCollator(model, seq_len=reader.manifest.seq_len)([rows[0], rows[1]])
    assert len(rows) == len(reader)
    assert seen == [len(reader[0].image_row), len(reader[1].image_row)]
    for row in range(2):
        assert batch["segment"][row].tolist() == reader[row].segment.tolist()
        assert int((batch["labels"][row] != -100).sum()) == reader[row].n_target
        image = batch["input_ids"][row] == IMAGE_ID
        assert int(image.sum()) >= len(reader[row].image_row) * reader.manifest.image_tokens
    assert batch["pixel_values"].shape[0] == sum(seen)


def test_mistakes_are_named(small_demo: Path) -> None:
    model = tiny("llava")
    collator = PackedCollator(model, seq_len=8, max_images=1)
    for sample, message in (
        ({"input_ids": [5] * 9, "labels": [5] * 9}, "sample 0 has 9 tokens and 0 images, but a row holds 8"),
        ({"input_ids": [40, 5, 40], "labels": [-100] * 3}, "sample 0 has 3 tokens and 2 images"),
        ({"input_ids": [5, 6]}, r"sample 0 has no labels.*remove_unused_columns=False"),
        ({"input_ids": [5, 6], "labels": [5]}, "2 ids and 1 labels"),
    ):
        with pytest.raises(UserError, match=message):
            collator([sample])
    with pytest.raises(UserError, match="embeddings, but the model has 48: resize them"):
        PackedRows(model, small_demo / "packs/sft", lambda images: torch.zeros(len(images)))
    with pytest.raises(UserError, match="mRoPE"):
        big = copy.deepcopy(tiny("qwen2_5_vl"))
        big.config.get_text_config().vocab_size = 1 << 20
        PackedRows(big, small_demo / "packs/sft", lambda images: torch.zeros(len(images)))


@pytest.mark.parametrize("name", ["llava", "qwen3_vl"])
def test_the_prober_accepts_a_packed_batch(name: str) -> None:
    model = enable_mma(tiny(name))
    one_turn = [sample for number, sample in enumerate(samples(name)) if number != 1]
    assert_no_leak(model, PackedCollator(model, seq_len=24)(one_turn))
