"""Look at `run.state` at each step boundary: what could not be given back is refused when it was put in, not after a kill."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import islice
from typing import Any

from harness import state
from harness.state.kinds import PLAIN

MOST = 100  # new items in one container that are looked at; the next save looks at all


class UserState:
    """What of `run.state` has been seen. Looked at is what is new by its name, its identity or its length: microseconds a step."""

    def __init__(self) -> None:
        self._seen: dict[Any, tuple[int, int]] = {}  # by name: which object, and how long it was

    def look(self, values: Mapping[str, Any]) -> None:
        """Raises UsageError for a new value that no checkpoint could give back as what it is."""
        for name, value in values.items():
            if type(value) in PLAIN:
                continue
            length = len(value) if isinstance(value, list | tuple | dict) else 0
            if (now := (id(value), length)) == self._seen.get(name):
                continue
            before = self._seen.get(name, (0, 0))
            state.check_user_state({name: _new(value, length - before[1] if before[0] == id(value) else length)})
            self._seen[name] = now


def _new(value: Any, count: int) -> Any:
    """The last so many items of a list or dict, as one; anything else as it is."""
    if count > 0 and type(value) is list:
        return value[-min(count, MOST) :]
    if count > 0 and type(value) is dict:
        return dict(islice(reversed(value.items()), min(count, MOST)))
    return value if not isinstance(value, list | dict) or type(value) not in (list, dict) else type(value)()
