"""Runs one optimizer step's micro-batches through this rank's stage, in the order of a schedule."""

from __future__ import annotations

from collections.abc import Sequence
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
        self, stage: Zero3Stage, *, topology: Topology, groups: Groups, width: int, dtype: torch.dtype, schedule: str
    ) -> None:
        """Bind a stage to its neighbours; ``width`` is the hidden size, ``schedule`` a key of `SCHEDULES`."""
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
                    live[micro] = self._forward(micros[micro], sent)
                    if self._topology.last:
                        losses[micro] = live[micro][1].detach()
                else:
                    self._backward(*live.pop(micro), scale, sent)
            for work, _ in sent:
                work.wait()
        return losses

    def _forward(
        self, inputs: StageInputs, sent: list[tuple[Any, torch.Tensor]]
    ) -> tuple[torch.Tensor | None, torch.Tensor]:
        hidden = None
        if not self._topology.first:
            hidden = self._receive(self._previous, inputs.input_ids.numel(), self._groups.forward).requires_grad_()
        output = self._stage.forward(hidden, inputs)
        if not self._topology.last:
            sent.append(self._send(output.detach(), self._next, self._groups.forward))
        return hidden, output

    def _backward(
        self, hidden: torch.Tensor | None, output: torch.Tensor, scale: float, sent: list[tuple[Any, torch.Tensor]]
    ) -> None:
        if self._topology.last:
            self._stage.backward(output * scale)
        else:
            self._stage.backward(output, self._receive(self._next, output.shape[1], self._groups.backward))
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
