"""Check `run.state` at each step boundary.

A value that a restore could not give back is refused at the boundary after the program has set it,
not after a kill.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import islice
from typing import Any

from harness import state
from harness.state.kinds import PLAIN

MOST = 100  # new items that are checked in one container; the next save checks all items


class UserState:
    """The values of `run.state` that have been checked.

    Only a value with a new name, identity or length is checked, which takes microseconds per step.
    """

    def __init__(self) -> None:
        self._seen: dict[Any, tuple[int, int]] = {}  # by name: id and length of the object

    def look(self, values: Mapping[str, Any]) -> None:
        """Check the values that are new since the last call.

        Raises:
            UsageError: if a new value would not come back from a checkpoint as what it is.
        """
        for name, value in values.items():
            if type(value) in PLAIN:
                continue
            length = len(value) if isinstance(value, list | tuple | dict) else 0
            if (now := (id(value), length)) == self._seen.get(name):
                continue
            before = self._seen.get(name, (0, 0))
            state.check_user_state(
                {name: _new(value, length - before[1] if before[0] == id(value) else length)}
            )
            self._seen[name] = now


def _new(value: Any, count: int) -> Any:
    """Return the last `count` items of a list or dict, at most MOST; anything else unchanged."""
    if count > 0 and type(value) is list:
        return value[-min(count, MOST) :]
    if count > 0 and type(value) is dict:
        return dict(islice(reversed(value.items()), min(count, MOST)))
    return (
        value
        if not isinstance(value, list | dict) or type(value) not in (list, dict)
        else type(value)()
    )
