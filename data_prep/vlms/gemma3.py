"""Gemma 3 (arXiv 2503.19786): SigLIP on one square, windows of patches averaged to 256 tokens."""

from __future__ import annotations

import math
from typing import Any, ClassVar

from data_prep.vlms.base import MODULES, PUBLISHED, Config, Marks, Names, Vlm, patches_per_side


class Gemma3(Vlm):
    """Gemma 3 with images, 4B to 27B. Pan-and-scan crops are not made: every image is one square."""

    text_defaults: ClassVar[Config] = {"model_type": "gemma3_text", "vocab_size": 262_208}
    vision_defaults: ClassVar[Config] = {"model_type": "siglip_vision_model"}
    layouts: ClassVar[tuple[Names, ...]] = (
        PUBLISHED._replace(vision="vision_tower.vision_model."), PUBLISHED,
        MODULES._replace(vision="model.vision_tower.vision_model."), MODULES,
    )  # fmt: skip
    connector_names: ClassVar[dict[str, str]] = {
        "norm.": "mm_soft_emb_norm.", "weight": "mm_input_projection_weight",
    }  # fmt: skip
    tied: ClassVar[bool] = True
    stock_policy: ClassVar[str] = "mixed"

    def problem(self, config: Config) -> str:
        """Refuse token counts that windows of whole patches do not make."""
        tokens = int(config.get("mm_tokens_per_image", 256))
        side = math.isqrt(tokens)
        if side**2 != tokens or patches_per_side(self.vision(config)) % side:
            return f"mm_tokens_per_image={tokens} is not a square grid of whole windows of patches"
        return ""

    def connector(self, config: Config) -> dict[str, Any]:
        """Return average pooling, with the tower's epsilon in the norm."""
        vision = self.vision(config)
        window = patches_per_side(vision) // math.isqrt(self.image_tokens(config))
        return {"kind": "average_pool", "window": window, "eps": vision.get("layer_norm_eps", 1e-6)}

    def one_square(self, side_px: int) -> dict[str, Any]:
        """Return a squash to the square, without further crops."""
        return {**super().one_square(side_px), "do_pan_and_scan": False}

    def image_tokens(self, config: Config) -> int:
        """Return ``mm_tokens_per_image``."""
        return int(config.get("mm_tokens_per_image", 256))

    def image_id(self, config: Config) -> int:
        """Return ``image_token_index``."""
        return int(config.get("image_token_index", 262_144))

    def written(self, image_token: str) -> str:
        """Return the token that begins an image."""
        return "<start_of_image>"

    def marks(self) -> tuple[Marks, Marks]:
        """Return line breaks and the tokens that begin and end an image."""
        return (("\n\n", False), ("<start_of_image>", True)), (("<end_of_image>", True), ("\n\n", False))


GEMMA3 = Gemma3("gemma3", "Gemma3ForConditionalGeneration")
