"""Parts of an export's code that depend on the model: :func:`pipeline.serving.remote.bundle.bundle` puts in others.

The values here only have the right types.
"""

from __future__ import annotations

from torch import nn

from pipeline.model.families.llm import LlmFamily
from pipeline.model.families.vision import VisionFamily

ConnectorModule: type[nn.Module] = nn.Identity
"""The connector's module."""
DecoderFamily: type[LlmFamily] = LlmFamily
"""What the language model's family needs beyond its transformers code."""
TowerFamily: type[VisionFamily] = VisionFamily
"""What the vision tower's family needs beyond its transformers code."""
