"""A real Slurm of two make-believe 8-GPU nodes on loopback: up in about a second, gone afterwards."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.launch import BIN, environment

PACKAGES = "slurmctld slurmd slurm-client"
NODES = ("127.0.0.2", "127.0.0.3")
"""Nodes are named by loopback addresses, so that MASTER_ADDR resolves without an entry in /etc/hosts."""
PENDING = {"PENDING", "RUNNING", "COMPLETING", "CONFIGURING", "REQUEUED"}
_FAKE_GPUS = ("null", "zero", "full", "random", "urandom", "tty", "ptmx", "fuse")
"""Slurm wants character devices for GPUs, and opens none of them."""
_CONF = """\
ClusterName=localtest
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/none
CredType=cred/none
AuthInfo=cred_expire=5
PluginDir={plugins}
PlugStackConfig={root}/plugstack.conf
StateSaveLocation={root}/state
SlurmctldPidFile={root}/run/slurmctld.pid
SlurmctldLogFile={root}/log/slurmctld.log
SlurmdSpoolDir={root}/spool.%n
SlurmdPidFile={root}/run/slurmd.%n.pid
SlurmdLogFile={root}/log/slurmd.%n.log
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
TaskProlog={root}/task_prolog.sh
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
DefMemPerCPU=100
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0,sched_min_interval=0
PriorityType=priority/basic
MpiDefault=none
ReturnToService=2
JobRequeue=1
MinJobAge=3600
KillWait=10
SlurmctldTimeout=30
SlurmdTimeout=10
GresTypes=gpu
NodeName=127.0.0.[2-3] NodeHostname={host} Port={first}-{last} CPUs=64 Boards=1 SocketsPerBoard=2 CoresPerSocket=32 \
ThreadsPerCore=1 RealMemory=100000 Gres=gpu:8 State=UNKNOWN
PartitionName=gpu Nodes=ALL Default=YES MaxTime=7-00:00:00 DefaultTime=01:00:00 State=UP
"""
_TASK_PROLOG = f"""\
#!/bin/sh
if [ "$SLURMD_NODENAME" = {NODES[1]} ] && [ -n "$SICK" ]; then echo "export $SICK"; fi
"""
"""What a job's SICK="NAME=value" names becomes true of its processes on the second node alone."""
# No munge: jobs run as the one user who started the daemons (auth/none). A requeued job waits cred_expire + 1 s,
# instead of two minutes. Without DefMemPerCPU a job takes all memory of its nodes, and jobs run one at a time.


