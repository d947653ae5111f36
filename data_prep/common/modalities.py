"""Token modality codes, shared by packs and masks."""

from __future__ import annotations

MODALITIES = ("text", "image", "video", "audio")
"""Modality names by code."""
TEXT, IMAGE, VIDEO, AUDIO = range(len(MODALITIES))
