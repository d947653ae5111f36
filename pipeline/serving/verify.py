"""Checks that a loader of an export computes what training computed: ``mma verify-export``.

Three loaders can be checked against the golden logits of an export: this project's own, plain transformers, and any
server with an OpenAI-compatible API. A loader that runs another mask fails, and the message says whether it ran causal.
"""

from __future__ import annotations

import base64
import json
import os
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from data_prep.common.errors import UserError, one_line, short_repr
from data_prep.example import Turn
from pipeline.serving.export_config import CONFIG
from pipeline.serving.golden import TOLERANCE, GoldenPrompt
from pipeline.serving.hf_files import MODEL_CLASS
from pipeline.serving.model import MultimodalModel

Logits = Callable[[GoldenPrompt], torch.Tensor]
"""Returns a prompt's logits at its positions, [p, V]."""
SERVED_TOLERANCE = 0.25
"""Largest difference of a served log-probability; servers compute in bf16."""
TELLING = 0.05
"""Where the masks give log-probabilities this far apart, a server must be closer to the right one."""
_TIMEOUT_S = 120.0


@dataclass(frozen=True)
class Checked:
    """The outcome of a check that passed."""

    prompts: int
    worst: float
    """Largest difference from the golden values."""
    tells: bool
    """Whether the golden prompts differ under a causal mask by more than the tolerance."""

    def __str__(self) -> str:
        told = "" if self.tells else "; a causal mask would give the same here"
        return f"{self.prompts} golden prompts, largest difference {self.worst:.1e}{told}"


def check_logits(golden: Sequence[GoldenPrompt], logits: Logits, loader: str) -> Checked:
    """Compare a loader's float32 logits with the golden ones.

    Raises UserError when they differ by more than ``TOLERANCE`` times the largest golden logit.
    """
    worst, tells = 0.0, False
    for number, prompt in enumerate(golden, start=1):
        found = logits(prompt).float().cpu()
        limit = TOLERANCE * max(1.0, float(prompt.logits.abs().max()))
        difference, causal = (float((found - one).abs().max()) for one in (prompt.logits, prompt.causal_logits))
        tells |= float((prompt.logits - prompt.causal_logits).abs().max()) > 2 * limit
        if not difference <= limit:
            ran = " It runs a causal mask." if causal <= limit else ""
            raise UserError(
                f"{loader} does not compute this model: logits of golden prompt {number} differ by {difference:.2g}, "
                f"allowed {limit:.1g}.{ran} Use a loader that runs the mask of the export, or export the run again"
            )
        worst = max(worst, difference)
    return Checked(len(golden), worst, tells)


def own_logits(model: MultimodalModel) -> Logits:
    """Return the logits of this project's loader; ``model`` is loaded in float32."""

    def logits(prompt: GoldenPrompt) -> torch.Tensor:
        asked = model.prompt(prompt.turns)
        if asked.encoded.ids.tolist() != prompt.input_ids.tolist():
            raise UserError("the export's tokenizer or template writes a golden prompt differently: export it again")
        return model.logits(asked)[prompt.positions]

    return logits


