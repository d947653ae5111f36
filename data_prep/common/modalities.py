"""Modality codes of tokens, shared by packs and masks."""

from __future__ import annotations

MODALITIES = ("text", "image", "video", "audio")
"""Name of each code."""
TEXT, IMAGE, VIDEO, AUDIO = range(len(MODALITIES))
