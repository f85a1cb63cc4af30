"""What earlier attempts have recorded of the steps that are recomputed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from harness.selfcheck import step_records

MEAN = -1  # in place of a rank: the mean over all ranks


@dataclass
class Known:
    """The recorded values of one step, each with the newest attempt that has recorded it."""

    samples: tuple[int, bytes] | None = None
    # (rank or MEAN, short name) -> (attempt, loss)
    losses: dict[tuple[int, int], tuple[int, float]] = field(default_factory=dict)


class KnownSteps:
    """The recorded values of all steps after the resume point.

    Each value is taken once, to be compared with the recomputed one.

    Args:
        before: Step records of earlier attempts.
        origin: Step of the resume point.
        machines: The machine of each attempt that has step records, by its number.
        machine: The machine of the current attempt.
    """

    def __init__(
        self,
        before: step_records.Before,
        origin: int,
        machines: Mapping[int, Mapping[str, Any]],
        machine: Mapping[str, Any],
    ) -> None:
        world_sizes = {number: _ranks(known) for number, known in machines.items()}
        world_size = _ranks(machine)
        self._steps = {
            step: _known(lines, world_sizes, world_size)
            for step, lines in before.after(origin).items()
        }

    @property
    def last(self) -> int:
        """Return the last recorded step, or 0."""
        return max(self._steps, default=0)

    @property
    def has_losses(self) -> bool:
        """Return whether there is a loss that was not taken yet."""
        return any(known.losses for known in self._steps.values())

    def take_samples(self, step: int) -> tuple[int, bytes] | None:
        """Return the digest of a step's sample numbers and the attempt that has recorded it."""
        if (known := self._steps.get(step)) is None:
            return None
        taken, known.samples = known.samples, None
        return taken

    def take_loss(self, step: int, rank: int, name: int) -> tuple[int, float] | None:
        """Return a loss of a step and the attempt that has recorded it.

        Args:
            step: Number of the step.
            rank: Rank that has logged the loss, or MEAN.
            name: Short name of the loss.
        """
        known = self._steps.get(step)
        return known.losses.pop((rank, name), None) if known is not None else None

    def clear(self) -> None:
        """Drop all values."""
        self._steps = {}


def _ranks(machine: Mapping[str, Any]) -> tuple[Any, Any]:
    """Return the number of ranks of an attempt, and over how many samples are dealt if fewer."""
    return machine.get("world_size"), machine.get("data_size")


def _known(
    lines: list[tuple[int, step_records.Line]],
    world_sizes: Mapping[int, tuple[Any, Any]],
    world_size: tuple[Any, Any],
) -> Known:
    """Return the recorded values of one step.

    The losses are those of each rank if the attempt had as many ranks as this one, else their means
    over the ranks.

    Args:
        lines: Lines of the step, each with the number of its attempt; the newest comes last.
        world_sizes: `_ranks` of each attempt.
        world_size: `_ranks` of the current attempt.
    """
    known = Known()
    ranks: dict[tuple[int, int], dict[int, float]] = {}
    for number, line in lines:
        if line.samples is not None:
            known.samples = number, line.samples
        if line.loss is not None and world_sizes[number] == world_size:
            known.losses[line.rank, line.name] = number, line.loss
        elif line.loss is not None:
            ranks.setdefault((number, line.name), {})[line.rank] = line.loss
    for (number, name), values in ranks.items():
        if len(values) == world_sizes[number][0]:
            known.losses[MEAN, name] = number, sum(values.values()) / len(values)
    return known
