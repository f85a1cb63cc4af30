"""Convert settings between dotted names and nested dicts, and from earlier names to today's."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from harness.config.schema import WHOLE

# Beside the stored settings: digests of the values of interpolations, which may be secret.
RESOLVED = "digests of interpolations"
ARGUMENTS = "task.args."  # what the names of the task's arguments begin with
# Earlier names of settings, for ever in the settings that a checkpoint holds.
KEPT_REMOTELY = {
    "store.keep_last": "last",
    "store.keep_every_steps": "every_steps",
    "store.keep_best": "best",
}
MEMORY, MEMORY_EVERY_STEPS = "checkpoint.memory", "checkpoint.memory_every_steps"
TODAY = {old: f"store.keep.{key}" for old, key in KEPT_REMOTELY.items()} | {
    MEMORY_EVERY_STEPS: f"{MEMORY}=N"
}


def renamed(settings: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, Any, str]]:
    """Yield the settings under today's names, each with its earlier name or "".

    Args:
        settings: dotted names and values; of equal names the last counts.
    """
    given = list(settings)
    last = dict(given)
    in_memory, every_steps = last.get(MEMORY, False), last.get(MEMORY_EVERY_STEPS, 1)
    interval = every_steps if in_memory is True and every_steps != 1 else in_memory
    for name, value in given:
        if name in KEPT_REMOTELY:
            yield "store.keep", {KEPT_REMOTELY[name]: value}, name
        elif name == MEMORY_EVERY_STEPS or (name == MEMORY and MEMORY_EVERY_STEPS in last):
            yield MEMORY, interval, name if name != MEMORY else ""
        else:
            yield name, value, ""


def stored_under_todays_names(
    stored: Mapping[str, Any], *, whole_arguments: bool = False
) -> dict[str, Any]:
    """Return the settings of a checkpoint, with dotted names (see `flatten`), as named today."""
    settings: dict[str, Any] = {}
    kept: dict[str, Any] = {}
    own = {name: value for name, value in stored.items() if name != RESOLVED}
    flat = flatten(own, whole_arguments=whole_arguments)
    for name, value, earlier in renamed(flat.items()):
        if earlier and name == "store.keep":
            kept |= {key: number for key, number in value.items() if number is not None}
            settings[name] = kept
        else:
            settings[name] = value
    return settings


def nested(name: str, value: Any) -> dict[str, Any]:
    """Return nested dicts for a dotted name: {"a": {"b": 1}} for "a.b" and 1.

    What follows `task.args.` is one key: the name of an argument of a task may have dots in it.
    """
    for part in reversed(name.split(".", 2 if name.startswith(ARGUMENTS) else -1)):
        value = {part: value}
    return value  # type: ignore[no-any-return]


def flatten(
    nested: dict[Any, Any], prefix: str = "", *, whole_arguments: bool = False
) -> dict[str, Any]:
    """Convert nested dicts to dotted names: {"a": {"b": 1}} becomes {"a.b": 1}.

    Lists, empty dicts and the dicts named in `WHOLE` are not split; with `whole_arguments` neither
    are those among the task's arguments, whose keys may be numbers or have dots in them.
    """
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        name = f"{prefix}{key}"
        flat |= (
            flatten(value, f"{name}.", whole_arguments=whole_arguments)
            if isinstance(value, dict)
            and value
            and name not in WHOLE
            and not (whole_arguments and name.startswith(ARGUMENTS))
            else {name: value}
        )
    return flat
