"""A proxy between an S3 client and its server that does what networks and services do on bad days,
by rule or by a seeded storm.

Requests go on as they came, byte for byte and with the client's own Host, so that signatures hold.
Only `Expect: 100-continue` is answered here. Every request gets a connection of its own to the
server, so that a server that is restarted is simply found again.
"""

from __future__ import annotations

import contextlib
import email.utils
import random
import socket
import struct
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import IO, Any, cast

from s3_server import free_ports

BLOCK = 1 << 18
NO_CONTENT_STATUS = (204, 304)

# Answers given in the server's name: status, code and message. The server never sees the request.
ERRORS = {
    "500": (500, "InternalError", "We encountered an internal error. Please try again."),
    "503": (503, "SlowDown", "Please reduce your request rate."),
    "429": (429, "TooManyRequests", "Please reduce your request rate."),
    "409": (
        409,
        "ConditionalRequestConflict",
        "The conditional request cannot succeed due to a conflicting operation.",
    ),
    "expired": (400, "ExpiredToken", "The provided token has expired."),
    "denied": (403, "AccessDenied", "Access Denied."),
    "skewed": (
        403,
        "RequestTimeTooSkewed",
        "The difference between the request time and the server's time is too large.",
    ),
    "200_error": (200, "InternalError", "We encountered an internal error. Please try again."),
}
FAULTS = (
    *ERRORS,
    "reset_before",  # RST before anything is forwarded
    # the server does it, and the client hears nothing but the end of the connection
    "drop_response",
    "reset_body",  # half of what is read, then RST
    "truncate",  # half of what is read, then an orderly end
    "flip_get",  # one bit of an object that is read
    # one bit of what is written, before it reaches the server; the client's checksums stay as they
    # are
    "flip_put",
    "delay",  # so many seconds (the argument), then as if nothing had been
    "stall",  # no answer at all, until release_stalled() or the end
)


# not an error, but the way out of a request whose client is to hear nothing more
class _Dropped(Exception):  # noqa: N818
    """The client's connection is to be reset."""


@dataclass
class Request:
    """One request, as the proxy saw it. `status` is what the client was sent, None while or if
    there was no answer."""

    method: str
    path: str
    query: str
    headers: dict[str, str]  # names in lower case
    # what was chosen; one that needs content does nothing to an answer without
    fault: str | None = None
    status: int | None = None
    forwarded: bool = False  # whether the server has all of it

    @property
    def target(self) -> str:
        return f"{self.path}?{self.query}" if self.query else self.path

    def matches(self, method: str | None, contains: str | None) -> bool:
        return method in (None, self.method) and (contains is None or contains in self.target)

    def can_have(self, fault: str) -> bool:
        """Some faults make sense for some requests only."""
        of_object = self.path.strip("/").count("/") > 0
        if fault in ("reset_body", "truncate"):
            return self.method == "GET"
        if fault == "flip_get":  # listings are not what is protected by anybody's digests
            return self.method == "GET" and of_object
        if fault == "flip_put":
            return self.method == "PUT" and of_object and self.headers.get("content-length") != "0"
        if fault == "200_error":
            return self.method == "POST" and "uploadId=" in self.query
        return True


@dataclass
class Rule:
    """A fault for those requests that match and can have it: not for the first `after` of them, and
    then for `first` ones, or all."""

    fault: str
    method: str | None = None
    contains: str | None = None  # a part of the path and query, as sent (percent-encoded)
    first: int | None = None
    after: int = 0
    # delay: seconds; flip_get, flip_put: the byte's position, else the middle one
    argument: float | None = None
    seen: int = 0

    def __post_init__(self) -> None:
        assert self.fault in FAULTS, f"no such fault: {self.fault}"

    def takes(self, request: Request) -> bool:
        if not (request.matches(self.method, self.contains) and request.can_have(self.fault)):
            return False
        self.seen += 1
        return self.seen > self.after and (
            self.first is None or self.seen <= self.after + self.first
        )


