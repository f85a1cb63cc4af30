"""A rank of a sharded model dies, or its disk refuses, at every system call of a save that changes
the run directory: what is left is the old checkpoint or the new one, whole, and the next start ends
as an undisturbed run.

strace does it for real, in one thread of one rank: the training thread, the saving thread, or the
process that writes for it. The rank stops itself before the step that saves until strace is there.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from library_runs import newest, steps_of
from programs import Lived, live
from system_calls import Point, check_strace, injecting, points_in
from there import there

from harness.checkpoint.catalog import read_catalog
from harness.cli import main
from harness.errors import HarnessError
from harness.exchange.compare import differences
from harness.store import TEMP, LocalStore

RANKS, LANES, OLD, NEW = 2, 2, 3, 6
OTHERS = re.compile("step_000000(09|10)")  # later saves
CHANGES = {"write", "pwrite64", "fsync", "rename", "renameat2", "link", "unlink", "mkdir", "rmdir"}
PROGRAM = """
import json
from torch.distributed.fsdp import fully_shard

run = init(keep_last=1, timeout_s=20)
torch.manual_seed(3)
model = nn.Sequential(nn.Linear(8, 13), nn.Tanh(), nn.Linear(13, 7), nn.Linear(7, 1))
fully_shard(model[0])
fully_shard(model)
optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
run.track(model=model, optimizer=optimizer)


def waits_for_strace():
    while not os.path.exists(f"{sys.argv[1]}/checkpoints/step_00000003-0001.json"):
        time.sleep(0.01)
    time.sleep(0.3)  # until what follows a commit is done
    saver = run._checkpointer.background
    threads = {"training": os.getpid(), "saving": saver._thread.native_id}
    if saver.writer._process is not None:
        threads["writing"] = saver.writer._process.pid
    path = os.environ["STOPPED"]
    with open(f"{path}.tmp", "w") as file:
        json.dump(threads, file)
    os.replace(f"{path}.tmp", path)
    os.kill(os.getpid(), signal.SIGSTOP)


for x, y in run.batches(points(120), 12, epochs=1):
    optimizer.zero_grad()
    (model(x) - y).square().mean().backward()
    optimizer.step()
    if run.step == 5 and str(run.rank) == os.environ.get("TRACED"):
        waits_for_strace()
