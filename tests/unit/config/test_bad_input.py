"""What a user, a disk or a cluster may do wrong: said in words, with the right exit code, and
nothing good is lost."""

from __future__ import annotations

import itertools
import json
import os
import pickle
import shutil
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TRAIN, alone, events, harness, run, start, torchrun
from remote_lives import run_forked
from small_disks import fill
from there import there

from harness import task, train
from harness.checkpoint import load
from harness.checkpoint.catalog import read_catalog
from harness.errors import (
    DamagedError,
    HarnessError,
    NonFiniteError,
    SaveError,
    StorageError,
    UsageError,
)
from harness.store import LocalStore
from harness.supervision.error_hints import hint

SMALL = (
    "task.args.size=48",
    "train.global_batch_size=12",
    "checkpoint.best=val_loss:min",
    "eval.every_steps=null",
    "checkpoint.every_s=null",
)
SMALL_TASK = ("task.name=small_task:build", *SMALL)


pytestmark = pytest.mark.usefixtures("process_as_it_was")


@pytest.fixture(autouse=True)
def tasks_forgotten():
    """A task's module is another one in each test."""
    modules = set(sys.modules)
    yield
    for name in set(sys.modules) - modules:
        if name.startswith("task_of_"):
            del sys.modules[name]


def trained(*settings: str) -> None:
    """Train in this process."""
    train.main([*SMALL_TASK, *settings])


def refused(kind: type[HarnessError], *settings: str) -> HarnessError:
    with pytest.raises(kind) as caught:
        trained(*settings)
    # As at the end of a process: the loop is let go, and what it was saving arrives.
    traceback.clear_frames(caught.tb)
    return caught.value


def steps_of(directory: Path) -> list[int]:
    return [manifest.step for manifest in read_catalog(LocalStore(directory)).manifests]


def newest(directory: Path) -> dict:
    """The newest checkpoint, verified and read."""
    store = LocalStore(directory)
    return load.load(store, there(read_catalog(store).head))


def end_of(directory: Path, attempt: int = 1) -> dict:
    return json.loads((directory / f"attempts/{attempt:04d}.end.json").read_text())


def attempts_of(directory: Path) -> int:
    return len(read_catalog(LocalStore(directory)).attempts)


numbers = itertools.count()


def written_task(folder: Path, body: str) -> str:
    """A task module of the user's own: the small task, with `loss` as the body says; returns the
    setting that names it."""
    name = f"task_of_{next(numbers)}"
    (folder / f"{name}.py").write_text(
        f"""
import os, shutil, time, torch
import small_task
from small_task import Noisy

def build(
    size: int = 48,
    lr: float = 1e-2,
    optimizer: str = "SGD",
    bad_from: int = 10**9,
    bad_to: int = 10**9,
):
    job = small_task.build(size=size, lr=lr)
    plain, calls = job.loss, 0

    def loss(model, batch):
        nonlocal calls
        calls += 1
        value = plain(model, batch)
        {body}
        return value

    if optimizer != "SGD":
        job.optimizers = getattr(torch.optim, optimizer)(job.modules.parameters(), lr=lr)
        job.schedulers = {{}}
    job.loss = loss
    return job
"""
    )
    return f"task.name={name}:build"


# --- the command line and the cluster -------------------------------------------------------------


@pytest.mark.slow
def test_a_batch_that_cannot_be_dealt_out_is_refused_once_and_in_words(tmp_path):
    ended = run(torchrun(2, *SMALL_TASK, "train.global_batch_size=7", "run.dir=a"))
    assert ended.returncode != 0
    assert ended.stderr.count("harness: error: the global batch cannot be dealt out evenly") == 1
    assert "global_batch_size=7 on 2 rank(s)" in ended.stderr and "6 or 8" in ended.stderr
    assert not (tmp_path / "a").exists()


