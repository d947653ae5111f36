"""The run configuration: one typed, frozen, strict tree, read from a recipe and overridden by flags.

A recipe is a YAML file with the same structure as `RunConfig`; ``extends: other`` inherits from another recipe. Flags
are the dotted keys of the same tree (``--train.lr 1e-4``); see `pipeline.config.flags`. An unknown key or flag is an
error that suggests the closest known one.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from data_prep.common.errors import UserError
from data_prep.common.validation import Place, problems, report
from data_prep.common.yaml_files import read_yaml

Positive = Annotated[int, Field(gt=0, lt=1 << 31)]
NonNegative = Annotated[int, Field(ge=0, lt=1 << 31)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]
Rate = Annotated[float, Field(gt=0)]


def _split_names(value: Any) -> Any:
    """Split ``a,b`` of the command line into a list."""
    return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value


def _split_pairs(value: Any) -> Any:
    """Split ``a=1,b=2`` of the command line into a mapping."""
    if not isinstance(value, str):
        return value
    pairs = [part.partition("=") for part in _split_names(value)]
    if any(not given for _, given, _ in pairs):
        raise ValueError(f"'{value}' is not a list of PATTERN=RATE pairs such as connector=1e-3,llm=2e-5")
    return {pattern.strip(): rate for pattern, _, rate in pairs}


def _split_folders(value: Any) -> Any:
    """Split ``val=a,test=b`` of the command line into a mapping; a folder without a name is called val."""
    if not isinstance(value, str):
        return value
    pairs = [part.partition("=") if "=" in part else ("val", "=", part) for part in _split_names(value)]
    return {name.strip(): folder.strip() for name, _, folder in pairs}


Names = Annotated[list[str], BeforeValidator(_split_names)]
Folders = Annotated[dict[Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$")], str], BeforeValidator(_split_folders)]
Rates = Annotated[dict[str, Rate], BeforeValidator(_split_pairs)]


def _recomputation(value: Any) -> Any:
    """Return auto, all, none or a number as text; recipes may say true for all and false for none."""
    text = str(value).strip().lower()
    text = {"true": "all", "false": "none", "0": "none", "1": "all"}.get(text, text)
    if text not in ("auto", "all", "none") and not re.fullmatch(r"[1-9]\d{0,8}", text, re.ASCII):
        raise ValueError(f"'{value}' is none of auto, all, none or a number k, which recomputes every k-th layer")
    return text


def is_recomputed(layer: int, every: int) -> bool:
    """Whether a decoder layer, counted from 0 in the whole model, is one of every ``every``-th; 0 = none is."""
    return every > 0 and layer % every == 0


Recomputation = Annotated[str, BeforeValidator(_recomputation)]


def _from_yaml(value: Any) -> Any:
    """Read a list of sections that stands on the command line."""
    return read_yaml(value, "the list") if isinstance(value, str) else value


class ConfigError(UserError):
    """A recipe key, a flag, or a combination of them is invalid."""


class Section(BaseModel):
    """A frozen group of keys; the string under each key is its help text."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, protected_namespaces=(), allow_inf_nan=False
    )  # fmt: skip


class LlmConfig(Section):
    """The decoder-only language model."""

    source: str = ""
    """Hugging Face model folder (config.json, *.safetensors), or a model of the Hub as org/name or org/name@revision,
    whose commit the run pins; empty = build `config` from scratch."""
    config: dict[str, Any] = Field(default_factory=dict)
    """Hugging Face config with `model_type`. With a `source`, these keys override the folder's config."""


class TowerConfig(Section):
    """A vision tower."""

    source: str = ""
    """Hugging Face folder of a SigLIP, SigLIP 2, CLIP or DINOv2 model, or one of the Hub as org/name or
    org/name@revision; empty = build `config` from scratch."""
    config: dict[str, Any] = Field(default_factory=dict)
    """Hugging Face vision config with `model_type`. With a `source`, these keys override the folder's config."""
    size_px: NonNegative = 0
    """Side of the images in pixels; position embeddings are interpolated to it. 0 = the tower's own, its image_size."""


class VisionConfig(TowerConfig):
    """The vision tower."""

    frozen: bool = True
    """Freeze the vision tower, as the paper does, and those of `extra_vision`."""


