"""Parse small JSON records and drop every field whose value is not of the expected type.

Anyone with write access to a bucket may have written such a record, so no field is trusted.
"""

from __future__ import annotations

import datetime
import json
import math
from typing import Any

MOST = 1 << 62  # exclusive limit for the number of a step, an attempt or a process


def parse(text: bytes) -> dict[str, Any]:
    """Return the valid fields of a record; {} if the record cannot be parsed."""
    return plain(fields(text))


def fields(text: bytes) -> dict[str, Any]:
    """Return all fields of a record, whatever their types; {} if it cannot be parsed."""
    try:
        parsed = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return parsed if isinstance(parsed, dict) else {}


def plain(record: dict[str, Any]) -> dict[str, Any]:
    """Return the record without the fields whose value is not of the expected type.

    Fields whose name is not in `KINDS` are kept unchanged.
    """
    return {
        name: value for name, value in record.items() if name not in KINDS or KINDS[name](value)
    }


def is_value(value: object) -> bool:
    """Return whether the value is a loss or a metric: a float or an int.

    NaN and infinities are valid. An int must be smaller than 2**62 in magnitude.
    """
    return isinstance(value, float) or (isinstance(value, int) and abs(value) < MOST)


def is_number(value: object) -> bool:
    """Return whether the value can be plotted: not finite, or less than 1e300 in magnitude.

    The limit ensures that the sum of a few finite values stays finite.
    """
    return is_value(value) and (
        not math.isfinite(value) or abs(value) < 1e300  # type: ignore[arg-type]
    )


def is_count(value: object) -> bool:
    """Return whether the value is a valid number of a step, an attempt or a rank."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < MOST


def seconds(value: object) -> float | None:
    """Return a recorded time in seconds since 1970, or None if it is not valid.

    Valid is an ISO time after 1970 with a UTC offset, as `text.now` formats it.
    """
    if not isinstance(value, str) or value[-6:-5] not in ("+", "-"):
        return None
    try:
        at = datetime.datetime.fromisoformat(value).timestamp()
    except (ValueError, OverflowError, OSError):
        return None
    return at if at > 0 else None


def is_timestamp(value: object) -> bool:
    """Return whether the value is a valid time."""
    return seconds(value) is not None


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


def _is_environment(value: object) -> bool:
    return isinstance(value, dict) and isinstance(value.get("distributions") or {}, dict)


def _is_origin(value: object) -> bool:
    return value is None or (
        isinstance(value, dict) and is_count(value.get("attempt")) and is_count(value.get("step"))
    )


KINDS = (
    dict.fromkeys(
        (
            "run_id",
            "nonce",
            "kind",
            "host",
            "why",
            "error",
            "trace",
            "by",
            "event",
            "submitted",
            "stacks",
            "collective",
        ),
        _is_text,
    )
    | dict.fromkeys(("remote", "launch"), _is_text_or_none)
    | dict.fromkeys(
        ("attempt", "reached", "world_size", "greatest", "most_failures", "failures"), is_count
    )
    | dict.fromkeys(("step", "saved_step", "made_step", "rank", "of"), _is_count_or_none)
    | dict.fromkeys(("loss", "seconds", "blocked_s", "copy_s"), is_number)
    | {
        "from": _is_origin,
        "time": is_timestamp,
        "code": _is_code,
        "spent": _is_mapping,
        "sources": _is_mapping,
        "signals": _is_texts,
        "insisted": _is_texts,
        "environment": _is_environment,
    }
)
