"""The measurements of a run: logged losses, metrics of evaluations, and the best metric so far."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch

from harness.distributed.dtensors import is_sharded, replicated
from harness.errors import UsageError
from harness.text import now

if TYPE_CHECKING:
    from harness.distributed.ranks import World

# Keys of numbers that the ranks exchange: the last loss, and the steps since it was logged. Those
# of logged values begin with a number.
LOSS, SINCE = "last loss", "steps since"
# Names that every event has.
EVERYWHERE = ("event", "kind", "time", "step", "of", "spent")


class MetricBuffer:
    """The values of the present step, and those that last beyond it or wait to be gathered.

    Args:
        better: Function from new metrics and the best value so far to the best value, and whether
            to save a checkpoint for it.
    """

    def __init__(
        self, better: Callable[[dict[str, float], float | None], tuple[float | None, bool]]
    ) -> None:
        self._better = better
        self.loss: float | None = None
        self.metrics: dict[str, float] = {}  # of the last evaluation
        self.best: float | None = None
        # Metrics that were measured on exactly the weights of this step.
        self.of_this_step: dict[str, float] = {}
        self.new_best = False
        self.logged: dict[str, Any] = {}  # by this step
        # The last loss that this rank has logged in an earlier step, and how many steps it has
        # made since; the number is the same on all ranks that have logged their losses together.
        self._last: tuple[Any, int] | None = None
        # Result of the last `read`: step, rank, name, value.
        self.by_rank: list[tuple[int, int, str, float]] = []
        # Steps that `read` has not returned yet: step, time, logged values.
        self._held: list[tuple[int, str, dict[str, Any]]] = []

    @property
    def holds(self) -> bool:
        """Return whether steps wait for `read`; the result is the same on all ranks."""
        return bool(self._held)

    def begin_step(self) -> None:
        """Clear the values of the previous step; keep its loss until another one is logged."""
        if self._last is not None:
            self._last = self._last[0], self._last[1] + 1
        if (loss := self.logged.get("loss")) is not None:
            self._last = loss.clone() if isinstance(loss, torch.Tensor) else loss, 1
        self.of_this_step, self.new_best, self.logged = {}, False, {}

    def hold(self, step: int) -> None:
        """Buffer the values that this step has logged until the next `read`.

        Gathering them in each step would make the ranks wait for each other.
        """
        copies = {
            name: value.clone() if isinstance(value, torch.Tensor) else value
            for name, value in self.logged.items()
        }
        self._held.append((step, now(), copies))

    def log(self, values: Mapping[str, Any]) -> None:
        """Add to the logged values of this step; tensors are not read from the device.

        Raises:
            UsageError: A value is not one number, or its name is one that every event has.
        """
        check_loggable(values)
        for name, value in values.items():
            self.logged[name] = _logged(name, value) if isinstance(value, torch.Tensor) else value

    def evaluated(self, metrics: dict[str, float]) -> None:
        """Add the metrics of an evaluation, and update the best value.

        The metrics of several evaluations in one step are merged.
        """
        self.of_this_step = self.metrics = self.of_this_step | metrics
        self.best, improved = self._better(metrics, self.best)
        self.new_best = self.new_best or improved

    def read(self, world: World) -> list[tuple[int, str, dict[str, float]]]:
        """Return the steps buffered since the last call, with the means over ranks of their values.

        This also sets `loss` to the mean loss of the last step that logged one, and `by_rank` to
        the values of each rank in the buffered steps. A mean is over the ranks that have logged the
        name in that step. Names that rank 0 has not logged have no mean; names that this rank has
        not logged are not in `by_rank`.

        Collective: every rank must call it.

        Returns:
            For each step its number, its time, and the means by name.
        """
        held, self._held = self._held, []
        logged = dict(enumerate(values for _, _, values in held))
        last = (self.logged["loss"], 0) if "loss" in self.logged else self._last
        parts = world.gather_numbers(
            {
                f"{at} {name}": float(value)
                for at, values in logged.items()
                for name, value in values.items()
            }
            | ({LOSS: float(last[0]), SINCE: float(last[1])} if last is not None else {})
        )
        losses = [(part.pop(SINCE), part.pop(LOSS)) for part in parts if LOSS in part]
        if losses:
            newest = [loss for since, loss in losses if since == min(losses)[0]]
            self.loss = sum(newest) / len(newest)
        self.by_rank = [
            (held[at][0], rank, name, part[f"{at} {name}"])
            for rank, part in enumerate(parts)
            for at in range(len(held))
            for name in logged[at]
            if f"{at} {name}" in part
        ]
        means = {
            key: sum(part[key] for part in parts if key in part)
            / sum(key in part for part in parts)
            for key in parts[0]
        }
        named: list[dict[str, float]] = [{} for _ in held]
        for key, mean in means.items():
            row, _, name = key.partition(" ")
            named[int(row)][name] = mean
        return [(step, at, values) for (step, at, _), values in zip(held, named, strict=True)]

    def state(self) -> dict[str, Any]:
        """Return the values that are saved in a checkpoint."""
        return {"loss": self.loss, "metrics": self.metrics, "best": self.best}

    def restore(self, payload: Mapping[str, Any]) -> None:
        """Restore the values from a checkpoint's payload."""
        self.loss, self.metrics, self.best = payload["loss"], payload["metrics"], payload["best"]


def check_loggable(values: Mapping[str, Any], by: str = "log") -> None:
    """Raise UsageError if a value is not one number, or has a name that every event has.

    No value is read from the device.
    """
    for name, value in values.items():
        if name in EVERYWHERE:
            raise UsageError(
                f"nothing that is logged can be called {name!r}",
                f"reserved, because every event has them: {', '.join(EVERYWHERE)}",
                "Give it another name.",
            )
        if not _is_number(value):
            raise UsageError(
                f"log({name}=…) takes one number"
                if by == "log"
                else f"{by}() takes one number as {name}",
                f"found: {str(value)[:200]}",
                "Log a number or a tensor with one element.",
            )


def _is_number(value: Any) -> bool:
    if isinstance(value, torch.Tensor):
        return value.numel() == 1 and not value.is_complex()
    return hasattr(value, "__float__") and getattr(value, "size", 1) == 1


def _logged(name: str, value: Any) -> torch.Tensor:
    """Return a tensor as a plain one. Raises UsageError if it is spread over the ranks."""
    if not is_sharded(value):
        detached: torch.Tensor = value.detach()
        return detached
    if (whole := replicated(value)) is None:
        raise UsageError(
            f"log({name}=…) takes one number",
            f"found: a sharded tensor, {value.placements}",
            f"Log the whole of it: {name}.full_tensor(), on every rank.",
        )
    return whole
