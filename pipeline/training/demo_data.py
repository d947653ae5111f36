"""Prepares the built-in demo corpora where a recipe asks for them and they are not there yet."""

from __future__ import annotations

from pathlib import Path

from data_prep.common.errors import UserError
from pipeline.config.schema import RunConfig


def prepare_demo(config: RunConfig, *, rank: int, dry_run: bool = False) -> None:
    """Make the demo's packs when ``data.packs`` lies in ``data.demo`` and is missing; safe on all ranks at once.

    Raises UserError where a dry run would have to make them.
    """
    demo, packs = config.data.demo, Path(config.data.packs)
    if not demo or (packs / "manifest.json").is_file() or Path(demo).resolve() not in packs.resolve().parents:
        return
    if dry_run:
        raise UserError(
            f"{packs} is not there yet, and a dry run makes no data: mma-prep demo {demo} makes it, as training would"
        )
    from data_prep.demo.packs import ensure_demo

    ensure_demo(Path(demo), quiet=rank > 0)
