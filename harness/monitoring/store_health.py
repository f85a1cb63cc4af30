"""What is said of a remote store that does not answer: each try is an event, but a person reads one line."""

from __future__ import annotations

import datetime
import threading
import time
from collections.abc import Callable

from harness.retry import RetryEvent
from harness.store import redacted

SILENT_S = 5.0  # what passes within this time is not worth a line


class StoreHealth:
    """Listens to a remote store's requests, from any thread."""

    def __init__(self, name: str, say: Callable[[str], None], clock: Callable[[], float] = time.monotonic) -> None:
        self.name, self.clock = name, clock
        self.say = say
        self.note: Callable[..., object] = lambda kind, **fields: None
        self.worked_at = clock()
        self.last = "no answer yet"  # the last error
        self._since: float | None = None
        self._said = False
        self._lock = threading.Lock()

    def on_trouble(self, what: str, trouble: RetryEvent) -> None:
        """A request failed and will be tried again."""
        why = redacted(f"{type(trouble.error).__name__}: {trouble.error}".splitlines()[0][:200])
        with self._lock:
            self.last = why
            self._since = self.clock() if self._since is None else self._since
            speak = not self._said and self.clock() - self._since >= SILENT_S
            self._said = self._said or speak
            began = datetime.datetime.now() - datetime.timedelta(seconds=self.clock() - self._since)
        self.note("retry", what=what, tries=trouble.tries, wait_s=round(trouble.wait_s, 2), error=why)
        if speak:
            self.say(f"harness: warning: {self.name} does not answer since {began:%H:%M:%S}; trying again ({why})")

    def on_success(self) -> None:
        """A request worked."""
        with self._lock:
            self.worked_at = self.clock()
            since, said, self._since, self._said = self._since, self._said, None, False
        if since is not None and said:
            self.note("answers_again", after_s=round(self.clock() - since, 1))
            self.say(f"harness: {self.name} answers again, after {self.clock() - since:.0f} s")