class ConnectorConfig(Section):
    """The connector, which projects patch features to image tokens of the language model."""

    model_config = ConfigDict(extra="allow")  # the options of the kind, which `pipeline.model.connectors` checks

    kind: str = "perceiver"
    """Kind of connector. Its options are further keys of this section, such as `latents` of the perceiver:
    docs/reference.md, section Connectors, lists kinds and options."""


class LoraConfig(Section):
    """Low-rank adapters (LoRA): language model and tower keep their weights and learn small updates of them."""

    rank: Annotated[int, Field(ge=0, le=4096)] = 0
    """Rank of the updates; 0 = no LoRA. With LoRA, language model and tower train nothing else; the connector trains
    unless `train.freeze` names it."""
    alpha: Annotated[float, Field(gt=0, le=1e6)] = 16.0
    """Updates are scaled by alpha / rank."""
    rslora: bool = False
    """Scale by alpha / sqrt(rank) instead (rsLoRA)."""
    targets: Names = ["model.layers.*"]
    """Linear layers with an adapter, by their last words as in peft (`q_proj`) or by patterns of global names
    (`vision.*.fc1`). The default is all of the decoder's layers."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Must be 0: no training step is random, so that a resumed run equals an uninterrupted one."""
    quantization: Literal["none", "nf4", "int8"] = "none"
    """Quantization of the base weights (QLoRA). Only `none` is supported."""

    @model_validator(mode="after")
    def _is_deterministic(self) -> LoraConfig:
        if self.dropout:
            raise ValueError(f"dropout={self.dropout:g} is not supported, no training step is random: set it to 0")
        if self.rank and not self.targets:
            raise ValueError("targets is empty: name the layers that get an adapter, such as q_proj,v_proj")
        return self


class GateConfig(Section):
    """A learned bias of query-key pairs over visual keys, in every decoder layer."""

    kind: Literal["none", "rave_style"] = "none"
    """none: no bias; rave_style: bilinear in queries and keys before the rotary embedding (see docs/masks.md)."""
    rank: Annotated[int, Field(gt=0, le=1024)] = 16
    """Dimensions of the bias; head size + rank up to 256, a multiple of 8, runs in flash attention."""
    heads: str = "all"
    """Query heads with a bias: all, or numbers such as "0,1"; with per=kv_group, groups of query heads."""
    per: Literal["head", "kv_group"] = "head"
    """head: each query head has weights of its own; kv_group: the query heads that share a key head share them."""


class ModelConfig(Section):
    """The multimodal model: vision tower -> connector -> language model."""

    source: str = ""
    """Folder of an existing Hugging Face vision-language model, or one of the Hub as org/name or org/name@revision: all
    three parts and their weights (docs/starting-points.md lists the models). Replaces llm.source, vision.source and
    connector; `mma export --format hf-vlm` writes its own layout."""
    llm: LlmConfig = LlmConfig()
    """Language model."""
    vision: VisionConfig = VisionConfig()
    """Vision tower."""
    extra_vision: Annotated[list[TowerConfig], BeforeValidator(_from_yaml)] = Field(default_factory=list)
    """Further towers, for a connector that reads several (sva): each sees the same image, preprocessed for it. A list
    of `source` and `config`, on the command line as YAML: [{source: models/dinov2}]."""
    connector: ConnectorConfig = ConnectorConfig()
    """Connector."""
    lora: LoraConfig = LoraConfig()
    """Low-rank adapters."""
    gate: GateConfig = GateConfig()
    """Bias of query-key pairs."""


class MaskConfig(Section):
    """The attention mask (see `mma mask`)."""

    policy: str = "mma"
    """Mask policy; `mma mask --help` lists them."""
    layers: str = ""
    """Other policies for ranges of decoder layers, e.g. "0:8=mixed,24:32=causal" (first:end, counted from 0)."""
    allow_leak: bool = False
    """Allow ablation policies under which a supervised token can attend to itself."""
    prove_rows: NonNegative = 4
    """Rows on which the mask is proved leak-free before training starts."""

    @property
    def name(self) -> str:
        """`policy` and `layers` as one name for `pipeline.masks.get_policy`."""
        parts = [part.strip() for part in self.layers.split(",") if part.strip()]
        return "+".join([self.policy, *parts])


