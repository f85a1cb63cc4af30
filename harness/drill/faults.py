"""Which faults there are, and when they come: a pure function of a seed."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Kind:
    """One way to hurt a run: where the run has to be for it, what is done to it, in words."""

    point: str  # of `run/drilled.py`
    words: str
    signal: str = "SIGKILL"
    whom: str = "tree"  # the whole tree, one rank, or the launcher
    needs: str = ""  # what not every run has: a remote, an evaluation, a second epoch, workers


KINDS = {
    "kill": Kind("step", "SIGKILL of the whole tree"),
    "kill-rank": Kind("step", "SIGKILL of one rank", whom="rank"),
    "sigterm": Kind("step", "SIGTERM to the launcher, as before a preemption", "SIGTERM", "launcher"),
    "sigusr1": Kind("step", "SIGUSR1 to the launcher, as from a scheduler", "SIGUSR1", "launcher"),
    "startup": Kind("startup", "SIGKILL while it starts"),
    "first-step": Kind("first", "SIGKILL in the first step after a start"),
    "save": Kind("save", "SIGKILL while a checkpoint is written"),
    "epoch-end": Kind("epoch", "SIGKILL at the end of an epoch", needs="epochs"),
    "evaluation": Kind("evaluation", "SIGKILL in an evaluation", needs="evaluation"),
    "lost-disk": Kind("step", "SIGKILL, and run.dir is lost", needs="remote"),
    "workers": Kind("step", "SIGKILL, and another num_workers afterwards", needs="workers"),
}
AT_ONCE = ("startup", "first-step")  # whenever the next process comes there


@dataclass(frozen=True)
class Fault:
    """One fault of a drill."""

    number: int
    kind: str
    step: int  # it comes in this step, or when the run is at its place for the first time after it
    share: float  # how far into the step, 0 to 1

    def plan(self) -> dict[str, Any]:
        """What the run has to know of it."""
        return asdict(self) | {"point": KINDS[self.kind].point}


def planned(count: int, kinds: Sequence[str], last_step: int, seed: int) -> list[Fault]:
    """So many faults of these kinds, spread over the steps of a run; each kind comes once before any comes twice."""
    draw = random.Random(seed)
    order: list[str] = []
    while len(order) < count and kinds:
        order += draw.sample(list(kinds), len(kinds))
    found = []
    for number, kind in enumerate(order[:count]):
        step = 1 + int((number + draw.random()) * last_step / count)
        found.append(Fault(number, kind, 0 if kind in AT_ONCE else min(step, last_step), draw.random()))
    return found
