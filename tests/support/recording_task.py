"""A task of the tests that writes down which samples each step used, on which rank."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from harness import Task


class Numbered(torch.utils.data.Dataset):
    """Random points that know their number."""

    def __init__(self, size: int) -> None:
        self.x = torch.randn(size, 4, generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int):
        return self.x[index], index


def build(folder: str, size: int = 240, sleep_s: float = 0.0) -> Task:
    """Each step adds a line to a file of its process in `folder`."""
    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)

    def step(run, batch):
        micro_batches = (
            batch if isinstance(batch, list) and isinstance(batch[0], (list, tuple)) else [batch]
        )
        used: list[int] = []
        optimizer.zero_grad()
        for (x, numbers), weight in zip(micro_batches, run.weights, strict=True):
            (F.mse_loss(run.tracked["model"](x), x[:, :1]) * weight).backward()
            used += numbers.tolist() if weight else []
        optimizer.step()
        line = json.dumps(
            {"step": run.step, "rank": run.rank, "ranks": run.world_size, "samples": used}
        )
        with (Path(folder) / f"{os.getpid()}.jsonl").open("a") as file:
            file.write(line + "\n")
        time.sleep(sleep_s)
        return {"loss": 0.0}

    return Task(modules=model, optimizers=optimizer, train_data=Numbered(size), step=step)
