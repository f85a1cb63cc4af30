"""The writer dies, or the disk refuses, at every single system call of a save: what is left is the
old checkpoint or the new one.

strace does it for real: it kills the process when it enters the k-th `fsync`, or lets the k-th
`link` fail with EIO. A server process imports torch once and forks a writer for each point; the
writer stops itself until strace is attached.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from conftest import ENVIRONMENT
from system_calls import OF_THE_HEAP, Point, check_strace, injecting, points_in
from there import there

from harness.checkpoint import attempts, load, retention
from harness.checkpoint import format as fmt
from harness.checkpoint.catalog import going_on_from, read_catalog
from harness.checkpoint.commit import About, commit
from harness.checkpoint.fresh_start import check_fresh_start
from harness.errors import HarnessError, SaveError, StorageError
from harness.state.snapshot import Snapshot
from harness.store import TEMP, LocalStore
from harness.store.staging_buffer import StagingBuffer, write_to

OLD, NEW = 30, 40
LANES = 2
PHASES = ("claim", "commit", "retention")
# exit code = 10 * phase + one of these
DONE, RAISED_SAVE, RAISED_STORAGE, RAISED_OTHER = 0, 1, 2, 3


def payload(step: int) -> dict:
    generator = torch.Generator().manual_seed(step)
    return {
        "model_state_dict": {
            "weight": torch.randn(300, 10, generator=generator),
            "bias": torch.randn(10, generator=generator),
        },
        "step": step,
        "epoch": 0,
        "loss": 1 / step,
        "metrics": {"val_loss": 1 / step},
        "format_version": 1,
    }


def same(a: dict, b: dict) -> bool:
    tensors = a["model_state_dict"].keys() == b["model_state_dict"].keys() and all(
        torch.equal(a["model_state_dict"][key], b["model_state_dict"][key])
        for key in a["model_state_dict"]
    )
    return tensors and {k: v for k, v in a.items() if k != "model_state_dict"} == {
        k: v for k, v in b.items() if k != "model_state_dict"
    }


def about(lineage: fmt.Lineage) -> About:
    return About(world_size=1, lineage=lineage, classes={"model": "Linear"}, config_digest="-")


def prepare(root: Path) -> None:
    """A first attempt that committed steps 10, 20 and 30 and was killed while it saved the next
    two."""
    store = LocalStore(root)
    store.prepare(fmt.FOLDERS)
    attempt = attempts.claim(read_catalog(store), None, 1)
    for step in (10, 20, OLD):
        commit(store, attempt, payload(step), about(()))
    store.write(fmt.data_key(35, attempt.number), b"data without a manifest", attempt.number)
    for key in (fmt.data_key(36, 1), fmt.attempt_key(1), fmt.events_key(1)):
        store.path(f"{key}.tmp-0001-0123abcd").write_bytes(b"half")


def commit_image(
    store: LocalStore, attempt: attempts.Attempt, values: dict, told: About
) -> fmt.Manifest:
    """As a run commits, but that this process itself writes what otherwise another one does for
    it."""
    staging, snapshot = StagingBuffer(), Snapshot(values, set())
    snapshot.copy_rest()
    snapshot.copy_into(staging)
    return commit(
        store,
        attempt,
        values,
        told,
        lambda sink: sink.write_staged(
            staging, lambda i, path: write_to(there(i.memory), i.size_bytes, str(path))
        ),
    )


def life(root: Path, phases: list[str]) -> None:
    """What the next attempt does, up to its first commit and what that lets go; `phases` grows as
    it goes on."""
    store = LocalStore(root)
    found = read_catalog(store)
    origin = found.history[0] if found.history else None
    os.kill(os.getpid(), signal.SIGSTOP)
    phases.append("claim")
    store.prepare(fmt.FOLDERS)
    attempt = attempts.claim(found, origin, 1)
    store.sweep(fmt.FOLDERS, attempt.number)
    phases.append("commit")
    manifest = commit_image(store, attempt, payload(NEW), about(going_on_from(origin)))
    phases.append("retention")
    retention.apply(
        store, attempt, {m.name for m in (origin, manifest) if m}, retention.Policy(last=2, best=0)
    )


def serve() -> None:
    """Fork a writer for each run directory named on stdin; say its number once it has stopped, and
    in the end how it ended."""
    # whatever Python and torch load on first use is loaded before the first fork
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder) / "run")
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
        with contextlib.suppress(OSError):  # every write may be failing
            traceback.print_exc()
        kind = RAISED_OTHER
    return 10 * (1 + PHASES.index(phases[-1])) + kind


class Server:
    """The process that forks writers; one at a time."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, __file__],
            env=ENVIRONMENT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.errors: list[str] = []
        threading.Thread(
            target=lambda: self.errors.extend(self.process.stderr or []), daemon=True
        ).start()

    def _line(self) -> int:
        line = there(self.process.stdout).readline()
        assert line, f"the server has died: {''.join(self.errors)}"
        return int(line)

    def live(self, root: Path, *strace: str) -> int:
        """One life in `root` under strace; the writer's exit code, negative for a signal."""
        self.errors.clear()
        there(self.process.stdin).write(f"{root}\n")
        there(self.process.stdin).flush()
        pid = self._line()
        tracer = subprocess.Popen(
            ["strace", "-p", str(pid), *strace], stderr=subprocess.PIPE, text=True
        )
        try:
            said = there(tracer.stderr).readline()
            assert "attached" in said, said
        finally:
            os.kill(pid, signal.SIGCONT)
            code = self._line()
            tracer.communicate()
        return code

    def close(self) -> None:
        there(self.process.stdin).close()
        self.process.wait()
        there(self.process.stdout).close()


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
def points(
    servers: list[Server], template: Path, tmp_path_factory: pytest.TempPathFactory
) -> list[Point]:
    """Every system call of an undisturbed life, in order."""
    folder = tmp_path_factory.mktemp("count")
    return [point for point in traced(servers[0], template, folder) if point.name != "exit_group"]


