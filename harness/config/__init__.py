"""Settings: read, checked, compared, kept. They all stand in `settings.py`. The only door to omegaconf, which is imported on first use.

Defaults < YAML file < `key=value`. `load` reports every problem at once: name, value, what is allowed, the nearest known name.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from harness.config.names import flatten, nested
from harness.config.schema import FREE, Config
from harness.errors import UsageError

__all__ = ["Change", "Config", "changes", "check_changes", "digest", "flatten", "from_yaml", "load", "nested", "to_yaml"]


def load(file: str | None, overrides: list[str]) -> tuple[Config, dict[str, Any]]:
    """Merge the defaults, a YAML file and `key=value` settings.

    Returns the settings, and the same as plain dicts for files: there `${oc.env:NAME}` stays as it was written, so that
    nothing secret is kept. Raises UsageError with one line for each thing that is wrong.
    """
    from harness.config.loader import read

    return read(file, overrides)


def from_yaml(text: bytes) -> dict[str, Any]:
    """Settings from YAML text; {} if it is none."""
    import yaml

    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError:
        return {}
    return content if isinstance(content, dict) else {}


def to_yaml(settings: dict[str, Any]) -> str:
    """The settings as YAML text."""
    if not settings:  # of who trains with the library alone
        return "{}\n"
    from harness.config import loader

    return loader.to_yaml(settings)


def digest(settings: dict[str, Any]) -> str:
    """A short name for a set of settings."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Change:
    """One setting that differs between two attempts."""

    name: str
    old: Any
    new: Any

    @property
    def is_free(self) -> bool:
        return self.name.startswith(FREE)

    def __str__(self) -> str:
        return f"{self.name}: {self.old!r} -> {self.new!r}"


def changes(old: dict[str, Any], new: dict[str, Any]) -> list[Change]:
    """Every setting that differs, by name."""
    was, now = flatten(old), flatten(new)
    names = sorted((was.keys() | now.keys()) - {"task.args"})
    return [Change(name, was.get(name), now.get(name)) for name in names if was.get(name) != now.get(name)]


def check_changes(old: dict[str, Any], new: dict[str, Any], accept: Sequence[str], override: Sequence[str]) -> list[Change]:
    """What differs and is all right. Raises UsageError naming every change that would alter the trajectory and is not insisted on."""
    found = [change for change in changes(old, new) if not change.name.startswith(("resume.", "init."))]  # those of this start only
    refused = [] if "config" in accept else [change for change in found if not change.is_free and change.name not in override]
    if refused:
        raise UsageError(
            "the configuration is not the one that this run was trained with so far:",
            "\n".join(f"  {change}" for change in refused),
            "Put the old values back, or take another run.dir. To insist: resume.accept=[config]; to apply a changed optimizer setting "
            f"to the restored optimizer: resume.override=[{','.join(change.name for change in refused)}].",
        )
    return found
