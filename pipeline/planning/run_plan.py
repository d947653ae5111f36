"""Everything about a run that can be resolved and checked before a process group or a weight exists.

Every rank builds the same plan from the same files, so an error found here is the same line on all of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from data_prep.images.store import ImageStore
from data_prep.packs import Manifest, PackReader
from pipeline.config.flags import Invocation
from pipeline.config.schema import ConfigError, RunConfig
from pipeline.data.order import BatchOrder
from pipeline.masks import Policy, get_policy
from pipeline.masks.proof import check_rows
from pipeline.model.hub import fetch_weights, pin_sources
from pipeline.model.spec import ModelSpec
from pipeline.parallel.ds_config import Sharding, complete_ds_config, read_ds_config
from pipeline.parallel.partition import VirtualStages
from pipeline.parallel.topology import Topology, micro_batches
from pipeline.planning.compatibility import check_image_token, check_init_from, check_resume, check_tokenizer
from pipeline.planning.stage_split import StageSplit


@dataclass(frozen=True)
class ParallelSettings:
    """A run's grid, batches and sharding, from its flags and DeepSpeed file; needs no data."""

    config: RunConfig
    recipe: str
    topology: Topology
    order: BatchOrder
    sharding: Sharding
    bf16: bool
    ds_config: dict[str, Any]

    @property
    def dtype(self) -> torch.dtype:
        """Compute type of weights and activations."""
        return torch.bfloat16 if self.bf16 else torch.float32

    @property
    def dtype_name(self) -> str:
        """The compute type as checkpoints name it."""
        return "bfloat16" if self.bf16 else "float32"


def read_parallel_settings(invocation: Invocation, *, rank: int, world: int) -> ParallelSettings:
    """Read and check these settings. Raises UserError naming the wrong key, file or flag and the fix."""
    config = invocation.config
    raw_ds = read_ds_config(invocation.deepspeed)
    sharding = Sharding.of(raw_ds, config.parallel)
    topology = Topology(world, rank, config.parallel.pp)
    microbatches, microbatch_rows = micro_batches(
        config.train.global_batch_size, topology.dp, config.parallel.micro_batches
    )
    order = BatchOrder(config.train.global_batch_size, topology.dp, microbatches)
    bf16 = config.train.dtype == "bf16" or (config.train.dtype == "auto" and torch.cuda.is_available())
    ds_config = complete_ds_config(raw_ds, config, microbatch_rows=microbatch_rows, bf16=bf16)
    return ParallelSettings(config, invocation.recipe, topology, order, sharding, bf16, ds_config)


@dataclass(frozen=True)
class RunPlan(ParallelSettings):
    """A checked run: the model, its data, its ranks and its length."""

    packs: PackReader
    policy: Policy
    spec: ModelSpec
    split: StageSplit
    steps: int
    """Optimizer steps of the whole run."""
    held_out: Mapping[str, PackReader]
    """Folders of `eval.packs`, if the run evaluates."""

    @classmethod
    def build(cls, invocation: Invocation, *, rank: int, world: int) -> RunPlan:
        """Resolve and check a run. Raises UserError naming the wrong key, file or flag and the fix."""
        config = invocation.config
        config = config.model_copy(update={"model": pin_sources(config.model, Path(config.run_dir))})
        invocation = replace(invocation, config=config)
        if not invocation.dry_run:
            fetch_weights(config.model)
        settings = read_parallel_settings(invocation, rank=rank, world=world)
        packs = _open_packs(config, settings.topology)
        manifest = packs.manifest
        spec = ModelSpec.resolve(
            config.model, vocab_size=manifest.vocab_size, image_tokens=manifest.image_tokens, media=manifest.media
        )
        spec.check_segments(manifest.max_segment_tokens)
        policy = get_policy(config.mask.name, allow_leak=config.mask.allow_leak, grid=spec.mask_grid)
        _check_layers(policy, spec)
        check_tokenizer(config, packs.directory / manifest.tokenizer)
        check_image_token(spec, packs.directory / manifest.tokenizer)
        check_init_from(config, manifest, spec)
        check_resume(
            config, manifest, spec,
            dtype=None if invocation.dry_run else settings.dtype_name, allowed=invocation.allowed_changes,
        )  # fmt: skip
        steps = count_steps(config, manifest)
        if not policy.may_leak:  # ablations that leak on purpose need mask.allow_leak
            check_rows(policy, packs, range(min(config.mask.prove_rows, len(packs))), layers=spec.layers)
        split = StageSplit.of(
            spec, config,
            image_share=spec.views(manifest.all_media_tokens) / manifest.tokens,
            target_share=manifest.targets / manifest.tokens,
        )  # fmt: skip
        return cls(
            **vars(settings), packs=packs, policy=policy, spec=spec, split=split, steps=steps,
            held_out=_open_held_out(config, manifest),
        )  # fmt: skip

    @property
    def leaf_layers(self) -> bool:
        """Whether each decoder layer and vision block is gathered as a whole."""
        asked = self.config.parallel.leaf_layers
        return torch.cuda.is_available() if asked is None else asked

    @property
    def virtual_stages(self) -> VirtualStages:
        """Decoder layers of this rank's stage, by virtual stage."""
        return self.split.stage_layers[self.topology.stage]


