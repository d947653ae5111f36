"""Runs that must agree: padded and bare, masks of any dtype, packed and alone, training and generation, the loss."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from typing import Any

import torch

from pipeline.prober.batch import IGNORE, CannotSlice, ProbeBatch
from pipeline.prober.leaks import answer_leaks, sample_leaks, with_cause
from pipeline.prober.report import Finding, Report
from pipeline.prober.subject import EQUAL, Subject, Trace, moved

PAD_TOKENS = 3
MAX_SAMPLES = 4
"""Samples of a batch that are examined alone."""
MAX_ANSWER = 16
"""Tokens of an answer that are decoded."""
NEW_TOKENS = 4
Check = Callable[[Subject, ProbeBatch, Report], Iterator[Finding]]


def mask_dtype(subject: Subject, batch: ProbeBatch, report: Report) -> Iterator[Finding]:
    """Give the batch's attention mask in other dtypes; a 4-D mask of zeros and ones means the same as a bool one."""
    mask = batch.inputs.get("attention_mask")
    if not isinstance(mask, torch.Tensor) or not ((mask == 0) | (mask == 1)).all():
        report.skip("mask dtype", "the batch has no attention_mask of zeros and ones")
        return
    base = subject.run(batch)
    dtypes = (torch.bool,) if mask.dim() == 4 else (torch.bool, torch.int64, torch.float32)
    for dtype in dtypes:
        if dtype == mask.dtype:
            continue
        report.count("mask dtype", int((batch.segment > 0).sum()))
        other = subject.run(batch.with_inputs(attention_mask=mask.to(dtype)))
        if (hit := moved(base.logits, other.logits, EQUAL) & (batch.segment > 0)).any():
            row, token = (int(x) for x in hit.nonzero()[0])
            cause = "a float 4-D mask is added to the logits: pass a bool mask" if mask.dim() == 4 else ""
            text = (
                f"row {row}: token {token} gets other logits when the mask is {_name(dtype)} than {_name(mask.dtype)}"
            )
            yield Finding("mask dtype", text, cause=cause)
            return


def padding(subject: Subject, batch: ProbeBatch, report: Report) -> Iterator[Finding]:
    """Pad single samples left and right: real tokens keep their logits, and no answer leaks."""
    mask = batch.inputs.get("attention_mask")
    if mask is None or mask.dim() != 2:
        report.skip("padding", "the batch has no 2-D attention_mask")
        return
    for alone in _alone(batch, report, "padding"):
        tokens = alone.ids.shape[1]
        base = subject.run(alone)
        for side, (left, right) in {"left": (PAD_TOKENS, 0), "right": (0, PAD_TOKENS)}.items():
            padded = alone.padded(left, right, subject.pad_id)
            logits = subject.run(padded).logits[:, left : left + tokens]
            report.count("padding", tokens)
            if (hit := moved(base.logits, logits, EQUAL)).any():
                token = int(hit[0].nonzero()[0])
                yield Finding("padding", f"{alone.place}: its token {token} gets other logits with {side} padding")
                return
            for finding in answer_leaks(subject, padded, report):
                yield with_cause(finding, f"only with {side} padding of {alone.place}")
                return


def packing(subject: Subject, batch: ProbeBatch, report: Report) -> Iterator[Finding]:
    """Run packed samples alone: the logits are those of the packed row."""
    packed = [place for place in batch.samples() if int(batch.segment[place[0]].max()) > 1]
    if not packed:
        report.skip("packing", "no row of the batch packs several samples")
        return
    base = subject.run(batch)
    for row, start, end in packed[:MAX_SAMPLES]:
        try:
            alone = batch.cut(row, start, end)
        except CannotSlice as error:
            report.skip("packing", str(error))
            return
        report.count("packing", end - start)
        if (hit := moved(base.logits[row : row + 1, start:end], subject.run(alone).logits, EQUAL)).any():
            token = start + int(hit[0].nonzero()[0])
            text = f"row {row}: token {token} of sample {int(batch.segment[row, start])} gets other logits than alone"
            yield Finding("packing", text)
            return


