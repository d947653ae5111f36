"""Five faults that reached users of other training stacks, re-made small, each with its fix.

A fault is ``(model, batches)``: the mistake sits in the model's mask, in its loss, or in the collator's batch. The
names work on the command line: ``mma prove --model tests.pipeline.prober.faults:NAME --batches ...:NAME_batches``.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
import transformers
from torch import nn
from torch.nn import functional as F

VOCAB, WIDTH, LAYERS = 40, 32, 3
LAYOUT = ((5, 4, 3, 3), (4, 3), (6, 4))
"""Samples of the packed row: lengths of prompt, answer, prompt, ..."""
Batch = dict[str, Any]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        q, k, v = (part.view(*x.shape[:2], 4, -1).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        heads = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        x = x + self.out(heads.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(x)))


class SmallLM(nn.Module):
    """A decoder whose mask and loss can be wrong."""

    def __init__(self, *, padding_replaces: bool = False, isolates: bool = True, crosses: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.padding_replaces, self.isolates, self.crosses = padding_replaces, isolates, crosses
        self.embed, self.positions = nn.Embedding(VOCAB, WIDTH), nn.Embedding(64, WIDTH)
        self.layers = nn.ModuleList(Block() for _ in range(LAYERS))
        self.head = nn.Linear(WIDTH, VOCAB)

    def forward(
        self, input_ids: torch.Tensor, segment: torch.Tensor, attention_mask: Any = None, labels: Any = None
    ) -> SimpleNamespace:
        index = torch.arange(input_ids.shape[1])
        starts = torch.zeros_like(segment)
        starts[:, 1:] = torch.where(segment[:, 1:] != segment[:, :-1], index[1:], 0)
        hidden = self.embed(input_ids) + self.positions(index - starts.cummax(1).values)
        mask = self._mask(input_ids, segment, attention_mask)
        for layer in self.layers:
            hidden = layer(hidden, mask)
        logits = self.head(hidden)
        return SimpleNamespace(logits=logits, loss=None if labels is None else self._loss(logits, labels, segment))

    def _mask(self, ids: torch.Tensor, segment: torch.Tensor, padding: Any) -> torch.Tensor:
        tokens = ids.shape[1]
        mask = torch.ones(tokens, tokens, dtype=torch.bool).tril().expand(len(ids), -1, -1)
        if self.isolates:
            mask = mask & (segment[:, :, None] == segment[:, None])
        if padding is not None:
            seen = padding.bool()[:, None].expand(-1, tokens, -1)
            mask = seen if self.padding_replaces else mask & seen
        return (mask | torch.eye(tokens, dtype=torch.bool))[:, None]

    def _loss(self, logits: torch.Tensor, labels: torch.Tensor, segment: torch.Tensor) -> torch.Tensor:
        targets = labels[:, 1:].clone()
        if not self.crosses:
            targets[segment[:, 1:] != segment[:, :-1]] = -100
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), targets.flatten())


def packed_row(*, pretraining: bool = False) -> Batch:
    """A row of three packed samples; with ``pretraining`` every token is a target, as in plain documents."""
    segment: list[int] = []
    answers: list[int] = []
    for number, lengths in enumerate(LAYOUT, 1):
        for place, length in enumerate(lengths):
            segment += [number] * length
            answers += [place % 2] * length
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, VOCAB, (1, len(segment)), generator=generator)
    trained = torch.ones_like(ids).bool() if pretraining else torch.tensor([answers]).bool()
    return {"input_ids": ids, "labels": torch.where(trained, ids, -100), "segment": torch.tensor([segment])}


def padded_rows() -> Batch:
    """Two samples of different length, padded on the right."""
    row = packed_row()
    own = [row["segment"][0] == number for number in (1, 2)]
    longest = int(own[0].sum())
    pad = [(0, longest - int(mask.sum())) for mask in own]
    stack = {
        key: torch.stack([F.pad(row[key][0][mask], gap, value=fill) for mask, gap in zip(own, pad, strict=True)])
        for key, fill in (("input_ids", 0), ("labels", -100))
    }
    real = (stack["input_ids"] != 0).long()
    return {**stack, "attention_mask": real, "segment": real}


def positions_of(segment: torch.Tensor) -> torch.Tensor:
    return torch.cat([torch.arange(count) for count in torch.unique_consecutive(segment, return_counts=True)[1]])[None]


SIZES = {
    "vocab_size": VOCAB, "hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": LAYERS,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.1, "use_cache": False,
}  # fmt: skip


def llama() -> Any:
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES))


def qwen() -> Any:
    torch.manual_seed(0)
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": WIDTH}
    config = transformers.Qwen2_5_VLConfig(
        text_config={**SIZES, "rope_parameters": rope}, vision_config=vision, image_token_id=VOCAB - 1
    )
    return transformers.Qwen2_5_VLForConditionalGeneration(config)


# 1. A padding mask that replaces the causal mask instead of joining it.
def padding_mask(*, fixed: bool = False) -> Any:
    return SmallLM(padding_replaces=not fixed)


def padding_mask_batches(*, fixed: bool = False) -> list[Batch]:
    return [padded_rows()]


# 2. Samples are packed into one row, and the mask stays plainly causal.
def packed_samples(*, fixed: bool = False) -> Any:
    return SmallLM(isolates=fixed)


def packed_samples_batches(*, fixed: bool = False) -> list[Batch]:
    return [packed_row()]


# 3. Packed rows with 2-D positions: a model of several position planes does not read the samples from them.
def flat_positions(*, fixed: bool = False) -> Any:
    return qwen()


def flat_positions_batches(*, fixed: bool = False) -> list[Batch]:
    row = packed_row()
    positions = positions_of(row.pop("segment")[0])
    return [{**row, "position_ids": positions[None].expand(4, -1, -1) if fixed else positions}]


# 4. The last token of a document is trained to predict the first one of the next document.
def document_loss(*, fixed: bool = False) -> Any:
    return SmallLM(crosses=not fixed)


def document_loss_batches(*, fixed: bool = False) -> list[Batch]:
    return [packed_row(pretraining=True)]


# 5. A 4-D mask of zeros and ones in float: it is added to the logits, so nothing is hidden.
def float_mask(*, fixed: bool = False) -> Any:
    return llama()


def float_mask_batches(*, fixed: bool = False) -> list[Batch]:
    row = packed_row()
    segment = row.pop("segment")
    mask = (segment[:, :, None] == segment[:, None]).tril()[:, None]
    return [{**row, "position_ids": positions_of(segment[0]), "attention_mask": mask if fixed else mask.float()}]


FAULTS = ("padding_mask", "packed_samples", "flat_positions", "document_loss", "float_mask")
