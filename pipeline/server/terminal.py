"""A conversation in the terminal, with streamed answers: ``mma chat``."""

from __future__ import annotations

import contextlib
import queue
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

from data_prep.common.errors import UserError, did_you_mean, one_line
from data_prep.example import ImageRef, Part, Turn
from data_prep.quarantine import BadSample
from pipeline.server.engine import Engine, Event, Failed, Finished, Work
from pipeline.server.sampling import Sampling
from pipeline.server.text import AnswerText

HELP = """\
  photo.jpg What is shown?    image files first, then the question
  /image FILE                 add an image to the next question
  /system TEXT                set the system message and begin a new chat
  /reset                      begin a new chat
  /quit                       leave (or Ctrl-D); Ctrl-C stops an answer"""
_COMMANDS = ("image", "system", "reset", "help", "quit")
_FIRST_WORD = re.compile(r"\s*('[^']*'|\"[^\"]*\"|(?:\\.|\S)+)")


class Terminal:
    """Reads questions from stdin and prints answers; errors are one line, and the conversation goes on."""

    def __init__(self, engine: Engine, sampling: Sampling, max_new_tokens: int, *, system: str = "") -> None:
        """Begin a conversation.

        Args:
            engine: runs the model.
            sampling: how tokens are chosen.
            max_new_tokens: limit of an answer.
            system: system message; empty for the template's.
        """
        self._engine, self._sampling, self._max_new_tokens = engine, sampling, max_new_tokens
        self._model = engine.steps.model
        self._system = system
        self._turns: list[Turn] = []
        self._images: list[ImageRef] = []
        """Added by /image; they belong to the next question."""

    def run(self) -> None:
        """Talk until /quit or the end of the input."""
        if sys.stdin.isatty():
            with contextlib.suppress(ImportError):
                import readline  # noqa: F401 - arrow keys and history in input()
            print(f"mask {self._model.export_config.policy}; /help lists the commands")
        for line in self._lines():
            try:
                if self._handled(line.strip()):
                    return
            except (UserError, BadSample) as error:
                print(f"error: {one_line(error)}", file=sys.stderr, flush=True)

    def _lines(self) -> Iterator[str]:
        while True:
            try:
                yield input("> " if sys.stdin.isatty() else "")
            except KeyboardInterrupt:
                print("\nCtrl-D leaves")
            except EOFError:
                return

    def _handled(self, line: str) -> bool:
        """Handle one line; return True to leave."""
        command, _, rest = line[1:].partition(" ") if line.startswith("/") else ("", "", "")
        if command and "/" not in command and not Path(line).is_file():
            return self._command(command, rest.strip())
        if line:
            images, question = leading_images(line)
            self._ask([*self._images, *images], question)
        return False

    def _command(self, name: str, rest: str) -> bool:
        if name == "image":
            self._images.append(_image(rest))
        elif name in ("system", "reset"):
            self._system = rest if name == "system" else self._system
            self._turns, self._images = [], []
        elif name == "help":
            print(HELP)
        elif name != "quit":
            raise UserError(f"/{name} is not a command{did_you_mean(name, _COMMANDS)}; /help lists them")
        return name == "quit"

    def _ask(self, images: list[ImageRef], question: str) -> None:
        parts: list[Part] = [*images, *([question] if question else [])]
        system = [Turn("system", (self._system,))] if self._system else []
        asked = [*self._turns, Turn("user", tuple(parts))]
        answer = self._answer(self._work([*system, *asked]))
        self._images = []
        if answer:
            self._turns = [*asked, Turn("assistant", (answer,))]

    def _work(self, turns: list[Turn]) -> Work:
        prompt = self._model.prompt(turns)
        limit, new_tokens = self._model.spec.longest_segment, self._max_new_tokens
        if limit is not None:
            new_tokens = max(1, min(new_tokens, limit - len(prompt.encoded)))
        return Work(self._engine.steps.prepare(prompt, new_tokens), new_tokens, self._sampling)

    def _answer(self, work: Work) -> str:
        """Print an answer as it grows; return it, also when Ctrl-C has cut it short."""
        events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        ticket = self._engine.reserve()
        whole = ""
        try:
            self._engine.submit(ticket, work, events.put)
            for piece in self._pieces(events):
                whole += piece
                print(piece, end="", flush=True)
            if ticket.generated == work.max_new_tokens:
                print(f" [limit of {work.max_new_tokens} tokens]", end="")
        except KeyboardInterrupt:
            print(" [stopped]", end="")
        finally:
            self._engine.release(ticket)
        print(flush=True)
        return whole

    def _pieces(self, events: queue.SimpleQueue[Event]) -> Iterator[str]:
        text = AnswerText(self._model.tokenizer.decode)
        ends = self._model.export_config.eos_ids
        while True:
            event = events.get()
            if isinstance(event, Failed):
                raise UserError(event.message)
            if isinstance(event, Finished):
                yield text.finish()
                return
            if event.id not in ends:
                yield text.push(event.id)


def leading_images(line: str) -> tuple[list[ImageRef], str]:
    """Split a line into the image files that it begins with, quoted or not, and the question after them."""
    images: list[ImageRef] = []
    while match := _FIRST_WORD.match(line):
        path = Path(_unquoted(match[1]))
        if path.suffix.lower() not in Image.registered_extensions() or not path.is_file():
            break
        images.append(ImageRef(str(path), path=path))
        line = line[match.end() :]
    return images, line.strip()


def _image(name: str) -> ImageRef:
    path = Path(_unquoted(name))
    if not name or not path.is_file():
        raise UserError(f"{name or '/image'} is not a file: /image FILE")
    return ImageRef(str(path), path=path)


def _unquoted(word: str) -> str:
    if len(word) > 1 and word[0] == word[-1] and word[0] in "'\"":
        return word[1:-1]
    return re.sub(r"\\(.)", r"\1", word)
