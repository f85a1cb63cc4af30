"""Poll a cloud's metadata service for notices that this machine will be reclaimed.

A thread of its own queries the service and only reports the notice. All ranks decide together
elsewhere how to act on it. If the service misbehaves, or something else answers in its place, at
most the notice is lost or wrong.

Sources: AWS "Spot Instance interruption notices" and "EC2 instance rebalance recommendations",
Google "Preemptible VM instances", Azure "Scheduled Events for Linux VMs".
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
# Addresses that only the host of this machine answers. They are not settings, since whoever could
# set them could choose the target of the requests.
BASE_URLS = {
    "aws": "http://169.254.169.254",
    "gcp": "http://metadata.google.internal",
    "azure": "http://169.254.169.254",
}

ANSWER_S = 1.0  # time limit of a request
MOST_BYTES = 1 << 16  # limit of a response body
LONGEST_TIME = 64  # limit of a time stamp in characters, since it becomes part of a message
TOKEN_S = 6 * 3600  # the longest lifetime of a token that AWS allows
AWS_ACTIONS = ("terminate", "stop", "hibernate")
# Beginning of the text of a recommendation. It may come early, or without an end of the machine,
# and stays: a run that left each time would make one step per start.
ADVICE = "aws spot: rebalance recommended"
AZURE_TYPES = ("Preempt", "Terminate")

# Only the handlers added here are active: no proxy, no redirect and no scheme except http. A
# response of any status is returned instead of raising an error.
_opener = urllib.request.OpenerDirector()
_opener.add_handler(urllib.request.HTTPHandler())


@dataclass(frozen=True)
class Answer:
    """A response of the metadata service; the body is empty if it was too long."""

    status: int
    flavor: str | None
    body: bytes

    def fields(self) -> dict[str, Any]:
        """Return the JSON object of the body; {} if the status is not 200 or there is no object."""
        try:
            parsed = json.loads(self.body) if self.status == 200 else None
        except (ValueError, RecursionError):
            return {}
        return parsed if isinstance(parsed, dict) else {}


def ask(cloud: str, base_url: str | None = None) -> str | None:
    """Query the service once and return the text of a notice or a recommendation, or None.

    A service that is absent, slow or returns an invalid response has given no notice.

    Raises:
        UsageError: There is no such cloud.
    """
    return _look(cloud, _base_url(cloud, base_url), {})


def watch(
    cloud: str,
    on_notice: Callable[[str], object],
    on_advice: Callable[[], object] = lambda: None,
    *,
    base_url: str | None = None,
    every_s: float = 5.0,
    stop: threading.Event | None = None,
) -> threading.Thread:
    """Start a daemon thread that polls the service and reports the first notice.

    The thread ends after the first notice, or once `stop` is set.

    Args:
        cloud: "aws", "gcp" or "azure".
        on_notice: Callback for the text of the notice, called once. It runs in the polling thread,
            so it may set a flag but must not call a collective.
        on_advice: The same for a recommendation to leave the machine, which is no notice.
        base_url: Address of the service in place of the cloud's own.
        every_s: Seconds between two polls.
        stop: Event that ends the thread.

    Raises:
        UsageError: There is no such cloud.
    """
    base = _base_url(cloud, base_url)
    ended = stop or threading.Event()
    token: dict[str, str] = {}

    def poll() -> None:
        is_advised = False
        while not ended.is_set():
            notice = _look(cloud, base, token)
            if notice is not None and notice.startswith(ADVICE):
                if not is_advised:
                    on_advice()
                is_advised = True
            elif notice is not None and not ended.is_set():
                on_notice(notice)
                return
            ended.wait(every_s)

    thread = threading.Thread(target=poll, name=f"notices of {cloud}", daemon=True)
    thread.start()
    return thread


def _base_url(cloud: str, given: str | None) -> str:
    """Return the address of the service. Raises UsageError if there is no such cloud."""
    if cloud not in CLOUDS:
        raise UsageError(
            "there is no such cloud",
            f"found: {cloud}, expected: {', '.join(CLOUDS)}",
            "name one of them, or none",
        )
    return given or BASE_URLS[cloud]


def _look(cloud: str, base: str, token: dict[str, str]) -> str | None:
    """Query the service once and return the text of a notice, or None.

    The first request without a response ends the query.

    Args:
        cloud: Name of the cloud.
        base: Address of the service.
        token: The token of AWS as a request header, kept from query to query.
    """
    try:
        if cloud == "aws":
            return _aws(base, token)
        return _gcp(base) if cloud == "gcp" else _azure(base)
    except (OSError, http.client.HTTPException):
        return None


def _aws(base: str, token: dict[str, str]) -> str | None:
    """Query AWS for an interruption notice or a rebalance recommendation, with an IMDSv2 token."""
    for _ in range(2):  # the second pass uses a new token, after a status 401
        if not token:
            given = _request(
                f"{base}/latest/api/token",
                {"X-aws-ec2-metadata-token-ttl-seconds": str(TOKEN_S)},
                "PUT",
            )
            value = given.body.decode("latin-1")
            if given.status != 200 or not value or not (value.isascii() and value.isprintable()):
                return None
            token["X-aws-ec2-metadata-token"] = value
        action = _request(f"{base}/latest/meta-data/spot/instance-action", token)
        if (kind := action.fields().get("action")) in AWS_ACTIONS:
            return f"aws spot: {kind}{_at(action.fields().get('time'))}"
        advice = _request(f"{base}/latest/meta-data/events/recommendations/rebalance", token)
        if at := _at(advice.fields().get("noticeTime")):
            return f"{ADVICE}{at}"
        if 401 not in (action.status, advice.status):
            return None
        token.clear()
    return None


def _gcp(base: str) -> str | None:
    """Query Google for a preemption."""
    answer = _request(
        f"{base}/computeMetadata/v1/instance/preempted", {"Metadata-Flavor": "Google"}
    )
    # Outside Google Cloud the host name may resolve to any server.
    is_google = answer.flavor == "Google"
    return (
        "gcp spot: preempted"
        if is_google and answer.status == 200 and answer.body.strip() == b"TRUE"
        else None
    )


def _azure(base: str) -> str | None:
    """Query Azure for a scheduled preemption or termination.

    Azure also reports events of other machines of the same scale set. They count as events of this
    machine, since those machines probably belong to the same job.
    """
    events = (
        _request(f"{base}/metadata/scheduledevents?api-version=2020-07-01", {"Metadata": "true"})
        .fields()
        .get("Events")
    )
    for event in events if isinstance(events, list) else []:
        if isinstance(event, dict) and event.get("EventType") in AZURE_TYPES:
            # `NotBefore` is blank once the event has begun.
            return f"azure: {event['EventType']}{_at(event.get('NotBefore'))}"
    return None


def _at(when: object) -> str:
    """Return " at " and the time stamp of the service; "" if it is not a short printable text."""
    return (
        f" at {when}"
        if isinstance(when, str) and 0 < len(when) <= LONGEST_TIME and when.isprintable()
        else ""
    )


def _request(url: str, headers: dict[str, str], method: str = "GET") -> Answer:
    """Send one request and read the response. Raises OSError or HTTPException without one."""
    until = time.monotonic() + ANSWER_S
    body = b""
    response: http.client.HTTPResponse
    with _opener.open(
        urllib.request.Request(url, headers=headers, method=method), timeout=ANSWER_S
    ) as response:
        while len(body) <= MOST_BYTES and (block := response.read1(MOST_BYTES + 1 - len(body))):
            body += block
            # The time-out of `open` holds for each block, and blocks can be small.
            if time.monotonic() > until:
                raise TimeoutError(f"{url}: no end of the answer within {ANSWER_S} s")
    return Answer(
        response.status,
        response.headers.get("Metadata-Flavor"),
        body if len(body) <= MOST_BYTES else b"",
    )
