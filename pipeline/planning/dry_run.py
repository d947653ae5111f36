"""The plan of a run in words, printed before training and by ``--dry-run``."""

from __future__ import annotations

from collections.abc import Iterator

from pipeline.config.schema import TrainSection
from pipeline.parallel.partition import VirtualStages
from pipeline.parallel.schedule import bubble
from pipeline.planning.estimate import GIB, WorkloadEstimate
from pipeline.planning.run_plan import RunPlan


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
        f"{manifest.targets:,} supervised tokens, {manifest.image_tokens} tokens an image"
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
    yield f"sharding {plan.sharding}{', each layer gathered at once' if parallel.leaf_layers else ''}"
    for stage, virtual_stages in enumerate(plan.split.stage_layers):
        trained, frozen = load.split.parameters(stage)
        need = load.memory(stage)
        names = ("states", "gathered", "activations", *(name for name in ("losses", "host") if getattr(need, name)))
        parts = ", ".join(f"{name} {getattr(need, name) / GIB:.2f}" for name in names)
        yield (
            f"           stage {stage}: layers {shown_layers(virtual_stages)}, {millions(trained)} trained + "
            f"{millions(frozen)} frozen; a rank needs about {need.total / GIB:.2f} GiB ({parts})"
        )


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
