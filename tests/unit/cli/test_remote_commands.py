"""The commands on runs in a bucket: right answers and exit codes, and no more bytes than the
question needs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import alone, harness, run
from fault_proxy import FaultProxy, Rule
from remote_runs import (  # noqa: F401 - fixtures
    TASK,
    Home,
    Trained,
    command,
    fetched_bytes,
    trained,
)
from s3_server import S3Server

Command = Callable[..., tuple[int, str]]


@pytest.mark.slow
def test_they_answer_for_a_url_as_for_a_directory(
    trained: Trained,  # noqa: F811
    command: Command,  # noqa: F811
) -> None:
    home, env = trained.home, trained.home.env()
    newest = f"{home.url}/checkpoints/step_00000040-0001"

    def ask(*line: str) -> tuple[int, str]:
        return command(env, *line)

    code, text = ask("status", home.url, "--json")
    state = json.loads(text)
    assert (code, state["state"], state["checkpoint"]) == (0, "finished", "step_00000040-0001")
    code, text = ask("ls", home.url, "--json")
    rows = json.loads(text)["checkpoints"]
    assert code == 0 and [row["step"] for row in rows] == [str(step) for step in range(40, 0, -5)]
    assert {(row["where"], row["data"]) for row in rows} == {("remote", "size ok")}
    code, text = ask("ls", str(trained.directory), "--json")
    assert code == 0 and {row["where"] for row in json.loads(text)["checkpoints"]} == {
        "local remote"
    }
    code, text = ask("verify", home.url)
    assert code == 0 and text.count("ok       step_") == 8
    for place in (home.url, f"{newest}.pt", f"{newest}.json"):
        code, text = ask("show", place)
        assert code == 0 and "model_state_dict.0.weight" in text and f"{newest}.pt" in text
    assert ask("diff", home.url, str(trained.directory))[0] == 0
    assert ask("diff", home.url, f"{home.url}/checkpoints/step_00000035-0001.pt")[0] == 1
    assert ask("verify", f"{newest}.pt")[0] == 0


def test_they_say_what_is_wrong_with_a_url(
    trained: Trained,  # noqa: F811
    command: Command,  # noqa: F811
) -> None:
    home, env = trained.home.branch(15), trained.home.env()

    def ask(*line: str) -> tuple[int, str]:
        return command(env, *line)

    assert ask("status", home.url)[0] == 75
    assert ask("status", f"{home.url}-none")[0] == 74 and ask("ls", f"{home.url}-none")[0] == 78
    code, text = ask("ls", "s3://no-such-bucket-here/run")
    assert code == 78 and "there is no such bucket" in text
    data = bytearray(home.read("checkpoints/step_00000010-0001.pt"))
    data[1000] ^= 1
    home.put("checkpoints/step_00000010-0001.pt", bytes(data))
    code, text = ask("verify", home.url)
    assert code == 1 and "DAMAGED  step_00000010-0001" in text and text.count("ok  ") == 2
    assert ask("diff", home.url, f"{home.url}/checkpoints/step_00000010-0001.pt")[0] == 1
    home.delete("checkpoints/step_00000015-0001.pt")
    code, text = ask("ls", home.url)
    assert code == 0 and "MISSING" in text
    assert ask("show", f"{home.url}/checkpoints/step_00000015-0001.pt")[0] == 1


@pytest.mark.slow
def test_show_and_ls_read_no_tensors(
    bucket: tuple[S3Server, str],
    command: Command,  # noqa: F811
) -> None:
    home = Home(*bucket)
    large = (
        *TASK,
        "task.args.width=1500",
        "train.max_steps=2",
        "run.dir=null",
        f"run.remote={home.url}",
    )
    assert run(harness("launch", "--nproc-per-node", "1", *large), env=home.env()).returncode == 0
    size = home.manifests()[-1]["files"][0]["size_bytes"]
    assert size > 16 << 20
    with FaultProxy(home.server.host, home.server.port) as proxy:
        code, text = command(home.env(proxy), "show", home.url)
        assert code == 0 and "1500x1500" in text
        assert 0 < fetched_bytes(proxy) < size // 10
        proxy.clear()
        assert command(home.env(proxy), "ls", home.url)[0] == 0
        assert command(home.env(proxy), "status", home.url)[0] == 0
        assert fetched_bytes(proxy) == 0 and proxy.requests
        assert command(home.env(proxy), "verify", home.url)[0] == 0
        assert fetched_bytes(proxy) >= size


def test_what_cannot_be_read_is_not_taken_for_damaged(
    trained: Trained,  # noqa: F811
    command: Command,  # noqa: F811
    tmp_path: Path,
) -> None:
    home = trained.home.branch(15)
    before = home.keys()
    with FaultProxy(home.server.host, home.server.port) as proxy:
        proxy.rules.append(Rule("denied", "GET", "step_00000010-0001.pt"))
        env = home.env(proxy)
        code, text = command(env, "verify", home.url)
        assert (
            code == 74
            and "NOT READ step_00000010-0001" in text
            and "DAMAGED" not in text
            and text.count("ok  ") == 2
        ), text
        assert command(env, "verify", f"{home.url}/checkpoints/step_00000010-0001.pt")[0] == 74
        code, text = command(env, "ls", "--verify", home.url)
        assert "NOT READ" in text and "DAMAGED" not in text, text
        fork = ("import", f"{home.url}/checkpoints/step_00000010-0001.pt", str(tmp_path / "fork"))
        for line in (
            ("prune", home.url, "--keep-last", "2", "--yes"),
            ("rollback", home.url, "10"),
            fork,
        ):
            code, text = command(env, *line)
            assert code == 78 and "Access Denied" in text, text
    assert home.keys() == before


def test_prune_in_the_bucket_keeps_what_the_policy_says_and_never_less_than_two(
    trained: Trained,  # noqa: F811
    command: Command,  # noqa: F811
) -> None:
    home, env = trained.home.branch(40), trained.home.env()
    best = max(
        (m for m in home.manifests() if m["metrics"]), key=lambda m: m["metrics"]["val_loss"]
    )["step"]
    assert best not in (15, 30, 35, 40)
    line = (
        "prune",
        home.url,
        "--keep-last",
        "1",
        "--keep-best",
        "1",
        "--best",
        "val_loss:max",
        "--keep-every-steps",
        "15",
    )
    code, text = command(env, *line)
    assert code == 0 and "nothing was deleted" in text and len(home.steps()) == 8
    assert command(env, *line, "--yes")[0] == 0
    assert home.steps() == sorted({35, 40, best, 15, 30})
    assert sum(key.endswith(".pt") for key in home.keys()) == len(home.steps())  # noqa: SIM118 - no dict
    home.check_none_is_torn()


@pytest.mark.parametrize("where", ["directory", pytest.param("url", marks=pytest.mark.slow)])
def test_after_a_rollback_the_next_start_anywhere_goes_on_from_there(
    where: str,
    trained: Trained,  # noqa: F811
    tmp_path: Path,
    command: Command,  # noqa: F811
) -> None:
    directory = tmp_path / "run"
    home = trained.branch(15, directory)
    code, text = command(
        home.env(), "rollback", str(directory) if where == "directory" else home.url, "10"
    )
    assert code == 0 and "resumes from step 10" in text
    assert home.head() == (2, 10) and home.steps() == [5, 10, 15, 10], "something was deleted"
    # The directory still has what was rolled back.
    place = tmp_path / "elsewhere" if where == "directory" else directory
    done = run(
        alone(*TASK, "train.max_steps=15", f"run.remote={home.url}", f"run.dir={place}"),
        env=home.env(),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert home.attempts()[3]["from"] == {"attempt": 2, "step": 10}
    assert home.head() == (3, 15) and sorted(home.attempts()) == [1, 2, 3]


@pytest.mark.parametrize("target", ["url", "directory"])
def test_an_import_from_the_bucket_begins_another_run(
    target: str,
    trained: Trained,  # noqa: F811
    tmp_path: Path,
    command: Command,  # noqa: F811
) -> None:
    home, env = trained.home, trained.home.env()
    fork = Home(home.server, home.bucket, f"fork-{target}")
    place = fork.url if target == "url" else str(tmp_path / "fork")
    source = f"{home.url}/checkpoints/step_00000020-0001.pt"
    assert command(env, "import", source, place)[0] == 0
    assert command(env, "diff", source, place)[0] == 0
    code, text = command(env, "status", place, "--json")
    assert (
        code == 75
        and json.loads(text)["step"] == 20
        and json.loads(text)["run_id"] != home.manifests()[0]["run_id"]
    )
    assert command(env, "import", source, place)[0] == 78, "there is a run already"


@pytest.mark.slow
def test_launch_knows_a_run_that_is_in_the_bucket_only(bucket: tuple[S3Server, str]) -> None:
    home = Home(*bucket)
    line = harness(
        "launch",
        *TASK,
        "train.max_steps=6",
        "task.args.fail_at=6",
        "run.dir=null",
        f"run.remote={home.url}",
    )
    done = run(line, env=home.env())
    assert done.returncode == 0 and "the task fails in forward pass 6" in done.stderr, done.stderr
    assert "resumes from step 5" in done.stdout, done.stdout
    assert json.loads(home.read("attempts/0002.end.json"))["why"] == "finished"


@pytest.mark.slow
def test_the_bucket_has_a_policy_of_its_own(bucket: tuple[S3Server, str], tmp_path: Path) -> None:
    home, directory = Home(*bucket), tmp_path / "run"
    own = (
        "checkpoint.keep_last=5",
        "checkpoint.keep_best=0",
        "store.keep.last=1",
        "store.keep.best=1",
        "store.keep.every_steps=15",
        "checkpoint.best=val_loss:max",
    )
    done = run(
        alone(
            *TASK, *own, "task.args.sleep_s=0.15", f"run.dir={directory}", f"run.remote={home.url}"
        ),
        env=home.env(),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    here = sorted(int(file.name[5:13]) for file in directory.glob("checkpoints/*.json"))
    assert here[-5:] == [20, 25, 30, 35, 40] and len(here) <= 7
    evaluated = {event["step"]: event["val_loss"] for event in home.events("evaluated")}
    best = max(evaluated, key=lambda step: evaluated[step])
    assert best not in (15, 30, 35, 40), "else this test shows nothing of the best"
    assert home.steps() == sorted({15, 30, 35, 40, best})
    home.check_none_is_torn()
