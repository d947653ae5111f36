"""Communication of a rank in one optimizer step, in bytes and in multiples of ZeRO-3's minimum."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass
class Traffic:
    """Bytes and calls since the last `take`; `pipeline.parallel.zero3` counts DeepSpeed's collectives."""

    gathered: int = 0
    """Whole size of gathered weights."""
    reduced: int = 0
    """Whole size of reduce-scattered gradients."""
    sent: int = 0
    """Hidden states and their gradients sent to neighbouring stages."""
    gathers: int = 0
    """All-gather calls."""
    reductions: int = 0
    """Reduce-scatter calls."""

    def take(self) -> Traffic:
        """Return the counts and start again from zero."""
        counted = replace(self)
        for name in vars(counted):
            setattr(self, name, 0)
        return counted


@dataclass(frozen=True)
class StepTraffic:
    """One rank's traffic of a step as metrics.jsonl has it; all 0 where a stage has a single rank."""

    gather_x: float
    """Gathered bytes over the bytes of the stage's parameters; 1 = each gathered once."""
    reduce_x: float
    """Reduced bytes over the bytes of the stage's trained parameters; 1 = each reduced once."""
    sent_bytes: int
    gathers: int = 0
    """All-gather calls."""
    reductions: int = 0
    """Reduce-scatter calls."""

    @classmethod
    def of(cls, counted: Traffic, *, trained: int, frozen: int, size: int) -> StepTraffic:
        """Relate counts to a stage of ``trained`` and ``frozen`` parameters of ``size`` bytes each."""
        gathered = counted.gathered / (size * (trained + frozen))
        reduced = counted.reduced / (size * trained) if trained else 0.0
        return cls(gathered, reduced, counted.sent, counted.gathers, counted.reductions)
