"""A bucket that cannot be used at the start: waited for if that may help, said in words if not, and
never taken for an empty one."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import alone, wait_until
from fault_proxy import FaultProxy, Rule
from remote_runs import TASK, Home, Trained, ended, trained  # noqa: F401 - a fixture
from s3_server import S3Server, free_ports

Start = Callable[..., "subprocess.Popen[str]"]


def check_nothing_began(directory: Path, text: str) -> None:
    assert not directory.exists(), [str(path) for path in directory.rglob("*")]
    assert "begins at step 0" not in text and "epoch 1" not in text, text
    assert "Traceback" not in text and "harness: error" in text, text


@pytest.mark.slow
def test_unreachable_it_waits_as_long_as_it_was_told_and_exits_74(
    bucket: tuple[S3Server, str], tmp_path: Path, started: Start
) -> None:
    home = Home(*bucket)
    with FaultProxy(home.server.host, home.server.port) as ill:
        ill.rules.append(Rule("503"))
        urls = {
            "refused": f"http://127.0.0.1:{free_ports(1)[0]}",
            "unknown": "http://store.invalid:8333",
            "ill": ill.url,
        }
        processes = {}
        for name, url in urls.items():
            settings = (
                *TASK,
                "store.wait_s=10",
                f"run.dir={tmp_path / name}",
                f"run.remote={home.url}",
            )
            processes[name] = started(alone(*settings), env=home.env() | {"AWS_ENDPOINT_URL": url})
        began = time.monotonic()
        for name, process in processes.items():
            code, text = ended(process)
            assert code == 74, text
            check_nothing_began(tmp_path / name, text)
        assert time.monotonic() - began < 110
        assert len(ill.requests) > 3 and not any(
            request.method == "PUT" for request in ill.requests
        ), "it did not try again"
    assert home.keys() == []


@pytest.mark.slow
def test_unreachable_for_a_while_it_says_so_and_goes_on_where_the_run_stands(
    trained: Trained,  # noqa: F811
    tmp_path: Path,
    started: Start,
) -> None:
    home, log, directory = trained.home.branch(20), tmp_path / "log", tmp_path / "run"
    proxy = FaultProxy(home.server.host, home.server.port)
    with log.open("w") as output:
        settings = (
            *TASK,
            "train.max_steps=25",
            "store.wait_s=60",
            f"run.dir={directory}",
            f"run.remote={home.url}",
        )
        process = started(alone(*settings), env=home.env(proxy), output=output)
        wait_until(lambda: "does not answer since" in log.read_text(), "a warning", limit_s=60)
        assert not directory.exists()
        with proxy:
            assert process.wait(60) == 0, log.read_text()
    text = log.read_text()
    assert "answers again" in text and "resumes from step 20" in text, text
    assert home.steps()[-1] == 25 and home.attempts()[2]["from"]["step"] == 20


@pytest.mark.slow
def test_what_waiting_cannot_mend_exits_78_before_anything_begins(
    bucket: tuple[S3Server, str], tmp_path: Path, started: Start
) -> None:
    home = Home(*bucket)
    with (
        FaultProxy(home.server.host, home.server.port) as writing,
        FaultProxy(home.server.host, home.server.port) as listing,
    ):
        writing.rules.append(Rule("denied", "PUT"))
        listing.rules.append(Rule("denied", "GET", "list-type=2"))
        missing = Home(home.server, f"{home.bucket}-missing")
        cases = {
            "no such bucket": (missing, missing.env()),
            "SignatureDoesNotMatch": (home, home.env() | {"AWS_SECRET_ACCESS_KEY": "wrong" * 8}),
            "cannot create": (home, home.env(writing)),
            "cannot list": (home, home.env(listing)),
        }
        began, processes = time.monotonic(), {}
        for words, (where, env) in cases.items():
            directory = tmp_path / words.replace(" ", "_")
            processes[words] = (
                directory,
                started(alone(*TASK, f"run.dir={directory}", f"run.remote={where.url}"), env=env),
            )
        for words, (directory, process) in processes.items():
            code, text = ended(process)
            assert code == 78, text
            assert words in text and where_is(text), text
            assert not list(directory.glob("attempts/*")), "an attempt was claimed"
            assert "begins at step 0" not in text and "Traceback" not in text, text
    assert time.monotonic() - began < 110, "it was tried again and again"
    assert home.keys() == []


def where_is(text: str) -> bool:
    """Whether an error says what to do."""
    return any(words in text for words in ("Create the bucket", "Check AWS_", "Ask for the rights"))
