"""docs/extending.md: its package is built, installed and used by its own commands; every example really runs."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from random import Random

import pytest
from PIL import Image

from data_prep.common.plugins import GROUPS
from tests.launch import ROOT, environment

PAGE = (ROOT / "docs/extending.md").read_text(encoding="utf-8")
COLOURS = ("red", "green", "blue")
FILES = {**dict(re.findall(r"```(?:python|yaml)\n# (\S+)\n(.*?)```", PAGE, re.S))}
COMMANDS = [line for block in re.findall(r"```bash\n(.*?)```", PAGE, re.S) for line in block.splitlines()]
IN_PROCESS = """
import shlex, sys
from data_prep.cli import main as prepare
from pipeline.cli import main
for line in sys.argv[1:]:
    program, *words = shlex.split(line)
    print("$", line, flush=True)
    code = prepare(words) if program == "mma-prep" else main(words)
    assert code in (0, None), f"{line}: exit code {code}"
"""


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which a reader has followed the page: the package is installed, data and recipes are written."""
    place = tmp_path_factory.mktemp("acme")
    source = place / "source"
    (source / "acme_mma").mkdir(parents=True)
    (source / "acme_mma/__init__.py").touch()
    (source / "pyproject.toml").write_text(re.findall(r"```toml\n(.*?)```", PAGE, re.S)[0])
    for name, text in FILES.items():
        (source / name if name.endswith(".py") else place / name).write_text(text)
    install = ["-m", "pip", "install", "-q", "--no-deps", "--no-index", "--no-build-isolation", "--target", "site"]
    subprocess.run([sys.executable, *install, str(source)], cwd=place, check=True, env=environment())
    _write_data(place)
    return place


def _write_data(place: Path) -> None:
    rng, rows, asked = Random(0), ["image,question,answer"], []
    for folder in (place / "raw/images", place / "bench_data/acme/images"):
        folder.mkdir(parents=True)
        for number in range(16):
            colour = COLOURS[rng.randrange(3)]
            Image.new("RGB", (40, 40), colour).save(folder / f"{number}.png")
            if folder.parts[-3] == "bench_data":
                asked.append(
                    {"id": str(number), "image": f"{number}.png", "question": "which colour?", "answer": colour}
                )
            else:
                rows.append(f"{number}.png,which colour is picture {number}?,it is {colour}")
    (place / "raw/questions.csv").write_text("\n".join(rows) + "\n")
    (place / "bench_data/acme/questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked))


def run(place: Path, *lines: str) -> str:
    """Run commands of the page in one process that sees the installed package, as a reader's would."""
    paths = f"{place / 'site'}:{ROOT}"
    done = subprocess.run(
        [sys.executable, "-c", IN_PROCESS, *lines], cwd=place, capture_output=True, text=True, timeout=300,
        env=environment({"PYTHONPATH": paths, "COLUMNS": "120"}),
    )  # fmt: skip
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-4000:]}"
    return done.stdout


@pytest.mark.slow
def test_every_example_of_the_page_is_used_for_real(reader: Path) -> None:
    training = next(line for line in COMMANDS if line.startswith("mma train"))
    before, after = COMMANDS[: COMMANDS.index(training)], COMMANDS[COMMANDS.index(training) + 1 :]
    printed = run(reader, *before)
    assert "acme_images" in printed and "type: acme_csv" in printed
    proved = printed.split("$ mma mask")[0]
    assert proved.count("yes") == 2, "the policy neither leaks nor breaks the cache"
    assert _used(reader / "prepared") == {"acme_csv"}

    run(reader, training)
    run_dir = reader / "runs/acme"
    used = {"acme_images", "acme_pool", "seed_oss", "metaclip_2_vision_model"}
    recorded = json.loads((run_dir / "env.json").read_text())["plugins"]
    assert {plugin["name"] for plugin in recorded} == used == _used(run_dir)
    assert {(plugin["package"], plugin["version"]) for plugin in recorded} == {("acme-mma", "1.0")}
    assert json.loads((run_dir / "status.json").read_text())["step"] == 2

    run(reader, *after)
    result = json.loads(next((reader / "models/acme/bench").rglob("result.json")).read_text())
    assert result["benchmark"] == "acme_exact"


def _used(folder: Path) -> set[str]:
    events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    return {event["name"] for event in events if event["code"] == "plugin-used"}


def test_the_page_has_an_example_of_every_extension_point() -> None:
    assert set(re.findall(r'entry-points\."([\w.]+)"', PAGE)) == set(GROUPS)
    assert {name for name in FILES if name.endswith(".py")} == {
        f"acme_mma/{part}.py" for part in ("policies", "corpora", "connectors", "families", "metrics")
    }
