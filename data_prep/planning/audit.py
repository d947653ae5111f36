"""The supervision audit: counts what each corpus supervises over the draws of a plan, before packs are written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt
from pydantic import ConfigDict

from data_prep.common.errors import UserError
from data_prep.common.typed_json import STRICT, Count
from data_prep.ingest.samples import Chosen
from data_prep.packs import CorpusStats


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


def audit_corpus(draws: Chosen, samples: int, n_tokens: npt.NDArray[np.int32]) -> CorpusAudit:
    """Count the supervised tokens of draws.

    Args:
        draws: the drawn samples of one corpus, with repeats.
        samples: distinct samples of the corpus.
        n_tokens: tokens of each draw, with its prompt.
    """
    stats = draws.stats
    return CorpusAudit(
        draws=len(draws),
        samples=samples,
        tokens=int(n_tokens.sum()),
        targets=int(stats["targets"].sum()),
        without_target=int(np.count_nonzero(stats["targets"] == 0)),
        truncated=int(np.count_nonzero(stats["truncated"])),
        unended=int(np.count_nonzero(~stats["ended"])),
        repeated=int(stats["repeated"].sum()),
        left_out=int(stats["left_out"].sum()),
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
