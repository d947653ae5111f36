"""Tiny files in the official format of every benchmark, and a model that answers from a script."""

from __future__ import annotations

import base64
import csv
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from data_prep.example import Turn
from data_prep.text.template import Template
from pipeline.evaluation.benchmarks.mme import COGNITION, PERCEPTION
from tests.pipeline.serving.helpers import picture


def png(seed: int) -> bytes:
    return picture(seed).read()


def cell(seed: int) -> dict[str, Any]:
    """An image as `datasets` writes it to Parquet."""
    return {"bytes": png(seed), "path": f"{seed}.png"}


def parquet(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(list(rows)), path)


def tsv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter="\t")
        writer.writeheader()
        writer.writerows(rows)


def jsonl(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def images(folder: Path, names: Sequence[str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for seed, name in enumerate(names):
        (folder / name).write_bytes(png(seed))


def write_mme(data: Path) -> None:
    """The release folder: all categories, in its two layouts, and the folder of answers that it comes with."""
    for category in (*PERCEPTION, *COGNITION):
        nested, folder = category == "code_reasoning", data / "mme" / category
        images(folder / "images" if nested else folder, ["0001.png" if nested else "0001.jpg"])
        path = folder / ("questions_answers_YN/0001.txt" if nested else "0001.txt")
        path.parent.mkdir(exist_ok=True)
        ask = "Does it print a {}? " if nested else "Is there a {} in this image? "
        answers = (("cat", "Yes"), ("dog", "No"))
        path.write_text("".join(f"{ask.format(word)}Please answer yes or no.\t{answer}\n" for word, answer in answers))
    (data / "mme/eval_tool/Your_Results").mkdir(parents=True)
    (data / "mme/eval_tool/Your_Results/existence.txt").write_text("0001.jpg\tIs it?\tYes\tno\n")


def write_mme_parquet(data: Path, category: str) -> None:
    rows = [
        {"question_id": f"{category}/{n // 2}.png", "image": cell(n // 2), "category": category}
        | {"question": f"Is {n} there? Please answer yes or no.", "answer": "Yes" if n % 2 == 0 else "No"}
        for n in range(4)
    ]
    parquet(data / "mme" / "test.parquet", rows)


def write_mmbench(data: Path) -> None:
    """The circular TSV: two questions, four rotations of the first, two of the second, images once."""
    options = ["cat", "dog", "bus", "car"]
    rows = []
    for turn in range(4):
        own = options[turn:] + options[:turn]
        named = dict(zip("ABCD", own, strict=True))
        answer = "ABCD"[own.index("cat")]
        image = base64.b64encode(png(1)).decode() if turn == 0 else "7"
        rows.append({"index": 7 + turn * 1_000_000, "question": "What is it?", "hint": "nan" if turn else ""} | named)
        rows[-1] |= {"answer": answer, "category": "identity", "l2-category": "finegrained", "image": image}
    for turn in range(2):
        own = ["left", "right"] if turn == 0 else ["right", "left"]
        image = base64.b64encode(png(2)).decode() if turn == 0 else "8"
        row = {"index": 8 + turn * 1_000_000, "question": "Which side?", "hint": "Look.", "A": own[0], "B": own[1]}
        row |= {"C": "", "D": "", "answer": "AB"[own.index("left")], "category": "relation"}
        rows.append(row | {"l2-category": "reasoning", "image": image})
    tsv(data / "mmbench" / "MMBench_DEV_EN.tsv", sorted(rows, key=lambda row: int(row["index"])))


def write_seed(data: Path) -> None:
    folder = data / "seed-bench"
    images(folder / "SEED-Bench-image", ["1454426_2591111986", "2", "3"])
    choices = {f"choice_{letter}": word for letter, word in zip("abcd", ("one", "two", "six", "ten"), strict=True)}
    row = {"question": "How many?", "answer": "B", "data_type": "image", "question_type_id": 5, **choices}
    questions = [
        row | {"question_id": "101669", "data_id": "1454426_2591111986"},
        row | {"question_id": "101670", "data_id": "2", "answer": "D", "question_type_id": 1},
        row | {"question_id": "101671", "data_id": "3"},
        row | {"question_id": "v1", "data_id": "clip.mp4", "data_type": "video"},
    ]
    kinds = {"Scene Understanding": 1, "Instances Counting": 5}
    (folder / "SEED-Bench.json").write_text(json.dumps({"question_type": kinds, "questions": questions}))


RULE = {"role": "Assistant", "prompt": "Please rate both answers with two numbers in the first line."}


def write_llava_w(data: Path) -> None:
    folder = data / "llava-bench-in-the-wild"
    names = ["001.jpg", "002.jpg"]
    images(folder / "images", names)
    kinds = ("conv", "detail", "complex")
    rows = [{"question_id": n, "image": names[n % 2], "text": f"What is {n}?", "category": kinds[n]} for n in range(3)]
    jsonl(folder / "questions.jsonl", rows)
    jsonl(folder / "context.jsonl", [{"id": name, "image": name, "caption": "A scene."} for name in names])
    jsonl(folder / "answers_gpt4.jsonl", [{"question_id": n, "text": "A reference."} for n in range(3)])
    (folder / "rule.json").write_text(json.dumps({f"llava_bench_{kind}": RULE for kind in kinds}))


def write_mmmu(data: Path) -> None:
    none = {f"image_{n}": None for n in range(1, 8)}
    common = {"explanation": "", "img_type": "['Plots']", "topic_difficulty": "Easy", "subfield": "x"}
    art = [
        {"id": "validation_Art_1", "question": "Compare <image 1> with <image 2>.", "options": "['red', 'blue']"}
        | {"answer": "A", "question_type": "multiple-choice", **common, **none, "image_1": cell(1), "image_2": cell(2)},
        {
            "id": "validation_Art_2",
            "question": "What colour is this?",
            "options": "['red', \"it's blue\", 'six', 'ten']",
        }
        | {"answer": "B", "question_type": "multiple-choice", **common, **none, "image_1": cell(3)},
    ]
    math = [
        {
            "id": "validation_Math_1",
            "question": "How many in <image 1>?",
            "options": "[]",
            "answer": "['24/7', '3.429']",
        }
        | {"question_type": "open", **common, **none, "image_1": cell(4)},
        {"id": "validation_Math_2", "question": "Name <image 1>.", "options": "[]", "answer": "Circle"}
        | {"question_type": "open", **common, **none, "image_1": cell(5)},
    ]
    parquet(data / "mmmu" / "Art" / "validation-00000-of-00001.parquet", art)
    parquet(data / "mmmu" / "Math" / "validation-00000-of-00001.parquet", math)


EXAMPLES = (
    "Please read the following example. Then extract the answer.\n\nModel response: It is 14.\n\nExtracted answer: 14\n"
)


def write_mathvista(data: Path) -> None:
    folder = data / "mathvista"
    common = {"image": "images/1.jpg", "unit": None, "metadata": {"task": "geometry", "skills": ["algebra"]}}
    rows = [
        {"pid": "1", "question_type": "multi_choice", "answer_type": "text", "choices": ["3/11", "8/11"]}
        | {"precision": None, "answer": "8/11", "query": "Choices: (A) 3/11 (B) 8/11", "decoded_image": cell(1)},
        {"pid": "2", "question_type": "free_form", "answer_type": "float", "choices": None}
        | {"precision": 1.0, "answer": "1.2", "query": "How long?", "decoded_image": cell(2)},
        {"pid": "3", "question_type": "free_form", "answer_type": "integer", "choices": None}
        | {"precision": None, "answer": "14", "query": "How many?", "decoded_image": cell(3)},
    ]
    parquet(folder / "testmini-00000-of-00001.parquet", [row | common for row in rows])
    (folder / "ext_ans.py").write_text(f"# pids = 852\n\ndemo_prompt = {EXAMPLES!r}\n")


def write_pope(data: Path) -> None:
    folder = data / "pope"
    images(folder / "val2014", ["COCO_val2014_1.jpg", "COCO_val2014_2.jpg"])
    for split in ("random", "popular", "adversarial"):
        rows = [
            {
                "question_id": n + 1,
                "image": f"COCO_val2014_{n // 2 + 1}.jpg",
                "text": f"Is there a {word} in the image?",
            }
            | {"label": "yes" if n % 2 == 0 else "no"}
            for n, word in enumerate((f"cat{split}", "dog", "bus", "car"))
        ]
        jsonl(folder / f"coco_pope_{split}.json", rows)


FEW_SHOT = "Compare them.\n\nQuestion | Ground truth | Prediction | Correctness\n--- | --- | --- | ---\n"


def write_mm_vet(data: Path) -> None:
    folder = data / "mm-vet"
    images(folder / "images", ["v1_0.png", "v1_1.png"])
    rows = {
        "v1_0": {
            "imagename": "v1_0.png",
            "question": "What is x?",
            "answer": "-1 <AND> -5",
            "capability": ["ocr", "math"],
        },
        "v1_1": {"imagename": "v1_1.png", "question": "Who is it?", "answer": "A<OR>B", "capability": ["rec"]},
    }
    (folder / "mm-vet.json").write_text(json.dumps(rows))
    (folder / "mm-vet_evaluator.py").write_text(f"import os\n\nprompt = {FEW_SHOT!r}\nos.abort()\n")


def write_realworldqa(data: Path) -> None:
    letter = (
        "Which way?\n\nA. left\nB. right\nC. on\nPlease answer directly with only the letter of the correct option."
    )
    rows = [
        {"image": cell(1), "question": letter, "answer": "B", "image_path": "0.webp"},
        {"image": cell(2), "question": letter, "answer": "A", "image_path": "1.webp"},
        {"image": cell(3), "question": "How many? Please answer directly with a single word or number.", "answer": "3"}
        | {"image_path": "2.webp"},
    ]
    parquet(data / "realworldqa" / "test-00000-of-00001.parquet", rows)


def write_cv_bench(data: Path) -> None:
    def row(idx: int, kind: str, source: str, answer: str) -> dict[str, Any]:
        prompt = "How many? Select from the following choices.\n(A) 0\n(B) 1\n(C) 2"
        task = "Count" if kind == "2D" else "Depth"
        about = {"idx": idx, "type": kind, "task": task, "source": source, "answer": answer}
        return about | {"image": cell(idx), "choices": ["0", "1", "2"], "prompt": prompt, "question": "How many?"}

    two = [row(0, "2D", "ADE20K", "(A)"), row(1, "2D", "COCO", "(B)"), row(2, "2D", "COCO", "(C)")]
    parquet(data / "cv-bench" / "test_2d.parquet", two)
    parquet(data / "cv-bench" / "test_3d.parquet", [row(3, "3D", "Omni3D", "(A)"), row(4, "3D", "Omni3D", "(B)")])


def write_own(data: Path) -> None:
    """Questions of one's own for vqa, gqa, boxes and captions."""
    references = {
        "vqa": ["two"] * 7 + ["2"] * 2 + ["three"],
        "gqa": ["red"],
        "boxes": ["[0.100, 0.100, 0.500, 0.500]"],
        "captions": ["a red circle on white"],
    }
    for name, wanted in references.items():
        images(data / name / "images", ["1.png", "2.png"])
        rows = [{"id": str(n), "images": [f"{n}.png"], "question": "What?", "references": wanted} for n in (1, 2)]
        jsonl(data / name / "questions.jsonl", rows)


WRITERS: tuple[Callable[[Path], None], ...] = (
    *(write_mme, write_mmbench, write_seed, write_llava_w, write_mmmu, write_mathvista, write_pope, write_mm_vet),
    *(write_realworldqa, write_cv_bench),
)


def write_all(data: Path) -> Path:
    for write in WRITERS:
        write(data)
    return data


class Scripted:
    """A model that looks an answer up by the text of its prompt, and keeps what it was asked."""

    def __init__(self, answer: Callable[[str], str], order: str = "image_first") -> None:
        self.template = Template("plain", order=order)  # type: ignore[arg-type]
        self.asked: list[Turn] = []
        self.batches: list[int] = []
        self._answer = answer

    def prompt(self, turns: Sequence[Turn]) -> Any:
        (turn,) = turns
        self.asked.append(turn)
        return SimpleNamespace(text="".join(part for part in turn.parts if isinstance(part, str)))

    def generate(self, prompts: Sequence[Any], *, max_new_tokens: int, **options: Any) -> list[str]:
        self.batches.append(len(prompts))
        return [self._answer(prompt.text) for prompt in prompts]
