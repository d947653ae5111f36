"""README and docs: every command block runs, every link leads somewhere, every recipe and corpus type is listed."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from PIL import Image

from data_prep.corpora import CORPORA
from data_prep.recipe import shipped_recipes
from pipeline.config.flags import build_parser
from pipeline.config.recipes import RECIPES
from pipeline.parallel.ds_config import read_ds_config
from tests.data_prep.init.own_data import LAYOUTS
from tests.launch import ROOT, environment
from tests.pipeline.training.runs import train

PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")])
NOT_RUN = {
    r"acme": "needs the package of docs/extending.md; tests/test_extending.py runs them all",
    r"^make ": "what CI runs, or the demo, which takes minutes; test_demo.py runs a small one",
    r"^git |^pip |^export ": "sets up a shell or a machine",
    r"aki|llama32|/models/": "needs the models' weights and the raw corpora; flags and recipe names are checked",
    r"^(\w+=\S+ )*sbatch ": "queues jobs; tests/slurm does so on a real Slurm",
    r"--hostfile": "needs several nodes; tests/slurm/test_ranks.py has two",
    r"^deepspeed .*zero3\.json( --recipe demo_sft)?$": "trains the whole demo; tests/pipeline/training are shorter",
    r"^mma train .*--run-dir runs/mine$": "trains for minutes; docs/your-data.md has shorter ones",
    r"^mma study run (masks_demo --(arms|work)|masks_nlvr)": "trains for hours; tests/pipeline/study has a small one",
    r"mma bench|bench_data": "needs the benchmarks' files; tests/pipeline/evaluation run it on small ones",
    r"verify-export .*--url": "needs a server; tests/pipeline/serving/test_verify.py starts one",
    r"lmms_eval|run\.py": "needs another toolkit and its data; tests/pipeline/serving/test_lmms_eval.py runs lmms-eval",
    r"^mma serve ": "serves until it is stopped; tests/pipeline/server starts it and asks it",
    r"smollm2": "needs the wheel and raw corpora; tests/pipeline/commands/test_smollm2.py runs it on drawn pictures",
    r"my_data": "the reader's own files; docs/your-data.md has such folders",
}
"""Commands that are only checked, and why."""


@dataclass(frozen=True)
class Command:
    """One command of a page's bash block, its comment removed."""

    page: str
    text: str

    @property
    def reason(self) -> str | None:
        """Why it is not run; None when it is."""
        return next((why for pattern, why in NOT_RUN.items() if re.search(pattern, self.text)), None)


def commands() -> Iterator[Command]:
    """Yield every command of every page."""
    for page in PAGES:
        for block in re.findall(r"```bash\n(.*?)```", page.read_text(encoding="utf-8"), re.S):
            for line in block.replace("\\\n", " ").splitlines():
                text = re.sub(r"\s+#\s.*$", "", line).strip()
                if text and not text.startswith("#"):
                    yield Command(page.name, text)


COMMANDS = list(commands())
RUN = [each for each in COMMANDS if not each.reason]


