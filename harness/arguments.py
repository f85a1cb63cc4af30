"""Validated arguments of `harness.init`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from harness.checkpoint import retention
from harness.config.rules import COUNT, Rule
from harness.config.table import settings
from harness.errors import UsageError
from harness.monitoring.trackers import check as check_metrics

AUTO = "auto"  # value of `save_every_s`: choose the interval from measured costs
# Arguments whose default is another one than that of the setting, and those that have no setting.
OTHER_DEFAULTS: dict[str, Any] = {"seed": 0, "best": "val_loss:min"}
OTHER_RULES = {"accumulate": COUNT}
MAY_BE_NONE = ("global_batch_size", "remote_keep")  # a DataLoader has the first, too
BY_ARGUMENT = {of.argument: of for of in settings() if of.argument}
DEFAULTS: Mapping[str, Any] = {
    name: tuple(of.default) if isinstance(of.default, list) else of.default
    for name, of in BY_ARGUMENT.items()
} | OTHER_DEFAULTS
# By argument: the rule, and whether None is allowed, too.
RULES = {
    name: (of.rule, of.may_be_null or name in MAY_BE_NONE)
    for name, of in BY_ARGUMENT.items()
    if of.rule
} | {name: (rule, False) for name, rule in OTHER_RULES.items()}


def check(given: Mapping[str, Any]) -> None:
    """Check the arguments of `init`, `batches` or `steps` by the rules of the settings.

    Ignores names that belong to no setting.

    Raises:
        UsageError: Some values are not allowed; the message has a line for each of them.
    """
    wrong = []
    for name, (rule, may_be_none) in RULES.items():
        if name in given and not (
            may_be_none if given[name] is None else _holds(rule, given[name])
        ):
            allowed = rule.allowed + ", or None" * may_be_none
            wrong.append(f"found: {name}={given[name]!r}, expected: {allowed}")
    if wrong:
        raise UsageError(
            f"{len(wrong)} argument{'s are' if len(wrong) > 1 else ' is'} not as expected",
            "\n".join(wrong),
        )


def _holds(rule: Rule, value: Any) -> bool:
    try:
        return rule.holds(value)
    except (TypeError, AttributeError, ValueError):  # of another type
        return False


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
