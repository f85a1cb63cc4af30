"""Report a remote store that does not answer.

Each failed try is recorded as an event. Only one line is printed for a whole outage, and one when
the store answers again.
"""

from __future__ import annotations

import datetime
import threading
import time
from collections.abc import Callable

from harness.retry import RetryEvent
from harness.store import redacted

SILENT_S = 5.0  # a shorter outage is not printed


class StoreHealth:
    """The health of a remote store, as observed from its requests in any thread.

    Args:
        name: Name of the store in messages.
        say: Function that prints a line.
        clock: Function that returns the current time in seconds.
    """

    def __init__(
        self, name: str, say: Callable[[str], None], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.name, self.clock = name, clock
        self.say = say
        self._note: Callable[..., object] = lambda kind, **fields: None
        self.last = "no answer yet"  # the last error
        self._since: float | None = None
        self._is_reported = False
        self._lock = threading.Lock()

    def record_to(self, note: Callable[..., object]) -> None:
        """Record what follows as events: `note` takes the kind and the fields of one."""
        self._note = note

    def on_retry(self, request: str, event: RetryEvent) -> None:
        """Record a failed request that will be retried; print a warning for a long outage.

        Args:
            request: The request, for the event.
            event: The retry event.
        """
        why = redacted(f"{type(event.error).__name__}: {event.error}".splitlines()[0][:200])
        with self._lock:
            self.last = why
            self._since = self.clock() if self._since is None else self._since
            speak = not self._is_reported and self.clock() - self._since >= SILENT_S
            self._is_reported = self._is_reported or speak
            began = datetime.datetime.now() - datetime.timedelta(seconds=self.clock() - self._since)
        self._note(
            "retry", what=request, tries=event.tries, wait_s=round(event.wait_s, 2), error=why
        )
        if speak:
            self.say(
                f"harness: warning: {self.name} does not answer since {began:%H:%M:%S}; "
                f"trying again ({why})"
            )

    def on_success(self) -> None:
        """Record a successful request; report the end of an outage that was printed."""
        with self._lock:
            since, was_reported, self._since, self._is_reported = (
                self._since,
                self._is_reported,
                None,
                False,
            )
        if since is not None and was_reported:
            self._note("answers_again", after_s=round(self.clock() - since, 1))
            self.say(f"harness: {self.name} answers again, after {self.clock() - since:.0f} s")