@dataclass
class Storm:
    """Random faults. Two draws for every request, whatever comes of them, so that one request's
    fate does not move the others'."""

    seed: int
    rate: float
    faults: tuple[str, ...]
    method: str | None = None
    contains: str | None = None
    longest_delay_s: float = 0.3

    def __post_init__(self) -> None:
        assert set(self.faults) <= set(FAULTS), f"no such fault: {set(self.faults) - set(FAULTS)}"
        self.random = random.Random(self.seed)

    def draw(self, request: Request) -> Rule | None:
        strikes, which = self.random.random() < self.rate, self.random.random()
        if not strikes or not request.matches(self.method, self.contains):
            return None
        possible = [fault for fault in self.faults if request.can_have(fault)]
        if not possible:
            return None
        fault = possible[int(which * len(possible))]
        return Rule(fault, argument=which * self.longest_delay_s if fault == "delay" else None)


@dataclass
class Hold:
    """Requests that wait at one point; all of the upload is here by then, so the client may be gone
    when they go on."""

    method: str | None
    contains: str | None
    count: int | None
    after: bool
    skip: int
    reached: threading.Event = field(default_factory=threading.Event)
    request: Request | None = None  # the one that came first
    _go: threading.Event = field(default_factory=threading.Event)
    _forward: bool = True
    _seen: int = 0

    def release(self, forward: bool = True) -> None:
        """Let them go on, or (forward=False) drop them there: not forwarded, or done but not
        answered. Later ones pass freely."""
        self._forward = forward
        self._go.set()

    def takes(self, request: Request) -> bool:
        if self._go.is_set() or not request.matches(self.method, self.contains):
            return False
        self._seen += 1
        return self._seen > self.skip and (
            self.count is None or self._seen <= self.skip + self.count
        )

    def wait(self, request: Request) -> None:
        self.request = self.request or request
        self.reached.set()
        self._go.wait()
        if not self._forward:
            raise _Dropped


class _Message:
    """The head of a request or of a response, and how its body is framed."""

    def __init__(self, stream: IO[bytes]) -> None:
        self.lines: list[bytes] = []
        while (line := stream.readline(1 << 16)) not in (b"\r\n", b"\n"):
            if not line.endswith(b"\n"):
                raise ConnectionError("the connection ended within a head")
            self.lines.append(line)
        if not self.lines:
            raise ConnectionError("no head")
        pairs = [line.decode("latin-1").partition(":") for line in self.lines[1:]]
        self.headers = {name.strip().lower(): value.strip() for name, _, value in pairs}
        self.start = self.lines[0].decode("latin-1").split(" ", 2)

    @property
    def chunked(self) -> bool:
        return "chunked" in self.headers.get("transfer-encoding", "").lower()

    def closes(self) -> bool:
        return self.headers.get("connection", "").lower() == "close"

    def encoded(self, without: str = "", length: int | None = None) -> bytes:
        """The head again, as it came, but for one header and a new framing (length: the whole body,
        of so many bytes)."""
        drop = {without} | (
            {"transfer-encoding", "content-length"} if length is not None else set()
        )
        kept = [
            line
            for line in self.lines[1:]
            if line.decode("latin-1").partition(":")[0].strip().lower() not in drop
        ]
        framing = [f"Content-Length: {length}\r\n".encode()] if length is not None else []
        return b"".join([self.lines[0], *kept, *framing, b"\r\n"])

    def body(self, stream: IO[bytes], until_end: bool = False) -> Iterator[bytes]:
        """The body's bytes as they are on the wire, chunk headers and all."""
        if self.chunked:
            yield from _chunks(stream)
        elif "content-length" in self.headers:
            yield from _exactly(stream, int(self.headers["content-length"]))
        elif until_end:
            while block := stream.read1(BLOCK):  # type: ignore[attr-defined]
                yield block


