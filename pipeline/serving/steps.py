"""Single steps of generation, for continuous batching: prefill one prompt, then decode any set of prompts together.

``generate`` runs a batch from its prompts to its last token. A server cannot: requests arrive and end at any time. Here
each prompt is prefilled alone under its own policy mask, its keys and values are copied into a row of a
:class:`BatchCache`, and one decoding step takes every row one token further, whatever their lengths. The tokens equal
those of :meth:`MultimodalModel.generate_ids` (up to the rounding of batched matrix products).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from data_prep.common.errors import UserError
from pipeline.attention.gate import GatedKeys
from pipeline.masks import Sidecars
from pipeline.model.inputs import StageInputs
from pipeline.serving.model import MultimodalModel
from pipeline.serving.prefill import GatedCache, PromptBatch, by_layer_type
from pipeline.serving.prompt import Prompt

LAYER_TYPES = {"full_attention", "sliding_attention"}
GROWTH_TOKENS = 64
"""The cache grows in multiples of so many tokens per row."""


@dataclass(frozen=True)
class Prepared:
    """A prompt ready for prefill, on the CPU; its images are reduced to the pixels that the vision tower reads."""

    sidecars: Sidecars
    inputs: StageInputs

    def __len__(self) -> int:
        return len(self.sidecars)


@dataclass(frozen=True)
class Prefilled:
    """A prompt after its prefill."""

    logits: torch.Tensor
    """[V]: of the first new token."""
    keys_values: Sequence[tuple[torch.Tensor, torch.Tensor]]
    """Keys and values of each layer, [1, H_kv, T, D]."""
    next_position: int
    """Position id of the first new token."""


class BatchCache(GatedKeys, Cache):  # type: ignore[misc]
    """Keys and values of several sequences, one per row, each of its own length.

    Rows are dense: 0 .. rows - 1 are in use. Memory is one tensor [rows, H_kv, tokens, D] per layer and side, which
    grows as needed and is dropped with the last row.
    """

    def __init__(self, layers: int) -> None:
        """An empty cache for a model of ``layers`` layers."""
        self.lengths: list[int] = []
        """Tokens in each row."""
        self.capacity = (0, 0)
        """Allocated rows, and tokens per row."""
        super().__init__(layers=[_BatchLayer() for _ in range(layers)])

    @property
    def rows(self) -> int:
        """Rows in use."""
        return len(self.lengths)

    def add(self, prefilled: Prefilled, tokens: int) -> int:
        """Copy a prompt's keys and values into a new row with space for ``tokens``; return the row."""
        rows, longest = self.capacity
        wanted = -(-tokens // GROWTH_TOKENS) * GROWTH_TOKENS
        self.capacity = (max(rows, self.rows + 1), max(longest, wanted))
        length = prefilled.keys_values[0][0].shape[2]
        for layer, (keys, values) in zip(self.layers, prefilled.keys_values, strict=True):
            layer.grow(self.capacity, keys, values)
            layer.keys[self.rows, :, :length] = keys[0]
            layer.values[self.rows, :, :length] = values[0]
        self.lengths.append(length)
        return self.rows - 1

    def remove(self, row: int) -> None:
        """Free a row: the last row moves into its place."""
        last = self.rows - 1
        if row != last:
            length = self.lengths[last]
            for layer in self.layers:
                layer.keys[row, :, :length] = layer.keys[last, :, :length]
                layer.values[row, :, :length] = layer.values[last, :, :length]
            self.lengths[row] = length
        self.lengths.pop()
        if not self.lengths:
            self.clear()

    def clear(self) -> None:
        """Free all rows and the memory."""
        self.lengths, self.capacity = [], (0, 0)
        for layer in self.layers:
            layer.keys = layer.values = None

    def begin_step(self, device: torch.device) -> torch.Tensor:
        """Prepare one decoding step of all rows; return the index of each row's new token, int64[rows]."""
        index_B = torch.tensor(self.lengths, device=device)
        for layer in self.layers:
            layer.index_B, layer.longest = index_B, max(self.lengths) + 1
        return index_B

    def end_step(self) -> None:
        """Count the token that the step has added to every row."""
        self.lengths = [length + 1 for length in self.lengths]


class _BatchLayer(CacheLayerMixin):  # type: ignore[misc]
    """One layer of a :class:`BatchCache`. Sliding layers keep every token too; the mask hides what is outside."""

    is_sliding = False
    keys: torch.Tensor | None
    values: torch.Tensor | None
    index_B: torch.Tensor
    longest: int

    def grow(self, capacity: tuple[int, int], keys: torch.Tensor, values: torch.Tensor) -> None:
        """Make room for ``capacity`` = (rows, tokens per row) of keys and values like those given."""
        self.keys = _grown(self.keys, capacity, keys)
        self.values = _grown(self.values, capacity, values)

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Write each row's new token at its own index; return the keys and values up to the longest row."""
        assert self.keys is not None and self.values is not None
        rows = torch.arange(len(self.index_B), device=self.index_B.device)
        self.keys[rows, :, self.index_B] = key_states[:, :, 0]
        self.values[rows, :, self.index_B] = value_states[:, :, 0]
        used = (slice(len(self.index_B)), slice(None), slice(self.longest))
        return self.keys[used], self.values[used]

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Do nothing: rows are added by :meth:`BatchCache.add`."""

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return (keys, offset of the first key)."""
        return self.longest, 0

    def get_seq_length(self) -> int:
        """Return the tokens before this step in the longest row."""
        return self.longest - 1

    def get_max_length(self) -> int:
        """Return -1: no maximum."""
        return -1


def _grown(old: torch.Tensor | None, capacity: tuple[int, int], like: torch.Tensor) -> torch.Tensor:
    if old is not None and (old.shape[0], old.shape[2]) == capacity:
        return old
    new = like.new_zeros(capacity[0], like.shape[1], capacity[1], like.shape[3])
    if old is not None:
        new[: old.shape[0], :, : old.shape[2]] = old
    return new


class StepModel:
    """A model, one step at a time. ``prepare`` may be called from any thread, the rest from one thread only."""

    def __init__(self, model: MultimodalModel) -> None:
        """Wrap a loaded model. Raises UserError for a family whose layers keep something else than keys and values."""
        self.model = model
        self._llm = model.llm
        self._window = model.spec.llm_family.sliding_window(model.spec.llm)
        other = {*(getattr(self._llm.config, "layer_types", None) or ())} - LAYER_TYPES
        if other:
            raise UserError(
                f"{model.spec.llm.model_type} has layers of type {', '.join(sorted(other))}, which cannot be batched "
                "continuously: use mma generate"
            )

    def cache(self) -> BatchCache:
        """Return an empty cache."""
        cache = BatchCache(self.model.spec.layers)
        cache.gates = self.model.gates
        return cache

    @property
    def bytes_per_token(self) -> int:
        """Cache memory of one token."""
        config = self._llm.config
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        weight: torch.Tensor = self._llm.lm_head.weight
        bias = self.model.gates[0].shape.rank if self.model.gates else 0  # keys hold the gate's dimensions too
        return int(self.model.spec.layers * heads * (2 * width + bias) * weight.element_size())

    def prepare(self, prompt: Prompt, new_tokens: int) -> Prepared:
        """Turn a prompt into tensors on the CPU.

        Raises:
            UserError: the prompt and ``new_tokens`` exceed the model's positions or its sliding window.
        """
        self.model.check_length(len(prompt.encoded), new_tokens)
        return Prepared(prompt.sidecars, self.model.inputs(prompt, "cpu"))

    @torch.inference_mode()
    def prefill(self, prepared: Prepared) -> Prefilled:
        """Run a prompt through the model in one pass under its policy mask."""
        embeds_TD = self.model.stage.embed(prepared.inputs.to(self.model.device))[0]
        batch = PromptBatch.of(self.model.policy, [(prepared.sidecars, embeds_TD)])
        cache = GatedCache()
        cache.gates, cache.visual = self.model.gates, batch.visual
        out = self._llm(
            inputs_embeds=batch.embeds,
            attention_mask=by_layer_type(self._llm.config, batch.prefill_mask),
            position_ids=batch.position_ids,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        keys_values = [(layer.keys, layer.values) for layer in cache.layers]
        return Prefilled(out.logits[0, -1], keys_values, int(batch.position_ids[0, -1]) + 1)

    @torch.inference_mode()
    def decode(self, cache: BatchCache, ids: Sequence[int], positions: Sequence[int]) -> torch.Tensor:
        """Take every row of a cache one token further.

        Args:
            cache: with B rows.
            ids: the last token of each row, which the cache does not hold yet.
            positions: its position id.

        Returns:
            Logits of the next token, [B, V].
        """
        assert cache.rows == len(ids) == len(positions) > 0
        device = self.model.device
        index_B = cache.begin_step(device)
        keys = torch.arange(max(cache.lengths) + 1, device=device)
        past_BK = keys <= index_B[:, None]
        near_BK = past_BK if self._window is None else past_BK & (keys > index_B[:, None] - self._window)
        out = self._llm(
            input_ids=torch.tensor(ids, device=device)[:, None],
            attention_mask=by_layer_type(self._llm.config, past_BK[:, None, None], near_BK[:, None, None]),
            position_ids=torch.tensor(positions, device=device)[:, None],
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        cache.end_step()
        logits: torch.Tensor = out.logits[:, -1]
        return logits
