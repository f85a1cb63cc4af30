"""Check `run.state` at each step boundary.

A new value (by its name, identity or length) that cannot be restored is refused at the next step
boundary, not after a kill; an item replaced inside a container is found at the next save. A tensor
that is not on the CPU is reported, because a restore does not know where the program wants it.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import islice
from typing import Any

import torch

from harness import state
from harness.errors import UsageError
from harness.state.kinds import PLAIN

MOST = 100  # new items that are checked in one container; the next save checks all items


class UserState:
    """The values of `run.state` that have been checked.

    Only a value with a new name, identity or length is checked, which takes microseconds per step.
    """

    def __init__(self) -> None:
        self._seen: dict[Any, tuple[int, int]] = {}  # by name: id and length of the object
        self._elsewhere: set[Any] = set()  # the names of values with tensors on a device

    def look(self, values: Mapping[str, Any]) -> list[str]:
        """Check the values that are new since the last call; return warnings about them.

        Raises:
            UsageError: if a new value would not come back from a checkpoint as what it is.
        """
        warnings = []
        if type(values) is not dict and not isinstance(values, Mapping):
            raise UsageError(
                "run.state has been replaced by what is no dict",
                f"found: a {type(values).__name__}, expected: a dict",
                'Put values into it by name: run.state["patience"] = 3.',
            )
        for name, value in values.items():
            if type(value) in PLAIN:
                continue
            length = len(value) if isinstance(value, list | tuple | dict) else 0
            if (now := (id(value), length)) == self._seen.get(name):
                continue
            before = self._seen.get(name, (0, 0))
            new = _new(value, length - before[1] if before[0] == id(value) else length)
            state.check_user_state({name: new})
            self._seen[name] = now
            if name not in self._elsewhere and (device := _device_in(new)):
                self._elsewhere.add(name)
                warnings.append(
                    f"run.state[{name!r}] holds a tensor on {device}, which is on the CPU after a "
                    "restart: use .to(run.device) where it is read"
                )
        return warnings


def _device_in(value: Any) -> str:
    """Return the device of the first tensor in a value that is not on the CPU; "" if none is."""
    if isinstance(value, torch.Tensor):
        return "" if value.is_cpu else str(value.device)
    if isinstance(value, Mapping | list | tuple):
        items = value.values() if isinstance(value, Mapping) else value
        return next(filter(None, map(_device_in, items)), "")
    return ""


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
