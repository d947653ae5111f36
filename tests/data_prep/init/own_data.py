"""Small data of a user's own, in every layout that ``mma-prep init`` understands."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq

from tests.data_prep.raw import png, write_llava, write_tar

ROWS = 24


def llava(root: Path) -> Path:
    said = ("<image>\nwhat is {}?", "it is {}.", "sure?", "yes")
    write_llava(root, [(f"t{n}", n, tuple(text.format(n) for text in said)) for n in range(ROWS)])
    return root / "llava.json"


def pictures(folder: Path) -> None:
    folder.mkdir(parents=True)
    for n in range(ROWS):
        (folder / f"{n}.png").write_bytes(png(n))


def write_lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def sharegpt(root: Path) -> Path:
    pictures(root / "pics")
    rows = [
        {
            "conversations": [
                {"from": "human", "value": f"<image>\n<image>\ncompare {n}"},
                {"from": "gpt", "value": f"they differ by {n}"},
            ],
            "images": [f"{n}.png", f"{(n + 1) % ROWS}.png"],
        }
        for n in range(ROWS)
    ]
    return write_lines(root / "two.jsonl", rows)


def openai(root: Path) -> Path:
    pictures(root / "pics")
    rows = [
        {
            "messages": [
                {
                    "role": "user",
                    "content": [
                        {"type": "image_url", "image_url": {"url": f"pics/{n}.png"}},
                        {"type": "text", "text": f"name {n}"},
                    ],
                },
                {"role": "assistant", "content": [{"type": "text", "text": f"thing {n}"}]},
            ]
        }
        for n in range(ROWS)
    ]
    return write_lines(root / "parts.jsonl", rows)


def conversations() -> datasets.Dataset:
    said = [
        [{"role": "user", "content": f"name {n}"}, {"role": "assistant", "content": f"no {n}"}] for n in range(ROWS)
    ]
    return datasets.Dataset.from_dict(
        {"image": [{"bytes": png(n), "path": None} for n in range(ROWS)], "messages": said}
    )


def saved(root: Path) -> Path:
    conversations().save_to_disk(str(root / "saved"), num_shards=2)
    return root / "saved"


def saved_splits(root: Path) -> Path:
    whole = conversations()
    datasets.DatasetDict({"train": whole, "validation": whole.select(range(6))}).save_to_disk(str(root / "saved"))
    return root / "saved"


def questions() -> pa.Table:
    return pa.table(
        {
            "image": [{"bytes": png(n), "path": None} for n in range(ROWS)],
            "question": [f"how many {n}?" for n in range(ROWS)],
            "answer": list(range(ROWS)),
        }
    )


def parquet(root: Path) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    pq.write_table(questions(), root / "questions.parquet", row_group_size=7)
    return root / "questions.parquet"


def question_lines(root: Path) -> Path:
    pictures(root / "img" / "a")
    rows = [{"image": f"a/{n}.png", "question": f"how many {n}?", "answer": f"{n}"} for n in range(ROWS)]
    return write_lines(root / "questions.jsonl", rows)


def caption_lines(root: Path) -> Path:
    pictures(root / "img")
    return write_lines(root / "metadata.jsonl", [{"file_name": f"{n}.png", "text": f"a {n}"} for n in range(ROWS)])


def captioned_folder(root: Path) -> Path:
    pictures(root / "pics" / "sub")
    for n in range(ROWS):
        path = root / "pics" / "sub" / f"{n}.png"
        if n % 3:
            path.with_suffix(".txt").write_text(f"a caption of {n}")
        else:
            path.with_suffix(".json").write_text(json.dumps({"caption": f"a JSON caption of {n}"}))
    return root / "pics"


def obelics(root: Path) -> Path:
    pictures(root / "downloads")
    rows = [{"images": [f"https://x.org/{n}.png", None], "texts": [None, f"a text about {n}"]} for n in range(ROWS)]
    return write_lines(root / "documents.jsonl", rows)


def mmc4(root: Path) -> Path:
    pictures(root / "downloads")
    rows = [
        {"text_list": [f"a text about {n}"], "image_info": [{"image_name": f"{n}.png", "matched_text_index": 0}]}
        for n in range(ROWS)
    ]
    return write_lines(root / "documents.jsonl", rows)


def tars(root: Path) -> Path:
    for number in range(2):
        keys = range(number * ROWS, (number + 1) * ROWS)
        write_tar(root / "tars" / f"{number}.tar", {f"{n:04}": (png(n), f"a caption of {n}") for n in keys})
    return root / "tars"


LAYOUTS: dict[str, tuple[Callable[[Path], Path], str, int]] = {
    "llava": (llava, "llava", ROWS),
    "sharegpt": (sharegpt, "chat", ROWS),
    "openai-parts": (openai, "chat", ROWS),
    "save-to-disk": (saved, "chat", ROWS),
    "save-to-disk-splits": (saved_splits, "chat", ROWS),
    "parquet-bytes": (parquet, "table", ROWS),
    "question-lines": (question_lines, "table", ROWS),
    "caption-lines": (caption_lines, "table", ROWS),
    "image-folder": (captioned_folder, "image_folder", ROWS),
    "obelics": (obelics, "interleaved", ROWS),
    "mmc4": (mmc4, "interleaved", ROWS),
    "tars": (tars, "webdataset", 2 * ROWS),
}
"""Layout -> how to write it, the corpus type it must be read with, and its samples."""