def _exactly(stream: IO[bytes], left: int) -> Iterator[bytes]:
    while left:
        block = stream.read1(min(left, BLOCK))  # type: ignore[attr-defined]
        if not block:
            raise ConnectionError("the connection ended within a body")
        left -= len(block)
        yield block


def _chunks(stream: IO[bytes]) -> Iterator[bytes]:
    while True:
        yield (line := stream.readline(1 << 16))
        if not line.endswith(b"\n"):
            raise ConnectionError("the connection ended within a body")
        size = int(line.split(b";")[0], 16)
        if not size:
            break
        yield from _exactly(stream, size + 2)
    while True:  # trailers, and the empty line
        yield (line := stream.readline(1 << 16))
        if line in (b"\r\n", b"\n", b""):
            return


def _unchunked(raw: bytes) -> bytes:
    """What is within the chunks."""
    parts: list[bytes] = []
    at = 0
    while True:
        end = raw.index(b"\n", at) + 1
        size = int(raw[at:end].split(b";")[0], 16)
        if not size:
            return b"".join(parts)
        parts.append(raw[end : end + size])
        at = end + size + 2


def _flipped(data: bytes, at: int) -> bytes:
    changed = bytearray(data)
    if changed:
        changed[min(at, len(changed) - 1)] ^= 1
    return bytes(changed)