def _open_packs(config: RunConfig, topology: Topology) -> PackReader:
    if not config.data.packs:
        raise ConfigError("data.packs is not set: give the pack folder that mma-prep wrote (--data.packs DIR)")
    packs = PackReader(config.data.packs)
    if config.data.verify:
        from data_prep.verify import verify_share

        verify_share(packs.directory, topology.rank, topology.world)
    _check_images(packs)
    if packs.manifest.targets == 0:
        raise ConfigError(f"{config.data.packs} has no supervised tokens to learn from: see mma-prep stats")
    return packs


def _check_images(packs: PackReader) -> None:
    store = packs.manifest.image_store
    if store and ImageStore(packs.directory / store).identity != packs.manifest.image_store_sha256:
        raise ConfigError(
            f"{packs.directory} was built with other images than {packs.directory / store} has: run mma-prep again"
        )


def _open_held_out(config: RunConfig, trained: Manifest) -> dict[str, PackReader]:
    """Open the folders of `eval.packs`. Raises ConfigError where one does not fit the run or is what it trains on."""
    if not config.eval.every_steps:
        return {}
    folders = {name: PackReader(folder) for name, folder in config.eval.packs.items()}
    for name, packs in folders.items():
        manifest = packs.manifest
        for key in ("tokenizer_sha256", "image_tokens", "media", "template"):
            ours, theirs = getattr(trained, key), getattr(manifest, key)
            if ours != theirs:
                raise ConfigError(
                    f"eval.packs: {name} ({packs.directory}) has {key}={theirs}, {config.data.packs} {ours}: "
                    "prepare both with one recipe"
                )
        if manifest.plan_sha256 == trained.plan_sha256:
            raise ConfigError(f"eval.packs: {name} ({packs.directory}) has the rows the run trains on: hold some out")
        if not manifest.targets:
            raise ConfigError(f"eval.packs: {name} ({packs.directory}) has no supervised tokens: see mma-prep stats")
        _check_images(packs)
    return folders


def _check_layers(policy: Policy, spec: ModelSpec) -> None:
    """Refuse ranges of ``mask.layers`` beyond the model's layers. Raises ConfigError."""
    for layers, part in policy.layers:
        if layers.stop > spec.layers:
            raise ConfigError(
                f"mask.layers: {layers.start}:{layers.stop}={part.name} ends after the model's {spec.layers} layers: "
                f"end it at {spec.layers} or before"
            )


def count_steps(config: RunConfig, manifest: Manifest) -> int:
    """Return the run's optimizer steps: as configured, or passes over the rows (whose plan may cover many epochs)."""
    train, folder = config.train, Path(config.data.packs)
    batch = train.global_batch_size
    available = manifest.rows // batch
    if available == 0:
        raise ConfigError(f"{folder} has {manifest.rows} rows, fewer than train.global_batch_size={batch}")
    if train.steps > available:
        raise ConfigError(
            f"train.steps={train.steps} needs {train.steps * batch} rows, {folder} has {manifest.rows} "
            f"({available} steps): plan more epochs with mma-prep, repeat the rows with train.epochs, or lower "
            "train.steps"
        )
    steps = train.steps or max(1, round((train.epochs or 1.0) * available))
    if train.decay_steps > steps:
        raise ConfigError(f"train.decay_steps={train.decay_steps} is longer than the run of {steps} steps: lower it")
    return steps
