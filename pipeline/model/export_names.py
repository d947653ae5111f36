"""Names of parameters in exports: this project's global names, and those that Hugging Face classes use."""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal, TypeAlias

from data_prep.vlms import Names, Vlm
from pipeline.model.starting_point import StartingPoint

Layout: TypeAlias = Literal["flat", "hf", "llava", "vlm"]
"""``flat``: global names, as exports before version 4; ``hf``: the export's own class; ``llava``: the stock class;
``vlm``: that of the vision-language model that training started from."""
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


def exported_name(name: str, layout: Layout, start: StartingPoint | None = None) -> str:
    """Return the name that a parameter of a global name has in an export; unlisted ones (``lm_head``) keep theirs."""
    if layout == "vlm":
        assert start is not None
        return vlm_name(name, start.family, start.family.layouts[0])
    return next((theirs + name[len(ours) :] for ours, theirs in _PARTS[layout] if name.startswith(ours)), name)


def vlm_name(name: str, model: Vlm, names: Names) -> str:
    """Return the name that a parameter of a global name has in one of the layouts of a starting point."""
    part, _, own = name.partition(".")
    if part == "connector":
        return names.connector + model.connector_name(own)
    return {"vision": names.vision, "model": names.text, "lm_head": names.head}[part] + own


def layout_in(names: Collection[str], model: Vlm) -> Names:
    """Return the layout of a model's folder by the names of its tensors; its usual one if none fits."""

    def fits(layout: Names) -> bool:
        prefixes = (layout.vision, layout.text, layout.connector)
        return all(any(name.startswith(prefix) for name in names) for prefix in prefixes)

    return next(filter(fits, model.layouts), model.layouts[0])


def layout_of(names: Collection[str], start: StartingPoint | None = None) -> Layout:
    """Return the layout of an export by the names of its tensors; ``start`` is what its training started from."""

    def has(prefix: str) -> bool:
        return any(name.startswith(prefix) for name in names)

    if start is not None and has(start.family.layouts[0].text):
        return "vlm"
    if has("model.multi_modal_projector."):
        return "llava"
    return "hf" if has("model.language_model.") else "flat"


def is_spare(name: str, layout: Layout) -> bool:
    """Return whether a tensor of an export only completes a stock class: CLIP's last norm, whose output is unused."""
    return layout == "llava" and name.startswith("model.vision_tower.post_layernorm.")
