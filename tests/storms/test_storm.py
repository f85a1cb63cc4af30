"""Killed anywhere, any number of times: the model is the one of an uninterrupted run, bit for
bit."""

from __future__ import annotations

import contextlib
import json
import time
from pathlib import Path

import psutil
import pytest
from comparing import differing, losses
from conftest import alone, events, harness, kill_tree, outliving, run, start, torchrun, workers_of

DIGITS = (
    "train.epochs=4",
    "train.ema_decay=0.98",
    "train.micro_batch_size=12",
    "log.every_steps=1",
    "eval.every_steps=20",
    "checkpoint.every_steps=9",
    "checkpoint.every_s=1",
)
BYTES = (
    "task.name=harness.tasks.bytes:build",
    "task.args.layers=2",
    "task.args.channels=48",
    "task.args.heads=2",
    "task.args.block_size=32",
    "task.args.decay_steps=100",
    "task.args.eval_windows=24",
    "train.max_steps=100",
    "train.ema_decay=0.98",
    "train.global_batch_size=24",
    "train.micro_batch_size=4",
    "train.precision=bf16",
    "log.every_steps=1",
    "eval.every_steps=40",
    "checkpoint.every_steps=7",
    "checkpoint.every_s=1",
    "checkpoint.best=val_loss:min",
)
SMALL = (
    "task.name=small_task:build",
    "train.epochs=12",
    "log.every_steps=1",
    "checkpoint.every_steps=7",
    "checkpoint.best=val_loss:min",
)
STORMS = [
    pytest.param(2, DIGITS, 4, id="digits-2"),
    pytest.param(3, BYTES, 4, id="bytes-3"),
    *(pytest.param(ranks, task, 12, id=f"{name}-{ranks}-long")
      for name, task in (("digits", DIGITS), ("bytes", BYTES)) for ranks in (2, 3)),
    *(pytest.param(ranks, (*SMALL, "eval.every_steps=15", setting), 6, id=f"{setting}-{ranks}")
      for setting in ("train.precision=fp16", "train.compile=true") for ranks in (1, 3)),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "task", "faults"), STORMS)
def test_a_run_hurt_at_random_moments_equals_the_undisturbed_one(
    ranks: int, task: tuple[str, ...], faults: int, tmp_path: Path
) -> None:
    kept = tmp_path / "kept"
    words = (
        "--nproc-per-node",
        str(ranks),
        "--faults",
        str(faults),
        "--seed",
        str(ranks),
        "--json",
        "--keep",
        str(kept),
    )
    done = run(harness("drill", *words, *task, "data.num_workers=2"), cwd=tmp_path, limit_s=3600)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout)
    assert (
        found["equal"] and sum(fault["step"] is not None for fault in found["faults"]) >= faults - 1
    ), found
    assert differing(kept / "whole/run", kept / "hurt/run") == []
    assert losses(kept / "hurt/run") == losses(kept / "whole/run")


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 3])
def test_one_rank_killed_under_torchrun_is_restarted_in_place_and_nothing_is_lost(
    ranks: int, tmp_path: Path
) -> None:
    task = (
        "task.name=small_task:build",
        "task.args.sleep_s=0.02",
        "train.epochs=16",
        "log.every_steps=1",
        "checkpoint.every_steps=5",
        "checkpoint.best=val_loss:min",
    )
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert run(torchrun(ranks, *task, f"run.dir={whole}", "task.args.sleep_s=0")).returncode == 0
    with (tmp_path / "log").open("w") as output:
        process = start(
            torchrun(
                ranks,
                *task,
                f"run.dir={killed}",
                "resume.accept=[config]",
                options=("--max-restarts=3",),
            ),
            output=output,
        )
    try:
        for victim in (ranks - 1, 0):
            seen = len(events(killed, "step"))
            until = time.monotonic() + 60
            while len(events(killed, "step")) < seen + 8:
                assert time.monotonic() < until and process.poll() is None, (
                    tmp_path / "log"
                ).read_text()
                time.sleep(0.01)
            workers_of(process.pid)[victim].kill()
        assert process.wait(timeout=120) == 0, (tmp_path / "log").read_text()
    finally:
        kill_tree(process.pid)
    assert len(list(killed.glob("attempts/*[0-9].json"))) == 3
    assert differing(whole, killed) == []
    assert losses(killed) == losses(whole)


