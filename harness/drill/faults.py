"""The kinds of faults, and the schedule of a drill, which is a pure function of a seed."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Kind:
    """A kind of fault: the point of the run at which it is due, the signal, and who gets it."""

    point: str  # name of the point in `run/drill_hooks.py`
    description: str  # for people
    signal: str = "SIGKILL"
    whom: str = "tree"  # the whole process tree ("tree"), one rank ("rank"), or the launcher
    # Feature of the run without which the fault cannot occur: remote, evaluation, epochs (more than
    # one) or workers; "" if every run has it.
    needs: str = ""


KINDS = {
    "kill": Kind("step", "SIGKILL of the whole tree"),
    "kill-rank": Kind("step", "SIGKILL of one rank", whom="rank"),
    "sigterm": Kind(
        "step", "SIGTERM to the launcher, as before a preemption", "SIGTERM", "launcher"
    ),
    "sigusr1": Kind("step", "SIGUSR1 to the launcher, as from a scheduler", "SIGUSR1", "launcher"),
    "startup": Kind("startup", "SIGKILL while it starts"),
    "first-step": Kind("first", "SIGKILL in the first step after a start"),
    "save": Kind("save", "SIGKILL while a checkpoint is written"),
    "epoch-end": Kind("epoch", "SIGKILL at the end of an epoch", needs="epochs"),
    "evaluation": Kind("evaluation", "SIGKILL in an evaluation", needs="evaluation"),
    "lost-disk": Kind("step", "SIGKILL, and run.dir is lost", needs="remote"),
    "workers": Kind("step", "SIGKILL, and another num_workers afterwards", needs="workers"),
}
AT_ONCE = ("startup", "first-step")  # due as soon as the next process reaches the point


@dataclass(frozen=True)
class Fault:
    """One fault of a drill."""

    number: int
    kind: str
    step: int  # due when the run reaches the point of its kind in this step or a later one
    # From 0 to 1. Delay within the step, relative to the duration of the previous step; for
    # "kill-rank" it also selects the rank.
    share: float

    def plan(self) -> dict[str, Any]:
        """Return the entry of the fault in the plan that the run reads."""
        return asdict(self) | {"point": KINDS[self.kind].point}


def planned(count: int, kinds: Sequence[str], last_step: int, seed: int) -> list[Fault]:
    """Draw a schedule of faults that is spread over the steps of a run.

    Each kind occurs once before any kind occurs twice.

    Args:
        count: Number of faults.
        kinds: Kinds to draw from; without any kind there are no faults.
        last_step: Last step of the run.
        seed: Seed of the generator; the same seed gives the same schedule.
    """
    draw = random.Random(seed)
    order: list[str] = []
    while len(order) < count and kinds:
        order += draw.sample(list(kinds), len(kinds))
    faults = []
    for number, kind in enumerate(order[:count]):
        step = 1 + int((number + draw.random()) * last_step / count)
        faults.append(
            Fault(number, kind, 0 if kind in AT_ONCE else min(step, last_step), draw.random())
        )
    return faults
