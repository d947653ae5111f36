"""Where a start takes its weights from: its own checkpoint, another run's, an export, model folders, or the seed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

from data_prep.common.errors import UserError
from pipeline.checkpoints import checkpoint
from pipeline.checkpoints.base import base_weights, digests, open_source, weight_files
from pipeline.checkpoints.checkpoint import Checkpoint
from pipeline.checkpoints.manifest import BaseWeights, FileDigest
from pipeline.model.lora import is_adapter
from pipeline.model.weights import WeightSource
from pipeline.planning.compatibility import is_export
from pipeline.planning.run_plan import RunPlan


@dataclass(frozen=True)
class Origin:
    """The origin of a start's weights; the same on every rank."""

    own: Checkpoint | None
    """The checkpoint that the run resumes from."""
    given: Checkpoint | None
    """The checkpoint that its first weights, or its base weights, come from."""
    source: WeightSource | None
    """Model folders or an export with its first weights, or its base weights."""
    base: tuple[BaseWeights, ...] = ()
    """With LoRA, what checkpoints of the run say about the weights that they do not hold."""

    @property
    def is_checkpoint(self) -> bool:
        """Whether the stage is filled after it is built."""
        return self.own is not None or self.given is not None

    def stores(self, name: str) -> bool:
        """Whether checkpoints of the run hold a frozen parameter: adapters, and what its base weights lack."""
        if not self.base or is_adapter(name):
            return True
        return not (checkpoint.has_weight(self.given, name) if self.given else self.source and name in self.source)


FROM_SCRATCH = Origin(None, None, None)


def find_origin(plan: RunPlan, run_dir: Path, report: Callable[[str], None]) -> Origin:
    """Find the origin of a start's weights, and check it. Collective.

    Args:
        plan: the run.
        run_dir: its folder.
        report: called with each fault of a damaged checkpoint that is skipped.

    Raises:
        UserError: no checkpoint of the run is intact, or the other weights are missing or damaged.
    """
    own = _own_checkpoint(plan, run_dir, report)
    if own is None:
        given = _given_checkpoint(plan)
        source = None if given else _folders(plan)
        return Origin(None, given, source, _new_base(plan, given) if plan.spec.lora else ())
    base = own.manifest.base
    given = next((Checkpoint(each.path) for each in base if each.kind == "checkpoint"), None)
    return Origin(own, given, open_source(plan.spec, base) if base and given is None else None, base)


def _own_checkpoint(plan: RunPlan, run_dir: Path, report: Callable[[str], None]) -> Checkpoint | None:
    topology = plan.topology
    found, faults = checkpoint.newest_intact(run_dir, rank=topology.rank, world=topology.world)
    for fault in faults:
        report(fault)
    if found is None and faults:  # not a new run: starting over would discard its metrics
        raise UserError(f"{run_dir}: no checkpoint is intact: restore one, or use another --run-dir")
    return found


def _given_checkpoint(plan: RunPlan) -> Checkpoint | None:
    """Return the checkpoint with a new run's first weights, if ``init_from`` names one."""
    source, topology = plan.config.init_from, plan.topology
    if not source or is_export(source):
        return None
    found, faults = checkpoint.newest_intact(Path(source), rank=topology.rank, world=topology.world)
    if found is None or faults:
        raise UserError(f"init_from={source}: {faults[0]}: name an intact checkpoint")
    return found


def _folders(plan: RunPlan) -> WeightSource | None:
    """Open the folders of a new run's first weights."""
    source = plan.config.init_from
    return WeightSource.open_export(plan.spec, source) if is_export(source) else WeightSource.open(plan.spec)


def _new_base(plan: RunPlan, given: Checkpoint | None) -> tuple[BaseWeights, ...]:
    """Hash the files of a new run's base weights; ranks share the work."""
    spec, source = plan.spec, plan.config.init_from
    if given is not None:
        folders = {"checkpoint": str(given.path)}
    elif is_export(source):
        folders = {"export": source}
    else:
        folders = {"llm": spec.llm_source} | {name: tower.source for name, tower in spec.towers.items()}
        folders["start"] = spec.start.source if spec.start else ""
    return tuple(
        base_weights(kind, folder, _hash_together(weight_files(kind, Path(folder)), plan))
        for kind, folder in folders.items()
        if folder
    )


def _hash_together(files: list[Path], plan: RunPlan) -> dict[str, FileDigest]:
    """Hash files, each rank a share. Raises UserError on all ranks alike when one cannot read its share."""
    topology, fault = plan.topology, ""
    own: dict[str, FileDigest] = {}
    try:
        own = digests(files[topology.rank :: topology.world])
    except UserError as error:
        fault = str(error)
    gathered: list[tuple[dict[str, FileDigest], str]] = [({}, "")] * topology.world
    dist.all_gather_object(gathered, (own, fault))
    for _, problem in gathered:
        if problem:
            raise UserError(problem)
    return {name: entry for theirs, _ in gathered for name, entry in theirs.items()}
