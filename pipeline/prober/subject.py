"""The model under test: run on a batch, with the decoder layers' states recorded or its inputs replaced.

B rows of T tokens, D hidden width, V vocabulary rows, L decoder layers.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from data_prep.common.errors import UserError
from pipeline.prober.batch import TRUTH, ProbeBatch

MOVED = 8.0
"""Two runs of equal shape differ when they differ by more than this many units of rounding."""
EQUAL = 1000.0
"""Two runs of different shape agree within this many units of rounding."""


@dataclass(frozen=True)
class Trace:
    """One forward pass."""

    logits: torch.Tensor
    """[B, T, V]."""
    states: tuple[torch.Tensor, ...] = ()
    """Inputs of the first decoder layer, then the outputs of each, as the layers pass them; empty without layers."""
    loss: torch.Tensor | None = None

    def rows(self, layer: int) -> torch.Tensor:
        """Return the states after ``layer`` layers as [B, T, D]; a model may have joined its rows."""
        return self.states[layer].view(*self.logits.shape[:2], -1)


class Subject:
    """A model as the prober sees it."""

    def __init__(self, model: Callable[..., Any]) -> None:
        """Wrap a model.

        Args:
            model: a module in the style of transformers (called with a batch's inputs as keywords), or any callable
                from a batch to logits [B, T, V], to (logits, loss), or to an object with ``logits``. Decoder layers
                are found in the module itself, or in a callable's ``module`` attribute or ``self``.
        """
        self.model = model
        owner = getattr(model, "module", getattr(model, "__self__", None))
        self.module = model if isinstance(model, nn.Module) else owner if isinstance(owner, nn.Module) else None
        self._names = _parameters_of(model.forward) if isinstance(model, nn.Module) else None
        self._layers: list[nn.Module] | None = None

    @property
    def decodes(self) -> bool:
        """Whether the model takes and returns a KV cache."""
        return self._names is not None and "past_key_values" in self._names

    @property
    def image_id(self) -> int | None:
        """The id at image positions, from the model's config."""
        config = getattr(self.module, "config", None)
        for name in ("image_token_id", "image_token_index"):
            if (found := getattr(config, name, None)) is not None:
                return int(found)
        return None

    @property
    def pad_id(self) -> int:
        """The padding id of the model's config; 0 without one."""
        config: Any = getattr(self.module, "config", None)
        text = config.get_text_config() if hasattr(config, "get_text_config") else config
        pad = getattr(text, "pad_token_id", None)
        return pad if isinstance(pad, int) and pad >= 0 else 0

    def call(self, inputs: Mapping[str, Any], **more: Any) -> Any:
        """Call the model on inputs."""
        if self._names is None:
            return self.model({**inputs, **more})
        known = {key: value for key, value in inputs.items() if key not in TRUTH or key in self._names}
        return self.model(**known, **more)

    def run(self, batch: ProbeBatch) -> Trace:
        """Run without gradients and without hooks."""
        with torch.no_grad():
            return self.trace_of(self.call(batch.inputs))

    def run_replaced(self, batch: ProbeBatch, where: torch.Tensor, *, record: bool = False) -> Trace:
        """Run with the tokens marked in ``where`` (bool[B, T]) replaced by others.

        Their embeddings are replaced before the first decoder layer; without layers to hook, their ids are.
        """
        if not self.layers(batch):
            with torch.no_grad():
                return self.trace_of(self.call({**batch.inputs, "input_ids": _swapped(batch, where)}))
        with torch.no_grad(), self._hooked(batch, _noise(where)) as states:
            trace = self.trace_of(self.call(batch.inputs))
        return Trace(trace.logits, tuple(states) if record else (), trace.loss)

    def run_recorded(self, batch: ProbeBatch, *, gradients: bool) -> Trace:
        """Run with all states recorded; with ``gradients`` they belong to a graph that starts at ``states[0]``."""
        with torch.set_grad_enabled(gradients), self._hooked(batch, _leaf if gradients else None) as states:
            trace = self.trace_of(self.call(batch.inputs))
        return Trace(trace.logits, tuple(states), trace.loss)

    def layers(self, batch: ProbeBatch) -> list[nn.Module]:
        """Return the decoder layers: the longest module list whose members return [B, T, ...]; empty if unknown."""
        if self._layers is None:
            self._layers = [] if self.module is None else self._find_layers(self.module, batch)
        return self._layers

    def _find_layers(self, module: nn.Module, batch: ProbeBatch) -> list[nn.Module]:
        shape, seen = batch.ids.shape, set()

        def look(layer: nn.Module, _: Any, output: Any) -> None:
            state = _state_of(output)
            if state is not None and (state.shape[:2] == shape or state.shape[:2] == (1, shape.numel())):
                seen.add(layer)

        lists = [list(part) for part in module.modules() if isinstance(part, nn.ModuleList)]
        lists += [list(part.values()) for part in module.modules() if isinstance(part, nn.ModuleDict)]
        handles = [layer.register_forward_hook(look) for part in lists for layer in part]
        try:
            self.run(batch)
        finally:
            for handle in handles:
                handle.remove()
        found = [part for part in lists if part and seen.issuperset(part)]
        return max(found, key=len, default=[])

    @contextmanager
    def _hooked(
        self, batch: ProbeBatch, change: Callable[[torch.Tensor], torch.Tensor] | None
    ) -> Iterator[list[torch.Tensor]]:
        """Record the states; ``change`` replaces the inputs of the first layer, [B, T, D]."""
        states: list[torch.Tensor] = []

        def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
            state = args[0] if args else kwargs["hidden_states"]
            if change is not None:
                state = change(state.view(*batch.ids.shape, -1)).view(state.shape)
            states.append(state)
            return ((state, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": state})

        def after(_: nn.Module, args: Any, output: Any) -> None:
            state = _state_of(output)
            assert state is not None
            states.append(state)

        layers = self.layers(batch)
        handles = [layer.register_forward_hook(after) for layer in layers]
        handles += [layers[0].register_forward_pre_hook(before, with_kwargs=True)] if layers else []
        try:
            yield states
        finally:
            for handle in handles:
                handle.remove()

    @staticmethod
    def trace_of(output: Any) -> Trace:
        """Read logits and loss from what the model returned. Raises UserError for half precision."""
        if isinstance(output, torch.Tensor):
            logits, loss = output, None
        elif isinstance(output, tuple):
            logits, loss = output
        else:
            logits, loss = output.logits, getattr(output, "loss", None)
        if logits.dtype in (torch.float16, torch.bfloat16):
            raise UserError(f"the model computes in {logits.dtype}, too coarse for a leak: call float() on it")
        return Trace(logits, loss=loss)


def moved(first: torch.Tensor, second: torch.Tensor, units: float = MOVED) -> torch.Tensor:
    """Return which tokens of two results [B, T, ...] differ by more than ``units`` of rounding; bool[B, T]."""
    scale = max(float(first.abs().max()), float(second.abs().max()), torch.finfo(first.dtype).tiny)
    return (first - second).abs().amax(-1) > units * torch.finfo(first.dtype).eps * scale


def _parameters_of(function: Callable[..., Any]) -> set[str]:
    return set(inspect.signature(function).parameters)


def _state_of(output: Any) -> torch.Tensor | None:
    state = output[0] if isinstance(output, tuple) and output else output
    return state if isinstance(state, torch.Tensor) and state.dim() == 3 else None


def _leaf(state: torch.Tensor) -> torch.Tensor:
    return state.detach().clone().requires_grad_()


def _noise(where: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """Replace the states at ``where`` by random ones of the same scale."""

    def replace(state: torch.Tensor) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(state.shape, generator=generator, dtype=torch.float32).to(state)
        return torch.where(where[..., None], noise * state.std() + state.mean(), state)

    return replace


def _swapped(batch: ProbeBatch, where: torch.Tensor) -> torch.Tensor:
    """Return the ids with text tokens at ``where`` replaced by other text tokens of the batch."""
    text = batch.segment > 0
    if batch.image_id is not None:
        text &= batch.ids != batch.image_id
    known = torch.unique(batch.ids[text])
    if len(known) < 2:
        raise UserError("every token of the batch has the same id, so none can be replaced: give a batch of real text")
    place = torch.searchsorted(known, batch.ids).clamp_max(len(known) - 1)
    return torch.where(where & text, known[(place + 1) % len(known)], batch.ids)
