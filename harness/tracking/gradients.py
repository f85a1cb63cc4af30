"""Save and restore gradients in flight: those written after the last step of their optimizer.

The next update will use them, so a checkpoint has to contain them. A loop that makes an update in
each step has none at its step boundaries: its gradients are None or were used, and a gradient that
`zero_grad()` discards at the head of the loop need not be kept. A loop that accumulates gradients
over several steps has some at most of its boundaries.

Marks distinguish used gradients from those in flight. After each step of an optimizer, each
gradient that it has used is marked with its current version counter. A gradient without a mark is
new, and a gradient with another version was written to since. Marking takes 0.15 us per parameter
and step. Gradients are examined only for a save.

Used gradients may persist as the same tensors from one update to the next. They are kept as zeros,
because that is what `zero_grad(set_to_none=False)` makes of them. If nothing sets them to zero,
they are kept with their values. The next backward pass shows, once, which of the two is the case.
"""

from __future__ import annotations

import hashlib
import itertools
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from harness.distributed.dtensors import (
    hidden_gradients,
    is_sharded,
    plain,
    version_of,
    with_part,
)
from harness.distributed.reshard import PLACED, placed_gradient, with_placed
from harness.distributed.wrappers import unwrap
from harness.errors import UsageError
from harness.state.parameter_names import named_parameters

# An attribute of a gradient, numbered by who observes it (several loops may be alive in a process):
# its version after the last step that used it.
MARK, OBSERVERS = "_used_at_", itertools.count()
NEVER = -1  # a mark that equals no version
USED = "used"  # key of a gradient that the last step used and the next backward pass adds to
# Stands for a gradient that is zero everywhere. An optimizer does not treat it like None.
ZEROS = "zeros"
MOST_STEPS, MOST_S = 64, 60.0  # limits of how long a save waits for an update
MOST_HIDDEN_STEPS = 1024  # the same, if the gradients are where no state holds them
# By name of the parameter: its gradient (a dict if it is sparse, or placed otherwise than it), the
# same under USED, or ZEROS.
Kept = dict[str, Any]


