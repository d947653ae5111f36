"""Google's Gemma decoders: scaled embeddings (inside their embedding module), soft caps, windows, two rotary bases."""

from __future__ import annotations

from pipeline.model.families.llm import LlmFamily


class Gemma3(LlmFamily):
    """Gemma 3: layers with a window and layers without have different rotary frequencies."""

    rotary_per_layer_type = True


GEMMAS = (LlmFamily("gemma"), LlmFamily("gemma2"), Gemma3("gemma3_text"))
