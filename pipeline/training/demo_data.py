"""Prepares the built-in demo corpora if a recipe uses them and they do not exist yet."""

from __future__ import annotations

from pathlib import Path

from data_prep.common.errors import UserError
from pipeline.config.schema import RunConfig


def prepare_demo(config: RunConfig, *, rank: int, dry_run: bool = False) -> None:
    """Build the demo's packs if ``data.packs`` is inside ``data.demo`` and missing; safe on all ranks at once.

    Raises UserError in a dry run, which builds no data.
    """
    demo, packs = config.data.demo, Path(config.data.packs)
    if not demo or (packs / "manifest.json").is_file() or Path(demo).resolve() not in packs.resolve().parents:
        return
    if dry_run:
        raise UserError(f"{packs} does not exist yet, and a dry run builds no data: run mma-prep demo {demo} first")
    from data_prep.demo.packs import ensure_demo

    ensure_demo(Path(demo), quiet=rank > 0)
