"""Three clouds' metadata services, spoken to over real sockets: what counts as a notice, and what a
bad service may not do."""

from __future__ import annotations

import contextlib
import itertools
import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from conftest import ENVIRONMENT

from harness.errors import UsageError
from harness.preemption import spot_notices
from harness.preemption.spot_notices import ANSWER_S, BASE_URLS, CLOUDS, MOST_BYTES, ask, watch

TOKEN = "/latest/api/token"
ACTION = "/latest/meta-data/spot/instance-action"
REBALANCE = "/latest/meta-data/events/recommendations/rebalance"
PREEMPTED = "/computeMetadata/v1/instance/preempted"
EVENTS = "/metadata/scheduledevents?api-version=2020-07-01"
ASKED = {"aws": ACTION, "gcp": PREEMPTED, "azure": EVENTS}
EVERY_S = 0.05
HANG_S = 20.0


def events(*found: object) -> str:
    return json.dumps({"DocumentIncarnation": 2, "Events": found})


def event(kind: str, **fields: str) -> dict[str, object]:
    return {
        "EventId": "A123",
        "EventType": kind,
        "ResourceType": "VirtualMachine",
        "Resources": ["vm_0"],
        "EventStatus": "Scheduled",
        **fields,
    }


# What each service says before there is a notice, and one notice with our words for it.
# No text: 404.
BEFORE = {ACTION: "", REBALANCE: "", PREEMPTED: "FALSE", EVENTS: events()}
NOTICE = {
    "aws": (
        json.dumps({"action": "terminate", "time": "2026-11-22T10:00:00Z"}),
        "aws spot: terminate at 2026-11-22T10:00:00Z",
    ),
    "gcp": ("TRUE", "gcp spot: preempted"),
    "azure": (
        events(event("Preempt", NotBefore="Mon, 19 Sep 2026 18:29:47 GMT")),
        "azure: Preempt at Mon, 19 Sep 2026 18:29:47 GMT",
    ),
}
AWS_NOTICE, AWS_WORDS = NOTICE["aws"]


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the service is well, what it says counts, and not how slow the machine is on which it
    runs beside the test."""
    monkeypatch.setattr(spot_notices, "ANSWER_S", 60.0)


@pytest.fixture
def impatience(patience: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in the program."""
    monkeypatch.setattr(spot_notices, "ANSWER_S", ANSWER_S)


@dataclass
class Service:
    """What one metadata service says, by path, what ails it, and what it was asked. It sees to
    headers as the real one does."""

    says: dict[str, str] = field(default_factory=BEFORE.copy)
    # Method, path, status; None: no answer.
    asked: list[tuple[str, str, int | None]] = field(default_factory=list)
    tokens: set[str] = field(default_factory=set)  # those that are valid now
    serial: Iterator[int] = field(default_factory=itertools.count)
    fault: Callable[[Handler], None] | None = None  # answers in its place
    fault_at: str = ""  # only for this path; all, if empty
    flavor: str | None = "Google"
    url: str = ""

    def count(self, method: str, path: str, status: int | None = 200) -> int:
        return self.asked.count((method, path, status))


class Handler(BaseHTTPRequestHandler):
    service: Service
    disable_nagle_algorithm = True  # or each answer waits 40 ms for its second part

    def do_PUT(self) -> None:
        if self.broken():
            return
        if (
            self.path != TOKEN
            or not 1 <= int(self.headers.get("X-aws-ec2-metadata-token-ttl-seconds", 0)) <= 21600
        ):
            return self.reply(400)
        token = f"AQAE{next(self.service.serial)}=="
        self.service.tokens.add(token)
        self.reply(200, token)

    def do_GET(self) -> None:
        if self.broken():
            return
        if (
            self.path.startswith("/latest/")
            and self.headers.get("X-aws-ec2-metadata-token") not in self.service.tokens
        ):
            return self.reply(401)
        if (
            self.path.startswith("/computeMetadata/")
            and self.headers.get("Metadata-Flavor") != "Google"
        ):
            return self.reply(403)
        if self.path.startswith("/metadata/") and self.headers.get("Metadata") != "true":
            return self.reply(400)
        text = self.service.says.get(self.path, "")
        self.reply(200 if text else 404, text)

    def broken(self) -> bool:
        if self.service.fault is None or self.service.fault_at not in ("", self.path):
            return False
        self.service.asked.append((self.command, self.path, None))
        with contextlib.suppress(OSError):  # it has stopped listening
            self.service.fault(self)
        return True

    def reply(self, status: int, text: str = "", **headers: str) -> None:
        self.service.asked.append((self.command, self.path, status))
        self.send_response(status)
        if self.path.startswith("/computeMetadata/") and self.service.flavor is not None:
            self.send_header("Metadata-Flavor", self.service.flavor)
        self.send_header("Content-Length", str(len(text.encode())))
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, format: str, *args: object) -> None:
        """Not on stderr: `asked` tells."""


class Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False  # a hanging answer is not waited for


@contextlib.contextmanager
def serving() -> Iterator[Service]:
    service = Service()
    server = Server(("127.0.0.1", 0), type("Own", (Handler,), {"service": service}))
    service.url = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(
        target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True
    ).start()
    try:
        yield service
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture
def service() -> Iterator[Service]:
    with serving() as one:
        yield one


@pytest.fixture
def other() -> Iterator[Service]:
    with serving() as one:
        yield one


@contextlib.contextmanager
def watching(cloud: str, service: Service) -> Iterator[tuple[threading.Thread, list[str]]]:
    heard, stop = list[str](), threading.Event()
    thread = watch(cloud, heard.append, base_url=service.url, every_s=EVERY_S, stop=stop)
    try:
        yield thread, heard
    finally:
        stop.set()
        thread.join(60)
        assert not thread.is_alive()


def eventually(happened: Callable[[], object], limit_s: float = 60.0) -> None:
    until = time.monotonic() + limit_s
    while not happened():
        assert time.monotonic() < until, "it never happened"
        time.sleep(0.01)


each_cloud = pytest.mark.parametrize("cloud", CLOUDS)


# --- what counts as a notice ---


@each_cloud
def test_a_notice_is_told_once_it_is_given(cloud, service):
    assert ask(cloud, service.url) is None
    service.says[ASKED[cloud]], words = NOTICE[cloud]
    assert ask(cloud, service.url) == words
    assert {status for _, _, status in service.asked} <= {200, 404}  # token and headers were right


@pytest.mark.parametrize("action", ["terminate", "stop", "hibernate"])
def test_aws_says_what_will_be_done_and_when(action, service):
    service.says[ACTION] = json.dumps({"action": action, "time": "2026-11-22T10:00:00Z"})
    assert ask("aws", service.url) == f"aws spot: {action} at 2026-11-22T10:00:00Z"


def test_a_rebalance_recommendation_is_a_notice_too(service):
    service.says[REBALANCE] = json.dumps({"noticeTime": "2026-11-22T09:50:00Z"})
    assert ask("aws", service.url) == "aws spot: rebalance recommended at 2026-11-22T09:50:00Z"
    service.says[ACTION] = AWS_NOTICE
    assert ask("aws", service.url) == AWS_WORDS  # the nearer one


def test_a_recommendation_is_no_notice_and_asks_once_for_a_save(service):
    """It may come long before an end of the machine, or without one, and stays."""
    service.says[REBALANCE] = json.dumps({"noticeTime": "soon"})
    heard, advised, stop = list[str](), list[int](), threading.Event()
    watch("aws", heard.append, lambda: advised.append(1), base_url=service.url, every_s=EVERY_S,
          stop=stop)  # fmt: skip
    eventually(lambda: service.count("GET", REBALANCE) >= 3)
    assert (heard, advised) == ([], [1])
    service.says[ACTION] = AWS_NOTICE
    eventually(lambda: heard == [AWS_WORDS])
    stop.set()


def test_an_interruption_is_told_even_if_the_recommendations_hang(service):
    service.says[ACTION] = AWS_NOTICE
    service.fault, service.fault_at = hang, REBALANCE
    assert ask("aws", service.url) == AWS_WORDS


