"""Runs the micro-batches of one optimizer step through this rank's stage, in the order of a schedule."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch

from pipeline.data.batches import to_device
from pipeline.model.inputs import StageInputs
from pipeline.parallel.groups import Groups, connect
from pipeline.parallel.messages import Messages
from pipeline.parallel.schedule import ORDERS, Action
from pipeline.parallel.simulation import receives
from pipeline.parallel.topology import Topology
from pipeline.parallel.trace import Recorder
from pipeline.parallel.zero3 import Zero3Stage


class _Step:
    """The state of one optimizer step between actions."""

    def __init__(
        self, microbatches: Sequence[StageInputs], scale: float, messages: Messages, device: torch.device
    ) -> None:
        self.microbatches, self.scale, self.messages = microbatches, scale, messages
        self.losses = torch.zeros(len(microbatches), dtype=torch.float64, device=device)
        self.live: dict[tuple[int, int], tuple[torch.Tensor | None, torch.Tensor]] = {}
        """(micro-batch, virtual stage) -> its input and output, from its forward to its backward."""
        self._device, self._moved = device, dict[int, StageInputs]()

    def inputs(self, microbatch: int) -> StageInputs:
        """Return a micro-batch on the device, where it stays until it is dropped: its backward may recompute."""
        if microbatch not in self._moved:
            self._moved[microbatch] = to_device(self.microbatches[microbatch], self._device)
        return self._moved[microbatch]

    def drop(self, microbatch: int) -> None:
        """Free a micro-batch on the device: all of its backwards are done."""
        del self._moved[microbatch]


class Runner:
    """Moves hidden states forward and their gradients backward; nothing else travels between stages."""

    def __init__(
        self,
        stage: Zero3Stage,
        *,
        topology: Topology,
        groups: Groups,
        width: int,
        dtype: torch.dtype,
        schedule: str,
        virtual_stages: Sequence[range | None] = (None,),
        progress_callback: Callable[[str], None] = lambda activity: None,
    ) -> None:
        """Connect a stage to its neighbours. Collective.

        Args:
            stage: This rank's stage.
            topology: Its place in the grid.
            groups: Its process groups.
            width: Hidden size.
            dtype: Type of hidden states.
            schedule: A key of `SCHEDULES` in `pipeline.parallel.schedule`.
            virtual_stages: Decoder layers of each virtual stage; None = all layers of the stage.
            progress_callback: Called with each activity as it begins, for the report on a rank that hangs.
        """
        self._stage, self._topology, self._groups = stage, topology, groups
        self._width, self._dtype, self._schedule = width, dtype, schedule
        self._virtual_stages, self._progress_callback = virtual_stages, progress_callback
        self._device = stage.engine.device
        self.recorder = Recorder(self._device, stage.traffic)
        """Records every forward, backward and wait of a step, on request."""
        connect(topology, groups, self._device)

    def run(self, microbatches: Sequence[StageInputs], scale: float) -> torch.Tensor:
        """Forward and backward every micro-batch inside one accumulation.

        Args:
            microbatches: This dp rank's micro-batches; each is on the device only while it is needed.
            scale: Factor of the summed token loss before the backward: data-parallel ranks / global targets, since ZeRO
                averages gradients over the data-parallel ranks.

        Returns:
            float64 [len(microbatches)]: the *sum* of token losses of each micro-batch (0 except on the last stage).
        """
        step = _Step(microbatches, scale, self._messages(microbatches), self._device)
        with self._stage.accumulate():
            for action in self._actions(self._schedule, step):
                if action.kind == "F":
                    self._forward(step, action)
                else:
                    self._backward(step, action)
            step.messages.finish()
        return step.losses

    def evaluate(self, microbatches: Sequence[StageInputs]) -> list[torch.Tensor]:
        """Forward micro-batches without gradients, inside `Zero3Stage.inference`.

        Returns the model's output for each, in order; on all stages but the last an empty list.
        """
        step, outputs = _Step(microbatches, 1.0, self._messages(microbatches), self._device), []
        for action in self._actions("forward_only", step):
            output = self._output(step, action, self._receive(step, action))
            if action.virtual_stage == len(self._virtual_stages) - 1:
                step.drop(action.microbatch)
            if self._ends(action):
                outputs.append(output)
            else:
                step.messages.send(action, output)
        step.messages.finish()
        return outputs

    def _actions(self, schedule: str, step: _Step) -> Iterator[Action]:
        """Yield this stage's actions in the order of a schedule; receives are posted before the action they precede."""
        place = self._topology.stage, self._topology.pp, len(step.microbatches), len(self._virtual_stages)
        for action, coming in zip(ORDERS[schedule](*place), receives(schedule, *place), strict=True):
            for upcoming in coming:
                step.messages.post(upcoming)
            yield action

    def _ends(self, action: Action) -> bool:
        """Whether a forward ends with the loss."""
        return self._topology.last and action.virtual_stage == len(self._virtual_stages) - 1

    def _messages(self, microbatches: Sequence[StageInputs]) -> Messages:
        return Messages(
            virtual_stages=len(self._virtual_stages), tokens=[inputs.input_ids.numel() for inputs in microbatches],
            width=self._width, dtype=self._dtype, topology=self._topology, groups=self._groups, device=self._device,
            traffic=self._stage.traffic,
        )  # fmt: skip

    def _receive(self, step: _Step, action: Action) -> torch.Tensor | None:
        sender = step.messages.sender(action)
        if sender is None:
            return None
        what = "hidden states" if action.kind == "F" else "gradients"
        self._progress_callback(f"waiting for rank {sender}: {what} of {self._name(action)}")
        with self.recorder.span("wait", f"wait for rank {sender}", action):
            return step.messages.take(action)

    def _name(self, action: Action) -> str:
        virtual_stage = f", virtual stage {action.virtual_stage}" if len(self._virtual_stages) > 1 else ""
        return f"micro-batch {action.microbatch}{virtual_stage}"

    def _forward(self, step: _Step, action: Action) -> None:
        hidden = self._receive(step, action)
        if hidden is not None:
            hidden.requires_grad_()
        output = self._output(step, action, hidden)
        step.live[action.microbatch, action.virtual_stage] = hidden, output
        if self._ends(action):
            step.losses[action.microbatch] = output.detach()
        else:
            step.messages.send(action, output.detach())

    def _output(self, step: _Step, action: Action, hidden: torch.Tensor | None) -> torch.Tensor:
        self._progress_callback(f"forward of {self._name(action)}")
        with self.recorder.span("forward", f"F {self._name(action)}", action):
            return self._stage.forward(
                hidden, step.inputs(action.microbatch), self._virtual_stages[action.virtual_stage]
            )

    def _backward(self, step: _Step, action: Action) -> None:
        grad = self._receive(step, action)
        hidden, output = step.live.pop((action.microbatch, action.virtual_stage))
        self._progress_callback(f"backward of {self._name(action)}")
        with self.recorder.span("backward", f"B {self._name(action)}", action):
            self._stage.backward(output * step.scale if grad is None else output, grad)
        if action.virtual_stage == 0:
            step.drop(action.microbatch)
        if hidden is not None:
            assert hidden.grad is not None, "the stage's output does not depend on its input"
            step.messages.send(action, hidden.grad)
