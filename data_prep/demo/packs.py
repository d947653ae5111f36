"""The embedded default: the demo world, drawn and packed, for whoever starts without data."""

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
"""Written last: its settings are those of a complete demo."""
SETS = ("pt", "sft", "eval")
"""Pack sets of the demo: captions, questions, held-out questions."""
_LAUNCHER_PREFIXES = ("PMI", "OMPI_", "MPI")
"""Environment of an MPI launch, which a child process must not take for its own."""


def recipe_version() -> str:
    """Return a short hash of the shipped demo recipe and of the code's versions that shape its packs."""
    versions = (TRAINING_VERSION, INGEST_VERSION, PLAN_VERSION, ROWS_VERSION)
    return hash_json([sha256_file(SHIPPED / "demo.yaml"), versions])[:12]


@dataclass(frozen=True, slots=True)
class Demo:
    """Size and seed of the demo world."""

    scenes: int = 20_000
    held_out: int = 600
    """Scenes of the held-out questions."""
    seed: int = 0
    recipe: str = field(default_factory=recipe_version)
    """Version of the recipe that packed it."""


def make_demo(out: Path, demo: Demo, team: Team, reporter: Reporter) -> None:
    """Draw the world under ``out/raw`` and pack it into ``out/packs/{pt,sft,eval}``; finished parts are kept.

    Safe when several processes call it at once: one works, the others wait.

    Raises:
        UserError: ``out`` holds another world, or a size is out of range.
    """
    with lock_of(out).hold(reporter.say, wait=True) if team.is_reporter else nullcontext():
        if team.serial(lambda: _made(out) == demo):
            reporter.say(f"demo: {out} is complete")
        else:
            team.serial(lambda: _draw(out, demo, team, reporter))
            run(load_recipe("demo", {"root": str(out / "raw"), "out": str(out)}), team, reporter)
            team.serial(lambda: write_atomic(out / MARKER, json.dumps(asdict(demo)).encode()))


def _draw(out: Path, demo: Demo, team: Team, reporter: Reporter) -> None:
    reporter.say(f"demo: drawing {demo.scenes:,} scenes into {out / 'raw'}")
    workers = team.workers if isinstance(team, LocalTeam) else 1
    write_world(out, scenes=demo.scenes, held_out=demo.held_out, seed=demo.seed, workers=workers)
    (out / MARKER).unlink(missing_ok=True)  # not before: where another world is, nothing is touched


def ensure_demo(out: Path, demo: Demo | None = None, *, quiet: bool = False) -> None:
    """Prepare the demo packs (of the default size) unless there are any; safe when several processes call it at once.

    The work runs in a process of its own, so that the caller's libraries and main module are not loaded again by every
    worker; ``quiet`` is for callers beside one that shows what it says.

    Raises:
        UserError: the preparation failed; its own message was printed before.
    """
    if _made(out) is not None:
        return
    wanted = demo or Demo()
    flags = [f"--scenes={wanted.scenes}", f"--held-out={wanted.held_out}", f"--seed={wanted.seed}"]
    environment = {key: value for key, value in os.environ.items() if not key.startswith(_LAUNCHER_PREFIXES)}
    source = str(Path(__file__).parents[2])
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [source, environment.get("PYTHONPATH")]))
    command = [sys.executable, "-m", "data_prep", "demo", str(out), *flags]
    sink = subprocess.DEVNULL if quiet else None
    if subprocess.run(command, env=environment, check=False, stdout=sink, stderr=sink).returncode:
        raise UserError(f"the demo data could not be prepared in {out} (see the message above)")


def _made(out: Path) -> Demo | None:
    """Return the settings of a complete demo made by this version of its recipe, or None."""
    if not ((out / MARKER).is_file() and all(_is_complete(out / "packs" / name) for name in SETS)):
        return None
    try:
        made = Demo(**json.loads((out / MARKER).read_text(encoding="utf-8")))
    except (ValueError, TypeError):  # written by another version: make it again
        return None
    return made if made.recipe == recipe_version() else None


def _is_complete(packs: Path) -> bool:
    """Return whether a pack folder's files and images are there, each with its size."""
    try:
        manifest = Manifest.load(packs)
        store = ImageStore(packs / manifest.image_store)
    except UserError:
        return False
    return not store.missing() and all(is_of_size(packs / entry.name, entry.bytes) for entry in manifest.files)
