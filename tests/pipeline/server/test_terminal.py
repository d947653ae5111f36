"""`mma chat` as its user sees it: lines in, answers out."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.server.engine import Engine
from pipeline.server.sampling import Sampling
from pipeline.server.terminal import Terminal, leading_images
from pipeline.serving.model import MultimodalModel, load_model
from pipeline.serving.steps import StepModel
from tests.pipeline.serving.helpers import assistant, make_export, picture, user

NEW = 10


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> MultimodalModel:
    return load_model(make_export(tmp_path_factory.mktemp("chat")))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for number, name in enumerate(("one.png", "two words.png"), start=1):
        (tmp_path / name).write_bytes(picture(number).read())
    return tmp_path


def talk(model: MultimodalModel, lines: list[str], monkeypatch: pytest.MonkeyPatch, *, system: str = "") -> None:
    waiting = iter(lines)

    def next_line(_: str) -> str:
        try:
            return next(waiting)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", next_line)
    engine = Engine(StepModel(model), batch=1)
    try:
        Terminal(engine, Sampling(), NEW, system=system).run()
        assert engine.idle
    finally:
        engine.close()


def answers(text: str) -> list[str]:
    return [line.removesuffix(f" [limit of {NEW} tokens]") for line in text.splitlines()]


def answer(model: MultimodalModel, *turns: object) -> str:
    return model.generate([model.prompt(turns)], max_new_tokens=NEW)[0]  # type: ignore[arg-type]


def test_a_conversation_keeps_its_turns_and_images(
    model: MultimodalModel, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = ["one.png what colour", "/image two words.png", "and left", "", "/reset", "how many"]
    talk(model, lines, monkeypatch)
    first = user(picture(1), "what colour")
    told = answer(model, first)
    second = answer(model, first, assistant(told), user(picture(2), "and left"))
    assert answers(capsys.readouterr().out) == [told, second, answer(model, user("how many"))]


def test_a_system_message_begins_a_new_chat(
    model: MultimodalModel, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    talk(model, ["left", "/system one two", "left", "/quit", "never"], monkeypatch, system="three")
    system = [type(user("x"))("system", (text,)) for text in ("three", "one two")]
    assert answers(capsys.readouterr().out) == [answer(model, one, user("left")) for one in system]


def test_mistakes_are_one_line_and_the_conversation_goes_on(
    model: MultimodalModel, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "torn.png").write_bytes(b"\x89PNG torn")
    lines = ["/rest", "/image none.png", "torn.png what", "left " * 400, "left"]
    talk(model, lines, monkeypatch)
    shown = capsys.readouterr()
    problems = shown.err.splitlines()
    words = ["did you mean 'reset'?", "none.png is not a file", "torn.png", "more than the model's 256"]
    assert len(problems) == 4
    assert all(line.startswith("error: ") and word in line for line, word in zip(problems, words, strict=True))
    assert answers(shown.out) == [answer(model, user("left"))]


def test_ctrl_c_stops_an_answer_and_keeps_what_was_said(
    model: MultimodalModel, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real, shown = Terminal._pieces, []

    def interrupted(self: Terminal, events: object) -> object:
        for piece in real(self, events):  # type: ignore[arg-type]
            shown.append(piece)
            yield piece
            if len(shown) == 3:
                raise KeyboardInterrupt

    monkeypatch.setattr(Terminal, "_pieces", interrupted)
    talk(model, ["left", "right"], monkeypatch)
    first, second = answers(capsys.readouterr().out)
    said = "".join(shown[:3])
    assert first == f"{said} [stopped]"
    assert second == answer(model, user("left"), assistant(said), user("right"))


@pytest.mark.parametrize(
    ("line", "images", "question"),
    [
        ("one.png what", ["one.png"], "what"),
        ("one.png 'two words.png' what is it", ["one.png", "two words.png"], "what is it"),
        ('"two words.png"', ["two words.png"], ""),
        ("two\\ words.png what", ["two words.png"], "what"),
        ("what is one.png", [], "what is one.png"),
        ("none.png what", [], "none.png what"),
        ("'tis left", [], "'tis left"),
    ],
)
@pytest.mark.usefixtures("folder")
def test_a_line_begins_with_its_images(line: str, images: list[str], question: str) -> None:
    found, text = leading_images(line)
    assert ([image.name for image in found], text) == (images, question)
