"""Small raw corpora and recipes, drawn on the spot."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from PIL import Image

from data_prep.common.workers import LocalTeam
from data_prep.progress import Reporter
from data_prep.recipe import Recipe, load_recipe
from data_prep.steps import run


def png(seed: int, size: tuple[int, int] = (8, 6)) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", size, (seed * 37 % 256, seed * 91 % 256, seed % 256)).save(stream, "PNG")
    return stream.getvalue()


def write_tar(path: Path, samples: Mapping[str, tuple[bytes, str]]) -> None:
    """A webdataset tar: key -> (image bytes, caption)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for key, (image, caption) in samples.items():
            for suffix, data in (("png", image), ("txt", caption.encode())):
                info = tarfile.TarInfo(f"{key}.{suffix}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))


def write_llava(root: Path, conversations: Sequence[tuple[str, int | None, Sequence[str]]]) -> None:
    """LLaVA's format: (id, image seed or None, utterances by turns)."""
    (root / "images").mkdir(parents=True, exist_ok=True)
    rows = []
    for name, seed, said in conversations:
        row: dict[str, Any] = {"id": name}
        if seed is not None:
            row["image"] = f"{seed}.png"
            (root / "images" / row["image"]).write_bytes(png(seed))
        speakers = ("human", "gpt")
        row["conversations"] = [{"from": speakers[n % 2], "value": text} for n, text in enumerate(said)]
        rows.append(row)
    (root / "llava.json").write_text(json.dumps(rows))


def write_world(root: Path, *, tars: int = 3, captions: int = 20, talks: int = 30) -> None:
    for number in range(tars):
        keys = range(number * captions, (number + 1) * captions)
        # Every tenth image is shared by all tars: the store must keep it once.
        samples = {f"{key:09d}": (png(7 if key % 10 == 0 else key), f"a caption about {key} things") for key in keys}
        write_tar(root / "captions" / f"{number:05d}.tar", samples)
    asked = [
        (f"talk{n}", None if n % 5 == 0 else n, (f"<image>\nwhat is {n}?" if n % 5 else f"what is {n}?", f"it is {n}."))
        for n in range(talks)
    ]
    write_llava(root, asked)


def recipe_dict(root: Path, out: Path) -> dict[str, Any]:
    return {
        "root": str(root),
        "out": str(out),
        "seed": 3,
        "tokenizer": {"train": {"vocab_size": 400, "samples": 1000}},
        "image_tokens": 4,
        "max_bad_fraction": 0.0,
        "corpora": {
            "captions": {"type": "webdataset", "tars": "captions/*.tar"},
            "talk": {"type": "llava", "conversations": "llava.json", "images": "images"},
        },
        "packs": {
            "pt": {"corpora": ["captions"], "template": "caption", "seq_len": 64, "epochs": 2},
            "sft": {"corpora": {"talk": 3.0, "captions": 1.0}, "template": "plain", "seq_len": 96, "draws": 101},
            "eval": {"corpora": ["talk"], "template": "plain", "seq_len": 96, "epochs": 1, "shuffle": False},
        },
    }


def write_recipe(path: Path, content: Mapping[str, Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(dict(content), sort_keys=False))
    return path


def make_recipe(tmp_path: Path, **changes: Any) -> Recipe:
    """The recipe over ``tmp_path/raw`` writing to ``tmp_path/out``, with top-level keys replaced."""
    content = {**recipe_dict(tmp_path / "raw", tmp_path / "out"), **changes}
    return load_recipe(str(write_recipe(tmp_path / "recipe.yaml", content)))


def prepare(recipe: Recipe, workers: int = 1) -> list[str]:
    """Run all steps in this process; return the lines they said."""
    stream = io.StringIO()
    run(recipe, LocalTeam(workers), Reporter(stream))
    return stream.getvalue().splitlines()


def tree_hashes(out: Path) -> dict[str, str]:
    """What a trainer reads: hashes of the packs and the image store."""
    files = [path for part in ("packs", "images") for path in sorted((out / part).rglob("*")) if path.is_file()]
    seen = [path for path in files if ".work" not in path.parts]
    return {str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest() for path in seen}
