"""Leaks within one forward pass: replace tokens, see which predictions move, and trace the path through the layers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch

from pipeline.prober.batch import ProbeBatch
from pipeline.prober.report import Finding, Report
from pipeline.prober.subject import Subject, Trace, moved

MAX_TRIALS = 24
"""Replacements tried per batch and check; they are spread over the targets."""


def answer_leaks(subject: Subject, batch: ProbeBatch, report: Report) -> Iterator[Finding]:
    """Replace everything from a target on: no prediction up to it may move. Then the same by gradients."""
    predicts = batch.predicts
    if not predicts.any():
        report.skip("answer leak", "no answer token has a token before it")
        return
    base = subject.run(batch)
    for boundary in _boundaries(predicts):
        where = _from_boundary(batch, boundary)
        earlier = torch.arange(predicts.shape[1]) < boundary[:, None]
        hit = moved(base.logits, subject.run_replaced(batch, where).logits) & predicts & earlier
        report.count("answer leak", int((predicts & earlier).sum()))
        if hit.any():
            yield _answer_leak(subject, batch, hit)
            return
    yield from _answer_leak_by_gradient(subject, batch, report)


def _answer_leak(subject: Subject, batch: ProbeBatch, hit: torch.Tensor) -> Finding:
    row, token = (int(x) for x in hit.nonzero()[0])
    later = (batch.segment[row] == batch.segment[row, token]) & (torch.arange(hit.shape[1]) > token)
    return _locate(subject, batch, "answer leak", row, token, later)


def _answer_leak_by_gradient(subject: Subject, batch: ProbeBatch, report: Report) -> Iterator[Finding]:
    """The derivative of a prediction by any later token, or by another sample, must be exactly zero."""
    trace = _differentiable(subject, batch)
    if trace is None:
        return
    later = torch.arange(batch.ids.shape[1])
    for row, token in _spread(batch.predicts.nonzero(), MAX_TRIALS // 3):
        slopes = _slopes(trace, trace.logits[row, token], 0, row)
        own = batch.segment[row] == batch.segment[row, token]
        report.count("answer leak", int((later > token).sum()))
        if (slopes[own & (later > token)] > 0).any():
            yield _locate(subject, batch, "answer leak", row, token, own & (later > token))
            return


def sample_leaks(subject: Subject, batch: ProbeBatch, report: Report) -> Iterator[Finding]:
    """Replace one packed sample of every row at a time, then the padding: no token of another sample may move."""
    base = subject.run(batch)
    for number in range(int(batch.segment.max()) + 1):
        where = batch.segment == number
        others = (batch.segment > 0) & ~where & where.any(1, keepdim=True)
        check = "cross-sample leak" if number else "padding"
        if not others.any() or (not number and not subject.layers(batch)):
            continue
        hit = moved(base.logits, subject.run_replaced(batch, where).logits) & others
        report.count(check, int(others.sum()))
        if hit.any():
            row, token = (int(x) for x in hit.nonzero()[0])
            yield _locate(subject, batch, check, row, token, where[row])
            if number:
                return


def _locate(subject: Subject, batch: ProbeBatch, check: str, row: int, token: int, forbidden: torch.Tensor) -> Finding:
    """Name the forbidden token that a token reads most, and the layers and tokens on the way."""
    source = _strongest(subject, batch, row, token, forbidden)
    layer, path = _path(subject, batch, row, token, source)
    texts = {
        "answer leak": f"the prediction of token {token + 1} (made at token {token}) reads token {source}",
        "cross-sample leak": f"token {token} of sample {int(batch.segment[row, token])} reads token {source} of "
        f"sample {int(batch.segment[row, source])}",
        "padding": f"token {token} reads padding token {source}",
    }
    if layer is None:
        where = "layer unknown, because no decoder layers were found"
        return Finding(check, f"row {row}: {texts[check]} ({where})")
    steps = " -> ".join(str(step) for step in path)
    depth = len(subject.layers(batch))
    return Finding(check, f"row {row}: {texts[check]} after layer {layer} of {depth} ({steps})", layer, path)


def _strongest(subject: Subject, batch: ProbeBatch, row: int, token: int, forbidden: torch.Tensor) -> int:
    """Return the forbidden token that influences ``token`` most: by gradient, else by replacing one at a time."""
    trace = _differentiable(subject, batch)
    if trace is not None:
        slopes = torch.where(forbidden, _slopes(trace, trace.logits[row, token], 0, row), -1.0)
        if slopes.max() > 0:
            return int(slopes.argmax())
    base = subject.run(batch)
    candidates = forbidden.nonzero().squeeze(1).tolist()
    changes: dict[int, float] = {}
    for source in candidates[:MAX_TRIALS]:
        where = torch.zeros_like(batch.generated)
        where[row, source] = True
        changes[source] = float((subject.run_replaced(batch, where).logits - base.logits)[row, token].abs().max())
    return max(changes, key=lambda source: changes[source])


def _path(subject: Subject, batch: ProbeBatch, row: int, token: int, source: int) -> tuple[int | None, tuple[int, ...]]:
    """Return the first layer after which ``source`` moves ``token``, and the tokens on the way; None if unknown."""
    if not subject.layers(batch):
        return None, ()
    where = torch.zeros_like(batch.generated)
    where[row, source] = True
    base, changed = subject.run_recorded(batch, gradients=False), subject.run_replaced(batch, where, record=True)
    moves = [moved(base.rows(layer), changed.rows(layer))[row] for layer in range(len(base.states))]
    first = next((layer for layer, tokens in enumerate(moves) if tokens[token]), None)
    if first is None:
        return None, ()
    trace = _differentiable(subject, batch)
    path, here = [token], token
    for layer in range(first, 0, -1):
        if moves[layer - 1][here]:
            continue
        here = _read_from(trace, moves[layer - 1], layer, row, here, source)
        path.append(here)
    if path[-1] != source:
        path.append(source)
    return first, tuple(path)


def _read_from(trace: Trace | None, candidates: torch.Tensor, layer: int, row: int, token: int, source: int) -> int:
    """Return which of the moved tokens ``token`` reads in a layer: the source itself, or the strongest."""
    if trace is None:
        return source
    slopes = torch.where(candidates, _slopes(trace, trace.rows(layer)[row, token], layer - 1, row), 0.0)
    return source if slopes[source] > 0 or slopes.max() <= 0 else int(slopes.argmax())


def _slopes(trace: Trace, outputs: torch.Tensor, layer: int, row: int) -> torch.Tensor:
    """Return how much each token's state after ``layer`` layers moves a random projection of ``outputs``; [T]."""
    weights = torch.randn(outputs.shape, generator=torch.Generator().manual_seed(1)).to(outputs)
    (gradient,) = torch.autograd.grad((outputs * weights).sum(), trace.states[layer], retain_graph=True)
    by_token: torch.Tensor = gradient.view(*trace.logits.shape[:2], -1)[row].abs().amax(-1)
    return by_token.float().cpu()