def traced(server: Server, template: Path, folder: Path) -> list[Point]:
    """The system calls of a life that begins with a copy of `template`."""
    root = folder / "run"
    shutil.copytree(template, root)
    assert server.live(root, "-y", "-s", "0", "-o", f"{folder}/trace") == DONE
    return points_in((folder / "trace").read_text(), root)


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
    """Every checkpoint that exists is whole, and the one to go on from is the old or the new;
    returns its step."""
    store = LocalStore(root)
    found = read_catalog(store)
    assert not found.damaged and not found.set_aside and not found.foreign
    for manifest in found.manifests:
        assert same(load.load(store, manifest), payload(manifest.step)), manifest.name
    head = found.history[0]
    assert head.step in (OLD, NEW)
    assert OLD in [m.step for m in found.history], "the one before is kept"
    return head.step


def check_next_attempt(root: Path) -> None:
    """Recovery is the normal start: it claims, sweeps, commits, and leaves nothing of earlier
    attempts but checkpoints."""
    store = LocalStore(root)
    found = read_catalog(store)
    origin = found.history[0]
    store.prepare(fmt.FOLDERS)
    attempt = attempts.claim(found, origin, 1)
    assert attempt.number == found.greatest + 1
    store.sweep(fmt.FOLDERS, attempt.number)
    manifest = commit(store, attempt, payload(50), about(going_on_from(origin)))
    retention.apply(store, attempt, {origin.name, manifest.name}, retention.Policy(last=2, best=0))
    after = read_catalog(store)
    assert [m.step for m in after.history] == [50, origin.step]
    assert not after.orphans
    temps = [
        match
        for folder in fmt.FOLDERS
        for entry in store.entries(folder)
        if (match := TEMP.match(entry.key))
    ]
    assert all(int(temp["attempt"]) >= attempt.number for temp in temps), (
        "of a start that died before it had claimed the number"
    )
    assert same(load.load(store, after.history[0]), payload(50))


def killed_at(
    servers: list[Server], template: Path, folder: Path, points: list[Point]
) -> list[int | None]:
    """Kill a life at each point and check what is left; the step to go on from, None where the
    point was not reached."""

    def kill(server: Server, point: Point) -> int | None:
        root = folder / f"{point.name}-{point.k}"
        shutil.copytree(template, root)
        code = server.live(root, *injecting({point.name: f"signal=SIGKILL:when={point.k}"}))
        assert code in (-signal.SIGKILL, DONE), (point, code)
        step = check_whole(root)
        check_next_attempt(root)
        shutil.rmtree(root)
        return step if code != DONE else None

    return each(servers, points, kill)


def in_order(points: list[Point], found: list[int | None]) -> list[int]:
    """What was found at the points that were reached, without those of the heap: the k-th of these
    comes sooner or later each time."""
    return [
        value
        for point, value in zip(points, found, strict=True)
        if value is not None and point.name not in OF_THE_HEAP
    ]


def test_a_kill_at_any_system_call_leaves_the_old_checkpoint_or_the_new_one(
    servers, template, points, tmp_path
):
    steps = killed_at(servers, template, tmp_path, points)
    missed = {point.name for point, step in zip(points, steps, strict=True) if step is None}
    assert missed <= OF_THE_HEAP, f"not reached: {missed}"
    reached = in_order(points, steps)
    assert reached == sorted(reached), "once the new one is there it stays"
    assert reached[0] == OLD and reached[-1] == NEW


