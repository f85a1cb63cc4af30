"""Messages between ranks through the TCP store, for any thread: no rank waits in a collective."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from harness.errors import EXIT_FAILED, HarnessError, LostRankError, by_exit_code

HEARTBEAT_S = 1.0


class Words:
    """JSON values that ranks leave for one another under a key.

    Args:
        store: a store of torch.distributed that all ranks share.
        timeout_s: how long the heartbeat of a rank may be missing before that rank counts as lost.
    """

    def __init__(self, store: Any, timeout_s: float) -> None:
        self._store, self._timeout_s = store, timeout_s

    def tell(self, key: str, value: Any) -> None:
        """Leave a value under a key."""
        with lost_rank_errors():
            self._store.set(key, json.dumps(value))

    def drop(self, key: str) -> None:
        """Delete a value that every rank has received."""
        with lost_rank_errors():
            self._store.delete_key(key)

    def peek(self, key: str) -> Any:
        """Return the value under a key, or None if there is none."""
        with lost_rank_errors():
            return json.loads(self._store.get(key)) if self._store.check([key]) else None

    def beat(self, heart: str) -> None:
        """Count one more sign of life, or of progress, under a key."""
        with lost_rank_errors():
            self._store.add(heart, 1)

    def beats(self, heart: str) -> int:
        """Return how many signs there were under a key."""
        with lost_rank_errors():
            return int(self._store.add(heart, 0))

    def receive(
        self,
        key: str,
        heart: str,
        who: str,
        give_up: Callable[[], object],
        is_it: Callable[[Any], bool] = lambda value: True,
    ) -> Any:
        """Wait for the value under a key, as long as the heartbeat of its rank continues.

        Args:
            key: the key.
            heart: the key of the heartbeat.
            who: the rank that will leave the value, for the error.
            give_up: returns a true value if a missing heartbeat is waited for only a few seconds;
                its errors pass through.
            is_it: whether a value is the one that is waited for.

        Raises:
            LostRankError: the heartbeat stops.
        """
        beat, beat_at, pause_s = -1, time.monotonic(), 0.0005
        while (value := self.peek(key)) is None or not is_it(value):
            time.sleep(pause_s)
            pause_s = min(pause_s * 1.5, 0.05)
            if (now := self.beats(heart)) != beat:
                beat, beat_at = now, time.monotonic()
            limit_s = min(5.0, self._timeout_s) if give_up() else self._timeout_s
            if time.monotonic() - beat_at > limit_s:
                raise LostRankError(
                    f"{who} does not answer",
                    f"no sign of life for {limit_s:.0f} s",
                    "See its log.",
                )
        return value

    @contextlib.contextmanager
    def beating(self, *hearts: str) -> Iterator[None]:
        """Let the heartbeats under these keys continue while the block runs, from a thread."""
        done = threading.Event()

        def run() -> None:
            while not done.wait(HEARTBEAT_S):
                # The store ends with the launcher. The main thread will notice that too.
                with contextlib.suppress(RuntimeError):
                    for heart in hearts:
                        self._store.add(heart, 1)

        thread = threading.Thread(target=run, daemon=True, name="heartbeat")
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()


def as_word(error: BaseException, rank: int | None) -> dict[str, Any]:
    """Return an error as plain data; `raise_word` raises it on another rank.

    Without a `rank` to name, the text names rank 0 if the error is none of the package's.
    """
    is_known = isinstance(error, HarnessError)
    text = str(error) if is_known else f"{type(error).__name__}: {error}"
    if rank is not None or not is_known:
        text = f"rank {rank or 0}: {text}"
    code = getattr(error, "exit_code", EXIT_FAILED)
    return {"code": code, "error": text, "is_lost": isinstance(error, LostRankError)}


def raise_word(word: dict[str, Any]) -> None:
    """Raise the error in a word, if it is one."""
    if "error" in word:
        raise (
            LostRankError(word["error"])
            if word["is_lost"]
            else by_exit_code(word["code"], word["error"])
        )


@contextlib.contextmanager
def lost_rank_errors() -> Iterator[None]:
    """Raise LostRankError in place of a RuntimeError of torch.distributed."""
    try:
        yield
    except RuntimeError as error:
        line = str(error).splitlines()[0][:300] if str(error) else type(error).__name__
        raise LostRankError(
            "another rank of this attempt is lost",
            f"found: {line}",
            "The first error is in that rank's log.",
        ) from error
