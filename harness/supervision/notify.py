"""Notify the user when a run is resumed, stopped, crashed, failed or finished.

A notification runs a command of the user or posts to a webhook. The supervisor sends it in its own
process, while no training runs. It has a time limit, and its result has no effect on the run.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Callable
from typing import Any

from harness.config.schema_services import NotifySettings
from harness.errors import printable
from harness.preemption import children
from harness.store import redacted
from harness.text import say


def notify(settings: NotifySettings, kind: str, run: str, text: str, **details: Any) -> None:
    """Send a notification, if the settings name this kind of event. Raises nothing.

    Args:
        settings: Notification settings of the run.
        kind: Kind of the event: "resumed", "stopped", "crashed", "failed" or "finished".
        run: Path or URL of the run.
        text: Description of the event.
        details: Additional fields of the JSON message.
    """
    if kind not in settings.on:
        return
    word = {
        "event": kind,
        "run": printable(run),
        "text": printable(f"{run}: {kind}: {text}"),
    } | details
    if settings.command:
        _within(
            settings.timeout_s,
            "the command",
            lambda: _command(settings.command, word, settings.timeout_s),
        )
    if settings.webhook_env is not None:
        url = os.environ.get(settings.webhook_env, "")
        _within(settings.timeout_s, "the webhook", lambda: _post(url, word, settings.timeout_s))


def _command(command: list[str], word: dict[str, Any], limit_s: float) -> str:
    """Run a command with the message as JSON on its standard input.

    Its process group is killed when it ends, or at the time limit, so no process of the group
    outlives it.

    Args:
        command: Program and arguments.
        word: Fields of the message.
        limit_s: Time limit in seconds.

    Returns:
        The problem, in words that follow a subject, or "".
    """
    env = os.environ | {"HARNESS_EVENT": str(word["event"]), "HARNESS_TEXT": str(word["text"])}
    with subprocess.Popen(
        command,
        env=env,
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    ) as process:
        try:
            process.communicate(json.dumps(word), timeout=limit_s)
        except subprocess.TimeoutExpired:
            return f"took longer than {limit_s:g} s"
        finally:
            children.kill_group(process.pid)
    return f"ended with {process.returncode}" if process.returncode else ""


def _post(url: str, word: dict[str, Any], limit_s: float) -> str:
    """POST the message as JSON to a URL; chat services show its field `text`.

    Returns the problem, in words that follow a subject, or "".
    """
    if not url.startswith(("http://", "https://")):
        return "has no URL: the variable that notify.webhook_env names is empty, or holds none"
    request = urllib.request.Request(
        url, json.dumps(word).encode(), {"Content-Type": "application/json"}, method="POST"
    )
    with urllib.request.urlopen(request, timeout=limit_s) as reply:
        return "" if reply.status < 400 else f"answered {reply.status}"


def _within(limit_s: float, channel: str, work: Callable[[], str]) -> None:
    """Run `work` in a thread and print a warning if it fails or exceeds its limit.

    The thread is abandoned after the limit plus one second, because a name server that hangs cannot
    be interrupted.

    Args:
        limit_s: Time limit in seconds.
        channel: The command or the webhook, as the warning names it.
        work: Function that returns the problem, or "".
    """
    problem = [f"took longer than {limit_s:g} s"]

    def run() -> None:
        try:
            problem[0] = work()
        except Exception as error:  # noqa: BLE001 - no error here may affect a run
            problem[0] = f"{type(error).__name__}: {error}"

    thread = threading.Thread(target=run, daemon=True, name="notify")
    thread.start()
    thread.join(limit_s + 1)
    if problem[0]:
        say(
            f"harness: warning: {channel} that should tell of this {redacted(problem[0])}",
            sys.stderr,
        )
