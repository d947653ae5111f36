"""Packed batches for stock models: from a trainer's samples, or from this project's packs.

R rows of L tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F
from torch.utils.data import Dataset

from data_prep.common.errors import UserError
from data_prep.images.augment import apply_augmentation
from data_prep.images.store import ImageStore, decode_rgb
from data_prep.packs import PackReader, PackRow
from data_prep.planning.packing import pack_windows
from pipeline.hf.rows import IGNORE, Media
from pipeline.masks import Sidecars, position_ids

Sample = Mapping[str, Any]
MEDIA_KEYS = ("pixel_values", "image_grid_thw", "image_sizes", "pixel_attention_mask")


class PackedCollator:
    """Packs the samples of a batch into rows for a model with MMA; a ``data_collator`` for trainers.

    A sample holds ``input_ids`` and ``labels`` (1-D tensors or lists; -100 = not trained) and what the processor made
    of its images, as for a batch of one. Rows of :class:`PackedRows` are already packed and are only stacked.
    """

    def __init__(self, model: Any, seq_len: int, *, max_images: int | None = None, seed: int = 0) -> None:
        """Prepare for a model.

        Args:
            model: a stock vision-language model; its config gives the padding id, the image token and the positions.
            seq_len: tokens per row, L.
            max_images: images per row; None for no limit.
            seed: seed of the order of rows.

        Raises:
            UserError: the model's config names no image token.
        """
        self.seq_len, self.max_images, self.seed = seq_len, max_images, seed
        self.media = Media.of(model.config)
        pad = getattr(model.config.get_text_config(), "pad_token_id", None)
        self.pad_id = pad if isinstance(pad, int) and pad >= 0 else 0
        self._rope_index = _rope_index(model)

    def __call__(self, samples: Sequence[Sample]) -> dict[str, torch.Tensor]:
        """Return ``input_ids``, ``labels`` and ``segment`` int64[R, L], ``position_ids``, and the images in order.

        Raises UserError for a sample longer than a row, or with more images.
        """
        if samples and "segment" in samples[0]:
            rows = [[sample] for sample in samples]
        else:
            rows = self._pack([_checked(sample, number) for number, sample in enumerate(samples)])
        columns = [self._row(row) for row in rows]
        batch = {key: torch.stack([row[key] for row in columns]) for key in columns[0] if key != "position_ids"}
        batch["position_ids"] = torch.stack([row["position_ids"] for row in columns], dim=-2)
        if self._rope_index is not None:
            batch["mm_token_type_ids"] = self.media.modality(batch["input_ids"])
        return {**batch, **_join_media(rows)}

    def _pack(self, samples: list[Sample]) -> list[list[Sample]]:
        """Group samples by row, with the planner of the offline packs."""
        lengths = np.array([len(sample["input_ids"]) for sample in samples], dtype=np.int64)
        images = np.array([self._images(sample["input_ids"]) for sample in samples], dtype=np.int64)
        limit = self.max_images
        for number, (tokens, count) in enumerate(zip(lengths.tolist(), images.tolist(), strict=True)):
            if tokens > self.seq_len or (limit is not None and count > limit):
                raise UserError(
                    f"sample {number} has {tokens} tokens and {count} images, but a row holds {self.seq_len} tokens"
                    f"{'' if limit is None else f' and {limit} images'}: raise the limit, or drop the sample"
                )
        placed = pack_windows(lengths, images, self.seq_len, limit, self.seed)
        return [[samples[at] for at in np.flatnonzero(placed == row)] for row in range(int(placed.max()) + 1)]

    def _images(self, ids: torch.Tensor) -> int:
        """Count the runs of media tokens, at least the number of images that the row limit counts."""
        media = self.media.modality(ids) > 0
        return int((media & ~F.pad(media, (1, 0))[:-1]).sum())

    def _row(self, samples: list[Sample]) -> dict[str, torch.Tensor]:
        if "segment" in samples[0]:
            return {key: torch.as_tensor(value) for key, value in samples[0].items() if key not in MEDIA_KEYS}
        gap = self.seq_len - sum(len(sample["input_ids"]) for sample in samples)
        labels = [torch.cat([torch.tensor([IGNORE]), sample["labels"][1:]]) for sample in samples]
        segment = [torch.full((len(sample["input_ids"]),), number) for number, sample in enumerate(samples, 1)]
        return {
            "input_ids": F.pad(torch.cat([sample["input_ids"] for sample in samples]), (0, gap), value=self.pad_id),
            "labels": F.pad(torch.cat(labels), (0, gap), value=IGNORE),
            "segment": F.pad(torch.cat(segment), (0, gap)),
            "position_ids": F.pad(torch.cat([self._positions(sample) for sample in samples], -1), (0, gap)),
        }

    def _positions(self, sample: Sample) -> torch.Tensor:
        """Return positions int64[tokens], or four planes of them under mRoPE."""
        ids = sample["input_ids"]
        plain = torch.arange(len(ids))
        if self._rope_index is None:
            return plain
        options = {"mm_token_type_ids": self.media.modality(ids)[None], "attention_mask": torch.ones_like(ids)[None]}
        planes, _ = self._rope_index(ids[None], image_grid_thw=sample.get("image_grid_thw"), **options)
        return torch.cat([plain[None], planes[:, 0]])


class PackedRows(Dataset[dict[str, Any]]):
    """The rows of a pack folder as samples of :class:`PackedCollator`."""

    def __init__(
        self, model: Any, directory: Path | str, preprocess: Callable[[list[Image.Image]], torch.Tensor]
    ) -> None:
        """Open a folder.

        Args:
            model: the model that will be trained; its tokenizer must be that of the packs.
            directory: a pack folder.
            preprocess: RGB images -> ``pixel_values`` float[images, 3, H, W].

        Raises:
            UserError: the folder cannot be read, or the model has too few embeddings, other images or mRoPE.
        """
        self._packs = PackReader(directory)
        self._preprocess = preprocess
        media, manifest = Media.of(model.config), self._packs.manifest
        self._image_id = min(media.tokens, key=lambda token: media.tokens[token])
        rows = int(model.config.get_text_config().vocab_size)
        if manifest.vocab_size > rows:
            raise UserError(
                f"{directory} needs {manifest.vocab_size} embeddings, but the model has {rows}: resize them"
            )
        if media.lengths not in (None, manifest.image_tokens):
            raise UserError(
                f"an image takes {manifest.image_tokens} tokens in {directory}, but {media.lengths} in the model: "
                f"rebuild the packs with image_tokens {media.lengths}"
            )
        if _rope_index(model) is not None:
            raise UserError("the model's positions depend on its image grids (mRoPE), which packs do not hold")
        if manifest.media is not None:
            raise UserError(f"{directory} has images of different sizes: rebuild the packs with image_tokens")
        store = manifest.image_store
        self._images = ImageStore(self._packs.directory / store) if store else None

    def __len__(self) -> int:
        return len(self._packs)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return row ``index``: its columns int64[L], and ``pixel_values`` if it has images."""
        row = self._packs[index]
        sidecars = Sidecars.from_row(row)
        ids = torch.from_numpy(row.input_ids.astype(np.int64))
        generated, first = sidecars.generated.long(), F.pad(sidecars.segment, (1, 0))[:-1] != sidecars.segment
        columns = {
            "input_ids": torch.where(sidecars.instance >= 0, self._image_id, ids),
            "labels": torch.where((generated == 1) & ~first, ids, IGNORE),
            "segment": sidecars.segment.long(),
            "generated": generated,
            "position_ids": position_ids(sidecars),
        }
        return columns if not len(row.image_row) else {**columns, "pixel_values": self._pixels(row)}

    def as_dataset(self) -> Any:
        """Return the rows as a ``datasets.Dataset``, which TRL's trainers require. A row is read when it is needed."""
        from datasets import Dataset as Table

        def read(batch: Mapping[str, list[int]]) -> dict[str, list[Any]]:
            rows = [self[index] for index in batch["row"]]
            keys = dict.fromkeys(key for row in rows for key in row)
            return {key: [row.get(key) for row in rows] for key in keys}

        return Table.from_dict({"row": list(range(len(self)))}).with_transform(read)

    def _pixels(self, row: PackRow) -> torch.Tensor:
        assert self._images is not None, "rows with images, but the packs name no image store"
        images = [decode_rgb(self._images.read(index)) for index in row.image_row.tolist()]
        if row.augmentation is not None:
            images = [apply_augmentation(image, how) for image, how in zip(images, row.augmentation, strict=True)]
        return self._preprocess(images)