def missing() -> str:
    """Return why no cluster can be started here, or nothing."""
    programs = ("slurmctld", "slurmd", "sbatch")
    absent = [name for name in programs if shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin") is None]
    return f"no {', '.join(absent)} here: apt-get install --no-install-recommends {PACKAGES}" if absent else ""


@dataclass(frozen=True)
class Cluster:
    """A running Slurm; commands are called in ``work``, as a user would in the repository root."""

    root: Path
    work: Path

    @property
    def environment(self) -> dict[str, str]:
        """What a user's shell has: this cluster, the project's programs, one thread a process."""
        path = f"{BIN}{os.pathsep}{os.environ['PATH']}{os.pathsep}/usr/sbin"
        return {**environment(), "PATH": path, "SLURM_CONF": str(self.root / "slurm.conf")}

    def call(self, *command: str, env: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        """Run a command and return its output and exit code."""
        return subprocess.run(
            command, cwd=self.work, env={**self.environment, **(env or {})}, text=True, capture_output=True,
            timeout=60, check=False,
        )  # fmt: skip

    def submit(self, *command: str, env: Mapping[str, str] | None = None) -> str:
        """Call sbatch; return the job's id."""
        done = self.call("sbatch", "--parsable", *command, env=env)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def state(self, job: str) -> str:
        """Return a job's state, or nothing when the controller is too busy to answer."""
        return self.call("squeue", "-h", "-t", "all", "-j", job, "-o", "%T").stdout.strip()

    def wait(self, job: str, timeout_s: float = 240) -> str:
        """Wait for a job's end; return its last state."""
        states = [""]

        def ended() -> bool:
            states[0] = self.state(job)
            return states[0] not in {"", *PENDING}

        self.until(ended, timeout_s, f"job {job} to end")
        return states[0]

    def until(self, condition: Callable[[], bool], timeout_s: float, what: str, every_s: float = 0.2) -> None:
        """Wait until something is so; a test fails when it is not within ``timeout_s``."""
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < deadline, f"waited {timeout_s} s for {what}\n{self.logs()}"
            time.sleep(every_s)

    def logs(self) -> str:
        """All job logs, for messages of failed tests."""
        files = sorted((self.work / "slurm/logs").glob("*.log"))
        return "\n".join(f"--- {path.name}\n{path.read_text()[-4000:]}" for path in files)

    def log(self, job: str) -> str:
        """The log of one job; nothing before it has begun."""
        paths = [*(self.work / "slurm/logs").glob(f"*-{job}.log")]
        return paths[0].read_text() if paths else ""

    def start_node(self, node: str) -> None:
        subprocess.run(["slurmd", "-N", node], env=self.environment, check=True)

    @contextmanager
    def missing_nodes_after(self, seconds: int) -> Iterator[None]:
        """Let Slurm miss a node that is silent for so long, meanwhile."""
        conf = self.root / "slurm.conf"
        before = conf.read_text()
        try:
            conf.write_text(re.sub("SlurmdTimeout=.*", f"SlurmdTimeout={seconds}", before))
            self.call("scontrol", "reconfigure")
            yield
        finally:
            conf.write_text(before)
            self.call("scontrol", "reconfigure")

    def kill_node(self, node: str) -> None:
        """Do what a power cut does: the node's daemon, its job steps and their processes are gone at once."""
        daemon = _pid(self.root / f"run/slurmd.{node}.pid")
        own = [pid for pid in _processes() if _belongs(pid, node, str(self.root))]
        steps = {_parent(pid) for pid in own}
        for pid in [daemon, *(step for step in steps if "slurmstepd" in _name(step)), *own]:
            _kill(pid, signal.SIGKILL)

    def stop(self) -> None:
        """End the jobs, then exactly the daemons of this cluster."""
        self.call("scancel", "--me")
        self.until(lambda: not self.call("squeue", "-h").stdout, 30, "jobs to be cancelled")
        pids = [_pid(path) for path in (self.root / "run").glob("*.pid")]
        for pid in pids:
            _kill(pid, signal.SIGTERM)
        deadline = time.monotonic() + 10
        while any(Path(f"/proc/{pid}").exists() for pid in pids) and time.monotonic() < deadline:
            time.sleep(0.1)
        for pid in pids:
            _kill(pid, signal.SIGKILL)


def start(root: Path, work: Path) -> Cluster:
    """Start a controller and two nodes; return when both are idle."""
    for name in ("state", "log", "run", *(f"spool.{node}" for node in NODES)):
        (root / name).mkdir(parents=True)
    port = _free_ports(4)
    (plugins,) = (path.parent for path in Path("/usr/lib").glob("*/slurm*/select_cons_tres.so"))
    conf = _CONF.format(
        host=socket.gethostname().split(".")[0], root=root, port=port, first=port + 2, last=port + 3,
        user=subprocess.check_output(["id", "-un"], text=True).strip(), plugins=plugins,
    )  # fmt: skip
    (root / "slurm.conf").write_text(conf)
    devices = [name for name in _FAKE_GPUS if Path("/dev", name).exists()]
    (root / "gres.conf").write_text("".join(f"Name=gpu File=/dev/{name}\n" for name in devices))
    (root / "plugstack.conf").touch()
    (root / "task_prolog.sh").write_text(_TASK_PROLOG)
    (root / "task_prolog.sh").chmod(0o755)
    cluster = Cluster(root, work)
    # By exactly this name: Slurm's daemons look at argv[0], and Debian's "slurmctld-wlm" drops the GPUs in silence.
    subprocess.run(["slurmctld", "-c"], env=cluster.environment, check=True)
    for node in NODES:
        cluster.start_node(node)
    cluster.until(lambda: _idle(cluster) == len(NODES), 30, "the nodes")
    return cluster


def _idle(cluster: Cluster) -> int:
    return cluster.call("sinfo", "-h", "-N", "-o", "%T").stdout.split().count("idle")


def _free_ports(count: int) -> int:
    """Return the first of ``count`` ports in a row that nothing listens on at this moment."""
    for base in range(31000, 32000, 10):
        try:
            for port in range(base, base + count):
                with socket.socket() as probe:
                    probe.bind(("127.0.0.1", port))
        except OSError:
            continue
        return base
    raise AssertionError("no free ports between 31000 and 32000")


def _pid(path: Path) -> int:
    return int(path.read_text())


def _processes() -> list[int]:
    return [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]


def _belongs(pid: int, node: str, root: str) -> bool:
    """Whether a process was started by a job step on a node of this cluster."""
    try:
        variables = Path(f"/proc/{pid}/environ").read_text(errors="replace").split("\0")
    except OSError:
        return False
    return f"SLURMD_NODENAME={node}" in variables and any(root in value for value in variables)


def _parent(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0


def _name(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text(errors="replace")
    except OSError:
        return ""


def _kill(pid: int, sig: int) -> None:
    try:
        os.kill(pid, sig)
    except ProcessLookupError:
        return