class DataConfig(Section):
    """The packed rows and how they are loaded."""

    packs: str = ""
    """Pack folder written by mma-prep."""
    demo: str = ""
    """Folder of the built-in demo corpora; prepared first if `packs` is inside it and does not exist."""
    verify: bool = False
    """Hash packs and image store before training, each rank a share of the files; false = read only manifests."""
    decode_threads: Annotated[int, Field(ge=0, le=1024)] | None = None
    """Threads that decode images ahead of training; 0 = load between steps. None = the rank's share of its host's
    cores but one, at least 1, at most 16."""
    draft_jpeg: bool = False
    """Decode large JPEGs at 1/2, 1/4 or 1/8 of their size, as long as the tower's input is no larger: faster, with
    slightly different pixels (`python -m benchmarks.loader` prints both). Serving and evaluation decode in full."""
    prefetch_steps: Annotated[int, Field(ge=0, le=1024)] = 2
    """Steps to load ahead of the current one."""


class TrainSection(Section):
    """Optimisation."""

    global_batch_size: Positive = 8
    """Packed rows per optimizer step, over all ranks and micro-batches."""
    steps: NonNegative = 0
    """Optimizer steps of the run; 0 = as many as `epochs`, by default one epoch (every row once)."""
    epochs: Annotated[float, Field(ge=0, le=1e6)] = 0.0
    """Passes over the rows, instead of `steps`; fractions are allowed. Every pass has the rows in the same order."""
    freeze: Names = Field(default_factory=list)
    """What is not trained: `vision`, `connector`, `llm`, a module, or a pattern of parameter names with `*`;
    on the command line separated by commas. `model.vision.frozen` freezes the tower on top of it."""
    lr: Rate = 2e-5
    """Peak learning rate."""
    lr_of: Rates = Field(default_factory=dict)
    """Other peak learning rates, by part, module or pattern as in `freeze`; the last that matches counts. Warm-up and
    decay are those of `lr`, in proportion. On the command line: connector=1e-3,llm=2e-5."""
    min_lr: Annotated[float, Field(ge=0)] = 1e-6
    """Learning rate at the end of the decay."""
    warmup_steps: NonNegative = 150
    """Linear warm-up from 0, in optimizer steps."""
    schedule: Literal["cosine", "constant", "linear", "wsd"] = "cosine"
    """After the warm-up: cosine or linear decay to `min_lr`, constant, or wsd: constant, then a linear decay over the
    last `decay_steps`."""
    decay_steps: NonNegative = 0
    """Length of the decay of schedule wsd, in optimizer steps."""
    weight_decay: Annotated[float, Field(ge=0, le=100)] = 1e-4
    """AdamW weight decay for matrices; vectors (norms, biases) are not decayed."""
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """AdamW beta1."""
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999
    """AdamW beta2."""
    eps: Annotated[float, Field(gt=0, le=1)] = 1e-8
    """AdamW epsilon."""
    clip_norm: Annotated[float, Field(ge=0, le=1e9)] = 1.0
    """Maximum global gradient norm, over all stages and ranks; 0 = no clipping."""
    dtype: Literal["auto", "fp32", "bf16"] = "auto"
    """Compute dtype: auto = bf16 on GPUs, fp32 on CPUs."""
    gradient_checkpointing: Recomputation = "all"
    """Decoder layers that are recomputed in the backward pass: all, none, a number k for every k-th layer, or auto: as
    few as the estimated memory of a rank allows. No setting changes any result; each layer that is not recomputed saves
    a forward and needs memory for its activations."""
    seed: int = 0
    """Seed for weights built from scratch; training steps use no randomness."""
    deterministic: bool = False
    """Use only deterministic kernels, so that a resumed run on GPUs equals an uninterrupted one: otherwise the
    backward of flash attention adds in any order. Costs speed on GPUs; runs on CPUs are exact either way."""
    max_skipped_steps: Positive = 10
    """Fail the run after this many consecutive steps with a non-finite gradient."""
    max_hours: Annotated[float, Field(ge=0, le=1e6)] = 0.0
    """Save and stop after this many hours; the same command resumes. 0 = no limit."""

    @property
    def recomputed_layers(self) -> int:
        """The k where every k-th decoder layer is recomputed; 0 = none. ``auto`` counts as all: the least memory."""
        named = {"all": 1, "auto": 1, "none": 0}
        return named[asked] if (asked := self.gradient_checkpointing) in named else int(asked)

    @model_validator(mode="after")
    def _floor_is_below_peak(self) -> TrainSection:
        if self.min_lr > self.lr:
            raise ValueError(f"min_lr={self.min_lr:g} is above lr={self.lr:g}: lower min_lr too")
        return self

    @model_validator(mode="after")
    def _one_length(self) -> TrainSection:
        if self.steps and self.epochs:
            raise ValueError(f"steps={self.steps} and epochs={self.epochs:g} are both set: set one of them to 0")
        return self

    @model_validator(mode="after")
    def _only_wsd_has_decay_steps(self) -> TrainSection:
        if self.schedule == "wsd" and not self.decay_steps:
            raise ValueError("schedule=wsd needs decay_steps: set it, a tenth of the steps is usual")
        if self.schedule != "wsd" and self.decay_steps:
            raise ValueError(f"decay_steps={self.decay_steps} needs schedule=wsd: set it, or decay_steps to 0")
        return self


