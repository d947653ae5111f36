"""What a user can get wrong before training starts: one line each, exit code 2."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from data_prep.common.files import sha256_file, sha256_line
from pipeline.train import main
from tests.launch import ROOT
from tests.pipeline.training.runs import flags

Edit = Callable[[Path], None]


def manifest_edit(*, signed: bool = True, **changes: object) -> Edit:
    """Return an edit of the packs' manifest; ``signed``: its sums are rewritten, too."""

    def edit(demo: Path) -> None:
        path = demo / "packs/sft/manifest.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
        if signed:
            path.with_suffix(".sha256").write_bytes(sha256_line(sha256_file(path), path.name))

    return edit


@pytest.fixture(scope="module")
def own_demo(small_demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the packs whose manifest a test may edit."""
    copy = tmp_path_factory.mktemp("own") / "demo"
    shutil.copytree(small_demo, copy, ignore=shutil.ignore_patterns("raw"))
    return copy


@pytest.mark.parametrize(
    ("edit", "more", "words"),
    [
        pytest.param(None, ["--train.lrr", "1"], ["--train.lrr", "--train.lr'"], id="unknown flag"),
        pytest.param(None, ["--data.packs", "nowhere"], ["nowhere", "manifest.json", "mma-prep"], id="missing packs"),
        pytest.param(None, ["--data.packs", ""], ["data.packs", "--data.packs"], id="no packs named"),
        pytest.param(None, ["--deepspeed", "none.json"], ["none.json", "zero3_offload"], id="missing DeepSpeed file"),
        pytest.param(None, ["--mask.policy", "mmaa"], ["mmaa", "mma"], id="unknown policy"),
        pytest.param(None, ["--mask.policy", "mma_unclamped"], ["mma_unclamped", "allow_leak"], id="leaking policy"),
        pytest.param(None, ["--mask.layers", "2:99=mixed"], ["2:99=mixed", "layers"], id="layers beyond the model"),
        pytest.param(None, ["--parallel.pp", "2"], ["parallel.pp=2", "1 ranks"], id="ranks do not divide"),
        pytest.param(None, ["--parallel.micro-batches", "5"], ["micro_batches=5", "12 rows"], id="rows do not divide"),
        pytest.param(None, ["--train.steps", "99999"], ["99999", "data/demo", "mma-prep"], id="more steps than packs"),
        pytest.param(None, ["--model.vision.config.image_size", "96"], ["64", "16", "packs"], id="image tokens differ"),
        pytest.param(None, ["--model.llm.source", "nowhere"], ["model.llm.source", "nowhere"], id="no model folder"),
        pytest.param(
            None, ["--model.llm.config.max_position_embeddings", "20"], ["sample of", "20"], id="positions too short"
        ),
        pytest.param(manifest_edit(targets=0), [], ["no supervised tokens"], id="nothing supervised"),
        pytest.param(
            None,
            ["--train.global-batch-size", "999999"],
            ["rows, fewer than", "global_batch_size=999999"],
            id="fewer rows than a step",
        ),
        pytest.param(manifest_edit(image_store="nowhere"), [], ["nowhere", "no image store"], id="images are gone"),
        pytest.param(manifest_edit(image_store_sha256="0" * 64), [], ["other images", "mma-prep"], id="other images"),
        pytest.param(
            manifest_edit(signed=False, seed=9),
            ["--data.verify", "true"],
            ["manifest.json", "differs"],
            id="an edited manifest",
        ),
        pytest.param(manifest_edit(format="zip"), [], ["manifest", "mma-pack"], id="foreign folder"),
    ],
)
def test_errors_are_one_line_and_exit_2(
    edit: Edit | None, more: list[str], words: list[str], own_demo: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    path = own_demo / "packs/sft/manifest.json"
    original, sums = path.read_text(), path.with_suffix(".sha256").read_bytes()
    try:
        if edit is not None:
            edit(own_demo)
        code = main([*flags(own_demo, tmp_path / "run"), *more])
    finally:
        path.write_text(original)
        path.with_suffix(".sha256").write_bytes(sums)
    said = capsys.readouterr().err.strip().replace(str(own_demo), "data/demo")
    assert code == 2
    assert "\n" not in said
    assert all(word in said for word in words), said
    assert not (tmp_path / "run").exists(), "nothing was made"


@pytest.mark.parametrize("part", ["packs/sft/rows-00000.arrow", "images/*/images-00000.arrow"])
def test_verify_names_a_damaged_file_of_packs_or_image_store(
    part: str, own_demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (path,) = own_demo.glob(part)
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    try:
        assert main([*flags(own_demo, tmp_path / "run"), "--data.verify", "true"]) == 2
    finally:
        path.write_bytes(whole)
    assert f"{path.name}: differs from" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "words"),
    [
        pytest.param("{'stage': 3}", ["not valid JSON"], id="bad JSON"),
        pytest.param("[3]", ["JSON object"], id="not an object"),
        pytest.param('{"zero_optimization": {"stage": 7}}', ["zero_optimization.stage: "], id="unknown stage"),
        pytest.param(
            '{"train_batch_size": 8, "zero_optimization": {"stage": 3}}',
            ["train_batch_size", "global_batch_size"],
            id="batch",
        ),
        pytest.param(
            '{"fp16": {"enabled": true}, "zero_optimization": {"stage": 3}}', ["fp16", "train.dtype"], id="fp16"
        ),
    ],
)
def test_a_wrong_deepspeed_file_is_named(
    text: str, words: list[str], small_demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "ds.json"
    path.write_text(text)
    assert main([*flags(small_demo, tmp_path / "run"), "--deepspeed", str(path)]) == 2
    said = capsys.readouterr().err
    assert all(word in said for word in [*words, "ds.json"]), said


def test_dry_run_prints_the_plan_and_makes_nothing(
    small_demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*flags(small_demo, tmp_path / "run"), "--dry-run"]) == 0
    said = capsys.readouterr().out
    for word in (
        "model ",
        "mask ",
        "12 rows = 1 dp ranks x 12 micro-batches x 1 rows",
        "stage 0: layers 0..1",
        "GiB",
    ):
        assert word in said
    loader = next(line for line in said.splitlines() if line.startswith("loader"))
    assert re.search(
        r" 1 decode threads x \d+ images/s a core .* = \d+ images/s; a step takes \d+ images a rank$", loader
    )
    assert not (tmp_path / "run").exists()


def test_a_dry_run_in_bf16_says_what_a_predicted_step_needs_of_the_loader(
    small_demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [*flags(small_demo, tmp_path / "run"), "--train.dtype", "bf16", "--data.decode-threads", "3"]
    assert main([*command, "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert re.search(r" 3 decode threads x .* a rank, \d+ images/s at \d+\.\d+ s on H100 \(predicted\)", said)


def test_a_dry_run_shows_the_plan_of_any_number_of_ranks(
    small_demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [*flags(small_demo, tmp_path / "run"), "--parallel.pp", "2"]
    assert main([*command, "--dry-run", "8"]) == 0
    said = capsys.readouterr().out
    assert "12 rows = 4 dp ranks x 3 micro-batches" in said and "8 = 2 stages x 4 dp ranks" in said
    assert main([*command, "--dry-run", "7"]) == 2
    assert "7 ranks" in capsys.readouterr().err
    for wrong in ("-1", "many"):
        assert main([*command, "--dry-run", wrong]) == 2
        assert "--dry-run" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("more", "words"),
    [
        pytest.param(["--deepspeed", "none.json"], ["none.json", "zero3_offload"], id="missing DeepSpeed file"),
        pytest.param(["--parallel.pp", "2"], ["parallel.pp=2", "1 ranks"], id="ranks do not divide"),
        pytest.param(["--dry-run"], ["demo/packs/pt does not exist yet", "mma-prep demo"], id="a dry run"),
    ],
)
def test_the_demo_is_not_made_for_what_cannot_start(
    more: list[str], words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = ["--data.demo", str(tmp_path / "demo"), "--data.packs", str(tmp_path / "demo/packs/pt")]
    started = ["--deepspeed", str(ROOT / "ds_configs/zero3.json"), "--recipe", "demo_pt", *data]
    assert main([*started, "--run-dir", str(tmp_path / "run"), *more]) == 2
    said = capsys.readouterr().err.strip()
    assert "\n" not in said
    assert all(word in said for word in words), said
    assert not [*tmp_path.iterdir()], "nothing was made"


def test_print_config_prints_a_recipe(small_demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*flags(small_demo, tmp_path / "run"), "--print-config"]) == 0
    path = tmp_path / "again.yaml"
    path.write_text(capsys.readouterr().out)
    assert main(["--recipe", str(path), "--print-config"]) == 0
    assert capsys.readouterr().out == path.read_text()
