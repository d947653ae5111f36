"""Events of a start: what a run does not check, or does in another way than asked."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from data_prep.common.plugins import plugins_in_use
from pipeline.attention import slow_path_reason
from pipeline.model.families.configs import ignored_keys
from pipeline.model.weights import WeightSource
from pipeline.parallel.launch import device_of_rank
from pipeline.parallel.zero3 import check_version
from pipeline.planning.compatibility import initial_policy
from pipeline.planning.run_plan import RunPlan
from pipeline.training.run.folder import RunFolder


def record_start_events(plan: RunPlan, folder: RunFolder, *, watched: bool, oversubscribed: Sequence[str]) -> None:
    """Record the events of a start; rank 0 only. Raises StrictEvent if ``--strict`` makes one fatal."""
    config, manifest = plan.config, plan.packs.manifest
    for plugin in plugins_in_use():
        folder.record("plugin-used", **plugin)
    if not config.data.verify:
        folder.record("file-unverified", path=config.data.packs, reason="data.verify is false")
    if warning := check_version():
        folder.record("version-untested", reason=warning)
    if not watched and plan.topology.world > 1:
        folder.record("watchdog-unavailable")
    for problem in oversubscribed:
        folder.record("memory-oversubscribed", reason=problem)
    sources = {Path(tower.source) for tower in plan.spec.towers.values()} | {Path(plan.spec.llm_source)}
    sources |= {Path(plan.spec.start.source)} if plan.spec.start else set()
    for path in sources & ignored_keys.keys():
        folder.record("config-key-ignored", count=len(ignored_keys[path]), path=path, keys=ignored_keys[path])
    softcap = getattr(plan.spec.llm, "attn_logit_softcapping", None)
    if reason := slow_path_reason(device_of_rank().type, plan.dtype, plan.spec.head_size, softcap):
        folder.record("attention-fallback", reason=reason)
    before = initial_policy(config)
    if before not in (None, config.mask.name):
        folder.record("mask-changed", init_from=config.init_from, old=before, new=config.mask.name)
    if not config.train.steps:
        folder.record("rows-dropped", count=manifest.rows % config.train.global_batch_size, path=config.data.packs)


def record_source_events(source: WeightSource, folder: RunFolder) -> None:
    """Record what of the model folders a new run does not read, and what they lack; rank 0 only."""
    for path, count in source.unused.items():
        folder.record("weights-unused", count=count, path=path)
    for path, count in source.short_vocabulary.items():
        folder.record("vocabulary-extended", count=count, path=path)
