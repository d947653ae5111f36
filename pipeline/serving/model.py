"""A trained model loaded from an export: it answers questions and scores conversations under the training mask."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from torch import nn
from transformers import PreTrainedModel

from data_prep.common.errors import UserError
from data_prep.example import ImageRef, Turn
from data_prep.images.store import BadImage, decode_rgb
from data_prep.text.template import Template
from data_prep.text.tokenizer import Tokenizer
from pipeline.attention.gate import PairGate, gate_of
from pipeline.masks import Policy, get_policy
from pipeline.model.build import build_stage
from pipeline.model.export_files import Coverage
from pipeline.model.families.llm import DecoderParts
from pipeline.model.inputs import StageInputs
from pipeline.model.spec import ModelSpec
from pipeline.model.stage import Stage
from pipeline.model.weights import WeightSource
from pipeline.serving.export import verify_export
from pipeline.serving.export_config import ExportConfig
from pipeline.serving.flow import AdaptiveFlow, dropped, profiling
from pipeline.serving.prefill import GatedCache, PromptBatch, assign_masks, generating_class
from pipeline.serving.prompt import Prompt, stage_inputs


class MultimodalModel:
    """An exported model with its tokenizer, template and mask policy; made by :func:`load_model`."""

    def __init__(
        self, export_config: ExportConfig, stage: Stage, tokenizer: Tokenizer, coverage: Coverage | None = None
    ) -> None:
        """Wrap the parts; ``stage`` is the whole model as one stage, ``coverage`` what was checked of its export."""
        self.export_config, self.tokenizer, self.coverage = export_config, tokenizer, coverage
        self.spec: ModelSpec = stage.spec
        self.template: Template = export_config.template
        self.policy: Policy = get_policy(export_config.policy, allow_leak=True, grid=self.spec.mask_grid)
        self._stage = stage.eval()
        self._llm = _generator(stage)
        assign_masks(self._llm.model.layers, self.policy)
        found = (gate_of(layer.self_attn) for layer in self._llm.model.layers)
        self.gates: tuple[PairGate, ...] = tuple(gate for gate in found if gate is not None)
        """The gate of each layer; empty for a model without gates."""

    @property
    def stage(self) -> Stage:
        """The whole model as one stage."""
        return self._stage

    @property
    def llm(self) -> PreTrainedModel:
        """The family's own causal language model around the stage's modules, with a head; for ``generate``."""
        return self._llm

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return next(self._stage.parameters()).device

    def prompt(self, turns: Sequence[Turn]) -> Prompt:
        """Encode a conversation as in training, up to and including the assistant's header.

        Earlier assistant turns are kept as history. Raises UserError for an image that cannot be read.
        """
        asked = turns[:-1] if turns and turns[-1].role == "assistant" else turns
        images = [read_image(part) for turn in asked for part in turn.parts if not isinstance(part, str)]
        tokens = [extent.tokens for extent in self.spec.extents(image.size for image in images)]
        return Prompt(self.tokenizer.encode(self.template.prompt_pieces(turns), tokens), tuple(images))

    @torch.inference_mode()
    def logits(self, prompt: Prompt) -> torch.Tensor:
        """Return the logits at every token, [T, V], at least fp32: one full forward pass under the training mask."""
        inputs = self.inputs(prompt)
        hidden = self._stage.decode(self._stage.embed(inputs), inputs)
        return self._stage.lm_head.logits(self._stage.model.norm(hidden))[0]

    @torch.inference_mode()
    def generate_ids(
        self, prompts: Sequence[Prompt], *, max_new_tokens: int = 64, flow: AdaptiveFlow | None = None, **options: Any
    ) -> Any:
        """Continue a batch of prompts with transformers' ``generate``; greedy unless ``options`` say otherwise.

        Args:
            prompts: of any lengths; they are left-padded.
            max_new_tokens: limit per prompt.
            flow: cut what text reads of the images (`pipeline.serving.flow`), chosen for each prompt by itself, all its
                turns and images together; None: read everything.
            options: of transformers' ``generate``: ``num_beams``, ``do_sample``, ``return_dict_in_generate``, ...

        Returns:
            The result of ``generate``: int64[B, new tokens] without the prompts.

        Raises:
            UserError: a prompt exceeds the model's positions or its sliding window, or a model with gates is asked for
                another kind of cache.
        """
        if self.gates and "cache_implementation" in options:
            raise UserError("a model with gates decodes with its own cache: leave out cache_implementation")
        for prompt in prompts:
            self.check_length(len(prompt.encoded), max_new_tokens)
        embeds = [(prompt.sidecars, self._stage.embed(self.inputs(prompt))[0]) for prompt in prompts]
        batch = PromptBatch.of(self.policy, embeds)
        if flow is not None:
            batch = batch.without_reads(self.background(batch, flow))
        options = {"do_sample": False, "eos_token_id": list(self.export_config.eos_ids), **options}
        return self._continue(batch, max_new_tokens, options)

    @torch.inference_mode()
    def background(self, batch: PromptBatch, flow: AdaptiveFlow) -> torch.Tensor:
        """Return the image tokens that adaptive flow lets text ignore, bool[B, P]; costs a prefill and one step."""
        text = batch.attention_mask.bool() & ~batch.visual
        with profiling(text, flow.heads) as profile:
            self._continue(batch, 2, {"do_sample": False, "eos_token_id": None})
        ignored = torch.zeros_like(batch.visual)
        for row, visual in enumerate(batch.visual):
            if visual.any():
                ignored[row, visual] = dropped(profile.of_images(row, visual), flow.rounding)
        return ignored

    def _continue(self, batch: PromptBatch, max_new_tokens: int, options: dict[str, Any]) -> Any:
        """Run transformers' ``generate`` on a batch."""
        if self.gates:
            cache = GatedCache(config=self._llm.config)
            cache.gates, cache.visual = self.gates, batch.visual
            options = {**options, "past_key_values": cache}
        return self._llm.generate(
            inputs_embeds=batch.embeds,
            attention_mask=batch.attention_mask,
            position_ids=batch.position_ids,
            prefill_mask=batch.prefill_mask,
            max_new_tokens=max_new_tokens,
            pad_token_id=self.export_config.pad_id,
            **options,
        )

    def generate(
        self, prompts: Sequence[Prompt], *, max_new_tokens: int = 64, flow: AdaptiveFlow | None = None, **options: Any
    ) -> list[str]:
        """Return the answers as text; arguments and errors as in :meth:`generate_ids`."""
        if not prompts:
            return []
        rows = self.generate_ids(prompts, max_new_tokens=max_new_tokens, flow=flow, **options)
        return [self.answer_text(row.tolist()) for row in rows]

    def answer_text(self, ids: Sequence[int]) -> str:
        """Decode generated ids up to the first end token."""
        ends = [place for place, index in enumerate(ids) if index in self.export_config.eos_ids]
        return self.tokenizer.decode(ids[: ends[0]] if ends else ids).strip()

    def inputs(self, prompt: Prompt, device: torch.device | str | None = None) -> StageInputs:
        """Return a prompt as inputs of the stage, on the model's device or another one."""
        device = self.device if device is None else device
        return stage_inputs(self.spec, self.policy, prompt, device=device)

    def check_length(self, tokens: int, new: int) -> None:
        """Raise UserError when a prompt is empty, or with its answer exceeds the model's positions or its window."""
        if not tokens:
            raise UserError("the conversation is empty: give a question or an image")
        limit, window = self.spec.longest_segment, self.spec.llm_family.sliding_window(self.spec.llm)
        if limit is not None and tokens + new > limit:
            raise UserError(
                f"the conversation takes {tokens} tokens and the answer up to {new}, more than the model's {limit}: "
                "drop early turns or images, or ask for fewer new tokens"
            )
        if window is not None and tokens > window:
            raise UserError(
                f"the conversation takes {tokens} tokens, more than the sliding window of {window}, within which the "
                "mask equals training's: drop early turns or images"
            )


