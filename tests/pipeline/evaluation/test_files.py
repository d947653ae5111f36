"""Wrong and damaged benchmark files: one line that names the file, the row and what to do; never a traceback."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from data_prep.common.errors import UserError
from pipeline.cli import main
from pipeline.evaluation.registry import BENCHMARKS
from pipeline.evaluation.survey import Survey
from tests.pipeline.evaluation.official import parquet, write_all


def rewrite(path: Path, old: str, new: str) -> None:
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new), encoding="utf-8")


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-40])


BREAKS: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "no folder": (
        "pope",
        lambda d: (d / "pope").rename(d / "elsewhere"),
        "no such folder; pope needs coco_pope_random",
    ),
    "no file": ("seed-i", lambda d: (d / "seed-bench/SEED-Bench.json").unlink(), "SEED-Bench.json: no such file"),
    "not JSON": ("seed-i", lambda d: truncate(d / "seed-bench/SEED-Bench.json"), "not a JSON file"),
    "a list": ("mm-vet", lambda d: (d / "mm-vet/mm-vet.json").write_text("[]"), "expected a JSON object"),
    "missing image": (
        "pope",
        lambda d: (d / "pope/val2014/COCO_val2014_1.jpg").unlink(),
        "line 1: image COCO_val2014_1",
    ),
    "image outside": (
        "pope",
        lambda d: rewrite(d / "pope/coco_pope_popular.json", "COCO_val2014_2.jpg", "../../secret.jpg"),
        "coco_pope_popular.json: line 3: image ../../secret.jpg",
    ),
    "link outside": ("mm-vet", lambda d: link_out(d / "mm-vet/images/v1_0.png"), "links to a file outside"),
    "bad label": ("pope", lambda d: rewrite(d / "pope/coco_pope_random.json", '"no"', '"maybe"'), "not yes or no"),
    "missing split": ("pope", lambda d: (d / "pope/coco_pope_random.json").write_text(""), "expected the splits"),
    "missing key": (
        "pope",
        lambda d: rewrite(d / "pope/coco_pope_random.json", '"text"', '"txt"'),
        "text under 'text'",
    ),
    "truncated Parquet": ("realworldqa", lambda d: truncate(next((d / "realworldqa").glob("*"))), "not a Parquet file"),
    "missing column": (
        "realworldqa",
        lambda d: parquet(d / "realworldqa/test-00000-of-00001.parquet", [{"question": "?", "answer": "A"}]),
        "no column 'image'",
    ),
    "no image bytes": (
        "realworldqa",
        lambda d: parquet(
            d / "realworldqa/test-00000-of-00001.parquet", [{"question": "?", "answer": "A", "image": {"bytes": b""}}]
        ),
        "row 1: no image bytes under 'image'",
    ),
    "truncated TSV": ("mmbench", lambda d: truncate(d / "mmbench/MMBench_DEV_EN.tsv"), "MMBench_DEV_EN.tsv: row"),
    "not base64": ("mmbench", lambda d: rewrite(d / "mmbench/MMBench_DEV_EN.tsv", "iVBOR", "i*BOR"), "no image bytes"),
    "no rotations": ("mmbench", lambda d: keep_lines(d / "mmbench/MMBench_DEV_EN.tsv", 3), "no rotated questions"),
    "half a pair": ("mme-p", lambda d: keep_lines(d / "mme/existence/0001.txt", 1), "has 1 questions, not 2"),
    "no tab": ("mme-c", lambda d: rewrite(d / "mme/text_translation/0001.txt", "\tYes", " Yes"), "question<TAB>answer"),
    "missing category": ("mme-p", lambda d: shutil.rmtree(d / "mme/OCR"), "no questions of the category OCR"),
    "missing source": ("cv-bench-2d", lambda d: cv(d, answer="(A)"), "no questions of ADE20K"),
    "no rule": ("llava-w", lambda d: (d / "llava-bench-in-the-wild/rule.json").write_text("{}"), "llava_bench_conv"),
    "no reference": (
        "llava-w",
        lambda d: keep_lines(d / "llava-bench-in-the-wild/answers_gpt4.jsonl", 1),
        "answers_gpt4.jsonl has no line for question 1",
    ),
    "no script": (
        "mm-vet",
        lambda d: (d / "mm-vet/mm-vet_evaluator.py").unlink(),
        "the benchmark's own evaluation script",
    ),
    "other script": (
        "mm-vet",
        lambda d: (d / "mm-vet/mm-vet_evaluator.py").write_text("x = 1"),
        "no string to 'prompt'",
    ),
    "no Python": ("mathvista", lambda d: (d / "mathvista/ext_ans.py").write_text("<html>"), "not a Python file"),
    "duplicate id": ("pope", lambda d: repeat(d / "pope/coco_pope_random.json"), "two questions have the id random/1"),
    "options": ("mmmu", lambda d: mmmu(d, options="['red'"), "expected a list of texts under 'options'"),
    "code in options": ("mmmu", lambda d: mmmu(d, options="__import__('os').abort()"), "expected a list of texts"),
    "answer beyond": ("mmmu", lambda d: mmmu(d, options="['red']", answer="B"), "the answer 'B' is none of"),
    "image not there": ("mmmu", lambda d: mmmu(d, question="See <image 3>."), "mentions <image 3>"),
    "wrong answer": ("cv-bench-2d", lambda d: cv(d, answer="(F)"), "the answer 'F' is none of A, B"),
    "empty": ("cv-bench-3d", lambda d: cv(d, answer="(A)"), "holds no question"),
}


def link_out(path: Path) -> None:
    outside = path.parents[3] / "outside.png"
    path.rename(outside)
    path.symlink_to(outside)


def keep_lines(path: Path, count: int) -> None:
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:count]))


def repeat(path: Path) -> None:
    path.write_text(path.read_text() * 2)


def mmmu(data: Path, **changed: str) -> None:
    row = {"id": "validation_Art_1", "question": "?", "options": "['red', 'blue']", "answer": "A"}
    for path in (data / "mmmu").rglob("*.parquet"):
        path.unlink()
    image = {"bytes": b"x", "path": ""}
    parquet(data / "mmmu/x.parquet", [row | {"question_type": "multiple-choice", "image_1": image} | changed])


def cv(data: Path, answer: str) -> None:
    row = {"idx": 1, "type": "2D", "task": "Count", "source": "COCO", "choices": ["1", "2"], "prompt": "?"}
    (data / "cv-bench/test_3d.parquet").unlink()
    parquet(data / "cv-bench/test_2d.parquet", [row | {"answer": answer, "image": {"bytes": b"x", "path": ""}}])


@pytest.mark.parametrize("case", BREAKS)
def test_a_wrong_file_is_one_line(case: str, tmp_path: Path) -> None:
    name, damage, message = BREAKS[case]
    data = write_all(tmp_path / "in" / "data")
    assert Survey.of(BENCHMARKS[name], data).questions
    damage(data)
    with pytest.raises(UserError) as error:
        Survey.of(BENCHMARKS[name], data)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["popee"], "unknown benchmark 'popee' (did you mean 'pope'?)"),
        ([""], "unknown benchmark ''"),
        (["pope", "--shard", "3/2"], "--shard 3/2"),
        (["pope", "--model", "nowhere"], "no safetensors there"),
        (["pope", "--judge-url", "ftp://x"], "http or https"),
        (["vqa"], "vqa: no folder"),
    ],
)
def test_wrong_flags_are_one_line(
    words: list[str],
    message: str,
    exports: tuple[Path, Path],
    official: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    flags = ["--data", str(official), "--out", str(tmp_path), "--model", str(exports[0])]
    assert main(["bench", *flags, *words]) == 2
    printed = capsys.readouterr().err
    assert message in printed and printed.count("\n") == 1


def test_a_broken_image_is_named(
    exports: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_all(tmp_path / "data")
    path = data / "mm-vet/images/v1_0.png"
    truncate(path)
    assert Survey.of(BENCHMARKS["mm-vet"], data)
    (data / "gqa/images").mkdir(parents=True)
    (data / "gqa/images/1.png").write_bytes(path.read_bytes())
    row = {"id": "1", "images": ["1.png"], "question": "?", "references": ["x"]}
    (data / "gqa/questions.jsonl").write_text(json.dumps(row))
    flags = ["--data", str(data), "--out", str(tmp_path / "out"), "--model", str(exports[0]), "--device", "cpu"]
    assert main(["bench", "gqa", *flags]) == 2
    assert "image 1.png cannot be used" in capsys.readouterr().err
