"""The plan of a run in words, printed before training and by ``--dry-run``."""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import chain, islice

from data_prep.images.store import ImageStore
from pipeline.config.schema import TrainSection
from pipeline.data.batches import default_threads
from pipeline.data.images import ImageLoader, ImageReference, images_of, images_per_core_s
from pipeline.parallel.partition import VirtualStages
from pipeline.parallel.schedule import bubble
from pipeline.planning.capacity import local_ranks
from pipeline.planning.estimate import GIB, WorkloadEstimate
from pipeline.planning.hardware import Hardware
from pipeline.planning.roofline import Roofline, Workload
from pipeline.planning.run_plan import RunPlan

_MEASURED_IMAGES, _SEARCHED_ROWS = 24, 256


def describe(plan: RunPlan) -> str:
    """Return the run's plan: model, data, batch arithmetic, stages, memory."""
    return "\n".join([*_model_lines(plan), *_data_lines(plan), *_batch_lines(plan), *_stage_lines(plan)])


def _model_lines(plan: RunPlan) -> Iterator[str]:
    spec = plan.spec
    yield f"run      {plan.config.run_dir}  (recipe {plan.recipe}, {'bf16' if plan.bf16 else 'fp32'})"
    towers = " + ".join(str(tower.config.model_type) for tower in spec.towers.values())
    parts = f"{spec.llm.model_type} {spec.layers} x {spec.width}, {spec.connector.kind}, {towers}"
    counts = plan.split.counts
    yield f"model    {parts}: {millions(counts.total)} parameters, {millions(counts.trained.total)} trained"
    proof = f"proved leak-free on the first {plan.config.mask.prove_rows} rows"
    yield f"mask     {plan.policy.name}: {'LEAKS answers (mask.allow_leak)' if plan.policy.may_leak else proof}"


def _data_lines(plan: RunPlan) -> Iterator[str]:
    manifest = plan.packs.manifest
    filled = manifest.tokens / (manifest.rows * manifest.seq_len)
    yield (
        f"data     {plan.config.data.packs}: {manifest.rows:,} rows x {manifest.seq_len:,} tokens, {filled:.1%} full, "
        f"{manifest.targets:,} supervised tokens, {manifest.media_spec.image.describe()}"
    )
    for name, corpus in sorted(manifest.corpora.items()):
        yield f"           {name}: {corpus.draws:,} draws of {corpus.samples:,} samples ({corpus.epochs:.2f} epochs)"


def _batch_lines(plan: RunPlan) -> Iterator[str]:
    order, topology, train = plan.order, plan.topology, plan.config.train
    tokens = order.global_batch_size * plan.packs.manifest.seq_len
    yield (
        f"batch    {order.global_batch_size} rows = {topology.dp} dp ranks x {order.microbatches} micro-batches x "
        f"{order.microbatch_rows} rows = {tokens:,} tokens a step"
    )
    yield (
        f"steps    {plan.steps:,}: lr {_rates(plan)} after {train.warmup_steps} steps of warm-up, "
        f"{_decay(train)}; clip {train.clip_norm}, weight decay {train.weight_decay}"
    )


def _rates(plan: RunPlan) -> str:
    """Return the peak learning rates of what trains."""
    scales, lr = plan.split.scales, plan.config.train.lr
    each = ", ".join(f"{label} {lr * scale:.1e}" for label, scale in scales.items())
    return each if len(set(scales.values())) > 1 else f"{lr * next(iter(scales.values())):.1e} ({', '.join(scales)})"


def _decay(train: TrainSection) -> str:
    if train.schedule == "constant":
        return "then constant"
    last = f" over the last {train.decay_steps} steps" if train.schedule == "wsd" else ""
    return f"{train.schedule} to {train.min_lr:.1e}{last}"