def fails_at(
    server: Server, template: Path, folder: Path, point: Point, error: str, when: str
) -> None:
    """Let one call fail, or all from there on, and check what was said of it and what is left."""
    root = folder / f"{point.name}-{point.k}-{error}"
    shutil.copytree(template, root)
    code = server.live(root, *injecting({point.name: f"error={error}:when={when}"}))
    phase, kind = divmod(code, 10)
    where = f"{error} at {point.text} -> {PHASES[phase - 1] if phase else 'done'}, {kind}"
    expected = {0: DONE, 1: RAISED_STORAGE, 2: RAISED_SAVE, 3: RAISED_STORAGE}
    assert code >= 0 and expected[phase] == kind, f"{where}\n{''.join(server.errors)}"
    committed = phase in (0, 3)
    try:
        assert check_whole(root) == (NEW if committed else OLD)
        left = [
            file.name
            for file in (root / fmt.CHECKPOINTS).iterdir()
            if file.name.startswith(fmt.stem(NEW, 2))
        ]
        assert committed or not left, f"a failed save leaves {left}"
        check_next_attempt(root)
    except (AssertionError, HarnessError) as found:
        raise AssertionError(f"{where}: {found}") from found
    shutil.rmtree(root)


def all_fail(
    servers: list[Server], template: Path, folder: Path, cases: list[tuple[Point, str]]
) -> None:
    """Run every case, then fail with all that went wrong."""

    def one(server: Server, case: tuple[Point, str]) -> str | None:
        try:
            fails_at(server, template, folder, *case, when=str(case[0].k))
        except AssertionError as found:
            return str(found)
        return None

    wrong = [said for said in each(servers, cases, one) if said]
    assert not wrong, f"{len(wrong)} of {len(cases)} cases:\n" + "\n".join(wrong)


def creates(point: Point) -> bool:
    return point.name in ("mkdir", "link", "rename") or "O_CREAT" in point.text


def writes(point: Point) -> bool:
    return point.name in ("write", "pwrite64", "fsync") or (
        point.name == "close" and ".tmp-" in point.text
    )


@pytest.mark.slow
def test_a_call_that_fails_with_an_io_error_ends_in_words_and_never_in_half_a_checkpoint(
    servers, template, points, tmp_path
):
    all_fail(servers, template, tmp_path, [(point, "EIO") for point in points if point.on_store])


def test_a_disk_that_is_full_for_one_call_ends_in_words_and_never_in_half_a_checkpoint(
    servers, template, points, tmp_path
):
    all_fail(
        servers,
        template,
        tmp_path,
        [
            (point, "ENOSPC")
            for point in points
            if point.on_store and (creates(point) or writes(point))
        ],
    )


def test_a_file_system_that_turns_read_only_ends_in_words_and_never_in_half_a_checkpoint(
    servers, template, points, tmp_path
):
    cases = [
        (point, "EROFS")
        for point in points
        if point.on_store and (creates(point) or point.name == "unlink")
    ]
    all_fail(servers, template, tmp_path, cases)


@pytest.mark.slow
@pytest.mark.parametrize("error", ["ENOSPC", "EROFS", "EDQUOT", "ESTALE", "EACCES", "EINTR"])
def test_any_call_that_fails_in_any_way_ends_in_words_and_never_in_half_a_checkpoint(
    servers, template, points, tmp_path, error
):
    all_fail(servers, template, tmp_path, [(point, error) for point in points if point.on_store])


@pytest.mark.parametrize(
    ("begun", "error"), [("pwrite64", "ENOSPC"), ("pwrite64", "EDQUOT"), ("fsync", "EIO")]
)
def test_a_disk_that_goes_on_failing_while_the_save_is_given_up_changes_no_words(
    servers, template, points, tmp_path, begun, error
):
    """Network file systems report a full disk at the write, and again when the file is closed and
    deleted."""
    first = next(
        point
        for point in points
        if point.name == begun and f"{fmt.stem(NEW, 2)}.pt.tmp" in point.text
    )
    at = points.index(first)
    faults = {begun: f"error={error}:when={first.k}+"}
    for name in ("close", "unlink"):
        before = sum(point.name == name for point in points[:at])
        faults[name] = f"error={error}:when={before + 1}+"
    shutil.copytree(template, tmp_path / "run")
    code = servers[0].live(tmp_path / "run", *injecting(faults))
    assert code == 10 * (1 + PHASES.index("commit")) + RAISED_SAVE, "".join(servers[0].errors)
    assert check_whole(tmp_path / "run") == OLD
    check_next_attempt(tmp_path / "run")


