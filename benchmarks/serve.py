"""Throughput of `mma serve` with 1, 4 and 16 clients, against the same questions asked one by one with `generate`.

Run from the repository root: ``python -m benchmarks.serve MODEL [--image FILE] [--clients 1 4 16] [--rounds 3]``.
The server is a real process with the real client library. All answers have the same length, and their tokens are
compared with those of `generate`. Rounds of all columns alternate, so that a busy machine slows all of them.
"""

from __future__ import annotations

import argparse
import base64
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import openai

from data_prep.example import ImageRef, Turn
from pipeline.commands.arguments import existing_device
from pipeline.serving.export import model_folder
from pipeline.serving.model import MultimodalModel, load_model


@dataclass(frozen=True)
class Question:
    """One request, for both sides."""

    text: str
    image: Path | None

    def turns(self) -> list[Turn]:
        images = [ImageRef(str(self.image), path=self.image)] if self.image else []
        return [Turn("user", (*images, self.text))]

    def content(self) -> list[dict[str, object]]:
        text: dict[str, object] = {"type": "text", "text": self.text}
        if self.image is None:
            return [text]
        url = f"data:image/*;base64,{base64.b64encode(self.image.read_bytes()).decode()}"
        return [{"type": "image_url", "image_url": {"url": url}}, text]


@contextmanager
def served(model: str, device: str) -> Iterator[openai.OpenAI]:
    """Start a server on a free port, and end it."""
    command = [sys.executable, "-m", "pipeline.cli", "serve", model, "--port", "0", "--device", device]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        url = process.stdout.readline().split()[-1]
        try:
            yield openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        finally:
            process.terminate()


def sequential(model: MultimodalModel, questions: Sequence[Question], tokens: int) -> list[list[int]]:
    """Answer one by one, as `mma generate` does."""
    return [
        model.generate_ids([model.prompt(one.turns())], max_new_tokens=tokens, eos_token_id=None)[0].tolist()
        for one in questions
    ]


def concurrent(client: openai.OpenAI, questions: Sequence[Question], tokens: int, clients: int) -> list[list[int]]:
    """Answer with so many clients, each asking its next question when the last one is answered."""
    waiting: queue.SimpleQueue[int] = queue.SimpleQueue()
    answers: dict[int, list[int]] = {}
    name = client.models.list().data[0].id
    for number in range(len(questions)):
        waiting.put(number)

    def ask() -> None:
        while True:
            try:
                number = waiting.get_nowait()
            except queue.Empty:
                return
            answer = client.chat.completions.create(
                model=name,
                messages=[{"role": "user", "content": questions[number].content()}],  # type: ignore[typeddict-item]
                max_tokens=tokens,
                logprobs=True,
                extra_body={"ignore_eos": True},
            )
            entries = answer.choices[0].logprobs
            answers[number] = [entry.id for entry in entries.content]  # type: ignore[union-attr, attr-defined]

    threads = [threading.Thread(target=ask) for _ in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [answers[number] for number in range(len(questions))]


def seconds(work: Callable[[], list[list[int]]]) -> tuple[float, list[list[int]]]:
    """Return the wall time of a call, and its result."""
    start = time.perf_counter()
    result = work()
    return time.perf_counter() - start, result


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="model folder, or a run folder")
    parser.add_argument("--image", type=Path, help="picture of every question (default: none)")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--questions", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=64, help="length of every answer")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="auto")
    options = parser.parse_args()
    questions = [
        Question(f"Question {number}: what is shown here?", options.image) for number in range(options.questions)
    ]
    folder = str(model_folder(options.model))
    model = load_model(folder, device=existing_device(options.device))
    ask_alone = lambda: sequential(model, questions, options.tokens)  # noqa: E731
    with served(folder, options.device) as client:
        concurrent(client, questions[:4], 4, 4)  # warm-up
        sequential(model, questions[:2], 4)
        times: dict[int, list[float]] = {clients: [] for clients in (0, *options.clients)}
        equal = total = 0
        for _ in range(options.rounds):
            spent, wanted = seconds(ask_alone)
            times[0].append(spent)
            for clients in options.clients:
                spent, answers = seconds(lambda clients=clients: concurrent(client, questions, options.tokens, clients))
                times[clients].append(spent)
                equal += sum(one == other for one, other in zip(answers, wanted, strict=True))
                total += len(wanted)
    ratios = {clients: median(a / b for a, b in zip(times[0], spent, strict=True)) for clients, spent in times.items()}
    print(f"{options.questions} questions, {options.tokens} tokens each, {options.rounds} rounds, {model.device}")
    print("| clients | throughput against `generate` one by one |\n|---|---:|")
    for clients in options.clients:
        print(f"| {clients} | {ratios[clients]:.2f} |")
    print(f"answers with the tokens of `generate`: {equal} of {total}")


if __name__ == "__main__":
    main()
