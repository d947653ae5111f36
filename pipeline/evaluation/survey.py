"""The first pass over a benchmark: every question without its image, and what the answers will depend on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from data_prep.common.errors import UserError
from data_prep.common.files import hash_json
from pipeline.evaluation.benchmark import Benchmark, Question
from pipeline.evaluation.files import image_hashes


@dataclass(frozen=True)
class Survey:
    """All questions of a benchmark, without images; a benchmark of gigabytes takes megabytes."""

    questions: tuple[Question, ...]
    hashes: tuple[str, ...]
    """Identity of each question: its id, text and images."""
    prompt_hash: str
    data_hash: str

    @classmethod
    def of(cls, benchmark: Benchmark, data: Path, limit: int | None = None) -> Survey:
        """Read a benchmark once.

        Args:
            benchmark: which one.
            data: the folder that holds the folders of all benchmarks.
            limit: keep only the first questions; questions that are scored together are kept together.

        Raises:
            UserError: a file is missing or wrong, the benchmark is empty, or two questions have the same id.
        """
        texts, facts = hashlib.sha256(), hashlib.sha256()
        questions: dict[str, Question] = {}
        hashes: list[str] = []
        for question in selected(benchmark, data, limit):
            if question.id in questions:
                raise UserError(
                    f"{data / benchmark.folder}: two questions have the id {question.id}; download it again"
                )
            bare = questions[question.id] = question.without_images()
            images = image_hashes(question)
            hashes.append(question.digest(images))
            texts.update(json.dumps([question.id, bare.parts, question.marks]).encode())
            facts.update(hash_json([question.id, images, question.facts]).encode())
        if not questions:
            raise UserError(f"{data / benchmark.folder} holds no question: {benchmark.name} needs {benchmark.files}")
        if limit is None:
            benchmark.metric.check(list(questions.values()))
        return cls(tuple(questions.values()), tuple(hashes), texts.hexdigest(), facts.hexdigest())


def selected(benchmark: Benchmark, data: Path, limit: int | None) -> Iterator[Question]:
    """Yield the questions of a benchmark, or those of its first ``limit`` clusters."""
    questions = benchmark.questions(data)
    if limit is None:
        yield from questions
        return
    if not benchmark.clustered:
        yield from islice(questions, limit)
        return
    kept: set[str] = set()
    for question in questions:
        if len(kept) < limit:
            kept.add(question.group)
        if question.group in kept:
            yield question