@pytest.fixture(scope="module")
def place(small_demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which a reader has followed the pages so far: the demo's data, a short run, two exports, a photo."""
    place = tmp_path_factory.mktemp("reader")
    for name in ("pipeline", "ds_configs", "slurm", "benchmarks", "data_prep", "tests"):
        (place / name).symlink_to(ROOT / name)
    shutil.copytree(small_demo, place / "data/demo", symlinks=True)
    train(small_demo, place / "runs/demo_sft", ranks=1).check()
    shutil.copytree(place / "runs/demo_sft", place / "runs/mine")
    for layout, folder in (("llava", "llava"), ("sharegpt", "sharegpt"), ("save-to-disk", ""), ("parquet-bytes", "")):
        LAYOUTS[layout][0](place / "mine" / folder)
    LAYOUTS["image-folder"][0](place / "mine")
    Image.new("RGB", (48, 48), "red").save(place / "scene.png")
    Image.new("RGB", (64, 48), "blue").save(place / "photo.jpg")
    shell("mma export runs/demo_sft models/demo", place)
    shutil.copytree(place / "models/demo", place / "models/causal")
    return place


def shell(text: str, place: Path) -> str:
    """Run a command as the reader would; return what it printed."""
    done = subprocess.run(
        ["bash", "-c", text],
        cwd=place,
        env=environment({"COLUMNS": "120"}),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, f"$ {text}\nexit code {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    "command", [each for each in COMMANDS if not each.reason], ids=lambda each: f"{each.page}: {each.text}"
)
def test_commands_run(command: Command, place: Path) -> None:
    text = f"{command.text} --dry-run" if command.text.startswith("slurm/chain.sh") else command.text
    for target in re.findall(r"^mma export \S+ (\S+)", text):
        shutil.rmtree(place / target, ignore_errors=True)
    shell(text.replace("deepspeed pipeline/train.py", "python pipeline/train.py"), place)


def test_training_flags_are_known() -> None:
    known = {option for action in build_parser()._actions for option in action.option_strings}
    shown = [each.text for each in COMMANDS if "pipeline/train.py" in each.text]
    assert shown
    for text in shown:
        words = text.split("pipeline/train.py", 1)[1].split()
        assert {word for word in words if word.startswith("--")} <= known, text


def test_recipes_named_in_commands_exist() -> None:
    known = {path.stem for path in RECIPES.glob("*.yaml")} | set(shipped_recipes()) | {"my.yaml", "my_data.yaml"}
    named = [
        name
        for each in COMMANDS
        for name in re.findall(r"(?:--recipe|--pt|--sft|mma-prep run|RECIPE=)[ =]?([\w.]+)", each.text)
    ]
    assert {name for name in named if not name.startswith("acme_")} <= known  # those are in extending.md


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\(([^):#]+)(?:#[\w-]+)?\)", page.read_text(encoding="utf-8"))
    assert not [target for target in targets if not (page.parent / target).exists()]


def test_the_reference_is_what_the_code_says(tmp_path: Path) -> None:
    """Run in a process of its own: its module is a script beside the pages, not a package."""
    script = "import runpy, sys; print(runpy.run_path(sys.argv[1])['reference'](), end='')"
    command = [sys.executable, "-c", script, str(ROOT / "docs/make_reference.py")]
    made = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path).stdout
    assert made == (ROOT / "docs/reference.md").read_text(encoding="utf-8"), "run: python docs/make_reference.py"


def test_tests_named_in_the_docs_exist() -> None:
    named = {name for page in PAGES for name in re.findall(r"`(test_\w+)`", page.read_text(encoding="utf-8"))}
    written = {
        name
        for path in (ROOT / "tests").rglob("test_*.py")
        for name in re.findall(r"^def (test_\w+)", path.read_text(encoding="utf-8"), re.M)
    }
    assert not named - written


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 120


def test_every_training_recipe_is_listed() -> None:
    shipped = {path.stem for path in RECIPES.glob("*.yaml")} - {"demo_base"}
    listed = re.findall(r"^\| (`.*?) \|", (ROOT / "docs/training.md").read_text(encoding="utf-8"), re.M)
    assert shipped <= {name for row in listed for name in re.findall(r"`(\w+)`", row)}


def test_every_corpus_type_is_listed() -> None:
    text = (ROOT / "docs/your-data.md").read_text(encoding="utf-8")
    table = text[text.index("| `type` | reads |") :]
    rows = [row.split("|")[1] for row in table.split("\n\n")[0].splitlines()[2:]]
    assert {name for row in rows for name in re.findall(r"`(\w+)`", row)} == set(CORPORA)


@pytest.mark.parametrize("path", sorted(ROOT.glob("ds_configs/*.json")), ids=lambda path: path.name)
def test_shipped_deepspeed_files_are_accepted(path: Path) -> None:
    assert read_ds_config(str(path))["zero_optimization"]["stage"] in (1, 2, 3)