@pytest.mark.parametrize(
    ("found", "words"),
    [
        ([event("Terminate", NotBefore="soon")], "azure: Terminate at soon"),
        ([event("Preempt", NotBefore="", EventStatus="Started")], "azure: Preempt"),
        (
            [event("Freeze"), 7, None, {}, event("Preempt", NotBefore="soon")],
            "azure: Preempt at soon",
        ),
        ([event("Freeze"), event("Reboot"), event("Redeploy")], None),
    ],
    ids=["terminate", "it has begun", "not the first", "maintenance"],
)
def test_azure_tells_of_maintenance_too_which_is_no_notice(found, words, service):
    service.says[EVENTS] = events(*found)
    assert ask("azure", service.url) == words


@pytest.mark.parametrize(
    "when", [None, 7, [], "", "x" * 65, "10:00\nharness: error: forged", "\x1b[2J"]
)
def test_a_time_that_is_none_does_not_get_into_the_words(when, service):
    service.says[ACTION] = json.dumps({"action": "stop", "time": when})
    assert ask("aws", service.url) == "aws spot: stop"
    service.says[ACTION], service.says[REBALANCE] = "", json.dumps({"noticeTime": when})
    assert ask("aws", service.url) is None


def test_an_answer_that_does_not_come_from_google_is_ignored(service):
    service.says[PREEMPTED] = "TRUE"
    for flavor in (None, "", "Other"):
        service.flavor = flavor
        assert ask("gcp", service.url) is None
    assert service.count("GET", PREEMPTED) == 3


def test_an_unknown_cloud_is_refused_before_anything_is_started():
    before = set(threading.enumerate())
    for start in (lambda: ask("ibm"), lambda: watch("ibm", print)):
        with pytest.raises(UsageError, match="found: ibm, expected: aws, gcp, azure"):
            start()
    assert set(threading.enumerate()) <= before


def test_what_is_asked_lies_on_this_machine_s_own_host():
    assert set(BASE_URLS) == set(CLOUDS)
    assert set(BASE_URLS.values()) == {"http://169.254.169.254", "http://metadata.google.internal"}


# --- tokens of AWS ---


def test_a_token_is_used_until_it_expires(service):
    with watching("aws", service) as (_, heard):
        eventually(lambda: service.count("GET", ACTION, 404) >= 3)
        assert service.count("PUT", TOKEN) == 1
        service.tokens.clear()
        eventually(lambda: service.count("PUT", TOKEN) == 2)
        service.says[ACTION] = AWS_NOTICE
        eventually(lambda: heard == [AWS_WORDS])
    assert service.count("PUT", TOKEN) == 2
    assert 1 <= service.count("GET", ACTION, 401) + service.count("GET", REBALANCE, 401) <= 2


@pytest.mark.parametrize("path", [ACTION, REBALANCE])
def test_a_token_that_expires_meanwhile_does_not_cost_the_look(path, service):
    def expire(handler: Handler) -> None:
        service.tokens.clear()
        service.fault = None
        handler.do_GET()

    service.says[REBALANCE] = json.dumps({"noticeTime": "soon"})
    service.fault, service.fault_at = expire, path
    assert ask("aws", service.url) == "aws spot: rebalance recommended at soon"
    assert (service.count("GET", path, 401), service.count("PUT", TOKEN)) == (1, 2)


def test_a_service_that_takes_no_token_is_not_asked_for_ever(service):
    service.fault, service.fault_at = lambda handler: handler.reply(401), ACTION
    assert ask("aws", service.url) is None
    assert service.count("PUT", TOKEN) == 2


@pytest.mark.parametrize(
    "token",
    ["", "a\r\nX-Forged: yes", "a\x00b", "é", "x" * (MOST_BYTES + 1)],
    ids=lambda token: repr(token[:9]),
)
def test_a_token_that_is_none_is_not_sent(token, service):
    service.fault, service.fault_at = lambda handler: handler.reply(200, token), TOKEN
    assert ask("aws", service.url) is None
    assert {path for _, path, _ in service.asked} == {TOKEN}


@pytest.mark.parametrize("status", [400, 403, 404, 500])
def test_what_comes_with_an_error_is_no_token(status, service):
    service.fault, service.fault_at = lambda handler: handler.reply(status, "AQAE"), TOKEN
    assert ask("aws", service.url) is None
    assert {path for _, path, _ in service.asked} == {TOKEN}


