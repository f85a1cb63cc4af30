"""Whether a cloud is about to take this machine away, as its metadata service tells those who ask.

The service is asked by a thread of its own, which only tells what it heard: what follows is decided elsewhere, by all ranks
together. Nothing that the service does, or that another says in its place, costs more than the notice.

Sources: AWS "Spot Instance interruption notices" and "EC2 instance rebalance recommendations", Google "Preemptible VM instances",
Azure "Scheduled Events for Linux VMs".
"""

from __future__ import annotations

import http.client
import json
import threading
import time
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from harness.errors import UsageError

CLOUDS = ("aws", "gcp", "azure")
# Addresses that only this machine's own host answers on. They are no settings: whoever could set them could choose what is asked.
BASE_URLS = {"aws": "http://169.254.169.254", "gcp": "http://metadata.google.internal", "azure": "http://169.254.169.254"}

REQUEST_S = 1.0
MOST_BYTES = 1 << 16
LONGEST_TIME = 64  # characters of a point in time, which goes into our words
TOKEN_S = 6 * 3600  # the longest that AWS gives
AWS_ACTIONS = ("terminate", "stop", "hibernate")
AZURE_TYPES = ("Preempt", "Terminate")

# Only what is added here can happen: no proxy, no redirect, no scheme but http, and an answer of any status is an answer.
_opener = urllib.request.OpenerDirector()
_opener.add_handler(urllib.request.HTTPHandler())


@dataclass(frozen=True)
class Answer:
    """What the service said. The body of one that is too long is empty."""

    status: int
    flavor: str | None
    body: bytes

    def fields(self) -> dict[str, Any]:
        """The JSON object that was asked for; without content if it is not there or is something else."""
        try:
            found = json.loads(self.body) if self.status == 200 else None
        except (ValueError, RecursionError):
            return {}
        return found if isinstance(found, dict) else {}


def ask(cloud: str, base_url: str | None = None) -> str | None:
    """Look once: the words of a notice, or None. A service that is absent, slow or talks nonsense has given none."""
    return _look(cloud, _base_url(cloud, base_url), {})


def watch(
    cloud: str,
    on_notice: Callable[[str], object],
    *,
    base_url: str | None = None,
    every_s: float = 5.0,
    stop: threading.Event | None = None,
) -> threading.Thread:
    """Start a daemon thread that looks every `every_s` seconds and calls `on_notice(words)` once, when notice is given.

    It then ends, as it does once `stop` is set. `on_notice` runs in that thread: it may set a flag, but not call a collective.
    """
    base = _base_url(cloud, base_url)
    ended = stop or threading.Event()
    token: dict[str, str] = {}

    def poll() -> None:
        while not ended.is_set():
            words = _look(cloud, base, token)
            if words is not None and not ended.is_set():
                on_notice(words)
                return
            ended.wait(every_s)

    thread = threading.Thread(target=poll, name=f"notices of {cloud}", daemon=True)
    thread.start()
    return thread


def _base_url(cloud: str, given: str | None) -> str:
    if cloud not in CLOUDS:
        raise UsageError("there is no such cloud", f"found: {cloud}, expected: {', '.join(CLOUDS)}", "name one of them, or none")
    return given or BASE_URLS[cloud]


def _look(cloud: str, base: str, token: dict[str, str]) -> str | None:
    """`token` is AWS's, as a header, and is kept from look to look. The first request without an answer ends the look."""
    try:
        if cloud == "aws":
            return _aws(base, token)
        return _gcp(base) if cloud == "gcp" else _azure(base)
    except (OSError, http.client.HTTPException):
        return None


def _aws(base: str, token: dict[str, str]) -> str | None:
    for _ in range(2):  # the second time with a new token
        if not token:
            given = _request(f"{base}/latest/api/token", {"X-aws-ec2-metadata-token-ttl-seconds": str(TOKEN_S)}, "PUT")
            value = given.body.decode("latin-1")
            if given.status != 200 or not value or not (value.isascii() and value.isprintable()):
                return None
            token["X-aws-ec2-metadata-token"] = value
        action = _request(f"{base}/latest/meta-data/spot/instance-action", token)
        if (kind := action.fields().get("action")) in AWS_ACTIONS:
            return f"aws spot: {kind}{_at(action.fields().get('time'))}"
        advice = _request(f"{base}/latest/meta-data/events/recommendations/rebalance", token)
        if at := _at(advice.fields().get("noticeTime")):
            return f"aws spot: rebalance recommended{at}"
        if 401 not in (action.status, advice.status):
            return None
        token.clear()
    return None


def _gcp(base: str) -> str | None:
    answer = _request(f"{base}/computeMetadata/v1/instance/preempted", {"Metadata-Flavor": "Google"})
    is_google = answer.flavor == "Google"  # elsewhere the name may lead to anybody
    return "gcp spot: preempted" if is_google and answer.status == 200 and answer.body.strip() == b"TRUE" else None


def _azure(base: str) -> str | None:
    """An event of another machine of the same scale set is told here too, and taken for one of ours: likely it is in our job."""
    events = _request(f"{base}/metadata/scheduledevents?api-version=2020-07-01", {"Metadata": "true"}).fields().get("Events")
    for event in events if isinstance(events, list) else []:
        if isinstance(event, dict) and event.get("EventType") in AZURE_TYPES:
            return f"azure: {event['EventType']}{_at(event.get('NotBefore'))}"  # it is blank once the event has begun
    return None


def _at(when: object) -> str:
    """A point in time as the service wrote it; "" for anything that would not read as one."""
    return f" at {when}" if isinstance(when, str) and 0 < len(when) <= LONGEST_TIME and when.isprintable() else ""


def _request(url: str, headers: dict[str, str], method: str = "GET") -> Answer:
    until = time.monotonic() + REQUEST_S
    body = b""
    response: http.client.HTTPResponse
    with _opener.open(urllib.request.Request(url, headers=headers, method=method), timeout=REQUEST_S) as response:
        while len(body) <= MOST_BYTES and (block := response.read1(MOST_BYTES + 1 - len(body))):
            body += block
            if time.monotonic() > until:  # the time-out above is for each block, and blocks can be small
                raise TimeoutError(f"{url}: no end of the answer within {REQUEST_S} s")
    return Answer(response.status, response.headers.get("Metadata-Flavor"), body if len(body) <= MOST_BYTES else b"")
