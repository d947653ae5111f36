"""A judge behind any OpenAI-compatible URL. Every reply is kept, so a repeated scoring asks nothing twice.

The key is read from an environment variable and is never written, printed or sent anywhere but to the given URL.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from data_prep.common.errors import UserError, one_line, short_repr
from pipeline.evaluation.benchmark import JudgePrompt

URL, MODEL, KEY = "MMA_JUDGE_URL", "MMA_JUDGE_MODEL", "MMA_JUDGE_KEY"
"""Environment variables: the API's base URL, the judge's model name, the key."""
RETRIES, CONCURRENT, TIMEOUT_S = 5, 8, 120.0
_BUSY = (408, 409, 429, 500, 502, 503, 504)


@dataclass(frozen=True)
class JudgeSettings:
    """Where the judge is and what it is called; stored with the result, without the key."""

    url: str
    """Base URL that ends before ``/chat/completions``, for example ``http://localhost:8000/v1``."""
    model: str
    key_variable: str = KEY
    """Name of the environment variable that holds the key; an unset variable sends none."""

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.netloc:
            raise UserError(
                f"--judge-url {self.url!r}: give an http or https URL, for example http://localhost:8000/v1"
            )
        if parts.username or parts.password:
            raise UserError(f"--judge-url holds a password: put the key into the environment variable {KEY} instead")
        if not self.model:
            raise UserError(f"--judge-url without --judge-model: name the model to ask, or set {MODEL}")

    @classmethod
    def find(cls, url: str | None, model: str | None, key_variable: str) -> JudgeSettings | None:
        """Return the judge of the flags, else of the environment; None when neither names one."""
        url, model = url or os.environ.get(URL, ""), model or os.environ.get(MODEL, "")
        if model and not url:
            raise UserError(f"--judge-model {model} without --judge-url: give the URL of its API, or set {URL}")
        return cls(url.rstrip("/"), model, key_variable) if url else None


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Refuses redirects: they would carry the key to another host."""

    def redirect_request(self, *_: Any) -> None:
        """Follow nothing."""


class ApiJudge:
    """A judge with a file of all its replies."""

    def __init__(self, settings: JudgeSettings, kept: Path, *, pause_s: float = 1.0) -> None:
        """Read the replies kept in ``kept``; ``pause_s`` is the first pause before a retry, doubled each time."""
        self.settings = settings
        self._kept, self._pause_s = kept, pause_s
        self._replies = dict(_read_replies(kept))
        self._lock = threading.Lock()
        self._opener = urllib.request.build_opener(_NoRedirect)

    def ask(self, prompts: Sequence[JudgePrompt]) -> list[str]:
        """Return one reply per prompt, from the file where it has one.

        Raises:
            UserError: the judge cannot be reached, refuses the request or replies nothing readable. Replies so far are
                kept.
        """
        with ThreadPoolExecutor(CONCURRENT) as pool:
            return list(pool.map(self._ask, prompts))

    def _ask(self, prompt: JudgePrompt) -> str:
        request = self._request(prompt)
        key = hashlib.sha256(json.dumps([request, prompt.attempt], sort_keys=True).encode()).hexdigest()
        if key not in self._replies:
            reply = self._post(request)
            with self._lock:
                self._replies[key] = reply
                self._append({"key": key, "judge": self.settings.model, "prompt": asdict(prompt), "reply": reply})
        return self._replies[key]

    def _request(self, prompt: JudgePrompt) -> dict[str, Any]:
        system = [{"role": "system", "content": prompt.system}] if prompt.system else []
        return {
            "model": self.settings.model,
            "messages": [*system, {"role": "user", "content": prompt.user}],
            "max_tokens": prompt.max_tokens,
            "temperature": prompt.temperature,
        }

    def _post(self, request: Mapping[str, Any]) -> str:
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get(self.settings.key_variable, ""):
            headers["Authorization"] = f"Bearer {key}"
        url = f"{self.settings.url}/chat/completions"
        message = urllib.request.Request(url, json.dumps(request).encode(), headers)
        return _content(_with_retries(lambda: self._open(message), self._pause_s, url), url)

    def _open(self, message: urllib.request.Request) -> bytes:
        with self._opener.open(message, timeout=TIMEOUT_S) as response:
            body: bytes = response.read()
        return body

    def _append(self, record: Mapping[str, Any]) -> None:
        self._kept.parent.mkdir(parents=True, exist_ok=True)
        with self._kept.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
            file.flush()
            os.fsync(file.fileno())


def _read_replies(path: Path) -> list[tuple[str, str]]:
    """Return the complete lines of a file of replies; a line cut short by a crash is asked again."""
    found = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            record = json.loads(line)
            found.append((str(record["key"]), str(record["reply"])))
        except (ValueError, KeyError, TypeError):
            continue
    return found


def _with_retries(send: Callable[[], bytes], pause_s: float, url: str) -> bytes:
    for attempt in range(RETRIES):
        try:
            return send()
        except urllib.error.HTTPError as error:
            problem = f"HTTP {error.code} {one_line(error.reason)}"
            if error.code not in _BUSY:
                raise UserError(
                    f"the judge at {url} refused the request ({problem}): check its URL, model and key"
                ) from None
        except (OSError, HTTPException) as error:  # OSError: no connection, a timeout
            problem = one_line(error)
        if attempt < RETRIES - 1:
            time.sleep(pause_s * 2**attempt)
    raise UserError(
        f"the judge at {url} did not answer {RETRIES} times ({problem}): replies so far are kept; run again"
    )


def _content(body: bytes, url: str) -> str:
    try:
        content = json.loads(body)["choices"][0]["message"]["content"]
    except (ValueError, KeyError, IndexError, TypeError):
        content = None
    if not isinstance(content, str):
        raise UserError(f"the judge at {url} replied {short_repr(body[:80])}, which is no chat completion")
    return content
