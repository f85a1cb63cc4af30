"""Take the defaults and the rules of the arguments of `harness.init` from the settings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from harness.config.rules import COUNT, Rule
from harness.config.table import settings
from harness.errors import UsageError

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
