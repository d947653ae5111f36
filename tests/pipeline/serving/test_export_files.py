"""Hashes of exports: no flipped bit is silent, a quick check states what it covered, and weights are finite."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from safetensors.torch import load_file, save_file

from data_prep.common.errors import UserError
from pipeline.config.schema import RunConfig
from pipeline.model import export_files
from pipeline.model.export_files import CARD, FILES, check_files, write_file_hashes
from pipeline.planning.compatibility import check_init_from
from pipeline.serving.export import export, verify_export
from pipeline.serving.model import load_model
from tests.pipeline.serving.helpers import Saved, make_export, make_saved

FLIPS = int(os.environ.get("FLIPS", "200"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_export(tmp_path_factory.mktemp("export"))


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "copy"))


def flip(path: Path, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def weights(folder: Path) -> Path:
    return next(folder.glob("model-*.safetensors"))


def test_no_flipped_bit_is_silent(folder: Path) -> None:
    chance = random.Random(7)
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != CARD)  # people edit the card
    assert verify_export(folder).complete
    for number in range(FLIPS):
        path = files[number % len(files)]
        bit = chance.randrange(8 * path.stat().st_size)
        flip(path, bit)
        with pytest.raises(UserError, match=path.name) as caught:
            verify_export(folder)
        assert "\n" not in str(caught.value)
        flip(path, bit)
    assert verify_export(folder, full=True).complete


@pytest.fixture
def sampled(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An export whose weights are so large, compared with a block, that a quick check samples them."""
    monkeypatch.setattr(export_files, "BLOCK_BYTES", 4096)
    monkeypatch.setattr(export_files, "SMALL_FILE_BYTES", 64 << 10)
    monkeypatch.setattr(export_files, "SAMPLED_BLOCKS", 4)
    write_file_hashes(folder)
    yield folder


def test_a_quick_check_states_what_it_covers(sampled: Path) -> None:
    quick, full = verify_export(sampled), verify_export(sampled, full=True)
    assert not quick.complete and full.complete
    assert 0 < quick.checked_bytes < quick.total_bytes == full.checked_bytes
    assert "of" in str(quick) and "all" in str(full) and "all" not in str(quick)


def test_headers_are_always_checked_and_a_full_check_misses_nothing(sampled: Path) -> None:
    path = weights(sampled)
    size = path.stat().st_size
    header = 8 + int.from_bytes(path.read_bytes()[:8], "little")
    for place in (0, 7, 8, header // 2, header - 1, size - 1):
        flip(path, 8 * place)
        with pytest.raises(UserError, match=rf"{path.name} is damaged \(MiB"):
            check_files(sampled)
        flip(path, 8 * place)
    found = 0
    for place in range(header + 8192, size - 8192, 4096):
        flip(path, 8 * place)
        with pytest.raises(UserError, match=path.name):
            check_files(sampled, full=True)
        try:
            assert not check_files(sampled, sample=random.Random(place)).complete
        except UserError:
            found += 1
        flip(path, 8 * place)
    assert found < len(range(header + 8192, size - 8192, 4096)), "a sample cannot find everything"


def test_samples_differ_from_call_to_call(sampled: Path) -> None:
    path = weights(sampled)
    flip(path, 8 * (path.stat().st_size // 2))
    with pytest.raises(UserError, match=path.name):
        for _ in range(1000):
            check_files(sampled)


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda f: weights(f).unlink(), r"\.safetensors is missing"),
    "truncated": (
        lambda f: weights(f).write_bytes(weights(f).read_bytes()[:-1]),
        r"\.safetensors is damaged \(.*bytes",
    ),
    "folder-instead": (lambda f: (weights(f).unlink(), (f / "model-00001-of-00001.safetensors").mkdir()), "is missing"),
    "other-shard": (lambda f: shutil.copy(weights(f), f / "extra.safetensors"), "extra.safetensors is not listed"),
    "other-token-file": (lambda f: (f / "tokenizer/added.json").write_text("{}"), "added.json is not listed"),
    "no-list": (lambda f: (f / FILES).unlink(), rf"{FILES} is missing"),
    "empty-list": (lambda f: (f / FILES).write_text(""), rf"{FILES} is damaged"),
    "deep-list": (lambda f: (f / FILES).write_text("[" * 10**6), rf"{FILES} is damaged"),
    "digits": (lambda f: (f / FILES).write_text("9" * 10**6), rf"{FILES} is damaged"),
    "outside": (lambda f: relist(f, {"../secret": {"bytes": 1, "blocks": []}}), rf"{FILES} is damaged"),
    "negative": (lambda f: relist(f, {"config.json": {"bytes": -1, "blocks": []}}), rf"{FILES} is damaged"),
    "float": (lambda f: relist(f, {"config.json": {"bytes": 1.5, "blocks": []}}), rf"{FILES} is damaged"),
    "few-blocks": (lambda f: relist(f, {"config.json": {"bytes": 1, "blocks": []}}, keep=True), "config.json"),
    "version": (lambda f: relist(f, {}, version=2), rf"{FILES} is damaged .*version"),
}


def relist(folder: Path, files: dict[str, object], *, keep: bool = False, **changes: object) -> None:
    value = json.loads((folder / FILES).read_text())["value"]
    value |= {"files": {**(value["files"] if keep else {}), **files}, **changes}
    (folder / FILES).write_text(json.dumps({"value": value, "sha256": export_files.hash_json(value)}))


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_export_is_one_line_naming_the_file(case: str, folder: Path) -> None:
    spoil, words = DAMAGE[case]
    spoil(folder)
    with pytest.raises(UserError, match=words) as caught:
        load_model(folder)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


def test_a_run_does_not_start_from_a_damaged_export(folder: Path, tmp_path: Path) -> None:
    config = RunConfig(init_from=str(folder), run_dir=str(tmp_path / "run"))
    flip(weights(folder), 8 * (weights(folder).stat().st_size // 2))
    with pytest.raises(UserError, match=rf"{weights(folder).name} is damaged"):
        check_init_from(config, Mock(), Mock())


def spoiled(folder: Path, value: float) -> Saved:
    saved = make_saved(folder)
    with torch.no_grad():
        saved.stage.get_parameter("model.layers.1.mlp.up_proj.weight")[3, :2] = value
    return saved


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_not_exported(value: float, tmp_path: Path) -> None:
    words = r"model\.layers\.1\.mlp\.up_proj\.weight has 2 of .* values that are not finite.*earlier checkpoint"
    with pytest.raises(UserError, match=words):
        export(spoiled(tmp_path, value), tmp_path / "export")
    assert not (tmp_path / "export").exists()


def test_weights_that_overflow_the_exported_type_are_not_exported(tmp_path: Path) -> None:
    saved = spoiled(tmp_path, 3.4e38)
    with pytest.raises(UserError, match="not finite as bfloat16: export with --dtype float32"):
        export(saved, tmp_path / "export", dtype="bfloat16")
    export(saved, tmp_path / "export", dtype="float32")


def test_a_full_check_finds_weights_that_are_not_finite(folder: Path) -> None:
    tensors = load_file(weights(folder))
    name = max(tensors)
    tensors[name].view(-1)[-1] = float("nan")
    save_file(tensors, weights(folder), metadata={"format": "pt"})
    write_file_hashes(folder)
    load_model(folder)  # the hashes match: only reading every value finds it
    with pytest.raises(UserError, match=rf"{name} has 1 of .* not finite"):
        load_model(folder, verify="full")
