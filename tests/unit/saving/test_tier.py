"""The newest step in the machine's memory: a process that dies there loses nothing, and memory
never leads anybody astray."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from comparing import differing
from conftest import events, kill_tree, run, torchrun, wait_until, workers_of
from library_runs import checkpointer_of, net, newest, steps_of, train
from sealing import seal
from small_task import Noisy

import harness
from harness import cli, preemption
from harness.checkpoint import memory_copy
from harness.checkpoint.attempts import Attempt
from harness.checkpoint.catalog import read_catalog
from harness.checkpoint.commit import HEAD, About
from harness.errors import NonFiniteError, UsageError
from harness.saving import memory_tier as writers
from harness.saving.async_saver import AsyncSaver
from harness.saving.save_job import Job, MutatedDuringCopyError
from harness.state import Captured
from harness.store import LocalStore

pytestmark = pytest.mark.usefixtures("process_as_it_was")
EACH: dict[str, Any] = {"memory": True, "save_every_steps": None, "log_every_steps": 1}
ON_DISK = EACH | {"save_every_steps": 4}


@pytest.fixture
def kept(tmp_path: Path) -> Iterator[LocalStore]:
    """What the run `a` keeps in memory; nothing of it is left to other tests."""
    store = memory_copy.place(LocalStore(tmp_path / "a"))
    yield store
    shutil.rmtree(store.root, ignore_errors=True)


def in_memory(store: LocalStore) -> list[int]:
    return [manifest.step for manifest in read_catalog(store).manifests]


def left_at(directory: Path, step: int, **options: Any) -> None:
    """A loop that ends in that step, after the update, as if it had been killed. Each step is as
    long as it takes to keep the last."""
    train(directory, leave_at=step, each=arrived, **(EACH | options))


def arrived(run_: harness.Run) -> None:
    wait_until(
        lambda: not checkpointer_of(run_).background.is_busy, "what is on its way has arrived"
    )


@pytest.mark.parametrize(
    "options", [EACH, ON_DISK], ids=["nothing on the disk", "something on the disk"]
)
def test_who_dies_goes_on_from_the_last_step(tmp_path, kept, uninterrupted, capfd, options):
    left_at(tmp_path / "a", 7, **options)
    assert in_memory(kept) == [6] and steps_of(tmp_path / "a") == (
        [4] if options is ON_DISK else []
    )
    capfd.readouterr()
    assert cli.main(["ls", str(tmp_path / "a")]) == 0
    named = {
        line.split()[0]: line
        for line in capfd.readouterr().out.splitlines()
        if "resumes from here" in line
    }
    assert named["step_00000006-0001"].rstrip().endswith("resumes from here, on this machine")
    assert {
        name for name, line in named.items() if line.rstrip().endswith("on any other machine")
    } == ({"step_00000004-0001"} if options is ON_DISK else set())
    train(tmp_path / "a", **options)
    said = capfd.readouterr().out
    assert (
        "taking step_00000006-0001 from this machine's memory" in said
        and "resumes from step 6 " in said
        and "0 steps to recompute" in said
    )
    assert not kept.root.exists(), "the run is over"
    assert steps_of(tmp_path / "a")[-1] == 12 and 7 in {
        event["step"] for event in events(tmp_path / "a", "saved")
    }, "on the disk at once"
    assert list_differences(tmp_path / "a", uninterrupted) == []


def list_differences(a: Path, b: Path) -> list[object]:
    return [name for name in differing(a, b) if name[0] != "config"]


def test_who_goes_on_from_memory_and_is_stopped_at_once_saves_it(tmp_path, kept):
    left_at(tmp_path / "a", 7)
    run_ = harness.init(tmp_path / "a", seed=3, save_every_s=None, memory=True)
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    run_.track(
        model=model,
        optimizer=optimizer,
        scheduler=torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.5),
    )
    with pytest.raises(SystemExit) as ended:
        for _ in run_.batches(Noisy(60), global_batch_size=10, epochs=2):
            os.kill(os.getpid(), signal.SIGTERM)
            wait_until(preemption.requested, "the signal is noticed")
    assert ended.value.code == 0
    assert steps_of(tmp_path / "a") == [7] and not kept.root.exists()


class Trap(io.StringIO):
    """An output that has this process terminated when it hears some words."""

    def write(self, text: str) -> int:
        if "resumes from step 6 " in text:
            os.kill(os.getpid(), signal.SIGTERM)
            wait_until(preemption.requested, "the signal is noticed")
        return super().write(text)


def test_who_goes_on_from_memory_and_is_stopped_before_the_first_step_puts_it_on_the_disk(
    tmp_path, kept, monkeypatch
):
    left_at(tmp_path / "a", 7)
    monkeypatch.setattr(sys, "stdout", Trap())
    with pytest.raises(SystemExit) as ended:
        train(tmp_path / "a", **EACH)
    assert ended.value.code == 0
    assert steps_of(tmp_path / "a") == [6] and not kept.root.exists()


@pytest.mark.parametrize(
    "how",
    [
        "flipped",
        *(
            pytest.param(how, marks=pytest.mark.slow)
            for how in ("cut short", "no data", "manifest torn")
        ),
    ],
)
def test_what_is_damaged_in_memory_is_passed_over(tmp_path, kept, uninterrupted, capfd, how):
    left_at(tmp_path / "a", 7, save_every_steps=4)
    data = kept.path("checkpoints/step_00000006-0001.pt")
    if how == "flipped":
        with data.open("r+b") as file:
            file.seek(data.stat().st_size // 2)
            byte = file.read(1)
            file.seek(-1, os.SEEK_CUR)
            file.write(bytes([byte[0] ^ 1]))
    elif how == "cut short":
        os.truncate(data, 1000)
    elif how == "no data":
        data.unlink()
    else:
        os.truncate(data.with_suffix(".json"), 50)
    capfd.readouterr()
    train(tmp_path / "a", **ON_DISK)
    said = capfd.readouterr().out
    assert "resumes from step 4 " in said and ("skipped" in said or how == "manifest torn")
    assert not kept.root.exists() and list_differences(tmp_path / "a", uninterrupted) == []


def test_what_a_newer_version_has_kept_in_memory_is_not_passed_over(tmp_path, kept):
    left_at(tmp_path / "a", 7)
    (manifest,) = read_catalog(kept).manifests
    path = kept.root / manifest.key
    path.write_bytes(seal(json.loads(path.read_bytes()) | {"format_version": 99}))
    before = {file: file.read_bytes() for file in kept.root.rglob("*") if file.is_file()}
    with pytest.raises(UsageError, match="format version 99"):
        train(tmp_path / "a", **EACH)
    assert {file: file.read_bytes() for file in kept.root.rglob("*") if file.is_file()} == before


@pytest.mark.parametrize("how", ["whole", "of a newer version"])
def test_a_rollback_to_the_newest_step_on_the_disk_leaves_what_memory_has(
    tmp_path, kept, uninterrupted, capfd, how
):
    left_at(tmp_path / "a", 7, save_every_steps=4)
    if how == "of a newer version":
        (manifest,) = read_catalog(kept).manifests
        path = kept.root / manifest.key
        path.write_bytes(seal(json.loads(path.read_bytes()) | {"format_version": 99}))
        with pytest.raises(UsageError, match="format version 99"):
            train(tmp_path / "a", **ON_DISK)
    assert cli.main(["rollback", str(tmp_path / "a"), "4"]) == 0
    assert cli.main(["rollback", str(tmp_path / "a"), "4"]) == 0
    said = capfd.readouterr().out
    assert said.count("the next start resumes from step 4") == 1 and "nothing to do" in said
    train(tmp_path / "a", **ON_DISK)
    assert "resumes from step 4 (step_00000004-0002)" in capfd.readouterr().out
    assert not kept.root.exists() and list_differences(tmp_path / "a", uninterrupted) == []


@pytest.mark.slow
def test_what_is_older_than_the_disk_is_let_go(tmp_path, kept, uninterrupted, capfd):
    left_at(tmp_path / "a", 4)
    old = {path.name: path.read_bytes() for path in (kept.root / "checkpoints").iterdir()}
    assert len(old) == 2
    left_at(tmp_path / "a", 7, save_every_steps=4)  # takes it, and commits step 4
    assert in_memory(kept) == [6]
    shutil.rmtree(kept.root / "checkpoints")
    kept.prepare(("checkpoints",))
    for name, content in old.items():
        (kept.root / "checkpoints" / name).write_bytes(content)
    capfd.readouterr()
    train(tmp_path / "a", save_every_steps=4)
    assert "resumes from step 4 " in capfd.readouterr().out
    assert not kept.root.exists() and list_differences(tmp_path / "a", uninterrupted) == []


@pytest.mark.slow
def test_another_runs_memory_under_the_same_path_is_let_go(tmp_path, kept, uninterrupted, capfd):
    left_at(tmp_path / "a", 7)
    shutil.rmtree(tmp_path / "a")
    train(tmp_path / "a", **EACH)
    assert "begins at step 0" in capfd.readouterr().out.split("attempt 1")[-1]
    assert not kept.root.exists() and list_differences(tmp_path / "a", uninterrupted) == []


def test_what_a_killed_process_was_writing_there_does_not_stay(tmp_path, kept):
    left_at(tmp_path / "a", 7)
    folder = kept.root / "checkpoints"
    (folder / "step_00000007-0001.pt.tmp-0001-abcdef01").write_bytes(bytes(1000))
    (folder / "step_00000008-0001.pt").write_bytes(bytes(1000))
    left_at(tmp_path / "a", 9)
    assert sorted(path.name for path in folder.iterdir()) == [
        "step_00000008-0002.json",
        "step_00000008-0002.pt",
    ]


def test_it_keeps_one_and_the_disk_takes_over(tmp_path, kept):
    left_at(tmp_path / "a", 9, save_every_steps=8)
    assert in_memory(kept) == [] and steps_of(tmp_path / "a") == [8], (
        "what the disk has is not kept in memory too"
    )


def test_a_save_that_waits_for_an_update_is_not_forgotten_for_one_in_memory(
    tmp_path, kept, monkeypatch
):
    monkeypatch.setattr("harness.saving.async_saver.SEALED_WITHIN_S", 0.1)
    run_ = harness.init(tmp_path / "a", **EACH | {"save_every_steps": 3, "keep_last": 9})
    model = torch.nn.Linear(12, 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    run_.track(model=model, optimizer=optimizer)
    for x, y in run_.batches(Noisy(120), global_batch_size=10, epochs=1):
        (model(x) - y).square().mean().backward()
        if run_.step % 4 == 0:  # steps 3, 6 and 9 end between two updates
            optimizer.step()
            optimizer.zero_grad()
        arrived(run_)
        if run_.step == 11:
            break
    assert steps_of(tmp_path / "a") == [4, 8]


@pytest.mark.parametrize("how", ["failed", "torn"])
def test_a_save_that_failed_or_must_be_repeated_is_not_replaced_by_one_in_memory(
    tmp_path, kept, how
):
    """The next save to the disk raises its error, or repeats it; other ranks ask for that only now
    and then."""
    model = net()
    saver = AsyncSaver(overlapped=True, compare=False)
    tier = writers.MemoryTier(kept, saver, print, is_on=True)
    tier.begin(Attempt(1, "", ""), None)

    def captured() -> Captured:
        content = dict.fromkeys(HEAD, 0) | {"model_state_dict": model.state_dict()}
        return Captured(content, set(), {}, {"model": model})

    def finish(job: Job, write: object, check: object) -> None:
        raise {"failed": NonFiniteError, "torn": MutatedDuringCopyError}[how]("a weight is NaN")

    about = About(1, (), {}, "-")
    saver.start(captured(), about, time.perf_counter(), finish)
    saver.release()
    saver.at_boundary()
    wait_until(lambda: not saver.is_busy, "the save to the disk is over")
    assert (saver.has_failed, saver.must_repeat) == (how == "failed", how == "torn")
    assert not tier.remember(captured, lambda: about)
    assert (saver.has_failed, saver.must_repeat) == (how == "failed", how == "torn")
    saver.close()


def test_every_so_many_steps(tmp_path, kept):
    left_at(tmp_path / "a", 8, memory=3)
    assert in_memory(kept) == [6]


def test_where_there_is_no_room_it_says_so_and_goes_on(
    tmp_path, kept, uninterrupted, capfd, monkeypatch
):
    monkeypatch.setattr(writers, "free_memory_bytes", lambda: 1000)
    train(tmp_path / "a", **ON_DISK)
    said = capfd.readouterr().out
    assert (
        said.count(
            "checkpoints are not kept in memory: there is not enough memory found: 1000 bytes"
        )
        == 1
    )
    assert not kept.root.exists() and list_differences(tmp_path / "a", uninterrupted) == []


@pytest.mark.slow
@pytest.mark.parametrize("how", ["open to others", "a link"])
def test_what_somebody_else_could_have_put_there_is_not_touched(tmp_path, kept, capfd, how):
    left_at(tmp_path / "a", 7)
    if how == "a link":
        shutil.move(kept.root, tmp_path / "elsewhere")
        kept.root.symlink_to(tmp_path / "elsewhere")
    else:
        kept.root.chmod(0o777)
    before = sorted(kept.root.rglob("*"))
    capfd.readouterr()
    train(tmp_path / "a", **EACH)
    said = capfd.readouterr().out
    assert (
        "begins at step 0" in said
        and said.count("checkpoints are not kept in memory") == 1
        and "somebody else's" in said
    )
    assert sorted(kept.root.rglob("*")) == before
    if how == "a link":
        kept.root.unlink()


@pytest.mark.slow
def test_a_resume_point_that_was_lost_with_the_memory_is_no_history(
    tmp_path, kept, uninterrupted, capfd
):
    """It was never on the disk, and the machine went down before the first save."""
    left_at(tmp_path / "a", 7)
    with pytest.raises(ZeroDivisionError):
        train(tmp_path / "a", fail_at=7, **EACH)
    assert read_catalog(LocalStore(tmp_path / "a")).attempts[2]["from"]["step"] == 6
    assert steps_of(tmp_path / "a") == []
    shutil.rmtree(kept.root)
    capfd.readouterr()
    train(tmp_path / "a", **EACH)
    assert "attempt 3 begins at step 0" in capfd.readouterr().out
    assert list_differences(tmp_path / "a", uninterrupted) == []


def test_a_resume_point_in_memory_outlives_the_tier(tmp_path, kept, monkeypatch):
    """Nothing fits into the memory any more, and the disk has nothing yet."""
    left_at(tmp_path / "a", 7)
    tier = writers.MemoryTier(kept, AsyncSaver(overlapped=True, compare=False), print, is_on=True)
    (origin,) = read_catalog(kept).manifests
    tier.begin(Attempt(2, origin.run_id, ""), origin)
    monkeypatch.setattr(writers, "free_memory_bytes", lambda: 1000)
    assert not tier.remember(
        lambda: Captured({}, set(), {}, {"model": net()}),
        lambda: pytest.fail("there is no room"),
    )
    assert not tier.is_on and in_memory(kept) == [6]
    tier.drop(before=(2, 8))
    assert not kept.root.exists(), "the disk has something newer"


def test_a_newer_attempts_is_not_taken_away(tmp_path, kept):
    """By a zombie, which keeps steps of its own."""
    left_at(tmp_path / "a", 7)
    left_at(tmp_path / "a", 9)
    # It has nothing on its way.
    zombie = writers.MemoryTier(kept, None, print, is_on=True)  # type: ignore[arg-type]
    zombie.drop(before=(1, 99))
    assert in_memory(kept) == [8]


SETTINGS = (
    "task.name=small_task:build",
    "train.epochs=4",
    "log.every_steps=1",
    "checkpoint.every_s=null",
    "task.args.sleep_s=0.05",
)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2])
def test_a_rank_that_is_killed_costs_no_step(
    tmp_path, kept, ranks, started: Callable[..., subprocess.Popen[str]]
) -> None:
    """torchrun starts both again; the other rank dies of it, whenever that is."""
    whole = run(torchrun(ranks, *SETTINGS, f"run.dir={tmp_path}/b"))
    assert whole.returncode == 0, whole.stdout + whole.stderr
    directory, log = tmp_path / "a", tmp_path / "log"
    command = torchrun(
        ranks,
        *SETTINGS,
        "checkpoint.memory=true",
        f"run.dir={directory}",
        options=("--max-restarts=2",),
    )
    with log.open("w") as output:
        process = started(command, output=output)
        wait_until(
            lambda: in_memory(kept)[-1:] >= [7] or process.poll() is not None, "a step is kept"
        )
        last = in_memory(kept)[-1]
        workers_of(process.pid)[-1].kill()
        assert process.wait(timeout=120) == 0, log.read_text()
    said = log.read_text()
    assert "from this machine's memory" in said, said
    (goes_on,) = [line for line in said.splitlines() if "resumes from step" in line]
    assert int(goes_on.split("resumes from step ")[1].split()[0]) >= last
    assert list_differences(directory, tmp_path / "b") == []
    assert not kept.root.exists()


@pytest.mark.slow
def test_a_storm_of_kills_with_memory(
    tmp_path, kept, started: Callable[..., subprocess.Popen[str]]
) -> None:
    """The whole tree, again and again, a moment after some step; no step is lost but the one that
    was being made or kept."""
    whole = run(torchrun(2, *SETTINGS, f"run.dir={tmp_path}/b"))
    assert whole.returncode == 0
    directory = tmp_path / "a"
    for kills in range(8):
        with (tmp_path / "log").open("a") as output:
            process = started(
                torchrun(2, *SETTINGS, "checkpoint.memory=true", f"run.dir={directory}"),
                output=output,
            )
        before = len(events(directory, "step"))

        def has_gone_on(before: int = before, process: subprocess.Popen[str] = process) -> bool:
            return len(events(directory, "step")) > before + 3 or process.poll() is not None

        wait_until(has_gone_on, "three steps")
        time.sleep(0.013 * kills)
        kill_tree(process.pid)
        process.wait()
    done = run(torchrun(2, *SETTINGS, "checkpoint.memory=true", f"run.dir={directory}"))
    assert done.returncode == 0 and list_differences(directory, tmp_path / "b") == []
    assert cli.main(["status", str(directory)]) == 0
    assert newest(directory)["step"] > 0 and not kept.root.exists()
