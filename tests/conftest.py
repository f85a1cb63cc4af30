"""What the tests share: real runs in real processes, killed as a cluster would kill them."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import pytest
from hypothesis import HealthCheck, settings

if TYPE_CHECKING:
    from harness.distributed.ranks import World

# their fixtures
pytest_plugins = (
    "s3_server",  # first: pytest rewrites the assertions of a module that it is the first to import
    "library_runs",
    "launches",
    "recipe_runs",
    "slurm_cluster",
    "small_disks",
)
REPO = Path(__file__).resolve().parent.parent
TRAIN = REPO / "harness" / "train.py"
# of a test that is not slow, or of what it is set up with: the slowest takes a minute, on a machine
# that is idle
LONGEST_S = 400
CLEAN = {
    key: value
    for key, value in os.environ.items()
    if not key.startswith(("SLURM_", "TORCHELASTIC", "HARNESS_"))
}
ENVIRONMENT = CLEAN | {
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": os.pathsep.join(map(str, (REPO, REPO / "tests", REPO / "tests/support"))),
}


# a slow one is no finding
settings.register_profile(
    "any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("any machine")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="also the long storms and matrices")
    parser.addoption("--gpu", action="store_true", help="the tests that need a GPU, and no other")


def pytest_configure(config: pytest.Config) -> None:
    """All tests but those of GPUs go without, also where there is one: their ranks are more than it
    could serve."""
    heed_signals()
    if not config.getoption("--gpu"):
        os.environ["CUDA_VISIBLE_DEVICES"] = ENVIRONMENT["CUDA_VISIBLE_DEVICES"] = ""


def heed_signals() -> None:
    """Take back that a signal is ignored: the processes that tests start would ignore it as well.

    A script's background job ignores SIGINT, and one under nohup SIGHUP."""
    for number, action in (
        (signal.SIGINT, signal.default_int_handler),
        (signal.SIGHUP, signal.SIG_DFL),
    ):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, action)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Without --slow the slow ones are not part of the suite: deselected, not skipped. So with
    those that need a GPU."""
    chosen = [
        item for item in items if bool(item.get_closest_marker("gpu")) == config.getoption("--gpu")
    ]
    chosen = [
        item for item in chosen if config.getoption("--slow") or not item.get_closest_marker("slow")
    ]
    config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
    items[:] = chosen


@contextlib.contextmanager
def in_time(item: pytest.Item) -> Iterator[None]:
    """What hangs fails with its stack, and the other tests go on."""

    def ring(number: int, frame: object) -> None:
        pytest.fail(f"it hangs: not over after {LONGEST_S} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, 0 if item.get_closest_marker("slow") else LONGEST_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item: pytest.Item) -> Iterator[None]:
    with in_time(item):
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    with in_time(item):
        return (yield)


class Clock:
    """Goes on when it is told to."""

    def __init__(self, now: float) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


def torchrun(ranks: int, *settings: str, options: tuple[str, ...] = ()) -> list[str]:
    """The command line that trains on so many processes of this machine."""
    return [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc-per-node={ranks}",
        *options,
        str(TRAIN),
        *settings,
    ]


def alone(*settings: str) -> list[str]:
    """The command line that trains in one process, without torchrun."""
    return [sys.executable, str(TRAIN), *settings]


def harness(*arguments: str) -> list[str]:
    """A command line of the `harness` program."""
    return [sys.executable, "-m", "harness", *arguments]


def run(
    command: list[str],
    *,
    cwd: Path | None = None,
    env: dict[str, str] | None = None,
    limit_s: float = 180,
) -> subprocess.CompletedProcess[str]:
    """Run to the end; on expiry the whole tree is killed."""
    process = start(command, cwd=cwd, env=env)
    try:
        out, err = process.communicate(timeout=limit_s)
    except subprocess.TimeoutExpired:
        kill_tree(process.pid)
        out, err = process.communicate()
        pytest.fail(f"still running after {limit_s} s: {command}\n{out}\n{err}")
    finally:
        if process.poll() is None:  # the test was ended
            kill_tree(process.pid)
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def start(
    command: list[str],
    *,
    cwd: Path | None = None,
    env: dict[str, str] | None = None,
    output: object = subprocess.PIPE,
) -> subprocess.Popen[str]:
    """Start and go on."""
    errors = subprocess.PIPE if output is subprocess.PIPE else subprocess.STDOUT
    return subprocess.Popen(
        command, cwd=cwd, env=ENVIRONMENT | (env or {}), stdout=output, stderr=errors, text=True
    )  # type: ignore[call-overload]


def tree(pid: int) -> list[psutil.Process]:
    """A process and all that descend from it; torchrun gives its workers sessions of their own, so
    a group is not enough."""
    try:
        process = psutil.Process(pid)
        return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def kill_tree(pid: int) -> None:
    """SIGKILL to a process and all its descendants."""
    for process in tree(pid):
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def outliving(processes: list[psutil.Process], limit_s: float = 5) -> list[psutil.Process]:
    """Which of them still run after so long; a dead one that nobody has reaped does not. They must
    have more to do than that."""

    def runs(process: psutil.Process) -> bool:
        try:
            return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False

    until = time.monotonic() + limit_s
    while (
        alive := [process for process in processes if runs(process)]
    ) and time.monotonic() < until:
        time.sleep(0.02)
    return alive


def workers_of(pid: int) -> list[psutil.Process]:
    """torchrun's ranks, in their order."""
    found = [p for p in tree(pid)[1:] if str(TRAIN) in " ".join(_command_of(p)) and p.ppid() == pid]
    return sorted(found, key=lambda p: int(p.environ().get("RANK", "0")))


