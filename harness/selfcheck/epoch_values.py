"""Compare what the head of an epoch makes again with what it made before.

In a loop over epochs, the code before the inner loop runs again where a run resumes inside an
epoch. What it computes from a tracked object is then of the resumed step: a copy of the model to
stay close to is the trained model. A checkpoint from inside an epoch holds digests of what its head
has made and its steps read.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

from harness.selfcheck.start_values import digests_of
from harness.text import listed
from harness.untracked.program_values import is_clock

ENTRY = "made_by_head"  # in a checkpoint


class EpochValues:
    """The digests of what the head of the present epoch has made, on the writer.

    Args:
        say: Prints a line for the user.
        note: Adds an event to the event log.
    """

    def __init__(self, say: Callable[[str], None], note: Callable[..., None]) -> None:
        self._say, self._note = say, note
        self._digests: dict[str, str] = {}
        self._before: Mapping[str, str] | None = None  # None: the head runs for the first time

    def begins(self, payload: Mapping[str, Any] | None) -> None:
        """Note that a head begins; `payload` is the checkpoint if it runs again, else None."""
        self._before = None if payload is None else payload.get(ENTRY, {})

    def head_over(self, found: Mapping[str, tuple[Any, Any]], held: Collection[int]) -> None:
        """Digest what the head has made; if it has run again, compare that with the checkpoint's.

        Args:
            found: Holder and value, by the path of each value.
            held: Addresses of the memory of tracked objects.
        """
        numbers = {
            path: repr(value)
            for path, (_, value) in found.items()
            if type(value) is float and not is_clock(value)
        }
        now = digests_of(found, held) | numbers
        self._digests = now if self._before is None else dict(self._before)
        if other := [path for path in now if self._digests.get(path, now[path]) != now[path]]:
            self._note("made_other", names=other)
            self._say(
                "harness: warning: not as when the epoch began: "
                f"{listed(other)}. Where a run resumes inside an epoch, "
                "its head computes this from the state of the resumed step: keep a number in "
                "run.state, and what is copied in a tracked object that is loaded in place."
            )

    def values(self) -> dict[str, Any]:
        """Return the entry of a checkpoint, without an empty one."""
        return {ENTRY: dict(self._digests)} if self._digests else {}