# --- services that ail ---


def hang(handler: Handler) -> None:
    time.sleep(HANG_S)


def dribble(handler: Handler) -> None:
    """Each byte is in time, and the answer never ends."""
    handler.send_response(200)
    handler.end_headers()
    until = time.monotonic() + HANG_S
    while time.monotonic() < until:
        handler.wfile.write(b" ")
        time.sleep(0.1)


def close(handler: Handler) -> None:
    handler.connection.shutdown(socket.SHUT_RDWR)


def no_http(handler: Handler) -> None:
    handler.wfile.write(b"SSH-2.0-OpenSSH_9.6\r\n")


def break_off(handler: Handler) -> None:
    handler.wfile.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n")


def many_headers(handler: Handler) -> None:
    handler.wfile.write(b"HTTP/1.1 200 OK\r\n" + b"X-Header: x\r\n" * 200 + b"\r\n")


@pytest.mark.parametrize(
    ("cloud", "fault"), [("aws", hang), ("gcp", hang), ("azure", hang), ("azure", dribble)]
)
def test_a_service_that_hangs_costs_no_more_than_its_time_out(cloud, fault, service, impatience):
    service.fault, service.fault_at = fault, ASKED[cloud]
    began = time.monotonic()
    assert ask(cloud, service.url) is None
    assert spot_notices.ANSWER_S < 2.5
    assert 0.9 < time.monotonic() - began < 15, "not as long as it hangs"


@pytest.mark.parametrize(
    "fault", [close, no_http, break_off, many_headers], ids=lambda fault: fault.__name__
)
@each_cloud
def test_a_service_that_breaks_off_gives_no_notice(cloud, fault, service):
    service.fault = fault
    assert ask(cloud, service.url) is None
    assert len(service.asked) >= 1


@each_cloud
def test_a_service_that_is_absent_gives_no_notice(cloud):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and nobody listens
        assert ask(cloud, f"http://127.0.0.1:{taken.getsockname()[1]}") is None


@pytest.mark.parametrize("status", [401, 403, 404, 410, 429, 500, 503])
@each_cloud
def test_an_error_is_no_notice_whatever_comes_with_it(cloud, status, service):
    service.fault, service.fault_at = (
        lambda handler: handler.reply(status, NOTICE[cloud][0]),
        ASKED[cloud],
    )
    assert ask(cloud, service.url) is None
    assert service.count("GET", ASKED[cloud], status) >= 1


@pytest.mark.parametrize(
    "text",
    [
        *(
            "{",
            "[]",
            "7",
            "null",
            '"terminate"',
            '{"action": 7}',
            '{"action": ["terminate"]}',
            '{"action": "noop"}',
            '{"Events": 7}',
        ),
        *(
            '{"Events": "Preempt"}',
            '{"Events": [{"EventType": ["Preempt"]}]}',
            "<html>TRUE</html>",
            "True",
            "\xff\xfe",
            "[" * 60_000,
        ),
        *(
            "9" * 60_000,
            '{"action": "terminate", "time": "2026',
            '{"time": "2026-11-22T10:00:00Z"}',
        ),
    ],
    ids=lambda text: text[:24],
)
@each_cloud
def test_a_malformed_answer_is_ignored(cloud, text, service):
    service.says[ASKED[cloud]] = text
    assert ask(cloud, service.url) is None
    assert service.count("GET", ASKED[cloud]) == 1


def test_a_malformed_interruption_does_not_hide_a_recommendation(service):
    service.says |= {ACTION: "{", REBALANCE: json.dumps({"noticeTime": "soon"})}
    assert ask("aws", service.url) == "aws spot: rebalance recommended at soon"


@each_cloud
def test_an_answer_that_is_too_long_is_ignored_though_it_begins_well(cloud, service):
    text, words = NOTICE[cloud]
    service.says[ASKED[cloud]] = text.ljust(MOST_BYTES)
    assert ask(cloud, service.url) == words
    service.says[ASKED[cloud]] = text.ljust(MOST_BYTES + 1)
    assert ask(cloud, service.url) is None