def _checked(sample: Sample, number: int) -> Sample:
    """Return a sample with 1-D tensors. Raises UserError when its ids and labels do not match."""
    missing = {"input_ids", "labels"} - set(sample)
    if missing:
        raise UserError(
            f"sample {number} has no {' and no '.join(sorted(missing))}: a trainer must keep all columns "
            "(remove_unused_columns=False)"
        )
    ids, labels = (torch.as_tensor(sample[key]).flatten() for key in ("input_ids", "labels"))
    if not 0 < len(ids) == len(labels):
        raise UserError(
            f"sample {number} has {len(ids)} ids and {len(labels)} labels: they must be as many, at least 1"
        )
    return {**sample, "input_ids": ids, "labels": labels}


def _join_media(rows: Sequence[Sequence[Sample]]) -> dict[str, torch.Tensor]:
    """Concatenate images in the order of the rows; where a class takes images by row, pad with blank ones."""
    found = {}
    tiled = any("image_sizes" in sample for row in rows for sample in row)
    for key in MEDIA_KEYS:
        by_row = [[torch.as_tensor(sample[key]) for sample in row if sample.get(key) is not None] for row in rows]
        parts = [part for row in by_row for part in row]
        if not parts:
            continue
        if key == "pixel_attention_mask" or (parts[0].dim() == 5 and not tiled):
            found[key] = _by_row(by_row, parts[0])
        elif parts[0].dim() == 5:  # [images, tiles, 3, H, W]
            most = max(part.shape[1] for part in parts)
            found[key] = torch.cat([F.pad(part, (0, 0) * 3 + (0, most - part.shape[1])) for part in parts])
        else:
            found[key] = torch.cat(parts)
    return found


def _by_row(by_row: Sequence[Sequence[torch.Tensor]], like: torch.Tensor) -> torch.Tensor:
    """Join the images [1, images, ...] of every row, and pad the rows to the same number of images."""
    rows = [torch.cat(list(row), dim=1)[0] if row else like.new_zeros(0, *like.shape[2:]) for row in by_row]
    most = max(len(row) for row in rows)
    return torch.stack([torch.cat([row, row.new_zeros(most - len(row), *row.shape[1:])]) for row in rows])


def _rope_index(model: Any) -> Callable[..., Any] | None:
    """Return the function that gives a sample's positions under mRoPE; None for models of one position plane."""
    found: Callable[..., Any] | None = getattr(getattr(model, "model", None), "get_rope_index", None)
    return found
