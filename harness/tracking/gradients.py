"""Gradients under way: written after the last step of their optimizer, and so part of what the next one will use.

A loop that makes an update at each step has none at its boundaries: its gradients are gone, or were used, and what `zero_grad()` at its
head throws away need not be kept. A loop that accumulates over several steps has some at most of them. Which they are is told by a mark:
after each step of an optimizer, each gradient that it has used is given its present version. One without a mark is a new one; one with
another version was written to since. A mark takes 0.15 us a parameter and step; gradients are looked at for a save only.

Gradients that live on as the same tensors are kept as zeros, which is what `zero_grad(set_to_none=False)` makes of them; or as they are,
if nothing does that: the next backward pass tells, once.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from harness.distributed.ddp import parts, plain
from harness.errors import UsageError

MARK = "_used_at"  # an attribute of a gradient: its version when the last step had used it
NEVER = -1
USED = "used"  # under this is kept what was used by the last step, and is added to all the same
ZEROS = "zeros"  # what is kept of a gradient that is zero everywhere: none at all is another thing to an optimizer
MOST_STEPS, MOST_S = 64, 60.0  # for so long a save waits for an update, at most
Kept = dict[str, Any]  # by the parameter's name: its gradient, in parts if it is sparse, or ZEROS


class Gradients:
    """The gradients of all that is tracked, as seen from one rank."""

    def __init__(self, step: Callable[[], int], clock: Callable[[], float] = time.monotonic) -> None:
        """`step` tells the step that is being made."""
        self._step, self._clock = step, clock
        self._named: dict[str, nn.Parameter] = {}
        self._owner: dict[int, int | None] = {}  # by parameter: the optimizer that has it, each by identity
        self._stepped: dict[int | None, int] = {}  # by optimizer: the step in which it has made its last update
        self._lasting: set[int | None] = set()  # optimizers whose gradients live on from one update to the next
        self._summed: set[int | None] = set()  # those of them whose gradients nobody sets to zero
        self._waiting: tuple[int, float] | None = None  # since which step and when a save waits
        self._gaps: dict[int | None, int] = {}  # by optimizer: the most steps that it has let pass from one update to the next
        self._given_up: set[int | None] = set()  # optimizers that were waited for in vain
        self._tracked: Mapping[str, Any] = {}
        self._count = 0  # of the parameters that tracked optimizers have
        self._unhook: Callable[[], None] = lambda: None

    def begin(self, tracked: Mapping[str, Any]) -> None:
        """Look at the gradients of these from now on."""
        self._tracked = tracked
        self._look()
        self._unhook = register_optimizer_step_post_hook(lambda optimizer, *_: self._used(optimizer)).remove

    def close(self) -> None:
        """Look at them no more."""
        self._unhook()

    def _look(self) -> None:
        """Find the parameters, again if an optimizer was given more of them."""
        optimizers = [thing for thing in map(plain, self._tracked.values()) if isinstance(thing, torch.optim.Optimizer)]
        count = sum(len(group["params"]) for optimizer in optimizers for group in optimizer.param_groups)
        if not self._named or count != self._count:
            self._named, self._count = named_parameters(self._tracked), count
            for optimizer in optimizers:
                self._own(optimizer)

    def _own(self, optimizer: torch.optim.Optimizer) -> None:
        self._owner |= {id(parameter): id(optimizer) for group in optimizer.param_groups for parameter in group["params"]}

    def _used(self, optimizer: torch.optim.Optimizer) -> None:
        """Mark what an optimizer has used: it has just made its step."""
        owner, step = id(optimizer), self._step()
        if (last := self._stepped.get(owner)) is None:
            self._own(optimizer)
        elif (gap := max(1, step - last)) > self._gaps.get(owner, 0):
            self._gaps[owner] = gap
        self._stepped[owner] = step
        self._given_up.discard(owner)
        is_first = True
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if (gradient := parameter.grad) is not None:
                    if is_first:
                        is_first = False
                        self._note_lasting(owner, parameter, gradient)
                    try:
                        gradient._used_at = gradient._version
                    except RuntimeError:  # one that was made for inference does not count its versions
                        gradient._used_at = 0

    def _note_lasting(self, owner: int, parameter: nn.Parameter, gradient: torch.Tensor) -> None:
        """Note whether an optimizer's gradients live on; if so, the next backward pass tells, once, whether they are set to zero before."""
        if not hasattr(gradient, MARK):
            self._lasting.discard(owner)
        elif owner not in self._lasting:
            self._lasting.add(owner)
            if parameter.requires_grad and gradient.layout is torch.strided:

                def look(_: torch.Tensor) -> None:
                    handle.remove()
                    if parameter.grad is gradient and bool(gradient.any()):
                        self._summed.add(owner)

                handle = parameter.register_hook(look)  # type: ignore[no-untyped-call]

    def _under_way(self) -> Iterator[tuple[str, nn.Parameter]]:
        for name, parameter in self._named.items():
            gradient = parameter.grad
            if gradient is not None and getattr(gradient, MARK, None) != (0 if gradient.is_inference() else gradient._version):
                yield name, parameter

    def look(self, *, may_wait: bool) -> tuple[bool, bool]:
        """Whether a save should wait for an update (never, unless it may), and whether there are gradients to keep if it does not.

        It waits for optimizers that have made no step in this turn of the loop. What one that has made one does not use is not
        waited for: it will be there after the next as well, as the gradients are that a generator's loss leaves in its critic. Nor is
        an optimizer for longer than it has taken from one update to the next so far.
        """
        self._look()
        owners = {self._owner.get(id(parameter)) for _, parameter in self._under_way()}
        awaited = {owner for owner in owners - self._given_up - {None} if self._stepped.get(owner) != self._step()}
        since, at = self._waiting or (self._step(), self._clock())
        most = max((min(MOST_STEPS, self._gaps.get(owner, MOST_STEPS)) for owner in awaited), default=0)
        if may_wait and self._step() - since < most and self._clock() - at < MOST_S:
            self._waiting = since, at
            return True, True
        if may_wait:
            self._given_up |= awaited
        return False, bool(owners or self._lasting)

    def saved(self) -> None:
        """A save waits no more."""
        self._waiting = None

    def kept(self) -> Kept:
        """What is under way, copied to the CPU; of gradients that were used and live on, that they are there."""
        under_way = dict(self._under_way())
        kept: Kept = {}
        for name, parameter in self._named.items():
            if (gradient := parameter.grad) is None:
                continue
            if name in under_way:
                kept[name] = _plain(gradient)
            elif self._owner.get(id(parameter)) in self._summed:
                kept[name] = {USED: _plain(gradient)}
            elif self._owner.get(id(parameter)) in self._lasting:
                kept[name] = ZEROS  # `zero_grad(set_to_none=False)` comes next
        return kept

    def restore(self, kept: Kept) -> None:
        """Give parameters the gradients back that `kept` gave. Raises UsageError."""
        if missing := [name for name in kept if name not in self._named]:
            raise UsageError(
                "the checkpoint holds gradients of parameters that are not there", f"found: {', '.join(missing[:5])}",
                "Put the old model back, or take a new run directory.",
            )  # fmt: skip
        for name, gradient in kept.items():
            parameter = self._named[name]
            is_used, kept_as = isinstance(gradient, dict) and USED in gradient, gradient
            if is_used:
                kept_as = gradient[USED]
                self._summed.add(self._owner.get(id(parameter)))
                self._lasting.add(self._owner.get(id(parameter)))
            parameter.grad = torch.zeros_like(parameter) if isinstance(kept_as, str) else _tensor(kept_as, parameter)
            if is_used or isinstance(kept_as, str):
                setattr(parameter.grad, MARK, NEVER)  # it lives on


