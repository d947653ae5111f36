"""Renders chat templates, which are programs from untrusted files, in a child process that can be killed.

The child uses jinja2's immutable sandbox through transformers, so what it writes is what transformers writes. Its
processor time, memory and output are limited: an endless loop or a string of gigabytes ends in one line.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from data_prep.common.errors import one_line
from data_prep.common.processes import end_with_parent

CPU_S = 5
"""Processor seconds that a template may take for all of its conversations together."""
WALL_S = 120
"""Seconds after which the child is killed in any case; it needs some of them to import transformers."""
MEMORY_BYTES = 1 << 29
"""Memory that a template may take, beyond what the child takes by itself."""
MAX_CHARACTERS = 1 << 20
"""Longest text that is accepted of one conversation."""
_CHILD = "from data_prep.text.jinja_sandbox import serve; serve()"
Content: TypeAlias = str | tuple[str | None, ...]
"""Text, or parts as models with images take them; None is an image."""
Message: TypeAlias = tuple[str, Content]
"""Role and content."""


class TemplateError(Exception):
    """A template cannot be rendered; the message says why, in one line."""


@dataclass(frozen=True, slots=True)
class Request:
    """A conversation to render."""

    messages: tuple[Message, ...]
    prompt: bool = False
    """Whether to add the header of the answer that comes next (``add_generation_prompt``)."""


@dataclass(frozen=True, slots=True)
class Rendering:
    """The text of a conversation."""

    text: str
    generated: tuple[tuple[int, int], ...]
    """Spans of characters that the template marks with ``{% generation %}``."""
    error: str = ""
    """Why the template refused the conversation; then ``text`` is empty."""


def render(source: str, settings: Mapping[str, str], requests: Sequence[Request]) -> list[Rendering]:
    """Render conversations with a chat template, in a child process.

    Args:
        source: Jinja text of the template.
        settings: further variables, such as ``bos_token``.
        requests: rendered in this order; the result has the same order.

    Raises:
        TemplateError: the template took too much time or memory, or the child failed.
    """
    job = {"parent": os.getpid(), "source": source, "settings": dict(settings)}
    job["requests"] = [(request.messages, request.prompt) for request in requests]
    root = str(Path(__file__).parents[2])
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    child = subprocess.Popen(
        [sys.executable, "-P", "-c", _CHILD],
        env={**os.environ, "PYTHONPATH": path},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    with child:
        try:
            answer, words = child.communicate(json.dumps(job).encode(), timeout=WALL_S)
        except subprocess.TimeoutExpired:
            answer, words = b"", b""
        finally:
            child.kill()
    if child.returncode > 0:
        last = (words.decode(errors="replace").strip().splitlines() or ["no message"])[-1]
        raise TemplateError(f"cannot be rendered ({last[:200]})")
    if child.returncode < 0:
        raise TemplateError(f"takes more than {CPU_S} s or {MEMORY_BYTES >> 20} MiB")
    return [Rendering(text, tuple((a, b) for a, b in spans), error) for text, spans, error in json.loads(answer)]


def serve() -> None:
    """Be the child: read a job from standard input, write the renderings to standard output."""
    import transformers.utils.chat_template_utils  # noqa: F401 - before the limits count

    job = json.load(sys.stdin)
    end_with_parent(job["parent"])
    _limit()
    requests = [Request(tuple(map(tuple, messages)), prompt) for messages, prompt in job["requests"]]
    found = render_here(job["source"], job["settings"], requests)
    json.dump([(one.text, one.generated, one.error) for one in found], sys.stdout)


def render_here(source: str, settings: Mapping[str, str], requests: Sequence[Request]) -> list[Rendering]:
    """Render in this process, without limits; for templates that are trusted."""
    from transformers.utils.chat_template_utils import render_jinja_template  # slow to import: only the child needs it

    found = []
    for request in requests:
        try:
            [text], [spans] = render_jinja_template(
                [[{"role": role, "content": _parts(content)} for role, content in request.messages]],
                chat_template=source,
                add_generation_prompt=request.prompt,
                return_assistant_tokens_mask=True,
                **settings,
            )
        except Exception as error:  # whatever the program of the template raises
            found.append(Rendering("", (), one_line(error)[:200] or type(error).__name__))
            continue
        if len(text) > MAX_CHARACTERS:
            found.append(Rendering("", (), f"writes more than {MAX_CHARACTERS:,} characters"))
        else:
            found.append(Rendering(text, tuple((start, end) for start, end in spans)))
    return found


def _parts(content: Content) -> str | list[dict[str, str]]:
    if isinstance(content, str):
        return content
    return [{"type": "image"} if part is None else {"type": "text", "text": part} for part in content]


def _limit() -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0]) if sys.platform == "linux" else 1 << 20
    memory = pages * resource.getpagesize() + MEMORY_BYTES
    usage = resource.getrusage(resource.RUSAGE_SELF)
    cpu = int(usage.ru_utime + usage.ru_stime) + 1 + CPU_S
    for kind, limit in ((resource.RLIMIT_AS, memory), (resource.RLIMIT_CPU, cpu), (resource.RLIMIT_CORE, 0)):
        with suppress(ValueError, OSError):  # a lower limit is in force already, or the system has no such limit
            resource.setrlimit(kind, (limit, limit))