class ParallelConfig(Section):
    """Pipeline and data parallelism."""

    pp: Positive = 1
    """Pipeline stages; data-parallel ranks = ranks / pp."""
    micro_batches: NonNegative = 0
    """Micro-batches per step on each data-parallel rank; 0 = one row per micro-batch."""
    schedule: Literal["1f1b", "gpipe", "interleaved"] = "1f1b"
    """Pipeline schedule (`mma schedule` draws it)."""
    virtual_stages: Positive = 1
    """Virtual stages per stage (interleaved schedule): divides the bubble by this number, sends more messages."""
    layers_per_stage: str = ""
    """Decoder layers of each stage, e.g. "9,12,11"; with virtual stages, list the first virtual stage of every stage,
    then the second of every stage, and so on. Empty = balance by cost."""
    gathered_fraction: Share = 1.0
    """Fraction of a stage's parameters kept gathered during a step. 1 gathers once per step; 0 has the memory of plain
    ZeRO-3. The rest is released after each use. Below 1 requires ZeRO stage 3 in the DeepSpeed file."""
    reduce_once: bool | None = None
    """Reduce-scatter gradients once per step instead of once per micro-batch; needs memory for one full fp32 gradient
    of the stage. None = chosen by the ZeRO stage of the DeepSpeed file: once for 1 and 3, per micro-batch for 2.
    Micro-batches always accumulate in fp32; ranks reduce in bf16, or in fp32 with "communication_data_type": "fp32"
    in the DeepSpeed file."""
    leaf_layers: bool | None = None
    """Gather each decoder layer and vision block as a whole: fewer, larger collectives, one more layer in memory.
    None = on GPUs."""
    timeout_s: Annotated[int, Field(gt=0, le=10_000_000)] = 1800
    """End the job after this many seconds without progress, and name the rank that caused it.
    Must exceed the longest step: on GPUs progress may show only at the end of a step."""

    allow_oversubscription: bool = False
    """Start even if the estimate exceeds the memory of the GPU or the host."""

    @model_validator(mode="after")
    def _virtual_stages_are_interleaved(self) -> ParallelConfig:
        interleaved = self.schedule == "interleaved"
        if interleaved and self.pp == 1:
            raise ValueError("schedule=interleaved needs several stages: set pp to 2 or more, or schedule to 1f1b")
        if interleaved and self.virtual_stages == 1:
            raise ValueError("schedule=interleaved needs virtual stages: set virtual_stages to 2 or more")
        if self.virtual_stages > 1 and not interleaved:
            raise ValueError(
                f"virtual_stages={self.virtual_stages} needs schedule=interleaved: set it, or virtual_stages to 1"
            )
        return self


class CheckpointConfig(Section):
    """Saving and retention of checkpoints."""

    every_steps: NonNegative = 500
    """Save every N steps; 0 = only at the end or on stop."""
    keep_last: Positive = 2
    """Number of newest checkpoints to keep."""
    keep_every: NonNegative = 0
    """Keep the checkpoint of every N-th step forever; a multiple of every_steps. 0 = none."""
    best: str = ""
    """Also save after the evaluation with the best value of this metric so far, and keep that checkpoint. A metric is
    named as in metrics.jsonl: val/loss (lower is better) or val/teacher_forced_accuracy (higher is better) of the
    held-out folder `val`, or that of one corpus or family, such as val/loss/vqav2. Empty = none."""
    asynchronous: bool = True
    """Write in the background from a copy in host memory (12 bytes per trained parameter of the rank)."""

    @model_validator(mode="after")
    def _kept_are_saved(self) -> CheckpointConfig:
        if self.keep_every and (not self.every_steps or self.keep_every % self.every_steps):
            raise ValueError(
                f"keep_every={self.keep_every} is not a multiple of every_steps={self.every_steps}: change one of them"
            )
        return self


class EvalConfig(Section):
    """Evaluation during training, on held-out rows. It does not change the run: weights, losses and order stay the same
    to the bit."""

    packs: Folders = Field(default_factory=dict)
    """Held-out pack folders by name; a single folder is called val. On the command line: val=DIR,other=DIR."""
    every_steps: NonNegative = 0
    """Evaluate after every N steps and after the last one; 0 = never."""
    samples: NonNegative = 0
    """Evaluate the first rows of each folder that hold this many samples; 0 = all rows."""

    @model_validator(mode="after")
    def _both_or_none(self) -> EvalConfig:
        if self.every_steps and not self.packs:
            raise ValueError(f"every_steps={self.every_steps} needs packs: name a held-out pack folder")
        return self


class LogConfig(Section):
    """Logging and metrics."""

    every_steps: Positive = 10
    """Print a console line every N steps; metrics.jsonl records every step."""
    tensorboard: bool = True
    """Write TensorBoard events to the run folder through DeepSpeed's monitor."""
    wandb: str = ""
    """Weights & Biases project that gets the same events, through DeepSpeed's monitor; empty = none. Needs the package
    wandb; WANDB_MODE=offline and its other variables apply."""
    spike_mads: Annotated[float, Field(ge=0, le=1e9)] = 10.0
    """Report a loss this many median absolute deviations above the median of the last 64 steps; 0 = never."""
    traffic: bool = False
    """Add to metrics.jsonl the bytes rank 0 gathers, reduces and sends per step, and the measured pipeline bubble."""
    trace_step: NonNegative = 0
    """Trace this step on every rank into trace-step-N.json (open it in ui.perfetto.dev); 0 = none."""


class RunConfig(Section):
    """One training run: a recipe, such as PT or SFT, on one pack folder."""

    run_dir: str = ""
    """Run folder; starting again with the same folder resumes. Empty = runs/RECIPE."""
    init_from: str = ""
    """Initialize the weights (not the optimizer) from another run folder, checkpoint or export."""
    model: ModelConfig = ModelConfig()
    """The model."""
    mask: MaskConfig = MaskConfig()
    """The attention mask."""
    data: DataConfig = DataConfig()
    """The packed rows."""
    train: TrainSection = TrainSection()
    """Optimisation."""
    parallel: ParallelConfig = ParallelConfig()
    """Parallelism."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """Checkpoints."""
    eval: EvalConfig = EvalConfig()
    """Evaluation during training."""
    log: LogConfig = LogConfig()
    """Logging."""

    @model_validator(mode="after")
    def _best_is_evaluated(self) -> RunConfig:
        best, held_out = self.checkpoint.best, self.eval
        if best and not held_out.every_steps:
            raise ValueError(f"checkpoint.best={best} needs evaluations: set eval.every_steps and eval.packs")
        if best and best.split("/")[0] not in held_out.packs:
            known = ", ".join(held_out.packs)
            raise ValueError(f"checkpoint.best={best} names no folder of eval.packs ({known}): write {known}/loss")
        return self


def known_keys(kind: type[Section] = RunConfig, prefix: str = "") -> dict[str, type[Section] | None]:
    """Return every dotted key of a config class; sections map to their class, values to None."""
    keys: dict[str, type[Section] | None] = {}
    for name, info in kind.model_fields.items():
        section = (
            info.annotation if isinstance(info.annotation, type) and issubclass(info.annotation, Section) else None
        )
        keys[prefix + name] = section
        if section is not None:
            keys |= known_keys(section, f"{prefix}{name}.")
    return keys


def build_config(raw: dict[str, Any], origin: str) -> RunConfig:
    """Validate a nested dictionary. Raises ConfigError with the origin, the key and the fix."""
    try:
        return RunConfig.model_validate(raw)
    except ValidationError as error:
        raise ConfigError(report(origin, problems(error, lambda place: _names_in(place[:-1])))) from None


def _names_in(section: Place) -> list[str]:
    """Return the keys of a section of the run configuration."""
    prefix = "".join(f"{name}." for name in section)
    return [
        key.removeprefix(prefix) for key in known_keys() if key.startswith(prefix) and "." not in key[len(prefix) :]
    ]
