"""What a start takes from the bucket: the bytes once for all ranks, whole or not at all, and from
an older checkpoint if need be."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import alone, run, torchrun
from fault_proxy import FaultProxy
from remote_runs import (
    TASK,
    Home,
    Trained,
    differing,
    ended,
    fetched_bytes,
    losses,
    trained,  # noqa: F401 - a fixture
)
from s3_server import S3Server, free_ports

Start = Callable[..., "subprocess.Popen[str]"]


def size_of(home: Home, step: int) -> int:
    return next(m["files"][0]["size_bytes"] for m in home.manifests() if m["step"] == step)


def by_hand(
    started: Start, home: Home, directories: list[str], proxies: list[FaultProxy], *settings: str
) -> list[tuple[int, str]]:
    """One process a directory, each as on a machine of its own, without torchrun; the exit codes
    and outputs."""
    group = {
        "WORLD_SIZE": str(len(directories)),
        "LOCAL_WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_ports(1)[0]),
    }
    processes = []
    for rank, (directory, proxy) in enumerate(zip(directories, proxies, strict=True)):
        command = alone(*TASK, f"run.dir={directory}", f"run.remote={home.url}", *settings)
        processes.append(
            started(command, env=home.env(proxy) | group | {"RANK": str(rank), "LOCAL_RANK": "0"})
        )
    return [ended(process) for process in processes]


@pytest.mark.slow
def test_ranks_that_do_not_see_the_writers_disk_are_sent_the_bytes_and_the_run_is_exact(
    trained: Trained,  # noqa: F811
    tmp_path: Path,
    started: Start,
) -> None:
    home = trained.home.branch(20)
    address, size = (home.server.host, home.server.port), size_of(home, 20)
    with FaultProxy(*address) as writers, FaultProxy(*address) as others:
        for code, text in by_hand(
            started, home, [f"{tmp_path}/node0", f"{tmp_path}/node1"], [writers, others]
        ):
            assert code == 0, text
        assert fetched_bytes(writers, "step_00000020-0001.pt") == size, (
            "the bytes left the bucket more than once"
        )
        assert fetched_bytes(others) == 0
    assert home.attempts()[2]["from"] == {"attempt": 1, "step": 20}
    assert not (tmp_path / "node1" / "checkpoints").exists(), "only the writer writes"
    assert differing(trained.home, home) == []
    assert losses(home) == {step: loss for step, loss in trained.losses.items() if step > 20}


@pytest.mark.slow
@pytest.mark.parametrize("directory", ["here", None])
def test_three_ranks_fetch_a_large_checkpoint_once_and_restore_it_alike(
    directory: str | None, bucket: tuple[S3Server, str], tmp_path: Path
) -> None:
    home, whole = Home(*bucket), Home(*bucket, "whole")
    place = f"run.dir={tmp_path / directory if directory else 'null'}"
    task = (
        *TASK,
        "task.args.width=1500",
        "train.max_steps=8",
        "checkpoint.every_steps=4",
        "eval.every_steps=4",
    )
    assert (
        run(
            torchrun(3, *task, "run.dir=null", f"run.remote={whole.url}"), env=home.env()
        ).returncode
        == 0
    )
    half = torchrun(
        3, *task, "train.max_steps=4", f"run.dir={tmp_path}/first", f"run.remote={home.url}"
    )
    assert run(half, env=home.env()).returncode == 0
    size = size_of(home, 4)
    with FaultProxy(home.server.host, home.server.port) as proxy:
        done = run(torchrun(3, *task, place, f"run.remote={home.url}"), env=home.env(proxy))
        assert done.returncode == 0 and "resumes from step 4" in done.stdout, (
            done.stdout + done.stderr
        )
        assert fetched_bytes(proxy, "step_00000004-0001.pt") == size > 16 << 20
    # DDP adds all ranks' gradients: a rank that was restored otherwise would show
    assert differing(whole, home) == []


def damage(home: Home, step: int, how: str) -> None:
    """Spoil the checkpoint of a step where it lies."""
    stem = f"checkpoints/step_{step:08d}-0001"
    data = bytearray(home.read(f"{stem}.pt"))
    if how == "flipped":
        data[len(data) // 2] ^= 1
        home.put(f"{stem}.pt", bytes(data))
    elif how == "cut short":
        home.put(f"{stem}.pt", bytes(data[:-100]))
    elif how == "emptied":
        home.put(f"{stem}.pt", b"")
    elif how == "data deleted":
        home.delete(f"{stem}.pt")
    elif how == "manifest cut short":
        home.put(f"{stem}.json", home.read(f"{stem}.json")[:-20])
    else:
        raise AssertionError(how)


@pytest.mark.slow
def test_damaged_in_the_bucket_the_newest_whole_one_is_gone_on_from_and_the_others_are_marked(
    trained: Trained,  # noqa: F811
    bucket: tuple[S3Server, str],
    tmp_path: Path,
) -> None:
    home, other = trained.home.branch(40), Home(*bucket, "other")
    assert (
        run(
            alone(
                *TASK,
                "train.max_steps=15",
                "train.seed=9",
                "run.dir=null",
                f"run.remote={other.url}",
            ),
            env=other.env(),
        ).returncode
        == 0
    )
    damaged = {
        40: "flipped",
        35: "cut short",
        30: "data deleted",
        25: "manifest cut short",
        20: "emptied",
    }
    for step, how in damaged.items():
        damage(home, step, how)
    for kind in ("pt", "json"):  # another run's, whole, under the name of one of ours
        home.put(
            f"checkpoints/step_00000015-0001.{kind}",
            other.read(f"checkpoints/step_00000015-0001.{kind}"),
        )
    done = run(
        alone(*TASK, "train.max_steps=16", f"run.dir={tmp_path}/run", f"run.remote={home.url}"),
        env=home.env(),
    )
    assert done.returncode == 0 and "resumes from step 10 " in done.stdout, (
        done.stdout + done.stderr
    )
    for step in damaged:
        assert any(
            f"step_{step:08d}-0001" in line
            for line in done.stdout.splitlines()
            if "skipped" in line
        ), (step, done.stdout)
        key = f"checkpoints/step_{step:08d}-0001.json"
        assert {key, f"{key}.damaged"} <= set(home.keys()), f"{step} is deleted, or not marked"
    assert "not of this run" in done.stdout
    assert home.attempts()[2]["from"] == {"attempt": 1, "step": 10} and home.head() == (2, 16)


@pytest.mark.slow
@pytest.mark.parametrize("place", ["here", None])
def test_with_nothing_whole_left_it_fails_and_does_not_begin_anew(
    place: str | None,
    trained: Trained,  # noqa: F811
    tmp_path: Path,
) -> None:
    home = trained.home.branch(15)
    for step, how in {15: "flipped", 10: "data deleted", 5: "cut short"}.items():
        damage(home, step, how)
    before = sorted(home.keys())
    directory = tmp_path / place if place else "null"
    done = run(alone(*TASK, f"run.dir={directory}", f"run.remote={home.url}"), env=home.env())
    assert done.returncode == 1 and "not starting from step 0" in done.stderr, (
        done.stdout + done.stderr
    )
    assert sorted(home.keys()) == before
    assert not list(tmp_path.glob("here/attempts/*"))
