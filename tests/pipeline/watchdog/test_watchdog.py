"""The watchdog: its decisions, and what real processes print and leave behind."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from pydantic import ValidationError

from pipeline.config.schema import ParallelConfig
from pipeline.training.run.folder import RunFolder
from pipeline.training.run.logs import RankLog
from pipeline.training.supervise import end_with
from pipeline.watchdog.channel import LOST_S, Channel, listen
from pipeline.watchdog.coordinator import Coordinator
from pipeline.watchdog.heartbeat import Heartbeat
from pipeline.watchdog.monitor import SETTLE_S, SILENT_S, START_S, TERMINATED, Monitor
from pipeline.watchdog.watchdog import TERMINATED_CODE, Watchdog
from pipeline.watchdog.worker import Worker
from tests.launch import ROOT, environment

LIMIT_S = 5.0


class Ranks:
    """A monitor of ``world`` ranks with a simulated clock."""

    def __init__(self, world: int = 4) -> None:
        self.monitor = Monitor(world, LIMIT_S)
        self.now, self._count = 100.0, 0
        for rank in range(world):
            self.monitor.join(rank, f"host h, pid {rank}", self.now)

    def beat(self, rank: int, activity: str, *, waits: bool = False, begun: int = 2, progress: bool = True) -> None:
        self._count += progress
        count = self._count if progress else 0
        heartbeat = {"step": 3, "begun": begun, "count": count, "activity": activity, "where": "", "waits": waits}
        self.monitor.record(rank, heartbeat, self.now)

    def diagnosis(self, after_s: float, *, terminated: bool = False) -> str:
        diagnosis = self.monitor.diagnosis(self.now + after_s, terminated=terminated)
        return "" if diagnosis is None else "\n".join([diagnosis.text, *diagnosis.others])


@pytest.fixture
def ranks() -> Ranks:
    """Rank 1 is in a forward and the others wait for it."""
    ranks = Ranks()
    ranks.beat(1, "forward of micro-batch 2")
    for rank in (0, 2, 3):
        ranks.beat(rank, "waiting for rank 1: hidden states of micro-batch 2", waits=True)
    return ranks


def test_the_rank_that_does_not_wait_is_the_one_that_hangs(ranks: Ranks) -> None:
    assert ranks.diagnosis(LIMIT_S - 0.1) == ""
    said = ranks.diagnosis(LIMIT_S + 0.1)
    assert "rank 1 (host h, pid 1) hangs in forward of micro-batch 2 while the others wait" in said
    assert "ranks 0, 2-3: waiting for rank 1: hidden states of micro-batch 2" in said


def test_any_progress_of_any_rank_is_progress(ranks: Ranks) -> None:
    ranks.now += LIMIT_S - 1
    ranks.beat(3, "backward of micro-batch 0")
    assert ranks.diagnosis(LIMIT_S - 0.1) == ""
    assert "no rank made progress" in ranks.diagnosis(LIMIT_S + 0.1)


def test_the_limit_is_longer_while_a_job_starts() -> None:
    ranks = Ranks(1)
    ranks.beat(0, "building the stage", begun=1)
    assert ranks.diagnosis(START_S - 1) == ""
    assert "hangs in building the stage" not in ranks.diagnosis(START_S + 1), (
        "a single rank is not compared with others"
    )


def test_a_heartbeat_without_a_new_activity_is_no_progress() -> None:
    ranks = Ranks(2)
    for rank in (0, 1):
        ranks.beat(rank, "forward", progress=False)
    ranks.now += LIMIT_S + 1
    for rank in (0, 1):
        ranks.beat(rank, "forward", progress=False)
    assert "all ranks are busy; no single rank is the cause" in ranks.diagnosis(0)


def test_a_silent_rank_is_the_cause_whatever_it_reported_last(ranks: Ranks) -> None:
    ranks.now += SILENT_S + LIMIT_S
    for rank in (0, 1, 3):
        ranks.monitor.members[rank].heard = ranks.now
    assert "rank 2 (host h, pid 2) has been silent for 15 s, last in waiting for rank 1" in ranks.diagnosis(0)


def test_a_death_is_named_before_the_errors_it_caused(ranks: Ranks) -> None:
    ranks.monitor.failed(0, "RuntimeError: Connection closed by peer", 1, ranks.now)
    ranks.monitor.gone(2, ranks.now)
    assert ranks.diagnosis(SETTLE_S / 2) == "", "more reports may follow"
    said = ranks.diagnosis(2 * SETTLE_S)
    assert said.startswith("rank 2 (host h, pid 2) died: killed") and "at step 3 in waiting for rank 1" in said
    assert "rank 0: failed, too: RuntimeError: Connection closed by peer" in said


def test_the_ranks_of_a_lost_node_are_reported_together(ranks: Ranks) -> None:
    for rank in (2, 3, 1):
        ranks.monitor.gone(rank, ranks.now)
    said = ranks.diagnosis(2 * SETTLE_S)
    assert said.startswith("rank 1 (host h, pid 1) died, and so did ranks 2-3: killed")
    assert "last heartbeat at step 3 in forward of micro-batch 2" in said


def test_an_error_of_all_ranks_is_printed_once_and_of_one_rank_with_its_name(ranks: Ranks) -> None:
    ranks.monitor.failed(3, "the image cannot be read", 2, ranks.now)
    assert ranks.diagnosis(2 * SETTLE_S) == "rank 3 (host h, pid 3), step 3: the image cannot be read"
    for rank in (0, 1):
        ranks.monitor.failed(rank, "the image cannot be read", 2, ranks.now)
    assert ranks.diagnosis(2 * SETTLE_S) == "the image cannot be read"


def test_a_rank_that_says_goodbye_has_not_died(ranks: Ranks) -> None:
    for rank in (1, 2, 3):
        ranks.monitor.left(rank)
        ranks.monitor.gone(rank, ranks.now)
    assert ranks.diagnosis(2 * SETTLE_S) == ""


def test_a_suspended_job_has_not_hung(ranks: Ranks) -> None:
    ranks.now += 3600
    ranks.monitor.extend_deadline(3600)
    assert ranks.diagnosis(LIMIT_S - 0.1) == ""


def test_ranks_that_all_received_sigterm_have_not_failed(ranks: Ranks) -> None:
    ranks.monitor.failed(3, TERMINATED, TERMINATED_CODE, ranks.now)
    assert ranks.diagnosis(0, terminated=True) == ""
    assert ranks.diagnosis(2 * SETTLE_S) == f"rank 3 (host h, pid 3), step 3: {TERMINATED}", "only this rank did"


def test_unreachable_ranks_are_named(ranks: Ranks) -> None:
    del ranks.monitor.members[3]
    assert ranks.diagnosis(LIMIT_S + 0.1).endswith("rank 3: not watched")


@pytest.mark.parametrize(
    ("path", "name", "waits"),
    [
        ("lib/torch/distributed/distributed_c10d.py", "all_reduce", True),
        ("lib/torch/cuda/streams.py", "synchronize", True),
        ("lib/deepspeed/runtime/zero/partition_parameters.py", "wait", True),
        ("lib/torch/nn/functional.py", "linear", False),
    ],
)
def test_a_rank_blocked_by_a_collective_or_a_gpu_waits(
    path: str, name: str, waits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.watchdog.heartbeat.INSPECT_AFTER_S", -1.0)
    heartbeat, release = Heartbeat(), threading.Lock()
    heartbeat.report("backward of micro-batch 1")

    def blocked() -> None:
        release.acquire()

    blocked.__code__ = blocked.__code__.replace(co_filename=path, co_name=name)
    with release:
        training = threading.Thread(target=blocked)
        training.start()
        heartbeat._thread = training.ident or 0
        while not (message := heartbeat.message())["where"].endswith(f"in {name}"):
            time.sleep(0.001)
    training.join()
    assert message["waits"] == waits, message


@pytest.mark.slow
@pytest.mark.parametrize(
    ("faults", "said", "codes"),
    [
        pytest.param(["waits", "killed", "waits"],
            ["rank 1 (host h, pid ", "died: killed", "at step 7 in"], [1, -signal.SIGKILL, 1], id="killed"),
        pytest.param(["waits", "hangs", "waits"], ["no rank made progress for 5 s", "rank 1 (host h, pid ",
            "hangs in a long forward (watch_worker.py:", "in work) while the others wait"], [1, 1, 1], id="hangs"),
        pytest.param(["killed", "waits"], ["rank 0 (host h, pid ", "died: killed, or out of host memory; this rank was "
            "in waiting for rank 1"], [-signal.SIGKILL, 1], id="rank 0 killed"),
        pytest.param(["stopped", "waits", "waits"], ["no heartbeat of rank 0: rank 0 (host h, pid ",
            "has been silent for 1"], [-signal.SIGKILL, 1, 1], id="rank 0 stopped"),
        pytest.param(["stuck", "waits", "waits"], ["no heartbeat of rank 0: rank 0 (host h, pid ",
            "has been silent for 1"], [-signal.SIGKILL, 1, 1], id="rank 0 stuck in C code"),
        pytest.param(["waits", "waits", "fails"], ["error\n", "step ", ": the disk is full"], [2, 2, 2], id="fails"),
        pytest.param(["waits", "terminated"], [f": {TERMINATED}"], [TERMINATED_CODE] * 2, id="one is terminated"),
        pytest.param(["leaves", "leaves"], [], [0, 0], id="all is well"),
    ],
)  # fmt: skip
def test_processes_end_together_and_say_why(
    faults: list[str], said: list[str], codes: list[int], tmp_path: Path
) -> None:
    shared = {"PYTHONPATH": str(ROOT), "WORLD_SIZE": str(len(faults)), "PORT_FILE": str(tmp_path / "port")}
    own = [
        {"RANK": str(rank), "FAULT": fault, "LOG": str(tmp_path / f"{rank}.log")} for rank, fault in enumerate(faults)
    ]
    ranks = [
        subprocess.Popen(
            [sys.executable, ROOT / "tests/pipeline/watchdog/watch_worker.py"],
            env=environment({**shared, **variables}), cwd=ROOT, text=True, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for variables in own
    ]  # fmt: skip
    output = "".join(rank.communicate(timeout=50)[0] for rank in ranks)
    assert [rank.returncode for rank in ranks] == codes, output
    assert all(words in output for words in said), output
    assert said or not output, output
    for rank, code in enumerate(codes):
        log = (tmp_path / f"{rank}.log").read_text()
        stacks = code == 1 or faults[rank] == "stuck"
        assert code == TERMINATED_CODE or ("most recent call first" in log) == stacks, log


def test_the_connection_of_a_lost_node_ends_at_both_ends() -> None:
    with listen() as listener, socket.create_connection(("localhost", listener.getsockname()[1])) as worker:
        coordinator, _ = listener.accept()
        with coordinator:
            for connection in (Channel(coordinator).socket, Channel(worker).socket):
                idle, between, count, unanswered_ms = (
                    connection.getsockopt(socket.IPPROTO_TCP, option)
                    for option in (
                        socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT, socket.TCP_USER_TIMEOUT
                    )
                )  # fmt: skip
                assert connection.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
                assert idle + between * count == LOST_S == unanswered_ms / 1000


@pytest.mark.parametrize("line", [b"1", b"[]", b"nonsense", b"[" * 60_000, b'{"rank": 1}'])
def test_messages_of_a_stranger_do_not_end_the_watchdog(line: bytes, tmp_path: Path) -> None:
    with (tmp_path / "log").open("w") as log:
        watch = Watchdog(
            rank=0, world=2, place="", timeout_s=LIMIT_S, log=log, report=pytest.fail, lost=pytest.fail
        )  # fmt: skip
        listener = listen()
        address = ("localhost", listener.getsockname()[1])
        watch.start(Coordinator(watch, listener, 7).run)
        with socket.create_connection(address) as stranger:
            stranger.sendall(line + b"\n")
            stranger.settimeout(30)
            assert stranger.recv(1) == b"", "it is disconnected"
        assert watch.alive
        watch.close()


@pytest.mark.slow
@pytest.mark.parametrize("code", [0, 2])
def test_a_failed_process_exits_at_once(code: int) -> None:
    writer = "threading.Thread(target=lambda: (threading.main_thread().join(), print(' and saved'))).start()"
    script = f"import threading; from pipeline.train import leave; {writer}; print('said', end=''); leave({code})"
    ended = subprocess.run(
        [sys.executable, "-c", script],
        env=environment({"PYTHONPATH": str(ROOT)}), cwd=ROOT, stdout=subprocess.PIPE, text=True, timeout=300,
    )  # fmt: skip
    assert (ended.returncode, ended.stdout) == (code, "said" if code else "said and saved\n")


def test_a_validation_error_names_its_key(tmp_path: Path) -> None:
    folder = RunFolder(str(tmp_path / "run"))
    with pytest.raises(ValidationError) as found:
        ParallelConfig.model_validate({"pp": "two"})
    end_with(found.value, folder=folder, log=RankLog(folder, 1), watch=None, rank=1)
    assert "ValidationError: ParallelConfig: pp: Input should be a valid integer" in folder.status()["error"]


def test_an_unreachable_coordinator_is_a_warning(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        with (tmp_path / "log").open("w") as log:
            watch = Watchdog(
                rank=1, world=2, place="", timeout_s=LIMIT_S, log=log, report=pytest.fail, lost=pytest.fail
            )  # fmt: skip
            watch.start(Worker(watch, closed.getsockname(), 1).run)
            watch.close()
            assert not watch.fail("an error", 2), "nobody listens: the rank reports it by itself"
    assert "warning: rank 1 cannot reach the watchdog of rank 0 at 127.0.0.1:" in capfd.readouterr().err
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
