"""``mma`` export, generate, evaluate, mask, prove, inspect: hostile arguments and outputs give one line or success."""

from __future__ import annotations

import io
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from data_prep.packs import PackReader
from pipeline.cli import main
from pipeline.masks.policies import POLICIES
from tests.pipeline.serving.helpers import make_export, picture
from tests.pipeline.serving.test_evaluate import trained_on


@pytest.fixture(scope="module")
def place(small_demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the small demo, a model that fits its packs, another that does not, and an image."""
    place = tmp_path_factory.mktemp("place")
    (place / "demo").symlink_to(small_demo)
    trained_on(PackReader(place / "demo/packs/eval"), place / "model")
    make_export(place).rename(place / "other")
    (place / "photo.png").write_bytes(picture(1).read())
    return place


@pytest.fixture
def here(place: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(place)
    return place


GENERATE = ["generate", "photo.png", "what colour", "--model", "model", "--max-new-tokens", "2", "--device", "cpu"]
EVALUATE = ["evaluate", "--model", "model", "--packs", "demo/packs/eval", "--limit", "2", "--device", "cpu"]
COMMANDS: dict[str, list[str]] = {
    "generate": GENERATE,
    "evaluate": [*EVALUATE, "--json", "scores.json"],
    "mask": ["mask", "demo/packs/sft", "--policy", "mma"],
    "mask-layout": ["mask", "S2 V9 Q3 A2 | Q2 A2", "--policy", "cca", "--grid", "3x3"],
    "prove": ["prove", "demo/packs/sft", "--layers", "2"],
    "inspect": ["inspect", "demo/packs/sft", "--rows", "0:2", "--html", "rows.html"],
}
REFUSED: dict[str, tuple[list[str], str]] = {
    "no-question": (["generate", "photo.png", "--model", "model"], 'photo.png "What is shown?"'),
    "gone-question": (["generate", "gone.jpg", "--model", "model"], "gone.jpg, is the question, but it names a file"),
    "two-images": (["generate", "photo.png", "photo.png", "--model", "model"], "add the question"),
    "empty-question": (["generate", "", "--model", "model"], "QUESTION is empty"),
    "bytes": (["generate", "caf\udce9", "--model", "model"], "QUESTION is not valid UTF-8"),
    "image": (["generate", "gone.png", "what", "--model", "model"], "image 'gone.png' is not a file"),
    "endless-image": (["generate", "/dev/zero", "what", "--model", "model"], "image '/dev/zero' is not a file"),
    "long-image": (["generate", "x" * 5000, "what", "--model", "model"], "is not a file"),
    "model": (["generate", "what", "--model", ""], "is not an exported model"),
    "model-file": (["generate", "what", "--model", "photo.png"], "photo.png is not an exported model"),
    "device": ([*GENERATE[:-1], "."], "--device '.' is not a device: use cpu, cuda or cuda:N"),
    "meta": ([*GENERATE[:-1], "meta"], "is not a device"),
    "empty-device": ([*GENERATE[:-1], ""], "is not a device"),
    "cuda": ([*GENERATE[:-1], "cuda:7777"], "--device cuda:7777 does not exist"),
    "digits": ([*GENERATE[:-1], "cuda:" + "9" * 6000], "is not a device"),
    "evaluate-device": ([*EVALUATE[:-1], "."], "--device '.' is not a device"),
    "json-root": ([*EVALUATE, "--json", "/"], "--json / is a folder"),
    "json-empty": ([*EVALUATE, "--json", ""], "--json is empty"),
    "json-device": ([*EVALUATE, "--json", "/dev/full"], "--json /dev/full is a device or a pipe"),
    "json-under-file": ([*EVALUATE, "--json", "photo.png/x.json"], "photo.png is not a folder"),
    "packs": (["evaluate", "--model", "other", "--packs", "demo/packs/eval"], "rebuild the packs"),
    "html-empty": (["inspect", "demo/packs/sft", "--html", ""], "--html: is empty"),
    "html-folder": (["inspect", "demo/packs/sft", "--html", "."], "--html: . is a folder"),
    "html-full": (["inspect", "demo/packs/sft", "--html", "/dev/full"], "--html: /dev/full is a device or a pipe"),
    "inspect-rows": (["inspect", "demo/packs/sft", "--html", "x.html", "--rows", "x"], "--row"),
    "inspect-grid": (["inspect", "demo/packs/sft", "--html", "x.html", "--policy", "cca"], "--grid"),
    "inspect-odd-grid": (["inspect", "demo/packs/sft", "--html", "x.html", "--policy", "cca", "--grid", "."], "27x27"),
    "mask-out": (["mask", "V4", "--out", ""], "--out is empty"),
    "mask-out-root": (["mask", "V4", "--out", "/"], "--out / is a folder"),
    "mask-row": (["mask", "demo/packs/sft", "--row", "-1"], "not -1: change --row"),
    "mask-empty": (["mask", ""], "holds no tokens"),
    "prove-rows": (["prove", "demo/packs/sft", "--rows", "9999999"], "change --row or --rows"),
    "prove-folder": (["prove", "."], "."),
    "export-run": (["export", ".", "out"], ". "),
    "export-over": (["export", "demo", "/"], "demo"),
}


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    error = capsys.readouterr().err
    assert error.startswith("mma: ") and error.endswith("\n") and error.count("\n") == 1, error
    return error


@pytest.mark.parametrize("case", REFUSED)
def test_a_wrong_argument_is_one_line(case: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words, message = REFUSED[case]
    capsys.readouterr()
    before = {path.name for path in here.iterdir()}
    assert main(words) == 2
    assert message in one_line(capsys)
    assert {path.name for path in here.iterdir()} == before


@pytest.mark.parametrize("words", [["mask", "X"], ["prove", "X"], ["inspect", "gone", "--html", "x.html"]])
def test_every_command_of_masks_has_debug(words: list[str], here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*words, "--debug"]) == 2
    assert "Traceback" in capsys.readouterr().err


def closed() -> None:
    return None


def ascii_only() -> io.TextIOWrapper:
    return io.TextIOWrapper(io.BytesIO(), encoding="ascii")


def full() -> io.TextIOWrapper:
    return Path("/dev/full").open("w", encoding="utf-8")


def gone_reader() -> io.TextIOWrapper:
    reader, writer = os.pipe()
    os.close(reader)
    return os.fdopen(writer, "w", encoding="utf-8")


@pytest.fixture
def output(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], None]]:
    stream = request.param()
    yield lambda: monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.undo()
    if stream is not None:
        stream.close()


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    ("output", "codes"),
    [
        pytest.param(closed, {0}, id="closed"),
        pytest.param(ascii_only, {0}, id="ascii"),
        pytest.param(full, {2}, id="full"),
        pytest.param(gone_reader, {0}, id="head"),
    ],
    indirect=["output"],
)
def test_any_output_gives_one_line_or_success(
    command: str, output: Callable[[], None], codes: set[int], here: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    capfd.readouterr()
    output()
    assert main(COMMANDS[command]) in codes
    error = capfd.readouterr().err
    lines = [line for line in error.splitlines() if line.startswith("mma: ")]
    assert "Traceback" not in error and len(lines) == (codes == {2}), error


def test_inspect_draws_concentric_masks(here: Path) -> None:
    side = int(PackReader(here / "demo/packs/sft").manifest.image_tokens ** 0.5)
    words = ["inspect", "demo/packs/sft", "--rows", "0", "--html", "cca.html", "--policy", "cca"]
    assert main([*words, "--grid", f"{side}x{side}"]) == 0
    assert "cca:" in (here / "cca.html").read_text()
    (here / "cca.html").unlink()


def test_inspect_offers_every_policy(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "--help"]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in POLICIES)


def test_a_full_check_is_asked_for_by_a_flag(
    here: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.model.export_files.SMALL_FILE_BYTES", 0)
    monkeypatch.setattr("pipeline.model.export_files.SAMPLED_BLOCKS", 0)
    words = [str(tmp_path / "model") if word == "model" else word for word in GENERATE]
    shutil.copytree("model", tmp_path / "model")
    weights = next((tmp_path / "model").glob("*.safetensors"))
    assert main([*words, "--verify", "full"]) == 0
    capsys.readouterr()
    data = bytearray(weights.read_bytes())
    data[len(data) // 2] ^= 1
    weights.write_bytes(data)
    assert main([*words, "--verify", "full"]) == 2
    assert f"{weights} is damaged" in one_line(capsys)
