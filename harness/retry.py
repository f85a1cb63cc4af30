"""Retries: which errors are transient, and for how long a request is repeated.

This is the only module that imports tenacity, and the only owner of retries: the libraries below
are configured to try once. A permanent error is raised at once. A transient error is retried with
exponential waits and full jitter, bounded in number and in seconds. The limit applies to one
request: a transfer of many parts continues as long as each part arrives within it.

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
READ_AGAIN_S = (0.2, 0.8, 2.0)  # pauses between attempts to read from a disk
SLICE_S = 0.2  # how often a wait checks whether to give up

# Not tenacity's own full jitter: it draws from Python's global generator, whose state belongs to
# the training.
JITTER = random.Random()

TRANSIENT_STATUS = frozenset({429, 500, 502, 503, 504})
TRANSIENT_CODES = frozenset(
    {
        "SlowDown",
        "RequestTimeout",
        "RequestTimeoutException",
        "InternalError",
        "ServiceUnavailable",
        "TooManyRequests",
        "TooManyRequestsException",
        "RequestLimitExceeded",
        "PriorRequestNotComplete",
        "OperationAborted",
        "ConditionalRequestConflict",
        "BadDigest",
        "IncompleteBody",
        "XAmzContentSHA256Mismatch",
        "XAmzContentChecksumMismatch",
    }
)
EXPIRED_CODES = frozenset(
    {"ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired", "RequestExpired"}
)
# Connection errors by class name: this module imports none of the libraries that raise them
# (botocore, aiohttp, fsspec).
TRANSIENT_KINDS = frozenset(
    {
        "ConnectionError",
        "TimeoutError",
        "HTTPClientError",
        "ClientPayloadError",
        "ClientConnectionError",
        "IncompleteRead",
        "IncompleteReadError",
        "ResponseParserError",
        "ResponseStreamingError",
        "FlexibleChecksumError",
        "FSTimeoutError",
        "CredentialRetrievalError",
        "gaierror",
    }
)
TRANSIENT_ERRNOS = frozenset(
    {
        errno.EAGAIN,
        errno.EBUSY,
        errno.EPIPE,
        errno.ECONNRESET,
        errno.ECONNREFUSED,
        errno.EHOSTUNREACH,
        errno.ENETUNREACH,
        errno.ETIMEDOUT,
    }
)


@dataclass(frozen=True)
class RetryEvent:
    """A failed try that is about to be repeated after `wait_s` seconds."""

    error: BaseException
    tries: int
    wait_s: float


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error and its chain of causes.

    Libraries translate the answer of a server into errors of their own.
    """
    while error is not None:
        yield error
        error = error.__cause__


def answer(error: BaseException) -> tuple[int | None, str]:
    """Return the HTTP status and the error code of a server's answer; (None, "") without one."""
    for cause in causes(error):
        response = getattr(cause, "response", None)
        if isinstance(response, dict):  # botocore's
            status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
            return status, str(response.get("Error", {}).get("Code", ""))
    for cause in causes(error):
        # aiohttp reports an answer that breaks off by an error that has a `code` of its own.
        if _is_of_connection(cause):
            break
        for name in ("status", "code"):  # the attribute's name in other clients
            if isinstance(cause, Exception) and isinstance(
                value := getattr(cause, name, None), int
            ):
                return value, ""
    return None, ""


def _is_of_connection(error: BaseException) -> bool:
    return any(kind.__name__ in TRANSIENT_KINDS for kind in type(error).__mro__)


def is_expired(error: BaseException) -> bool:
    """Return whether the credentials have expired."""
    return answer(error)[1] in EXPIRED_CODES


def is_transient(error: BaseException) -> bool:
    """Return whether the same request may succeed a moment later."""
    status, code = answer(error)
    if status is not None and status >= 300:
        return status in TRANSIENT_STATUS or code in TRANSIENT_CODES or "Throttl" in code
    if code:  # an error in the body of an answer whose status is no error
        return code in TRANSIENT_CODES
    for cause in causes(error):
        if _is_of_connection(cause):
            return True
        if isinstance(cause, OSError) and cause.errno in TRANSIENT_ERRNOS:
            return True
    return False


