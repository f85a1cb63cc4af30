"""What is tried again, how often, for how long and with what waits, by a clock that only moves when
told."""

from __future__ import annotations

import errno
import socket
import statistics
from collections.abc import Callable
from typing import Any

import aiohttp
import botocore.exceptions as boto
import pytest

from harness.retry import (
    LONGEST_WAIT_S,
    MOST_TRIES,
    SLICE_S,
    RetryEvent,
    answer,
    is_expired,
    is_transient,
    retrying,
)


class Time:
    """A clock whose sleepers pass the time."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.sleeps: list[float] = []

    def clock(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.sleeps.append(seconds)
        self.now += seconds


def replied(status: int, code: str = "") -> boto.ClientError:
    """An answer of a server, as botocore raises it."""
    return boto.ClientError(
        {
            "Error": {"Code": code or str(status), "Message": "m"},
            "ResponseMetadata": {"HTTPStatusCode": status},
        },
        "Op",
    )


def translated(error: BaseException, kind: type[OSError] = OSError) -> OSError:
    """The same as s3fs raises it."""
    raised = kind(5, "translated")
    raised.__cause__ = error
    return raised


class Work:
    """Fails with these errors, one call after the other, each after so many seconds; then it
    succeeds."""

    def __init__(self, time: Time, *errors: BaseException, each_s: float = 0.0) -> None:
        self.time, self.errors, self.each_s = time, list(errors), each_s
        self.left_s: list[float] = []

    def __call__(self, left_s: float) -> str:
        self.left_s.append(left_s)
        self.time.now += self.each_s
        if self.errors:
            raise self.errors.pop(0)
        return "done"


def attempt(time: Time, work: Callable[[float], Any], limit_s: float, **options: Any) -> Any:
    return retrying(work, limit_s, clock=time.clock, sleep=time.sleep, **options)


# --- what is tried again ---


@pytest.mark.parametrize(
    "error",
    [
        *[replied(status) for status in (429, 500, 502, 503, 504)],
        *[
            replied(400, code)
            for code in ("RequestTimeout", "RequestTimeoutException", "BadDigest", "IncompleteBody")
        ],
        *[
            replied(400, code)
            for code in (
                "XAmzContentSHA256Mismatch",
                "XAmzContentChecksumMismatch",
                "ThrottlingException",
                "Throttling",
            )
        ],
        *[replied(409, code) for code in ("ConditionalRequestConflict", "OperationAborted")],
        *[
            replied(403, code)
            for code in (
                "SlowDown",
                "TooManyRequestsException",
                "RequestLimitExceeded",
                "PriorRequestNotComplete",
            )
        ],
        replied(200, "InternalError"),
        replied(503, "SomethingNew"),
        translated(replied(503, "SlowDown")),
        translated(replied(500, "InternalError"), PermissionError),
        boto.EndpointConnectionError(endpoint_url="u"),
        boto.ConnectTimeoutError(endpoint_url="u"),
        boto.ReadTimeoutError(endpoint_url="u"),
        boto.ConnectionClosedError(endpoint_url="u"),
        boto.HTTPClientError(error="e"),
        boto.IncompleteReadError(actual_bytes=1, expected_bytes=2),
        boto.ResponseStreamingError(error="e"),
        boto.FlexibleChecksumError(error_msg="e"),
        boto.CredentialRetrievalError(provider="p", error_msg="e"),
        aiohttp.ClientPayloadError("half"),
        aiohttp.ServerDisconnectedError(),
        translated(aiohttp.ClientPayloadError("half")),
        ConnectionResetError(errno.ECONNRESET, "reset"),
        ConnectionError("found: 1 bytes, expected: 2"),
        TimeoutError(),
        BrokenPipeError(),
        socket.gaierror(socket.EAI_AGAIN, "try again"),
        *[
            OSError(number, "x")
            for number in (
                errno.EAGAIN,
                errno.EHOSTUNREACH,
                errno.ENETUNREACH,
                errno.ETIMEDOUT,
                errno.ECONNREFUSED,
            )
        ],
    ],
    ids=lambda error: f"{type(error).__name__} {answer(error)} {str(error)[:30]}",
)
def test_what_may_pass_is_tried_again(error):
    time, told = Time(), list[RetryEvent]()
    work = Work(time, error)
    assert is_transient(error) and not is_expired(error)
    assert attempt(time, work, 60, on_retry=told.append) == "done"
    assert (len(work.left_s), [(event.error, event.tries) for event in told]) == (2, [(error, 1)])


@pytest.mark.parametrize(
    "error",
    [
        *[
            replied(403, code)
            for code in (
                "AccessDenied",
                "InvalidAccessKeyId",
                "SignatureDoesNotMatch",
                "RequestTimeTooSkewed",
                "",
            )
        ],
        *[replied(404, code) for code in ("NoSuchBucket", "NoSuchKey", "NoSuchUpload", "")],
        *[replied(400, code) for code in ("InvalidArgument", "MalformedXML", "EntityTooSmall", "")],
        *[
            replied(412, "PreconditionFailed"),
            replied(416, "InvalidRange"),
            replied(405),
            replied(301, "PermanentRedirect"),
            replied(401),
        ],
        replied(409, "BucketAlreadyExists"),
        replied(200, "SomethingElse"),
        translated(replied(403, "AccessDenied"), PermissionError),
        translated(replied(403, "AccessDenied"), ConnectionResetError),
        boto.NoCredentialsError(),
        boto.PartialCredentialsError(provider="p", cred_var="v"),
        boto.ParamValidationError(report="r"),
        boto.ProfileNotFound(profile="p"),
        FileNotFoundError(errno.ENOENT, "x"),
        FileExistsError(errno.EEXIST, "x"),
        *[
            OSError(number, "x")
            for number in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EIO)
        ],
        ValueError("a mistake of ours"),
        RuntimeError("part 1 was not taken"),
        KeyboardInterrupt(),
        SystemExit(503),
    ],
    ids=lambda error: f"{type(error).__name__} {answer(error)} {str(error)[:30]}",
)
def test_what_does_not_pass_is_raised_at_once_as_it_is(error):
    time, told = Time(), list[RetryEvent]()
    work = Work(time, error)
    with pytest.raises(type(error)) as caught:
        attempt(time, work, 600, on_retry=told.append)
    assert caught.value is error
    assert (len(work.left_s), time.sleeps, told) == (1, [], [])


def test_a_body_that_ended_early_is_not_taken_for_an_answer_of_the_server():
    """aiohttp's error for it stems from one that has a `code` of 400."""
    early = aiohttp.ClientPayloadError("Response payload is not completed")
    early.__cause__ = aiohttp.http_exceptions.ContentLengthError(
        "Not enough data to satisfy content length header"
    )
    assert early.__cause__.code == 400
    assert answer(early) == (None, "")
    assert is_transient(early)


