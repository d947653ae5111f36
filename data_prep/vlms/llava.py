"""LLaVA-1.5 (arXiv 2310.03744): CLIP's last block but one, two linear layers, a Llama; one square of 336 px."""

from __future__ import annotations

from typing import Any, ClassVar

from data_prep.vlms.base import MODULES, PUBLISHED, Config, Names, Vlm, patches_per_side


class Llava(Vlm):
    """LLaVA-1.5 with any tower and decoder. Its conversations are Vicuna's, whose turns no special token separates."""

    vision_defaults: ClassVar[Config] = {
        "model_type": "clip_vision_model", "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
        "num_attention_heads": 16, "image_size": 336, "patch_size": 14, "projection_dim": 768,
    }  # fmt: skip
    layouts: ClassVar[tuple[Names, ...]] = (
        PUBLISHED._replace(vision="vision_tower.vision_model."), PUBLISHED,
        MODULES._replace(vision="model.vision_tower.vision_model."), MODULES,
    )  # fmt: skip
    connector_names: ClassVar[dict[str, str]] = {"0.": "linear_1.", "2.": "linear_2."}
    template: ClassVar[str] = "vicuna"

    def problem(self, config: Config) -> str:
        """Refuse projectors other than LLaVA's own, and features with a class token."""
        if (act := config.get("projector_hidden_act", "gelu")) != "gelu":
            return f"projector_hidden_act={act!r} is not supported: only gelu is"
        if not config.get("multimodal_projector_bias", True):
            return "multimodal_projector_bias=false is not supported"
        strategy = config.get("vision_feature_select_strategy", "default")
        has_class_token = self.vision(config)["model_type"] == "clip_vision_model"
        if (strategy == "default") != has_class_token:
            return (
                f"vision_feature_select_strategy={strategy!r} keeps the class token or drops a patch: images here are "
                "patches alone"
            )
        return ""

    def text(self, config: Config) -> dict[str, Any]:
        """Return the language model's config; it ties the head if either config says so."""
        own = config.get("text_config") or {}
        tied = bool(config.get("tie_word_embeddings") or own.get("tie_word_embeddings"))
        return {**super().text(config), "tie_word_embeddings": tied}

    def connector(self, config: Config) -> dict[str, Any]:
        """Return two linear layers on the blocks that ``vision_feature_layer`` names."""
        named = config.get("vision_feature_layer", -2)
        blocks = int(self.vision(config)["num_hidden_layers"])
        layers = [_block(index, blocks) for index in (named if isinstance(named, list) else [named])]
        return {"kind": "mlp", "layers": layers}

    def one_square(self, side_px: int) -> dict[str, Any]:
        """Return a squash to the square in place of the crop of its middle."""
        return {**super().one_square(side_px), "do_center_crop": False}

    def image_tokens(self, config: Config) -> int:
        """Return one token per patch."""
        return patches_per_side(self.vision(config)) ** 2


def _block(hidden_state: int, blocks: int) -> int:
    """Return the block, counted from the last, that outputs a hidden state; state 0 is the embedding."""
    return hidden_state if hidden_state < 0 else hidden_state - 1 - blocks


LLAVA = Llava("llava", "LlavaForConditionalGeneration")
