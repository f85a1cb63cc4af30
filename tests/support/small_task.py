"""A task of the tests: small enough to start in no time, random enough that every generator
matters."""

from __future__ import annotations

import os
import random
import time

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from harness import Task


class Noisy(torch.utils.data.Dataset):
    """Points and a target; each sample is made noisy with torch's, NumPy's and Python's
    generator."""

    def __init__(self, size: int) -> None:
        generator = torch.Generator().manual_seed(size)
        self.x = torch.randn(size, 12, generator=generator)
        self.y = (self.x[:, :1] * self.x[:, 1:2]).tanh()

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int):
        return self.x[index] + 0.1 * torch.randn(12) + float(
            np.random.normal()
        ) * 0.01 + random.gauss(0, 0.01), self.y[index]


def loss(model, batch):
    x, y = batch
    return F.mse_loss(model(x), y)


def build(
    size: int = 240,
    width: int = 32,
    lr: float = 1e-2,
    momentum: float = 0.9,
    sleep_s: float = 0.0,
    sleep_from: int = 1,
    fail_at: int = -1,
    hang_at: int = -1,
    leave_at: int = -1,
) -> Task:
    """`sleep_s` slows each forward pass of training down, from number `sleep_from` on; `fail_at`
    raises in that one, `hang_at` never returns from it, at `leave_at` the last rank exits as if it
    had finished."""
    model = nn.Sequential(
        nn.Linear(12, width),
        nn.BatchNorm1d(width),
        nn.Tanh(),
        nn.Dropout(0.2),
        nn.Linear(width, width),
        nn.Tanh(),
        nn.Linear(width, 1),
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=momentum)
    calls = 0

    def slow_loss(model, batch):
        nonlocal calls
        calls += 1
        if calls == fail_at:
            raise ValueError(f"the task fails in forward pass {fail_at}")
        if calls == leave_at and os.environ["RANK"] == "1":
            os._exit(0)
        time.sleep(3600 if calls == hang_at else sleep_s if calls >= sleep_from else 0)
        return loss(model, batch)

    return Task(
        modules=model,
        optimizers=optimizer,
        schedulers=torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step / 100)),
        train_data=Noisy(size),
        eval_data=Noisy(size // 4),
        loss=slow_loss,
        evaluate=lambda model, batch: {"val_loss": loss(model, batch) * len(batch[0])},
    )


class Counted(torch.utils.data.IterableDataset):
    """A stream of `size` points that goes on exactly."""

    def __init__(self, size: int) -> None:
        self.size, self.at = size, 0

    def __iter__(self):
        while self.at < self.size:
            self.at += 1
            yield torch.full((12,), self.at / self.size), torch.ones(1)
        self.at = 0

    def state_dict(self):
        return {"at": self.at}

    def load_state_dict(self, state):
        self.at = state["at"]


def build_stream(size: int = 48, finish_at: int = 0) -> Task:
    """Trained on a stream; in step `finish_at` the task itself ends the run."""
    model = nn.Linear(12, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)

    def step(run, batch):
        optimizer.zero_grad()
        value = loss(run.tracked["model"], batch)
        value.backward()
        optimizer.step()
        if run.step == finish_at:
            run.finish()
        return {"loss": value}

    return Task(
        modules=model,
        optimizers=optimizer,
        train_data=Counted(size),
        eval_data=Noisy(12),
        loss=loss,
        step=step,
    )
