"""``probe``: every check on every batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch

from data_prep.common.errors import UserError
from pipeline.prober import consistency
from pipeline.prober.batch import ProbeBatch
from pipeline.prober.leaks import answer_leaks, sample_leaks, with_cause
from pipeline.prober.report import Finding, Report
from pipeline.prober.subject import Subject, moved

_CHECKS: tuple[consistency.Check, ...] = (
    consistency.mask_dtype,
    consistency.padding,
    consistency.packing,
    consistency.generation,
    consistency.loss,
)


def probe(model: Callable[..., Any], batches: Iterable[Mapping[str, Any] | ProbeBatch]) -> Report:
    """Run every check.

    Args:
        model: a module called with a batch's inputs as keywords (transformers' style), or any callable from a batch
            to logits [B, T, V], to (logits, loss), or to an object with ``logits`` and perhaps ``loss``; see
            :class:`Subject`. It is run in its current mode, and in evaluation mode for the checks of inference.
        batches: the model's inputs, at least one batch. ``labels`` (or a mask ``generated``) say which tokens are
            answers; ``segment``, or restarts of ``position_ids``, say which tokens belong to one packed sample.

    Raises:
        UserError: a batch is incomplete, the model is not deterministic, or it computes in half precision.
    """
    subject, report = Subject(model), Report()
    for given in batches:
        batch = given if isinstance(given, ProbeBatch) else ProbeBatch.of(given, image_id=subject.image_id)
        _check_deterministic(subject, batch)
        report.findings += _leaks(subject, batch, report)
        for check in _CHECKS:
            report.findings += check(subject, batch, report)
    if not report.checked.get("answer leak"):
        raise UserError(
            "no batch holds an answer token with a token before it, so no leak could be seen: give real batches"
        )
    report.findings = list({(finding.check, finding.message): finding for finding in report.findings}.values())
    return report


def assert_no_leak(model: Callable[..., Any], batch: Mapping[str, Any] | ProbeBatch) -> None:
    """Fail with every finding if the prober finds a fault; for tests. Arguments and errors as in :func:`probe`."""
    report = probe(model, [batch])
    assert report.ok, "\n".join(str(finding) for finding in report.findings)


def _leaks(subject: Subject, batch: ProbeBatch, report: Report) -> Iterator[Finding]:
    causes = {
        "answer leak": lambda: _answer_cause(subject, batch),
        "cross-sample leak": lambda: consistency.plane_cause(subject, batch, Report()),
    }
    for check in (answer_leaks, sample_leaks):
        for finding in check(subject, batch, report):
            yield with_cause(finding, causes[finding.check]()) if finding.check in causes else finding


def _answer_cause(subject: Subject, batch: ProbeBatch) -> str:
    """Return why an answer leaks if another form of the attention mask removes the leak; else an empty string."""
    mask = batch.inputs.get("attention_mask")
    if not isinstance(mask, torch.Tensor) or not ((mask == 0) | (mask == 1)).all():
        return ""
    forms: dict[str, torch.Tensor | None] = {
        "a 0/1 float mask is added to the logits and hides nothing: pass a bool mask": mask.bool()
    }
    if mask.dim() == 2:
        forms = {"the padding mask replaces the causal mask: without it nothing leaks": None}
    for cause, form in forms.items():
        if not any(answer_leaks(subject, batch.with_inputs(attention_mask=form), Report())):
            return cause
    return ""


def _check_deterministic(subject: Subject, batch: ProbeBatch) -> None:
    first, second = subject.run(batch).logits, subject.run(batch).logits
    real = batch.segment > 0
    if first.shape[:2] != batch.ids.shape:
        raise UserError(
            f"the model returned logits of shape {tuple(first.shape)} for {tuple(batch.ids.shape)} tokens: return them "
            "for every token, [rows, tokens, vocabulary]"
        )
    if not first[real].isfinite().all():
        raise UserError("the model's logits are not finite, so nothing can be compared: check its weights and mask")
    if (moved(first, second) & real).any():
        raise UserError("two runs on one batch differ: set dropout to 0, or call eval() on the model")