"""


@dataclass(frozen=True)
class Place:
    """A system call of one thread of one rank."""

    rank: int
    thread: str
    point: Point

    def __str__(self) -> str:
        return f"rank {self.rank}, {self.thread}: {self.point.k}. {self.point.text[:160]}"


@contextmanager
def traced(tid: int, options: list[str]) -> Iterator[None]:
    tracer = subprocess.Popen(
        ["strace", "-p", str(tid), *options], stderr=subprocess.PIPE, text=True
    )
    said = there(tracer.stderr).readline()
    assert "attached" in said, said
    yield
    tracer.send_signal(signal.SIGTERM)
    tracer.communicate()


def life(folder: Path, rank: int, options: Callable[[str], list[str] | None]) -> Lived:
    """One life of all ranks, with strace on those threads of one rank that have options."""
    stopped, lives = folder / "stopped", list[Lived]()
    env = {"TRACED": str(rank), "STOPPED": str(stopped)}
    living = threading.Thread(
        target=lambda: lives.append(live(folder, PROGRAM, "run", ranks=RANKS, env=env))
    )
    living.start()
    until = time.monotonic() + 60
    while not stopped.exists() and time.monotonic() < until:
        time.sleep(0.01)
    threads = json.loads(stopped.read_text())
    with ExitStack() as tracing:
        for thread, tid in threads.items():
            if (given := options(thread)) is not None:
                tracing.enter_context(traced(tid, given))
        os.kill(threads["training"], signal.SIGCONT)
        living.join()
    return lives[0]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    lived = live(folder, PROGRAM, "run", ranks=RANKS)
    assert lived.codes == [0] * RANKS, lived.texts
    return folder / "run"


def changes(point: Point) -> bool:
    """Whether a call changes the store. A kill before one covers all calls since the last one."""
    made = "O_CREAT" in point.text and point.name == "openat"
    return made or point.name in CHANGES


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> list[Place]:
    """The calls that change the store, of each thread, for the checkpoint of step NEW, and those
    that delete that of step OLD."""
    check_strace()
    folders = [tmp_path_factory.mktemp(f"traced-{rank}") for rank in range(RANKS)]
    return [place for rank, folder in enumerate(folders) for place in places_of(rank, folder)]


def places_of(rank: int, folder: Path) -> Iterator[Place]:
    lived = life(folder, rank, lambda thread: ["-y", "-s", "0", "-o", f"{folder}/{thread}"])
    assert lived.codes == [0] * RANKS, lived.texts
    for thread in ("training", "saving", "writing"):
        trace = folder / thread
        points = points_in(trace.read_text(), f"{folder}/run/") if trace.exists() else []
        of_old, of_new = (
            [at for at, point in enumerate(points) if f"step_{step:08d}" in point.text]
            for step in (OLD, NEW)
        )
        for point in points[: (of_old or of_new or [-1])[-1] + 1]:
            if point.on_store and changes(point) and not OTHERS.search(point.text):
                yield Place(rank, thread, point)


def check_whole(root: Path) -> int:
    """Every checkpoint that exists is whole, and the newest is the old or the new one, or a later;
    returns its step."""
    found = read_catalog(LocalStore(root))
    assert not found.damaged and not found.set_aside and not found.foreign
    assert main(["verify", str(root)]) == 0
    return there(found.head).step


def check_clean(root: Path, undisturbed: Path) -> None:
    """The run has ended as the undisturbed one, and nothing of a dead save is left."""
    assert list(differences(newest(root), newest(undisturbed))) == []
    files = [file for file in (root / "checkpoints").rglob("*") if file.is_file()]
    assert not [file.name for file in files if TEMP.match(f"checkpoints/{file.name}")]
    kept = {f"step_{step:08d}" for step in steps_of(root)}
    assert {str(file.relative_to(root / "checkpoints"))[:13] for file in files} == kept


def all_pass(places: list[Place], check: Callable[[Place], None]) -> None:
    """Check every place, LANES at once, then fail with all that went wrong."""

    def one(place: Place) -> str | None:
        try:
            check(place)
        except (AssertionError, HarnessError) as found:
            return f"{place}: {found}"
        return None

    with ThreadPoolExecutor(LANES) as pool:
        wrong = [text for text in pool.map(one, places) if text]
    assert not wrong, f"{len(wrong)} of {len(places)} places:\n" + "\n".join(wrong)


def life_with(fault: str, folder: Path, place: Place) -> tuple[Path, Lived]:
    """One life that meets a fault at a place, in a folder of its own."""
    own = folder / f"{place.rank}-{place.thread}-{place.point.name}-{place.point.k}"
    own.mkdir()
    options = injecting({place.point.name: f"{fault}:when={place.point.k}"})
    return own, life(own, place.rank, lambda name: options if name == place.thread else None)


def killed_at(folder: Path, undisturbed: Path, place: Place) -> None:
    own, killed = life_with("signal=SIGKILL", folder, place)
    if place.thread == "writing":  # another process: the rank writes by itself
        assert killed.codes == [0] * RANKS, killed.texts
    else:
        assert killed.codes[place.rank] == -signal.SIGKILL, (killed.codes, killed.texts)
        assert all(code != 0 for code in killed.codes), killed.codes
        assert check_whole(own / "run") >= OLD
        again = live(own, PROGRAM, "run", ranks=RANKS)
        assert again.codes == [0] * RANKS, again.texts
        assert "resumes from step" in again.text, again.text
    check_clean(own / "run", undisturbed)
    shutil.rmtree(own)


@pytest.mark.slow
def test_a_rank_that_dies_at_any_change_of_a_save_leaves_the_old_checkpoint_or_the_new_one(
    undisturbed: Path, places: list[Place], tmp_path: Path
) -> None:
    assert {(place.rank, place.thread) for place in places} >= {(0, "saving"), (1, "saving")}
    all_pass(places, lambda place: killed_at(tmp_path, undisturbed, place))


def refused_at(folder: Path, undisturbed: Path, place: Place) -> None:
    own, lived = life_with("error=EIO", folder, place)
    assert lived.codes == [0] * RANKS, lived.texts
    check_whole(own / "run")
    assert main(["prune", str(own / "run"), "--yes"]) == 0  # what could not be deleted
    check_clean(own / "run", undisturbed)
    shutil.rmtree(own)


@pytest.mark.slow
def test_a_disk_that_refuses_any_change_of_a_save_on_one_rank_costs_no_more_than_that_save(
    undisturbed: Path, places: list[Place], tmp_path: Path
) -> None:
    saving = [place for place in places if place.thread != "training"]
    all_pass(saving, lambda place: refused_at(tmp_path, undisturbed, place))
