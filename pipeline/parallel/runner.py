"""Runs one optimizer step's micro-batches through this rank's stage, in the order of a schedule."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from pipeline.data.batches import to_device
from pipeline.model.inputs import StageInputs
from pipeline.parallel.groups import Groups, connect
from pipeline.parallel.messages import Messages
from pipeline.parallel.schedule import SCHEDULES, Action
from pipeline.parallel.simulation import receives
from pipeline.parallel.topology import Topology
from pipeline.parallel.trace import Recorder
from pipeline.parallel.zero3 import Zero3Stage


class _Step:
    """What one optimizer step keeps between actions."""

    def __init__(self, micros: Sequence[StageInputs], scale: float, messages: Messages, device: torch.device) -> None:
        self.micros, self.scale, self.messages = micros, scale, messages
        self.losses = torch.zeros(len(micros), dtype=torch.float64, device=device)
        self.live: dict[tuple[int, int], tuple[torch.Tensor | None, torch.Tensor]] = {}
        """(micro-batch, chunk) -> its input and output, from its forward to its backward."""
        self._device, self._moved = device, dict[int, StageInputs]()

    def inputs(self, micro: int) -> StageInputs:
        """Return a micro-batch on the device, where it stays until it is dropped: a backward may recompute."""
        if micro not in self._moved:
            self._moved[micro] = to_device(self.micros[micro], self._device)
        return self._moved[micro]

    def drop(self, micro: int) -> None:
        """Let a micro-batch go from the device: all of its backwards are done."""
        del self._moved[micro]


class Runner:
    """Moves hidden states forward and their gradients back; nothing else crosses between stages."""

    def __init__(
        self,
        stage: Zero3Stage,
        *,
        topology: Topology,
        groups: Groups,
        width: int,
        dtype: torch.dtype,
        schedule: str,
        chunks: Sequence[range | None] = (None,),
        doing: Callable[[str], None] = lambda words: None,
    ) -> None:
        """Bind a stage to its neighbours; every rank must do so at the same time.

        Args:
            stage: This rank's stage.
            topology: Its place in the grid.
            groups: Its process groups.
            width: Hidden size.
            dtype: Type of hidden states.
            schedule: A key of `SCHEDULES`.
            chunks: Decoder layers of each of the stage's chunks; None = all of its layers.
            doing: Told what is about to be done, in words: what a rank that hangs did last.
        """
        self._stage, self._topology, self._groups = stage, topology, groups
        self._width, self._dtype, self._schedule = width, dtype, schedule
        self._chunks, self._doing = chunks, doing
        self._device = stage.engine.device
        self.recorder = Recorder(self._device, stage.traffic)
        """Sees every forward, backward and wait, when it is told to."""
        connect(topology, groups, self._device)

    def run(self, micros: Sequence[StageInputs], scale: float) -> torch.Tensor:
        """Forward and backward every micro-batch inside one accumulation.

        Args:
            micros: This replica's micro-batches; each is moved to the device for as long as it is needed there.
            scale: What the summed token loss is multiplied by before the backward: data-parallel ranks / global
                targets, since ZeRO averages gradients over the data-parallel ranks.

        Returns:
            float64 [len(micros)]: the *sum* of token losses of each micro-batch (0 but on the last stage).
        """
        place = self._topology.stage, self._topology.pp, len(micros), len(self._chunks)
        order = SCHEDULES[self._schedule](*place)
        step = _Step(micros, scale, self._messages(micros), self._device)
        with self._stage.accumulate():
            for action, coming in zip(order, receives(self._schedule, *place), strict=True):
                for upcoming in coming:
                    step.messages.post(upcoming)
                if action.kind == "F":
                    self._forward(step, action)
                else:
                    self._backward(step, action)
            step.messages.finish()
        return step.losses

    def _messages(self, micros: Sequence[StageInputs]) -> Messages:
        return Messages(
            chunks=len(self._chunks), tokens=[inputs.input_ids.numel() for inputs in micros],
            width=self._width, dtype=self._dtype, topology=self._topology, groups=self._groups, device=self._device,
            traffic=self._stage.traffic,
        )  # fmt: skip

    def _receive(self, step: _Step, action: Action) -> torch.Tensor | None:
        sender = step.messages.sender(action)
        if sender is None:
            return None
        what = "hidden states" if action.kind == "F" else "gradients"
        self._doing(f"waiting for rank {sender}: {what} of {self._name(action)}")
        with self.recorder.span("wait", f"wait for rank {sender}", action):
            return step.messages.take(action)

    def _name(self, action: Action) -> str:
        chunk = f", chunk {action.chunk}" if len(self._chunks) > 1 else ""
        return f"micro-batch {action.micro}{chunk}"

    def _forward(self, step: _Step, action: Action) -> None:
        hidden = self._receive(step, action)
        if hidden is not None:
            hidden.requires_grad_()
        self._doing(f"forward of {self._name(action)}")
        with self.recorder.span("forward", f"F {self._name(action)}", action):
            output = self._stage.forward(hidden, step.inputs(action.micro), self._chunks[action.chunk])
        step.live[action.micro, action.chunk] = hidden, output
        if self._topology.last and action.chunk == len(self._chunks) - 1:
            step.losses[action.micro] = output.detach()
        else:
            step.messages.send(action, output.detach())

    def _backward(self, step: _Step, action: Action) -> None:
        grad = self._receive(step, action)
        hidden, output = step.live.pop((action.micro, action.chunk))
        self._doing(f"backward of {self._name(action)}")
        with self.recorder.span("backward", f"B {self._name(action)}", action):
            self._stage.backward(output * step.scale if grad is None else output, grad)
        if action.chunk == 0:
            step.drop(action.micro)
        if hidden is not None:
            assert hidden.grad is not None, "the stage's output does not depend on its input"
            step.messages.send(action, hidden.grad)
