"""The embedded default: the demo world, drawn and packed, for whoever starts without data."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from data_prep.errors import UserError
from data_prep.packs import write_atomic
from data_prep.progress import Reporter
from data_prep.workers import LocalTeam, Team

SETS = ("pt", "sft", "eval")
"""Pack sets of the demo: captions, questions, held-out questions."""
_LAUNCHER_PREFIXES = ("PMI", "OMPI_", "MPI")
"""Environment of an MPI launch, which a child process must not take for its own."""


@dataclass(frozen=True, slots=True)
class Demo:
    """Size and seed of the demo world."""

    scenes: int = 20_000
    held_out: int = 600
    """Scenes of the held-out questions."""
    seed: int = 0


def make_demo(out: Path, demo: Demo, team: Team, reporter: Reporter) -> None:
    """Draw the world under ``out/raw`` and pack it into ``out/packs/{pt,sft,eval}``; finished parts are kept.

    Raises:
        UserError: ``out`` cannot be written, or holds another world.
    """
    if _made(out) == demo:
        reporter.say(f"demo: {out} is complete")
        return

    def draw() -> None:
        from data_prep.demo import write_world

        (out / "demo.json").unlink(missing_ok=True)
        reporter.say(f"demo: drawing {demo.scenes:,} scenes into {out / 'raw'}")
        write_world(out, **asdict(demo), workers=team.workers if isinstance(team, LocalTeam) else 1)

    from data_prep.recipe import load_recipe
    from data_prep.steps import run

    team.serial(draw)
    run(load_recipe("demo", {"root": str(out / "raw"), "out": str(out)}), team, reporter)
    team.serial(lambda: write_atomic(out / "demo.json", json.dumps(asdict(demo)).encode()))


def ensure_demo(out: Path) -> None:
    """Prepare the demo packs with their default settings unless they are there.

    Safe when several processes call it at once: one works, the others wait. The work runs in a process of its own, so
    the caller's libraries and main module are not loaded again by each worker.

    Raises:
        UserError: the preparation failed; its own message was printed before.
    """
    if _made(out) is not None:
        return
    out.mkdir(parents=True, exist_ok=True)
    with _lock(out / ".lock"):
        if _made(out) is not None:
            return
        environment = {key: value for key, value in os.environ.items() if not key.startswith(_LAUNCHER_PREFIXES)}
        source = str(Path(__file__).parent.parent)
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [source, environment.get("PYTHONPATH")]))
        finished = subprocess.run([sys.executable, "-m", "data_prep", "demo", str(out)], env=environment, check=False)
    if finished.returncode:
        raise UserError(f"the demo data could not be prepared in {out} (see the message above)")


def _made(out: Path) -> Demo | None:
    """Return the settings of a complete demo, or None."""
    marker = out / "demo.json"
    if not marker.is_file() or not all((out / "packs" / name / "manifest.json").is_file() for name in SETS):
        return None
    return Demo(**json.loads(marker.read_text(encoding="utf-8")))


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on a file; the system drops it when the process ends, however it ends."""
    with path.open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield
