"""The run configuration: one typed, frozen, strict tree, read from a recipe and overridden by flags.

A recipe is a YAML file of the same shape as `RunConfig`; ``extends: other`` starts from another recipe. Flags are the
dotted names of the same tree (``--train.lr 1e-4``); see `pipeline.config.flags`. Unknown keys and flags are errors
that name the closest known one.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from data_prep.common.errors import UserError
from data_prep.common.validation import Place, problems, report

Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]


class ConfigError(UserError):
    """A key of the recipe, a flag, or a combination of them is wrong."""


class Section(BaseModel):
    """A frozen group of keys; the text under each key is its help."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, protected_namespaces=())


class LlmConfig(Section):
    """The decoder-only language model."""

    source: str = ""
    """Local Hugging Face folder (config.json, *.safetensors); empty = build `config` from scratch."""
    config: dict[str, Any] = Field(default_factory=dict)
    """Hugging Face config with `model_type`, used when `source` is empty; else laid over the folder's config."""


class VisionConfig(Section):
    """The vision tower."""

    source: str = ""
    """Local Hugging Face folder of a SigLIP or CLIP model; empty = build `config` from scratch."""
    config: dict[str, Any] = Field(default_factory=dict)
    """Hugging Face vision config with `model_type`, as for the language model."""
    frozen: bool = True
    """Keep the tower's weights fixed, as the paper does."""


class ConnectorConfig(Section):
    """What turns patch features into image tokens of the language model's width."""

    kind: Literal["perceiver", "mlp"] = "perceiver"
    """perceiver: `latents` tokens an image (the paper's); mlp: one token a patch (LLaVA's)."""
    latents: Positive = 144
    """Image tokens of the perceiver resampler; must equal the packs' image_tokens."""
    depth: Positive = 6
    """Perceiver blocks."""
    heads: Positive = 8
    """Perceiver attention heads."""
    head_dim: Positive = 64
    """Size of a perceiver head."""
    ff_mult: Positive = 4
    """Width of the perceiver's feed-forward in multiples of the feature width."""


class ModelConfig(Section):
    """The multimodal model: vision tower -> connector -> language model."""

    llm: LlmConfig = LlmConfig()
    """Language model."""
    vision: VisionConfig = VisionConfig()
    """Vision tower."""
    connector: ConnectorConfig = ConnectorConfig()
    """Connector."""


class MaskConfig(Section):
    """Which tokens may see which (see `mma mask`)."""

    policy: str = "mma"
    """Name of a mask policy: causal, mma, ..."""
    allow_leak: bool = False
    """Permit the ablation policies that let a supervised token see itself."""
    prove_rows: NonNegative = 4
    """Rows of the packs on which the mask is proved leak-free before training."""


class DataConfig(Section):
    """Where the packed rows are and how they are read."""

    packs: str = ""
    """Pack folder made by mma-prep."""
    demo: str = ""
    """Folder of the built-in demo corpora: prepared first when `packs` lies in it and is missing."""
    verify: bool = False
    """Hash packs and image store before training, each rank a share of the files (else only manifests are read)."""
    decode_threads: NonNegative = 1
    """Threads that read rows and decode images, each a step of its own ahead; 0 = between the steps."""
    prefetch_steps: NonNegative = 2
    """Steps held ready ahead of the one that trains."""


class TrainSection(Section):
    """Optimisation."""

    global_batch_size: Positive = 8
    """Packed rows of one optimizer step, over all ranks and micro-batches."""
    steps: NonNegative = 0
    """Optimizer steps of the run; 0 = every pack once."""
    lr: Annotated[float, Field(gt=0)] = 2e-5
    """Peak learning rate."""
    min_lr: Annotated[float, Field(ge=0)] = 1e-6
    """Floor of the cosine decay."""
    warmup_steps: NonNegative = 150
    """Linear warm-up from 0."""
    weight_decay: Annotated[float, Field(ge=0)] = 1e-4
    """AdamW weight decay of matrices; vectors (norms, biases) have none."""
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """AdamW beta1."""
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999
    """AdamW beta2."""
    eps: Annotated[float, Field(gt=0)] = 1e-8
    """AdamW epsilon."""
    clip_norm: Annotated[float, Field(ge=0)] = 1.0
    """Global gradient-norm clip over all stages and ranks; 0 = none."""
    dtype: Literal["auto", "fp32", "bf16"] = "auto"
    """Compute type: auto = bf16 on GPUs, fp32 on CPUs."""
    gradient_checkpointing: bool = True
    """Recompute each decoder layer in the backward pass."""
    seed: int = 0
    """Seed of weights built from scratch; nothing in a step is random."""
    max_skipped_steps: Positive = 10
    """Consecutive steps with a non-finite gradient after which the run fails."""
    max_hours: Annotated[float, Field(ge=0)] = 0.0
    """Stop (saved, resumable) after this long; 0 = no limit."""

    @model_validator(mode="after")
    def _floor_is_below_peak(self) -> TrainSection:
        if self.min_lr > self.lr:
            raise ValueError(f"min_lr={self.min_lr:g} is above lr={self.lr:g}: lower it too")
        return self


class ParallelConfig(Section):
    """How ranks share the model and the batch."""

    pp: Positive = 1
    """Pipeline stages; data-parallel ranks = ranks / pp."""
    micro_batches: NonNegative = 0
    """Micro-batches of a step on each data-parallel rank; 0 = one pack each."""
    schedule: Literal["1f1b", "gpipe", "interleaved"] = "1f1b"
    """Order of forwards and backwards of a step (see `mma schedule`)."""
    virtual_stages: Positive = 1
    """Pieces a stage's layers are cut into, with the interleaved schedule: so many times less bubble, more messages."""
    layers_per_stage: str = ""
    """Decoder layers of each stage by hand, e.g. "9,12,11", with chunks of all first ones, then all second ones;
    empty = by cost."""
    gathered_fraction: Share = 1.0
    """Share of a stage's parameters kept gathered within a step: 1 gathers once a step, 0 is true ZeRO-3 memory.
    Below 1 needs ZeRO stage 3 in the DeepSpeed file; the rest is released after each use."""
    reduce_once: bool | None = None
    """Reduce-scatter gradients once a step instead of once a micro-batch (costs one whole fp32 gradient of the stage);
    None = as the ZeRO stage of the DeepSpeed file has it: 1 and 3 once, 2 each micro-batch. Micro-batches add up in
    fp32 either way; ranks reduce in bf16, or in the DeepSpeed file's "communication_data_type": "fp32"."""
    leaf_layers: bool = False
    """Gather each decoder layer and vision block as one: fewer, larger collectives, one whole layer more in memory."""
    timeout_s: Positive = 1800
    """Seconds without progress of any rank after which the job ends, naming the rank that is the cause.
    More than the longest step: on GPUs what is seen from outside may stand still until a step's end."""

    @model_validator(mode="after")
    def _chunks_are_interleaved(self) -> ParallelConfig:
        interleaved = self.schedule == "interleaved"
        if interleaved and self.pp == 1:
            raise ValueError("schedule=interleaved needs stages to go around: set pp to 2 or more, or schedule to 1f1b")
        if interleaved and self.virtual_stages == 1:
            raise ValueError("schedule=interleaved needs virtual stages: set virtual_stages to 2 or more")
        if self.virtual_stages > 1 and not interleaved:
            raise ValueError(
                f"virtual_stages={self.virtual_stages} needs schedule=interleaved: set it, or virtual_stages to 1"
            )
        return self


class CheckpointConfig(Section):
    """What is saved and kept."""

    every_steps: NonNegative = 500
    """Save every so many steps (and at the end, and on a stop); 0 = only then."""
    keep_last: Positive = 2
    """Newest checkpoints kept."""
    keep_every: NonNegative = 0
    """Keep those of every so many steps for good, a multiple of every_steps; 0 = none."""
    asynchronous: bool = True
    """Write while training goes on, from a copy in host memory: 12 bytes a trained parameter of the rank, kept."""

    @model_validator(mode="after")
    def _kept_are_saved(self) -> CheckpointConfig:
        if self.keep_every and (not self.every_steps or self.keep_every % self.every_steps):
            raise ValueError(
                f"keep_every={self.keep_every} is no multiple of every_steps={self.every_steps}: make it one"
            )
        return self


class LogConfig(Section):
    """What is reported."""

    every_steps: Positive = 10
    """Console line every so many steps; metrics.jsonl has every step."""
    tensorboard: bool = True
    """Write TensorBoard events through DeepSpeed's monitor into the run folder."""
    spike_mads: Annotated[float, Field(ge=0)] = 10.0
    """Report a step whose loss is so many median absolute deviations above the last 64 steps' median; 0 = none."""
    traffic: bool = False
    """Add to metrics.jsonl what rank 0 gathers, reduces and sends in a step, and the measured pipeline bubble."""
    trace_step: NonNegative = 0
    """Write what every rank does in this step to trace-step-N.json (open it in ui.perfetto.dev); 0 = none."""


class RunConfig(Section):
    """One training run: a stage (PT or SFT) of a recipe on a pack folder."""

    run_dir: str = ""
    """Folder of the run; the same folder resumes. Empty = runs/RECIPE."""
    init_from: str = ""
    """Start from the weights (only) of another run's folder, checkpoint or export."""
    model: ModelConfig = ModelConfig()
    """The model."""
    mask: MaskConfig = MaskConfig()
    """The attention mask."""
    data: DataConfig = DataConfig()
    """The packed rows."""
    train: TrainSection = TrainSection()
    """Optimisation."""
    parallel: ParallelConfig = ParallelConfig()
    """Ranks."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """Saving."""
    log: LogConfig = LogConfig()
    """Reporting."""


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
    """Validate a nested dictionary. Raises ConfigError naming the origin, the key and the fix."""
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
