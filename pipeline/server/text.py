"""Text of an answer while its tokens arrive: only text that no later token changes is handed out."""

from __future__ import annotations

from collections.abc import Callable, Sequence

UNFINISHED = "\ufffd"
"""Stands for a character of which some bytes are still to come."""
DECODED_TOKENS, OVERLAP_TOKENS = 64, 16
"""So many last tokens are decoded again for each new one; the overlap keeps text that depends on its neighbours."""


class AnswerText:
    """Decodes an answer token by token, and ends it at the first stop string.

    All pieces together equal the whole answer, without white space around it, up to the stop string.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], stops: Sequence[str] = ()) -> None:
        """Begin an answer.

        Args:
            decode: returns the text of token ids.
            stops: strings that end the answer and do not belong to it.
        """
        self._decode, self._stops = decode, tuple(stops)
        self._ids: list[int] = []
        """Tokens that are decoded again for each new one."""
        self._before = ""
        """Text of the tokens before them."""
        self._sent = 0
        self.stopped = False
        """Whether a stop string was found; later tokens are ignored."""

    def push(self, index: int) -> str:
        """Add a token; return the text that is now final, which may be empty."""
        if self.stopped:
            return ""
        self._ids.append(index)
        text = self._text().lstrip()
        found = [place for place in (text.find(stop) for stop in self._stops) if place >= 0]
        if found:
            self.stopped = True
            return self._take(text[: min(found)].rstrip())
        return self._take(self._settled(text))

    def finish(self) -> str:
        """Return the rest of the answer when no token follows."""
        return "" if self.stopped else self._take(self._text().strip())

    def _text(self) -> str:
        """Return the text of all tokens; without a window, the time of a long answer would be quadratic."""
        text = self._before + self._decode(self._ids)
        if len(self._ids) >= DECODED_TOKENS:
            tail = self._decode(self._ids[-OVERLAP_TOKENS:])
            if tail and UNFINISHED not in tail and text.endswith(tail):
                self._before, self._ids = text[: -len(tail)], self._ids[-OVERLAP_TOKENS:]
        return text

    def _settled(self, text: str) -> str:
        """Return the text without an end that may still change: a stop string's beginning, white space, half bytes."""
        text = text.rstrip(UNFINISHED)
        longest = max((_overlap(text, stop) for stop in self._stops), default=0)
        return text[: len(text) - longest].rstrip()

    def _take(self, text: str) -> str:
        new = text[self._sent :]
        self._sent = max(self._sent, len(text))
        return new


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest end of ``text`` that begins ``stop``."""
    lengths = range(min(len(text), len(stop) - 1), 0, -1)
    return next((length for length in lengths if text.endswith(stop[:length])), 0)
