"""Runs one optimizer step's micro-batches through this rank's stage, in the order of a schedule."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist

from pipeline.model.inputs import StageInputs
from pipeline.parallel.groups import Groups
from pipeline.parallel.schedule import SCHEDULES
from pipeline.parallel.topology import Topology
from pipeline.parallel.zero3 import Zero3Stage


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
        doing: Callable[[str], None] = lambda words: None,
    ) -> None:
        """Bind a stage to its neighbours.

        Args:
            stage: This rank's stage.
            topology: Its place in the grid.
            groups: Its process groups.
            width: Hidden size.
            dtype: Type of hidden states.
            schedule: A key of `SCHEDULES`.
            doing: Told what is about to be done, in words: what a rank that hangs did last.
        """
        self._doing = doing
        self._stage, self._topology, self._groups = stage, topology, groups
        self._width, self._dtype, self._order = width, dtype, SCHEDULES[schedule]
        self._previous = topology.rank - topology.dp
        self._next = topology.rank + topology.dp
        self._device = stage.engine.device

    def run(self, micros: Sequence[StageInputs], scale: float) -> torch.Tensor:
        """Forward and backward every micro-batch inside one accumulation.

        Args:
            micros: This replica's micro-batches.
            scale: What the summed token loss is multiplied by before the backward: data-parallel ranks / global
                targets, since ZeRO averages gradients over the data-parallel ranks.

        Returns:
            float64 [len(micros)]: the *sum* of token losses of each micro-batch (0 but on the last stage).
        """
        losses = torch.zeros(len(micros), dtype=torch.float64, device=self._device)
        live: dict[int, tuple[torch.Tensor | None, torch.Tensor]] = {}
        sent: list[tuple[Any, torch.Tensor]] = []
        with self._stage.accumulate():
            for kind, micro in self._order(self._topology.stage, self._topology.pp, len(micros)):
                if kind == "F":
                    live[micro] = self._forward(micro, micros[micro], sent)
                    if self._topology.last:
                        losses[micro] = live[micro][1].detach()
                else:
                    self._backward(micro, *live.pop(micro), scale, sent)
            for work, _ in sent:
                work.wait()
        return losses

    def _forward(
        self, micro: int, inputs: StageInputs, sent: list[tuple[Any, torch.Tensor]]
    ) -> tuple[torch.Tensor | None, torch.Tensor]:
        hidden = None
        if not self._topology.first:
            self._doing(f"waiting for rank {self._previous}: hidden states of micro-batch {micro}")
            hidden = self._receive(self._previous, inputs.input_ids.numel(), self._groups.forward).requires_grad_()
        self._doing(f"forward of micro-batch {micro}")
        output = self._stage.forward(hidden, inputs)
        if not self._topology.last:
            sent.append(self._send(output.detach(), self._next, self._groups.forward))
        return hidden, output

    def _backward(
        self,
        micro: int,
        hidden: torch.Tensor | None,
        output: torch.Tensor,
        scale: float,
        sent: list[tuple[Any, torch.Tensor]],
    ) -> None:
        grad = None
        if not self._topology.last:
            self._doing(f"waiting for rank {self._next}: gradients of micro-batch {micro}")
            grad = self._receive(self._next, output.shape[1], self._groups.backward)
        self._doing(f"backward of micro-batch {micro}")
        self._stage.backward(output * scale if grad is None else output, grad)
        if hidden is not None:
            assert hidden.grad is not None, "the stage's output does not depend on its input"
            sent.append(self._send(hidden.grad, self._previous, self._groups.backward))

    def _send(self, tensor: torch.Tensor, rank: int, group: Any) -> tuple[Any, torch.Tensor]:
        tensor = tensor.contiguous()
        self._stage.traffic.sent += tensor.nbytes
        return dist.isend(tensor, rank, group=group), tensor

    def _receive(self, rank: int, tokens: int, group: Any) -> torch.Tensor:
        buffer = torch.empty((1, tokens, self._width), dtype=self._dtype, device=self._device)
        dist.recv(buffer, rank, group=group)
        return buffer
