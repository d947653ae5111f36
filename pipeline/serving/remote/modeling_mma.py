"""An exported MMA model for ``AutoModelForImageTextToText``: exact prefill inside ``generate``, causal decoding.

B rows, T tokens, D hidden width. Image tokens of a prompt see later text as in training; a mask that causal attention
cannot express is built for the prefill pass from the token ids.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoModel, PreTrainedModel
from transformers.generation import GenerationMixin
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from pipeline.masks.policies import Policy, dense_mask, get_policy
from pipeline.masks.sidecars import Sidecars, position_ids
from pipeline.model.connectors.base import NormedConnector
from pipeline.serving.remote.configuration_mma import MmaConfig
from pipeline.serving.remote.parts import ConnectorModule, DecoderFamily, TowerFamily

MASKED_ATTENTION = ("sdpa", "eager", "flex_attention")
"""Attention implementations that take an arbitrary mask."""


def generated_tokens(ids: list[int], start: list[int], end: list[int]) -> list[int]:
    """Mark what the model writes in a conversation: everything between an assistant header and the end of its turn.

    Args:
        ids: one row.
        start: ids of the header, such as those of ``<|im_start|>assistant``; the next token is generated.
        end: ids that end a turn; they are generated, too.

    Returns:
        0 or 1 for each token.
    """
    marks, inside = [], False
    for place, token in enumerate(ids):
        marks.append(int(inside))
        opens = ids[max(0, place + 1 - len(start)) : place + 1] == start
        inside = token not in end if inside else opens
    return marks


def policy_of(config: MmaConfig) -> Policy:
    """Return the mask policy that the model was trained with."""
    grid = config.mma["mask_grid"]
    return get_policy(config.mma["policy"], allow_leak=True, grid=None if grid is None else (grid[0], grid[1]))


class MmaPreTrainedModel(PreTrainedModel):  # type: ignore[misc]
    """What transformers needs to know about the model."""

    config_class = MmaConfig
    base_model_prefix = "model"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _skip_keys_device_placement = ("past_key_values",)
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_flash_attn = True
    _supports_attention_backend = True


class MmaModel(MmaPreTrainedModel):
    """Vision tower, connector and language model, without the head."""

    def __init__(self, config: MmaConfig) -> None:
        """Lay out the model."""
        super().__init__(config)
        text, vision = config.text_config, config.vision_config
        if getattr(text, "attn_logit_softcapping", None) and text._attn_implementation == "sdpa":
            text._attn_implementation = "eager"  # sdpa would leave out the soft cap without a word
        self.policy = policy_of(config)
        self.image_tokens = int(config.mma["spec"]["image_tokens"])
        self._tower, self._decoder = TowerFamily(vision.model_type), DecoderFamily(text.model_type)
        self._masks: dict[str, Any] = {}
        self.vision_tower = self._tower.build(vision)
        connector = ConnectorModule(**config.mma["connector_arguments"])
        norm = config.mma.get("connector_norm", False)
        self.connector = NormedConnector(connector, text.hidden_size) if norm else connector
        self.language_model = AutoModel.from_config(text)
        if self.policy.layers:  # another mask in some layers: each takes its own
            for index, layer in enumerate(self.language_model.layers):
                layer.register_forward_pre_hook(self._mask_of(self.policy.at(index).name), with_kwargs=True)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """Return the token embedding."""
        embedding: nn.Module = self.language_model.get_input_embeddings()
        return embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the token embedding."""
        self.language_model.set_input_embeddings(value)

    def get_image_features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Return the image tokens [n, N, D] of pixels [n, 3, S, S]."""
        pixels = pixel_values.to(self.vision_tower.dtype)
        tokens: torch.Tensor = self.connector(
            self._tower.features(
                self.vision_tower, self.config.vision_config, pixels, self.config.mma.get("tower_layers", ())
            )
        )
        return tokens

    def sidecars(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        generated: torch.Tensor | None = None,
    ) -> list[Sidecars]:
        """Return what the mask depends on, per row, on the CPU.

        Args:
            input_ids: int64[B, T].
            attention_mask: int[B, T], 0 = padding.
            generated: int[B, T], 1 where the model has written the token; default: by the chat template's assistant
                headers, where it has them, else nothing.

        Raises:
            ValueError: an image does not have its number of tokens.
        """
        ids = input_ids.cpu()
        segment = torch.ones_like(ids) if attention_mask is None else attention_mask.cpu().long()
        image = (ids == self.config.image_token_id) & (segment > 0)
        if generated is None:
            spans = self.config.mma.get("assistant_spans")
            marks = [generated_tokens(row, *spans) for row in ids.tolist()] if spans else torch.zeros_like(ids).tolist()
            generated = torch.tensor(marks)
        written = (generated.cpu().long() > 0) & (segment > 0) & ~image
        rows = zip(segment, image, written.long(), strict=True)
        return [Sidecars(seg, img.long(), self._instances(img), own) for seg, img, own in rows]

    def _instances(self, image: torch.Tensor) -> torch.Tensor:
        count = int(image.sum())
        place = torch.where(image, (image.long().cumsum(0) - 1) // self.image_tokens, -1)
        starts = image.nonzero().squeeze(1)[:: self.image_tokens]
        whole = all(bool((place[at : at + self.image_tokens] == number).all()) for number, at in enumerate(starts))
        if count % self.image_tokens or not whole:
            raise ValueError(
                f"a row holds {count} image tokens, but an image takes {self.image_tokens} in a run: use the processor"
            )
        return place

    def positions(self, rows: list[Sidecars]) -> torch.Tensor:
        """Return position ids int64[B, T]; 0 in padding, by ring where the policy has a grid."""
        return torch.stack([position_ids(row, self.policy.grid) for row in rows])

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: Any = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        generated: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Run the model.

        Args:
            input_ids: int64[B, T]; prompts are given whole, later calls bring one token per row.
            pixel_values: float[n, 3, S, S], the images of all rows in reading order.
            attention_mask: int[B, all tokens so far], 0 = padding.
            position_ids: int64[B, T]; default: as in training.
            past_key_values: cache.
            generated: see :meth:`sidecars`.
            kwargs: of the language model.

        Raises:
            ValueError: no ids, a prompt split over several calls, images that do not fit their tokens, a prompt longer
                than the model supports, or an attention implementation that cannot express the mask.
        """
        if input_ids is None:
            raise ValueError("call the model with input_ids: the mask is built from them")
        embeds = self._embed(input_ids, pixel_values)
        seen = 0 if past_key_values is None else int(past_key_values.get_seq_length())
        if not seen:
            real = attention_mask if isinstance(attention_mask, torch.Tensor) and attention_mask.dim() == 2 else None
            rows = self.sidecars(input_ids, real, generated)
            if position_ids is None or self.policy.grid is not None:
                position_ids = self.positions(rows).to(input_ids.device)
            if not self._is_causal:
                attention_mask = self._prefill_mask(rows, embeds, past_key_values)
        elif input_ids.shape[1] > 1 and not self._is_causal:
            new = torch.zeros_like(input_ids) if generated is None else generated[:, -input_ids.shape[1] :]
            if not bool((new == 1).all()):
                raise ValueError(
                    "a prompt must be prefilled in one call, because its images see the text after them: no "
                    "prefill_chunk_size, no second prompt on an old cache, no assistant model"
                )
        try:
            output: BaseModelOutputWithPast = self.language_model(
                inputs_embeds=embeds,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                **kwargs,
            )
        finally:
            self._masks = {}
        return output

    def _mask_of(self, policy: str) -> Callable[..., Any]:
        """Return a hook that gives a decoder layer the prefill mask of its policy."""

        def replaced(layer: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
            return (args, {**kwargs, "attention_mask": self._masks[policy]}) if self._masks else None

        return replaced

    @property
    def _is_causal(self) -> bool:
        return self.policy.unlock is None and self.policy.grid is None and not self.policy.layers

    def _embed(self, input_ids: torch.Tensor, pixel_values: torch.Tensor | None) -> torch.Tensor:
        embeds: torch.Tensor = self.get_input_embeddings()(input_ids)
        image = input_ids == self.config.image_token_id
        images = 0 if pixel_values is None else len(pixel_values)
        if int(image.sum()) != images * self.image_tokens:
            raise ValueError(
                f"{images} images need {images * self.image_tokens} image tokens, but the ids hold {int(image.sum())}: "
                "use the processor"
            )
        if pixel_values is None or not images:
            return embeds
        tokens = self.get_image_features(pixel_values.to(embeds.device)).to(embeds.dtype)
        return embeds.masked_scatter(image[..., None], tokens.flatten(0, 1))

    def _prefill_mask(self, rows: list[Sidecars], embeds: torch.Tensor, cache: Any) -> Any:
        """Return the policy's mask in the form that the attention implementation takes, for every kind of layer."""
        text, tokens = self.config.text_config, embeds.shape[1]
        name = text._attn_implementation
        if name not in MASKED_ATTENTION:
            raise ValueError(
                f"attn_implementation={name!r} cannot express the mask of policy {self.policy.name!r} and would run "
                f"causal: load the model with one of {', '.join(MASKED_ATTENTION)}"
            )
        if name == "sdpa" and getattr(text, "attn_logit_softcapping", None):
            raise ValueError("sdpa leaves out this model's attn_logit_softcapping: load it with eager")
        limits = (("positions", self._decoder.longest_segment(text)), ("window", self._decoder.sliding_window(text)))
        for what, limit in limits:
            if limit is not None and max(int((row.segment > 0).sum()) for row in rows) > limit:
                raise ValueError(f"a prompt is longer than the model's {what} of {limit}: drop early turns or images")
        keys = tokens if cache is None else cache.get_mask_sizes(tokens, 0)[0]

        def built(policy: Policy) -> Any:
            allowed = torch.stack([dense_mask(policy, row) for row in rows])
            allowed = F.pad(allowed, (0, keys - tokens)).to(embeds.device)  # a static cache has its full length at once
            return ALL_MASK_ATTENTION_FUNCTIONS[name](
                batch_size=len(rows), q_length=tokens, kv_length=keys, q_offset=0, kv_offset=0, attention_mask=None,
                mask_function=lambda batch, head, query, key: allowed[batch, query, key],
                allow_is_causal_skip=False, dtype=embeds.dtype, device=embeds.device,
            )  # fmt: skip

        if self.policy.layers:
            self._masks = {part.name: built(part) for part in self.policy.parts}
        mask = self._masks.get(self.policy.base.name) if self._masks else built(self.policy)
        kinds = getattr(text, "layer_types", None)
        return dict.fromkeys(kinds, mask) if kinds else mask


class MmaForConditionalGeneration(MmaPreTrainedModel, GenerationMixin):  # type: ignore[misc]
    """The model with its head: answers questions about images."""

    _tied_weights_keys: ClassVar[dict[str, str]] = {"lm_head.weight": "model.language_model.embed_tokens.weight"}

    def __init__(self, config: MmaConfig) -> None:
        """Lay out the model."""
        super().__init__(config)
        text = config.text_config
        self.model = MmaModel(config)
        self.lm_head = nn.Linear(text.hidden_size, text.vocab_size, bias=False)
        family = DecoderFamily(text.model_type)
        self.logits_scale, self.logits_softcap = family.logit_scale(text), family.logit_softcap(text)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """Return the token embedding."""
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the token embedding."""
        self.model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        """Return the head."""
        return self.lm_head

    def get_image_features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Return the image tokens [n, N, D] of pixels [n, 3, S, S]."""
        return self.model.get_image_features(pixel_values)

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: Any = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        generated: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Return the logits [B, T, V], at least fp32, and the loss where labels are given.

        Args:
            input_ids: int64[B, T].
            pixel_values: float[n, 3, S, S].
            attention_mask: int[B, all tokens so far].
            position_ids: int64[B, T].
            past_key_values: cache.
            generated: int[B, T]; see :meth:`MmaModel.sidecars`. Default with labels: the labelled tokens.
            labels: int64[B, T], -100 = not predicted.
            logits_to_keep: compute the logits of the last tokens only; 0 = all.
            kwargs: of the language model.

        Raises:
            ValueError: as :meth:`MmaModel.forward`.
        """
        if generated is None and labels is not None:
            generated = (labels != -100).long()
        outputs = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            generated=generated,
            **kwargs,
        )
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        raw = self.lm_head(outputs.last_hidden_state[:, keep])
        logits = raw.to(torch.promote_types(raw.dtype, torch.float32)) * self.logits_scale
        if self.logits_softcap is not None:
            logits = torch.tanh(logits / self.logits_softcap) * self.logits_softcap
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=outputs.past_key_values)

    @torch.no_grad()
    def generate(self, inputs: torch.Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        """Generate as transformers does; prompts are masked as in training.

        Args:
            inputs: int64[B, T], or the keyword ``input_ids``; pad on the left and give an ``attention_mask``.
            args: of ``GenerationMixin.generate``.
            kwargs: of ``GenerationMixin.generate``, and of :meth:`forward`.

        Raises:
            ValueError: no ids, a cache from before, or as :meth:`MmaModel.forward`.
        """
        ids = kwargs.pop("input_ids", None) if inputs is None else inputs
        if ids is None:
            raise ValueError("generate needs input_ids: the mask is built from them")
        cache = kwargs.get("past_key_values")
        if cache is not None and int(cache.get_seq_length()):
            raise ValueError("generate needs an empty cache: give the whole conversation as input_ids")
        real = kwargs.get("attention_mask")
        if real is None:
            real = (ids != self.generation_config.pad_token_id).long()
        rows = self.model.sidecars(ids, real, kwargs.get("generated"))
        kwargs["attention_mask"] = real
        kwargs["generated"] = torch.stack([row.generated for row in rows]).to(ids.device)
        kwargs["position_ids"] = self.model.positions(rows).to(ids.device)
        return super().generate(ids, *args, **kwargs)

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.Tensor,
        *args: Any,
        attention_mask: torch.Tensor | None = None,
        generated: torch.Tensor | None = None,
        is_first_iteration: bool = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Give prompts their 2-D mask and the marks of generated tokens; leave decoding to transformers."""
        inputs: dict[str, Any] = super().prepare_inputs_for_generation(
            input_ids, *args, attention_mask=attention_mask, is_first_iteration=is_first_iteration, **kwargs
        )
        if generated is not None and (is_first_iteration or kwargs.get("use_cache") is False):
            inputs["attention_mask"] = attention_mask
            inputs["generated"] = F.pad(generated, (0, input_ids.shape[1] - generated.shape[1]), value=1)
        return inputs

    def _expand_inputs_for_generation(
        self, expand_size: int = 1, input_ids: torch.Tensor | None = None, **kwargs: Any
    ) -> tuple[torch.Tensor, dict[str, Any]]:
        """Repeat rows for beams; the images of a row stay together."""
        pixels = kwargs.pop("pixel_values", None)
        if pixels is not None and input_ids is not None and expand_size > 1:
            counts = (input_ids == self.config.image_token_id).sum(1) // self.model.image_tokens
            rows = torch.split(pixels, counts.tolist())
            pixels = torch.cat([row for row in rows for _ in range(expand_size)])
        found: tuple[torch.Tensor, dict[str, Any]] = super()._expand_inputs_for_generation(
            expand_size=expand_size, input_ids=input_ids, **kwargs
        )
        return found[0], {**found[1], **({} if pixels is None else {"pixel_values": pixels})}


__all__ = ["MmaForConditionalGeneration", "MmaModel", "MmaPreTrainedModel"]
