"""Tiny random models of stock vision-language classes, and batches for them from layouts.

Every image takes 4 tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers as hf
from torch.nn import functional as F

from pipeline.masks import Sidecars, dense_mask, parse_layout, position_ids

VOCAB, IMAGE_ID, VIDEO_ID, PAD, IMAGE_TOKENS = 48, 40, 41, 0, 4
TEXT = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "pad_token_id": PAD, "bos_token_id": 1,
    "eos_token_id": 2, "initializer_range": 0.2,
}  # fmt: skip
SMALL = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
ROPE = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
IDS = {"image_token_id": IMAGE_ID, "pad_token_id": PAD}


def _llava() -> Any:
    vision = {"model_type": "siglip_vision_model", **SMALL, "image_size": 16, "patch_size": 8}
    config = hf.LlavaConfig(
        text_config={"model_type": "llama", **TEXT}, vision_config=vision, image_token_index=IMAGE_ID,
        vision_feature_select_strategy="full", vision_feature_layer=-1, image_seq_length=IMAGE_TOKENS,
    )  # fmt: skip
    return hf.LlavaForConditionalGeneration(config)


def _llava_next() -> Any:
    vision = {"model_type": "siglip_vision_model", **SMALL, "image_size": 8, "patch_size": 8}
    config = hf.LlavaNextConfig(
        text_config={"model_type": "llama", **TEXT}, vision_config=vision, image_token_index=IMAGE_ID,
        vision_feature_select_strategy="full", vision_feature_layer=-1, image_grid_pinpoints=[[8, 16], [16, 8]],
    )  # fmt: skip
    return hf.LlavaNextForConditionalGeneration(config)


def _llava_onevision() -> Any:
    vision = {"model_type": "siglip_vision_model", **SMALL, "image_size": 8, "patch_size": 8}
    config = hf.LlavaOnevisionConfig(
        text_config={"model_type": "qwen2", **TEXT}, vision_config=vision, image_token_index=IMAGE_ID,
        video_token_index=VIDEO_ID, vision_feature_select_strategy="full", vision_feature_layer=-1,
        image_grid_pinpoints=[[8, 16], [16, 8]],
    )  # fmt: skip
    return hf.LlavaOnevisionForConditionalGeneration(config)


def _qwen(name: str, vision: dict[str, Any], **text: Any) -> Any:
    config = getattr(hf, f"{name}Config")(
        text_config={**TEXT, "rope_parameters": ROPE, **text},
        vision_config={**vision, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32},
        image_token_id=IMAGE_ID, video_token_id=VIDEO_ID, vision_start_token_id=42, vision_end_token_id=43,
    )  # fmt: skip
    return getattr(hf, f"{name}ForConditionalGeneration")(config)


def _qwen25() -> Any:
    return _qwen("Qwen2_5_VL", {"depth": 1, "patch_size": 4, "window_size": 16, "fullatt_block_indexes": [0]})


def _qwen3() -> Any:
    vision = {"depth": 2, "patch_size": 4, "deepstack_visual_indexes": [0], "num_position_embeddings": 16}
    return _qwen("Qwen3VL", vision, head_dim=8)


def _gemma3() -> Any:
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    config = hf.Gemma3Config(
        text_config={**TEXT, "head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 64, "layer_types": kinds},
        vision_config={**SMALL, "image_size": 16, "patch_size": 4}, image_token_id=IMAGE_ID, image_token_index=IMAGE_ID,
        mm_tokens_per_image=IMAGE_TOKENS,
    )  # fmt: skip
    return hf.Gemma3ForConditionalGeneration(config)


def _idefics(name: str) -> Any:
    config = getattr(hf, f"{name}Config")(
        text_config={"model_type": "llama", **TEXT}, vision_config={**SMALL, "image_size": 16, "patch_size": 4},
        scale_factor=2, **IDS,
    )  # fmt: skip
    return getattr(hf, f"{name}ForConditionalGeneration")(config)


def _internvl() -> Any:
    config = hf.InternVLConfig(
        text_config={"model_type": "qwen2", **TEXT},
        vision_config={**SMALL, "image_size": [16, 16], "patch_size": [4, 4]},
        image_token_id=IMAGE_ID, downsample_ratio=0.5, image_seq_length=IMAGE_TOKENS,
    )  # fmt: skip
    return hf.InternVLForConditionalGeneration(config)


CLASSES: dict[str, Callable[[], Any]] = {
    "llava": _llava,
    "llava_next": _llava_next,
    "llava_onevision": _llava_onevision,
    "qwen2_5_vl": _qwen25,
    "qwen3_vl": _qwen3,
    "gemma3": _gemma3,
    "idefics3": lambda: _idefics("Idefics3"),
    "smolvlm": lambda: _idefics("SmolVLM"),
    "internvl": _internvl,
}


def tiny(name: str) -> Any:
    """A seeded float64 model in evaluation mode, without a cache in its plain forward."""
    torch.manual_seed(0)
    model = CLASSES[name]().double().eval()
    model.config.get_text_config().use_cache = False
    model.generation_config.eos_token_id = None
    return model


@dataclass(frozen=True)
class Rows:
    """Rows of one length, as layouts say, for one class."""

    name: str
    layouts: tuple[str, ...]
    sidecars: tuple[Sidecars, ...]

    @classmethod
    def of(cls, name: str, *layouts: str) -> Rows:
        return cls(name, layouts, tuple(parse_layout(layout) for layout in layouts))

    @property
    def ids(self) -> torch.Tensor:
        rows = []
        for number, row in enumerate(self.sidecars):
            generator = torch.Generator().manual_seed(number)
            ids = torch.randint(3, IMAGE_ID, (len(row),), generator=generator)
            ids[row.modality == 1], ids[row.segment == 0] = IMAGE_ID, PAD
            rows.append(ids)
        return torch.stack(rows)

    @property
    def segment(self) -> torch.Tensor:
        return torch.stack([row.segment for row in self.sidecars])

    @property
    def generated(self) -> torch.Tensor:
        return torch.stack([row.generated for row in self.sidecars]) == 1

    @property
    def labels(self) -> torch.Tensor:
        return torch.where(self.generated, self.ids, -100)

    def with_spans(self, header: int, end: int) -> torch.Tensor:
        """The ids with ``header`` before each answer and ``end`` as its last token, and nowhere else."""
        ids, marks = self.ids, F.pad(self.generated.int(), (0, 1))
        ids = torch.where((ids == header) | (ids == end), header + 2, ids)
        begins, ends = marks[:, 1:] > marks[:, :-1], marks[:, 1:] < marks[:, :-1]
        return torch.where(begins, header, torch.where(ends, end, ids))

    def dense(self, policy: str) -> torch.Tensor:
        """The oracle's masks, bool[B, 1, T, T]."""
        return torch.stack([dense_mask(policy, row) for row in self.sidecars])[:, None]

    def media(self) -> dict[str, torch.Tensor]:
        """The images' pixels, seeded by row and place, as the class takes them."""
        counts = [int(row.instance.max()) + 1 for row in self.sidecars]
        images = [_pixels(row, place) for row, count in enumerate(counts) for place in range(count)]
        if not images:
            return {}
        if self.name.startswith("qwen"):
            patches = torch.cat([image.view(-1).repeat(2)[: 16 * 96].view(16, 96) for image in images])
            return {"pixel_values": patches, "image_grid_thw": torch.tensor([[1, 4, 4]] * len(images))}
        if self.name in ("llava_next", "llava_onevision"):  # one tile of the whole image and two of its halves
            tiles = torch.stack(
                [torch.stack([image[:, :8, :8], image[:, 8:, :8], image[:, :8, 8:]]) for image in images]
            )
            return {"pixel_values": tiles, "image_sizes": torch.tensor([[8, 16]] * len(images))}
        if self.name in ("idefics3", "smolvlm"):
            most, queue = max(counts), iter(images)
            rows = [[next(queue) for _ in range(count)] for count in counts]
            blank = torch.zeros(3, 16, 16, dtype=torch.float64)
            return {"pixel_values": torch.stack([torch.stack(row + [blank] * (most - len(row))) for row in rows])}
        return {"pixel_values": torch.stack(images)}

    def positions(self, model: Any) -> torch.Tensor:
        """Packed positions: [B, T], or four planes for models of several."""
        plain = torch.stack([position_ids(row) for row in self.sidecars])
        if not self.name.startswith("qwen"):
            return plain
        planes = plain[None].repeat(4, 1, 1)
        for row, sidecars in enumerate(self.sidecars):
            for number in range(1, int(sidecars.segment.max()) + 1):
                own = sidecars.segment == number
                kinds = sidecars.modality[own][None]
                grid = torch.tensor([[1, 4, 4]] * (int(kinds.sum()) // IMAGE_TOKENS)).view(-1, 3)
                options = {"mm_token_type_ids": kinds, "attention_mask": torch.ones_like(kinds)}
                found, _ = model.model.get_rope_index(self.ids[row][own][None], image_grid_thw=grid, **options)
                planes[1:, row, own] = found[:, 0]
        return planes

    def inputs(self, model: Any) -> dict[str, Any]:
        """A training batch without its labels."""
        return {"input_ids": self.ids, "position_ids": self.positions(model), **self.media()}

    def left_padded(self, lengths: list[int]) -> dict[str, Any]:
        """The first tokens of each row as a batch of prompts for ``generate``."""
        longest = max(lengths)
        cut = [F.pad(ids[:n], (longest - n, 0), value=PAD) for ids, n in zip(self.ids, lengths, strict=True)]
        mask = [F.pad(torch.ones(n, dtype=torch.long), (longest - n, 0)) for n in lengths]
        ids = torch.stack(cut)
        batch = {"input_ids": ids, "attention_mask": torch.stack(mask), **self.media()}
        if self.name.startswith("qwen"):
            batch["mm_token_type_ids"] = (ids == IMAGE_ID).long()
        return batch


def _pixels(row: int, place: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(100 * row + place)
    return torch.randn(3, 16, 16, generator=generator, dtype=torch.float64)
