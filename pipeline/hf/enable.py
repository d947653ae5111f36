"""``enable_mma``: a stock Hugging Face vision-language model attends under a policy of this project."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from data_prep.common.errors import UserError, did_you_mean
from pipeline.attention.runs import query_runs
from pipeline.hf.mask import BACKENDS, CURRENT, Call, register
from pipeline.hf.rows import AssistantSpans, BatchReader, Media
from pipeline.masks import Policy, Sidecars, get_policy, position_ids

_ENABLED: WeakKeyDictionary[nn.Module, _Enabled] = WeakKeyDictionary()


@dataclass
class _Enabled:
    """What an enabled model needs at each call, and how to undo it."""

    policy: Policy
    reader: BatchReader
    backend: str
    previous: str
    """The language model's attention implementation before."""
    handles: list[RemovableHandle] = field(default_factory=list)
    open_prompts: WeakKeyDictionary[Any, bool] = field(default_factory=WeakKeyDictionary)
    """Caches, and whether their last call ended within a prompt."""
    seen_images: bool = False
    """Whether a training batch with images has been seen."""
    shifts: WeakKeyDictionary[Any, torch.Tensor] = field(default_factory=WeakKeyDictionary)
    """Caches, and how far behind its index the next position of each row lies; int64[B]. Policies with a grid only."""

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # the mask is built outside the compiled graph
    def before(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Read the batch before the model's forward, unless its wrapper has; take away what only MMA reads."""
        call = {**inspect.signature(type(model).forward).bind_partial(model, *args).arguments, **kwargs}
        ids, cache = call.get("input_ids"), call.get("past_key_values")
        _check_mask(call.get("attention_mask"))
        if CURRENT.get() is None and (ids is None or ids.shape[1] > 1):
            training = model.training and torch.is_grad_enabled()
            rows = self.reader.read(call, training=training)
            self._check_whole_run(cache)
            if training and not self.seen_images:
                self._warn_if_causal(rows)
            device = ids.device if ids is not None else torch.device("cpu")
            CURRENT.set(Call(self.policy, rows, self.backend, device))
        own = {} if self.policy.grid is None else {"position_ids": self._positions(call)}
        return args, {**{key: value for key, value in kwargs.items() if key not in self.reader.own}, **own}

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def after(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Forget the batch, also after an error; note whether its cache ends within a prompt."""
        call, cache = CURRENT.get(), getattr(output, "past_key_values", None)
        CURRENT.set(None)
        if cache is not None:
            self.open_prompts[cache] = call is not None and any(not row.generated[-1] for row in call.rows)
            if call is not None and self.policy.grid is not None:
                shift = torch.tensor([_shift(row, self.policy) for row in call.rows])
                self.shifts[cache] = self.shifts.get(cache, torch.zeros_like(shift)) + shift

    def _positions(self, arguments: dict[str, Any]) -> torch.Tensor:
        """Return the positions of a call, int64[B, T]: image tokens take those of their rings, later ones follow."""
        ids, mask, cache = (arguments.get(name) for name in ("input_ids", "attention_mask", "past_key_values"))
        assert isinstance(ids, torch.Tensor)
        seen = 0 if cache is None else cache.get_seq_length()
        before = torch.full((len(ids),), seen) if mask is None else mask[:, :seen].sum(1).cpu()
        if seen and cache not in self.shifts:
            raise UserError("the cache was filled before MMA was enabled: prefill it with the enabled model")
        if seen:
            before = before - self.shifts[cache]
        call = CURRENT.get()
        rows = (
            torch.zeros_like(ids.cpu())
            if call is None
            else torch.stack([position_ids(row, self.policy.grid) for row in call.rows])
        )
        return (rows + before[:, None]).to(ids.device)

    def _warn_if_causal(self, rows: Sequence[Sidecars]) -> None:
        """Warn when the policy unlocks nothing in the first training batch with images."""
        self.seen_images = any(bool(row.modality.any()) for row in rows)
        if self.policy.unlock is None or not self.seen_images:
            return
        runs = query_runs(self.policy, self.policy.table(Sidecars.concat(rows)))
        later = runs.key_end > runs.end[runs.key_run]
        both_ways = runs.bidirectional & (runs.end - runs.start > 1)
        if not (later.any() or both_ways.any()):
            warnings.warn(_SAME_AS_CAUSAL.format(policy=self.policy.name), stacklevel=2)

    def _check_whole_run(self, cache: Any) -> None:
        if cache is not None and cache.get_seq_length() and self.open_prompts.get(cache):
            raise UserError(
                "a prompt was split over two forward passes, so its images would miss the text of the second: prefill "
                "it whole (no prefill_chunk_size), and decode at least one token before the next turn"
            )


def enable_mma(
    model: PreTrainedModel,
    policy: str = "mma",
    *,
    assistant_spans: AssistantSpans | None = None,
    backend: str = "sdpa",
    grid: tuple[int, int] | None = None,
    allow_leak: bool = False,
) -> PreTrainedModel:
    """Make a stock vision-language model attend under a mask policy, in training and in ``generate``.

    The language model's attention implementation is replaced by a registered one; no code and no weight changes. A
    batch says which tokens are answers by ``labels``, by ``generated`` (bool[B, T], an extra argument of the call), or
    by the assistant spans of the chat template. Packed samples are told apart by ``segment`` (extra), by restarts of
    ``position_ids``, or by an ``attention_mask`` that numbers them.

    Args:
        model: with an image token in its config, and called itself (not a part of it). PEFT's wrapper may be around it.
        policy: a key of ``pipeline.masks.POLICIES``.
        assistant_spans: how the chat template marks answers; needed where labels do not (chat history in prompts).
        backend: ``sdpa``, with a mask of B x T x T bits; ``runsplit``, with gathered keys (flash on CUDA); or ``flex``,
            FlexAttention with a block mask (compiled on CUDA).
        grid: tokens of an image as (rows, columns), for a policy that needs them; every image has one token per cell.
            Positions are then counted by ring.
        allow_leak: accept the ablations whose images see the answers.

    Returns:
        The model.

    Raises:
        UserError: the policy or backend is unknown or cannot be used, or the config names no image token.
    """
    wrapped, model = model, _base(model)
    if backend not in BACKENDS:
        raise UserError(f"unknown backend '{backend}'{did_you_mean(backend, BACKENDS)}; known: {', '.join(BACKENDS)}")
    found = get_policy(policy, allow_leak=allow_leak, grid=grid)
    if found.layers:
        raise UserError(f"policy '{policy}' changes with the layer, which works with this project's own models only")
    if found.grid is not None and hasattr(getattr(model, "model", None), "get_rope_index"):
        raise UserError(f"policy '{policy}' counts positions by ring, which mRoPE cannot express: use another policy")
    if backend == "flex" and found.grid is not None:
        raise UserError(f"backend 'flex' cannot reorder tokens as policy '{policy}' does: use 'sdpa' or 'runsplit'")
    reader = BatchReader(Media.of(model.config), assistant_spans)
    disable_mma(model)
    state = _Enabled(found, reader, backend, model.config.get_text_config()._attn_implementation)
    _set_attention(model, register())
    state.handles = [model.register_forward_hook(state.after, always_call=True)]
    if wrapped is not model:
        state.handles.append(wrapped.register_forward_hook(_forget, always_call=True))
    for module in {wrapped, model}:  # the wrapper, too, and first: other hooks may replace input_ids by embeddings
        state.handles.append(module.register_forward_pre_hook(state.before, with_kwargs=True, prepend=True))
    _ENABLED[model] = state
    return wrapped


_SAME_AS_CAUSAL = (
    "policy '{policy}' is the causal mask in this batch: no question follows an image. Captions are like that; "
    "otherwise the labels train the questions: set their labels to -100 (TRL: prompt-completion data, or "
    "assistant_only_loss=True)"
)


def disable_mma(model: PreTrainedModel) -> PreTrainedModel:
    """Restore the model as it was before :func:`enable_mma`; without effect on other models. Returns the model."""
    state = _ENABLED.pop(_base(model), None)
    if state is not None:
        for handle in state.handles:
            handle.remove()
        _set_attention(_base(model), state.previous)
    return model


def _check_mask(mask: Any) -> None:
    """Raise UserError for a mask that transformers would use in place of the policy's."""
    if mask is not None and not (isinstance(mask, torch.Tensor) and mask.dim() == 2):
        kind = f"a mask of {mask.dim()} dimensions" if isinstance(mask, torch.Tensor) else f"a {type(mask).__name__}"
        raise UserError(
            f"attention_mask is {kind}, which would replace the mask of the policy: pass int[B, T] with 0 for padding, "
            "or 1, 2, ... for the packed samples (LLaMA-Factory: neat_packing: false)"
        )


def _forget(*_: Any) -> None:
    """Forget the batch of a wrapper, also when an error came before the model within it."""
    CURRENT.set(None)


def _base(model: Any) -> PreTrainedModel:
    """Return the transformers model within PEFT's wrapper, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _shift(row: Sidecars, policy: Policy) -> int:
    """Return how far the position after the row's last token lies behind the number of its tokens."""
    return int((row.segment > 0).sum()) - 1 - int(position_ids(row, policy.grid)[-1])


def _set_attention(model: PreTrainedModel, name: str) -> None:
    """Set the attention implementation of the language model only."""
    text = model.config.get_text_config()
    key = next((key for key in model.config.sub_configs if getattr(model.config, key, None) is text), None)
    model.set_attn_implementation(name if key is None else {key: name})
