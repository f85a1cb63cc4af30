"""A real SLURM cluster for the tests: munged, slurmctld and some slurmd on this one machine, on
loopback, whose nodes can die."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from s3_server import free_ports

LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None
PR_SET_PDEATHSIG = 1
PROGRAMS = (
    "munged",
    "slurmctld",
    "slurmd",
    "sbatch",
    "srun",
    "squeue",
    "scontrol",
    "scancel",
    "sinfo",
)
SEARCH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/local/sbin", "/usr/sbin", "/sbin"])
KILL_WAIT_S = 10  # between the SIGTERM and the SIGKILL of a job that is cancelled or out of time
# of the partitions `low` and `lowcancel`; less would not come true: a preemption goes on every
# KillWait + MessageTimeout only
GRACE_S = 20
CRED_EXPIRE_S = 5  # a requeued job waits this and a little more before it runs again
NODE_TIMEOUT_S = 20  # until a node that does not answer counts as down
FINISHED = (
    "COMPLETED",
    "FAILED",
    "CANCELLED",
    "TIMEOUT",
    "NODE_FAIL",
    "PREEMPTED",
    "BOOT_FAIL",
    "DEADLINE",
    "OUT_OF_MEMORY",
)

CONFIGURATION = """\
ClusterName=tests
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={controller_port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={root}/munge.socket,cred_expire={cred_expire}
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
StateSaveLocation={root}/state
SlurmctldPidFile={root}/slurmctld.pid
SlurmctldLogFile={root}/slurmctld.log
SlurmdSpoolDir={root}/spool/%n
SlurmdPidFile={root}/%n.pid
SlurmdLogFile={root}/%n.log
SlurmctldDebug=debug
SlurmdDebug=debug
TmpFS=/tmp
ProctrackType={proctrack}
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
PropagateResourceLimits=NONE
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
JobCompType=jobcomp/none
FirstJobId={first_job}
KillWait={kill_wait}
SlurmdTimeout={node_timeout}
SlurmctldTimeout=20
MessageTimeout=10
TCPTimeout=2
InactiveLimit=0
OverTimeLimit=0
MinJobAge=600
MaxJobCount=2000
CompleteWait=0
JobRequeue=1
ReturnToService=2
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_interval=1,sched_min_interval=0,batch_sched_delay=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
{nodes}
PartitionName=low Nodes=ALL Default=YES PriorityTier=1 PreemptMode=REQUEUE \
GraceTime={grace} MaxTime=INFINITE State=UP
PartitionName=lowkill Nodes=ALL PriorityTier=1 PreemptMode=REQUEUE \
GraceTime=0 MaxTime=INFINITE State=UP
PartitionName=lowcancel Nodes=ALL PriorityTier=1 PreemptMode=CANCEL \
GraceTime={grace} MaxTime=INFINITE State=UP
PartitionName=high Nodes=ALL PriorityTier=10 PreemptMode=OFF MaxTime=INFINITE State=UP
"""


def _die_with_parent() -> None:
    """In the child: SIGKILL when the thread that started it ends, so that a killed pytest leaves no
    cluster behind."""
    if LIBC is not None:
        LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _program(name: str) -> str:
    found = shutil.which(name, path=SEARCH)
    if found is None:
        pytest.fail(f"no SLURM: `{name}` is not installed; apt-get install slurm-wlm munge")
    return found


def _members_of(configuration: Path, node: str | None, daemons: set[int]) -> list[psutil.Process]:
    """Processes of a cluster's jobs: slurmstepd leaves its parent and renames itself, but all of
    them keep these two variables."""
    wanted = {f"SLURM_CONF={configuration}"} | ({f"SLURMD_NODENAME={node}"} if node else set())
    found: dict[int, psutil.Process] = {}
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            has = set(Path(f"/proc/{process.pid}/environ").read_text(errors="replace").split("\0"))
            on_node = any(variable.startswith("SLURMD_NODENAME=") for variable in has)
            if (
                wanted <= has
                and on_node
                and process.pid not in daemons
                and process.status() != psutil.STATUS_ZOMBIE
            ):
                found |= {
                    member.pid: member for member in [process, *process.children(recursive=True)]
                }
    # still the same process, not only the same number
    return [process for process in found.values() if process.is_running()]


def _bury_the_abandoned() -> None:
    """What a killed pytest left: its daemons went with it, its jobs did not."""
    for owner in Path("/tmp").glob("slurm-*/owner"):
        with contextlib.suppress(OSError, ValueError):
            pid, born = owner.read_text().split()
            try:
                # the clock may have been set meanwhile
                abandoned = abs(psutil.Process(int(pid)).create_time() - float(born)) > 5
            except psutil.NoSuchProcess:
                abandoned = True
            if abandoned:
                for process in _members_of(owner.with_name("slurm.conf"), None, set()):
                    with contextlib.suppress(psutil.NoSuchProcess):
                        process.kill()
                shutil.rmtree(owner.parent, ignore_errors=True)


class SlurmCluster:
    """One cluster with its own munged, controller and nodes n1, n2, …; nothing of it is outside its
    directory but its ports."""

    def __init__(
        self, nodes: int = 3, cpus: int = 4, proctrack: str = "proctrack/linuxproc", extra: str = ""
    ) -> None:
        self.nodes = [f"n{number}" for number in range(1, nodes + 1)]
        self.cpus, self.proctrack, self.extra = cpus, proctrack, extra
        # short: the path of a socket has 107 characters
        self.root = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))
        self.configuration = self.root / "slurm.conf"
        self.processes: dict[str, subprocess.Popen[bytes]] = {}

    @property
    def environment(self) -> dict[str, str]:
        """What a process needs to find the cluster."""
        return {"SLURM_CONF": str(self.configuration), "PATH": SEARCH}

    def __enter__(self) -> SlurmCluster:
        try:
            return self.start()
        except BaseException:
            self.stop()
            raise

    def __exit__(self, *_: object) -> None:
        self.stop()

    # The cluster and its parts.

    def start(self, limit_s: float = 100) -> SlurmCluster:
        """Start all of it and wait until every node is idle. Call it from a thread that lives as
        long as the cluster shall."""
        for name in PROGRAMS:
            _program(name)
        if os.geteuid() != 0:
            pytest.fail(
                "the SLURM cluster of the tests runs as root only: "
                "slurmd refuses to start jobs for any other user"
            )
        _bury_the_abandoned()
        for _ in range(3):
            self._configure()
            if self._begin_all(limit_s):
                return self
            told = self._seen()
            self.stop()  # somebody took one of the ports in between
            self.root.mkdir()
        pytest.fail(f"the SLURM cluster did not start within {limit_s} s:\n{told}")

    def stop(self) -> None:
        """End all its processes, those of its jobs too, and remove the directory."""
        for name in ["slurmctld", *self.nodes, "munged"]:
            self._kill(name)
        for _ in range(100):
            left = self._members()
            for process in left:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            if not left:
                break
            time.sleep(0.02)
        shutil.rmtree(self.root, ignore_errors=True)

    def start_controller(self, limit_s: float = 100) -> None:
        """Start it (again), and wait until it answers."""
        self._begin_controller()
        self._wait(self._answers, "the controller answers", limit_s)

    def kill_controller(self) -> None:
        """SIGKILL; jobs go on, and their end is reported once it is back. What was submitted in the
        last five seconds is lost."""
        self._kill("slurmctld")

    def start_node(self, node: str, limit_s: float = 100) -> None:
        """Start a node's daemon, and wait until the node may take jobs (again)."""
        self._begin_node(node)
        usable = ("idle", "mixed", "allocated", "completing")
        self._wait(lambda: self.node_states().get(node) in usable, f"{node} is usable", limit_s)

    def mark_down(self, node: str) -> None:
        """Tell the controller that a node is dead, which it would find out by itself only after
        NODE_TIMEOUT_S and more."""
        self.command("scontrol", "update", f"nodename={node}", "state=down", "reason=test")

    def kill_slurmd(self, node: str) -> None:
        """SIGKILL to the daemon only; the processes of its jobs live on."""
        self._kill(node)

    def kill_node(self, node: str) -> None:
        """SIGKILL to the daemon and to all processes of jobs on it, as when a machine goes."""
        self._kill(node)
        for _ in range(100):  # what was being forked meanwhile
            left = self._members(node)
            for process in left:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            if not left:
                return
            time.sleep(0.01)
        pytest.fail(f"processes of {node} survive SIGKILL: {left}")

    def drain(self, node: str, reason: str = "test") -> None:
        self.command("scontrol", "update", f"nodename={node}", "state=drain", f"reason={reason}")

    def resume(self, node: str) -> None:
        # one that is not down says no
        self.command("scontrol", "update", f"nodename={node}", "state=resume", check=False)

    def node_states(self) -> dict[str, str]:
        """The states as sinfo writes them: idle, mixed, allocated, down, drained, …, with a * if
        the node does not answer."""
        answer = self.command("sinfo", "-h", "-N", "-p", "high", "-o", "%N %T", check=False)
        return dict(line.split(maxsplit=1) for line in answer.stdout.splitlines())

    def idle(self, limit_s: float = 150) -> None:
        """Cancel every job, bring every part back, and wait until no job is left and all nodes are
        idle."""
        if self._gone("slurmctld"):
            self.start_controller()
        for node in self.nodes:
            if self._gone(node):
                self._begin_node(node)
        until, hard = time.monotonic() + limit_s, time.monotonic() + 2
        while True:
            jobs = self.command("squeue", "-h", "-o", "%A").stdout.split()
            states = self.node_states()
            if not jobs and set(states.values()) == {"idle"}:
                return
            assert time.monotonic() < until, (
                f"not idle within {limit_s} s: {self._seen()}\n{self.command('squeue').stdout}"
            )
            if jobs:
                self.command("scancel", *jobs, check=False)
            if time.monotonic() > hard:  # what traps SIGTERM need not be waited for
                for process in self._members():
                    with contextlib.suppress(psutil.NoSuchProcess):
                        process.kill()
            for node, state in states.items():
                if state.startswith(("down", "drain")) and not state.endswith("*"):
                    self.resume(node)
            time.sleep(0.1)

    # Jobs.

    def command(
        self, *arguments: str, check: bool = True, limit_s: float = 180
    ) -> subprocess.CompletedProcess[str]:
        """One of SLURM's commands, on this cluster."""
        done = subprocess.run(
            [_program(arguments[0]), *arguments[1:]],
            env=self._environment(),
            capture_output=True,
            text=True,
            timeout=limit_s,
        )
        assert not check or done.returncode == 0, (
            f"{arguments} ended with {done.returncode}:\n{done.stdout}{done.stderr}"
        )
        return done

    def submit(self, script: Path, *options: str, environment: dict[str, str] | None = None) -> str:
        """sbatch; the number of the job. The job gets the environment of this process and what is
        given."""
        command = [_program("sbatch"), "--parsable", *options, str(script)]
        done = subprocess.run(
            command,
            env=self._environment() | (environment or {}),
            capture_output=True,
            text=True,
            timeout=180,
        )
        assert done.returncode == 0, (
            f"{command} ended with {done.returncode}:\n{done.stdout}{done.stderr}"
        )
        return done.stdout.strip().partition(";")[0]

    def state(self, job: str) -> str:
        """PENDING, RUNNING, COMPLETING, …; of a job that is over what it became."""
        listed = self.command("squeue", "-h", "-j", job, "-o", "%T", check=False).stdout.split()
        return listed[0] if listed else self.fields(job).get("JobState", "UNKNOWN")

    def fields(self, job: str) -> dict[str, str]:
        """What `scontrol show job` tells: JobState, Restarts, ExitCode, Reason, Requeue, BatchHost,
        NodeList, …"""
        shown = self.command("scontrol", "show", "job", "-o", job, check=False).stdout
        return dict(
            re.findall(
                r"(?:^|(?<=\s))([A-Za-z:/_]+)=(.*?)(?=\s+[A-Z][A-Za-z:/_]*=|\s*$)", shown.strip()
            )
        )

    def wait_for(self, job: str, *states: str, limit_s: float = 150) -> str:
        """Wait until the job is in one of the states (without any: over for good); the state."""
        until = time.monotonic() + limit_s
        while (state := self.state(job)) not in (states or FINISHED):
            if time.monotonic() > until:
                pytest.fail(
                    f"job {job} is {state}, not {states or 'over'}, after {limit_s} s: "
                    f"{self.fields(job)}; {self._seen()}"
                )
            time.sleep(0.1)
        return state

    def cancel(self, job: str) -> None:
        self.command("scancel", job)

    def restarts(self, job: str) -> int:
        return int(self.fields(job)["Restarts"])

    # How it is done.

    def _configure(self) -> None:
        self.root.chmod(0o755)
        (self.root / "owner").write_text(f"{os.getpid()} {psutil.Process().create_time()}")
        for directory in ("state", "spool"):
            (self.root / directory).mkdir()
        key = self.root / "munge.key"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o600)
        # works where /sys/fs/cgroup is of version 1; one cluster at a time: the groups bear the
        # nodes' names
        if self.proctrack == "proctrack/cgroup":
            (self.root / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\nCgroupAutomount=yes\n")
        controller, *ports = free_ports(1 + len(self.nodes))
        self.configuration.write_text(
            CONFIGURATION.format(
                root=self.root,
                controller_port=controller,
                # jobs make ports of it; another cluster's on this machine must differ
                first_job=1000 + secrets.randbelow(1_000_000),
                proctrack=self.proctrack,
                cred_expire=CRED_EXPIRE_S,
                kill_wait=KILL_WAIT_S,
                node_timeout=NODE_TIMEOUT_S,
                grace=GRACE_S,
                nodes="\n".join(
                    f"NodeName={node} NodeHostname=localhost NodeAddr=127.0.0.1 "
                    f"Port={port} CPUs={self.cpus} State=UNKNOWN"
                    for node, port in zip(self.nodes, ports, strict=True)
                ),
            )
            + self.extra
        )

    def _begin_all(self, limit_s: float) -> bool:
        """Start all parts; whether all nodes came to be idle."""
        until = time.monotonic() + limit_s
        at = {
            part: str(self.root / f"munge.{part}")
            for part in ("key", "socket", "pid", "log", "seed")
        }
        options = [
            f"--{part}{'' if part == 'socket' else '-file'}={path}" for part, path in at.items()
        ]
        self._begin("munged", _program("munged"), "--foreground", "--force", *options)
        self._begin_controller()
        for node in self.nodes:
            self._begin_node(node)
        ready = [
            Path(at["socket"]).exists,
            self._answers,
            lambda: set(self.node_states().values()) == {"idle"},
        ]
        while ready:
            if ready[0]():
                ready.pop(0)
            elif any(map(self._gone, self.processes)) or time.monotonic() > until:
                return False
            else:
                time.sleep(0.05)
        return True

    def _begin_controller(self) -> None:
        self._begin("slurmctld", _program("slurmctld"), "-D", "-f", str(self.configuration))

    def _begin_node(self, node: str) -> None:
        self._begin(
            node,
            _program("slurmd"),
            "-D",
            "-N",
            node,
            "-f",
            str(self.configuration),
            environment={"SLURMD_NODENAME": node},
        )

    def _answers(self) -> bool:
        return "is UP" in self.command("scontrol", "ping", check=False).stdout

    def _environment(self) -> dict[str, str]:
        clean = {
            key: value
            for key, value in os.environ.items()
            if not key.startswith(("SLURM", "SBATCH", "SQUEUE", "SCANCEL", "SINFO"))
        }
        return clean | self.environment

    def _begin(self, name: str, *command: str, environment: dict[str, str] | None = None) -> None:
        assert self._gone(name), f"{name} already runs"
        with (self.root / f"{name}.out").open("ab") as out:
            self.processes[name] = subprocess.Popen(
                command,
                cwd=self.root,
                env=self._environment() | (environment or {}),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                preexec_fn=_die_with_parent,
                start_new_session=True,  # a Ctrl-C in the terminal is for pytest
            )

    def _gone(self, name: str) -> bool:
        return name not in self.processes or self.processes[name].poll() is not None

    def _kill(self, name: str) -> None:
        process = self.processes.pop(name, None)
        if process is not None:
            process.kill()
            process.wait()

    def _members(self, node: str | None = None) -> list[psutil.Process]:
        return _members_of(
            self.configuration, node, {process.pid for process in self.processes.values()}
        )

    def _seen(self) -> str:
        """What tells most when something went wrong."""
        states = {} if self._gone("slurmctld") else self.node_states()
        ended = [name for name in self.processes if self._gone(name)]
        files = [*sorted(self.root.glob("*.log")), *(self.root / f"{name}.out" for name in ended)]
        tails = [f"{file.name}: …{file.read_text(errors='replace')[-1500:]}" for file in files]
        return "\n".join([f"nodes {states}, ended by themselves {ended}", *tails])

    def _wait(self, condition: Callable[[], bool], what: str, limit_s: float) -> None:
        until = time.monotonic() + limit_s
        while not condition():
            if time.monotonic() > until:
                pytest.fail(f"SLURM: not within {limit_s} s: {what}\n{self._seen()}")
            time.sleep(0.05)


@pytest.fixture(scope="session")
def slurm_cluster() -> Iterator[SlurmCluster]:
    """The cluster that all tests share, started at the first use."""
    with SlurmCluster() as cluster:
        yield cluster


@pytest.fixture
def slurm(slurm_cluster: SlurmCluster) -> Iterator[SlurmCluster]:
    """The shared cluster, whole and idle; whatever the test leaves is cancelled."""
    slurm_cluster.idle()
    yield slurm_cluster
    slurm_cluster.idle()
