"""Validated arguments of `harness.init`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from harness.checkpoint import retention
from harness.config.init_arguments import DEFAULTS, check
from harness.monitoring.trackers import check as check_metrics

AUTO = "auto"  # value of `save_every_s`: choose the interval from measured costs


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
