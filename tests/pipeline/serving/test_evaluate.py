"""Accuracy on packs: the questions equal those of the packs, and the counts are right."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from rich.console import Console

from data_prep.cli import main as prepare
from data_prep.common.errors import UserError
from data_prep.example import ImageRef, Turn
from data_prep.packs import PackReader
from data_prep.text.template import template_of
from data_prep.text.tokenizer import Tokenizer
from pipeline.config.schema import ModelConfig
from pipeline.model.spec import ModelSpec
from pipeline.serving.evaluate import Answer, Score, evaluate, normal, questions, save, scores, show
from pipeline.serving.export import export
from pipeline.serving.model import MultimodalModel, load_model
from tests.pipeline.model.helpers import model_config, whole_stage
from tests.pipeline.serving.helpers import Saved, make_export


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("demo")
    assert prepare(["demo", str(out), "--scenes", "60", "--held-out", "12", "--workers", "1"]) == 0
    return out


@pytest.fixture(scope="module")
def packs(world: Path) -> PackReader:
    return PackReader(world / "packs" / "eval")


def trained_on(packs: PackReader, folder: Path) -> Path:
    """Export a tiny random model that fits the packs."""
    manifest = packs.manifest
    raw = model_config(max_position_embeddings=512).model_dump()
    raw["connector"]["latents"] = manifest.image_tokens
    spec = ModelSpec.resolve(
        ModelConfig.model_validate(raw), vocab_size=manifest.vocab_size, image_tokens=manifest.image_tokens
    )
    meta = {
        "spec": spec.to_dict(),
        "policy": "mma",
        "template": asdict(template_of(manifest)),
        "image_id": manifest.image_id,
        "pad_id": manifest.pad_id,
        "eos_ids": list(manifest.eos_ids),
        "tokenizer": str(packs.directory / manifest.tokenizer),
        "dtype": "float32",
    }
    return export(Saved(whole_stage(spec), meta), folder)


@pytest.fixture(scope="module")
def folder(packs: PackReader, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained_on(packs, tmp_path_factory.mktemp("model") / "export")


@pytest.fixture(scope="module")
def model(folder: Path) -> MultimodalModel:
    return load_model(folder)


def test_questions_are_those_of_the_raw_corpus(world: Path, packs: PackReader, model: MultimodalModel) -> None:
    raw = json.loads((world / "raw" / "vqav2" / "val_annotations.json").read_text())["annotations"]
    texts = json.loads((world / "raw" / "vqav2" / "val_questions.json").read_text())["questions"]
    wording = {str(entry["question_id"]): entry["question"] for entry in texts}
    found = {question.sample: question for question in questions(packs)}
    assert len(found) == len(raw) == len(list(questions(packs)))
    blank = ImageRef("any", data=b"")
    for entry in raw:
        sample = str(entry["question_id"])
        question = found[sample]
        pieces = model.template.prompt_pieces([Turn("user", (blank, wording[sample]))])
        wanted = model.tokenizer.encode(pieces, packs.manifest.image_tokens)
        for column in ("ids", "modality", "instance", "generated"):
            assert getattr(question.prompt, column).tolist() == getattr(wanted, column).tolist()
        assert model.answer_text(question.reference_ids) == entry["multiple_choice_answer"]
        assert question.family == entry["question_type"]
        assert len(question.image_rows) == 1


def test_answers_do_not_depend_on_the_batch(model: MultimodalModel, packs: PackReader) -> None:
    together, alone = evaluate(model, packs, batch=64), evaluate(model, packs, batch=1)
    assert together == alone
    assert [answer.sample for answer in together] == [question.sample for question in questions(packs)]


def test_the_limit_takes_the_first_questions(model: MultimodalModel, packs: PackReader) -> None:
    assert [answer.sample for answer in evaluate(model, packs, limit=3)] == [q.sample for q in questions(packs)][:3]


@pytest.mark.parametrize(
    ("text", "wanted"),
    [("Two.", "two"), ("  light   Blue ", "light blue"), ("", ""), ("3.5", "3.5"), ("No . ", "no"), ("u.s.", "u.s")],
)
def test_normal_form(text: str, wanted: str) -> None:
    assert normal(text) == wanted


def answers(*rows: tuple[str, str, str]) -> list[Answer]:
    return [
        Answer(str(i), family, ref, text, normal(ref) == normal(text)) for i, (family, ref, text) in enumerate(rows)
    ]


def test_scores_count_right_answers_and_the_best_constant() -> None:
    rows = answers(
        ("colour", "red", "red"),
        ("colour", "Red", "blue"),
        ("colour", "blue", "blue."),
        ("count", "2", "3"),
        ("count", "3", "3"),
    )
    table = scores(rows)
    assert table == {"colour": Score(3, 2, 2), "count": Score(2, 1, 1), "all": Score(5, 3, 3)}
    assert (table["all"].accuracy, table["count"].chance) == (0.6, 0.5)


def test_the_table_and_the_file_agree(tmp_path: Path) -> None:
    rows = answers(("colour", "red", "red"), ("count", "2", "3"))
    results = {"first": rows, "second": [replace(row, right=True) for row in rows]}
    console = Console(record=True, width=100)
    show(results, console)
    text = console.export_text()
    assert "50.0 %" in text and "100.0 %" in text and "best guess" in text and "two runs, not two methods" in text
    save(results, tmp_path / "out.json")
    saved = json.loads((tmp_path / "out.json").read_text())
    assert saved["first"]["scores"]["all"] == {"asked": 2, "right": 1, "guess": 2, "accuracy": 0.5, "chance": 1.0}
    assert saved["second"]["answers"][1]["right"]


def test_packs_of_another_model_are_refused(packs: PackReader, model: MultimodalModel, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has 16 tokens per image, the model 5"):
        evaluate(load_model(make_export(tmp_path)), packs)
    other = MultimodalModel(model.export_config, model._stage, Tokenizer.load(tmp_path / "tokenizer"))
    with pytest.raises(UserError, match="different tokenizer"):
        evaluate(other, packs)
