"""What `init` was told."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any

from harness.checkpoint import retention
from harness.errors import UsageError
from harness.monitoring.trackers import check as check_metrics

AUTO = "auto"  # of `save_every_s`: as often as is worth it
SNAPSHOTS, WHEN_BUSY = ("overlapped", "checked", "at_once"), ("wait", "skip")
ON_MISMATCH, ENVIRONMENTS = ("warn", "stop"), ("warn", "refuse")

NUMBERS = {  # a whole one, may it be 0, may it be None
    "seed": (True, True, False), "epochs": (True, False, False), "max_steps": (True, False, True), "accumulate": (True, False, False),
    "global_batch_size": (True, False, True), "num_workers": (True, True, False), "log_every_steps": (True, False, False),
    "save_every_steps": (True, False, True), "save_every_s": (False, True, True), "wait_s": (False, True, False),
    "keep_last": (True, False, False), "keep_every_steps": (True, False, True), "keep_best": (True, True, False),
    "timeout_s": (False, False, False), "step_timeout_s": (False, False, True), "grace_s": (False, False, True),
    "margin_s": (False, True, False),
}  # fmt: skip


def check_numbers(given: Mapping[str, Any]) -> None:
    """Raises UsageError, with a line for each, if what stands in `NUMBERS` is not such a number."""
    wrong = []
    for name, (whole, zero, optional) in NUMBERS.items():
        value = given.get(name, 1)
        if (value is None and optional) or (name == "save_every_s" and value == AUTO):
            continue
        if not isinstance(value, Integral if whole else Real) or isinstance(value, bool) or float(value) < 0 or (not zero and value == 0):
            also = ", auto" * (name == "save_every_s") + ", or None" * optional
            wrong.append(f"found: {name}={value!r}, expected: a {'whole ' * whole}number {'from 0 on' if zero else 'above 0'}{also}")
    if wrong:
        raise UsageError(f"{len(wrong)} argument{'s are' if len(wrong) > 1 else ' is'} not as expected", "\n".join(wrong))


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
    on_mismatch: str = "warn"
    rehearse: bool = True
    environment: str = "warn"

    def __post_init__(self) -> None:
        check_metrics(self.log_to)
        words = {"snapshot": SNAPSHOTS, "when_busy": WHEN_BUSY, "on_mismatch": ON_MISMATCH, "environment": ENVIRONMENTS}
        for name, allowed in words.items():
            value = getattr(self, name)
            if value not in allowed:
                raise UsageError(f"{name} is none of {', '.join(allowed)}", f"found: {value!r}")

    def saves_at(self, step: int) -> bool:
        """Whether a checkpoint of this step is due by its number."""
        return bool(self.save_every_steps and step % self.save_every_steps == 0)

    def remembers_at(self, step: int) -> bool:
        """Whether this step is to be kept in memory."""
        return bool(self.memory_every_steps and step % self.memory_every_steps == 0)