def generation(subject: Subject, batch: ProbeBatch, report: Report) -> Iterator[Finding]:
    """Compare the full forward with what inference does: a forward over the prompt, cached decoding, ``generate``."""
    for alone in _alone(batch, report, "training and generation"):
        full = subject.run(alone)
        with _inference(subject):
            yield from _first(_prompts(subject, alone, full, report))
            if subject.decodes:
                yield from _first(_decoding(subject, alone, full, report))
                yield from _first(_generate(subject, alone, report))
            else:
                report.skip("cached decoding", "the model takes no KV cache")
                report.skip("generate", "the model has no generate()")


def _prompts(subject: Subject, alone: ProbeBatch, full: Trace, report: Report) -> Iterator[Finding]:
    """A prediction of the full forward equals the last one of a forward that ends there."""
    for (token,) in alone.predicts[0].nonzero().tolist()[:MAX_ANSWER]:
        last = subject.run(alone.cut(0, 0, token + 1)).logits[:, -1:]
        report.count("training and generation")
        if moved(full.logits[:, token : token + 1], last, EQUAL).any():
            text = f"{alone.place}: the prediction of its token {token + 1} differs between the full forward"
            yield Finding("training and generation", f"{text} and a forward over its prompt: the masks differ")


def _decoding(subject: Subject, alone: ProbeBatch, full: Trace, report: Report) -> Iterator[Finding]:
    """Prefill up to each answer, decode it with a cache, and compare every prediction."""
    for start, end in _answers(alone):
        prompt = alone.cut(0, 0, start).with_inputs(labels=None)
        with torch.no_grad():
            output = subject.call(prompt.inputs, use_cache=True)
            for token in range(start, min(end, start + MAX_ANSWER)):
                report.count("cached decoding")
                if moved(full.logits[:, token - 1 : token], output.logits[:, -1:], EQUAL).any():
                    text = f"{alone.place}: the prediction of its token {token} differs between the full forward"
                    yield Finding("cached decoding", f"{text} and cached decoding after {start} prefilled tokens")
                    return
                output = subject.call(_next(alone, token), past_key_values=output.past_key_values, use_cache=True)


def _next(alone: ProbeBatch, token: int) -> dict[str, Any]:
    """Return the inputs of one decoding step: the token, its position, and a mask of all tokens so far."""
    inputs: dict[str, Any] = {"input_ids": alone.ids[:, token : token + 1]}
    mask, positions = alone.inputs.get("attention_mask"), alone.inputs.get("position_ids")
    if mask is not None and mask.dim() == 2:
        inputs["attention_mask"] = mask[:, : token + 1]
    if positions is not None:
        inputs["position_ids"] = positions[..., token : token + 1]
    return inputs


def _generate(subject: Subject, alone: ProbeBatch, report: Report) -> Iterator[Finding]:
    """Generate a few tokens after the first prompt and compare their logits with the full forward over them."""
    answers = _answers(alone)
    model: Any = subject.module
    mask = alone.inputs.get("attention_mask")
    if not answers or not hasattr(model, "generate") or (mask is not None and mask.dim() == 4):
        report.skip("generate", "the model has no generate(), or the batch has a 4-D mask, which generate() refuses")
        return
    prompt = alone.cut(0, 0, answers[0][0])
    given = {k: v for k, v in prompt.inputs.items() if k not in ("labels", "position_ids", "generated", "segment")}
    options: dict[str, Any] = {
        "min_new_tokens": NEW_TOKENS,
        "max_new_tokens": NEW_TOKENS,
        "do_sample": False,
        "use_cache": True,
    }
    # Placeholders and ends of turns would not be read as answer text in the full forward.
    banned = {subject.pad_id, subject.image_id, *(int(alone.ids[0, end - 1]) for _, end in answers)}
    options["suppress_tokens"] = sorted(token for token in banned if token is not None)
    done = model.generate(**given, **options, output_logits=True, return_dict_in_generate=True)
    full = subject.run(_continued(prompt, done.sequences[:, prompt.ids.shape[1] :]))
    report.count("generate", NEW_TOKENS)
    expected = full.logits[:, -NEW_TOKENS - 1 : -1].float()  # as generate() returns them
    if (hit := moved(expected, torch.stack(done.logits, 1), EQUAL)).any():
        text = f"{prompt.place}: generated token {int(hit[0].nonzero()[0])} has other logits in generate()"
        yield Finding("generate", f"{text} than in the full forward")


