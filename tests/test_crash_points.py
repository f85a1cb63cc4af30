"""The writer dies, or the disk refuses, at every single system call of a save: what is left is the old checkpoint or the new one.

strace does it for real: it kills the process when it enters the k-th `fsync`, or lets the k-th `link` fail with EIO. A server
process imports torch once and forks a writer for each point; the writer stops itself until strace is attached.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from conftest import ENVIRONMENT

from harness.checkpoint import attempts, load, retention
from harness.checkpoint import format as fmt
from harness.checkpoint.history import going_on_from, survey
from harness.checkpoint.save import About, commit
from harness.errors import HarnessError, SaveError, StorageError
from harness.store import TEMP, LocalStore

OLD, NEW = 30, 40
LANES = 2
PHASES = ("claim", "commit", "retention")
DONE, RAISED_SAVE, RAISED_STORAGE, RAISED_OTHER = 0, 1, 2, 3  # exit code = 10 * phase + one of these
# Whether these happen depends on how full the heap is, not on what is done.
OF_THE_HEAP = {"brk", "mmap", "munmap", "mremap", "madvise", "mprotect", "futex"}
CALL = re.compile(r"^(?:\d+ +)?(?P<name>\w+)\((?P<rest>.*)$")


def payload(step: int) -> dict:
    generator = torch.Generator().manual_seed(step)
    return {
        "model_state_dict": {"weight": torch.randn(300, 10, generator=generator), "bias": torch.randn(10, generator=generator)},
        "step": step,
        "epoch": 0,
        "loss": 1 / step,
        "metrics": {"val_loss": 1 / step},
        "format_version": 1,
    }


def same(a: dict, b: dict) -> bool:
    tensors = a["model_state_dict"].keys() == b["model_state_dict"].keys() and all(
        torch.equal(a["model_state_dict"][key], b["model_state_dict"][key]) for key in a["model_state_dict"]
    )
    return tensors and {k: v for k, v in a.items() if k != "model_state_dict"} == {k: v for k, v in b.items() if k != "model_state_dict"}


def about(lineage: fmt.Lineage) -> About:
    return About(world_size=1, lineage=lineage, classes={"model": "Linear"}, config_digest="-")


def prepare(root: Path) -> None:
    """A first attempt that committed steps 10, 20 and 30 and was killed while it saved the next two."""
    store = LocalStore(root)
    store.prepare(fmt.FOLDERS)
    attempt = attempts.claim(store, survey(store), None, 1)
    for step in (10, 20, OLD):
        commit(store, attempt, payload(step), about(()))
    store.write(fmt.data_key(35, attempt.number), b"data without a manifest", attempt.number)
    for key in (fmt.data_key(36, 1), fmt.attempt_key(1), fmt.events_key(1)):
        store.path(f"{key}.tmp-0001-0123abcd").write_bytes(b"half")


def life(root: Path, phases: list[str]) -> None:
    """What the next attempt does, up to its first commit and what that lets go; `phases` grows as it goes on."""
    store = LocalStore(root)
    found = survey(store)
    origin = found.history[0]
    os.kill(os.getpid(), signal.SIGSTOP)
    phases.append("claim")
    store.prepare(fmt.FOLDERS)
    attempt = attempts.claim(store, found, origin, 1)
    store.sweep(fmt.FOLDERS, attempt.number)
    phases.append("commit")
    manifest = commit(store, attempt, payload(NEW), about(going_on_from(origin)))
    phases.append("retention")
    retention.apply(store, attempt, {origin.name, manifest.name}, retention.Policy(last=2, best=0))


def serve() -> None:
    """Fork a writer for each run directory named on stdin; say its number once it has stopped, and in the end how it ended."""
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            os._exit(_code_of(Path(line.strip())))
        os.waitpid(pid, os.WUNTRACED)
        print(pid, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


def _code_of(root: Path) -> int:
    phases: list[str] = []
    try:
        life(root, phases)
        return DONE
    except SaveError:
        kind = RAISED_SAVE
    except StorageError:
        kind = RAISED_STORAGE
    except BaseException:  # noqa: BLE001  whatever else it is, it is the finding
        traceback.print_exc()
        kind = RAISED_OTHER
    return 10 * (1 + PHASES.index(phases[-1])) + kind


class Server:
    """The process that forks writers; one at a time."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, __file__], env=ENVIRONMENT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        self.errors: list[str] = []
        threading.Thread(target=lambda: self.errors.extend(self.process.stderr or []), daemon=True).start()

    def _line(self) -> int:
        line = self.process.stdout.readline()
        assert line, f"the server has died: {''.join(self.errors)}"
        return int(line)

    def live(self, root: Path, *strace: str) -> int:
        """One life in `root` under strace; the writer's exit code, negative for a signal."""
        self.process.stdin.write(f"{root}\n")
        self.process.stdin.flush()
        pid = self._line()
        tracer = subprocess.Popen(["strace", "-p", str(pid), *strace], stderr=subprocess.PIPE, text=True)
        try:
            said = tracer.stderr.readline()
            assert "attached" in said, said
        finally:
            os.kill(pid, signal.SIGCONT)
            code = self._line()
            tracer.communicate()
        return code

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()


