"""Names of parameters in exports: this project's global names, and those that Hugging Face classes use."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, TypeAlias

Layout: TypeAlias = Literal["flat", "hf", "llava"]
"""``flat``: global names, as exports before version 4; ``hf``: the export's own class; ``llava``: the stock class."""
_PARTS = {
    "flat": (),
    "hf": (
        ("vision.", "model.vision_tower."),
        ("connector.", "model.connector."),
        ("model.", "model.language_model."),
    ),
    "llava": (
        ("vision.", "model.vision_tower."),
        ("connector.0.", "model.multi_modal_projector.linear_1."),
        ("connector.2.", "model.multi_modal_projector.linear_2."),
        ("model.", "model.language_model."),
    ),
}


def exported_name(name: str, layout: Layout) -> str:
    """Return the name that a parameter of a global name has in an export; unlisted ones (``lm_head``) keep theirs."""
    return next((theirs + name[len(ours) :] for ours, theirs in _PARTS[layout] if name.startswith(ours)), name)


def layout_of(names: Iterable[str]) -> Layout:
    """Return the layout of an export by the names of its tensors."""
    listed = list(names)
    if any(name.startswith("model.multi_modal_projector.") for name in listed):
        return "llava"
    return "hf" if any(name.startswith("model.language_model.") for name in listed) else "flat"


def is_spare(name: str, layout: Layout) -> bool:
    """Return whether a tensor of an export only completes a stock class: CLIP's last norm, whose output is unused."""
    return layout == "llava" and name.startswith("model.vision_tower.post_layernorm.")