def _differentiable(subject: Subject, batch: ProbeBatch) -> Trace | None:
    """Return a pass whose logits can be differentiated by the first layer's inputs; None if they cannot."""
    trace = subject.run_recorded(batch, gradients=True)
    return trace if trace.states and trace.logits.requires_grad and trace.states[-1].requires_grad else None


def _boundaries(predicts: torch.Tensor) -> Iterator[torch.Tensor]:
    """Yield one target per row, int64[B], until every row's targets are sampled evenly; T where a row has fewer."""
    rows, tokens = predicts.shape
    targets = [[place + 1 for (place,) in predicts[row].nonzero().tolist()] for row in range(rows)]
    picks = [[at for (at,) in _spread(torch.tensor(own).reshape(-1, 1), MAX_TRIALS)] for own in targets]
    for trial in range(max(len(own) for own in picks)):
        yield torch.tensor([own[trial] if trial < len(own) else tokens for own in picks])


def _from_boundary(batch: ProbeBatch, boundary: torch.Tensor) -> torch.Tensor:
    """Mark each row's tokens from its boundary to the end of that sample; bool[B, T]."""
    tokens = batch.ids.shape[1]
    own = batch.segment.gather(1, boundary.clamp_max(tokens - 1)[:, None])
    return (torch.arange(tokens) >= boundary[:, None]) & (batch.segment == own)


def _spread(places: torch.Tensor, most: int) -> list[list[int]]:
    """Return up to ``most`` entries of a list, evenly spread, first and last included."""
    if len(places) > most:
        places = places[torch.linspace(0, len(places) - 1, most).round().long()]
    found: list[list[int]] = places.tolist()
    return found


def with_cause(finding: Finding, cause: str) -> Finding:
    """Return a finding with its cause."""
    return replace(finding, cause=cause)