@each_cloud
def test_an_answer_without_end_is_not_read_to_the_end(cloud, service):
    sent = [0]

    def flood(handler: Handler) -> None:
        handler.send_response(200)
        handler.send_header("Metadata-Flavor", "Google")
        handler.end_headers()
        while sent[0] < 1 << 30:
            sent[0] += handler.wfile.write(b" " * (1 << 20))

    service.fault, service.fault_at = flood, ASKED[cloud]
    began = time.monotonic()
    assert ask(cloud, service.url) is None
    assert time.monotonic() - began < 30
    assert sent[0] < 1 << 25  # what the buffers of the connection hold


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
@each_cloud
def test_a_redirect_is_not_followed(cloud, status, service, other):
    for path in ASKED.values():
        other.says[path] = NOTICE[cloud][0]
    service.fault = lambda handler: handler.reply(
        status, NOTICE[cloud][0], Location=other.url + handler.path
    )
    assert ask(cloud, service.url) is None
    service.fault_at = ASKED[cloud]  # with AWS's token, which must not get out
    assert ask(cloud, service.url) is None
    assert service.count("GET", ASKED[cloud], status) >= 1
    assert other.asked == []


@each_cloud
def test_a_proxy_in_the_environment_is_not_used(cloud, service, other):
    """In a process of its own, which finds it there when it begins."""
    proxies = dict.fromkeys(("http_proxy", "HTTP_PROXY", "all_proxy"), other.url) | {
        "no_proxy": "",
        "NO_PROXY": "",
    }
    imports = "import sys, harness.preemption.spot_notices as n, urllib.request as u"
    code = f"{imports}; n.ANSWER_S = 60; print(u.getproxies()['http'], n.ask(*sys.argv[1:]))"
    service.says[ASKED[cloud]], words = NOTICE[cloud]
    done = subprocess.run(
        [sys.executable, "-c", code, cloud, service.url],
        env=ENVIRONMENT | proxies,
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert (done.stdout, done.stderr) == (f"{other.url} {words}\n", "")
    assert other.asked == []


# --- watching ---


@each_cloud
def test_who_watches_is_told_once_and_the_thread_ends(cloud, service):
    with watching(cloud, service) as (thread, heard):
        assert thread.daemon
        eventually(lambda: len(service.asked) >= 4)
        assert (heard, thread.is_alive()) == ([], True)
        service.says[ASKED[cloud]], words = NOTICE[cloud]
        thread.join(60)
        assert (heard, thread.is_alive()) == ([words], False)
    asked = len(service.asked)
    time.sleep(4 * EVERY_S)
    assert (heard, len(service.asked)) == ([words], asked)


@each_cloud
def test_watching_goes_on_after_a_bad_service(cloud, service, impatience):
    service.fault = hang
    with watching(cloud, service) as (thread, heard):
        eventually(lambda: service.asked)
        for fault in (close, no_http, break_off, lambda handler: handler.reply(500, "{")):
            asked, service.fault = len(service.asked), fault

            def is_asked_again(asked: int = asked) -> bool:
                return len(service.asked) > asked

            eventually(is_asked_again)
        assert (heard, thread.is_alive()) == ([], True)
        service.says[ASKED[cloud]], words = NOTICE[cloud]
        service.fault = None
        thread.join(60)
        assert (heard, thread.is_alive()) == ([words], False)


def test_watching_ends_when_it_is_stopped_and_tells_nothing_more(service):
    heard, stop = list[str](), threading.Event()
    reached, go_on = threading.Event(), threading.Event()

    def wait(handler: Handler) -> None:
        reached.set()
        go_on.wait(60)
        handler.reply(200, "TRUE")

    service.fault = wait
    thread = watch("gcp", heard.append, base_url=service.url, every_s=60, stop=stop)
    assert reached.wait(60)
    stop.set()  # while it looks
    go_on.set()
    thread.join(60)
    assert (heard, thread.is_alive()) == ([], False)

    service.fault, stop = None, threading.Event()
    thread = watch("gcp", heard.append, base_url=service.url, every_s=60, stop=stop)
    eventually(lambda: service.count("GET", PREEMPTED) >= 2)
    stop.set()  # while it waits
    thread.join(30)
    assert (heard, thread.is_alive()) == ([], False)