@dataclass(frozen=True)
class Point:
    """The k-th call of a name within a life."""

    name: str
    k: int
    on_store: bool
    text: str


def cannot(why: str) -> None:
    """Where the tools should be there, their absence is a failure; elsewhere it is said."""
    if os.environ.get("CI"):
        pytest.fail(why)
    pytest.skip(why)


def check_strace() -> None:
    if shutil.which("strace") is None:
        cannot("strace is not installed")
    tried = subprocess.run(["strace", "-o", "/dev/null", "-e", "inject=getpid:error=EIO", "true"], capture_output=True, text=True)
    if tried.returncode != 0:
        cannot(f"strace cannot trace here: {tried.stderr.strip()}")


@pytest.fixture(scope="module")
def servers() -> Iterator[list[Server]]:
    check_strace()
    running = [Server() for _ in range(LANES)]
    yield running
    for server in running:
        server.close()


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("template") / "run"
    prepare(root)
    return root


@pytest.fixture(scope="module")
def points(servers: list[Server], template: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Point]:
    """Every system call of an undisturbed life, in order."""
    folder = tmp_path_factory.mktemp("count")
    return [point for point in traced(servers[0], template, folder) if point.name != "exit_group"]


def traced(server: Server, template: Path, folder: Path) -> list[Point]:
    root = folder / "run"
    shutil.copytree(template, root)
    assert server.live(root, "-y", "-s", "0", "-o", f"{folder}/trace") == DONE
    counts: Counter[str] = Counter()
    found = []
    for line in (folder / "trace").read_text().splitlines():
        match = CALL.match(line)
        if match is None or "resumed" in line:  # a signal, an exit, the stop that it woke from
            continue
        counts[match["name"]] += 1
        found.append(Point(match["name"], counts[match["name"]], str(root) in line, line))
    return found


def each(servers: list[Server], todo: list, act: Callable) -> list:
    """`act(server, item)` for every item, on all servers at once."""
    free = list(servers)

    def one(item: object) -> object:
        server = free.pop()
        try:
            return act(server, item)
        finally:
            free.append(server)

    with ThreadPoolExecutor(len(servers)) as pool:
        return list(pool.map(one, todo))


def check_whole(root: Path) -> int:
    """Every checkpoint that exists is whole, and the one to go on from is the old or the new; returns its step."""
    store = LocalStore(root)
    found = survey(store)
    assert not found.damaged and not found.set_aside and not found.foreign
    for manifest in found.manifests:
        assert same(load.load(store, manifest), payload(manifest.step)), manifest.name
    head = found.history[0]
    assert head.step in (OLD, NEW)
    assert OLD in [m.step for m in found.history], "the one before is kept"
    return head.step


def check_next_attempt(root: Path) -> None:
    """Recovery is the normal start: it claims, sweeps, commits, and leaves nothing of earlier attempts but checkpoints."""
    store = LocalStore(root)
    found = survey(store)
    origin = found.history[0]
    store.prepare(fmt.FOLDERS)
    attempt = attempts.claim(store, found, origin, 1)
    assert attempt.number == found.greatest + 1
    store.sweep(fmt.FOLDERS, attempt.number)
    manifest = commit(store, attempt, payload(50), about(going_on_from(origin)))
    retention.apply(store, attempt, {origin.name, manifest.name}, retention.Policy(last=2, best=0))
    after = survey(store)
    assert [m.step for m in after.history] == [50, origin.step]
    assert not after.orphans
    temps = [match for folder in fmt.FOLDERS for entry in store.entries(folder) if (match := TEMP.match(entry.key))]
    assert all(int(temp["attempt"]) >= attempt.number for temp in temps), "of a start that died before it had claimed the number"
    assert same(load.load(store, after.history[0]), payload(50))


def killed_at(servers: list[Server], template: Path, folder: Path, points: list[Point]) -> list[int | None]:
    """Kill a life at each point and check what is left; the step to go on from, None where the point was not reached."""

    def kill(server: Server, point: Point) -> int | None:
        root = folder / f"{point.name}-{point.k}"
        shutil.copytree(template, root)
        code = server.live(root, "-o", "/dev/null", "-e", f"trace={point.name}", "-e", f"inject={point.name}:signal=SIGKILL:when={point.k}")
        assert code in (-signal.SIGKILL, DONE), (point, code)
        step = check_whole(root)
        check_next_attempt(root)
        shutil.rmtree(root)
        return step if code != DONE else None

    return each(servers, points, kill)


def test_a_kill_at_any_system_call_leaves_the_old_checkpoint_or_the_new_one(servers, template, points, tmp_path):
    steps = killed_at(servers, template, tmp_path, points)
    missed = {point.name for point, step in zip(points, steps, strict=True) if step is None}
    assert missed <= OF_THE_HEAP, f"not reached: {missed}"
    reached = [step for step in steps if step is not None]
    assert reached == sorted(reached), "once the new one is there it stays"
    assert reached[0] == OLD and reached[-1] == NEW


if __name__ == "__main__":
    _code_of_warm = None
    serve()
