"""This project's own model as a subject of the prober: a whole stage, called with the columns of packed rows."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import nn

from data_prep.common.errors import UserError
from data_prep.images.store import ImageStore, decode_rgb
from data_prep.media.spec import extents
from data_prep.packs import PackReader, PackRow
from pipeline.attention import build_plan
from pipeline.masks import Policy, Sidecars, position_ids
from pipeline.model.inputs import IGNORE, StageInputs
from pipeline.model.preprocess import Preprocess
from pipeline.model.stage import Stage
from pipeline.model.views import view_pixels


class StageSubject(nn.Module):
    """A stage that holds the whole model, under a mask policy."""

    def __init__(self, stage: Stage, policy: Policy, image_id: int | None = None) -> None:
        """Wrap a stage; ``image_id`` is the id at image positions."""
        super().__init__()
        self.stage, self.policy = stage, policy
        self.config = SimpleNamespace(image_token_id=image_id)

    def forward(
        self,
        input_ids: torch.Tensor,
        segment: torch.Tensor,
        modality: torch.Tensor,
        instance: torch.Tensor,
        generated: torch.Tensor,
        pixel_values: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return logits [B, T, V]; all columns are integers [B, T], pixels [views, 3, S, S]."""
        columns = (segment, modality, instance, generated.long())
        sidecars = Sidecars.concat([Sidecars(*(column[row] for column in columns)) for row in range(len(input_ids))])
        ids = input_ids.flatten()
        inputs = StageInputs(
            input_ids=ids,
            position_ids=position_ids(sidecars, self.policy.grid),
            plan=build_plan(self.policy, sidecars),
            labels=torch.full_like(ids, IGNORE),
            image_positions=(sidecars.instance >= 0).nonzero().squeeze(1),
            pixels=pixel_values,
        )
        hidden = self.stage.model.norm(self.stage.decode(self.stage.embed(inputs), inputs))
        logits: torch.Tensor = self.stage.lm_head.logits(hidden)
        return logits.view(*input_ids.shape, -1)


def pack_batch(packs: PackReader, row: int, preprocess: Preprocess) -> dict[str, Any]:
    """Return a packed row as a batch for :class:`StageSubject`. Raises UserError outside the folder's rows."""
    if not 0 <= row < len(packs):
        raise UserError(f"{packs.directory} has rows 0..{len(packs) - 1}, not {row}: change --row or --rows")
    found = packs[row]
    names = ("input_ids", "segment", "modality", "instance", "generated")
    batch: dict[str, Any] = {name: torch.from_numpy(getattr(found, name).astype(np.int64))[None] for name in names}
    if len(found.image_row):
        batch["pixel_values"] = _pixels(packs, found, preprocess)
    return batch


def _pixels(packs: PackReader, row: PackRow, preprocess: Preprocess) -> torch.Tensor:
    store = ImageStore(packs.directory / packs.manifest.image_store)
    images = [decode_rgb(store.read(index)) for index in row.image_row.tolist()]
    found = [None] * len(images) if row.media is None else extents(row.media)
    return view_pixels(preprocess, images, found, packs.manifest.media_spec)
