"""Asking a model the questions of a benchmark: sharded, in batches of similar length, resumable."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console
from rich.progress import Progress

from data_prep.common.errors import UserError, one_line
from data_prep.common.files import sha256_file
from data_prep.example import Turn
from data_prep.text.template import Template
from pipeline.evaluation.answers import Answer, AnswerStore
from pipeline.evaluation.benchmark import Benchmark, Question
from pipeline.evaluation.files import image_hashes
from pipeline.evaluation.survey import Survey, selected
from pipeline.serving.prompt import Prompt

WINDOW_BATCHES = 8
"""Batches read ahead; inside this window questions are ordered by length."""


class Model(Protocol):
    """What is asked: :class:`pipeline.serving.model.MultimodalModel`, or a stand-in."""

    template: Template

    def prompt(self, turns: Sequence[Turn]) -> Prompt:
        """Encode a conversation. Raises UserError for an image that cannot be read."""
        ...

    def generate(self, prompts: Sequence[Prompt], *, max_new_tokens: int, **options: Any) -> list[str]:
        """Answer greedily. Raises UserError when a prompt is too long."""
        ...


def model_hash(folder: Path) -> str:
    """Return the sha256 over the files of an export that decide its answers.

    Raises:
        UserError: the folder is missing or holds no weights.
    """
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        raise UserError(f"{folder}: no safetensors there; --model takes a folder made by mma export")
    others = [path for path in sorted(folder.rglob("*")) if path.is_file() and _decides(path.relative_to(folder))]
    digest = hashlib.sha256()
    for path in [*weights, *others]:
        digest.update(f"{path.relative_to(folder)} {sha256_file(path)}\n".encode())
    return digest.hexdigest()


def _decides(path: Path) -> bool:
    return path.as_posix() == "config.json" or path.parts[0] == "tokenizer" or path.name.startswith("tokenizer")


@dataclass(frozen=True)
class Asking:
    """One benchmark to be asked, and where its answers go."""

    benchmark: Benchmark
    data: Path
    survey: Survey
    store: AnswerStore
    limit: int | None = None

    def run(
        self, load: Callable[[], Model], shard: tuple[int, int], *, batch: int, max_new_tokens: int
    ) -> list[Answer] | None:
        """Answer the questions of a shard that have no answer yet.

        Args:
            load: loads the model; called only if a question is left.
            shard: ``(i, n)``: question k belongs to shard ``k % n``.
            batch: questions per batch.
            max_new_tokens: limit per answer.

        Returns:
            All answers in the order of the file, or None while other shards have some left.

        Raises:
            UserError: an image cannot be decoded, or the model cannot take any question of the shard.
        """
        index, count = shard
        own = self.survey.hashes[index::count]
        left = set(self.store.missing(own))
        if left:
            self._ask(load(), left, shard, batch, max_new_tokens)
        self.store.reload()
        if self.store.missing(self.survey.hashes):
            return None
        answers = [self.store.answers[one] for one in self.survey.hashes]
        if all(answer.problem for answer in answers):
            raise UserError(f"{self.benchmark.name}: the model can answer no question: {answers[0].problem}")
        return answers

    def _ask(self, model: Model, left: set[str], shard: tuple[int, int], batch: int, max_new_tokens: int) -> None:
        questions = self._left(left)
        console = Console(stderr=True)
        with self.store.writer(shard) as append, Progress(console=console, transient=True) as progress:
            bar = progress.add_task(self.benchmark.name, total=len(left))
            while window := list(islice(questions, batch * WINDOW_BATCHES)):
                window.sort(key=lambda one: len(one[1].text))
                for start in range(0, len(window), batch):
                    asked = window[start : start + batch]
                    append(answer_batch(model, asked, max_new_tokens))
                    progress.advance(bar, len(asked))

    def _left(self, left: set[str]) -> Iterator[tuple[str, Question]]:
        """Read the benchmark again, with images, and yield what is left to ask."""
        for question in selected(self.benchmark, self.data, self.limit):
            if (digest := question.digest(image_hashes(question))) in left:
                yield digest, question


def answer_batch(model: Model, asked: Sequence[tuple[str, Question]], max_new_tokens: int) -> Iterable[Answer]:
    """Answer some questions; one that the model cannot take gets an empty answer and the reason."""
    inline = model.template.order == "as_written"
    prompts = [model.prompt([question.turn(inline=inline)]) for _, question in asked]
    try:
        texts = model.generate(prompts, max_new_tokens=max_new_tokens)
        return [Answer(digest, question.id, text) for (digest, question), text in zip(asked, texts, strict=True)]
    except UserError as problem:
        if len(asked) == 1:
            digest, question = asked[0]
            return [Answer(digest, question.id, "", one_line(problem))]
    return [answer for one in asked for answer in answer_batch(model, [one], max_new_tokens)]


def rank_shard() -> tuple[int, int]:
    """Return ``(rank, ranks)`` of a torchrun or srun launch; (0, 1) for a single process."""
    for rank, size in (("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_NTASKS")):
        if os.environ.get(rank, "").isdecimal() and os.environ.get(size, "").isdecimal():
            return int(os.environ[rank]), int(os.environ[size])
    return 0, 1
