"""The model ``mma`` of lmms-eval, found by its entry-point group ``lmms_eval.models``.

``python -m lmms_eval --model mma --model_args pretrained=models/demo --tasks mme`` asks an export the questions of
lmms-eval's own tasks, with its prompts and scorers. The conversation goes through the training template, and the prompt
is masked as in training. Written against lmms-eval 0.7.3.
"""

from __future__ import annotations

import io
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lmms_eval.api.model import lmms
from lmms_eval.protocol import ChatMessages
from lmms_eval.utils import Collator
from PIL import Image

from data_prep.common.errors import UserError
from data_prep.example import ImageRef, Part, Turn
from pipeline.serving.export import model_folder
from pipeline.serving.model import MultimodalModel, load_model

MAX_NEW_TOKENS = 128
"""Limit of an answer where the task states none."""
_SAMPLING = ("temperature", "top_p", "num_beams")


class MmaChat(lmms):  # type: ignore[misc]
    """An exported model, or the newest checkpoint of a run, as lmms-eval asks it."""

    is_simple = False

    def __init__(
        self,
        pretrained: str,
        batch_size: int | str = 1,
        device: str | None = None,
        max_batch_size: int | None = None,
        **others: Any,
    ) -> None:
        """Load a model.

        Args:
            pretrained: folder made by ``mma export``, or a run folder.
            batch_size: questions per batch.
            device: ``cpu``, ``cuda`` or ``cuda:N``; default: a GPU if there is one, that of the local rank.
            max_batch_size: taken for ``batch_size=auto``, else ignored.
            others: must be empty.

        Raises:
            UserError: an argument is unknown, or as :func:`pipeline.serving.model.load_model` does.
        """
        super().__init__()
        if others:
            known = "pretrained, batch_size, device"
            raise UserError(f"--model_args {', '.join(others)}: unknown for the model mma; known: {known}")
        self.batch_size = int(max_batch_size or 1) if batch_size == "auto" else int(batch_size)
        self.device = torch.device(device or _own_device())
        self.model: MultimodalModel = load_model(model_folder(pretrained), device=self.device)

    @property
    def rank(self) -> int:
        """Rank of this process; lmms-eval sets it."""
        return int(self._rank)

    @property
    def world_size(self) -> int:
        """Number of processes."""
        return int(self._world_size)

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Answer requests in batches of equal settings, longest first; answers in the order of the requests."""
        order = Collator(
            [request.args for request in requests],
            lambda args: (-len(args[0]), args[0]),
            group_fn=lambda args: args[2],
            grouping=True,
        )
        answers: list[str] = []
        for batch in order.get_batched(n=self.batch_size, batch_fn=None):
            settings = batch[0][2]
            turns = [self._turns(*request) for request in batch]
            texts = self._answers(turns, settings)
            answers += texts
            for request, text in zip(batch, texts, strict=True):
                self.cache_hook.add_partial("generate_until", (request[0], settings), text)
        found: list[str] = order.get_original(answers)
        return found

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Refuse: tasks that compare likelihoods of given answers are not supported."""
        raise NotImplementedError("the model mma answers generate_until tasks only: choose a task that generates")

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        """Refuse: tasks that ask again depending on the answer are not supported."""
        raise NotImplementedError("the model mma answers generate_until tasks only: choose a task of one round")

    def _turns(
        self, context: str, doc_to_messages: Any, settings: Any, doc_id: Any, task: str, split: str
    ) -> tuple[Turn, ...]:
        messages = ChatMessages(messages=doc_to_messages(self.task_dict[task][split][doc_id]))
        return tuple(Turn(message.role, tuple(_part(one) for one in message.content)) for message in messages.messages)

    def _answers(self, conversations: Sequence[tuple[Turn, ...]], settings: Mapping[str, Any]) -> list[str]:
        options = {name: settings[name] for name in _SAMPLING if settings.get(name) is not None}
        if not settings.get("do_sample", float(options.get("temperature", 0)) > 0):
            options = {name: value for name, value in options.items() if name == "num_beams"}
        else:
            options["do_sample"] = True
        prompts = [self.model.prompt(turns) for turns in conversations]
        limit = int(settings.get("max_new_tokens", MAX_NEW_TOKENS))
        longest = self.model.spec.longest_segment
        if longest is not None:  # tasks state generous limits; a small model ends its answer where its positions end
            limit = max(1, min(limit, longest - max(len(prompt.encoded) for prompt in prompts)))
        texts = self.model.generate(prompts, max_new_tokens=limit, **options)
        stops = settings.get("until") or []
        return [_until(text, [stops] if isinstance(stops, str) else stops) for text in texts]


def _part(content: Any) -> Part:
    """Return a text or an image of a message. Raises UserError for video and audio."""
    if content.type == "text":
        return str(content.text)
    if content.type != "image":
        raise UserError(
            f"the task shows {content.type}, but the model mma takes text and images only: choose another task"
        )
    picture = content.url
    if isinstance(picture, str):
        with Image.open(picture) as opened:
            picture = opened.copy()
    data = io.BytesIO()
    picture.save(data, "PNG")
    return ImageRef("image of the task", data=data.getvalue())


def _until(text: str, stops: Sequence[str]) -> str:
    """Cut an answer before the first of the stop strings."""
    return text[: min((text.find(stop) for stop in stops if stop and stop in text), default=len(text))]


def _own_device() -> str:
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"
