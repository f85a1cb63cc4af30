"""A word to somebody outside when a run is resumed, stopped, crashed, failed or finished: a command of the user's, or a webhook.

It is sent by the supervisor, in its own process, when nothing trains; it has a time limit, and what becomes of it changes nothing.
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

from harness import preemption
from harness.config.schema import NotifySettings
from harness.errors import printable
from harness.store import redacted
from harness.text import say


def notify(settings: NotifySettings, kind: str, run: str, text: str, **details: Any) -> None:
    """Tell of an event, if it was asked for. Raises nothing."""
    if kind not in settings.on:
        return
    word = {"event": kind, "run": printable(run), "text": printable(f"{run}: {kind}: {text}")} | details
    if settings.command:
        _within(settings.timeout_s, "the command", lambda: _command(settings.command, word, settings.timeout_s))
    if settings.webhook_env is not None:
        url = os.environ.get(settings.webhook_env, "")
        _within(settings.timeout_s, "the webhook", lambda: _post(url, word, settings.timeout_s))


def _command(command: list[str], word: dict[str, Any], limit_s: float) -> str:
    """Run it, with the word as JSON on its standard input; it and all it has started are gone after the limit."""
    env = os.environ | {"HARNESS_EVENT": str(word["event"]), "HARNESS_TEXT": str(word["text"])}
    with subprocess.Popen(
        command, env=env, text=True, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    ) as process:
        try:
            process.communicate(json.dumps(word), timeout=limit_s)
        except subprocess.TimeoutExpired:
            return f"took longer than {limit_s:g} s"
        finally:
            preemption.kill_group(process.pid)
    return f"ended with {process.returncode}" if process.returncode else ""


def _post(url: str, word: dict[str, Any], limit_s: float) -> str:
    """POST the word as JSON; chat services show its `text`."""
    if not url.startswith(("http://", "https://")):
        return "has no URL: the variable that notify.webhook_env names is empty, or holds none"
    request = urllib.request.Request(url, json.dumps(word).encode(), {"Content-Type": "application/json"}, method="POST")
    with urllib.request.urlopen(request, timeout=limit_s) as reply:
        return "" if reply.status < 400 else f"answered {reply.status}"


def _within(limit_s: float, what: str, work: Callable[[], str]) -> None:
    """Say what came of it, if it was no success; a name server that hangs is not waited for."""
    problem = [f"took longer than {limit_s:g} s"]

    def run() -> None:
        try:
            problem[0] = work()
        except Exception as error:  # noqa: BLE001 - whatever it is, no run depends on it
            problem[0] = f"{type(error).__name__}: {error}"

    thread = threading.Thread(target=run, daemon=True, name="notify")
    thread.start()
    thread.join(limit_s + 1)
    if problem[0]:
        say(f"harness: warning: {what} that should tell of this {redacted(problem[0])}", sys.stderr)