def test_the_answer_is_found_under_what_was_made_of_it():
    assert answer(translated(replied(412, "PreconditionFailed"))) == (412, "PreconditionFailed")
    assert answer(ValueError()) == (None, "")
    other = aiohttp.ClientResponseError(None, (), status=503)  # type: ignore[arg-type]
    assert answer(translated(other)) == (503, "") and is_transient(other)


# --- for how long ---


@pytest.mark.parametrize("limit_s", [0.0, 1.0, 30.0, 300.0])
@pytest.mark.parametrize("each_s", [0.0, 0.5, 7.0])
def test_no_wait_goes_beyond_the_limit_and_the_last_error_passes_through(limit_s, each_s):
    time = Time()
    errors = [replied(503, f"SlowDown{number}") for number in range(1000)]
    work = Work(time, *errors, each_s=each_s)
    with pytest.raises(boto.ClientError) as caught:
        attempt(time, work, limit_s)
    assert caught.value is errors[len(work.left_s) - 1]
    assert time.now - 1000 <= max(limit_s, each_s) + each_s
    assert sum(time.sleeps) <= limit_s
    if limit_s >= 30:
        assert len(work.left_s) >= 4, "it has really tried"


def test_each_try_is_told_how_much_time_is_left():
    time = Time()
    work = Work(time, *[replied(503)] * 5, each_s=1.0)
    assert attempt(time, work, 100) == "done"
    assert work.left_s[0] == 100
    assert work.left_s[-1] == pytest.approx(100 - 5 - sum(time.sleeps))
    assert work.left_s == sorted(work.left_s, reverse=True)


