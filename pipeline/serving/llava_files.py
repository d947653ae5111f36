"""The files of an export that the stock ``LlavaForConditionalGeneration`` loads, without code of its own.

The stock class prefills causally. It also reads the vision tower's hidden states, which for SigLIP come before the last
norm, while training reads after it. ``tie_last_hidden_states`` in the tower's config makes transformers replace the
last hidden state by the tower's output; a test compares the logits.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from data_prep.common.errors import UserError
from data_prep.text.tokenizer import Tokenizer
from pipeline.masks import get_policy
from pipeline.serving.export_config import CONFIG, ExportConfig
from pipeline.serving.hf_files import write_json, write_tokenizer


def check_llava(export_config: ExportConfig, *, prefill_causal: bool) -> None:
    """Refuse a model that the stock class computes differently.

    Raises UserError naming the part that it lacks; a policy other than ``causal`` also without ``prefill_causal``.
    """
    spec = export_config.spec
    policy = get_policy(export_config.policy, allow_leak=True, grid=spec.mask_grid)
    family, config = spec.llm_family, spec.llm
    capped = family.logit_softcap(config) is not None or getattr(config, "attn_logit_softcapping", None)
    problems = {
        f"connector of kind {spec.connector.kind} (only mlp)": spec.connector.kind != "mlp",
        "norm after the connector (model.connector.norm)": bool(getattr(spec.connector, "norm", False)),
        "choice of the tower's blocks (model.connector.layers)": bool(spec.connector.tower_layers),
        "gates (model.gate)": spec.gate.kind != "none",
        "second tower (model.extra_vision)": bool(spec.extra_towers),
        "images of different sizes (media.image)": spec.media is not None,
        f"tower of type {spec.vision.model_type}": spec.vision_family.last_norm is None,
        "tower without layers": spec.vision.num_hidden_layers == 0,
        f"scaled or capped logits of {config.model_type}": capped or family.logit_scale(config) != 1.0,
        f"positions of policy '{policy.name}'": policy.grid is not None,
    }
    if missing := [name for name, found in problems.items() if found]:
        raise UserError(f"--format llava: the stock class has no {missing[0]}: use --format hf")
    if (policy.unlock is not None or policy.layers) and not prefill_causal:
        raise UserError(
            f"--format llava: the model was trained under policy '{policy.name}', but the stock class prefills "
            "causally, so its answers would differ: use --format hf, or add --prefill-causal to accept that"
        )


def reads_after_norm(export_config: ExportConfig) -> bool:
    """Return whether the connector reads the tower after a last norm that its hidden states do not contain."""
    return bool(export_config.spec.vision_family.last_norm)


def extra_tensors(export_config: ExportConfig) -> dict[str, torch.Tensor]:
    """Return tensors that the stock class has and no connector reads: CLIP's last norm, as the identity."""
    spec = export_config.spec
    if spec.vision_family.last_norm:
        return {}
    width, dtype = int(spec.vision.hidden_size), export_config.torch_dtype
    name = "model.vision_tower.post_layernorm"
    return {f"{name}.weight": torch.ones(width, dtype=dtype), f"{name}.bias": torch.zeros(width, dtype=dtype)}


def write_llava_files(export_config: ExportConfig, tokenizer: Tokenizer, folder: Path) -> None:
    """Write everything but weights into an export folder. Raises UserError for a tokenizer that cannot be exported."""
    raw, spec = export_config.to_config(), export_config.spec
    extra = spec.vision_family.extra_tokens(spec.vision)
    strategy = "default" if extra else "full"
    vision = {**raw["vision_config"], **({"tie_last_hidden_states": True} if reads_after_norm(export_config) else {})}
    config: dict[str, Any] = {
        **raw,
        "vision_config": vision,
        "model_type": "llava",
        "architectures": ["LlavaForConditionalGeneration"],
        "dtype": export_config.dtype,
        "image_token_index": export_config.image_id,
        "image_seq_length": spec.image_tokens,
        "projector_hidden_act": "gelu",
        "multimodal_projector_bias": True,
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": strategy,
        "pad_token_id": export_config.pad_id,
        "eos_token_id": list(export_config.eos_ids),
        "tie_word_embeddings": spec.tied,
    }
    write_json(folder / CONFIG, config)
    write_tokenizer(export_config, tokenizer, folder)
    size = {"height": spec.preprocess.size_px, "width": spec.preprocess.size_px}
    image = {
        "image_processor_type": "SiglipImageProcessor", "processor_class": "LlavaProcessor", "size": size,
        "resample": 3, "do_resize": True, "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True,
        "do_convert_rgb": True,
        "image_mean": list(spec.preprocess.mean), "image_std": list(spec.preprocess.std),
    }  # fmt: skip
    write_json(folder / "preprocessor_config.json", image)
    processor = {
        "processor_class": "LlavaProcessor",
        "image_token": tokenizer.markers.reserved[tokenizer.image_id],
        "patch_size": int(spec.vision.patch_size),
        "vision_feature_select_strategy": strategy,
        "num_additional_image_tokens": extra,
    }
    write_json(folder / "processor_config.json", processor)