def test_each_file_is_durable_before_it_appears_and_its_folder_before_anything_builds_on_it(points):
    """Without the first fsync a file full of zeros may come back after a power loss, without the
    second the old file, or none."""
    texts = [point.text for point in points if point.on_store]

    def at(*needles: str, last: bool = False) -> int:
        found = [k for k, text in enumerate(texts) if all(needle in text for needle in needles)]
        assert found, f"no call {needles}"
        return found[-1] if last else found[0]

    folder = f"/{fmt.CHECKPOINTS}>)"
    appeared = []
    for writes, appears, kind in (("pwrite64(", "rename(", "pt"), ("write(", "link(", "json")):
        temp = f"{fmt.stem(NEW, 2)}.{kind}.tmp-"
        order = [at(writes, temp, last=True), at("fsync(", temp), at(appears, temp)]
        order.append(
            next(
                k
                for k in range(order[-1], len(texts))
                if texts[k].startswith("fsync(") and folder in texts[k]
            )
        )
        assert order == sorted(order), (kind, [texts[k] for k in order])
        appeared += [order[2], order[3]]
    assert appeared == sorted(appeared), "the data is durable before its manifest appears"
    assert at("unlink(", f"{fmt.stem(10, 1)}.json") > appeared[-1], (
        "nothing is deleted before the new one is durable"
    )
    claimed = at("link(", "/attempts/0002.json.tmp-")
    assert (
        at("write(", "/attempts/0002.json.tmp-")
        < at("fsync(", "/attempts/0002.json.tmp-")
        < claimed
    )
    assert any(
        text.startswith("fsync(") and f"/{fmt.ATTEMPTS}>)" in text
        for text in texts[claimed : appeared[0]]
    )


def test_on_delete_the_manifest_is_gone_for_good_before_its_data_goes(points):
    texts = [point.text for point in points if point.on_store]
    for step in (10, 20):
        manifest, data = (
            next(
                k
                for k, text in enumerate(texts)
                if text.startswith("unlink(") and f"{fmt.stem(step, 1)}.{kind}" in text
            )
            for kind in ("json", "pt")
        )
        between = texts[manifest:data]
        assert any(
            text.startswith("fsync(") and f"/{fmt.CHECKPOINTS}>)" in text for text in between
        ), between


ALONE = """
import sys
from harness.store import LocalStore
store = LocalStore(sys.argv[1])
store.prepare(("checkpoints", "attempts"))
store.write("checkpoints/a.json", b"a", 1)
store.set_aside(("checkpoints/a.json",))
"""


def missing_fsyncs(root: Path, trace: Path) -> list[str]:
    """Make a store and change a name in it, under strace; what of that was not made durable."""
    check_strace()
    command = [
        "strace",
        "-y",
        "-o",
        str(trace),
        "-e",
        "trace=mkdir,rename,fsync",
        sys.executable,
        "-c",
        ALONE,
        str(root),
    ]
    ran = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=180)
    assert ran.returncode == 0, ran.stderr
    calls = [
        line
        for line in trace.read_text().splitlines()
        if str(trace.parent) in line and line.endswith("= 0")
    ]
    changes = [(at, call) for at, call in enumerate(calls) if not call.startswith("fsync(")]
    assert len(changes) >= 5
    missing = []
    for at, call in changes:
        folder = Path(call.split('"')[-2]).parent
        if not any(later.startswith("fsync(") and f"<{folder}>" in later for later in calls[at:]):
            missing.append(call)
    return missing


def test_folders_that_are_made_and_names_that_are_changed_are_durable_at_once(tmp_path):
    assert missing_fsyncs(tmp_path / "a", tmp_path / "trace") == []


def test_folders_above_the_run_that_are_made_with_it_are_durable_too(tmp_path):
    assert missing_fsyncs(tmp_path / "runs" / "of" / "mine", tmp_path / "trace") == []


def test_a_kill_in_the_first_attempt_leaves_nothing_or_its_first_checkpoint(servers, tmp_path):
    """With nothing to go on from, each kill leaves a directory in which a fresh start is allowed,
    or the whole first checkpoint."""
    empty = tmp_path / "empty"
    empty.mkdir()
    points = [
        point
        for point in traced(servers[0], empty, tmp_path / "count")
        if point.name != "exit_group"
    ]

    def kill(server: Server, point: Point) -> int | None:
        root = tmp_path / f"{point.name}-{point.k}"
        root.mkdir()
        code = server.live(root, *injecting({point.name: f"signal=SIGKILL:when={point.k}"}))
        found = read_catalog(LocalStore(root))
        if not found.manifests:
            check_fresh_start(found, str(root), [])
        for manifest in found.manifests:
            assert same(load.load(LocalStore(root), manifest), payload(NEW))
        shutil.rmtree(root)
        return len(found.manifests) if code != DONE else None

    counts = each(servers, points, kill)
    assert {
        point.name for point, count in zip(points, counts, strict=True) if count is None
    } <= OF_THE_HEAP
    counts = in_order(points, counts)
    assert counts == sorted(counts) and set(counts) == {0, 1}


if __name__ == "__main__":
    serve()
