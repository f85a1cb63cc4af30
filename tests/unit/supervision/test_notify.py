"""Those outside are told what happens to a run, and cannot hurt it."""

from __future__ import annotations

import http.server
import json
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from conftest import harness, outliving, run

from harness import config
from harness.config.schema_services import NotifySettings
from harness.errors import UsageError
from harness.supervision.notify import notify

KEEP = (
    "import sys, os\n"
    "open(sys.argv[1], 'a').write(os.environ['HARNESS_EVENT'] + ' ' + sys.stdin.read() + '\\n')\n"
)
FAST = (
    "task.name=small_task:build",
    "train.epochs=2",
    "checkpoint.every_steps=3",
    "checkpoint.best=val_loss:min",
)


class Hook:
    """A web server that keeps what is posted, and answers as told."""

    def __init__(self) -> None:
        self.words: list[dict] = []
        self.status, self.pause_s = 200, 0.0
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                outer.words.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
                time.sleep(outer.pause_s)
                self.send_response(outer.status)
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/services/T0/secret"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture
def hook() -> Iterator[Hook]:
    hook = Hook()
    yield hook
    hook.server.shutdown()
    hook.server.server_close()


@pytest.mark.slow
def test_a_run_that_crashes_once_is_told_of_from_end_to_end(tmp_path: Path, hook: Hook) -> None:
    (tmp_path / "my_task.py").write_text(
        "import dataclasses, os, small_task\n"
        "from pathlib import Path\n\n"
        "def build():\n"
        "    first = not Path('crashed').exists()\n"
        "    Path('crashed').touch()\n"
        "    return small_task.build(fail_at=5 if first else -1)\n"
    )
    (tmp_path / "keep.py").write_text(KEEP)
    notices = (
        f"notify.command=[{sys.executable}, {tmp_path}/keep.py, {tmp_path}/words]",
        "notify.webhook_env=MY_HOOK",
        "notify.on=[resumed,crashed,stopped,failed,finished]",
    )
    settings = ("task.name=my_task:build", *FAST[1:], "run.dir=runs/a", *notices)
    done = run(harness("launch", *settings), cwd=tmp_path, env={"MY_HOOK": hook.url})
    assert done.returncode == 0, done.stdout + done.stderr
    assert [word["event"] for word in hook.words] == ["crashed", "resumed", "finished"]
    crashed, resumed, finished = hook.words
    assert "the task fails in forward pass 5" in crashed["text"] and resumed["text"].endswith(
        "runs/a: resumed: resumes from step 3"
    )
    assert finished["step"] == 10 and finished["launch"].startswith("launch-")
    kept = [line.partition(" ") for line in (tmp_path / "words").read_text().splitlines()]
    assert [(kind, json.loads(word)) for kind, _, word in kept] == [
        (word["event"], word) for word in hook.words
    ]
    everything = b"".join(
        file.read_bytes() for file in (tmp_path / "runs").rglob("*") if file.is_file()
    )
    assert b"secret" not in everything and "secret" not in done.stdout + done.stderr


def told(capfd: pytest.CaptureFixture[str], **settings: object) -> tuple[str, float]:
    """What is said when something is told, and how long that takes."""
    began = time.monotonic()
    notify(
        NotifySettings(**({"timeout_s": 1.0} | settings)),  # type: ignore[arg-type]
        "failed",
        "runs/a",
        "its disk is full",
        step=7,
    )
    return capfd.readouterr().err, time.monotonic() - began


def test_a_command_that_hangs_is_ended_with_all_that_it_has_started(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    script = f"sleep 61.5 & echo $! > {tmp_path}/child; sleep 61.5"
    words, took_s = told(capfd, command=["sh", "-c", script])
    assert took_s < 30 and "took longer than 1 s" in words
    child = int((tmp_path / "child").read_text())
    assert not psutil.pid_exists(child) or outliving([psutil.Process(child)]) == []


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (["false"], "ended with 1"),
        (["/no/such/program"], "FileNotFoundError"),
        (["sh", "-c", "exec 0<&-; exit 3"], "ended with 3"),
    ],
)
def test_a_command_that_fails_is_said_and_no_more(
    command: list[str], words: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert words in told(capfd, command=command)[0]


def test_a_webhook_that_refuses_hangs_or_is_not_there_is_said_and_no_more(
    hook: Hook, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MY_HOOK", hook.url)
    assert (
        told(capfd, webhook_env="MY_HOOK")[0] == ""
        and hook.words[-1]["text"] == "runs/a: failed: its disk is full"
    )
    hook.status = 500
    words, _ = told(capfd, webhook_env="MY_HOOK")
    assert "500" in words and "secret" not in words
    hook.status, hook.pause_s = 200, 60.0
    words, took_s = told(capfd, webhook_env="MY_HOOK")
    assert took_s < 30 and "time" in words
    monkeypatch.setenv("MY_HOOK", "http://127.0.0.1:9/secret")
    words, _ = told(capfd, webhook_env="MY_HOOK")
    assert "refused" in words and "secret" not in words
    monkeypatch.setenv("MY_HOOK", "file:///etc/passwd")
    assert "has no URL" in told(capfd, webhook_env="MY_HOOK")[0]
    monkeypatch.delenv("MY_HOOK")
    assert "has no URL" in told(capfd, webhook_env="MY_HOOK")[0]


def test_what_was_not_asked_for_is_not_told(
    hook: Hook, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MY_HOOK", hook.url)
    assert told(capfd, webhook_env="MY_HOOK", on=["finished"])[0] == "" and hook.words == []


@pytest.mark.parametrize(
    "setting",
    ["notify.on=[preempted]", "notify.webhook_env=https://hooks/secret", "notify.timeout_s=0"],
)
def test_a_wrong_notice_is_refused_before_anything_starts(setting: str) -> None:
    with pytest.raises(UsageError, match=r"1 problem\(s\)"):
        config.load(None, [setting])