def _wait(
    seconds: float,
    give_up: Callable[[], object],
    clock: Callable[[], float],
    sleep: Callable[[float], object],
) -> None:
    """Sleep in slices until the time is over or `give_up` returns something true.

    Args:
        seconds: Time to sleep.
        give_up: Returns something true to end the wait.
        clock: Returns the time in seconds.
        sleep: Sleeps for a number of seconds.
    """
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
    """Call `work` until its result needs no repetition; return its last result.

    The waits between calls grow exponentially, from 1 s to 60 s, with jitter.

    Args:
        work: Returns a result.
        is_wanted_again: Returns True for a result after which `work` is called again.
        give_up: Returns something true to end the waits; the last result is returned then, too.
        sleep: Sleeps for a number of seconds.
    """
    repeated = tenacity.Retrying(
        retry=tenacity.retry_if_result(is_wanted_again),
        wait=lambda state: (
            min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2 ** min(state.attempt_number - 1, 20))
            * JITTER.uniform(0.5, 1.0)
        ),
        stop=lambda state: bool(give_up()),
        sleep=lambda seconds: _wait(seconds, give_up, time.monotonic, sleep),
        retry_error_callback=lambda state: state.outcome.result() if state.outcome else None,
    )
    return repeated(work)


def reading(read: Callable[[], T]) -> T:
    """Call `read`, which reads from a disk; repeat it after a pause while it raises StorageError.

    A file server may be unreachable for a moment. The last error is raised.
    """
    for pause_s in READ_AGAIN_S:
        try:
            return read()
        except StorageError:
            time.sleep(pause_s)
    return read()


def _renewing(renew: Callable[[], object] | None) -> Callable[[BaseException], bool]:
    """Return the test whether to try again after an error; it renews the credentials once."""
    renewed = False

    def may_try_again(error: BaseException) -> bool:
        nonlocal renewed
        if is_expired(error) and renew is not None and not renewed:
            renewed = True
            renew()
            return True
        return is_transient(error)

    return may_try_again


def retrying(
    work: Callable[[float], T],
    limit_s: float,
    *,
    on_retry: Callable[[RetryEvent], object] = lambda event: None,
    renew: Callable[[], object] | None = None,
    give_up: Callable[[], object] = lambda: None,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], object] = time.sleep,
) -> T:
    """Call `work` until it succeeds; raise its last error if it does not.

    A permanent error is raised at once; after `MOST_TRIES` tries, a transient one is raised, too.

    Args:
        work: Function of the number of seconds that are left.
        limit_s: Seconds for all tries together.
        on_retry: Called with the event of each failure that is retried.
        renew: Renews expired credentials; it is called at most once. None: they are not renewed.
        give_up: Returns something true to end a wait and all further tries.
        clock: Returns the time in seconds.
        sleep: Sleeps for a number of seconds.
    """
    until = clock() + limit_s

    def enough(state: tenacity.RetryCallState) -> bool:
        return (
            state.attempt_number >= MOST_TRIES
            or clock() + state.upcoming_sleep >= until
            or bool(give_up())
        )

    def report(state: tenacity.RetryCallState) -> None:
        error = state.outcome.exception() if state.outcome else None
        if error is not None:
            on_retry(RetryEvent(error, state.attempt_number, state.upcoming_sleep))

    attempts = tenacity.Retrying(
        retry=tenacity.retry_if_exception(_renewing(renew)),
        wait=lambda state: JITTER.uniform(
            0, min(LONGEST_WAIT_S, FIRST_WAIT_S * 2 ** min(state.attempt_number - 1, 20))
        ),
        stop=enough,
        sleep=lambda seconds: _wait(seconds, give_up, clock, sleep),
        before_sleep=report,
        reraise=True,
    )
    return attempts(lambda: work(max(until - clock(), 0.1)))
