"""What a run has measured: the losses that were logged, the metrics of evaluations, the best so far."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from harness.checkpoint import retention
from harness.ranks import World


class Measured:
    """Values of the present step, and those that are carried on."""

    def __init__(self) -> None:
        self.loss: float | None = None
        self.metrics: dict[str, float] = {}  # of the last evaluation
        self.best: float | None = None
        self.of_this_step: dict[str, float] = {}  # metrics that were measured on the very weights of this step
        self.new_best = False
        self._logged: dict[str, Any] = {}

    def begin_step(self) -> None:
        self.of_this_step, self.new_best, self._logged = {}, False, {}

    def log(self, values: Mapping[str, Any]) -> None:
        """Keep what a step logged; tensors are not read."""
        self._logged = {name: value.detach() if isinstance(value, torch.Tensor) else value for name, value in values.items()}

    def evaluated(self, found: dict[str, float], policy: retention.Policy) -> None:
        """Take in what an evaluation found; several in one step add up."""
        self.of_this_step = self.metrics = self.of_this_step | found
        self.best, improved = retention.better(found, self.best, policy)
        self.new_best = self.new_best or improved

    def read(self, world: World) -> dict[str, float]:
        """The means over ranks of what was logged in this step. Collective: every rank must call it."""
        parts = world.gather_numbers({name: float(value) for name, value in self._logged.items()})
        values = {name: sum(part[name] for part in parts if name in part) / sum(name in part for part in parts) for name in parts[0]}
        self.loss = values.get("loss", self.loss)
        return values

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of it."""
        return {"loss": self.loss, "metrics": self.metrics, "best": self.best}

    def restore(self, payload: Mapping[str, Any]) -> None:
        """Take over what a checkpoint kept."""
        self.loss, self.metrics, self.best = payload["loss"], payload["metrics"], payload["best"]
