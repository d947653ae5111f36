"""InternVL 2.5 to 3.5 in the layout of transformers (arXiv 2404.16821, 2504.10479): tower, pixel shuffle, MLP."""

from __future__ import annotations

from typing import Any, ClassVar

from data_prep.vlms.base import Config, Marks, Vlm, patches_per_side


class InternVL(Vlm):
    """InternVL whose ``model_type`` is ``internvl`` (folders named ``-hf``); every image is one square."""

    text_defaults: ClassVar[Config] = {"model_type": "qwen2"}
    vision_defaults: ClassVar[Config] = {"model_type": "internvl_vision", "image_size": 448, "patch_size": 14}
    connector_names: ClassVar[dict[str, str]] = {
        "mlp.0.": "layer_norm.", "mlp.1.": "linear_1.", "mlp.3.": "linear_2.",
    }  # fmt: skip
    tied: ClassVar[bool] = True

    def problem(self, config: Config) -> str:
        """Refuse features other than the tower's output without its class token."""
        for key, usual in (
            ("vision_feature_layer", -1),
            ("vision_feature_select_strategy", "default"),
            ("projector_hidden_act", "gelu"),
        ):  # fmt: skip
            if (value := config.get(key, usual)) != usual:
                return f"{key}={value!r} is not supported: only {usual!r} is"
        return ""

    def connector(self, config: Config) -> dict[str, Any]:
        """Return the pixel shuffle with LayerNorm and two linear layers."""
        return {"kind": "pixel_shuffle", "factor": _factor(config)}

    def one_square(self, side_px: int) -> dict[str, Any]:
        """Return a squash to the square, without tiles."""
        return {**super().one_square(side_px), "crop_to_patches": False}

    def image_tokens(self, config: Config) -> int:
        """Return the tokens of one square."""
        return (patches_per_side(self.vision(config)) // _factor(config)) ** 2

    def image_id(self, config: Config) -> int:
        """Return ``image_token_id``."""
        return int(config.get("image_token_id", 151_667))

    def marks(self) -> tuple[Marks, Marks]:
        """Return the tokens that begin and end an image."""
        return (("<img>", True),), (("</img>", True),)


def _factor(config: Config) -> int:
    return round(1 / float(config.get("downsample_ratio", 0.5)))


INTERNVL = InternVL("internvl", "InternVLForConditionalGeneration")
