"""One optimizer step: forward, backward, clip, update; without files or collectives of its own."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from harness.distributed.wrappers import unwrap, wrap
from harness.errors import NonFiniteError, UsageError
from harness.task import named

if TYPE_CHECKING:
    from harness.config.schema import TrainSettings
    from harness.distributed.ranks import World
    from harness.ema import Ema
    from harness.task import Task

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Stepper:
    """A task prepared for its ranks; calling it makes one optimizer step.

    It holds the modules, wrapped for DDP and compiled if the settings say so, the optimizers, the
    schedulers, the gradient scaler, and the moving averages of the weights. `begin` is called
    once the modules have their form for training: it may load the weights to begin with.
    """

    def __init__(
        self,
        task: Task,
        settings: TrainSettings,
        world: World,
        begin: Callable[[], object] = lambda: None,
    ) -> None:
        self.task, self.settings, self.device = task, settings, world.device
        self._is_sharded = settings.shard != "none" and world.joined
        self.optimizers = named(task.optimizers, "optimizer")
        self.modules, copies = self._prepared(world)
        begin()
        self.schedulers = named(task.schedulers, "scheduler")
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=settings.precision == "fp16")
        self.guard = FiniteGuard(settings.nonfinite, settings.nonfinite_limit)
        self.averages: dict[str, Ema] = {}
        if settings.ema_decay is not None:
            from harness.ema import Ema

            for name, average in copies.items():
                key = f"{name}_ema" if isinstance(task.modules, Mapping) else "ema"
                self.averages[key] = Ema(unwrap(self.modules[name]), average, settings.ema_decay)

    def _prepared(self, world: World) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return the modules for training on all ranks, and their copies for averages if asked for.

        Raises:
            UsageError: The settings do not fit the ranks, or the optimizers the settings.
        """
        from harness.meta.materialize import materialize_task, place

        settings, modules = self.settings, named(self.task.modules, "model")
        place(modules, world.device)
        copies = dict[str, Any]()
        if self._is_sharded and self.task.step is not None:
            raise UsageError(
                "train.shard does not go together with a task that has a `step` of its own",
                remedy="Write a loop of your own: fully_shard, run.track.",
            )
        if self._is_sharded or settings.checkpoint_activations:
            from harness.distributed import fsdp

            blocks, optimizers = self.task.blocks, self.optimizers.values()
            copies = fsdp.prepare(modules, blocks, optimizers, settings, world)
        elif settings.ema_decay is not None:
            copies = copy.deepcopy(modules)
        materialize_task(modules, copies, world.device)
        if not self._is_sharded:
            modules = {name: wrap(module, world) for name, module in modules.items()}
        if settings.compile:
            modules = {name: torch.compile(module) for name, module in modules.items()}
        return modules, copies

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        """Return the context of a forward pass; FSDP2 casts by itself."""
        return autocast(self.device, "fp32" if self._is_sharded else self.settings.precision)

    @property
    def tracked(self) -> dict[str, Any]:
        """All objects whose state must survive a restart, by name.

        Raises:
            UsageError: The task gives several of them the same name.
        """
        scaler = {"scaler": self.scaler} if self.scaler.is_enabled() else {}
        rest = scaler | self.averages | {"guard": self.guard}
        parts = (self.modules, self.optimizers, self.schedulers, rest)
        names = [name for part in parts for name in part]
        if twice := [name for name in names if names.count(name) > 1]:
            raise UsageError(
                f"several objects of the task have the name {twice[0]!r}",
                f"found: {', '.join(names)}",
                "Give each one a name of its own: Task(optimizers={NAME: …}, schedulers={…}).",
            )
        return dict(item for part in parts for item in part.items())

    def __call__(
        self, micro_batches: Sequence[Any], weights: Sequence[float], step: int
    ) -> dict[str, torch.Tensor]:
        """Run forward, backward, clip, update and schedule; return the values to log.

        Args:
            micro_batches: The micro-batches of this rank.
            weights: The factor for the mean loss of each micro-batch.
            step: Number of the step, for error messages.

        Raises:
            NonFiniteError: The gradients are not finite, and the policy does not allow a skip.
            UsageError: The task has no loss.
        """
        modules = list(self.modules.values())
        for optimizer in self.optimizers.values():
            optimizer.zero_grad()
        loss = backward(self._loss, micro_batches, weights, modules, self.scaler.scale)
        for optimizer in self.optimizers.values():
            self.scaler.unscale_(optimizer)
        norm = gradient_norm(modules, self.settings.clip_norm)
        allowed = self.guard.allows(
            norm,
            step,
            may_overflow=lambda: self.scaler.is_enabled() and self.scaler.get_scale() > 1,
        )
        for optimizer in self.optimizers.values() if allowed else ():
            self.scaler.step(optimizer)
        self.scaler.update()
        for optimizer in () if allowed else self.optimizers.values():
            optimizer.zero_grad()  # a save would wait for the update of remaining gradients
        for scheduler in self.schedulers.values():
            scheduler.step()
        return {"loss": loss}

    def average(self) -> None:
        """Update the moving averages with the present weights."""
        for average in self.averages.values():
            average.update()

    def _loss(self, batch: Any) -> torch.Tensor:
        if self.task.loss is None:
            raise UsageError(
                "the task has neither `loss` nor `step`", remedy="Give Task(…, loss=…)."
            )
        with self._autocast():
            return self.task.loss(self._as_given(self.modules), batch)

    def evaluate(self, batch: Any) -> dict[str, Any]:
        """Return the sums of the task over one batch.

        The sums with averaged modules, if there are any, have names that begin with `ema_`.

        Raises:
            UsageError: The task has neither `evaluate` nor `loss`.
        """
        sums = self._sums({name: unwrap(module) for name, module in self.modules.items()}, batch)
        if self.averages:
            averaged = {
                name: average.module
                for name, average in zip(self.modules, self.averages.values(), strict=True)
            }
            sums |= {f"ema_{name}": value for name, value in self._sums(averaged, batch).items()}
        return sums

    def _sums(self, modules: dict[str, nn.Module], batch: Any) -> dict[str, Any]:
        with self._autocast():
            if self.task.evaluate is not None:
                return dict(self.task.evaluate(self._as_given(modules), batch))
            if self.task.loss is None:
                raise UsageError(
                    "the task has eval_data, but neither `evaluate` nor `loss`",
                    remedy="Give Task(…, evaluate=…).",
                )
            return {
                "val_loss": self.task.loss(self._as_given(modules), batch) * batch_length(batch)
            }

    def _as_given(self, modules: dict[str, Any]) -> Any:
        return modules if isinstance(self.task.modules, Mapping) else modules["model"]


