"""MMA on stock Hugging Face models: ``enable_mma(model)``, a packing collator and a trainer callback."""

from pipeline.hf.collator import PackedCollator, PackedRows
from pipeline.hf.enable import disable_mma, enable_mma
from pipeline.hf.rows import AssistantSpans
from pipeline.hf.trainer import MMACallback

__all__ = ["AssistantSpans", "MMACallback", "PackedCollator", "PackedRows", "disable_mma", "enable_mma"]
