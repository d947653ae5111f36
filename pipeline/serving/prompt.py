"""A prompt: token ids with sidecars and pictures, and what a stage computes it from."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from data_prep.media.spec import NativeImages
from data_prep.text.encoding import Encoded
from pipeline.attention import build_plan
from pipeline.masks import Policy, Sidecars, position_ids
from pipeline.model.inputs import IGNORE, StageInputs
from pipeline.model.patches import PatchLayout
from pipeline.model.spec import ModelSpec
from pipeline.model.views import view_pixels


@dataclass(frozen=True)
class Prompt:
    """A conversation up to the model's turn: token ids with sidecars, and its images in reading order."""

    encoded: Encoded
    images: tuple[Image.Image, ...] = ()

    @property
    def sidecars(self) -> Sidecars:
        """Sidecars of the prompt as one segment."""
        columns = {
            name: torch.from_numpy(getattr(self.encoded, name).astype(np.int64))
            for name in ("modality", "instance", "generated")
        }
        return Sidecars(segment=torch.ones(len(self.encoded), dtype=torch.long), **columns)


def stage_inputs(
    spec: ModelSpec, policy: Policy, prompt: Prompt, *, mask: Policy | None = None, device: torch.device | str = "cpu"
) -> StageInputs:
    """Return a prompt as inputs of a stage.

    Args:
        spec: the model.
        policy: its mask policy, which also sets the positions.
        prompt: of T tokens.
        mask: attend under this policy instead, with the positions of ``policy``.
        device: where the tensors are.
    """
    sidecars = prompt.sidecars
    ids = torch.from_numpy(prompt.encoded.ids.astype(np.int64)).to(device)
    towers = spec.towers.values() if prompt.images else ()
    extents, image = spec.extents(image.size for image in prompt.images), spec.media_spec.image
    pixels = [view_pixels(tower.preprocess, prompt.images, extents, spec.media_spec).to(device) for tower in towers]
    return StageInputs(
        input_ids=ids,
        position_ids=position_ids(sidecars, policy.grid).to(device),
        plan=build_plan(mask or policy, sidecars).to(device),
        labels=torch.full_like(ids, IGNORE),
        image_positions=(sidecars.instance >= 0).nonzero().squeeze(1).to(device),
        pixels=pixels[0] if pixels else None,
        extra_pixels=tuple(pixels[1:]),
        layout=PatchLayout.of([one.view for one in extents], image.merge).to(device)
        if pixels and isinstance(image, NativeImages)
        else None,
    )