def transformers_logits(folder: Path) -> Logits:
    """Load an export with plain transformers, which runs the code files of the export, and return its logits.

    Raises UserError when transformers cannot load it.
    """
    from transformers import AutoModelForImageTextToText
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    try:
        raw = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        named = (raw.get("auto_map") or {}).get("AutoModelForImageTextToText")
        # Not by the Auto class: it keeps the first model class of a config class, even when the code file has changed.
        model_class = get_class_from_dynamic_module(named, folder) if named else AutoModelForImageTextToText
        model = model_class.from_pretrained(folder, dtype=torch.float32).eval()
    except (ImportError, OSError, ValueError, TypeError, KeyError, RuntimeError) as error:
        raise UserError(f"transformers cannot load {folder} ({one_line(error)}): export the run again") from error

    @torch.inference_mode()
    def logits(prompt: GoldenPrompt) -> torch.Tensor:
        pixels = {} if prompt.pixel_values is None else {"pixel_values": prompt.pixel_values}
        own = {"generated": prompt.generated[None]} if type(model).__name__ == MODEL_CLASS else {}
        try:
            found: torch.Tensor = model(input_ids=prompt.input_ids[None], **pixels, **own).logits[0, prompt.positions]
        except (ValueError, TypeError, RuntimeError) as error:
            raise UserError(f"transformers cannot run {folder} ({one_line(error)})") from error
        return found

    return logits


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Refuses redirects: they would carry the key to another host."""

    def redirect_request(self, *_: Any) -> None:
        """Follow nothing."""


@dataclass(frozen=True)
class Api:
    """An OpenAI-compatible server."""

    url: str
    """Base URL that ends before ``/chat/completions``."""
    model: str = ""
    """Name of the model; empty: the first one that the server lists."""
    key_variable: str = "MMA_API_KEY"
    """Environment variable with the key."""

    def named(self) -> Api:
        """Return the server with the name of its model."""
        return self if self.model else replace(self, model=str(self._send("/models")["data"][0]["id"]))

    def first_token(self, turns: Sequence[Turn]) -> tuple[str, float | None]:
        """Return the first token of a greedy answer, and its log-probability where the server tells it."""
        body = {
            "model": self.model, "messages": [_message(turn) for turn in turns], "max_tokens": 1, "temperature": 0,
            "logprobs": True, "top_logprobs": 1,
        }  # fmt: skip
        choice = self._send("/chat/completions", body)["choices"][0]
        listed = (choice.get("logprobs") or {}).get("content") or []
        return str(choice["message"]["content"] or ""), float(listed[0]["logprob"]) if listed else None

    def _send(self, path: str, body: Any = None) -> Any:
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get(self.key_variable):
            headers["Authorization"] = f"Bearer {key}"
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url.rstrip("/") + path, data, headers)
        try:
            with urllib.request.build_opener(_NoRedirect).open(request, timeout=_TIMEOUT_S) as reply:
                return json.loads(reply.read(1 << 24))
        except urllib.error.HTTPError as error:
            detail = short_repr(error.read(1 << 12).decode(errors="replace"))
            raise UserError(f"{self.url}{path} answers {error.code}: {detail}") from error
        except (OSError, ValueError) as error:
            raise UserError(f"{self.url}{path} does not answer ({one_line(error)}): start the server first") from error


def _message(turn: Turn) -> dict[str, Any]:
    content: list[dict[str, Any]] = []
    for part in turn.parts:
        if isinstance(part, str):
            content.append({"type": "text", "text": part})
        else:
            data = "data:image/png;base64," + base64.b64encode(part.read()).decode()
            content.append({"type": "image_url", "image_url": {"url": data}})
    text = turn.parts[0] if len(turn.parts) == 1 and isinstance(turn.parts[0], str) else None
    return {"role": turn.role, "content": content if text is None else text}


def check_served(golden: Sequence[GoldenPrompt], api: Api, text_of: Callable[[int], str]) -> Checked:
    """Compare the first token of a server's greedy answers, and its log-probability, with the golden logits.

    Args:
        golden: prompts of the export that is served.
        api: the server.
        text_of: text of a token that is generated first.

    Raises:
        UserError: the server answers differently than the mask of the export allows, or not at all.
    """
    api, worst, tells = api.named(), 0.0, False
    for number, prompt in enumerate(golden, start=1):
        ours, causal = (torch.log_softmax(one[-1], -1) for one in (prompt.logits, prompt.causal_logits))
        best = int(ours.argmax())
        text, logprob = api.first_token(prompt.turns)
        if text.strip() != text_of(best).strip() and not _is_close(ours, text, text_of):
            ran = " It runs a causal mask." if text.strip() == text_of(int(causal.argmax())).strip() else ""
            raise UserError(
                f"{api.url} does not serve this model: it answers golden prompt {number} with {short_repr(text)}, the "
                f"export with {short_repr(text_of(best))}.{ran}"
            )
        tells |= text_of(int(causal.argmax())).strip() != text_of(best).strip()
        if logprob is not None:
            difference, apart = abs(logprob - float(ours.max())), abs(float(causal[best]) - float(ours[best]))
            tells |= apart > TELLING
            if difference > SERVED_TOLERANCE or (apart > TELLING and difference > apart / 2):
                raise UserError(
                    f"{api.url} does not serve this model: the first token of golden prompt {number} has a "
                    f"log-probability of {logprob:.3f}, in the export {float(ours[best]):.3f}, under a causal mask "
                    f"{float(causal[best]):.3f}"
                )
            worst = max(worst, difference)
    return Checked(len(golden), worst, tells)


def _is_close(logprobs_V: torch.Tensor, text: str, text_of: Callable[[int], str]) -> bool:
    """Return whether a text is a token almost as likely as the best one: rounding may swap the two."""
    near = (logprobs_V >= logprobs_V.max() - 2e-2).nonzero().squeeze(1).tolist()
    return any(text_of(index).strip() == text.strip() for index in near[:16])
