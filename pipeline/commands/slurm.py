"""``mma slurm init``: copy the Slurm scripts out of the package."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from data_prep.common.errors import UserError
from pipeline.config.shipped import shipped_folder

SITE_SETTINGS = "env.sh"


def slurm(options: argparse.Namespace) -> int:
    """Copy the scripts into DIR/slurm; return 0. Raises UserError if a script differs, unless --force."""
    source, target = shipped_folder("slurm"), options.directory / "slurm"
    if target.resolve() == source.resolve():
        raise UserError(f"{target} holds the original scripts: name another folder")
    scripts = sorted(path for path in source.iterdir() if path.suffix in (".sh", ".py"))
    kept = [path for path in scripts if _differs(path, target / path.name)]
    if not options.force and (changed := [path.name for path in kept if path.name != SITE_SETTINGS]):
        raise UserError(f"{target}: {', '.join(changed)} differ from the shipped scripts: --force replaces them")
    (target / "logs").mkdir(parents=True, exist_ok=True)  # without it, Slurm fails a job before its first line
    for path in scripts:
        if not (path.name == SITE_SETTINGS and path in kept):
            shutil.copyfile(path, target / path.name)
            (target / path.name).chmod(0o755 if path.suffix == ".sh" else 0o644)
    print(f"{target}: {len(scripts)} files. Set your site's options in {target / SITE_SETTINGS}, then try:")
    print(f"  cd {target.parent.resolve()} && slurm/chain.sh --dry-run")
    return 0


def _differs(path: Path, other: Path) -> bool:
    return other.exists() and other.read_bytes() != path.read_bytes()
