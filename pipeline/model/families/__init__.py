"""Families of decoders and vision towers: one descriptor each, which owns all that is special about the family."""

from pipeline.model.families.llm import DecoderParts, LlmFamily, Piece
from pipeline.model.families.vision import VisionFamily

__all__ = ["DecoderParts", "LlmFamily", "Piece", "VisionFamily"]
