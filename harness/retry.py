"""What may pass by itself, and how long it is tried again. The only door to tenacity.

There is one owner of retries: the libraries below are told to try once. A permanent error is raised at once; a transient one is
tried again with exponential waits and full jitter, bounded in number and in seconds. The limit is one request's: a transfer of many
parts goes on as long as each of them arrives within it.

Sources: "Error retries and exponential backoff in AWS" and the S3 API's list of error codes.
"""

from __future__ import annotations

import errno
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import tenacity

from harness.errors import StorageError

T = TypeVar("T")
MOST_TRIES = 200
FIRST_WAIT_S, LONGEST_WAIT_S = 0.5, 20.0
FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 60.0  # between two starts of a whole run
READ_AGAIN_S = (0.2, 0.8, 2.0)  # pauses before a disk that did not answer is asked again
SLICE_S = 0.2  # how often a wait looks whether it has been given up

# Not tenacity's own full jitter: it draws from Python's global generator, whose state belongs to the training.
JITTER = random.Random()

TRANSIENT_STATUS = frozenset({429, 500, 502, 503, 504})
TRANSIENT_CODES = frozenset({
    "SlowDown", "RequestTimeout", "RequestTimeoutException", "InternalError", "ServiceUnavailable", "TooManyRequests",
    "TooManyRequestsException", "RequestLimitExceeded", "PriorRequestNotComplete", "OperationAborted", "ConditionalRequestConflict",
    "BadDigest", "IncompleteBody", "XAmzContentSHA256Mismatch", "XAmzContentChecksumMismatch",
})  # fmt: skip
EXPIRED_CODES = frozenset({"ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired", "RequestExpired"})
# Errors of connections, by name: this module knows none of the libraries (botocore, aiohttp, fsspec) that they come from.
TRANSIENT_KINDS = frozenset({
    "ConnectionError", "TimeoutError", "HTTPClientError", "ClientPayloadError", "ClientConnectionError", "IncompleteRead",
    "IncompleteReadError", "ResponseParserError", "ResponseStreamingError", "FlexibleChecksumError", "FSTimeoutError",
    "CredentialRetrievalError", "gaierror",
})  # fmt: skip
TRANSIENT_ERRNOS = frozenset({
    errno.EAGAIN, errno.EBUSY, errno.EPIPE, errno.ECONNRESET, errno.ECONNREFUSED, errno.EHOSTUNREACH, errno.ENETUNREACH, errno.ETIMEDOUT
})  # fmt: skip


@dataclass(frozen=True)
class RetryEvent:
    """One failure that is about to be tried again."""

    error: BaseException
    tries: int
    wait_s: float


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error and what it was raised from: libraries translate what a server said into errors of their own."""
    while error is not None:
        yield error
        error = error.__cause__


def answer(error: BaseException) -> tuple[int | None, str]:
    """The HTTP status and the error code that a server answered with; (None, "") if it did not answer."""
    for cause in causes(error):
        response = getattr(cause, "response", None)
        if isinstance(response, dict):  # botocore's
            status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
            return status, str(response.get("Error", {}).get("Code", ""))
    for cause in causes(error):
        if _is_of_connection(cause):  # aiohttp makes an answer that breaks off from an error with a `code` of its own
            break
        for name in ("status", "code"):  # other clients' spellings
            if isinstance(cause, Exception) and isinstance(value := getattr(cause, name, None), int):
                return value, ""
    return None, ""


def _is_of_connection(error: BaseException) -> bool:
    return any(kind.__name__ in TRANSIENT_KINDS for kind in type(error).__mro__)


def is_expired(error: BaseException) -> bool:
    """Whether the credentials were good, but are too old."""
    return answer(error)[1] in EXPIRED_CODES


def is_transient(error: BaseException) -> bool:
    """Whether the same request may succeed a moment later."""
    status, code = answer(error)
    if status is not None and status >= 300:
        return status in TRANSIENT_STATUS or code in TRANSIENT_CODES or "Throttl" in code
    if code:  # an error in the body of an answer that began well
        return code in TRANSIENT_CODES
    for cause in causes(error):
        if _is_of_connection(cause):
            return True
        if isinstance(cause, OSError) and cause.errno in TRANSIENT_ERRNOS:
            return True
    return False


def _wait(seconds: float, give_up: Callable[[], object], clock: Callable[[], float], sleep: Callable[[float], object]) -> None:
    """Sleep in slices, until it is over or given up."""
    end = clock() + seconds
    while (left := end - clock()) > 0 and not give_up():
        sleep(min(left, SLICE_S))


def until_enough(
    work: Callable[[], T],
    is_wanted_again: Callable[[T], bool],
    *,
    give_up: Callable[[], object] = lambda: None,
    sleep: Callable[[float], object] = time.sleep,
) -> T:
    """Call `work` until its result is not wanted again, with exponential waits and jitter between; its last result is returned, also
    when `give_up` returns something true."""
    repeated = tenacity.Retrying(
        retry=tenacity.retry_if_result(is_wanted_again),
        wait=lambda state: min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2 ** min(state.attempt_number - 1, 20)) * JITTER.uniform(0.5, 1.0),
        stop=lambda state: bool(give_up()),
        sleep=lambda seconds: _wait(seconds, give_up, time.monotonic, sleep),
        retry_error_callback=lambda state: state.outcome.result() if state.outcome else None,
    )
    return repeated(work)


def reading(read: Callable[[], T]) -> T:
    """Call `read`, which asks a disk, and again after a pause while it raises StorageError: a server behind it may be away for a moment.
    Its last error passes through."""
    for pause_s in READ_AGAIN_S:
        try:
            return read()
        except StorageError:
            time.sleep(pause_s)
    return read()


def retrying(
    work: Callable[[float], T],
    limit_s: float,
    *,
    on_trouble: Callable[[RetryEvent], object] = lambda trouble: None,
    renew: Callable[[], object] | None = None,
    give_up: Callable[[], object] = lambda: None,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], object] = time.sleep,
) -> T:
    """Call `work(seconds that are left)` until it succeeds; its last error passes through.

    `on_trouble` is told of each failure that is tried again. Expired credentials are renewed once. A wait ends, and nothing is
    tried any more, once `give_up` returns something true.
    """
    until = clock() + limit_s
    renewed = False

    def may_try_again(error: BaseException) -> bool:
        nonlocal renewed
        if is_expired(error) and renew is not None and not renewed:
            renewed = True
            renew()
            return True
        return is_transient(error)

    def enough(state: tenacity.RetryCallState) -> bool:
        return state.attempt_number >= MOST_TRIES or clock() + state.upcoming_sleep >= until or bool(give_up())

    def told(state: tenacity.RetryCallState) -> None:
        error = state.outcome.exception() if state.outcome else None
        if error is not None:
            on_trouble(RetryEvent(error, state.attempt_number, state.upcoming_sleep))

    attempts = tenacity.Retrying(
        retry=tenacity.retry_if_exception(may_try_again),
        wait=lambda state: JITTER.uniform(0, min(LONGEST_WAIT_S, FIRST_WAIT_S * 2 ** min(state.attempt_number - 1, 20))),
        stop=enough,
        sleep=lambda seconds: _wait(seconds, give_up, clock, sleep),
        before_sleep=told,
        reraise=True,
    )
    return attempts(lambda: work(max(until - clock(), 0.1)))
