"""The checks of ``mma doctor``: each yields its findings and, for a problem, the fix."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NoReturn

import torch
from safetensors import safe_open

from data_prep.common.errors import UserError
from data_prep.verify import verify
from pipeline.checkpoints.checkpoint import Checkpoint, checkpoint_folders, unfinished_folders
from pipeline.checkpoints.manifest import MANIFEST
from pipeline.checkpoints.shards import first_not_finite
from pipeline.parallel.health import disk_problem, gpu_problem, network_problem
from pipeline.parallel.launch import free_port
from pipeline.serving.export import verify_export
from pipeline.training.run.environment import git_state, versions
from pipeline.training.run.state import RunState

GIB = 2**30
LOCAL_RANKS = 2
_RESULT = "result: "


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    kind: Literal["fine", "note", "wrong"]
    text: str


def fine(text: str) -> Finding:
    """Return a finding that needs no action."""
    return Finding("fine", text)


def note(text: str) -> Finding:
    """Return a finding that is worth knowing."""
    return Finding("note", text)


def wrong(text: str) -> Finding:
    """Return a problem, with its fix."""
    return Finding("wrong", text)


def check_software() -> Iterator[Finding]:
    """Check that all packages are installed, in tested versions."""
    from pipeline.parallel.zero3 import check_version

    found = versions()
    yield fine(
        f"python {sys.version.split()[0]}, " + ", ".join(f"{name} {text}" for name, text in found.items() if text)
    )
    for name in (name for name, text in found.items() if text is None):
        yield wrong(f"{name} is not installed: make setup")
    untested = check_version()
    if untested:
        yield wrong(f"{untested}: pip install -c constraints.txt deepspeed")
    if torch.version.cuda:
        nccl: tuple[int, ...] = torch.cuda.nccl.version() if torch.cuda.is_available() else ()  # type: ignore[no-untyped-call]
        yield fine(f"CUDA {torch.version.cuda}, NCCL {'.'.join(map(str, nccl)) or 'not in use'}")
    git = git_state()
    if git is not None:
        dirty = f", {git['changed'][-1]}, uncommitted" if git["dirty"] else ""
        yield note(f"git commit {str(git['commit'])[:12]}{dirty}")


def check_devices() -> Iterator[Finding]:
    """Check that torch sees every GPU and that each has free memory and computes correctly; report the host."""
    cores, memory = os.cpu_count(), os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / GIB
    yield fine(f"{cores} CPU cores, {memory:.1f} GiB of host memory free")
    present = sorted(Path("/dev").glob("nvidia[0-9]*"))
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    if present and not torch.cuda.is_available():
        why = "torch is built without CUDA: install a CUDA build" if not torch.version.cuda else (
            f"CUDA_VISIBLE_DEVICES={hidden!r} hides them: unset it" if hidden is not None
            else "the driver may be older than torch's CUDA: see nvidia-smi"
        )  # fmt: skip
        yield wrong(f"this machine has {len(present)} GPUs but torch sees none; {why}")
    elif not torch.cuda.is_available():
        yield note("no GPU: training would use the CPU")
    for index in range(torch.cuda.device_count()):
        problems = list(gpu_problem(index))
        yield from map(wrong, problems)
        if not problems:
            free, total = torch.cuda.mem_get_info(index)
            yield fine(
                f"GPU {index}: {torch.cuda.get_device_name(index)}, {free / GIB:.1f} of {total / GIB:.1f} GiB free"
            )


def check_disk(folder: Path, need_bytes: float = 0) -> Iterator[Finding]:
    """Check that a run folder, or its nearest existing parent, is writable and has room for ``need_bytes``."""
    place = next(path for path in (folder, *folder.resolve().parents) if path.is_dir())
    problems = list(disk_problem(place, max(1.0, need_bytes / GIB)))
    yield from map(wrong, problems)
    if not problems:
        yield fine(f"{place} is writable, {shutil.disk_usage(place).free / GIB:.1f} GiB free")


def check_data(folder: Path) -> Iterator[Finding]:
    """Check every hash of packs, tokenizer, plan and images."""
    try:
        yield from map(fine, verify(folder))
    except (UserError, OSError) as error:
        yield wrong(str(error))


def check_checkpoint(path: Path) -> Iterator[Finding]:
    """Check one checkpoint folder, or a run folder: its state, its checkpoints and the one it resumes from."""
    single = (path / MANIFEST).is_file()
    if not single:
        yield from _check_run(path)
    taken, refused = None, False
    for folder in [path] if single else checkpoint_folders(path):
        try:
            faults = Checkpoint(folder).faults()
            bad_values = [] if faults else list(_not_finite(folder))
        except UserError as error:
            faults, bad_values = [str(error)], []
        if bad_values:
            refused = refused or taken is None
            yield wrong(
                f"{folder}: {len(bad_values)} tensors are not finite, such as {bad_values[0]}; a start refuses this "
                "checkpoint: remove the folder to resume from an earlier one"
            )
        elif not faults:
            yield fine(f"{folder}: complete, all hashes match, all values are finite")
            taken = taken or folder
        else:
            more = f" (and {len(faults) - 1} more files)" if len(faults) > 1 else ""
            yield wrong(f"{faults[0]}{more}: restore the folder from a copy, or remove it")
    if single or taken is None or refused:
        return
    yield note(f"the next start resumes from {taken}")
    yield from check_disk(path, 2 * sum(file.stat().st_size for file in taken.rglob("*") if file.is_file()))


def _not_finite(folder: Path) -> Iterator[str]:
    """Yield the tensors of weights and optimizer state that a start refuses as not finite."""
    for path in sorted(folder.glob("rank-*.safetensors")):
        with safe_open(path, framework="pt") as shards:
            for key in shards.keys():  # noqa: SIM118  # not a dictionary
                if first_not_finite({key: shards.get_tensor(key)}):
                    yield f"{key} in {path.name}"


def check_model(folder: Path) -> Iterator[Finding]:
    """Check every hash and every tensor of an exported model."""
    try:
        yield fine(f"{folder}: {verify_export(folder, full=True)}, all values are finite")
    except (UserError, OSError) as error:
        yield wrong(str(error))


def _check_run(path: Path) -> Iterator[Finding]:
    try:
        run = RunState.read(path)
    except UserError as error:
        yield wrong(str(error))
        return
    place = f"{path}: {run.state} at step {run.step:,}" + (f" of {run.steps:,}" if run.steps else "")
    again = "the same command resumes from the newest complete checkpoint"
    if run.state == "failed":
        yield wrong(f"{place}: {run.error}; see {path / 'logs'}; once that is fixed, {again}")
    elif run.state == "killed":
        yield wrong(f"{place}: its process ended without a report (kill -9, a lost node, a time limit); {again}")
    else:
        yield fine(place)
    if run.checkpoint is None:
        yield (note if run.state == "running" else wrong)(
            f"{path} has no complete checkpoint: the next start begins at step 1"
        )
    if run.state != "running":
        for torn in unfinished_folders(path):
            yield note(f"{torn} is incomplete; starts ignore it, and the next one removes it")


def check_recipe(recipe: str, flags: Sequence[str], ranks: int) -> Iterator[Finding]:
    """Check paths, sizes and batch arithmetic of a recipe, as ``--dry-run`` does, and memory against the local GPU."""
    from pipeline.config.flags import parse
    from pipeline.planning.dry_run import describe
    from pipeline.planning.estimate import WorkloadEstimate
    from pipeline.planning.run_plan import RunPlan

    try:
        plan = RunPlan.build(parse(["--recipe", recipe, *flags]), rank=0, world=ranks)
    except (UserError, OSError) as error:
        yield wrong(f"recipe {recipe}: {error}")
        return
    yield fine(f"recipe {recipe} on {ranks} ranks:\n{describe(plan)}")
    need = max(WorkloadEstimate.of(plan).memory(stage).total for stage in range(plan.topology.pp)) / GIB
    if torch.cuda.is_available():
        total = torch.cuda.mem_get_info(0)[1] / GIB
        if need > total:
            yield wrong(
                f"a rank needs about {need:.1f} GiB, but its GPU has {total:.1f}: add ranks or stages (parallel.pp), "
                "or set parallel.gathered_fraction to 0"
            )
    yield from check_disk(
        Path(plan.config.run_dir), 14 * plan.split.counts.total * (plan.config.checkpoint.keep_last + 1)
    )


def check_local_network() -> Iterator[Finding]:
    """Check a small all-reduce between two processes of this machine."""
    backend = "nccl" if torch.cuda.device_count() >= LOCAL_RANKS else "gloo"
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    command = [sys.executable, "-m", "pipeline.commands.doctor_checks", str(LOCAL_RANKS), backend]
    workers = [
        subprocess.Popen(
            [*command, str(rank)], env={**os.environ, **place, "LOCAL_RANK": str(rank)}, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=Path(__file__).parents[2],
        )
        for rank in range(LOCAL_RANKS)
    ]  # fmt: skip
    results = [_result(worker) for worker in workers]
    for worker in workers:
        worker.communicate()  # closes its input, which lets it end: no process may leave before all have reported
    problem = next(filter(None, results), "")
    if problem:
        yield wrong(f"{problem}; check GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME and the firewall")
    else:
        yield fine(f"{LOCAL_RANKS} processes of this machine all-reduce over {backend}")


def _result(worker: subprocess.Popen[str]) -> str:
    """Return the problem that a worker reports; its exit code does not matter, because it may crash at exit."""
    assert worker.stdout is not None
    lines = []
    for line in worker.stdout:
        if line.startswith(_RESULT):
            return line.removeprefix(_RESULT).strip()
        lines.append(line.strip())
    return f"the test of the network ended without a result: {' '.join(lines[-1:]) or 'no output'}"


def network_worker(words: Sequence[str]) -> NoReturn:
    """Run one rank of `check_local_network` (WORLD BACKEND RANK): print the problem, if any, and wait for end of input.

    It then leaves without the interpreter's shutdown, in which gloo's threads sometimes abort the process
    ("terminate called without an active exception").
    """
    problem = network_problem(int(words[2]), int(words[0]), backend=words[1])
    print(_RESULT + re.sub(r"\s+", " ", problem), flush=True)
    sys.stdin.read()
    os._exit(0)


if __name__ == "__main__":
    network_worker(sys.argv[1:])
