"""One changed byte anywhere in a checkpoint: found before it is used, by one line, on all ranks alike."""

from __future__ import annotations

import json
import os
import random
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from data_prep.common.errors import UserError
from pipeline.checkpoints.checkpoint import Checkpoint, newest_intact
from pipeline.checkpoints.manifest import CheckpointManifest, ParamEntry, hashed_json
from pipeline.checkpoints.writing import Target, save_phases

FLIPS = int(os.environ.get("FLIPS", "200"))
KINDS = ("master", "exp_avg", "exp_avg_sq")


def save(run_dir: Path, step: int) -> Path:
    """Write a checkpoint of two ranks as a run does."""
    tokenizer = run_dir / "tokenizer"
    tokenizer.mkdir(parents=True, exist_ok=True)
    (tokenizer / "tokenizer.model").write_bytes(bytes(range(256)))
    target = Target(run_dir / f"checkpoints/step-{step:08d}", "token")
    manifest = CheckpointManifest(
        step=step, optimizer_steps=step, consumed_packs=4 * step, plan_sha256="0" * 64, global_batch_size=4, pp=1,
        dp=2, config={"train": {"lr": 1e-3}}, model={"spec": {"llm": {}}, "tokenizer_sha256": "0"},
        params={"w": ParamEntry((2, 3), 0, True)},
    )  # fmt: skip
    own = {f"{kind}|w": torch.arange(3.0) for kind in KINDS}
    saves = [save_phases(own, target, manifest, rank=rank, tokenizer=tokenizer) for rank in (0, 1)]
    files = [next(phases)() for phases in saves]
    saves[0].send(files)()
    return target.final


def test_every_changed_byte_is_found_and_the_checkpoint_before_is_taken(tmp_path: Path) -> None:
    before, newest = save(tmp_path, 1), save(tmp_path, 2)
    names = sorted(str(path.relative_to(newest)) for path in newest.rglob("*") if path.is_file())
    assert len(names) == 4, "the manifest, two ranks and the tokenizer"
    generator = random.Random(14)
    for number in range(FLIPS):
        path = newest / (names[number % len(names)] if number % 2 else "manifest.json")
        original = path.read_bytes()
        place = generator.randrange(len(original))
        damaged = bytearray(original)
        damaged[place] ^= generator.randrange(1, 256)
        path.write_bytes(damaged)
        found, faults = newest_intact(tmp_path, rank=0, world=1)
        what = f"flip {number}: byte {place} of {path.name} is {damaged[place]:#x}"
        assert found is not None and found.path == before, what
        assert len(faults) == 1 and "\n" not in faults[0] and str(newest) in faults[0], what
        path.write_bytes(original)
    assert newest_intact(tmp_path, rank=0, world=1)[1] == []


@pytest.mark.parametrize(
    "length", [0, 1, 10, 60, pytest.param(-1, id="the last byte"), pytest.param(-40, id="within the hash")]
)
def test_a_torn_manifest_is_one_line(length: int, tmp_path: Path) -> None:
    path = save(tmp_path, 1) / "manifest.json"
    path.write_bytes(path.read_bytes()[:length])
    found, faults = newest_intact(tmp_path, rank=0, world=1)
    assert found is None and len(faults) == 1 and "is not an intact checkpoint" in faults[0]


@pytest.mark.parametrize(
    "config",
    [
        pytest.param('{"a":' * 100_000 + "1" + "}" * 100_000, id="deep"),
        pytest.param('{"a": ' + "9" * 5_000 + "}", id="a number of 5,000 digits"),
        pytest.param('{"a": "\\ud800"}', id="half a character"),
    ],
)
def test_json_of_ill_will_is_one_line_or_read(config: str, tmp_path: Path) -> None:
    """The hash can be made by anyone: it finds damage, and the typed model does the rest."""
    folder = save(tmp_path, 1)
    values = json.loads((folder / "manifest.json").read_text())
    del values["xxh3"]
    text = hashed_json({**values, "config": "CONFIG"}).replace('"CONFIG"', config)
    head = text.rpartition(',\n "xxh3"')[0]
    (folder / "manifest.json").write_bytes(rehashed(head))
    try:
        Checkpoint(folder)
    except UserError as error:
        assert "\n" not in str(error)
    found, faults = newest_intact(tmp_path, rank=0, world=1)
    assert (found is None) == (len(faults) == 1)


def rehashed(head: str) -> bytes:
    import xxhash

    before = (head + ',\n "xxh3": "').encode(errors="surrogatepass")
    return before + xxhash.xxh3_128_hexdigest(before).encode() + b'"\n}\n'


def test_copies_of_one_manifest_are_equal_and_of_another_are_not(tmp_path: Path) -> None:
    one, other = Checkpoint(save(tmp_path / "a", 1)), Checkpoint(save(tmp_path / "b", 1))
    assert one.digest == other.digest
    shutil.rmtree(tmp_path / "b")
    assert Checkpoint(save(tmp_path / "b", 2)).digest != one.digest
    assert replace(one.manifest, step=2).to_json() != one.manifest.to_json()
