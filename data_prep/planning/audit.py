"""The supervision audit: counts what each corpus supervises over the draws of a plan, before packs are written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt
from pydantic import ConfigDict

from data_prep.common.errors import UserError
from data_prep.common.typed_json import STRICT, Count
from data_prep.packs import CorpusStats

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class CorpusAudit:
    """Contribution of one corpus to a pack set, over its draws in the plan."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT
    draws: Count
    samples: Count
    """Distinct samples of the corpus."""
    tokens: Count
    targets: Count
    """Supervised tokens."""
    without_target: Count
    """Draws without a supervised token."""
    truncated: Count
    """Draws with a truncated answer."""
    unended: Count
    """Draws whose last target does not end the turn (the model would not learn to stop)."""
    repeated: Count
    """Tokens of earlier turns that other samples also hold (turns: expand)."""
    left_out: Count
    """Later answers of the drawn conversations that no sample holds (turns: first)."""

    @property
    def epochs(self) -> float:
        """Average number of draws per sample."""
        return self.draws / self.samples

    @property
    def target_share(self) -> float:
        """Supervised tokens as a share of all tokens."""
        return self.targets / max(1, self.tokens)

    def __add__(self, other: CorpusAudit) -> CorpusAudit:
        """Return the audit of the draws of both, which are of one corpus."""
        mine, theirs = asdict(self), asdict(other)
        return CorpusAudit(**{name: mine[name] + theirs[name] for name in mine} | {"samples": self.samples})


def audit_samples(stats: npt.NDArray[np.void], times: Ints | int, samples: int) -> CorpusAudit:
    """Count the supervised tokens of samples, each drawn so many times; tokens without prompts.

    Args:
        stats: ``SAMPLE_STATS`` of the samples.
        times: draws of each, or of all of them.
        samples: distinct samples of the corpus.
    """
    drawn = np.broadcast_to(np.asarray(times, dtype=np.int64), len(stats))

    def count(values: npt.NDArray[np.generic]) -> int:
        return int(np.dot(drawn, values.astype(np.int64)))

    return CorpusAudit(
        draws=int(drawn.sum()),
        samples=samples,
        tokens=count(stats["tokens"]),
        targets=count(stats["targets"]),
        without_target=count(stats["targets"] == 0),
        truncated=count(stats["truncated"]),
        unended=count(~stats["ended"]),
        repeated=count(stats["repeated"]),
        left_out=count(stats["left_out"]),
    )


def check_audit(name: str, audits: Mapping[str, CorpusAudit]) -> None:
    """Refuse a pack set that supervises no token, or a corpus whose answers never supervise their end.

    Raises:
        UserError: no token of the set is supervised, or no draw of a corpus supervises its end of turn.
    """
    if sum(audit.targets for audit in audits.values()) == 0:
        raise UserError(f"packs.{name}: no token would be supervised, so the loss would be 0; fix template or corpora")
    for corpus, audit in audits.items():
        if audit.draws and audit.unended == audit.draws:
            raise UserError(
                f"packs.{name}.corpora.{corpus}: no draw supervises its end of turn "
                f"({audit.truncated} of {audit.draws} are truncated): raise max_text_tokens or seq_len"
            )


def warnings(name: str, audits: Mapping[str, CorpusAudit]) -> list[str]:
    """Return notes about truncated, missing and repeated answers, which are allowed but worth a check."""
    lines = []
    for corpus, audit in audits.items():
        place = f"note: packs.{name}.corpora.{corpus}"
        lines += [f"{place}: {line}" for line in turn_notes(audit)]
        for count, what in ((audit.truncated, "truncated answers"), (audit.without_target, "no target")):
            if count:
                lines.append(f"{place}: {count:,} of {audit.draws:,} draws have {what}")
    return lines


def turn_notes(counts: CorpusAudit | CorpusStats) -> list[str]:
    """Return notes about turns that ``turns`` repeats or drops."""
    lines = []
    if counts.repeated:
        growth = counts.tokens / (counts.tokens - counts.repeated)
        lines.append(f"{counts.repeated:,} tokens repeat earlier turns ({growth:.2f} x the tokens of turns: every)")
    if counts.left_out:
        lines.append(f"{counts.left_out:,} later answers are dropped (turns: first)")
    return lines
