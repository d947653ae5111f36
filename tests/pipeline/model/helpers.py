"""Tiny models of every family, random packed rows, and the slow way to compute their loss."""

from __future__ import annotations

import random
from typing import Any

import torch
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from pipeline.attention import build_plan
from pipeline.config.schema import ModelConfig
from pipeline.masks import Sidecars, dense_mask, position_ids
from pipeline.model.build import build_stage
from pipeline.model.inputs import IGNORE, StageInputs
from pipeline.model.spec import ModelSpec
from pipeline.model.stage import Stage

IMAGE_TOKENS, SIDE, VOCAB = 5, 16, 96
LLM = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "vocab_size": VOCAB,
    "initializer_range": 0.1,
}
FAMILY_KEYS: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": None},
    "qwen2": {},
    "qwen3": {"head_dim": 8},
    "phi3": {"sliding_window": None},
    "gemma": {"head_dim": 8},
    "gemma2": {"head_dim": 8, "sliding_window": 128, "attn_logit_softcapping": 20.0, "final_logit_softcapping": 10.0},
    "gemma3_text": {"head_dim": 8, "sliding_window": 128, "final_logit_softcapping": 15.0, "layer_types": None},
    "olmo2": {},
    "olmo3": {"sliding_window": 128, "layer_types": None},
    "gemma4_text": {
        **{"head_dim": 8, "global_head_dim": 16, "num_global_key_value_heads": 1, "attention_k_eq_v": True},
        **{"sliding_window": 128, "final_logit_softcapping": 15.0, "hidden_size_per_layer_input": 0},
        "layer_types": ["sliding_attention", "full_attention", "full_attention"],
    },
    "gemma4_unified_text": {
        **{"head_dim": 8, "global_head_dim": 16, "sliding_window": 128, "layer_types": None},
    },
    "granite": {"embedding_multiplier": 3.0, "logits_scaling": 2.0, "residual_multiplier": 0.5},
    "smollm3": {},
}
FAMILY_KEYS["gemma3_text"]["layer_types"] = ["sliding_attention", "full_attention", "sliding_attention"]
FAMILY_KEYS["olmo3"]["layer_types"] = ["sliding_attention", "full_attention", "sliding_attention"]
FAMILY_KEYS["gemma4_unified_text"]["layer_types"] = ["full_attention", "sliding_attention", "full_attention"]
VISION_KEYS: dict[str, dict[str, Any]] = {
    "siglip_vision_model": {"intermediate_size": 32},
    "clip_vision_model": {"intermediate_size": 32},
    "dinov2": {"mlp_ratio": 2, "use_swiglu_ffn": True},
    "dinov2_with_registers": {"mlp_ratio": 2, "num_register_tokens": 3},
}
TOWER = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": SIDE,
    "patch_size": 8,
}
VISION = {**TOWER, **VISION_KEYS["siglip_vision_model"]}
NAFLEX = {
    **{"model_type": "siglip2_vision_model", "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2},
    **{"num_attention_heads": 2, "patch_size": 8, "num_patches": 9},
}
"""Config of a tower for images of their own sizes."""


def model_config(family: str = "llama", *, vision: str = "siglip_vision_model", **llm: Any) -> ModelConfig:
    """Return the model section of a tiny recipe."""
    raw = {
        "llm": {"config": {"model_type": family, **LLM, **FAMILY_KEYS[family], **llm}},
        "vision": {"config": {"model_type": vision, **TOWER, **VISION_KEYS[vision]}},
        "connector": {"latents": IMAGE_TOKENS, "depth": 2, "heads": 2, "head_dim": 8},
    }
    return ModelConfig.model_validate(raw)


def tiny_spec(family: str = "llama", *, vision: str = "siglip_vision_model", **llm: Any) -> ModelSpec:
    """Resolve a tiny model."""
    return ModelSpec.resolve(model_config(family, vision=vision, **llm), vocab_size=VOCAB, image_tokens=IMAGE_TOKENS)


def whole_stage(spec: ModelSpec, *, dtype: torch.dtype = torch.float32, **options: Any) -> Stage:
    """Build a model as one stage."""
    layers = range(spec.layers)
    return build_stage(spec, layers=layers, first=True, last=True, dtype=dtype, device="cpu", seed=3, **options)


def opened(stage: Stage) -> Stage:
    """Give the gates of a stage strengths other than zero, if it has any; returns the stage."""
    generator = torch.Generator().manual_seed(5)
    for name, parameter in stage.named_parameters():
        if name.endswith("pair_gate.strength"):
            drawn = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.data.copy_(3.0 * drawn)
    return stage


def plain_llm(stage: Stage) -> PreTrainedModel:
    """Return the library's own model with a single stage's weights; it shares no code with the stage's forward."""
    config = type(stage.spec.llm).from_dict(stage.spec.llm.to_dict())
    # Soft-capped attention exists in the library's eager form only.
    config._attn_implementation = "eager" if getattr(config, "attn_logit_softcapping", None) else "sdpa"
    model = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config)
    weights = {k: v for k, v in stage.state_dict().items() if not k.startswith(("vision.", "connector."))}
    model.load_state_dict(weights)
    return model.to(next(stage.parameters()).dtype).train()


