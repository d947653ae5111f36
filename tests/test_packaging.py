"""The wheel outside the repository: all that a newcomer types works from any folder, with nothing of the checkout."""

from __future__ import annotations

import json
import os
import shutil
import site
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest
from PIL import Image

from tests.launch import ROOT, environment
from tests.pipeline.training.runs import TINY

pytestmark = pytest.mark.slow

SOURCES = ("setup.py", "pyproject.toml", "README.md", "pipeline", "data_prep", "ds_configs", "slurm")
COLOURS = ("red", "green", "blue", "white")
RECIPE = """\
root: .
out: mine
tokenizer: {train: {vocab_size: 300, samples: 400}}
image_tokens: 16
corpora:
  mine: {type: llava, conversations: mine.json, images: images}
packs:
  sft: {corpora: [mine], template: plain, seq_len: 256, epochs: 4}
"""


@dataclass(frozen=True)
class Installed:
    """An installation of the wheel, and a folder to work in."""

    programs: Path
    work: Path

    def run(self, *words: str, **variables: str) -> str:
        """Run a command of the installation in the working folder; return its output."""
        kept = {name: value for name, value in environment(variables).items() if name != "PYTHONPATH"}
        path = f"{self.programs}{os.pathsep}{os.environ['PATH']}"
        done = subprocess.run(
            [str(self.programs / words[0]) if (self.programs / words[0]).exists() else words[0], *words[1:]],
            cwd=self.work, env={**kept, "PATH": path}, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            timeout=300, check=False,
        )  # fmt: skip
        assert done.returncode == 0, f"{words}\n{done.stdout[-4000:]}"
        return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy of the sources."""
    place = tmp_path_factory.mktemp("wheel")
    for name in SOURCES:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, place / name)
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-index", "--no-build-isolation", "-w", "out"]
    subprocess.run([*build, "."], cwd=place, check=True, timeout=300)
    return next((place / "out").glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Installed:
    """A virtual environment with the wheel; dependencies come from the environment of the tests, unlike the project."""
    place = tmp_path_factory.mktemp("installed")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(place / "venv")], check=True, timeout=120)
    folder = next((place / "venv/lib").glob("python*/site-packages"))
    # A path in a .pth file is searched last, and .pth files in it are not: the checkout's own installation is not seen.
    (folder / "dependencies.pth").write_text("\n".join(site.getsitepackages()))
    install = ["-m", "pip", "install", "-q", "--no-deps", "--no-index", str(wheel)]
    subprocess.run([str(place / "venv/bin/python"), *install], check=True, timeout=120)
    (place / "work").mkdir()
    return Installed(place / "venv/bin", place / "work")


def test_the_wheel_holds_every_shipped_file(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    for folder, pattern, place in (
        ("ds_configs", "*.json", "pipeline/shipped/ds_configs"),
        ("slurm", "*.*", "pipeline/shipped/slurm"),
        ("pipeline/recipes", "*.yaml", "pipeline/recipes"),
        ("pipeline/study/studies", "*.yaml", "pipeline/study/studies"),
        ("data_prep/recipes", "*.*", "data_prep/recipes"),
    ):
        shipped = {f"{place}/{path.name}" for path in (ROOT / folder).glob(pattern) if path.name != "__pycache__"}
        assert shipped and shipped <= names
    sources = {
        str(path.relative_to(ROOT)) for room in ("pipeline", "data_prep") for path in (ROOT / room).rglob("*.py")
    }
    assert sources <= names
    assert not [name for name in names if name.startswith(("tests/", "benchmarks/", "slurm/", "ds_configs/"))]


def test_a_newcomers_first_hour_outside_the_repository(installed: Installed) -> None:
    """Own files -> packs -> two training steps on two ranks, and the commands around them."""
    where = installed.run("python", "-c", "import pipeline, data_prep; print(pipeline.__file__, data_prep.__file__)")
    assert str(ROOT) not in where and where.count("site-packages") == 2
    assert installed.run("mma", "--version").startswith("mma 0.")
    assert installed.run("mma-prep", "--version").startswith("mma-prep 0.")
    assert "--compare POLICY" in installed.run("mma", "demo", "--help")

    write_own_data(installed.work)
    installed.run("mma-prep", "run", "mine.yaml", "--workers", "1")
    words = ["--deepspeed", "zero3", "--run-dir", "runs/mine", "--data.packs", "mine/packs/sft", *TINY]
    output = installed.run("mma", "train", "--ranks", "2", *words, "--train.steps", "2")
    assert "done at step 2/2" in output
    assert json.loads((installed.work / "runs/mine/env.json").read_text())["ranks"] == 2
    assert "runs/mine" in installed.run("mma", "status")

    assert "demo_sft on 8 ranks" in installed.run("mma", "estimate", "demo_sft")
    output = installed.run("mma", "doctor", "--data", "mine", "--checkpoint", "runs/mine")
    assert output.endswith("no problems found\n")

    assert "slurm/chain.sh --dry-run" in installed.run("mma", "slurm", "init")
    assert "RECIPE=demo_sft" in installed.run("slurm/chain.sh", "--dry-run", VENV="none")
    for program, flag in (("mma", "--parallel.schedule"), ("mma-prep", "--held-out")):
        assert flag in installed.run(program, "completion", "bash")


def write_own_data(work: Path) -> None:
    """Write LLaVA conversations about images of one colour, and a recipe."""
    (work / "images").mkdir()
    samples = []
    for number in range(40):
        colour = COLOURS[number % len(COLOURS)]
        Image.new("RGB", (48, 48), colour).save(work / f"images/{number}.png")
        turns = [
            {"from": "human", "value": "<image>\nwhat colour is the picture"},
            {"from": "gpt", "value": f"picture {number} is all {colour}, quite plainly a single colour"},
        ]
        samples.append({"id": str(number), "image": f"{number}.png", "conversations": turns})
    (work / "mine.json").write_text(json.dumps(samples))
    (work / "mine.yaml").write_text(RECIPE)
