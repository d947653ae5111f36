"""Idefics 3 (arXiv 2408.12637) and SmolVLM (arXiv 2504.05299): a SigLIP tower, pixel shuffle, one linear layer."""

from __future__ import annotations

from typing import Any, ClassVar

from data_prep.vlms.base import Config, Marks, Names, Vlm, patches_per_side


class Idefics3(Vlm):
    """Both models; every image is one square, as their processors make with ``do_image_splitting=False``."""

    layouts: ClassVar[tuple[Names, ...]] = (Names("model.vision_model.", "model.connector.", "model.text_model."),)
    connector_names: ClassVar[dict[str, str]] = {"mlp.0.": "modality_projection.proj."}

    def text(self, config: Config) -> dict[str, Any]:
        """Return the language model's config; one that is left out is a Llama with another epsilon."""
        own = config.get("text_config") or {"rms_norm_eps": 1e-5}
        return super().text({**config, "text_config": own})

    def vision(self, config: Config) -> dict[str, Any]:
        """Return the tower's config."""
        sizes = {"image_size": 224, "patch_size": 32}
        return {**sizes, **super().vision(config), "model_type": f"{self.model_type}_vision"}

    def connector(self, config: Config) -> dict[str, Any]:
        """Return the pixel shuffle with one linear layer."""
        return {"kind": "pixel_shuffle", "factor": int(config.get("scale_factor", 2)), "projection": "linear"}

    def one_square(self, side_px: int) -> dict[str, Any]:
        """Return a squash to the square, without tiles and without the step before them that keeps the shape."""
        edge = {"longest_edge": side_px}
        return {"do_resize": False, "do_image_splitting": False, "size": edge, "max_image_size": edge}

    def image_tokens(self, config: Config) -> int:
        """Return the tokens of one square."""
        return (patches_per_side(self.vision(config)) // int(config.get("scale_factor", 2))) ** 2

    def image_id(self, config: Config) -> int:
        """Return ``image_token_id``."""
        return int(config.get("image_token_id", 128_257))

    def marks(self) -> tuple[Marks, Marks]:
        """Return the tokens around a whole image."""
        fake = ("<fake_token_around_image>", True)
        return (fake, ("<global-img>", True)), (fake,)


IDEFICS3 = (
    Idefics3("idefics3", "Idefics3ForConditionalGeneration"),
    Idefics3("smolvlm", "SmolVLMForConditionalGeneration"),
)
