"""Lives of a run on a directory and a bucket, in processes that can be stopped, woken and killed
for real.

A nursery imports torch once and forks a process for each life, so that a life begins in
milliseconds. `train` is the whole program; `write` is the writer's side of it alone: choose, claim,
save some steps, wait for the upload of each, end.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import gc
import json
import os
import runpy
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import programs
import psutil
import small_task
import torch
from conftest import ENVIRONMENT, kill_tree

from harness import train
from harness.arguments import Settings
from harness.checkpoint import attempts, resume, retention
from harness.checkpoint import format as fmt
from harness.checkpoint.catalog import going_on_from, read_catalog
from harness.checkpoint.commit import About, commit
from harness.checkpoint.format import Manifest
from harness.checkpoint.replicate import replicate
from harness.distributed import join
from harness.errors import SaveError
from harness.monitoring.console import Console
from harness.monitoring.goodput import Goodput
from harness.saving import uploader
from harness.saving.checkpointer import Checkpointer
from harness.saving.current_attempt import Parts
from harness.saving.locations import listen
from harness.selfcheck.environment import installed
from harness.state import Captured
from harness.store import Store, open_store
from harness.supervision import exit_record as run_ending
from harness.supervision.exit_record import ExitRecord


def payload(step: int, seed: int = 0) -> dict[str, Any]:
    """A checkpoint's content, by its step and whoever wrote it."""
    generator = torch.Generator().manual_seed(1000 * seed + step)
    return {
        "model_state_dict": {"weight": torch.randn(64, generator=generator)},
        "step": step,
        "epoch": 0,
        "loss": 1 / step,
        "metrics": {"val_loss": 1 / (1 + step)},
        "config": {},
        "format_version": 1,
    }


class Life:
    """One attempt in the test's own process, one thing at a time: surveys, claims, commits, copies,
    lets go."""

    def __init__(self, *stores: Store) -> None:
        self.stores = stores
        found = read_catalog(*stores)
        found.check_same_run()
        self.origin = found.candidates[0] if found.candidates else None
        for store in stores:
            store.prepare(fmt.FOLDERS)
        self.attempt = attempts.claim(found, self.origin, 1)
        self.verified = {self.origin.name} if self.origin else set()
        self.config: dict[str, Any] = {}  # what its checkpoints say that it was told

    def save(self, step: int, final: dict[str, int | None] | None = None) -> Manifest:
        """Commit a step in the first store."""
        about = About(1, going_on_from(self.origin), {"model": "Linear"}, "-", final)
        manifest = commit(
            self.stores[0],
            self.attempt,
            payload(step, self.attempt.number) | {"config": self.config},
            about,
        )
        self.verified.add(manifest.name)
        return manifest

    def copied(self, step: int, final: dict[str, int | None] | None = None) -> Manifest:
        """Commit a step in the first store, and then in the second."""
        manifest = self.save(step, final)
        replicate(self.stores[0], manifest, self.stores[1], self.attempt)
        return manifest

    def let_go(self, last: int) -> list[str]:
        return retention.apply(
            self.stores[-1], self.attempt, self.verified, retention.Policy(last=last, best=0)
        )


def write(places: list[str], steps: list[int], wait_s: float, told: str) -> None:
    """A life that saves these steps; each is told, in the file `told`, once it is committed (c) and
    once it is in every store (u)."""
    # The program's own patience with a failing upload and with the last record is for people who
    # wait; here all of it is `wait_s`.
    uploader.RETRIED_S = run_ending.RECORD_S = wait_s
    stores = tuple(open_store(place, wait_s) for place in places)
    exit_record, world = ExitRecord(), join.join(60)
    store_health = listen(stores, True)
    resume_point = resume.choose(stores, world)
    policy = retention.Policy(last=2, best=0)
    settings = Settings(policy=policy, remote_policy=policy, wait_s=wait_s)
    checkpointer = Checkpointer(
        Parts(stores, world, resume_point, settings, exit_record, store_health, Goodput())
    )
    checkpointer.begin(Console(), lambda: None)
    for step in steps:
        final: dict[str, int | None] | None = (
            {"epochs": 1, "max_steps": None} if step == steps[-1] else None
        )
        content = payload(step, checkpointer.attempt.number if checkpointer.attempt else 0)
        captured = Captured(content, set(), {}, {})

        def capture(captured: Captured = captured) -> Captured:
            return captured

        saved = checkpointer.save(
            capture,
            partial(checkpointer.about, {}, {}, final),
            lambda: None,
            wait=True,
        )
        if not saved and final:
            raise SaveError(
                f"the last checkpoint was not saved: {checkpointer.status_line}"
            )  # as the loop does
        tell(told, "c" if saved else "-", step)
        if saved and not checkpointer._settle():
            tell(told, "u", step)
    checkpointer.end("finished", lambda: None, step=steps[-1])


def tell(told: str, what: str, step: int) -> None:
    """One line that is there even if the process is killed a moment later."""
    with open(told, "a") as file:
        file.write(f"{what} {step}\n")


def race(place: str) -> None:
    """Look, stop, and when woken claim what was seen to be the next attempt."""
    store = open_store(place, 30)
    found = read_catalog(store)
    os.kill(os.getpid(), signal.SIGSTOP)
    attempts.claim(found, None, 1)


def command(arguments: list[str], folder: str, errors: str) -> None:
    """Be `python ARGUMENTS`, started in that folder."""
    os.dup2(os.open(errors, os.O_WRONLY | os.O_APPEND), 2)
    os.chdir(folder)
    if arguments[0] == "-m":
        sys.argv, sys.path[0] = arguments[1:], folder
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv, sys.path[0] = arguments, str(Path(arguments[0]).resolve().parent)
        runpy.run_path(arguments[0], run_name="__main__")