def _stage_lines(plan: RunPlan) -> Iterator[str]:
    topology, parallel, load = plan.topology, plan.config.parallel, WorkloadEstimate.of(plan)
    yield (
        f"ranks    {topology.world} = {topology.pp} stages x {topology.dp} dp ranks, {parallel.schedule}, "
        f"expected bubble {shown_bubble(load)}"
    )
    yield f"sharding {plan.sharding}{', each layer gathered at once' if plan.leaf_layers else ''}"
    for stage, virtual_stages in enumerate(plan.split.stage_layers):
        trained, frozen = load.split.parameters(stage)
        need = load.memory(stage)
        names = ("states", "gathered", "activations", *(name for name in ("losses", "host") if getattr(need, name)))
        parts = ", ".join(f"{name} {getattr(need, name) / GIB:.2f}" for name in names)
        yield (
            f"           stage {stage}: layers {shown_layers(virtual_stages)}, {millions(trained)} trained + "
            f"{millions(frozen)} frozen; a rank needs about {need.total / GIB:.2f} GiB ({parts})"
        )


def describe_loader(plan: RunPlan) -> str:
    """Return what the loader can deliver, measured here on the first images, beside what a step needs."""
    manifest, data = plan.packs.manifest, plan.config.data
    shown = _first_images(plan)
    if not shown:
        return "loader   no images in the first rows"
    towers = [tower.preprocess for tower in plan.spec.towers.values()]
    store = ImageStore(plan.packs.directory / manifest.image_store)
    loader = ImageLoader(store, towers, data.draft_jpeg, manifest.media_spec)
    rate = images_per_core_s(loader, shown)
    cores = len(os.sched_getaffinity(0)) // min(8, local_ranks(os.environ, plan.topology.world))
    threads = default_threads(cores) if data.decode_threads is None else max(1, data.decode_threads)
    each = manifest.images / manifest.rows * plan.order.global_batch_size / plan.topology.dp
    told = (
        f"loader   {threads} decode threads x {rate:.0f} images/s a core (measured here on {len(shown)} images) = "
        f"{threads * rate:.0f} images/s; a step takes {each:.0f} images a rank"
    )
    step = predict(plan)
    if step is None:
        return told
    slow = "; the loader is the slower one: more cores a rank" if step.images_per_s > threads * rate else ""
    return f"{told}, {step.images_per_s:.0f} images/s at {step.step_s:.2f} s on {step.hardware.gpu} (predicted){slow}"


def _first_images(plan: RunPlan) -> list[ImageReference]:
    rows = (plan.packs[number] for number in range(min(len(plan.packs), _SEARCHED_ROWS)))
    return list(islice(chain.from_iterable(images_of([row]) for row in rows), _MEASURED_IMAGES))


def predict(plan: RunPlan) -> Roofline | None:
    """Return the predicted step on the default GPUs; None in fp32 and with offload, which no roofline describes."""
    load, manifest = WorkloadEstimate.of(plan), plan.packs.manifest
    draws = sum(corpus.draws for corpus in manifest.corpora.values())
    work = Workload(
        manifest.images / manifest.tokens, manifest.targets / manifest.tokens, manifest.tokens / max(1, draws)
    )
    return Roofline(load, work, Hardware()) if load.is_predictable else None


def shown_bubble(load: WorkloadEstimate) -> str:
    """Return the bubble of a step, and the bubble with virtual stages of equal cost."""
    even = bubble(len(load.split.stage_layers), load.microbatches, load.config.parallel.virtual_stages)
    return f"{load.bubble:.1%} ({even:.1%} with equal stages)"


def shown_layers(virtual_stages: VirtualStages) -> str:
    """Return a stage's decoder layers as ``0..3`` or ``0..1, 4..5``."""
    return ", ".join(f"{virtual_stage.start}..{virtual_stage.stop - 1}" for virtual_stage in virtual_stages)


def millions(count: float) -> str:
    """Return a parameter count as ``4.1M`` or ``3.82B``."""
    return f"{count / 1e9:.2f}B" if count >= 1e9 else f"{count / 1e6:.1f}M"
