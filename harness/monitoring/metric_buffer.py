"""What a run has measured: the losses that were logged, the metrics of evaluations, the best so far."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from harness.checkpoint import retention
from harness.checkpoint.attempts import now
from harness.distributed.ranks import World


class MetricBuffer:
    """Values of the present step, and those that are carried on."""

    def __init__(self) -> None:
        self.loss: float | None = None
        self.metrics: dict[str, float] = {}  # of the last evaluation
        self.best: float | None = None
        self.of_this_step: dict[str, float] = {}  # metrics that were measured on the very weights of this step
        self.new_best = False
        self.logged: dict[str, Any] = {}  # by this step
        self.by_rank: list[tuple[int, int, str, float]] = []  # what `read` found last: step, rank, name, value
        self._held: list[tuple[int, str, dict[str, Any]]] = []  # steps that are still to be told of, when they were, what they logged

    @property
    def holds(self) -> bool:
        """Whether there are steps to be told of; on all ranks alike."""
        return bool(self._held)

    def begin_step(self) -> None:
        self.of_this_step, self.new_best, self.logged = {}, False, {}

    def hold(self, step: int) -> None:
        """Keep what this step has logged until the ranks meet: to bring them together for each would make them wait for each other."""
        copies = {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in self.logged.items()}
        self._held.append((step, now(), copies))

    def log(self, values: Mapping[str, Any]) -> None:
        """Keep what a step logged; tensors are not read."""
        self.logged = {name: value.detach() if isinstance(value, torch.Tensor) else value for name, value in values.items()}

    def evaluated(self, found: dict[str, float], policy: retention.Policy) -> None:
        """Take in what an evaluation found; several in one step add up."""
        self.of_this_step = self.metrics = self.of_this_step | found
        self.best, improved = retention.better(found, self.best, policy)
        self.new_best = self.new_best or improved

    def read(self, world: World) -> list[tuple[int, str, dict[str, float]]]:
        """The steps that were held since the last call, when they were, and the means over ranks of what they logged; and `loss` is that
        of the present step. Collective: every rank must call it."""
        held, self._held = self._held, []
        logged = dict(enumerate([*(values for _, _, values in held), self.logged]))
        parts = world.gather_numbers({f"{at} {name}": float(value) for at, values in logged.items() for name, value in values.items()})
        self.by_rank = [
            (held[at][0], rank, name, part[f"{at} {name}"])
            for rank, part in enumerate(parts)
            for at in range(len(held))
            for name in logged[at]
            if f"{at} {name}" in part
        ]
        means = {key: sum(part[key] for part in parts if key in part) / sum(key in part for part in parts) for key in parts[0]}
        self.loss = means.get(f"{len(held)} loss", self.loss)
        named: list[dict[str, float]] = [{} for _ in held]
        for key, mean in means.items():
            row, _, name = key.partition(" ")
            if int(row) < len(held):
                named[int(row)][name] = mean
        return [(step, at, values) for (step, at, _), values in zip(held, named, strict=True)]

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of it."""
        return {"loss": self.loss, "metrics": self.metrics, "best": self.best}

    def restore(self, payload: Mapping[str, Any]) -> None:
        """Take over what a checkpoint kept."""
        self.loss, self.metrics, self.best = payload["loss"], payload["metrics"], payload["best"]
