"""Streamed text: the pieces are final, and together they are the whole answer."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.server.text import DECODED_TOKENS, UNFINISHED, AnswerText


def decode_bytes(ids: Sequence[int]) -> str:
    """A tokenizer of single bytes: characters arrive in parts."""
    return bytes(ids).decode("utf-8", errors="replace")


def stream(text: str, stops: Sequence[str] = ()) -> tuple[list[str], AnswerText]:
    answer = AnswerText(decode_bytes, stops)
    pieces = [answer.push(index) for index in text.encode()]
    return [*pieces, answer.finish()], answer


def cut(text: str, stops: Sequence[str]) -> str:
    """The slow way: the text before the first stop string that is complete earliest."""
    for end in range(1, len(text) + 1):
        found = [place for stop in stops if (place := text[:end].lstrip().find(stop)) >= 0]
        if found:
            return text[:end].lstrip()[: min(found)].rstrip()
    return text.strip()


@settings(max_examples=300, deadline=None)
@given(st.text("ab \né漢😀", max_size=24), st.lists(st.text("ab é😀", min_size=1, max_size=4), max_size=3))
def test_pieces_are_the_whole_answer(text: str, stops: list[str]) -> None:
    pieces, answer = stream(text, stops)
    assert "".join(pieces) == cut(text, stops)
    assert UNFINISHED not in "".join(pieces)
    assert answer.stopped == any(stop in text.lstrip() for stop in stops)


def test_half_a_character_is_held_back() -> None:
    pieces, _ = stream("é!")
    assert pieces == ["", "é", "!", ""]


def test_the_beginning_of_a_stop_string_is_held_back() -> None:
    pieces, _ = stream("a END b", ["END!"])
    assert pieces[:6] == ["a", "", "", "", "", " END"]
    assert "".join(pieces) == "a END b"


def test_a_long_answer_is_decoded_in_a_window() -> None:
    text = "".join(f"é{number} 漢 " for number in range(300)).strip()
    longest = 0

    def watched(ids: Sequence[int]) -> str:
        nonlocal longest
        longest = max(longest, len(ids))
        return decode_bytes(ids)

    answer = AnswerText(watched, ["never"])
    assert "".join(answer.push(index) for index in text.encode()) + answer.finish() == text
    assert longest <= 2 * DECODED_TOKENS


def test_a_window_that_begins_with_a_space_keeps_it() -> None:
    """As SentencePiece does, this decoder drops the space before the first word."""
    answer = AnswerText(lambda ids: "".join(f" w{index}" for index in ids)[1:])
    pieces = [answer.push(index) for index in range(400)]
    assert "".join([*pieces, answer.finish()]) == " ".join(f"w{index}" for index in range(400))


@pytest.mark.parametrize(("text", "wanted"), [("  red \n", "red"), ("", ""), (" \n ", "")])
def test_white_space_around_an_answer_is_dropped(text: str, wanted: str) -> None:
    assert "".join(stream(text)[0]) == wanted


def test_nothing_follows_a_stop_string() -> None:
    pieces, answer = stream("one STOP two", ["STOP"])
    assert answer.stopped and "".join(pieces) == "one"