@pytest.mark.slow
def test_with_other_numbers_of_ranks_the_same_samples_meet_in_the_same_global_batches(
    tmp_path: Path,
) -> None:
    whole, changed, records = tmp_path / "whole", tmp_path / "changed", tmp_path / "records"
    common = (
        "task.name=recording_task:build",
        "train.epochs=3",
        "train.global_batch_size=36",
        "data.drop_last=false",
        "checkpoint.every_steps=2",
        "log.every_steps=1",
    )
    for name in ("whole", "changed"):
        (records / name).mkdir(parents=True)
    assert (
        run(alone(*common, f"run.dir={whole}", f"task.args.folder={records}/whole")).returncode == 0
    )
    settings = (
        *common,
        f"run.dir={changed}",
        f"task.args.folder={records}/changed",
        "train.micro_batch_size=9",
    )
    for ranks, steps in ((2, 5), (1, 4), (2, None)):
        seen = len(events(changed, "step"))
        process = start(
            torchrun(
                ranks,
                *settings,
                f"task.args.sleep_s={0.05 if steps else 0}",
                "resume.accept=[config]",
            )
        )
        while steps and process.poll() is None and len(events(changed, "step")) < seen + steps:
            time.sleep(0.01)
        if steps:
            kill_tree(process.pid)
        out, err = process.communicate(timeout=120)
        assert steps or process.returncode == 0, out + err

    expected, got = batches(records / "whole"), batches(records / "changed")
    assert got == expected
    sizes = {
        ranks
        for file in (records / "changed").iterdir()
        for line in file.read_text().splitlines()
        for ranks in [json.loads(line)["ranks"]]
    }
    assert sizes == {1, 2}
    epoch_steps = -(-240 // 36)
    for epoch in range(3):
        used = [
            sample
            for step in range(epoch * epoch_steps + 1, (epoch + 1) * epoch_steps + 1)
            for sample in got[step]
        ]
        assert sorted(used) == list(range(240))


def batches(folder: Path) -> dict[int, list[int]]:
    """The samples of each step, over all ranks; a step done twice must have used the same."""
    parts: dict[tuple[int, int, int], list[int]] = {}
    for file in folder.iterdir():
        for line in file.read_text().splitlines():
            with contextlib.suppress(ValueError):  # the last line of a killed process
                record = json.loads(line)
                key = (record["step"], record["ranks"], record["rank"])
                assert parts.setdefault(key, record["samples"]) == record["samples"]
    found: dict[int, list[int]] = {}
    for step, ranks in {(step, ranks) for step, ranks, _ in parts}:
        if all((step, ranks, rank) in parts for rank in range(ranks)):
            together = sorted(
                sample for rank in range(ranks) for sample in parts[step, ranks, rank]
            )
            assert found.setdefault(step, together) == together
    return found


@pytest.mark.slow
def test_killed_processes_leave_nobody_behind(tmp_path: Path) -> None:
    settings = (
        *SMALL,
        "task.args.sleep_s=0.05",
        "train.epochs=400",
        "data.num_workers=1",
        f"run.dir={tmp_path}/run",
    )
    process = start(torchrun(2, *settings))
    try:
        while not events(tmp_path / "run", "step"):
            assert process.poll() is None, process.communicate()
            time.sleep(0.02)
        family = psutil.Process(process.pid).children(recursive=True)
        assert len(family) >= 4, "two ranks with a loader process each"
        process.kill()  # torchrun only
        assert outliving(family) == []
    finally:
        kill_tree(process.pid)
        process.communicate()
