"""MMA on stock Hugging Face models: ``enable_mma(model)`` and a packing collator."""

from pipeline.hf.collator import PackedCollator, PackedRows
from pipeline.hf.enable import disable_mma, enable_mma
from pipeline.hf.rows import AssistantSpans

__all__ = ["AssistantSpans", "PackedCollator", "PackedRows", "disable_mma", "enable_mma"]
