"""An exponential moving average of the weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from harness.distributed import dtensors


class Ema:
    """An exponential moving average of a module's weights; buffers are copied.

    average += (1 - decay) * (weight - average)
    """

    copies_buffers = True

    def __init__(self, source: nn.Module, copy: nn.Module, decay: float) -> None:
        """Begin with a copy of the module, of the same form (sharded in the same way).

        It is given the module's present values.
        """
        self.source, self.decay = source, decay
        self.module = copy.requires_grad_(False).eval()
        self._hook: Callable[..., object] = lambda *_: None
        with torch.no_grad():
            for own, its in zip(_tensors(self.module), _tensors(source), strict=True):
                own.copy_(its)

    def register_step_pre_hook(self, hook: Callable[..., object]) -> None:
        """Call `hook` before each update, as an optimizer does.

        The average is constant until then.
        """
        self._hook = hook

    @torch.no_grad()
    def update(self) -> None:
        """Update the average with the present weights of the source module."""
        self._hook(self)
        own, theirs = self.module, self.source
        dtensors.reshard([own, theirs])
        if weights := list[torch.Tensor](own.parameters()):
            torch._foreach_lerp_(weights, list(theirs.parameters()), 1 - self.decay)
        for buffer, its in zip(own.buffers(), theirs.buffers(), strict=True):
            buffer.copy_(its)

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the averaged module."""
        return self.module.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state of the averaged module."""
        self.module.load_state_dict(state)


def _tensors(module: nn.Module) -> list[torch.Tensor]:
    return [*module.parameters(), *module.buffers()]