def named_parameters(tracked: Mapping[str, Any]) -> dict[str, nn.Parameter]:
    """Every parameter of tracked modules by its object's name and its own; then those that only an optimizer has, by their place in it."""
    found: dict[str, nn.Parameter] = {}
    known: set[int] = set()
    things = {name: plain(thing) for name, thing in tracked.items()}
    listed = [
        (".".join(filter(None, (name, path, key))), parameter)
        for name, thing in things.items() for path, part in parts(thing) for key, parameter in part._parameters.items()
    ] + [
        (f"{name}.param_groups.{at}.{number}", parameter)
        for name, thing in things.items() if isinstance(thing, torch.optim.Optimizer)
        for at, group in enumerate(thing.param_groups) for number, parameter in enumerate(group["params"])
    ]  # fmt: skip
    for name, parameter in listed:
        if parameter is not None and id(parameter) not in known:
            known.add(id(parameter))
            found[name] = parameter
    return found


def digest(kept: Kept) -> str:
    """The same for the same gradients, bit for bit."""
    hasher = hashlib.blake2b(digest_size=16)

    def add(value: Any) -> None:
        if isinstance(value, dict):
            for key, item in value.items():
                hasher.update(f"{key}\0".encode())
                add(item)
        elif isinstance(value, torch.Tensor):
            hasher.update(f"{value.dtype}{tuple(value.shape)}{value.stride()}".encode())
            hasher.update(value.contiguous().view(-1).view(torch.uint8).numpy().tobytes() if value.numel() else b"")
        else:
            hasher.update(f"{value}\0".encode())

    add(kept)
    return hasher.hexdigest()


def _plain(gradient: torch.Tensor) -> Any:
    gradient = gradient.detach()
    if gradient.layout is torch.sparse_coo:
        parts = {"indices": gradient._indices(), "values": gradient._values()}
        copies = {name: part.to("cpu", copy=True) for name, part in parts.items()}
        return copies | {"size": list(gradient.shape), "is_coalesced": gradient.is_coalesced()}
    copied = gradient.to("cpu", copy=True)
    return copied if bool(copied.any()) else ZEROS


def _tensor(gradient: Any, parameter: nn.Parameter) -> torch.Tensor:
    if isinstance(gradient, torch.Tensor):
        return gradient.to(parameter.device, copy=True)
    parts = gradient["indices"].to(parameter.device), gradient["values"].to(parameter.device)
    return torch.sparse_coo_tensor(*parts, gradient["size"], is_coalesced=gradient["is_coalesced"] or None, check_invariants=True)