class Gradients:
    """The gradients of all tracked parameters, on one rank."""

    def __init__(
        self, step: Callable[[], int], clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Prepare; nothing is observed before `begin`.

        Args:
            step: returns the number of the current step.
            clock: returns the time in seconds.
        """
        self._step, self._clock = step, clock
        self._mark = f"{MARK}{next(OBSERVERS)}"
        self._mark_of_step = f"{self._mark}_step"  # on an examined gradient: the step that used it
        self._named: dict[str, nn.Parameter] = {}
        # Optimizers and parameters are keys by id.
        self._owner: dict[int, int | None] = {}  # by parameter: its optimizer
        self._stepped: dict[int | None, int] = {}  # by optimizer: the step of its last update
        # Optimizers whose gradients persist as the same tensors from one update to the next.
        self._lasting: set[int | None] = set()
        self._summed: set[int | None] = set()  # those of them whose gradients are never zeroed
        self._waiting: tuple[int, float] | None = None  # step and time since when a save waits
        self._gaps: dict[int | None, int] = {}  # by optimizer: most steps between two updates
        self._given_up: set[int | None] = set()  # optimizers for which a save has waited in vain
        self._tracked: Mapping[str, Any] = {}
        self._count = 0  # number of parameters in tracked optimizers
        self._held = set[str]()  # parameters that had a gradient at the start of the loop
        self._unhook: Callable[[], None] = lambda: None

    def begin(self, tracked: Mapping[str, Any]) -> None:
        """Start to observe the gradients of the tracked objects."""
        self._tracked = tracked
        self._look()
        self._held = {name for name, one in self._named.items() if one.grad is not None}
        self._unhook = register_optimizer_step_post_hook(
            lambda optimizer, *_: self._used(optimizer)
        ).remove

    def is_idle(self) -> bool:
        """Return whether there are optimizers, but no step of them and no gradient for them."""
        owned = (one for one in self._named.values() if id(one) in self._owner)
        return self._count > 0 and not self._stepped and all(one.grad is None for one in owned)

    def close(self) -> None:
        """Remove the hook on optimizer steps."""
        self._unhook()

    def _look(self) -> None:
        """Find the parameters; repeat this whenever an optimizer was given more."""
        optimizers = [
            obj
            for obj in map(unwrap, self._tracked.values())
            if isinstance(obj, torch.optim.Optimizer)
        ]
        count = sum(
            len(group["params"]) for optimizer in optimizers for group in optimizer.param_groups
        )
        if not self._named or count != self._count:
            self._named, self._count = named_parameters(self._tracked), count
            for optimizer in optimizers:
                self._own(optimizer)

    def _own(self, optimizer: torch.optim.Optimizer) -> None:
        """Record which parameters an optimizer has."""
        self._owner |= {
            id(parameter): id(optimizer)
            for group in optimizer.param_groups
            for parameter in group["params"]
        }

    def _used(self, optimizer: torch.optim.Optimizer) -> None:
        """Mark the gradients that an optimizer has used in the step that it has just made."""
        owner, step = id(optimizer), self._step()
        if (last := self._stepped.get(owner)) is None:
            self._own(optimizer)
        elif (gap := max(1, step - last)) > self._gaps.get(owner, 0):
            self._gaps[owner] = gap
        self._stepped[owner] = step
        self._given_up.discard(owner)
        mark, is_first = self._mark, True
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if (gradient := parameter.grad) is not None:
                    if is_first:
                        is_first = False
                        self._note_lasting(owner, parameter, gradient, step)
                    setattr(gradient, mark, version_of(gradient))

    def _note_lasting(
        self, owner: int, parameter: nn.Parameter, gradient: torch.Tensor, step: int
    ) -> None:
        """Note whether an optimizer's gradients persist as the same tensors.

        If they do, a hook on the next backward pass checks, once, whether they were set to zero
        before it. One gradient is examined for all gradients of the optimizer. Within one step
        several optimizers may use it, and each several times.
        """
        used_in = getattr(gradient, self._mark_of_step, None)
        setattr(gradient, self._mark_of_step, step)
        if used_in == step:
            return
        if used_in is None:
            self._lasting.discard(owner)
        elif owner not in self._lasting:
            self._lasting.add(owner)
            if parameter.requires_grad and gradient.layout in (torch.strided, torch.sparse_coo):

                def look(_: torch.Tensor) -> None:
                    handle.remove()
                    if parameter.grad is gradient and bool(_numbers(plain(gradient)).any()):
                        self._summed.add(owner)

                handle = parameter.register_hook(look)  # type: ignore[no-untyped-call]

    def _under_way(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield the parameters whose gradients are in flight, with their names."""
        mark = self._mark
        for name, parameter in self._named.items():
            gradient = parameter.grad
            if gradient is not None and getattr(gradient, mark, None) != version_of(gradient):
                yield name, parameter

    def look(self, *, may_wait: bool) -> tuple[bool, bool]:
        """Return whether a save should wait, and whether there are gradients to keep otherwise.

        A save waits for optimizers with gradients in flight that have made no update in the current
        step of the loop. If an optimizer has made one and gradients are still in flight, the save
        does not wait for them: they would be there after the next update as well, like the
        gradients that a generator's loss leaves in its critic. A save waits for an optimizer no
        longer than the most steps between two of its updates so far, and never longer than
        MOST_STEPS and MOST_S.

        Args:
            may_wait: whether the save may wait at all.
        """
        self._look()
        owners = {self._owner.get(id(parameter)) for _, parameter in self._under_way()}
        hidden = set[int]().union(*map(hidden_gradients, self._tracked.values()))
        owners |= {self._owner.get(number) for number in hidden}
        since, at = self._waiting or (self._step(), self._clock())
        if may_wait and hidden and self._step() - since < MOST_HIDDEN_STEPS:
            self._waiting = since, at  # no state holds them: a save would be refused
            return True, True
        awaited = {
            owner
            for owner in owners - self._given_up - {None}
            if self._stepped.get(owner) != self._step()
        }
        most = max(
            (min(MOST_STEPS, self._gaps.get(owner, MOST_STEPS)) for owner in awaited), default=0
        )
        if may_wait and self._step() - since < most and self._clock() - at < MOST_S:
            self._waiting = since, at
            return True, True
        if may_wait:
            self._given_up |= awaited
        return False, bool(owners or self._lasting)

    def saves(self) -> None:
        """Note that no save waits any more: the one that was due begins now."""
        self._waiting = None

    def kept(self) -> Kept:
        """Return the gradients to keep, copied to the CPU.

        Gradients in flight are kept with their values. Used gradients that persist are kept as
        zeros, or with their values if nothing sets them to zero.
        """
        under_way = dict(self._under_way())
        kept: Kept = {}
        for name, parameter in self._named.items():
            if (gradient := parameter.grad) is None:
                continue
            owner = self._owner.get(id(parameter))
            is_lasting = owner in self._lasting
            if name in under_way:
                kept[name] = _plain(gradient, parameter)
            elif owner in self._summed or (is_lasting and is_sharded(gradient)):
                kept[name] = {USED: _plain(gradient, parameter)}
            elif is_lasting:
                # `zero_grad(set_to_none=False)` comes next; a sparse gradient stays sparse.
                is_sparse = gradient.layout is torch.sparse_coo
                zeros = gradient.detach().clone().zero_()
                kept[name] = _plain(zeros, parameter) if is_sparse else ZEROS
        return kept

    def restore(self, kept: Kept) -> None:
        """Set the gradients of parameters from the result of `kept`.

        Raises:
            UsageError: if a parameter does not exist.
        """
        if missing := [name for name in kept if name not in self._named]:
            raise UsageError(
                "the checkpoint holds gradients of parameters that are not there",
                f"found: {', '.join(missing[:5])}",
                "Put the old model back, or take a new run directory.",
            )
        for name, gradient in kept.items():
            parameter = self._named[name]
            is_used, kept_as = isinstance(gradient, dict) and USED in gradient, gradient
            if is_used:
                kept_as = gradient[USED]
                self._lasting.add(self._owner.get(id(parameter)))
                if not is_sharded(parameter):  # those that are sharded are kept so in any case
                    self._summed.add(self._owner.get(id(parameter)))
            parameter.grad = (
                torch.zeros_like(parameter)
                if isinstance(kept_as, str)
                else _tensor(kept_as, parameter)
            )
            if is_used or isinstance(kept_as, str) or not _numbers(parameter.grad).numel():
                for mark in (self._mark, self._mark_of_step):  # the tensor persists
                    setattr(parameter.grad, mark, NEVER)

    def put_back(self, kept: Kept) -> None:
        """Restore gradients once more, and drop those that were written since `begin`."""
        for name, parameter in self._named.items():
            if name not in kept and name not in self._held:
                parameter.grad = None
        self.restore(kept)


def digest(kept: Kept) -> str:
    """Return a digest that is the same for gradients that are the same bit for bit."""
    hasher = hashlib.blake2b(digest_size=16)

    def add(value: Any) -> None:
        if isinstance(value, dict):
            for key, item in value.items():
                hasher.update(f"{key}\0".encode())
                add(item)
        elif isinstance(value, torch.Tensor):
            hasher.update(f"{value.dtype}{tuple(value.shape)}{value.stride()}".encode())
            hasher.update(
                value.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
                if value.numel()
                else b""
            )
        else:
            hasher.update(f"{value}\0".encode())

    add(kept)
    return hasher.hexdigest()


def _numbers(gradient: torch.Tensor) -> torch.Tensor:
    """Return the numbers that a gradient stores: a sparse one without those that are zero."""
    return gradient._values() if gradient.layout is torch.sparse_coo else gradient


def _plain(gradient: torch.Tensor, parameter: nn.Parameter) -> Any:
    """Copy a gradient to the CPU: a tensor, ZEROS, or a dict.

    The dict holds the parts of a sparse tensor, or this rank's part of a gradient that is placed
    otherwise than its parameter (tensor parallelism).
    """
    if kept := placed_gradient(gradient, parameter):
        return kept
    gradient = plain(gradient.detach())
    if gradient.layout is torch.sparse_coo:
        parts = {"indices": gradient._indices(), "values": gradient._values()}
        copies = {name: part.to("cpu", copy=True) for name, part in parts.items()}
        return copies | {"size": list(gradient.shape), "is_coalesced": gradient.is_coalesced()}
    copied = gradient.to("cpu", copy=True)
    return copied if bool(copied.any()) else ZEROS


def _tensor(gradient: Any, parameter: nn.Parameter) -> torch.Tensor:
    """Rebuild a gradient, dense or sparse, on the device of its parameter."""
    if isinstance(gradient, torch.Tensor):
        return with_part(parameter, gradient)
    if PLACED in gradient:
        return with_placed(parameter, gradient)
    parts = gradient["indices"].to(parameter.device), gradient["values"].to(parameter.device)
    return torch.sparse_coo_tensor(
        *parts,
        gradient["size"],
        is_coalesced=gradient["is_coalesced"] or None,
        check_invariants=True,
    )