def test_a_try_that_is_late_still_gets_a_moment():
    time = Time()
    work = Work(time, *[replied(503)] * 3)
    with pytest.raises(boto.ClientError):
        attempt(time, work, 0)
    assert work.left_s == [0.1]


def test_the_number_of_tries_is_bounded():
    time = Time()
    work = Work(time, *[replied(503)] * 1000)
    with pytest.raises(boto.ClientError):
        attempt(time, work, 1e9)
    assert len(work.left_s) == MOST_TRIES


def test_waits_are_exponential_with_full_jitter_and_a_ceiling():
    waits: list[list[float]] = [[] for _ in range(12)]
    for _ in range(300):
        time = Time()
        told = list[RetryEvent]()
        assert attempt(time, Work(time, *[replied(503)] * 12), 1e6, on_retry=told.append) == "done"
        assert sum(time.sleeps) == pytest.approx(sum(event.wait_s for event in told)), (
            "what is told is what is waited"
        )
        for event in told:
            waits[event.tries - 1].append(event.wait_s)
    for number, drawn in enumerate(waits):
        ceiling = min(0.5 * 2**number, LONGEST_WAIT_S)
        assert 0 <= min(drawn) < 0.1 * ceiling and 0.9 * ceiling < max(drawn) <= ceiling
        assert statistics.mean(drawn) == pytest.approx(ceiling / 2, rel=0.25)


# --- giving up, and credentials ---


def test_a_wait_ends_and_nothing_more_is_tried_once_it_is_given_up():
    time = Time()
    work = Work(time, *[replied(503)] * 1000)
    tries_at_end = list[int]()

    def give_up() -> bool:
        if time.now >= 1020:
            tries_at_end.append(len(work.left_s))
        return time.now >= 1020

    with pytest.raises(boto.ClientError):
        attempt(time, work, 1e6, give_up=give_up)
    assert time.now - 1020 <= SLICE_S
    assert len(work.left_s) <= tries_at_end[0] + 1 and max(time.sleeps) <= SLICE_S


def test_who_has_given_up_already_still_tries_once():
    time = Time()
    work = Work(time)
    assert attempt(time, work, 60, give_up=lambda: True) == "done"
    work = Work(time, replied(503))
    with pytest.raises(boto.ClientError):
        attempt(time, work, 60, give_up=lambda: True)
    assert (len(work.left_s), time.sleeps) == (1, [])


@pytest.mark.parametrize(
    "code", ["ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired", "RequestExpired"]
)
def test_expired_credentials_are_renewed_once(code):
    time, renewed = Time(), list[float]()
    expired = [translated(replied(400, code), PermissionError) for _ in range(2)]
    assert is_expired(expired[0]) and not is_transient(expired[0])
    work = Work(time, expired[0])
    assert attempt(time, work, 60, renew=lambda: renewed.append(time.now)) == "done"
    assert (len(renewed), len(work.left_s)) == (1, 2)
    work = Work(time, replied(503), expired[0], replied(503), expired[1], replied(503))
    with pytest.raises(PermissionError) as caught:
        attempt(time, work, 60, renew=lambda: renewed.append(time.now))
    assert caught.value is expired[1]
    assert (len(renewed), len(work.left_s)) == (2, 4), "renewed once for a request"


def test_expired_credentials_that_nobody_can_renew_are_final():
    time = Time()
    work = Work(time, replied(400, "ExpiredToken"))
    with pytest.raises(boto.ClientError):
        attempt(time, work, 60)
    assert len(work.left_s) == 1


def test_an_error_of_the_renewal_passes_through():
    def renew() -> None:
        raise boto.NoCredentialsError

    time = Time()
    with pytest.raises(boto.NoCredentialsError):
        attempt(time, Work(time, replied(400, "ExpiredToken")), 60, renew=renew)


def test_success_at_once_is_neither_told_nor_waited_for():
    time, told = Time(), list[RetryEvent]()
    work = Work(time)
    assert attempt(time, work, 60, on_retry=told.append) == "done"
    assert (work.left_s, time.sleeps, told) == ([60], [], [])