def load_model(
    directory: Path | str,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    verify: Literal["quick", "full"] = "quick",
) -> MultimodalModel:
    """Load an export folder.

    Args:
        directory: made by ``mma export``.
        device: where the model runs.
        dtype: dtype of the weights; default: the dtype they were exported in.
        verify: how its files are checked first; see :func:`pipeline.serving.export.verify_export`.

    Returns:
        The model, whose ``coverage`` tells how much of the export was checked.

    Raises:
        UserError: the folder is not an export, a file is damaged, or with ``full`` a weight is not finite.
    """
    coverage = verify_export(directory, full=verify == "full")
    export_config = ExportConfig.load(directory)
    spec = export_config.spec
    stage = build_stage(
        spec,
        layers=range(spec.layers),
        first=True,
        last=True,
        dtype=dtype or export_config.torch_dtype,
        device=device,
        seed=0,
        source=WeightSource.open_export(spec, directory),
    )
    tokenizer = Tokenizer.load(Path(directory) / export_config.tokenizer)
    return MultimodalModel(export_config, stage.requires_grad_(False), tokenizer, coverage)


def read_image(image: ImageRef) -> Image.Image:
    """Read and decode an image as RGB. Raises UserError naming the image when it cannot be read or decoded."""
    try:
        return decode_image(image.name, image.read())
    except OSError as error:
        raise UserError(f"image {image.name} cannot be read: {error}") from error


def decode_image(name: str, data: bytes) -> Image.Image:
    """Decode an image's bytes as RGB. Raises UserError naming the image when it cannot be decoded."""
    try:
        return decode_rgb(data)
    except BadImage as error:
        raise UserError(f"image {name} cannot be used: {error}") from error


def _generator(stage: Stage) -> PreTrainedModel:
    """Return the family's own language model, extended by mask prefill, around the stage's modules."""
    family = stage.spec.llm_family
    with torch.device("meta"):
        llm = generating_class(family.model_class)(stage.spec.llm)
    rotary = stage.rotary.to(stage.lm_head.weight.device)
    layers = nn.ModuleList(stage.model.layers.values())
    family.assemble(llm, DecoderParts(stage.model.embed_tokens, layers, stage.model.norm, rotary, stage.lm_head))
    return llm.eval()
