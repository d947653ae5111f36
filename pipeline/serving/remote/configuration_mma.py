"""Config of an exported MMA model, for ``AutoConfig``."""

from __future__ import annotations

from typing import Any, ClassVar

from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec


class MmaConfig(PreTrainedConfig):  # type: ignore[misc]
    """Configs of the language model and the vision tower, and everything that the mask depends on."""

    model_type = "mma"
    sub_configs_defaults: ClassVar[dict[str, SubConfigSpec]] = {
        "text_config": SubConfigSpec(AutoConfig, model_type="llama"),
        "vision_config": SubConfigSpec(AutoConfig, model_type="siglip_vision_model"),
    }

    def __init__(
        self,
        text_config: Any = None,
        vision_config: Any = None,
        mma: dict[str, Any] | None = None,
        image_token_id: int = -1,
        **kwargs: Any,
    ) -> None:
        """Take the content of ``config.json``.

        Args:
            text_config: config of the language model, or its values.
            vision_config: config of the vision tower, or its values.
            mma: mask policy (``policy``, ``mask_grid``, ``assistant_spans``), connector (``spec``) and bookkeeping.
            image_token_id: id that marks the place of image tokens.
            kwargs: of ``PreTrainedConfig``.
        """
        self.text_config = _config(text_config)
        self.vision_config = _config(vision_config)
        self.mma = mma or {}
        self.image_token_id = image_token_id
        super().__init__(**kwargs)


def _config(values: Any) -> Any:
    return AutoConfig.for_model(**values) if isinstance(values, dict) else values
