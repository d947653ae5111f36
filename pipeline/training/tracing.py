"""Times steps on request: the measured bubble, and the trace of one step."""

from __future__ import annotations

import torch
import torch.distributed as dist

from data_prep.common.files import write_atomic
from pipeline.parallel.trace import Recorder, Span, chrome_trace, measured_bubble
from pipeline.planning.estimate import GIB, WorkloadEstimate
from pipeline.planning.run_plan import RunPlan
from pipeline.training.run.folder import RunFolder


class StepTimer:
    """Records the steps that ``log.traffic`` and ``log.trace_step`` select; the same on every rank."""

    def __init__(self, plan: RunPlan, folder: RunFolder, recorder: Recorder, device: torch.device) -> None:
        """Time steps with ``recorder``."""
        self._plan, self._folder, self._recorder, self._device = plan, folder, recorder, device
        self._step, self._data_s = 0, 0.0
        self.expected = WorkloadEstimate.of(plan).bubble if plan.topology.pp > 1 else None
        """The bubble expected from the stages' FLOPs."""

    def begin(self, step: int, data_s: float) -> None:
        """Start to record a step, which waited ``data_s`` seconds for its rows."""
        log = self._plan.config.log
        self._step, self._data_s = step, data_s
        if step == log.trace_step:  # start the clocks of all ranks together
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)
            dist.barrier()
        if log.traffic or step == log.trace_step:
            self._recorder.begin()

    def end(self) -> float | None:
        """Return the measured bubble, or None if nothing is recorded or there is one stage; write the trace if due."""
        if not self._recorder.recording:
            return None
        spans = self._recorder.take()
        if self._step == self._plan.config.log.trace_step:
            self._write([Span("data", "wait for rows", -self._data_s, 0.0, None, {}), *spans])
        return measured_bubble(spans, self._device) if self._plan.topology.pp > 1 else None

    def _write(self, spans: list[Span]) -> None:
        topology = self._plan.topology
        of_ranks: list[list[Span]] = [[] for _ in range(topology.world)]
        dist.all_gather_object(of_ranks, spans)
        if topology.rank == 0:
            path = self._folder.path / f"trace-step-{self._step}.json"
            write_atomic(path, chrome_trace(of_ranks, topology))
            print(f"trace of step {self._step}: {path} (open it in ui.perfetto.dev)", flush=True)


def memory_line(plan: RunPlan, device: torch.device) -> str:
    """Return this rank's peak memory on a GPU beside its estimate."""
    peak = torch.cuda.max_memory_allocated(device)
    need = WorkloadEstimate.of(plan).memory(plan.topology.stage).total
    return f"memory   rank {plan.topology.rank} peaked at {peak / GIB:.2f} GiB, estimated {need / GIB:.2f} GiB"