def _flipped_upload(head: _Message, raw: bytes, argument: float | None) -> bytes:
    """One bit of an upload's content, and not of the signatures or sizes around it."""
    data = _unchunked(raw) if head.chunked else raw
    start, size = 0, len(data)
    streamed = head.headers.get("x-amz-content-sha256", "").startswith("STREAMING")
    if data and (streamed or "aws-chunked" in head.headers.get("content-encoding", "")):
        start = data.index(b"\n") + 1
        size = int(data[:start].split(b";")[0], 16)
    data = _flipped(data, start + (size // 2 if argument is None else int(argument)))
    return b"%x\r\n%s\r\n0\r\n\r\n" % (len(data), data) if head.chunked else data


def _abort(connection: socket.socket) -> None:
    """RST instead of an orderly end, once it is closed."""
    with contextlib.suppress(OSError):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


class FaultProxy:
    """The proxy, on a port of its own from __enter__ (or start) to __exit__ (or stop). See Rule,
    Storm and Hold for what it can do."""

    def __init__(self, upstream_host: str, upstream_port: int) -> None:
        self.upstream = (upstream_host, upstream_port)
        self.port = free_ports(1)[0]
        self.rules: list[Rule] = []
        self._requests: list[Request] = []
        self._storm: Storm | None = None
        self._holds: list[Hold] = []
        self._lock = threading.Lock()
        self._listener: socket.socket | None = None
        self._acceptor: threading.Thread | None = None
        self._open: set[socket.socket] = set()
        self._threads: set[threading.Thread] = set()
        self._stalled = threading.Event()
        self._stopped = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def requests(self) -> list[Request]:
        """All so far, in the order in which they came."""
        with self._lock:
            return list(self._requests)

    def clear(self) -> None:
        """Forget the requests and the rules; the storm ends."""
        with self._lock:
            self._requests.clear()
            self.rules.clear()
            self._storm = None

    def __enter__(self) -> FaultProxy:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> FaultProxy:
        self.up()
        return self

    def stop(self) -> None:
        """Everything that is held, stalled or on its way is dropped."""
        self._stopped.set()
        self.release_stalled()
        with self._lock:
            for hold in self._holds:
                hold.release(forward=False)
        self.down()
        with self._lock:
            threads = list(self._threads)
        for thread in threads:
            thread.join(5)

    def up(self) -> None:
        """Listen, on the same port as ever."""
        assert self._listener is None, "already up"
        self._listener = socket.create_server(("127.0.0.1", self.port), backlog=256)
        self._acceptor = threading.Thread(target=self._accept, args=(self._listener,), daemon=True)
        self._acceptor.start()

    def down(self) -> None:
        """Refuse connections, and reset those that there are, until up()."""
        listener, self._listener = self._listener, None
        if listener is not None and self._acceptor is not None:
            listener.shutdown(socket.SHUT_RDWR)  # wakes accept(), which close() does not
            self._acceptor.join()
            listener.close()
        with self._lock:
            for connection in self._open:
                _abort(connection)
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)

    def storm(self, seed: int, rate: float, faults: Iterable[str], **limits: Any) -> Storm:
        """From now on, a fault by chance for so large a part of the requests that no rule takes;
        limits as in Storm. Ends with calm()."""
        storm = Storm(seed, rate, tuple(faults), **limits)
        with self._lock:
            self._storm = storm
        return storm

    def calm(self) -> None:
        with self._lock:
            self._storm = None

    def hold(
        self,
        method: str | None = None,
        contains: str | None = None,
        *,
        after: bool = False,
        count: int | None = 1,
        skip: int = 0,
    ) -> Hold:
        """Hold the next matching request (count: so many, None: all; skip: not the first ones)
        before the server has seen any of it, or `after` the server has done it and before the
        client hears of it."""
        hold = Hold(method, contains, count, after, skip)
        with self._lock:
            self._holds.append(hold)
        return hold

    def pause(self) -> Hold:
        """Hold everything that comes until release()."""
        return self.hold(count=None)

    def release_stalled(self) -> None:
        """Reset the connections of the requests that were stalled so far."""
        with self._lock:
            stalled, self._stalled = self._stalled, threading.Event()
        stalled.set()

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            thread = threading.Thread(target=self._serve, args=(connection,), daemon=True)
            with self._lock:
                self._open.add(connection)
                self._threads.add(thread)
            thread.start()

    def _serve(self, connection: socket.socket) -> None:
        """One client's connection, until either side ends it."""
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        stream = cast("IO[bytes]", connection.makefile("rb", BLOCK))
        try:
            while self._one(connection, stream):
                pass
        except _Dropped:
            _abort(connection)
        except (OSError, ValueError):  # ended by either side, or not HTTP
            _abort(connection)
        finally:
            stream.close()
            connection.close()
            with self._lock:
                self._open.discard(connection)
                self._threads.discard(threading.current_thread())

    def _one(self, client: socket.socket, stream: IO[bytes]) -> bool:
        """One request; whether the connection goes on."""
        if not stream.peek(1):  # type: ignore[attr-defined]
            return False
        head = _Message(stream)
        path, _, query = head.start[1].partition("?")
        request = Request(head.start[0], path, query, head.headers)
        rule, before, after = self._register(request)
        if rule and rule.fault == "reset_before":
            raise _Dropped
        if "100-continue" in head.headers.get("expect", "").lower():
            client.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
        body: Iterable[bytes] = head.body(stream)
        if before or after or rule:
            body = [b"".join(body)]
        for hold in before:
            hold.wait(request)
        if rule and self._strike_before(client, request, rule, head):
            return not head.closes()
        if rule and rule.fault == "flip_put":
            body = [_flipped_upload(head, b"".join(body), rule.argument)]
        return self._forward(client, request, head, body, rule, after) and not head.closes()

    def _register(self, request: Request) -> tuple[Rule | None, list[Hold], list[Hold]]:
        with self._lock:
            if self._stopped.is_set():
                raise _Dropped
            self._requests.append(request)
            drawn = self._storm.draw(request) if self._storm else None
            rule = next((rule for rule in self.rules if rule.takes(request)), drawn)
            request.fault = rule.fault if rule else None
            holds = [hold for hold in self._holds if hold.takes(request)]
        return (
            rule,
            [hold for hold in holds if not hold.after],
            [hold for hold in holds if hold.after],
        )

    def _strike_before(
        self, client: socket.socket, request: Request, rule: Rule, head: _Message
    ) -> bool:
        """The faults for which the server is not asked; whether this was one."""
        if rule.fault in ERRORS:
            request.status, code, message = ERRORS[rule.fault]
            resource = request.path.replace("&", "&amp;").replace("<", "&lt;")
            error = (
                f"<Error><Code>{code}</Code><Message>{message}</Message>"
                f"<Resource>{resource}</Resource></Error>"
            )
            text = f'<?xml version="1.0" encoding="UTF-8"?>\n{error}'.encode()
            lines = [
                f"HTTP/1.1 {request.status} {code}",
                "Content-Type: application/xml",
                f"Content-Length: {len(text)}",
            ]
            lines += [
                f"Date: {email.utils.formatdate(usegmt=True)}",
                "Server: fault_proxy",
                "x-amz-request-id: FAULT",
                "",
                "",
            ]
            client.sendall(
                "\r\n".join(lines).encode() + (b"" if request.method == "HEAD" else text)
            )
            return True
        if rule.fault == "stall":
            self._stalled.wait()
            raise _Dropped
        if rule.fault == "delay":
            self._stopped.wait(1.0 if rule.argument is None else rule.argument)
        return False

    def _forward(
        self,
        client: socket.socket,
        request: Request,
        head: _Message,
        body: Iterable[bytes],
        rule: Rule | None,
        after: list[Hold],
    ) -> bool:
        """Ask the server and answer the client; whether the client's connection can go on."""
        upstream = socket.create_connection(self.upstream, timeout=10)
        upstream.settimeout(None)
        upstream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with self._lock:
            self._open.add(upstream)
        reply = cast("IO[bytes]", upstream.makefile("rb", BLOCK))
        try:
            _send(upstream, head.encoded(without="expect"), body)
            request.forwarded = True
            answer = _Message(reply)
            while answer.start[1].startswith("1"):
                answer = _Message(reply)
            status = int(answer.start[1])
            bodiless = request.method == "HEAD" or status in NO_CONTENT_STATUS
            content: Iterable[bytes] = iter(()) if bodiless else answer.body(reply, until_end=True)
            if after or rule:
                content = [b"".join(content)]
            for hold in after:
                hold.wait(request)
            if rule and rule.fault == "drop_response":
                raise _Dropped
            return _answer(client, request, answer, content, rule, bodiless)
        finally:
            reply.close()
            with self._lock:
                self._open.discard(upstream)
            upstream.close()


def _send(upstream: socket.socket, head: bytes, body: Iterable[bytes]) -> None:
    """A server that refuses early and closes is still listened to, and the client is heard out: its
    connection may go on."""
    refused = False
    upstream.sendall(head)
    for block in body:
        if not refused:
            try:
                upstream.sendall(block)
            except OSError:
                refused = True


def _answer(
    client: socket.socket,
    request: Request,
    answer: _Message,
    content: Iterable[bytes],
    rule: Rule | None,
    bodiless: bool,
) -> bool:
    """Send the server's answer on, damaged where the rule says so; whether the client's connection
    can go on."""
    head, status = answer.encoded(), int(answer.start[1])
    fault = rule.fault if rule else None
    if fault in ("reset_body", "truncate", "flip_get") and not bodiless and status < 300:
        raw = b"".join(content)
        data = _unchunked(raw) if answer.chunked else raw
        head = answer.encoded(length=len(data))
        if rule and fault == "flip_get":
            content = [
                _flipped(data, len(data) // 2 if rule.argument is None else int(rule.argument))
            ]
        else:
            request.status = status
            client.sendall(head + data[: len(data) // 2])
            if fault == "truncate":
                return False
            time.sleep(0.1)  # a reset takes back what the client has not yet read
            raise _Dropped
    request.status = status
    client.sendall(head)
    for block in content:
        client.sendall(block)
    framed = bodiless or answer.chunked or "content-length" in answer.headers or fault == "flip_get"
    return framed and not answer.closes()