def run_forked(
    arguments: list[str],
    *,
    cwd: Path | None = None,
    env: dict[str, str] | None = None,
    limit_s: float = 180,
) -> subprocess.CompletedProcess[str]:
    """As `run` of a Python program, but forked from the nursery: seconds less."""
    assert arguments[0] == sys.executable
    with tempfile.TemporaryDirectory() as folder:
        output, errors = Path(folder, "out"), Path(folder, "err")
        errors.touch()
        born = shared_nursery().bear(
            "command", env or {}, output, arguments[1:], str(cwd or os.getcwd()), str(errors)
        )
        try:
            code = born.wait(limit_s)
        finally:
            if born.code is None:
                kill_tree(born.pid)
        return subprocess.CompletedProcess(arguments, code, output.read_text(), errors.read_text())


LIVES: dict[str, Callable[..., None]] = {
    "command": command,
    "train": train.main,
    "write": write,
    "race": race,
    "program": programs.program,
}


class Born:
    """A process of the nursery."""

    def __init__(self, nursery: Nursery, number: int, pid: int, output: Path) -> None:
        self.nursery, self.number, self.pid, self.output = nursery, number, pid, output

    @property
    def text(self) -> str:
        """What it has printed."""
        return self.output.read_text()

    @property
    def code(self) -> int | None:
        return self.nursery.codes.get(self.number)

    def wait(self, limit_s: float = 150) -> int:
        """Its exit code, negative for a signal."""
        until = time.monotonic() + limit_s
        with self.nursery.told:
            while self.code is None:
                assert (
                    self.nursery.told.wait(max(0.0, until - time.monotonic()))
                    or self.code is not None
                ), f"alive:\n{self.text}"
        return self.nursery.codes[self.number]

    def stop(self) -> None:
        """SIGSTOP, and wait until it has happened."""
        os.kill(self.pid, signal.SIGSTOP)
        self.wait_stopped()

    def wait_stopped(self, limit_s: float = 60) -> None:
        until = time.monotonic() + limit_s
        while psutil.Process(self.pid).status() != psutil.STATUS_STOPPED:
            assert time.monotonic() < until, self.text
            time.sleep(0.005)

    def wake(self) -> None:
        os.kill(self.pid, signal.SIGCONT)

    def kill(self) -> int:
        """SIGKILL, if it still lives; its exit code."""
        with contextlib.suppress(ProcessLookupError):
            if self.code is None:
                os.kill(self.pid, signal.SIGKILL)
        return self.wait()


@functools.cache
def shared_nursery() -> Nursery:
    """One for all modules: it takes seconds to start."""
    nursery = Nursery()
    atexit.register(nursery.close)
    return nursery


class Nursery:
    """The process that forks them. Call `close` in the end: nothing outlives it."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, __file__],
            env=ENVIRONMENT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.codes: dict[int, int] = {}  # by number of the birth: a pid may come again
        self.told = threading.Condition()
        self._born: list[Born] = []
        self._pids: list[int] = []
        self._one_birth = threading.Lock()
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            said = json.loads(line)
            with self.told:
                if "code" in said:
                    self.codes[said["born"]] = said["code"]
                else:
                    self._pids.append(said["pid"])
                self.told.notify_all()

    def bear(
        self, life: str, environment: dict[str, str], output: Path, *arguments: object
    ) -> Born:
        """Begin a life of LIVES with these arguments and variables; what it prints comes into the
        file `output`."""
        order = {
            "life": life,
            "arguments": arguments,
            "environment": environment,
            "output": str(output),
        }
        output.touch()
        assert self.process.stdin is not None
        with self._one_birth, self.told:
            before = len(self._pids)
            self.process.stdin.write(json.dumps(order) + "\n")
            self.process.stdin.flush()
            while len(self._pids) == before:
                assert self.told.wait(150), "the nursery does not answer"
            self._born.append(Born(self, before, self._pids[-1], output))
        return self._born[-1]

    def end_all(self) -> None:
        """SIGKILL whatever still lives."""
        for born in self._born:
            born.kill()
        self._born.clear()

    def close(self) -> None:
        self.end_all()
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait()


def _serve() -> None:
    # what a life imports is imported before the first fork
    import harness.store.s3_client  # noqa: F401

    installed()  # read once for all
    small_task.build()  # an optimizer imports half of torch when the first one is made
    # A collection in a life would look at all of torch's objects, and so copy their memory.
    gc.collect()
    gc.freeze()
    rest = b""
    births, numbers = 0, dict[int, int]()
    while True:
        if select.select([0], [], [], 0.01)[0]:
            block = os.read(0, 1 << 16)
            if not block:
                return
            *orders, rest = (rest + block).split(b"\n")
            for order in orders:
                pid = os.fork()
                if pid == 0:
                    os._exit(_live(json.loads(order)))
                numbers[pid] = births
                births += 1
                _answer(pid=pid)
        with contextlib.suppress(ChildProcessError):
            while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                _answer(born=numbers[ended[0]], code=os.waitstatus_to_exitcode(ended[1]))


def _answer(**said: int) -> None:
    os.write(1, (json.dumps(said) + "\n").encode())


def _live(order: dict[str, Any]) -> int:
    """The life, ended as the interpreter ends a program."""
    output = os.open(order["output"], os.O_WRONLY | os.O_APPEND)
    for number in (1, 2):
        os.dup2(output, number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.environ |= order["environment"]
    try:
        LIVES[order["life"]](*order["arguments"])
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:  # noqa: BLE001  whatever else it is, it is the finding
        sys.excepthook(*sys.exc_info())
        code = 1
    if order["life"] in ("command", "program"):  # it may have begun threads and processes
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
        sys.stderr.flush()
    return code


if __name__ == "__main__":
    _serve()
