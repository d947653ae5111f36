"""The event ledger: what it records, what is fatal, and what it makes of damaged lines."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from data_prep.common import events
from data_prep.common.errors import UserError
from data_prep.common.events import EVENTS, EventLedger, StrictEvent, describe_events, parse_strict
from tests.launch import ROOT

WRITER = """
import sys
from pathlib import Path
from data_prep.common.events import EventLedger
ledger = EventLedger(Path(sys.argv[1]))
for at in range(300):
    ledger.record("sample-rejected", 2, where=sys.argv[2] * 50, at=at)
"""


def test_events_are_json_lines_with_time_code_count_and_place(tmp_path: Path) -> None:
    ledger = EventLedger(tmp_path / "out" / "events.jsonl")
    ledger.record("sample-rejected", 3, corpus="vqa", reason="broken-image", path=Path("a/b"))
    ledger.record("sample-rejected")
    ledger.record("plan-rebuilt", 0)
    first, second = map(json.loads, ledger.path.read_text().splitlines())
    assert first.pop("time") <= second.pop("time")
    assert first == {
        "code": "sample-rejected",
        "count": 3,
        "corpus": "vqa",
        "reason": "broken-image",
        "path": "a/b",
    }
    assert ledger.summary() == dict(ledger.recorded) == {"sample-rejected": 4}


def test_an_event_of_a_lasting_state_is_written_once_but_counted_by_every_command(tmp_path: Path) -> None:
    for _ in range(2):
        ledger = EventLedger(tmp_path / "events.jsonl")
        ledger.record_once("sample-rejected", 3, corpus="vqa", out=tmp_path)
        assert ledger.recorded == {"sample-rejected": 3}
    assert ledger.summary() == {"sample-rejected": 3}
    with pytest.raises(StrictEvent):
        EventLedger(ledger.path, parse_strict("all")).record_once("sample-rejected", 3, corpus="vqa", out=tmp_path)


def test_lines_of_several_processes_do_not_mix(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, str(path), name]) for name in "abc"]
    assert [writer.wait(60) for writer in writers] == [0, 0, 0]
    assert EventLedger(path).summary() == {"sample-rejected": 1800}


def test_a_strict_event_is_recorded_before_it_is_fatal(tmp_path: Path) -> None:
    ledger = EventLedger(tmp_path / "events.jsonl", parse_strict("plan-rebuilt, file-unverified"))
    ledger.record("sample-rejected")
    with pytest.raises(StrictEvent, match=r"file-unverified: 2 x .* \(file rows\); --strict"):
        ledger.record("file-unverified", 2, file="rows")
    assert ledger.summary() == {"file-unverified": 2, "sample-rejected": 1}


def test_strict_names_the_known_codes() -> None:
    assert parse_strict(None) == parse_strict("") == frozenset()
    assert parse_strict("all") == frozenset(EVENTS)
    with pytest.raises(UserError, match="did you mean 'plan-rebuilt'"):
        parse_strict("plan-rebuild")


@pytest.mark.parametrize(
    "line",
    [b"\xff\xfe", b"[" * 100_000, b'{"code": "sample-rej', b"7", b'{"code": "odd", "count": 1}', b"\n",
     b'{"code": "step-skipped", "count": -1}', b'{"code": "step-skipped", "count": true}', b'{"code": [], "count": 1}',
     b'{"code": "step-skipped", "count": ' + b"9" * 5000 + b"}"],
)  # fmt: skip
def test_damaged_lines_are_counted(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "events.jsonl"
    EventLedger(path).record("run-failed")
    path.write_bytes(path.read_bytes() + line)
    summary = EventLedger(path).summary()
    assert summary["run-failed"] == 1
    assert summary["ledger-damaged"] >= 1


def test_the_ledger_is_not_written_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "events.jsonl").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="symbolic links"):
        EventLedger(tmp_path / "events.jsonl").record("run-failed")
    assert not (tmp_path / "elsewhere").exists()


def test_counts_are_described_most_frequent_first() -> None:
    assert describe_events({"run-failed": 1, "sample-rejected": 1200}) == "1,200 sample-rejected, 1 run-failed"
    assert describe_events({}) == ""


def test_every_event_is_recorded_somewhere() -> None:
    """``--strict CODE`` must be able to fail: a code that nothing records would only look like a protection."""
    own = Path(events.__file__)
    sources = [path for room in ("data_prep", "pipeline") for path in (ROOT / room).rglob("*.py")]
    text = "".join(path.read_text(encoding="utf-8") for path in sources if path.name != own.name)
    assert not [code for code in events.EVENTS if f'"{code}"' not in text and code != "ledger-damaged"]
