"""List all settings: for the arguments of functions, and for the help text."""

from __future__ import annotations

import dataclasses
import inspect
import textwrap
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, NamedTuple

from harness.config.rules import Rule, default_of
from harness.config.schema import SPELLED, Config

NAMES = {attribute: name for name, attribute in SPELLED.items()}


class Setting(NamedTuple):
    """One setting, as `schema.py` defines it."""

    name: str  # as users write it: "checkpoint.every_s"
    default: Any
    may_be_null: bool
    meaning: str
    rule: Rule | None
    argument: str  # of `harness.init`, `Run.batches` or `Run.steps`; "" if it is none
    kind: str  # its type, as `schema.py` spells it

    @property
    def allowed(self) -> str:
        """The allowed values in words; "" if every value of the type is allowed."""
        allowed = self.rule.allowed if self.rule else ""
        return f"{allowed}, or null" if allowed and self.may_be_null else allowed


def class_of(section: dataclasses.Field[Any]) -> Any:
    """Return the dataclass of a section of `Config`."""
    return section.default_factory


@cache
def settings() -> tuple[Setting, ...]:
    """Return all settings, in the order of the schema."""
    return tuple(_settings())


def _settings() -> Iterator[Setting]:
    for section in dataclasses.fields(Config):
        for field in dataclasses.fields(class_of(section)):
            name, rule = f"{section.name}.{field.name}", field.metadata["rule"]
            yield Setting(
                NAMES.get(name, name),
                default_of(field),
                "None" in str(field.type) or bool(rule and rule.may_be_null),
                field.metadata["meaning"],
                rule,
                field.metadata["argument"],
                str(field.type),
            )


def arguments(config: Config, function: Callable[..., Any]) -> dict[str, Any]:
    """Return the settings that a function takes, by the names of its arguments."""
    names = inspect.signature(function).parameters
    return {
        of.argument: getattr(getattr(config, section), field)
        for of in settings()
        if of.argument in names
        for section, _, field in [of.name.partition(".")]
    }


def written(value: Any) -> str:
    """Return a value as it is written in YAML and on the command line."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list):
        return f"[{', '.join(map(str, value))}]"
    return f"{value:g}" if isinstance(value, float) else str(value)


def help_text() -> str:
    """Return the name, the default and the meaning of each setting, for `--help`."""
    lines = ["settings, with their defaults:"]
    for of in settings():
        lines.append(f"  {of.name}={written(of.default)}")
        lines += textwrap.wrap(of.meaning, 90, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return "\n".join(lines)
