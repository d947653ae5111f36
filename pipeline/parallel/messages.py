"""Messages between pipeline stages in one step: hidden states forward, their gradients backward."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from pipeline.parallel.groups import Groups
from pipeline.parallel.schedule import Action, downstream, upstream
from pipeline.parallel.topology import Topology
from pipeline.parallel.traffic import Traffic


class Messages:
    """One rank's asynchronous sends, and its receives, posted ahead of use.

    Messages carry no tags, so receives from a rank must be posted in the order of its sends. A message is looked up by
    the action that uses it, which may run after an action whose message is sent later.
    """

    def __init__(
        self,
        *,
        virtual_stages: int,
        tokens: Sequence[int],
        width: int,
        dtype: torch.dtype,
        topology: Topology,
        groups: Groups,
        device: torch.device,
        traffic: Traffic,
    ) -> None:
        """Expect one step's messages.

        Args:
            virtual_stages: Number of virtual stages of a stage.
            tokens: Tokens of each micro-batch: a message is [1, tokens, width] in ``dtype``.
            width: Hidden size.
            dtype: Type of hidden states and of their gradients.
            topology: Place of this rank.
            groups: Its process groups.
            device: Where messages are received.
            traffic: Counts the bytes sent.
        """
        self._tokens, self._width, self._dtype, self._device = tokens, width, dtype, device
        self._topology, self._groups, self._virtual_stages, self._traffic = topology, groups, virtual_stages, traffic
        self._posted: dict[Action, tuple[Any, torch.Tensor]] = {}
        self._sent: deque[tuple[Any, torch.Tensor]] = deque()

    def sender(self, action: Action) -> int | None:
        """Return the rank that sends an action's input; None for tokens and for the loss."""
        peer = upstream(self._topology.stage, action, self._topology.pp, self._virtual_stages)
        return None if peer is None else self._topology.rank_of(peer[0], self._topology.dp_rank)

    def post(self, action: Action) -> None:
        """Post the receive of the message an action needs."""
        peer = upstream(self._topology.stage, action, self._topology.pp, self._virtual_stages)
        assert peer is not None, "the action has no message to receive"
        link, rank = (peer[0], self._topology.stage), self._topology.rank_of(peer[0], self._topology.dp_rank)
        buffer = torch.empty((1, self._tokens[action.microbatch], self._width), dtype=self._dtype, device=self._device)
        self._posted[action] = dist.irecv(buffer, rank, group=self._groups.p2p_groups[link]), buffer

    def take(self, action: Action) -> torch.Tensor:
        """Wait for the message of an action whose receive was posted; on a GPU only the stream waits."""
        work, buffer = self._posted.pop(action)
        work.wait()
        return buffer

    def send(self, action: Action, output: torch.Tensor) -> None:
        """Send an action's output to the next stage in its direction, if there is one."""
        peer = downstream(self._topology.stage, action, self._topology.pp, self._virtual_stages)
        if peer is None:  # the gradient of the embeddings
            return
        while self._sent and self._sent[0][0].is_completed():
            self._sent.popleft()
        output, rank = output.contiguous(), self._topology.rank_of(peer[0], self._topology.dp_rank)
        self._traffic.sent += output.nbytes
        work = dist.isend(output, rank, group=self._groups.p2p_groups[self._topology.stage, peer[0]])
        self._sent.append((work, output))

    def finish(self) -> None:
        """Wait until all sends are complete."""
        assert not self._posted, "a message was received but not used"
        while self._sent:
            self._sent.popleft()[0].wait()
