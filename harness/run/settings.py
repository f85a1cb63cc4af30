"""What `init` was told."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from harness.checkpoint import retention
from harness.errors import UsageError
from harness.run.metrics import check as check_metrics
from harness.run.timer import AUTO

SNAPSHOTS, WHEN_BUSY = ("overlapped", "checked", "at_once"), ("wait", "skip")


@dataclass(frozen=True)
class Settings:
    """How a run saves, what it keeps, and what it insists on."""

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

    def __post_init__(self) -> None:
        check_metrics(self.log_to)
        for name, value, allowed in (("snapshot", self.snapshot, SNAPSHOTS), ("when_busy", self.when_busy, WHEN_BUSY)):
            if value not in allowed:
                raise UsageError(f"{name} is none of {', '.join(allowed)}", f"found: {value!r}")
        if isinstance(self.save_every_s, str) and self.save_every_s != AUTO:
            raise UsageError("save_every_s is a number of seconds, auto, or None", f"found: {self.save_every_s!r}")

    def saves_at(self, step: int) -> bool:
        """Whether a checkpoint of this step is due by its number."""
        return bool(self.save_every_steps and step % self.save_every_steps == 0)

    def remembers_at(self, step: int) -> bool:
        """Whether this step is to be kept in memory."""
        return bool(self.memory_every_steps and step % self.memory_every_steps == 0)
