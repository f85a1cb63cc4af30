"""Read and check the settings of a run. `changes` compares them, `stored_form` writes them.

All settings are defined in `schema.py` and `schema_services.py`. This package is the only one that
uses omegaconf, which is imported on first use. A `key=value` argument overrides the YAML file,
which overrides the defaults. `load` reports every problem at once, with the name, the value, the
allowed values and the nearest known name.
"""

from __future__ import annotations

from typing import Any

from harness.config.schema import Config
from harness.config.table import arguments, help_text

__all__ = [
    "Config",
    "arguments",
    "from_yaml",
    "given",
    "help_text",
    "load",
]


def load(file: str | None, overrides: list[str]) -> tuple[Config, dict[str, Any]]:
    """Merge the defaults, a YAML file and `key=value` settings.

    Args:
        file: Path of the YAML file, or None.
        overrides: Texts of the form `key=value`.

    Returns:
        The settings, and the same settings as plain dicts to be stored. In the dicts
        `${oc.env:NAME}` stays unresolved, so that no secret is stored.

    Raises:
        UsageError: With one line for each problem.
    """
    from harness.config.loader import read

    return read(file, overrides)


def given(file: str | None, overrides: list[str]) -> set[str]:
    """Return the names of the settings that a YAML file or `key=value` texts give a value.

    The value may be that of the default, but not null. What cannot be read is left out; `load`
    reports it.

    Args:
        file: Path of the YAML file, or None.
        overrides: Texts of the form `key=value`.
    """
    from harness.config.loader import names

    return names(file, overrides)


def from_yaml(text: bytes) -> dict[str, Any]:
    """Return the settings in YAML text; {} if it is not YAML or not a mapping."""
    import yaml

    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError:
        return {}
    return content if isinstance(content, dict) else {}
