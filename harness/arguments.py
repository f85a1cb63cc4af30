"""Validated arguments of `harness.init`."""

from __future__ import annotations

import argparse
import dataclasses
import os
import types
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from harness.checkpoint import retention
from harness.config.init_arguments import DEFAULTS, check
from harness.errors import UsageError
from harness.monitoring.trackers import check as check_metrics

AUTO = "auto"  # value of `save_every_s`: choose the interval from measured costs


def _is_named(value: Any) -> bool:
    return isinstance(value, Mapping) and all(isinstance(name, str) for name in value)


# By argument of `init` or `batches` that no rule of a setting checks: whether a value is one of
# those that it may have besides None, and these in words.
KINDS: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "directory": (
        lambda v: isinstance(v, str | os.PathLike) and str(v).strip() != "",
        "the path of a directory, or None",
    ),
    "remote": (lambda v: isinstance(v, str), "a URL like s3://bucket/prefix, or None"),
    "config": (
        lambda v: isinstance(plain_config(v), Mapping),
        "a dict of plain data, an argparse.Namespace, or an object of a dataclass",
    ),
    "override": (
        lambda v: (
            isinstance(v, Collection) and not isinstance(v, str) and set(map(type, v)) <= {str}
        ),
        'a list of names, as in ["lr"]',
    ),
    "collate_fn": (callable, "a function from a list of samples to a batch"),
    "order": (
        callable,
        "a function from an epoch to its sample numbers, order=lambda epoch: numbers. One order for"
        " all epochs: order=lambda epoch: [4, 2, …]. A sampler: DataLoader(…, sampler=sampler)",
    ),
    "beside": (
        _is_named,
        'datasets or DataLoaders by name, as in beside={"unlabelled": loader}',
    ),
} | dict.fromkeys(
    ("shuffle", "drop_last", "check_stream", "deterministic", "is_scratch", "rehearse"),
    (lambda v: not isinstance(v, str), "True or False"),
)


def check_kinds(given: Mapping[str, Any]) -> None:
    """Check arguments of `init` or `batches` that no rule of a setting checks.

    Raises:
        UsageError: Some values are of another kind; the message has a line for each of them.
    """
    wrong = [
        f"found: {name}={_shown(given[name])}, expected: {expected}"
        for name, (is_right, expected) in KINDS.items()
        if given.get(name) is not None and not is_right(given[name])
    ]
    if "override" in given and given["override"] is None:
        wrong.append("found: override=None, expected: a list of names, or none: []")
    if wrong:
        raise UsageError(
            f"{len(wrong)} argument{'s are' if len(wrong) > 1 else ' is'} not as expected",
            "\n".join(wrong),
        )


def _shown(value: Any) -> str:
    """Return a value for a message, in one short line."""
    is_short = isinstance(value, str | int | float) or len(repr(value)) < 40
    return repr(value)[:200] if is_short else f"a {type(value).__name__}"


def plain_config(value: Any) -> Any:
    """Return a config in which namespaces and objects of dataclasses are dicts, at any depth."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {each.name: getattr(value, each.name) for each in dataclasses.fields(value)}
    elif isinstance(value, argparse.Namespace | types.SimpleNamespace):
        value = vars(value)
    if type(value) is dict or (isinstance(value, Mapping) and not isinstance(value, dict)):
        return {name: plain_config(item) for name, item in value.items()}
    return [plain_config(item) for item in value] if type(value) is list else value


@dataclass(frozen=True)
class Settings:
    """Validated arguments of `harness.init`, which documents them.

    `policy` and `remote_policy` hold the retention of the first and of a remote store;
    `memory_every_steps` holds the interval of the memory tier, None if it is off.

    Raises:
        UsageError: A value is none of those that are allowed.
    """

    seed: int = DEFAULTS["seed"]
    save_every_s: float | str | None = DEFAULTS["save_every_s"]
    save_every_steps: int | None = DEFAULTS["save_every_steps"]
    policy: retention.Policy = field(default_factory=retention.Policy)
    remote_policy: retention.Policy = field(default_factory=retention.Policy)
    wait_s: float = DEFAULTS["wait_s"]
    config: dict[str, Any] = field(default_factory=dict)
    accept: tuple[str, ...] = DEFAULTS["accept"]
    override: tuple[str, ...] = DEFAULTS["override"]
    log_every_steps: int = DEFAULTS["log_every_steps"]
    step_timeout_s: float | None = DEFAULTS["step_timeout_s"]
    grace_s: float | None = DEFAULTS["grace_s"]
    margin_s: float = DEFAULTS["margin_s"]
    is_scratch: bool = DEFAULTS["is_scratch"]
    notices: str | None = DEFAULTS["notices"]
    snapshot: str = DEFAULTS["snapshot"]
    when_busy: str = DEFAULTS["when_busy"]
    memory_every_steps: int | None = None
    log_to: tuple[str, ...] = DEFAULTS["log_to"]
    on_mismatch: str = DEFAULTS["on_mismatch"]
    rehearse: bool = DEFAULTS["rehearse"]
    environment: str = DEFAULTS["environment"]

    def __post_init__(self) -> None:
        check(vars(self))
        check_metrics(self.log_to)

    def saves_at(self, step: int) -> bool:
        """Return whether a checkpoint of this step is due by the number of the step."""
        return bool(self.save_every_steps and step % self.save_every_steps == 0)

    def remembers_at(self, step: int) -> bool:
        """Return whether this step is to be kept in the memory tier."""
        return bool(self.memory_every_steps and step % self.memory_every_steps == 0)
