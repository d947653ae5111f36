"""When a run saves, and what a checkpoint says of the run."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from data_prep.template import template_of
from pipeline.parallel.zero3 import Zero3Stage
from pipeline.training import checkpoint
from pipeline.training.blueprint import Blueprint
from pipeline.training.checkpoint import CheckpointManifest
from pipeline.training.run_folder import RunFolder


class Saver:
    """Writes a run's checkpoints from all ranks and removes old ones."""

    def __init__(self, plan: Blueprint, folder: RunFolder, stage: Zero3Stage, *, step: int) -> None:
        """Save ``stage`` into ``folder``; ``step`` is the one its newest checkpoint holds (0 = none)."""
        self._plan, self._folder, self._stage = plan, folder, stage
        self._saved = step

    def due(self, step: int) -> bool:
        """Whether the recipe asks for a checkpoint after this step."""
        every = self._plan.config.checkpoint.every_steps
        return bool(every) and step % every == 0

    def save(self, step: int) -> None:
        """Save, unless this step's checkpoint is there. Every rank must call it at the same step.

        Raises UserError on all ranks alike when one of them cannot write.
        """
        if step == self._saved:
            return
        plan = self._plan
        tokenizer = plan.packs.directory / plan.packs.manifest.tokenizer
        saved = checkpoint.save(
            self._stage, self._folder.path / "checkpoints", self._manifest(step), tokenizer=tokenizer
        )
        self._saved = step
        if plan.topology.rank == 0:
            self._retire(saved, step)

    def _retire(self, saved: Path, step: int) -> None:
        checkpoint.prune(self._folder.path, self._plan.config.checkpoint.keep_last, newest=saved)
        self._folder.set_status("running", step)
        print(f"saved {saved}", flush=True)

    def _manifest(self, step: int) -> CheckpointManifest:
        plan = self._plan
        return CheckpointManifest(
            step=step, optimizer_steps=self._stage.optimizer_steps, consumed_packs=step * plan.order.batch_packs,
            plan_sha256=plan.packs.manifest.plan_sha256, batch_packs=plan.order.batch_packs, pp=plan.topology.pp,
            dp=plan.topology.dp, config=plan.config.model_dump(), model=model_card(plan),
        )  # fmt: skip


def model_card(plan: Blueprint) -> dict[str, object]:
    """Return what a checkpoint says of its model, so that it can be exported without the recipe."""
    manifest = plan.packs.manifest
    return {
        "spec": plan.spec.to_dict(),
        "policy": plan.config.mask.policy,
        "template": asdict(template_of(manifest)),
        "image_id": manifest.image_id,
        "pad_id": manifest.pad_id,
        "eos_ids": list(manifest.eos_ids),
        "tokenizer_sha256": manifest.tokenizer_sha256,
        "dtype": "bfloat16" if plan.bf16 else "float32",
    }
