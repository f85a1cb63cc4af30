"""Small records as they are read: whoever may write to a bucket may have written them, so each field is of its kind, or left out."""

from __future__ import annotations

import datetime
import json
import math
from typing import Any

MOST = 1 << 62  # no step, attempt or process has a greater number


def parse(text: bytes) -> dict[str, Any]:
    """What a record holds; {} of one that cannot be read."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return plain(found) if isinstance(found, dict) else {}


def plain(record: dict[str, Any]) -> dict[str, Any]:
    """The record without the fields that are not of their kind; those of other names are as they were."""
    return {name: value for name, value in record.items() if name not in KINDS or KINDS[name](value)}


def is_value(value: object) -> bool:
    """A loss, or what was measured: any number that a float holds, NaN and infinities too."""
    return isinstance(value, float) or (isinstance(value, int) and abs(value) < MOST)


def is_number(value: object) -> bool:
    """One that can be drawn: none that sums of few make infinite."""
    return is_value(value) and (not math.isfinite(value) or abs(value) < 1e300)  # type: ignore[arg-type]


def is_count(value: object) -> bool:
    """A number of a step, an attempt, a rank."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < MOST


def is_time(value: object) -> bool:
    """A time with its zone, as `attempts.now` spells it."""
    try:
        return isinstance(value, str) and datetime.datetime.fromisoformat(value).timestamp() > 0 and value[-6:-5] in ("+", "-")
    except (ValueError, OverflowError, OSError):
        return False


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_text_or_none(value: object) -> bool:
    return value is None or isinstance(value, str)


def _is_count_or_none(value: object) -> bool:
    return value is None or is_count(value)


def _is_code(value: object) -> bool:
    return isinstance(value, int) and abs(value) < MOST


def _is_mapping(value: object) -> bool:
    return isinstance(value, dict)


def _is_texts(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _is_origin(value: object) -> bool:
    return value is None or (isinstance(value, dict) and is_count(value.get("attempt")) and is_count(value.get("step")))


KINDS = (
    dict.fromkeys(
        ("run_id", "nonce", "kind", "host", "why", "error", "trace", "by", "event", "submitted", "stacks", "collective"), _is_text
    )
    | dict.fromkeys(("remote", "launch"), _is_text_or_none)
    | dict.fromkeys(("attempt", "reached", "world_size", "greatest", "most_failures", "failures"), is_count)
    | dict.fromkeys(("step", "saved_step", "rank", "of"), _is_count_or_none)
    | dict.fromkeys(("loss", "seconds", "blocked_s", "copy_s"), is_number)
    | {"from": _is_origin, "time": is_time, "code": _is_code, "spent": _is_mapping, "signals": _is_texts}
)
