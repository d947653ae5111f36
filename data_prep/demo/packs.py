"""The built-in default data: the demo world, drawn and packed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path

from data_prep.common.errors import UserError
from data_prep.common.files import hash_json, is_of_size, sha256_file, write_atomic
from data_prep.common.workers import LocalTeam, Team
from data_prep.demo import write_world
from data_prep.images.store import ImageStore
from data_prep.ingest.train_tokenizer import TRAINING_VERSION
from data_prep.ingest.workspace import INGEST_VERSION, lock_of
from data_prep.materialize import ROWS_VERSION
from data_prep.packs import Manifest
from data_prep.planning.step import PLAN_VERSION
from data_prep.progress import Reporter
from data_prep.recipe import SHIPPED, load_recipe
from data_prep.steps import run

MARKER = "demo.json"
"""Written last, with the settings of the complete demo."""
SETS = ("pt", "sft", "eval")
"""Pack sets of the demo: captions, questions and held-out questions."""
_LAUNCHER_PREFIXES = ("PMI", "OMPI_", "MPI")
"""Environment of an MPI launch, which a child process must not inherit."""

_CHILD = """\
import sys
from data_prep.common.processes import end_with_parent
end_with_parent(int(sys.argv[1]))
from data_prep.cli import main
sys.exit(main(sys.argv[2:]))
"""


def recipe_version() -> str:
    """Return a short hash of the shipped demo recipe and of the code versions that determine its packs."""
    versions = (TRAINING_VERSION, INGEST_VERSION, PLAN_VERSION, ROWS_VERSION)
    return hash_json([sha256_file(SHIPPED / "demo.yaml"), versions])[:12]


@dataclass(frozen=True, slots=True)
class Demo:
    """Size and seed of the demo world."""

    scenes: int = 20_000
    held_out: int = 600
    """Scenes for the held-out questions."""
    seed: int = 0
    recipe: str = field(default_factory=recipe_version)
    """Version of the recipe that packs it."""


def make_demo(out: Path, demo: Demo, team: Team, reporter: Reporter) -> None:
    """Draw the world into ``out/raw`` and pack it into ``out/packs/{pt,sft,eval}``; finished parts are kept.

    Several processes may call this at once: one works, the others wait.

    Raises:
        UserError: ``out`` holds a different world, or a size is out of range.
    """
    with lock_of(out).hold(reporter.say, wait=True) if team.is_reporter else nullcontext():
        if team.serial(lambda: _completed(out) == demo):
            reporter.say(f"demo: {out} is complete")
        else:
            team.serial(lambda: _draw(out, demo, team, reporter))
            run(load_recipe("demo", {"root": str(out / "raw"), "out": str(out)}), team, reporter)
            team.serial(lambda: write_atomic(out / MARKER, json.dumps(asdict(demo)).encode()))


def _draw(out: Path, demo: Demo, team: Team, reporter: Reporter) -> None:
    reporter.say(f"demo: drawing {demo.scenes:,} scenes into {out / 'raw'}")
    workers = team.workers if isinstance(team, LocalTeam) else 1
    write_world(out, scenes=demo.scenes, held_out=demo.held_out, seed=demo.seed, workers=workers)
    (out / MARKER).unlink(missing_ok=True)  # only now: a different world is left untouched


def ensure_demo(out: Path, demo: Demo | None = None, *, quiet: bool = False) -> None:
    """Prepare the demo packs (default size) if there are none; several processes may call this at once.

    The work runs in a child process, so workers do not load the caller's libraries and main module again. Use ``quiet``
    in all callers but one.

    Raises:
        UserError: the preparation failed; the child process has printed the reason.
    """
    if _completed(out) is not None:
        return
    wanted = demo or Demo()
    flags = [f"--scenes={wanted.scenes}", f"--held-out={wanted.held_out}", f"--seed={wanted.seed}"]
    environment = {key: value for key, value in os.environ.items() if not key.startswith(_LAUNCHER_PREFIXES)}
    source = str(Path(__file__).parents[2])
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [source, environment.get("PYTHONPATH")]))
    command = [sys.executable, "-c", _CHILD, str(os.getpid()), "demo", str(out), *flags]
    sink = subprocess.DEVNULL if quiet else None
    if subprocess.run(command, env=environment, check=False, stdout=sink, stderr=sink).returncode:
        raise UserError(f"the demo data could not be prepared in {out} (see the message above)")


def _completed(out: Path) -> Demo | None:
    """Return the settings of a complete demo built by this version of its recipe, or None."""
    if not ((out / MARKER).is_file() and all(_is_complete(out / "packs" / name) for name in SETS)):
        return None
    try:
        demo = Demo(**json.loads((out / MARKER).read_text(encoding="utf-8")))
    except (ValueError, TypeError):  # written by another version: rebuild
        return None
    return demo if demo.recipe == recipe_version() else None


def _is_complete(packs: Path) -> bool:
    """Return whether all files and images of a pack folder exist with the expected sizes."""
    try:
        manifest = Manifest.load(packs)
        store = ImageStore(packs / manifest.image_store)
    except UserError:
        return False
    return not store.missing() and all(is_of_size(packs / entry.name, entry.bytes) for entry in manifest.files)
