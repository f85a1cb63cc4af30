"""Data for loops of a user."""

from __future__ import annotations

from collections.abc import Iterator

import torch


def points(size: int = 48) -> torch.utils.data.TensorDataset:
    return torch.utils.data.TensorDataset(
        torch.randn(size, 4, generator=torch.Generator().manual_seed(0))
    )


class Stream(torch.utils.data.IterableDataset):
    """Draws from the global generator, as careless datasets do."""

    def __init__(self) -> None:
        self.at = 0

    def __iter__(self) -> Iterator[tuple[torch.Tensor]]:
        while self.at < 48:
            self.at += 1
            yield (torch.randn(4),)
        self.at = 0

    def state_dict(self) -> dict[str, int]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.at = state["at"]
