"""The drill: exact programs are found equal, others are not, with the right cause; nothing is left
behind."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch
from conftest import REPO, harness, run, wait_until
from library_runs import train
from remote_lives import run_forked
from slurm_cluster import SlurmCluster

from harness.distributed.ranks import World
from harness.drill import program_runs
from harness.drill import verdict as verdicts
from harness.drill.faults import KINDS, Fault, planned
from harness.drill.program_runs import ProgramRun
from harness.run import drill_hooks
from harness.run.drill_hooks import DRILL, PLAN, RUN, Traces
from harness.supervision.launches import REDIRECT

PROGRAM = """
import sys
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
import harness

run = harness.init({where})
class Counting(TensorDataset):


    asked = 0

    def __getitem__(self, number):
        self.asked += 1
        x, y = super().__getitem__(number)
        return x + self.asked * 1e-3, y


data = {data}(torch.randn(160, 8), torch.randn(160, 1))
model = nn.Sequential(nn.Linear(8, 16), nn.Dropout(0.2), nn.Linear(16, 1))
{wrap}
optimizer = torch.optim.AdamW(model.parameters(), lr=float(sys.argv[1]))
run.track(model=model, optimizer=optimizer)
hidden = [torch.Generator().manual_seed(0), 1.0]
for epoch, batches in run.by_epoch(run.batches(data, 16, epochs=4)):
    for x, y in batches:
        {planted}
        loss = (model(x) - y).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        run.log(loss=loss)
    run.evaluate(data, lambda batch: dict(val_loss=(model(batch[0]) - batch[1]).square().sum()))
