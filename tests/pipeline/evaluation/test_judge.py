"""The judge: retries, kept replies, a key that stays secret, and no score without a readable reply."""

from __future__ import annotations

from pathlib import Path

import pytest

from data_prep.common.errors import UserError
from pipeline.evaluation.benchmark import JudgePrompt
from pipeline.evaluation.judge import RETRIES, ApiJudge, JudgeSettings
from tests.pipeline.evaluation.conftest import JudgeServer

SECRET = "sk-not-a-real-key"
PROMPT = JudgePrompt("Question | Correctness", "Be precise.", 3, 0.5)


def api(judge: JudgeServer, folder: Path) -> ApiJudge:
    return ApiJudge(JudgeSettings(judge.url, "stand-in"), folder / "judge.jsonl", pause_s=0)


def test_a_request_is_a_chat_completion_with_the_key(
    judge: JudgeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MMA_JUDGE_KEY", SECRET)
    assert api(judge, tmp_path).ask([PROMPT]) == ["0.5"]
    assert judge.requests == [
        {
            "model": "stand-in",
            "messages": [{"role": "system", "content": "Be precise."}, {"role": "user", "content": PROMPT.user}],
            "max_tokens": 3,
            "temperature": 0.5,
        }
    ]
    assert judge.keys == [f"Bearer {SECRET}"]
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and SECRET.encode() in path.read_bytes()]


def test_replies_are_kept_and_a_line_cut_short_is_asked_again(judge: JudgeServer, tmp_path: Path) -> None:
    other = JudgePrompt("[Context]")
    assert api(judge, tmp_path).ask([PROMPT, other]) == ["0.5", "8 6\nbecause"]
    assert api(judge, tmp_path).ask([other, PROMPT]) == ["8 6\nbecause", "0.5"]
    assert len(judge.requests) == 2
    path = tmp_path / "judge.jsonl"
    path.write_text(path.read_text()[:-9])
    assert api(judge, tmp_path).ask([PROMPT, other]) == ["0.5", "8 6\nbecause"]
    assert len(judge.requests) == 3
    again = JudgePrompt(PROMPT.user, PROMPT.system, 3, 0.5, attempt=1)  # the same request, asked once more on purpose
    api(judge, tmp_path).ask([again])
    assert len(judge.requests) == 4


def test_a_busy_judge_is_asked_again(judge: JudgeServer, tmp_path: Path) -> None:
    judge.failures = [429, 503, 500]
    assert api(judge, tmp_path).ask([PROMPT]) == ["0.5"]
    assert len(judge.requests) == 4


@pytest.mark.parametrize(
    ("failures", "message"),
    [([401], "refused the request .HTTP 401"), ([404], "refused"), ([503] * RETRIES, "did not answer 5 times")],
)
def test_a_judge_that_fails_is_one_clear_error(
    failures: list[int], message: str, judge: JudgeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MMA_JUDGE_KEY", SECRET)
    judge.failures = list(failures)
    with pytest.raises(UserError, match=message) as error:
        api(judge, tmp_path).ask([PROMPT])
    assert SECRET not in str(error.value) and "\n" not in str(error.value)


def test_a_redirect_is_refused_so_the_key_stays_with_its_host(
    judge: JudgeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MMA_JUDGE_KEY", SECRET)
    judge.failures, judge.location = [302], judge.url + "/elsewhere"
    with pytest.raises(UserError, match="HTTP 302"):
        api(judge, tmp_path).ask([PROMPT])
    assert len(judge.requests) == 1


@pytest.mark.parametrize(
    "body", [b"<html>", b"{}", b'{"choices": []}', b'{"choices": [{"message": {"content": null}}]}']
)
def test_a_reply_that_is_no_completion_is_an_error(body: bytes, judge: JudgeServer, tmp_path: Path) -> None:
    judge.body = body
    with pytest.raises(UserError, match="no chat completion"):
        api(judge, tmp_path).ask([PROMPT])


def test_an_unreachable_judge_is_an_error(tmp_path: Path) -> None:
    judge = ApiJudge(JudgeSettings("http://127.0.0.1:9/v1", "x"), tmp_path / "judge.jsonl", pause_s=0)
    with pytest.raises(UserError, match="did not answer"):
        judge.ask([PROMPT])


@pytest.mark.parametrize(
    ("url", "model", "message"),
    [
        ("file:///etc/passwd", "m", "http or https"),
        ("localhost:8000", "m", "http or https"),
        ("http://user:pass@host/v1", "m", "holds a password"),
        ("http://localhost/v1", "", "without --judge-model"),
        ("", "m", "without --judge-url"),
    ],
)
def test_settings_are_checked(url: str, model: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MMA_JUDGE_URL", "MMA_JUDGE_MODEL"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UserError, match=message):
        JudgeSettings.find(url, model, "MMA_JUDGE_KEY")


def test_settings_come_from_flags_then_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MMA_JUDGE_URL", "http://host/v1/")
    monkeypatch.setenv("MMA_JUDGE_MODEL", "big")
    assert JudgeSettings.find(None, None, "K") == JudgeSettings("http://host/v1", "big", "K")
    assert JudgeSettings.find(None, "small", "K") == JudgeSettings("http://host/v1", "small", "K")
    monkeypatch.delenv("MMA_JUDGE_URL")
    monkeypatch.delenv("MMA_JUDGE_MODEL")
    assert JudgeSettings.find(None, None, "K") is None