def test_launch_refuses_it_before_any_process_is_spawned(tmp_path):
    ended = run(
        harness("launch", "--nproc-per-node", "2", *SMALL_TASK, "train.global_batch_size=7")
    )
    assert ended.returncode == 78 and "6 or 8" in ended.stderr and "Traceback" not in ended.stderr
    assert "torch.distributed.elastic" not in ended.stderr and list(tmp_path.iterdir()) == []


def test_slurm_tasks_without_torchrun_are_refused_with_the_right_line(tmp_path):
    ended = run_forked(alone(*SMALL_TASK, "run.dir=a"), env={"SLURM_STEP_NUM_TASKS": "8"})
    assert ended.returncode == 78 and "Traceback" not in ended.stderr
    assert "8 rivals" in ended.stderr and "srun --ntasks-per-node=1 torchrun" in ended.stderr
    assert list(tmp_path.iterdir()) == []


def test_one_slurm_task_and_those_of_torchrun_are_right(monkeypatch):
    from harness.distributed import join

    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "1")
    join.check_environment()
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
    with pytest.raises(UsageError):
        join.check_environment()
    monkeypatch.setenv("RANK", "0")
    join.check_environment()


def test_a_task_that_is_not_there_ends_with_78_and_without_a_traceback(tmp_path):
    ended = run_forked(alone("task.name=no_such_module:build", "run.dir=a"))
    assert (
        ended.returncode == 78
        and "there is no module no_such_module" in ended.stderr
        and "Traceback" not in ended.stderr
    )
    assert list(tmp_path.iterdir()) == []


def test_a_task_is_found_in_the_working_directory_and_its_mistakes_are_named(tmp_path):
    (tmp_path / "task_of_words.py").write_text(
        "def build(size, lr: float = 0.1, name: str = 'a', deep: bool = False, *, must): pass\n"
        "value = 3\ndef any(**kwargs): pass\n"
    )
    (tmp_path / "task_of_import.py").write_text("import no_such_library\n")
    right: dict[str, Any] = {"size": 3, "must": 1}
    assert task.find("task_of_words:build", right).__name__ == "build"
    given = right | {"lr": 1, "deep": True, "name": None}
    assert task.find("task_of_words:build", given).__name__ == "build"
    assert task.find("task_of_words:any", {"whatever": 1}).__name__ == "any"
    mistakes: list[tuple[str, dict[str, Any], str]] = [
        ("task_of_nothing:build", {}, "there is no module task_of_nothing"),
        ("task_of_words.deeper:build", {}, "there is no module task_of_words.deeper"),
        ("task_of_words:built", {}, "has no callable 'built'"),
        ("task_of_words:value", {}, "has no callable 'value'"),
        ("task_of_import:build", {}, "No module named 'no_such_library'"),
        ("task_of_words:build", right | {"larning_rate": 1}, "task.args.larning_rate=1: unknown"),
        ("task_of_words:build", {"size": 3}, "task.args.must: missing"),
        ("task_of_words:build", right | {"lr": "fast"}, "task.args.lr='fast': expected a float"),
        ("task_of_words:build", right | {"lr": True}, "task.args.lr=True: expected a float"),
        ("task_of_words:build", right | {"name": 3}, "task.args.name=3: expected a str"),
        ("task_of_words:build", right | {"deep": 1}, "task.args.deep=1: expected a bool"),
    ]
    for name, args, expected in mistakes:
        with pytest.raises(UsageError) as caught:
            task.find(name, args)
        assert expected in str(caught.value)
    with pytest.raises(UsageError) as caught:
        task.find("task_of_words:build", {"wrong": 1, "lr": "x"})
    assert all(
        text in str(caught.value)
        for text in (
            "wrong=1: unknown",
            "size: missing",
            "must: missing",
            "lr='x'",
            "It takes: (size",
        )
    )