def _continued(prompt: ProbeBatch, new: torch.Tensor) -> ProbeBatch:
    """Return a prompt with generated tokens behind it as a training batch."""
    count = new.shape[1]
    inputs = dict(prompt.inputs)
    tails = {"input_ids": new, "labels": new, "attention_mask": torch.ones_like(new)}
    tails |= {"generated": torch.ones_like(new), "segment": torch.ones_like(new)}
    for key, value in prompt.inputs.items():
        if key in tails:
            inputs[key] = torch.cat([value, tails[key].to(value.dtype)], dim=1)
        elif key == "position_ids":
            inputs[key] = torch.cat([value, value[..., -1:] + 1 + torch.arange(count)], dim=-1)
        elif key in ("token_type_ids", "mm_token_type_ids"):
            inputs[key] = torch.cat([value, torch.zeros_like(new)], dim=1)
    segment = torch.cat([prompt.segment, prompt.segment[:, -1:].expand(-1, count)], 1)
    generated = torch.cat([prompt.generated, torch.ones_like(new, dtype=torch.bool)], 1)
    return replace(prompt, inputs=inputs, segment=segment, generated=generated)


def loss(subject: Subject, batch: ProbeBatch, report: Report) -> Iterator[Finding]:
    """The loss may depend only on logits whose next token belongs to the same document."""
    with torch.enable_grad():
        trace = subject.trace_of(subject.call(batch.inputs))
    if trace.loss is None or not trace.loss.requires_grad or not trace.logits.requires_grad:
        report.skip("loss", "the model returns no loss that depends on its logits")
        return
    (gradient,) = torch.autograd.grad(trace.loss, trace.logits, allow_unused=True)
    if gradient is None:
        report.skip("loss", "the loss does not depend on the returned logits")
        return
    trained = gradient.abs().amax(-1) > 0
    following = torch.roll(batch.segment, -1, dims=1)
    following[:, -1] = 0
    report.count("loss", int(trained.sum()))
    hit = trained & ((following != batch.segment) | (batch.segment == 0))
    if hit.any():
        row, token = (int(x) for x in hit.nonzero()[0])
        text = f"row {row}: token {token}, the last of sample {int(batch.segment[row, token])}, is trained to predict "
        after = f"the first token of sample {int(following[row, token])}" if following[row, token] else "padding"
        yield Finding("loss", text + after, cause=f"set the label of each sample's first token to {IGNORE}")


def plane_cause(subject: Subject, batch: ProbeBatch, report: Report) -> str:
    """Return the cause of a cross-sample leak if four planes of positions remove it (mRoPE); else an empty string."""
    positions = batch.inputs.get("position_ids")
    if positions is None or positions.dim() != 2:
        return ""
    planes = batch.with_inputs(position_ids=positions[None].expand(4, *positions.shape))
    try:
        still = any(sample_leaks(subject, planes, report))
    except (ValueError, RuntimeError, IndexError):  # not a model of several planes
        return ""
    return "" if still else "2-D position_ids do not separate samples under mRoPE: pass [text, t, h, w] planes"


def _answers(alone: ProbeBatch) -> list[tuple[int, int]]:
    """Return (start, end) of every answer that follows a token."""
    marks = alone.generated[0].tolist()
    starts = [place for place in range(1, len(marks)) if marks[place] and not marks[place - 1]]
    return [(start, next((e for e in range(start, len(marks)) if not marks[e]), len(marks))) for start in starts]


def _alone(batch: ProbeBatch, report: Report, check: str) -> Iterator[ProbeBatch]:
    """Yield a few samples as batches of their own."""
    try:
        for row, start, end in islice(batch.samples(), MAX_SAMPLES):
            yield batch.cut(row, start, end)
    except CannotSlice as error:
        report.skip(check, str(error))


def _first(findings: Iterator[Finding]) -> Iterator[Finding]:
    return islice(findings, 1)


@contextmanager
def _inference(subject: Subject) -> Iterator[None]:
    """Put the model into evaluation mode within a block, as at inference."""
    training = subject.module is not None and subject.module.training
    if subject.module is not None:
        subject.module.eval()
    try:
        yield
    finally:
        if subject.module is not None:
            subject.module.train(training)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