def _command_of(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def events(directory: Path, kind: str | None = None) -> list[dict]:
    """The run's events, in the order of attempts; a last line that is still being written is left
    out."""
    found = []
    for file in sorted(directory.glob("events/*.jsonl")):
        for line in file.read_text().splitlines():
            with contextlib.suppress(ValueError):
                found.append(json.loads(line))
    return [event for event in found if kind is None or event["event"] == kind]


def wait_until(
    condition: Callable[[], object], what: str, limit_s: float = 150, every_s: float = 0.02
) -> None:
    """Wait for something to become true, and fail in words if it does not."""
    until = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < until, f"not within {limit_s} s: {what}"
        time.sleep(every_s)


@contextlib.contextmanager
def undone() -> Iterator[None]:
    """Training in this process catches signals, hooks into uncaught errors and joins a group: all
    of it is undone."""
    import torch.distributed as dist

    from harness import preemption, state

    handlers = {number: signal.getsignal(number) for number in preemption.STOP_SIGNALS}
    hook, path, generators = sys.excepthook, list(sys.path), state.rng_state()
    hook_of_threads = threading.excepthook
    try:
        yield
    finally:
        preemption.clear()
        for number, handler in handlers.items():
            signal.signal(number, handler)
        sys.excepthook, sys.path[:] = hook, path
        threading.excepthook = hook_of_threads
        state.set_rng_state(generators)
        if dist.is_initialized():
            dist.destroy_process_group()


@pytest.fixture
def process_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """For tests that train in this process, in a folder of their own: afterwards it is as
    before."""
    monkeypatch.chdir(tmp_path)
    with undone():
        yield


@pytest.fixture(autouse=True)
def unwatched() -> Iterator[None]:
    """A loop that a test leaves open in this process is not taken for a hung one minutes later."""
    from harness.preemption import watchdog

    yield
    watchdog.close_living()


@pytest.fixture
def started() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """`start`, for processes that must not outlive the test."""
    processes: list[subprocess.Popen[str]] = []

    def begin(*arguments: object, **options: object) -> subprocess.Popen[str]:
        processes.append(start(*arguments, **options))  # type: ignore[arg-type]
        return processes[-1]

    yield begin
    for process in processes:
        for member in tree(process.pid):
            with contextlib.suppress(psutil.NoSuchProcess):
                member.send_signal(signal.SIGCONT)
        kill_tree(process.pid)
        process.wait()
        for stream in (process.stdout, process.stderr):
            if stream:
                stream.close()


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    """This process as the only rank, for what is collective."""
    import torch.distributed

    own = not torch.distributed.is_initialized()
    from harness.distributed import join

    world = join.join(60)
    yield world
    if own:
        world.leave()