def random_sidecars(
    seed: int, samples: int, *, padding: int, text_only: bool = False, image_tokens: int = IMAGE_TOKENS
) -> Sidecars:
    """Draw a row of chats: one to three turns, each with up to two images before or after its text."""
    rng = random.Random(seed)
    segment: list[int] = []
    instance: list[int] = []
    generated: list[int] = []
    images = 0
    for sample in range(1, samples + 1):
        start = len(instance)
        for _ in range(rng.randint(1, 3)):
            pieces: list[list[int]] = [[-1] * rng.randint(1, 6)]
            for _ in range(0 if text_only else rng.randint(0, 2)):
                pieces.insert(rng.randint(0, len(pieces)), [images] * image_tokens)
                images += 1
            given = [index for piece in pieces for index in piece]
            answer = rng.randint(1, 5)
            instance += given + [-1] * answer
            generated += [0] * len(given) + [1] * answer
        segment += [sample] * (len(instance) - start)
    columns = (segment + [0] * padding, instance + [-1] * padding, generated + [0] * padding)
    seg, inst, gen = (torch.tensor(column) for column in columns)
    return Sidecars(segment=seg, modality=(inst >= 0).long(), instance=inst, generated=gen)


def stage_inputs(
    sidecars: Sidecars, *, policy: str = "mma", seed: int = 0, dtype: torch.dtype, side: int = SIDE
) -> StageInputs:
    """Draw token ids and pixels for a row."""
    generator = torch.Generator().manual_seed(seed)
    length = len(sidecars)
    ids = torch.randint(1, VOCAB, (length,), generator=generator)
    labels = torch.full((length,), IGNORE)
    same = (sidecars.segment[1:] == sidecars.segment[:-1]) & (sidecars.segment[1:] > 0)
    predicts = same & (sidecars.generated[1:] == 1)
    labels[:-1][predicts] = ids[1:][predicts]
    images = int(sidecars.instance.max()) + 1
    pixels = torch.randn(images, 3, side, side, generator=generator).to(dtype) if images else None
    positions = (sidecars.instance >= 0).nonzero().squeeze(1)
    plan = build_plan(policy, sidecars)
    return StageInputs(ids, position_ids(sidecars), plan, labels, positions, pixels)


def slow_loss(stage: Stage, model: PreTrainedModel, inputs: StageInputs, *, policy: str = "mma") -> torch.Tensor:
    """Compute a row's summed loss sample by sample through the library's model with a dense 4-D mask.

    The vision half is the stage's own, so that gradients reach its connector.
    """
    sidecars = inputs.plan.sidecars
    embeds = model.get_input_embeddings()(inputs.input_ids[None])[0]
    if inputs.pixels is not None:
        images = stage.image_tokens(inputs.pixels, embeds)
        embeds = embeds.index_copy(0, inputs.image_positions, images)
    allowed = dense_mask(policy, sidecars)
    total = embeds.new_zeros(())
    for number in range(1, int(sidecars.segment.max()) + 1):
        own = (sidecars.segment == number).nonzero().squeeze(1)
        logits = plain_logits(model, embeds[own][None], allowed[own][:, own])[0]
        total = total + F.cross_entropy(logits, inputs.labels[own], ignore_index=IGNORE, reduction="sum")
    return total


def plain_logits(model: PreTrainedModel, embeds: torch.Tensor, allowed: torch.Tensor) -> torch.Tensor:
    """Run the library's model on one sequence under a bool mask [T, T]; logits [1, T, V]."""
    mask = allowed[None, None]
    if model.config._attn_implementation == "eager":
        mask = torch.zeros(mask.shape, dtype=embeds.dtype).masked_fill_(~mask, torch.finfo(embeds.dtype).min)
    kinds = getattr(model.config, "layer_types", None)
    typed = kinds and model.config.model_type.startswith(("gemma2", "gemma3", "gemma4", "olmo3", "qwen", "smollm3"))
    masks = dict.fromkeys(kinds, mask) if typed else mask
    out: torch.Tensor = model(inputs_embeds=embeds, attention_mask=masks, use_cache=False).logits
    return out
