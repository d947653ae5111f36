"""Ranks are taken from whichever launcher started the process."""

from __future__ import annotations

import os
import socket
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from data_prep.common.errors import UserError
from pipeline.parallel import launch
from pipeline.parallel.groups import create_groups
from pipeline.parallel.launch import (
    bind_cores,
    device_of_rank,
    fill_rank_variables,
    refuse_shared_gpu,
    share_of_cores,
)
from pipeline.parallel.topology import Topology
from tests.launch import ROOT, run


@pytest.mark.parametrize(
    ("given", "ranks"),
    [
        pytest.param({}, ("0", "1", "0"), id="alone"),
        pytest.param({"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}, ("3", "4", "1"), id="deepspeed"),
        pytest.param(
            {"SLURM_STEP_NUM_TASKS": "8", "SLURM_PROCID": "5", "SLURM_LOCALID": "1"}, ("5", "8", "1"), id="srun"
        ),
        pytest.param({"SLURM_NTASKS": "8", "SLURM_PROCID": "0"}, ("0", "1", "0"), id="a batch script without srun"),
        pytest.param(
            {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_LOCAL_RANK": "1"},
            ("1", "2", "1"),
            id="Open MPI",
        ),
        pytest.param({"PMI_SIZE": "2", "PMI_RANK": "1", "MPI_LOCALRANKID": "0"}, ("1", "2", "0"), id="MPICH"),
    ],
)
def test_rank_variables(given: dict[str, str], ranks: tuple[str, str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", dict(given))
    fill_rank_variables()
    assert (os.environ["RANK"], os.environ["WORLD_SIZE"], os.environ["LOCAL_RANK"]) == ranks
    assert os.environ["MASTER_PORT"].isdigit()


@pytest.mark.parametrize(
    "given",
    [
        {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_LOCAL_SIZE": "2"},
        {"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "3", "SLURM_STEP_NUM_NODES": "2"},
    ],
)
def test_ranks_on_several_nodes_are_told_where_to_meet(given: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", dict(given))
    with pytest.raises(UserError, match="need MASTER_ADDR"):
        fill_rank_variables()
    monkeypatch.setattr(os, "environ", {**given, "MASTER_ADDR": "node-1"})
    fill_rank_variables()
    assert os.environ["MASTER_ADDR"] == "node-1"


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Pretend to see some GPUs, as a rank that a launcher started."""

    def see(count: int, **environment: str) -> list[int]:
        taken: list[int] = []
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "set_device", taken.append)
        monkeypatch.setattr(os, "environ", environment)
        return taken

    return see


def test_a_rank_takes_the_gpu_of_its_local_rank(gpus: Any) -> None:
    taken = gpus(4, LOCAL_RANK="3")
    assert device_of_rank() == torch.device("cuda", 3) and taken == [3]


def test_a_task_with_one_gpu_of_its_own_takes_it_whatever_its_local_rank(gpus: Any) -> None:
    taken = gpus(1, LOCAL_RANK="2", SLURM_STEP_NUM_TASKS="4")
    assert device_of_rank() == device_of_rank() == torch.device("cuda", 0)
    assert taken == [0, 0] and os.environ["LOCAL_RANK"] == "0"


@pytest.mark.parametrize(
    ("others", "share"),
    [
        pytest.param([], 8, id="alone"),
        pytest.param([("here", set(range(8)))] * 3, 2, id="four ranks of an unbound job"),
        pytest.param([("here", set(range(8, 16)))] * 3, 8, id="each bound to its own"),
        pytest.param([("there", set(range(8)))] * 3, 8, id="on other nodes"),
        pytest.param([("here", set(range(8)))] * 15, 1, id="more ranks than cores"),
    ],
)
def test_ranks_share_the_cores_they_are_bound_to(
    others: list[tuple[str, set[int]]], share: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gather(places: list[Any], own: Any) -> None:
        places[:] = [own, *others]

    monkeypatch.setattr(socket, "gethostname", lambda: "here")
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)))
    monkeypatch.setattr(dist, "get_world_size", lambda: 1 + len(others))
    monkeypatch.setattr(dist, "all_gather_object", gather)
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    assert share_of_cores() == share


@pytest.mark.parametrize(
    ("rank", "places", "cores"),
    [
        pytest.param(1, [("here", 8)] * 3, [2, 3, 4], id="unbound"),
        pytest.param(2, [("there", 8), *[("here", 8)] * 2], [4, 5, 6, 7], id="two hosts"),
        pytest.param(1, [("here", 4), ("here", 8)], None, id="bound by the launcher"),
        pytest.param(0, [("here", 2)] * 3, None, id="more ranks than cores"),
    ],
)
def test_ranks_on_gpus_are_bound_to_their_share_of_the_cores(
    rank: int, places: list[tuple[str, int]], cores: list[int] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    bound: list[Any] = []
    monkeypatch.setattr(launch, "_cores_of_ranks", lambda: [(host, set(range(count))) for host, count in places])
    monkeypatch.setattr(dist, "get_rank", lambda: rank)
    monkeypatch.setattr(os, "sched_setaffinity", lambda process, given: bound.append(given))
    bind_cores()
    assert bound == ([] if cores is None else [cores])


def test_links_between_stages_get_a_priority_and_few_thread_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """As NCCL would be told; this torch may be built without it."""
    made: list[Any] = []

    class Nccl:
        class Options(SimpleNamespace):
            config = SimpleNamespace()

    monkeypatch.setattr(dist, "ProcessGroupNCCL", Nccl, raising=False)
    monkeypatch.setattr(dist, "new_group", lambda ranks, **options: made.append((ranks, options.get("pg_options"))))
    for backend in ("gloo", "nccl"):
        made.clear()
        monkeypatch.setattr(dist, "get_backend", lambda backend=backend: backend)
        create_groups(Topology(4, 0, 2), ring=False)
        links = [options for ranks, options in made[2:6]]
        assert links == [None] * 4 if backend == "gloo" else all(links)
    assert links[0].is_high_priority_stream and links[0].config.max_ctas == 4
    assert [options for _, options in made[:2]] == [None, None], "collectives are as ever"


@pytest.mark.parametrize("environment", [{"LOCAL_RANK": "1"}, {"LOCAL_RANK": "2", "SLURM_STEP_NUM_TASKS": "4"}])
def test_more_ranks_than_gpus_are_refused(environment: dict[str, str], gpus: Any) -> None:
    count = int(environment["LOCAL_RANK"])
    gpus(count, **environment)
    with pytest.raises(UserError, match=f"start at most {count} ranks here"):
        device_of_rank()


def test_ranks_that_share_a_gpu_are_refused() -> None:
    store = dist.HashStore()
    refuse_shared_gpu(store, "GPU a of node1")
    refuse_shared_gpu(store, "GPU a of node2")
    with pytest.raises(UserError, match="two ranks share GPU a of node1"):
        refuse_shared_gpu(store, "GPU a of node1")


@pytest.mark.slow
def test_every_group_gives_up_after_its_limit() -> None:
    """A rank that never joins ends the wait in every group; the world's limit, half an hour, would not.

    On a 2 x 2 grid the first rank of each group waits: rank 0 in four groups (data-parallel, embedding, p2p each way),
    rank 1 in those of its pipeline, rank 2 for the other dp rank.
    """
    worker = ROOT / "tests/pipeline/parallel/groups_worker.py"
    output = run(4, worker, env={"PYTHONPATH": str(ROOT)}, timeout_s=300, launcher="srun").check().output
    for rank, given_up in enumerate((4, 3, 1, 0)):
        assert f"rank {rank} gave up in {given_up} groups" in output
