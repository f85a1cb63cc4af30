"""The bucket goes away in the middle, at the end, or while stopping: training goes on, nothing is
lost, and it is said."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import alone, events, harness, run, wait_until
from fault_proxy import FaultProxy
from remote_runs import TASK, Home, ended
from s3_server import S3Server

Start = Callable[..., "subprocess.Popen[str]"]
LONG = (
    *TASK,
    "task.args.sleep_s=0.07",
    "checkpoint.every_steps=2",
    "checkpoint.keep_last=2",
    "checkpoint.keep_best=0",
    "checkpoint.best=val_loss:max",
    "eval.every_steps=14",
    "store.keep.every_steps=20",
    "store.keep.best=1",
)
SHORT = (*TASK, "train.epochs=4", "checkpoint.every_steps=10", "store.wait_s=3")


def local_steps(directory: Path) -> list[int]:
    """The steps whose checkpoints lie in a run directory."""
    return sorted(int(file.name[5:13]) for file in directory.glob("checkpoints/*.json"))


def last_step(directory: Path) -> int:
    return max((event["step"] for event in events(directory, "step")), default=0)


def check_what_matters_arrived(home: Home, directory: Path, steps: int) -> None:
    """The newest, the best and every n-th are in the bucket, whole; not all that was missed
    meanwhile was sent."""
    home.check_none_is_torn()
    scores = {event["step"]: event["val_loss"] for event in events(directory, "evaluated")}
    there = set(home.steps())
    assert max(there) == steps and home.manifests()[-1]["final"]
    assert max(scores, key=lambda step: scores[step]) in there, (
        "the best, which for this test is the one with the greatest loss"
    )
    assert set(range(20, steps + 1, 20)) <= there
    saved = {event["checkpoint"] for event in events(directory, "saved")}
    uploaded = {event["checkpoint"] for event in events(directory, "uploaded")}
    assert uploaded < saved and len(saved - uploaded) >= 10, (
        "what was overtaken was uploaded all the same"
    )


@pytest.mark.slow
@pytest.mark.parametrize("how", ["killed", "stopped"])
def test_the_server_goes_away_in_mid_upload_and_training_goes_on(
    how: str, own_s3_server: S3Server, tmp_path: Path, started: Start
) -> None:
    server, directory, log = own_s3_server, tmp_path / "run", tmp_path / "log"
    home = Home(server, server.make_bucket("outage"))
    # a server that accepts and never answers is noticed by time-outs only
    steps = 140 if how == "killed" else 1100
    with FaultProxy(server.host, server.port) as proxy, log.open("w") as output:
        hold = proxy.hold("PUT", ".pt", skip=3)
        settings = (
            *LONG,
            f"train.epochs={steps // 5}",
            f"run.dir={directory}",
            f"run.remote={home.url}",
        )
        process = started(alone(*settings), env=home.env(proxy), output=output)
        assert hold.reached.wait(60), log.read_text()
        server.kill() if how == "killed" else server.pause()
        since = last_step(directory)
        hold.release()
        wait_until(lambda: "does not answer since" in log.read_text(), "a warning", limit_s=90)
        wait_until(
            lambda: last_step(directory) > (steps - 10 if how == "killed" else since + 20),
            "steps in the outage",
            limit_s=60,
        )
        missed = local_steps(directory)[-1]
        assert process.poll() is None and missed > since
        server.start() if how == "killed" else server.resume()
        assert missed not in home.steps()
        assert process.wait(150) == 0, log.read_text()
    text = log.read_text()
    assert (
        "answers again" in text
        and text.count("does not answer since") == 1
        and text.count("warning") <= 3
    ), text
    assert len(events(directory, "retry")) >= 2
    check_what_matters_arrived(home, directory, steps)
    assert home.events("step")[-1]["step"] == steps


@pytest.mark.slow
def test_what_could_not_be_uploaded_at_the_end_is_said_and_uploaded_by_the_next_start(
    bucket: tuple[S3Server, str], tmp_path: Path, started: Start
) -> None:
    home, directory = Home(*bucket), tmp_path / "run"
    with FaultProxy(home.server.host, home.server.port) as proxy:
        hold = proxy.hold("PUT", "step_00000020-0001.pt")
        command = alone(*SHORT, f"run.dir={directory}", f"run.remote={home.url}")
        process = started(command, env=home.env(proxy))
        assert hold.reached.wait(60)
        proxy.down()
        hold.release(forward=False)
        began = time.monotonic()
        code, text = ended(process)
        assert (
            code == 74
            and str(directory) in text
            and "not everything is in the remote store" in text
        ), text
        assert time.monotonic() - began < 3 + 20, "store.wait_s, and a moment for the last records"
        assert max(home.steps(), default=0) < 20 and local_steps(directory)[-1] == 20
        before = events(directory, "step")
        proxy.up()
        again = run(command, env=home.env(proxy))
        assert again.returncode == 0 and "step_00000020-0001 was missing" in again.stdout, (
            again.stdout + again.stderr
        )
    assert home.steps()[-1] == 20
    home.check_none_is_torn()
    assert events(directory, "step") == before and list(home.attempts()) == [1], (
        "something was computed again"
    )


@pytest.mark.slow
@pytest.mark.parametrize("program", ["launch", "train"])
def test_stopped_in_an_outage_it_keeps_the_checkpoint_and_says_where_it_lies(
    program: str, bucket: tuple[S3Server, str], tmp_path: Path, started: Start
) -> None:
    home, directory = Home(*bucket), tmp_path / "run"
    settings = (
        *SHORT,
        "train.epochs=100",
        "task.args.sleep_s=0.05",
        f"run.dir={directory}",
        f"run.remote={home.url}",
    )
    command = (
        alone(*settings)
        if program == "train"
        else harness("launch", "--nproc-per-node", "1", *settings)
    )
    with FaultProxy(home.server.host, home.server.port) as proxy:
        process = started(command, env=home.env(proxy))
        wait_until(lambda: events(directory, "uploaded") or process.poll() is not None, "an upload")
        proxy.down()
        process.send_signal(signal.SIGTERM)
        began = time.monotonic()
        code, text = ended(process)
        assert time.monotonic() - began < 3 + 25, "store.wait_s, and a moment for the last records"
    end = json.loads((directory / "attempts" / "0001.end.json").read_text())
    assert (end["why"], end["saved"]) == ("stopped", True) and not end.get("uploaded"), (
        "written before the upload was given up"
    )
    assert (
        "attempts/0001.end.json" not in home.keys()  # noqa: SIM118 - no dict
        and max(home.steps(), default=0) < end["step"]
    )
    assert end["step"] == end["saved_step"] == last_step(directory) == local_steps(directory)[-1]
    assert run(harness("verify", str(directory)), env=home.env()).returncode == 0
    assert str(directory) in text, text
    assert code == (74 if program == "train" else 75), (
        "a supervisor starts again what was stopped on request, and saved"
    )


@pytest.mark.slow
def test_waiting_for_an_upload_is_not_taken_for_a_save_that_hangs(
    bucket: tuple[S3Server, str], tmp_path: Path, started: Start
) -> None:
    home, directory = Home(*bucket), tmp_path / "run"
    patience = ("store.wait_s=10", "run.timeout_s=1")  # a save may take six seconds, an upload ten
    settings = (
        *SHORT,
        *patience,
        "train.epochs=100",
        "task.args.sleep_s=0.05",
        f"run.dir={directory}",
        f"run.remote={home.url}",
    )
    with FaultProxy(home.server.host, home.server.port) as proxy:
        process = started(alone(*settings), env=home.env(proxy))
        wait_until(lambda: events(directory, "uploaded") or process.poll() is not None, "an upload")
        proxy.down()
        process.send_signal(signal.SIGTERM)
        code, text = ended(process)
    assert events(directory, "hang") == [], text
    assert code == 74 and str(directory) in text, text
