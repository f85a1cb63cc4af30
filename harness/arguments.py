"""Validated arguments of `harness.init`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any

from harness.checkpoint import retention
from harness.errors import UsageError
from harness.monitoring.trackers import check as check_metrics

AUTO = "auto"  # value of `save_every_s`: choose the interval from measured costs
SNAPSHOTS, WHEN_BUSY = ("overlapped", "checked", "at_once"), ("wait", "skip")
ON_MISMATCH, ENVIRONMENTS = ("warn", "stop"), ("warn", "refuse")

NUMBERS = {  # whether it must be whole, whether 0 is allowed, whether None is allowed
    "seed": (True, True, False),
    "epochs": (True, False, False),
    "max_steps": (True, False, True),
    "accumulate": (True, False, False),
    "global_batch_size": (True, False, True),
    "num_workers": (True, True, False),
    "log_every_steps": (True, False, False),
    "save_every_steps": (True, False, True),
    "save_every_s": (False, True, True),
    "wait_s": (False, True, False),
    "keep_last": (True, False, False),
    "keep_every_steps": (True, False, True),
    "keep_best": (True, True, False),
    "timeout_s": (False, False, False),
    "step_timeout_s": (False, False, True),
    "grace_s": (False, False, True),
    "margin_s": (False, True, False),
}


def check_numbers(given: Mapping[str, Any]) -> None:
    """Check the arguments that are named in `NUMBERS`; ignore all others.

    Raises:
        UsageError: Some are not numbers of their kind; the message has a line for each of them.
    """
    wrong = []
    for name, (whole, zero, optional) in NUMBERS.items():
        value = given.get(name, 1)
        if (value is None and optional) or (name == "save_every_s" and value == AUTO):
            continue
        if (
            not isinstance(value, Integral if whole else Real)
            or isinstance(value, bool)
            or float(value) < 0
            or (not zero and value == 0)
        ):
            also = ", auto" * (name == "save_every_s") + ", or None" * optional
            wrong.append(
                f"found: {name}={value!r}, expected: a {'whole ' * whole}number "
                f"{'from 0 on' if zero else 'above 0'}{also}"
            )
    if wrong:
        raise UsageError(
            f"{len(wrong)} argument{'s are' if len(wrong) > 1 else ' is'} not as expected",
            "\n".join(wrong),
        )


@dataclass(frozen=True)
class Settings:
    """Validated arguments of `harness.init`, which documents them.

    `policy` and `remote_policy` hold the retention of the first and of a remote store;
    `memory_every_steps` holds the interval of the memory tier, None if it is off.

    Raises:
        UsageError: A value is none of those that are allowed.
    """

    seed: int = 0
    save_every_s: float | str | None = 60.0
    save_every_steps: int | None = None
    policy: retention.Policy = field(default_factory=retention.Policy)
    remote_policy: retention.Policy = field(default_factory=retention.Policy)
    wait_s: float = 300.0
    config: dict[str, Any] = field(default_factory=dict)
    accept: tuple[str, ...] = ()
    override: tuple[str, ...] = ()
    log_every_steps: int = 10
    step_timeout_s: float | None = None
    grace_s: float | None = None
    margin_s: float = 30.0
    is_scratch: bool = False
    notices: str | None = None
    snapshot: str = "overlapped"
    when_busy: str = "wait"
    memory_every_steps: int | None = None
    log_to: tuple[str, ...] = ()
    on_mismatch: str = "warn"
    rehearse: bool = True
    environment: str = "warn"

    def __post_init__(self) -> None:
        check_metrics(self.log_to)
        words = {
            "snapshot": SNAPSHOTS,
            "when_busy": WHEN_BUSY,
            "on_mismatch": ON_MISMATCH,
            "environment": ENVIRONMENTS,
        }
        for name, allowed in words.items():
            value = getattr(self, name)
            if value not in allowed:
                raise UsageError(f"{name} is none of {', '.join(allowed)}", f"found: {value!r}")

    def saves_at(self, step: int) -> bool:
        """Return whether a checkpoint of this step is due by the number of the step."""
        return bool(self.save_every_steps and step % self.save_every_steps == 0)

    def remembers_at(self, step: int) -> bool:
        """Return whether this step is to be kept in the memory tier."""
        return bool(self.memory_every_steps and step % self.memory_every_steps == 0)
