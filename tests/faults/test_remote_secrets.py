"""No credential ever reaches a log, an error, a record, a config or an object: not in good runs,
failed ones or denied ones."""

from __future__ import annotations

import secrets
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import alone, run, wait_until
from fault_proxy import FaultProxy, Rule
from remote_runs import TASK, Home, Trained, command, ended, trained  # noqa: F401 - fixtures
from s3_server import S3Server

Start = Callable[..., "subprocess.Popen[str]"]
Command = Callable[..., tuple[int, str]]


def check_absent(canaries: list[str], text: str, directory: Path | None, home: Home | None) -> None:
    """That none of these stands in what was printed, in any file of the directory, or in any object
    under the prefix or its name."""
    places = {"the output": text.encode()}
    if directory is not None:
        places |= {
            str(file): file.read_bytes() + str(file).encode()
            for file in directory.rglob("*")
            if file.is_file()
        }
    if home is not None:
        places |= {
            key: home.read(key) + key.encode()
            for key in home.keys()  # noqa: SIM118 - no dict
        }
    found = [
        where
        for where, content in places.items()
        for canary in canaries
        if canary.encode() in content
    ]
    assert found == []


def test_a_good_run_leaves_no_secret_anywhere(trained: Trained) -> None:  # noqa: F811
    server = trained.home.server
    check_absent(
        [server.secret_key, server.access_key], trained.output, trained.directory, trained.home
    )
    assert len(trained.home.keys()) > 20


@pytest.mark.slow
@pytest.mark.parametrize("case", ["failing task", "outage"])
def test_a_failed_run_leaves_no_secret_anywhere(
    case: str, bucket: tuple[S3Server, str], tmp_path: Path, started: Start
) -> None:
    home, directory = Home(*bucket), tmp_path / "run"
    more = (
        ("task.args.fail_at=8",)
        if case == "failing task"
        else ("task.args.sleep_s=0.1", "store.wait_s=8")
    )
    with FaultProxy(home.server.host, home.server.port) as proxy:
        process = started(
            alone(*TASK, *more, f"run.dir={directory}", f"run.remote={home.url}"),
            env=home.env(proxy),
        )
        if case == "outage":
            wait_until(lambda: home.steps(), "an upload")
            proxy.rules.append(Rule("500"))
        code, text = ended(process)
    assert code == (1 if case == "failing task" else 74), text
    check_absent([home.server.secret_key, home.server.access_key], text, directory, home)


@pytest.mark.slow
def test_a_denied_run_leaves_no_secret_anywhere(
    bucket: tuple[S3Server, str], tmp_path: Path, started: Start
) -> None:
    home = Home(*bucket)
    canaries = [secrets.token_hex(20) for _ in range(3)]
    cases = [
        {"AWS_SECRET_ACCESS_KEY": canaries[0]},
        {"AWS_ACCESS_KEY_ID": canaries[1]},
        {"AWS_SESSION_TOKEN": canaries[2], "AWS_SECRET_ACCESS_KEY": canaries[0]},
    ]
    processes = []
    for number, change in enumerate(cases):
        command = alone(  # noqa: F811
            *TASK, f"run.dir={tmp_path}/{number}", f"run.remote={home.url}", "store.wait_s=60"
        )
        processes.append(started(command, env=home.env() | change))
    for process in processes:
        code, text = ended(process)
        assert code == 78 and "harness: error" in text, text
        check_absent([*canaries, home.server.secret_key], text, tmp_path, None)
    assert home.keys() == []


@pytest.mark.parametrize(
    "url",
    [
        "s3://user:CANARY@bucket/x",
        "s3://CANARY@bucket/x",
        "s3://bucket/x?key=CANARY",
        "s3://bucket/x#CANARY",
    ],
)
def test_a_url_with_a_secret_in_it_is_refused_without_repeating_it(
    url: str,
    tmp_path: Path,
    command: Command,  # noqa: F811
) -> None:
    canary = secrets.token_hex(12)
    url = url.replace("CANARY", canary)
    directory = tmp_path / "run"
    lines = [
        ["launch", *TASK, f"run.dir={directory}", f"run.remote={url}"],
        *([name, url] for name in ("status", "ls", "show", "verify", "prune")),
        ["rollback", url, "5"],
        ["diff", url, url],
        ["import", url, str(directory)],
        ["show", f"{url}/checkpoints/step_00000005-0001.pt"],
    ]
    for line in lines:
        code, text = command({}, *line)
        assert code == (74 if line[0] == "status" else 78) and (
            "environment" in text or "not a place" in text
        ), (line, text)
        check_absent([canary], text, directory, None)
    code, text = command({}, "launch", *TASK, f"run.dir={url}")
    assert code == 78 and canary not in text
    assert not directory.exists()


@pytest.mark.slow
def test_a_secret_url_from_the_environment_or_a_file_is_refused_without_repeating_it(
    tmp_path: Path,
) -> None:
    canary = secrets.token_hex(12)
    (tmp_path / "own.yaml").write_text("run:\n  remote: s3://user:${oc.env:HIDDEN}@bucket/x\n")
    done = run(
        alone("--config", str(tmp_path / "own.yaml"), *TASK, f"run.dir={tmp_path}/run"),
        env={"HIDDEN": canary},
    )
    assert done.returncode == 78
    check_absent([canary], done.stdout + done.stderr, tmp_path, None)
