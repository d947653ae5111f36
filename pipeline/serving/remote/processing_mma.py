"""Processor of an exported MMA model for ``AutoProcessor``: conversations to ids, exactly as in training."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from tokenizers import Tokenizer as FastTokenizer
from transformers.feature_extraction_utils import BatchFeature
from transformers.image_processing_utils import BaseImageProcessor
from transformers.image_utils import load_image
from transformers.processing_utils import ProcessorMixin

from data_prep.example import Example, ImageRef, Turn
from data_prep.text.encoding import Encoded, Ids, Markers, PieceEncoder
from data_prep.text.template import Template
from pipeline.model.preprocess import Preprocess


class MmaImageProcessor(BaseImageProcessor):  # type: ignore[misc]
    """Squashes images to a square and normalises them, as in training."""

    model_input_names: ClassVar[list[str]] = ["pixel_values"]

    def __init__(
        self,
        size: dict[str, int] | None = None,
        image_mean: Sequence[float] = (0.5, 0.5, 0.5),
        image_std: Sequence[float] = (0.5, 0.5, 0.5),
        filter_name: str = "bicubic",
        **kwargs: Any,
    ) -> None:
        """Take the side of the square in pixels (``size["height"]``), mean and std per channel, and the filter."""
        super().__init__(**kwargs)
        self.size = size or {"height": 224, "width": 224}
        self.image_mean, self.image_std = list(image_mean), list(image_std)
        self.filter_name = filter_name

    def preprocess(self, images: Any, return_tensors: Any = None, **kwargs: Any) -> BatchFeature:
        """Return ``pixel_values``, float32[n, 3, S, S], of one image or a list of images, paths or URLs."""
        listed = images if isinstance(images, list | tuple) else [images]
        mean, std = ((row[0], row[1], row[2]) for row in (self.image_mean, self.image_std))
        pixels = Preprocess(int(self.size["height"]), mean, std, self.filter_name).batch([*map(load_image, listed)])
        return BatchFeature({"pixel_values": pixels}, tensor_type=return_tensors)

    def __call__(self, images: Any, **kwargs: Any) -> BatchFeature:
        """See :meth:`preprocess`."""
        return self.preprocess(images, **kwargs)


class MmaProcessor(ProcessorMixin):  # type: ignore[misc]
    """Writes conversations with the training template and encodes them as the training data was encoded.

    ``apply_chat_template(..., tokenize=True)`` is exact: special tokens in the users' text stay text. Text from
    ``tokenize=False`` may be given to the processor itself, which reads special tokens in it, as tokenizers do.
    """

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        chat_template: Any = None,
        mma: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Take the parts, and from ``processor_config.json`` the template and the special tokens (``mma``)."""
        super().__init__(image_processor, tokenizer, chat_template=chat_template)
        self.mma = mma or {}
        self.template = Template(**self.mma["template"])
        self.image_tokens = int(self.mma["image_tokens"])
        marks = self.mma["markers"]
        reserved = {int(index): name for index, name in marks["reserved"].items()}
        markers = Markers(marks["tokens"], reserved, marks["image_id"], marks["size"], tuple(marks["stripping"]))
        self.image_token = reserved[markers.image_id]
        plain = FastTokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        plain.no_padding()
        plain.no_truncation()
        plain.encode_special_tokens = True

        def encode(text: str) -> Ids:
            return np.array(plain.encode(text, add_special_tokens=False).ids, dtype=np.int32)

        self.encoder = PieceEncoder(encode, markers)

    def __call__(self, images: Any = None, text: Any = None, **kwargs: Any) -> BatchFeature:
        """Encode text in which the image token stands once per image.

        Args:
            images: of all texts in reading order; nested lists are flattened.
            text: one text or several.
            kwargs: of the tokenizer; rows are padded on the left.

        Raises:
            ValueError: the texts mark another number of images.
        """
        texts = [text] if isinstance(text, str) else list(text)
        pictures = _flat(images)
        marked = sum(one.count(self.image_token) for one in texts)
        if marked != len(pictures):
            raise ValueError(f"the text marks {marked} images with {self.image_token}, but {len(pictures)} are given")
        whole = [one.replace(self.image_token, self.image_token * self.image_tokens) for one in texts]
        options = {"padding": True, "padding_side": "left", "add_special_tokens": False, "return_tensors": "pt"}
        encoded = self.tokenizer(whole, **{**options, **kwargs})
        kept = {name: encoded[name] for name in ("input_ids", "attention_mask")}
        return BatchFeature({**kept, **self._pixels(pictures)})

    def apply_chat_template(
        self,
        conversation: Any,
        chat_template: Any = None,
        tokenize: bool = False,
        add_generation_prompt: bool = False,
        return_dict: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Write one conversation or several; with ``tokenize`` encode them as in training, padded on the left.

        Args:
            conversation: messages with ``role`` and ``content``: text, or a list of ``{"type": "text", "text": ...}``
                and ``{"type": "image", "image": picture, path or URL}``.
            chat_template: another template; only without ``tokenize``.
            tokenize: return ids instead of text.
            add_generation_prompt: end with the assistant's header; else the last message is the assistant's answer.
            return_dict: return everything the model takes (``input_ids``, ``attention_mask``, ``generated``,
                ``pixel_values``), not just the ids.
            kwargs: of transformers' method, without ``tokenize``.

        Raises:
            ValueError: the template cannot write the conversation.
        """
        if not tokenize:
            return super().apply_chat_template(
                conversation, chat_template=chat_template, add_generation_prompt=add_generation_prompt, **kwargs
            )
        if chat_template is not None:
            raise ValueError("another chat template cannot be encoded as in training: use tokenize=False")
        several = bool(conversation) and not isinstance(conversation[0], dict)
        chats = [_turns(chat) for chat in (conversation if several else [conversation])]
        rows = [self._encode(turns, add_generation_prompt) for turns, _ in chats]
        batch = {**self._batch(rows), **self._pixels([image for _, images in chats for image in images])}
        return BatchFeature(batch) if return_dict else batch["input_ids"]

    def _encode(self, turns: tuple[Turn, ...], prompt: bool) -> Encoded:
        if prompt and turns and turns[-1].role == "assistant":
            raise ValueError("the last message is the assistant's: leave add_generation_prompt out, or drop it")
        kind: Any = "document" if self.template.chat_format is None else "chat"
        example = Example("", turns, kind)
        pieces = self.template.prompt_pieces(turns) if prompt else self.template.pieces(example)
        return self.encoder.encode(pieces, self.image_tokens)

    def _batch(self, rows: list[Encoded]) -> dict[str, torch.Tensor]:
        longest = max(len(row) for row in rows)
        pads = [longest - len(row) for row in rows]
        pad_id = int(self.mma["markers"]["tokens"]["<pad>"])
        ids = [np.pad(row.ids, (pad, 0), constant_values=pad_id) for row, pad in zip(rows, pads, strict=True)]
        real = [np.pad(np.ones(len(row)), (pad, 0)) for row, pad in zip(rows, pads, strict=True)]
        written = [np.pad(row.generated, (pad, 0)) for row, pad in zip(rows, pads, strict=True)]
        columns: dict[str, list[Any]] = {"input_ids": ids, "attention_mask": real, "generated": written}
        return {name: torch.from_numpy(np.stack(column).astype(np.int64)) for name, column in columns.items()}

    def _pixels(self, images: list[Any]) -> dict[str, torch.Tensor]:
        return {"pixel_values": self.image_processor(images)["pixel_values"]} if images else {}

    @property
    def model_input_names(self) -> list[str]:
        """What the model takes."""
        return ["input_ids", "attention_mask", "generated", "pixel_values"]


def _flat(images: Any) -> list[Any]:
    if images is None:
        return []
    if not isinstance(images, list | tuple):
        return [images]
    return [one for image in images for one in _flat(image)]


def _turns(messages: Iterable[dict[str, Any]]) -> tuple[tuple[Turn, ...], list[Any]]:
    """Return the turns of a conversation, and its images in reading order."""
    turns, images = [], []
    for message in messages:
        content = message["content"]
        parts: list[str | ImageRef] = []
        for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
            if part["type"] == "text":
                parts.append(part["text"])
            elif part["type"] in ("image", "image_url"):
                found = next(part[key] for key in ("image", "url", "path", "image_url") if part.get(key) is not None)
                images.append(found["url"] if isinstance(found, dict) else found)
                parts.append(ImageRef(f"image {len(images)}"))
            else:
                raise ValueError(f"a message holds {part['type']!r}: only text and image are supported")
        turns.append(Turn(message["role"], tuple(parts)))
    return tuple(turns), images


__all__ = ["MmaImageProcessor", "MmaProcessor"]
