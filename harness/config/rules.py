"""Describe a setting where it is defined: its default, its meaning and its allowed values."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import MISSING, dataclass, field
from numbers import Integral, Real
from typing import Any

from harness.store.urls import check_url, is_url


@dataclass(frozen=True)
class Rule:
    """The values that a setting may have, besides null where its type allows that."""

    holds: Callable[[Any], bool]
    allowed: str
    may_be_null: bool = False  # where the type does not say so


def setting(default: Any, meaning: str, rule: Rule | None = None, argument: str = "") -> Any:
    """Define a setting as a field of a dataclass.

    Args:
        default: its default; a list or a dict is copied for each instance.
        meaning: what it does, with its unit, as the table of settings shows it.
        rule: the values that it may have; None: all of its type.
        argument: the argument of `harness.init`, `Run.batches` or `Run.steps` that means the same.
    """
    about = {"meaning": meaning, "rule": rule, "argument": argument}
    if isinstance(default, list | dict):
        return field(default_factory=default.copy, metadata=about)
    return field(default=default, metadata=about)


def default_of(of: Any) -> Any:
    """Return the default of a field that `setting` has made."""
    return of.default if of.default is not MISSING else of.default_factory()


def _is_whole(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _is_pattern(text: str) -> bool:
    try:
        return bool(re.compile(text))
    except re.error:
        return False


def one_of(*choices: str) -> Rule:
    """Return the rule of a setting that is one of some words."""
    return Rule(lambda v: v in choices, f"{', '.join(choices[:-1])} or {choices[-1]}")


def some_of(*choices: str) -> Rule:
    """Return the rule of a setting that is a list of some words."""
    return Rule(
        lambda v: isinstance(v, list | tuple) and set(v) <= set(choices),
        f"a list of: {', '.join(choices)}",
    )


def matching(pattern: str, allowed: str) -> Rule:
    """Return the rule of a setting that a regular expression matches as a whole."""
    return Rule(lambda v: isinstance(v, str) and bool(re.fullmatch(pattern, v)), allowed)


COUNT = Rule(lambda v: _is_whole(v) and v > 0, "a whole number above 0")
COUNT_OR_ZERO = Rule(lambda v: _is_whole(v) and v >= 0, "a whole number from 0 on")
SEED = Rule(lambda v: _is_whole(v) and 0 <= v < 2**63, "a whole number from 0 to 2^63 - 1")
POSITIVE = Rule(lambda v: _is_number(v) and v > 0, "a number above 0")
FRACTION = Rule(lambda v: _is_number(v) and 0 < v < 1, "a number between 0 and 1")
SECONDS = Rule(lambda v: _is_number(v) and v > 0, "a number of seconds above 0")
SECONDS_OR_ZERO = Rule(lambda v: _is_number(v) and v >= 0, "a number of seconds from 0 on")
SECONDS_OR_AUTO = Rule(
    lambda v: v == "auto" or (_is_number(v) and v > 0),
    "a number of seconds above 0, auto",
    may_be_null=True,
)
DIRECTORY = Rule(lambda v: v.strip() != "" and not is_url(v), "a local directory")
REMOTE = Rule(
    lambda v: check_url(v) is None,
    "a URL like s3://bucket/prefix; credentials come from the environment, not from it",
)
PATH_OR_URL = Rule(
    lambda v: v.strip() != "" and (not is_url(v) or check_url(v) is None),
    "a path or a URL without credentials",
)
PROGRAM = Rule(lambda v: not v or v[0].endswith(".py"), "a list: a .py file, and its arguments")
IMPORT_PATH = Rule(lambda v: v.count(":") == 1 and all(v.split(":")), "package.module:callable")
INTERVAL = Rule(
    lambda v: isinstance(v, bool) or (_is_whole(v) and v > 0),
    "true, false, or a whole number above 0",
)
KEPT = Rule(
    lambda v: (
        set(v) <= {"last", "every_steps", "best"}
        and all(n is None or (_is_whole(n) and n >= (k != "best")) for k, n in v.items())
    ),
    "{last: …, every_steps: …, best: …}, of which only best may be 0",
)
METRIC = Rule(
    lambda v: (
        isinstance(v, str) and v.rpartition(":")[0] != "" and v.rpartition(":")[2] in ("max", "min")
    ),
    "NAME:max or NAME:min",
)
SBATCH_OPTIONS = Rule(
    lambda v: all(o.startswith("-") and "\n" not in o for o in v),
    "options of sbatch, such as [--exclusive]",
)
SLURM_TIME = matching(
    r"\d+-\d+(:\d+){0,2}|\d+(:\d+){1,2}",
    "hours:minutes:seconds, or days-hours",
)
RENAMES = Rule(
    lambda v: all(map(_is_pattern, v)),
    "{'expression': 'replacement'}, with regular expressions that Python's re takes",
)