"""


WHERE = "'elsewhere', seed=1"
DDP = "model = nn.parallel.DistributedDataParallel(model) if run.world_size > 1 else model"
FSDP = "from torch.distributed.fsdp import fully_shard; fully_shard(model)"


def drill(
    folder: Path,
    *words: str,
    planted: str = "pass",
    data: str = "TensorDataset",
    where: str = WHERE,
    wrap: str = DDP,
    limit_s: float = 400,
) -> dict:
    """Run a drill of the program with this line in its loop; what it found, with its exit code."""
    program = PROGRAM.format(planted=planted, data=data, where=where, wrap=wrap)
    (folder / "my_loop.py").write_text(program)
    done = run(
        harness("drill", "--json", "--steps", "32", *words, "my_loop.py", "0.05"),
        cwd=folder,
        limit_s=limit_s,
    )
    assert done.stdout, done.stderr
    return json.loads(done.stdout) | {"code": done.returncode, "said": done.stderr}


def test_faults_follow_from_the_seed_and_each_kind_comes_before_any_comes_twice():
    faults = planned(9, ["kill", "save", "sigterm"], 100, seed=3)
    assert (
        faults
        == planned(9, ["kill", "save", "sigterm"], 100, seed=3)
        != planned(9, ["kill", "save", "sigterm"], 100, seed=4)
    )
    for three in (faults[:3], faults[3:6], faults[6:]):
        assert {fault.kind for fault in three} == {"kill", "save", "sigterm"}
    assert all(1 <= fault.step <= 100 for fault in faults)
    assert [fault.step for fault in faults] == sorted(fault.step for fault in faults)
    assert planned(2, ["startup", "first-step"], 100, seed=0)[0].step == 0


@pytest.mark.parametrize("number", [0, 2, 5])
def test_the_fault_of_another_number_of_workers_changes_their_number_each_time(
    tmp_path, monkeypatch, number
):
    monkeypatch.setenv(DRILL, "1")
    monkeypatch.setenv(REDIRECT, str(tmp_path))
    life, used = ProgramRun(tmp_path, {"faults": []}), []
    for at in range(3):
        (tmp_path / PLAN).write_text(json.dumps(life.plan))
        used.append(Traces(World(0, 1, torch.device("cpu"), 60.0)).workers(number))
        program_runs._afterwards(Fault(at, "workers", at, 0.5), life)
    assert used[0] == number and used[0] != used[1] != used[2], used


def test_an_exact_program_is_equal_and_its_own_places_are_left_alone(tmp_path):
    found = drill(tmp_path, "--faults", "2", "--kinds", "kill,startup", "--html", "drill.html")
    assert (found["code"], found["equal"]) == (0, True), found
    assert [fault["equal"] for fault in found["faults"]] == [True] * 2
    assert all(fault["step"] is not None and fault["back_s"] > 0 for fault in found["faults"])
    assert not (tmp_path / "elsewhere").exists()
    assert (
        "drill.html" in found["said"]
        and "SIGKILL while it starts" in (tmp_path / "drill.html").read_text()
    )


@pytest.mark.slow
def test_a_planted_generator_is_found_with_its_step_and_cause(tmp_path):
    found = drill(
        tmp_path,
        "--faults",
        "1",
        "--kinds",
        "kill",
        planted="x = x + torch.randn(x.shape, generator=hidden[0])",
    )
    assert (found["code"], found["equal"], found["deterministic"]) == (1, False, True), found
    assert found["first"]["what"] == "loss" and "the same samples" in found["cause"]
    assert found["faults"][0]["equal"] is False
    assert any("model_state_dict" in where for where, *_ in found["tensors"])


@pytest.mark.slow
def test_a_program_that_is_not_deterministic_is_told_apart(tmp_path):
    found = drill(
        tmp_path,
        "--faults",
        "1",
        "--kinds",
        "kill",
        planted="x = x + int.from_bytes(__import__('os').urandom(2)) / 1e6",
    )
    assert (found["code"], found["deterministic"]) == (1, False)
    assert found["cause"].startswith("not deterministic")


@pytest.mark.usefixtures("process_as_it_was")
def test_a_program_whose_kept_files_are_others_each_time_is_not_deterministic(tmp_path):
    for name, words in (("whole", b"12:00"), ("hurt", b"12:01"), ("same", b"12:00")):

        def keep(job, words=words):
            job.keep("notes.txt", words)

        train(tmp_path / name / RUN, each=keep)
    whole, hurt, same = (ProgramRun(tmp_path / name, {}) for name in ("whole", "hurt", "same"))
    found = verdicts.verdict(whole, hurt, [])
    assert found.files == ["notes.txt"] and verdicts.verdict(whole, same, []).is_equal
    assert verdicts.judged(found, whole, hurt).cause.startswith("not deterministic")
    assert "kept at the end" in verdicts.judged(found, whole, same).cause


def traced(folder: Path, **changed: int) -> ProgramRun:
    """The traces of four steps of a run; `changed` names the step from which a digest is another
    one."""
    names = ("samples", "batch", "loss", "rng")
    lines: list[dict[str, object]] = [
        {"pid": 1, "rank": 0, "writes": True},
        {"attempt": 1, "goes_on_from": 0},
    ]
    for step in range(1, 5):
        digests = {name: f"{step >= changed.get(name, 9)}" for name in names}
        lines.append({"step": step, "epoch": 0, "state": {}} | digests)
    (folder / RUN).mkdir(parents=True)
    (folder / "traces-1-0.jsonl").write_text(
        "".join(json.dumps({"time": float(at)} | line) + "\n" for at, line in enumerate(lines))
    )
    return ProgramRun(folder, {})


@pytest.mark.usefixtures("process_as_it_was")
def test_what_two_undisturbed_runs_have_in_common_is_not_blamed_on_them(tmp_path):
    train(tmp_path / RUN)

    def made(name: str, **changed: int) -> ProgramRun:
        program_run = traced(tmp_path / name, **changed)
        shutil.copytree(tmp_path / RUN, program_run.run, dirs_exist_ok=True)
        return program_run

    whole = made("whole")
    found = verdicts.verdict(whole, made("hurt", loss=3), [])
    assert not found.is_equal
    for number, (undisturbed, step) in enumerate(
        [
            ({}, None),
            ({"rng": 1}, None),  # it follows from what differs first, and does not explain it
            ({"loss": 2}, 2),
            ({"batch": 4}, 4),
        ]
    ):
        judged = verdicts.judged(found, whole, made(f"again{number}", **undisturbed))
        assert (judged.is_deterministic, judged.undisturbed_differ_at) == (step is None, step)
        assert judged.cause == (
            verdicts.CAUSES["loss"]
            if step is None
            else f"not deterministic: two undisturbed runs differ as well, first in step {step}"
        )


def test_a_fault_whose_point_does_not_come_keeps_no_other_back(tmp_path, monkeypatch):
    monkeypatch.setenv(DRILL, "1")
    monkeypatch.setenv(REDIRECT, str(tmp_path))
    kinds = {"evaluation": 2, "save": 4, "startup": 0, "epoch-end": 6}
    faults = [
        Fault(number, kind, step, 0.5).plan() for number, (kind, step) in enumerate(kinds.items())
    ]
    (tmp_path / PLAN).write_text(json.dumps({"faults": faults}))
    monkeypatch.setattr(drill_hooks, "WAITS_S", 0.0)
    reached = []
    for name, step in (("startup", 0), ("save", 3), ("save", 5), ("startup", 3), ("epoch", 6)):
        Traces(World(0, 1, torch.device("cpu"), 60.0)).point(name, step)
        reached.append(len(list(tmp_path.glob("reached-*.json"))))
    assert reached == [0, 0, 1, 1, 2], "the start waits for two faults before it"
    Traces(World(0, 1, torch.device("cpu"), 60.0)).point("startup", 6)
    assert (tmp_path / "reached-2.json").exists() and not (tmp_path / "reached-0.json").exists()


@pytest.mark.slow
def test_a_kind_that_the_program_cannot_have_is_refused(tmp_path):
    (tmp_path / "my_loop.py").write_text(
        PROGRAM.format(planted="pass", data="TensorDataset", where=WHERE, wrap=DDP)
    )
    words = ("--kinds", "kill,lost-disk", "--steps", "4", "my_loop.py", "0.05")
    done = run(harness("drill", *words), cwd=tmp_path)
    assert done.returncode == 78 and "no remote for lost-disk" in done.stderr, done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_a_drill_without_a_fault_proves_nothing(tmp_path):
    # Its only fault is planned for step 31, and the last end of an epoch is that of step 30.
    found = drill(tmp_path, "--faults", "1", "--kinds", "epoch-end", "--seed", "7")
    assert found["code"] == 1 and found["faults"][0]["step"] is None, found


@pytest.mark.parametrize(
    "words",
    [
        ("--kinds", "kill,sigkil"),
        ("--faults", "0"),
        ("--steps", "0"),
        ("--limit-s", "0"),
        ("--keep", "."),
    ],
    ids=lambda words: " ".join(words),
)
def test_what_cannot_be_is_refused_before_anything_is_started(tmp_path, words):
    (tmp_path / "my_loop.py").write_text("raise SystemExit('was started')")
    done = run_forked(harness("drill", *words, "my_loop.py"), cwd=tmp_path)
    assert done.returncode == 78, done
    assert "was started" not in done.stdout + done.stderr and "Traceback" not in done.stderr


@pytest.mark.slow
def test_a_program_that_fails_by_itself_is_said_to(tmp_path):
    (tmp_path / "my_loop.py").write_text("raise ValueError('it is mine')")
    done = run(harness("drill", "my_loop.py"), cwd=tmp_path)
    assert done.returncode == 1
    assert (
        "failed by itself" in done.stderr
        and "it is mine" in done.stderr
        and "Traceback (most recent call last):\n  File" not in done.stdout
    )


@pytest.mark.slow
def test_killed_itself_it_leaves_no_process(tmp_path, started: Callable[..., object]):
    (tmp_path / "my_loop.py").write_text(
        PROGRAM.format(
            planted="__import__('time').sleep(0.2)", data="TensorDataset", where=WHERE, wrap=DDP
        )
    )
    process = started(harness("drill", "--keep", "kept", "my_loop.py", "0.05"), cwd=tmp_path)
    wait_until(lambda: list(tmp_path.glob("kept/whole/traces-*")), "it trains")
    below = psutil.Process(process.pid).children(recursive=True)  # type: ignore[attr-defined]
    assert len(below) >= 3
    os.kill(process.pid, signal.SIGKILL)  # type: ignore[attr-defined]
    until = time.monotonic() + 20
    while (
        any(child.is_running() and child.status() != psutil.STATUS_ZOMBIE for child in below)
        and time.monotonic() < until
    ):
        time.sleep(0.05)
    assert not [
        child for child in below if child.is_running() and child.status() != psutil.STATUS_ZOMBIE
    ]


@pytest.mark.slow
def test_a_sharded_model_is_found_equal(tmp_path):
    kinds = ("--kinds", "kill,kill-rank,sigterm,save,evaluation")
    words = ("--nproc-per-node", "2", "--faults", "5", *kinds)
    found = drill(tmp_path, *words, wrap=FSDP, where=f"{WHERE}, save_every_steps=3")
    assert (found["code"], found["equal"]) == (0, True), found
    assert len(found["faults"]) == 5


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_all_kinds_on_two_ranks_with_a_remote(tmp_path, seed):
    words = ("--nproc-per-node", "2", "--faults", str(len(KINDS)), "--seed", str(seed))
    found = drill(
        tmp_path,
        *words,
        where="'elsewhere', remote='s3://nobody/is-there', seed=1, save_every_steps=3",
        limit_s=1200,
    )
    assert (found["code"], found["equal"]) == (0, True), found
    assert {fault["kind"] for fault in found["faults"]} == set(KINDS)
    assert sum(fault["step"] is not None for fault in found["faults"]) >= len(KINDS) - 2


PLANTED = {
    "a generator": ("x = x + torch.randn(x.shape, generator=hidden[0])", "TensorDataset", "loss"),
    "a variable": ("hidden[1] *= 1.01; x = x * hidden[1]", "TensorDataset", "loss"),
    "a queue": (
        "hidden.append(x[:1].mean()); x = x + sum(hidden[2:][-3:])",
        "TensorDataset",
        "loss",
    ),
    "a schedule": (
        "hidden[1] *= 0.99; optimizer.param_groups[0]['betas'] = (0.9 * hidden[1], 0.99)",
        "TensorDataset",
        "state",
    ),
    "a counter in the dataset": ("pass", "Counting", "batch"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", PLANTED)
def test_planted_faults_are_named(tmp_path, name):
    planted, data, what = PLANTED[name]
    found = drill(
        tmp_path,
        "--faults",
        "2",
        "--kinds",
        "kill,kill-rank",
        "--nproc-per-node",
        "2",
        planted=planted,
        data=data,
    )
    assert (found["code"], found["equal"], found["deterministic"]) == (1, False, True), found
    assert found["first"]["what"] == what, found


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ddp", "gpt", "gan", "stream"])
def test_the_loops_that_were_changed_by_four_lines_are_exact(name, tmp_path):
    ranks = "1" if name == "gan" else "2"
    loop = str(REPO / "tests" / "loops" / f"{name}.py")
    done = run(
        harness("drill", "--nproc-per-node", ranks, "--faults", "6", loop),
        cwd=tmp_path,
        limit_s=1200,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "equal, bit for bit" in done.stdout


@pytest.mark.slow
def test_a_drill_is_one_job_of_slurm(tmp_path, slurm: SlurmCluster):
    (tmp_path / "my_loop.py").write_text(
        PROGRAM.format(planted="pass", data="TensorDataset", where=WHERE, wrap=DDP)
    )
    options = (
        "--drill",
        "--steps 32 --faults 2 --kinds kill,sigterm",
        "--procs-per-node",
        "2",
        "--time",
        "01:00:00",
        "--partition",
        "low",
    )
    done = run(
        harness("submit", *options, "run.dir=runs/a", "my_loop.py", "0.05"),
        cwd=tmp_path,
        env=slurm.environment,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    job = done.stdout.split()[1].rstrip(":")
    assert slurm.wait_for(job, limit_s=400) == "COMPLETED", (
        tmp_path / f"runs/a/logs/slurm-{job}.out"
    ).read_text()
    assert (
        "equal, bit for bit: 32 steps, 2 faults"
        in (tmp_path / f"runs/a/logs/slurm-{job}.out").read_text()
    )
    assert not (tmp_path / "runs/a/attempts").exists() and not (tmp_path / "elsewhere").exists()


def test_a_drill_on_several_nodes_is_refused(tmp_path):
    (tmp_path / "my_loop.py").write_text("pass")
    done = run(
        harness("submit", "--drill", "--dry-run", "--nodes", "2", "run.dir=runs/a", "my_loop.py"),
        cwd=tmp_path,
    )
    assert done.returncode == 78 and "a drill is for one node" in done.stderr, done