def test_a_secret_among_the_tasks_arguments_is_not_said(monkeypatch, capsys):
    monkeypatch.setenv("THE_SECRET", "hunter2")
    with pytest.raises(SystemExit) as left:
        train.main([*SMALL, "task.args.tokn=${oc.env:THE_SECRET}", "run.dir=a"])
    said = capsys.readouterr().err
    assert left.value.code == 78 and "task.args.tokn" in said and "hunter2" not in said


def test_a_secret_is_in_no_file_of_the_run(monkeypatch, tmp_path):
    monkeypatch.setenv("THE_SECRET", "0.0123456")
    trained("task.args.lr=${oc.decode:${oc.env:THE_SECRET}}", "run.dir=a", "train.epochs=1")
    assert (
        newest(tmp_path / "a")["config"]["task"]["args"]["lr"]
        == "${oc.decode:${oc.env:THE_SECRET}}"
    )
    assert (
        newest(tmp_path / "a")["optimizer_state_dict"]["param_groups"][0]["initial_lr"] == 0.0123456
    )
    text = [
        path
        for path in (tmp_path / "a").rglob("*")
        if path.is_file() and b"0.0123456" in path.read_bytes()
    ]
    assert text == []


@pytest.mark.parametrize(
    "given",
    [
        ["run.remote=bucket/a"],
        ["run.dir=null"],
        ["run.dir=s3://bucket/a"],
        ["--config", "none.yaml"],
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_started(tmp_path, given, capfd):
    with pytest.raises(SystemExit) as ended:
        train.main(given)
    assert ended.value.code == 78
    assert "1 problem(s)" in capfd.readouterr().err and list(tmp_path.iterdir()) == []


# --- going on with something else -----------------------------------------------------------------


def test_changed_settings_end_with_78_and_are_shown(tmp_path):
    trained("run.dir=a", "train.epochs=1")
    ended = run_forked(
        alone(
            *SMALL_TASK,
            "run.dir=a",
            "train.epochs=2",
            "train.clip_norm=5",
            "task.args.momentum=0.5",
        )
    )
    assert ended.returncode == 78 and "Traceback" not in ended.stderr
    assert (
        "train.clip_norm: 1.0 -> 5.0" in ended.stderr
        and "task.args.momentum: 0.9 -> 0.5" in ended.stderr
    )
    assert "train.epochs: 1 -> 2" not in ended.stderr and "resume.accept=[config]" in ended.stderr
    assert attempts_of(tmp_path / "a") == 1 and steps_of(tmp_path / "a") == [4]


def test_changed_settings_are_taken_on_insistence_and_then_kept(tmp_path, capfd):
    trained("run.dir=a", "train.epochs=1")
    trained("run.dir=a", "train.epochs=2", "train.clip_norm=5", "resume.accept=[config]")
    assert "setting changed: train.clip_norm: 1.0 -> 5.0" in capfd.readouterr().out
    assert (
        newest(tmp_path / "a")["step"] == 8
        and newest(tmp_path / "a")["config"]["train"]["clip_norm"] == 5
    )
    trained("run.dir=a", "train.epochs=3", "train.clip_norm=5")
    assert newest(tmp_path / "a")["step"] == 12


def test_a_changed_learning_rate_is_applied_to_what_was_restored(tmp_path, capfd):
    trained("run.dir=a", "train.epochs=1")
    before = newest(tmp_path / "a")
    assert "task.args.lr: 0.01 -> 0.004" in str(
        refused(UsageError, "run.dir=a", "train.epochs=2", "task.args.lr=0.004")
    )
    trained(
        "run.dir=a",
        "train.epochs=2",
        "train.max_steps=5",
        "task.args.lr=0.004",
        "resume.override=[task.args.lr]",
    )
    assert "overridden: optimizer[0].lr" in capfd.readouterr().out
    after = newest(tmp_path / "a")
    (group,) = after["optimizer_state_dict"]["param_groups"]
    assert group["initial_lr"] == 0.004 and group["lr"] == pytest.approx(0.004 / 1.05)
    assert (
        after["scheduler_state_dict"]["base_lrs"] == [0.004]
        and after["scheduler_state_dict"]["last_epoch"] == 5
    )
    moved = (after["model_state_dict"]["0.weight"] - before["model_state_dict"]["0.weight"]).norm()
    momentum = after["optimizer_state_dict"]["state"][0]["momentum_buffer"].norm()
    assert moved.item() == pytest.approx(0.004 / 1.04 * momentum.item(), rel=1e-3), (
        "step 5 was made with the new rate"
    )
    trained("run.dir=a", "train.epochs=2", "task.args.lr=0.004")
    (group,) = newest(tmp_path / "a")["optimizer_state_dict"]["param_groups"]
    assert group["lr"] == pytest.approx(0.004 / 1.08), "and it stays"


def test_a_checkpoint_of_another_model_is_shown_as_a_table(tmp_path):
    trained("run.dir=a", "train.epochs=1")
    before = (tmp_path / "a/checkpoints").stat().st_mtime_ns
    said = str(
        refused(
            UsageError,
            "run.dir=a",
            "train.epochs=2",
            "task.args.width=16",
            "resume.accept=[config]",
        )
    )
    rows = [line.split() for line in said.splitlines()]
    assert "step_00000004-0001 is a checkpoint of another model" in said
    assert ["mis-shaped", "0.weight", "16x12", "32x12"] in rows
    assert (
        attempts_of(tmp_path / "a") == 1
        and (tmp_path / "a/checkpoints").stat().st_mtime_ns == before
    )


def test_another_optimizer_is_refused(tmp_path):
    named = written_task(tmp_path, "pass")
    trained(named, "run.dir=a", "train.epochs=1", "task.args.optimizer=Adam")
    more = (named, "run.dir=a", "train.epochs=2", "resume.accept=[config]")
    assert "found: AdamW, expected: Adam" in str(
        refused(UsageError, *more, "task.args.optimizer=AdamW")
    )
    assert "found: NAdam, expected: Adam" in str(
        refused(UsageError, *more, "task.args.optimizer=NAdam")
    )
    assert attempts_of(tmp_path / "a") == 1


def test_another_seed_is_refused(tmp_path):
    trained("run.dir=a", "train.epochs=1")
    assert "train.seed: 1 -> 2" in str(
        refused(UsageError, "run.dir=a", "train.epochs=2", "train.seed=2")
    )
    assert steps_of(tmp_path / "a") == [4]


def test_other_data_is_refused_and_taken_on_insistence(tmp_path, monkeypatch):
    named = written_task(tmp_path, "pass").partition("=")[2].partition(":")[0]
    module = tmp_path / f"{named}.py"
    module.write_text(
        module.read_text().replace(
            "    job.loss = loss", "    job.loss = loss\n    job.train_data.x += SHIFT"
        )
        + "\nSHIFT = 0.0\n"
    )
    trained(f"task.name={named}:build", "run.dir=a", "train.epochs=1")
    vars(sys.modules[named])["SHIFT"] = 1.0
    said = str(refused(UsageError, f"task.name={named}:build", "run.dir=a", "train.epochs=2"))
    assert (
        "the data is not what this run was trained on" in said
        and "fingerprint: found" in said
        and "resume.accept=[data]" in said
    )
    assert attempts_of(tmp_path / "a") == 1
    trained(f"task.name={named}:build", "run.dir=a", "train.epochs=2", "resume.accept=[data]")
    assert steps_of(tmp_path / "a")[-1] == 8


# --- the run directory ----------------------------------------------------------------------------


def test_a_run_directory_that_is_a_file_is_refused_in_words(tmp_path):
    (tmp_path / "a").write_text("mine")
    error = refused(StorageError, "run.dir=a")
    assert (
        error.exit_code == 74
        and "Not a directory" in str(error)
        and "choose another run.dir" in str(error)
    )
    assert (tmp_path / "a").read_text() == "mine"


def test_a_run_directory_that_cannot_be_written_is_refused_in_words(small_disk):
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    error = refused(StorageError, f"run.dir={small_disk}/a")
    assert (
        error.exit_code == 74
        and "Read-only file system" in str(error)
        and "choose another run.dir" in str(error)
    )


def test_a_disk_that_is_full_from_the_start_is_said_in_words(small_disk):
    fill(small_disk)
    error = refused(StorageError, f"run.dir={small_disk}/a")
    assert error.exit_code == 74 and "The disk is full" in str(error)


def test_foreign_and_truncated_files_are_told_apart_and_left_alone(tmp_path, capfd):
    settings = ("run.dir=a", "checkpoint.every_steps=2")
    trained(*settings, "train.epochs=1")
    folder = tmp_path / "a/checkpoints"
    foreign = {
        "notes.txt": b"mine",
        "step_00000009-0001.pt.bak": b"x",
        "best.pt": b"",
        "step_9-0001.json": b"{}",
    }
    for name, content in foreign.items():
        (folder / name).write_bytes(content)
    (folder / "step_00000099-0001.json").mkdir()
    newest_file = folder / "step_00000004-0001.pt"
    newest_file.write_bytes(newest_file.read_bytes()[:1000])
    (folder / "step_00000003-0001.json").write_bytes(b"{")
    trained(*settings, "train.epochs=2")
    said = capfd.readouterr().out
    assert (
        "resumes from step 2" in said
        and "has the wrong size" in said
        and "step_00000003-0001.json is not a manifest" in said
    )
    assert {name: (folder / name).read_bytes() for name in foreign} == foreign
    assert (folder / "step_00000004-0001.pt.damaged").stat().st_size == 1000 and (
        folder / "step_00000003-0001.json.damaged"
    ).exists()
    assert newest(tmp_path / "a")["step"] == 8


def test_a_run_with_nothing_but_damage_is_not_begun_anew(tmp_path):
    trained("run.dir=a", "train.epochs=1")
    (file,) = (tmp_path / "a/checkpoints").glob("*.pt")
    file.write_bytes(b"")
    error = refused(DamagedError, "run.dir=a", "train.epochs=1")
    assert (
        "not starting from step 0" in str(error)
        and "has the wrong size" in str(error)
        and error.exit_code == 1
    )
    assert attempts_of(tmp_path / "a") == 1


# --- numbers that are none ------------------------------------------------------------------------

NAN_LOSS = "value = value * float('nan') if bad_from <= calls < bad_to else value"


def all_finite(directory: Path) -> bool:
    store = LocalStore(directory)
    payloads = [load.load(store, manifest) for manifest in read_catalog(store).manifests]
    assert payloads
    return all(
        torch.isfinite(value).all()
        for payload in payloads
        for value in payload["model_state_dict"].values()
    )


def test_a_few_losses_that_are_not_finite_are_skipped(tmp_path):
    named = written_task(tmp_path, NAN_LOSS)
    settings = (
        named,
        "train.epochs=3",
        "checkpoint.every_steps=1",
        "checkpoint.keep_last=99",
        "train.nonfinite_limit=3",
    )
    trained(*settings, "run.dir=a", "task.args.bad_from=4", "task.args.bad_to=7")
    assert steps_of(tmp_path / "a") == list(range(1, 13)) and all_finite(tmp_path / "a")
    store = LocalStore(tmp_path / "a")
    guards = [
        load.load(store, manifest)["guard_state_dict"]["skipped_in_a_row"]
        for manifest in read_catalog(store).manifests
    ]
    assert guards == [0, 0, 0, 1, 2, 3, 0, 0, 0, 0, 0, 0]
    weights = [
        load.load(store, manifest)["model_state_dict"]["0.weight"]
        for manifest in read_catalog(store).manifests
    ]
    assert torch.equal(weights[2], weights[5]) and not torch.equal(weights[5], weights[6])


def test_too_many_losses_that_are_not_finite_stop_the_run(tmp_path):
    named = written_task(tmp_path, NAN_LOSS)
    settings = (
        named,
        "checkpoint.every_steps=1",
        "checkpoint.keep_last=99",
        "train.nonfinite_limit=2",
        "task.args.bad_from=4",
    )
    error = refused(NonFiniteError, *settings, "run.dir=a")
    assert "not finite at step 6" in str(error) and "3 step(s) in a row; allowed: 2" in str(error)
    assert steps_of(tmp_path / "a") == [1, 2, 3, 4, 5] and all_finite(tmp_path / "a")


def test_stop_at_the_first_ends_with_1_and_says_why(tmp_path):
    named = written_task(tmp_path, NAN_LOSS)
    settings = (
        *SMALL,
        named,
        "run.dir=a",
        "checkpoint.every_steps=1",
        "train.nonfinite=stop",
        "task.args.bad_from=3",
    )
    ended = run_forked(alone(*settings))
    assert (
        ended.returncode == 1
        and "not finite at step 3" in ended.stderr
        and "Traceback" not in ended.stderr
    )
    assert (
        end_of(tmp_path / "a")["why"] == "failed"
        and "not finite at step 3" in end_of(tmp_path / "a")["error"]
    )
    assert steps_of(tmp_path / "a") == [1, 2] and all_finite(tmp_path / "a")


def test_ignored_they_still_never_reach_a_checkpoint(tmp_path):
    named = written_task(tmp_path, NAN_LOSS)
    settings = (named, "checkpoint.every_steps=2", "train.nonfinite=ignore", "task.args.bad_from=3")
    assert "parameters are not finite" in str(refused(NonFiniteError, *settings, "run.dir=a"))
    assert steps_of(tmp_path / "a") == [2] and all_finite(tmp_path / "a")


# --- nobody listens -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "redirection", [pytest.param(">&-", marks=pytest.mark.slow), ">/dev/full", ">&- 2>&- <&-"]
)
def test_training_goes_on_when_nobody_can_be_told(tmp_path, redirection):
    command = " ".join(
        f"'{part}'"
        for part in alone(*SMALL_TASK, "run.dir=a", "train.epochs=2", "log.every_steps=1")
    )
    ended = run(["bash", "-c", f"{command} {redirection}"])
    assert ended.returncode == 0, ended.stderr
    assert newest(tmp_path / "a")["step"] == 8 and end_of(tmp_path / "a")["why"] == "finished"
    assert len(events(tmp_path / "a", "step")) == 8
    for path in (tmp_path / "a").rglob("*"):
        assert path.suffix == ".pt" or path.is_dir() or b"harness:" not in path.read_bytes(), (
            "output in a file of the run"
        )


def test_training_goes_on_when_the_reader_of_a_pipe_has_left(tmp_path):
    process = start(alone(*SMALL_TASK, "run.dir=a", "train.epochs=2"))
    there(process.stdout).close()
    assert there(process.stderr).read() == "" and process.wait(60) == 0
    there(process.stderr).close()
    assert newest(tmp_path / "a")["step"] == 8


def test_training_goes_on_when_the_events_have_no_room(tmp_path, small_disk, capfd):
    (tmp_path / "a").mkdir()
    (tmp_path / "a/events").symlink_to(small_disk)
    fill(small_disk)
    trained("run.dir=a", "train.epochs=2", "checkpoint.every_steps=2", "log.every_steps=1")
    told = capfd.readouterr()
    assert told.err.count("events are not recorded") == 1 and "No space left" in told.err
    assert newest(tmp_path / "a")["step"] == 8 and end_of(tmp_path / "a")["why"] == "finished"
    assert events(tmp_path / "a") == []


# --- the disk fills up, the directory vanishes ----------------------------------------------------

SAVED = """
        if calls in (bad_from, bad_to):  # a save that is on its way arrives first, well or not
            time.sleep(0.3)
            while os.path.isdir(folder) and {
                name[:18] for name in os.listdir(folder) if name[18:] != ".json"
            } - {
                name[:18] for name in os.listdir(folder) if name[18:] == ".json"
            }: time.sleep(0.05)
"""
FULL = f"""{SAVED.replace("folder", "'disk/a/checkpoints'")}
        if calls == bad_from:
            with open("disk/ballast", "ab", buffering=0) as file:
                try:
                    while file.write(b"x" * 4096): pass
                except OSError: pass
        if calls == bad_to:
            os.unlink("disk/ballast")
"""
GONE = f"""{SAVED.replace("folder", "'a/checkpoints'")}
        if calls == bad_from: os.rename("a", "elsewhere")
        if calls == bad_to: os.rename("elsewhere", "a")
"""


def test_a_disk_that_is_full_for_a_while_costs_nothing(tmp_path, small_disk, capfd):
    settings = (written_task(tmp_path, FULL), "train.epochs=3", "checkpoint.every_steps=2")
    trained(*settings, f"run.dir={small_disk}/a", "task.args.bad_from=4", "task.args.bad_to=9")
    said = capfd.readouterr().out
    assert (
        said.count("NOT SAVED, training goes on") == 3
        and "the checkpoint of step 4 was not saved" in said
    )
    assert "The disk is full" in said and "No space left" in said
    assert steps_of(small_disk / "a") == [2, 10, 12] and newest(small_disk / "a")["step"] == 12
    store = LocalStore(small_disk / "a")
    assert [load.load(store, manifest)["step"] for manifest in read_catalog(store).manifests] == [
        2,
        10,
        12,
    ]
    assert not [
        path
        for path in (small_disk / "a/checkpoints").iterdir()
        if ".tmp-" in path.name or "00000004" in path.name
    ]
    trained(
        settings[0],
        "train.epochs=3",
        "checkpoint.every_steps=2",
        "run.dir=b",
        "task.args.bad_from=4",
    )
    from harness.exchange.compare import differences

    ours, theirs = newest(small_disk / "a"), newest(tmp_path / "b")
    assert list(differences({**ours, "config": 0}, {**theirs, "config": 0})) == []


def test_when_the_last_save_fails_the_exit_code_says_so_and_a_new_start_finishes(
    tmp_path, small_disk
):
    settings = (
        *SMALL,
        written_task(tmp_path, FULL),
        f"run.dir={small_disk}/a",
        "train.epochs=2",
        "checkpoint.every_steps=2",
    )
    ended = run_forked(alone(*settings, "task.args.bad_from=6", "resume.accept=[config]"))
    assert ended.returncode == 1 and "Traceback" not in ended.stderr
    assert (
        "the last checkpoint, of step 8, was not saved" in ended.stderr
        and "disk is full" in ended.stderr
    )
    assert "finished" not in ended.stdout and "NOT SAVED" in ended.stdout
    assert steps_of(small_disk / "a") == [2, 4] and newest(small_disk / "a")["step"] == 4
    (small_disk / "ballast").unlink()
    again = run_forked(alone(*settings, "task.args.bad_from=99", "resume.accept=[config]"))
    assert again.returncode == 0, again.stderr
    assert "resumes from step 4" in again.stdout and "finished at step 8" in again.stdout
    assert newest(small_disk / "a")["step"] == 8


def test_a_run_directory_that_vanishes_is_not_made_anew_and_fails_at_the_end(tmp_path):
    settings = (
        *SMALL,
        written_task(tmp_path, GONE),
        "run.dir=a",
        "train.epochs=2",
        "checkpoint.every_steps=2",
    )
    ended = run_forked(alone(*settings, "task.args.bad_from=4"))
    assert ended.returncode == 1 and "Traceback" not in ended.stderr
    assert (
        "the last checkpoint, of step 8, was not saved" in ended.stderr
        and "has vanished" in ended.stderr
    )
    assert not (tmp_path / "a").exists() and steps_of(tmp_path / "elsewhere") == [2]
    shutil.move(tmp_path / "elsewhere", tmp_path / "a")
    trained(*settings[len(SMALL) :], "task.args.bad_from=99", "resume.accept=[config]")
    assert newest(tmp_path / "a")["step"] == 8 and end_of(tmp_path / "a", 2)["why"] == "finished"


def test_a_run_directory_that_comes_back_is_used_again(tmp_path, capfd):
    settings = (
        written_task(tmp_path, GONE),
        "run.dir=a",
        "train.epochs=3",
        "checkpoint.every_steps=2",
    )
    trained(*settings, "task.args.bad_from=4", "task.args.bad_to=9")
    assert capfd.readouterr().out.count("NOT SAVED") == 3
    assert steps_of(tmp_path / "a") == [2, 10, 12]


def test_a_failed_last_save_in_this_process_is_a_save_error(tmp_path, small_disk):
    error = refused(
        SaveError,
        written_task(tmp_path, FULL),
        f"run.dir={small_disk}/a",
        "train.epochs=1",
        "task.args.bad_from=2",
    )
    assert error.exit_code == 1 and "was not saved" in str(error)
    assert steps_of(small_disk / "a") == []


def test_an_error_of_the_task_keeps_its_traceback_and_is_recorded(tmp_path):
    ended = run_forked(
        alone(*SMALL_TASK, "task.args.fail_at=3", "run.dir=a", "checkpoint.every_steps=2")
    )
    assert (
        ended.returncode == 1
        and "Traceback" in ended.stderr
        and "ValueError: the task fails in forward pass 3" in ended.stderr
    )
    assert (
        end_of(tmp_path / "a")["why"] == "failed"
        and "the task fails in forward pass 3" in end_of(tmp_path / "a")["error"]
    )
    assert steps_of(tmp_path / "a") == [2]


MISTAKES = {
    "a path as state": (
        'model.load_state_dict("model.pt")',
        "takes what torch.load returns, not a path",
    ),
    "another architecture": (
        "model.load_state_dict({})",
        "harness.load_weights(model, path) shows which",
    ),
    "parameters saved": ('torch.save(model.parameters(), "model.pt")', "save model.state_dict()"),
    "a pickle": (
        'torch.save(model, "m.pt"); torch.load("m.pt", weights_only=True)',
        "`harness show FILE` names what",
    ),
    "another device": (
        'raise RuntimeError("Expected all tensors to be on the same device, '
        'but found at least two devices, cuda:0 and cpu!")',
        "model.to(run.device)",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_classic_mistake_is_told_what_to_do_about_it(mistake, tmp_path):
    line, words = MISTAKES[mistake]
    with pytest.raises((TypeError, RuntimeError, pickle.UnpicklingError)) as caught:
        exec(line, {"torch": torch, "model": torch.nn.Linear(2, 2)})
    assert words in str(hint(caught.value))
    assert hint(ValueError("something else")) is None


def test_what_to_do_about_a_mistake_stands_below_the_error_and_in_the_record(tmp_path):
    (tmp_path / "loop.py").write_text(
        """
import torch, harness

run = harness.init("a")
model = torch.nn.Linear(2, 2)
run.track(model=model)
for batch in run.batches(torch.zeros(8, 2), 4, epochs=1):
    model.load_state_dict("model.pt")
"""
    )
    ended = run_forked([sys.executable, "loop.py"], cwd=tmp_path)
    assert ended.returncode == 1 and "Traceback" in ended.stderr
    assert "hint: load_state_dict takes what torch.load returns, not a path" in ended.stderr
    assert "not a path" in end_of(tmp_path / "a")["trace"]


def test_the_program_is_the_one_of_this_checkout():
    assert Path(train.__file__) == TRAIN and os.access(TRAIN, os.R_OK)
