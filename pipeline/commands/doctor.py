"""``mma doctor``: check that a machine, or every rank of a launcher, is ready for a run."""

from __future__ import annotations

import argparse
import os
import socket
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path

from pipeline.commands.doctor_checks import (
    Finding,
    check_checkpoint,
    check_data,
    check_devices,
    check_disk,
    check_local_network,
    check_model,
    check_recipe,
    check_software,
    wrong,
)
from pipeline.parallel.health import network_problem
from pipeline.parallel.launch import fill_rank_variables
from pipeline.training.run.redact import redact

LONGEST_CHECK = timedelta(days=2)


def doctor(options: argparse.Namespace) -> int:
    """Print the findings; return 0, or 1 if there is a problem."""
    fill_rank_variables()
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    options.ranks = options.ranks or world
    if world > 1:
        return _across_ranks(options, rank, world)
    findings = []
    for check in [*_own_checks(options), check_local_network, *_file_checks(options)]:
        for finding in check():
            _show(finding)
            findings.append(finding)
    return _summarize(findings)


def _own_checks(options: argparse.Namespace) -> list[Callable[[], Iterator[Finding]]]:
    """Return the checks that every rank runs on its own."""
    return [check_software, check_devices, lambda: check_disk(options.run_dir or Path("runs"))]


def _file_checks(options: argparse.Namespace) -> Iterator[Callable[[], Iterator[Finding]]]:
    if options.data is not None:
        yield lambda: check_data(options.data)
    if options.checkpoint is not None:
        yield lambda: check_checkpoint(options.checkpoint)
    if options.model is not None:
        yield lambda: check_model(options.model)
    if options.recipe:
        yield lambda: check_recipe(options.recipe, options.flags, options.ranks)


def _across_ranks(options: argparse.Namespace, rank: int, world: int) -> int:
    """Check every rank, and the network between them; rank 0 prints."""
    import torch
    import torch.distributed as dist

    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    problem = network_problem(rank, world, backend="nccl" if torch.cuda.is_available() else "gloo")
    if problem:  # it cannot be sent to rank 0
        _show(wrong(f"rank {rank} on {socket.gethostname()}: {problem}"))
        return 1
    findings = [finding for check in _own_checks(options) for finding in check()]
    gathered: list[tuple[str, list[Finding]]] = [("", [])] * world
    dist.all_gather_object(gathered, (socket.gethostname(), findings))
    if rank == 0:
        findings += [found for check in _file_checks(options) for found in check()]
        for finding in findings:
            _show(finding)
        for other, (host, found) in enumerate(gathered[1:], start=1):
            for finding in (finding for finding in found if finding.kind == "wrong"):
                _show(Finding("wrong", f"rank {other} on {host}: {finding.text}"))
                findings.append(finding)
        findings += _differences(gathered)
    code = _share_code(_summarize(findings) if rank == 0 else 0, rank)
    dist.destroy_process_group()
    return code


def _share_code(code: int, rank: int) -> int:
    """Return rank 0's exit code on every rank. Others wait as long as rank 0 hashes files, so this is no collective."""
    from torch.distributed.distributed_c10d import _get_default_store

    store = _get_default_store()
    if rank == 0:
        store.set("code", str(code))
    else:
        store.wait(["code"], LONGEST_CHECK)
    return int(store.get("code"))


def _differences(gathered: Sequence[tuple[str, Sequence[Finding]]]) -> list[Finding]:
    """Return a problem for each rank whose software differs from rank 0; every rank's first finding holds versions."""
    odd = [
        wrong(f"rank {rank} on {host} has different software from rank 0 ({found[0].text}): install the same versions")
        for rank, (host, found) in enumerate(gathered)
        if found[0] != gathered[0][1][0]
    ]
    for finding in odd:
        _show(finding)
    return odd


def _show(finding: Finding) -> None:
    print(f"{finding.kind.upper() if finding.kind == 'wrong' else finding.kind:5}  {redact(finding.text)}", flush=True)


def _summarize(findings: Sequence[Finding]) -> int:
    count = sum(finding.kind == "wrong" for finding in findings)
    print(f"{count} problem{'s' if count > 1 else ''} to fix" if count else "no problems found", flush=True)
    return 1 if count else 0