def batch_length(batch: Any) -> int:
    """Return the number of samples in a batch: the length of the first tensor in it."""
    while not isinstance(batch, torch.Tensor):
        batch = next(iter(batch.values() if isinstance(batch, Mapping) else batch))
    return len(batch)


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager[Any]:
    """Return the context of the forward pass: autocast for bf16 and fp16, nothing for fp32."""
    return (
        torch.autocast(device.type, DTYPES[precision])
        if precision in DTYPES
        else contextlib.nullcontext()
    )


def backward(
    losses: Callable[[Any], torch.Tensor],
    micro_batches: Sequence[Any],
    weights: Sequence[float],
    modules: Sequence[nn.Module],
    scale: Callable[[torch.Tensor], torch.Tensor] = lambda loss: loss,
) -> torch.Tensor:
    """Accumulate the gradients of all micro-batches; return the weighted loss, a detached scalar.

    Gradients are summed over ranks once, in the last backward pass. A loss that is not finite on
    one rank makes the gradients not finite on all ranks: the factor 1 + 0 * loss is exactly 1 for a
    finite loss and NaN otherwise.

    Args:
        losses: Function from a micro-batch to its mean loss, a scalar.
        micro_batches: The micro-batches of this rank.
        weights: The factor for the mean loss of each micro-batch.
        modules: The modules; those of DDP and FSDP2 do not sum gradients before the last one.
        scale: Scales a loss before its backward pass, as a gradient scaler does.
    """
    total = torch.zeros((), device="cpu")
    for at, (batch, weight) in enumerate(zip(micro_batches, weights, strict=True)):
        with contextlib.ExitStack() as stack:
            is_last = at + 1 == len(micro_batches)
            for module in modules:
                if hasattr(module, "set_requires_gradient_sync"):  # sharded
                    module.set_requires_gradient_sync(is_last)  # type: ignore[operator]
                elif hasattr(module, "no_sync") and not is_last:
                    stack.enter_context(module.no_sync())  # type: ignore[operator]
            loss = losses(batch)
            poison = 1.0 + 0.0 * loss.detach()
            scale(loss * weight * poison).backward()  # type: ignore[no-untyped-call]
        total = total.to(loss.device) + loss.detach().float() * weight
    return total


def gradient_norm(modules: Sequence[nn.Module], clip_norm: float | None) -> torch.Tensor:
    """Return the total L2 norm of the gradients, a scalar on the device.

    The gradients are clipped to `clip_norm`, unless it is None.
    """
    updated = [each for module in modules for each in module.parameters() if each.grad is not None]
    norm = nn.utils.clip_grad_norm_(updated, float("inf") if clip_norm is None else clip_norm)
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # of sharded gradients


class FiniteGuard:
    """A guard that decides whether an update may happen, with the same result on all ranks.

    The gradients of all ranks are the same, and so is their norm. The number of updates skipped in
    a row is saved in checkpoints.
    """

    def __init__(self, policy: str, limit: int) -> None:
        self.policy, self.limit = policy, limit
        self.skipped_in_a_row = 0

    def allows(
        self, norm: torch.Tensor, step: int, *, may_overflow: Callable[[], bool] = lambda: False
    ) -> bool:
        """Return whether to update.

        This is the only read of the device that a step needs; the policy "ignore" avoids it.

        Args:
            norm: Total norm of the gradients, a scalar on the device.
            step: Number of the step, for the error message.
            may_overflow: Returns True while a gradient scaler can still lower its scale. The update
                is then skipped, but not counted.

        Raises:
            NonFiniteError: The norm is not finite, and more updates in a row would be skipped than
                the policy allows: none for "stop", the limit for "skip".
        """
        if self.policy == "ignore" or bool(torch.isfinite(norm)):
            self.skipped_in_a_row = 0
            return True
        self.skipped_in_a_row += not may_overflow()
        limit = 0 if self.policy == "stop" else self.limit
        if self.skipped_in_a_row > limit:
            raise NonFiniteError(
                f"loss or gradients are not finite at step {step}",
                f"found: gradient norm {float(norm)}, {self.skipped_in_a_row} step(s) in a row; "
                f"allowed: {limit}",
                "Lower the learning rate, clip gradients (train.clip_norm), check the data; or "
                "raise train.nonfinite_limit.",
            )
        return False

    def state_dict(self) -> dict[str, int]:
        """Return the number of updates skipped in a row."""
        return {"skipped_in_a_row": self.skipped_in_a_row}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Restore the number of updates skipped in a row."""
        self.skipped_in_a_row = state["skipped_in_a_row"]
