"""Compare the samples and losses of one recomputed step with those of the original step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from harness.selfcheck.identity import AttemptIdentities
from harness.selfcheck.known_steps import MEAN, KnownSteps
from harness.supervision.restart_messages import DATA, LOSS

FEW = 10  # number of steps to compare where even two uninterrupted runs would differ
TOLERANCE, HALF_TOLERANCE = 1e-3, 1e-2  # relative
HALF = (torch.float16, torch.bfloat16)


class LossTolerance:
    """The relative tolerance for losses where steps are not expected to be equal bit for bit.

    It is wider in half precision.

    Args:
        precision: The setting train.precision, or None in the user's own loop.
        device: The device that computes the steps.
    """

    def __init__(self, precision: Any, device: torch.device) -> None:
        # Autocast in the user's own loop cannot be detected here; most loops on a GPU use it.
        self._is_half = precision in ("bf16", "fp16") or (
            precision is None and device.type != "cpu"
        )

    def look_at(self, tracked: Mapping[str, Any]) -> None:
        """Set the tolerance for half precision if a tracked object uses it."""
        for obj in tracked.values():
            if isinstance(obj, torch.nn.Module):
                self._is_half = self._is_half or any(
                    parameter.dtype in HALF for parameter in obj.parameters()
                )
            self._is_half = self._is_half or type(obj).__name__ == "GradScaler"

    @property
    def relative(self) -> float:
        """Return the tolerance, relative to the greater one of two losses."""
        return HALF_TOLERANCE if self._is_half else TOLERANCE


@dataclass(frozen=True)
class StepDifference:
    """A value of a recomputed step that is not equal to the recorded one."""

    before: int  # the attempt that has recorded the original step
    fields: dict[str, Any]  # step, kind of the difference, original and recomputed value
    is_exact: bool  # whether the values were compared without a tolerance


class StepComparison:
    """Compares values of recomputed steps, and counts the steps that were compared.

    Args:
        known: The recorded values.
        origin: Step of the resume point.
        identities: Machines and programs of the attempts.
        tolerance: Tolerance for losses that are not compared exactly.
    """

    def __init__(
        self,
        known: KnownSteps,
        origin: int,
        identities: AttemptIdentities,
        tolerance: LossTolerance,
    ) -> None:
        self.known = known
        self._origin, self._identities, self._tolerance = origin, identities, tolerance
        self._of_samples: set[int] = set()  # steps whose samples were compared
        self._of_losses: set[int] = set()  # steps whose losses were compared
        self._loose: list[str] = []  # why losses were compared with a tolerance

    def samples(self, step: int, now: bytes | None) -> StepDifference | None:
        """Compare the digest of a step's sample numbers; return the difference, or None.

        None means as well that there is nothing to compare.
        """
        if now is None or (recorded := self.known.take_samples(step)) is None:
            return None
        number, was = recorded
        self._of_samples.add(step)
        if was == now:
            return None
        fields = {"step": step, "what": DATA, "was": was.hex(), "now": now.hex()}
        return StepDifference(number, fields, is_exact=True)

    def loss(
        self, step: int, rank: int, short: int, name: str, now: float
    ) -> StepDifference | None:
        """Compare a loss of a step; return the difference, or None.

        None means as well that there is nothing to compare.

        Args:
            step: Number of the step.
            rank: Rank that has logged the loss, or MEAN.
            short: Short name of the loss.
            name: Name under which the loss was logged.
            now: Recomputed value.
        """
        if (recorded := self.known.take_loss(step, rank, short)) is None:
            return None
        number, was = recorded
        is_exact = self._identities.is_exact(number)
        if not is_exact and step > self._origin + FEW:
            return None
        self._of_losses.add(step)
        if not is_exact:
            self._loose = self._identities.unlike(number) or ["without deterministic"]
        if _equal(was, now, 0.0 if is_exact else self._tolerance.relative):
            return None
        where = {} if rank == MEAN else {"rank": rank}
        fields = {"step": step, "what": LOSS, "name": name, "was": was, "now": now} | where
        return StepDifference(number, fields, is_exact)

    def counts(self) -> dict[str, Any]:
        """Return how many steps were compared, and with what tolerance, for the result."""
        return {
            "compared": len(self._of_losses or self._of_samples),
            "of_samples": len(self._of_samples),
            "of_losses": len(self._of_losses),
        } | ({"tolerance": self._tolerance.relative, "why": self._loose} if self._loose else {})


def _equal(was: float, now: float, tolerance: float) -> bool:
    if was == now or (math.isnan(was) and math.isnan(now)):
        return True
    return bool(tolerance) and abs(was - now) <= tolerance * max(abs(was), abs(now))
