"""Convert settings between dotted names and nested dicts."""

from __future__ import annotations

from typing import Any

from harness.config.schema import WHOLE


def nested(name: str, value: Any) -> dict[str, Any]:
    """Return nested dicts for a dotted name: {"a": {"b": 1}} for "a.b" and 1."""
    for part in reversed(name.split(".")):
        value = {part: value}
    return value  # type: ignore[no-any-return]


def flatten(nested: dict[Any, Any], prefix: str = "") -> dict[str, Any]:
    """Convert nested dicts to dotted names: {"a": {"b": 1}} becomes {"a.b": 1}.

    Lists, empty dicts and the dicts named in `WHOLE`, whose keys contain dots, are not split.
    """
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        name = f"{prefix}{key}"
        flat |= (
            flatten(value, f"{name}.")
            if isinstance(value, dict) and value and name not in WHOLE
            else {name: value}
        )
    return flat
