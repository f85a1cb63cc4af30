"""Runs with a state that is large enough to be copied in the background."""

from __future__ import annotations

import copy
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import harness
from harness import state
from harness.checkpoint import load
from harness.checkpoint.catalog import read_catalog
from harness.ema import Ema
from harness.exchange.compare import differences
from harness.store import LocalStore


class Big(nn.Module):
    """Little work, much state: copying it takes longer than a forward and a backward pass."""

    def __init__(self, rows: int = 100_000) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(16)
        self.table = nn.Embedding(rows, 16, sparse=False)
        self.out = nn.Linear(16, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.norm(x + self.table.weight[:8].sum(0)))


def points(size: int = 64) -> torch.utils.data.TensorDataset:
    return torch.utils.data.TensorDataset(
        torch.randn(size, 16, generator=torch.Generator().manual_seed(0))
    )


def trained(
    directory: Path,
    make: Callable[[nn.Module], torch.optim.Optimizer] = lambda model: torch.optim.AdamW(
        model.parameters(), lr=0.01
    ),
    before: Callable[[nn.Module], None] = lambda model: None,
    steps: int = 8,
    model: nn.Module | None = None,
    **options: Any,
) -> dict[int, dict]:
    """A loop that saves every step; returns what a copy that training waited for says of each
    boundary."""
    job = harness.init(
        directory, seed=1, save_every_s=None, save_every_steps=1, keep_last=99, **options
    )
    model = (model or Big()).to(job.device)
    optimizer, average = make(model), Ema(model, copy.deepcopy(model), 0.9)
    job.track(model=model, optimizer=optimizer, average=average)
    seen: dict[int, dict] = {}
    for (x,) in job.batches(points(8 * steps), global_batch_size=8, epochs=1):
        seen[job.step - 1] = copy.deepcopy(state.capture(job.tracked))
        before(model)
        loss = model(x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        average.update()
    seen[job.step] = copy.deepcopy(state.capture(job.tracked))
    return seen


def check_saved(directory: Path, seen: dict[int, dict], steps: list[int]) -> None:
    """Every checkpoint of these steps, and no other, is there and holds what was seen at its
    boundary, to the bit."""
    store = LocalStore(directory)
    manifests = {m.step: m for m in read_catalog(store).manifests}
    assert sorted(manifests) == steps
    for step, manifest in manifests.items():
        payload = load.load(store, manifest)
        assert payload["step"] == step
        assert list(differences({name: payload[name] for name in seen[step]}, seen[step])) == [], (
            step
        )


OPTIMIZERS = {
    "adamw": lambda model: torch.optim.AdamW(model.parameters(), lr=0.01),
    "momentum": lambda model: torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9),
    "tensor rate": lambda model: torch.optim.Adam(
        model.parameters(), lr=torch.tensor(0.01), foreach=False
    ),
    "part": lambda model: torch.optim.SGD(model.out.parameters(), lr=0.01),
}


def clamp_in_secret(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.data.clamp_(-0.01, 0.01)


@torch.no_grad()
def clamp_openly(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.clamp_(-0.01, 0.01)


PRELUDE = """
import os, resource, signal, time
import torch
from torch import nn
import harness

def points(size):
    return torch.utils.data.TensorDataset(
        torch.randn(size, 16, generator=torch.Generator().manual_seed(0))
    )

def made(rows):
    model = nn.ModuleList([nn.Embedding(rows, 16), nn.Linear(16, 1)])
    return model, torch.optim.SGD(model.parameters(), lr=0.01, foreach=False)

def step(model, optimizer, x):
    optimizer.zero_grad(set_to_none=True)
    model[1](x).square().mean().backward()
    optimizer.step()

def scribe():
    import psutil
    found = [
        p
        for p in psutil.Process().children()
        if "saving/writer_process.py" in " ".join(p.cmdline())
    ]
    return found[0] if found else None
"""
LOOP = """
job = harness.init("a", {options})
model, optimizer = made(rows={rows})
job.track(model=model, optimizer=optimizer)
for (x,) in job.batches(points({size}), global_batch_size=8, epochs=1):
    {before}
    step(model, optimizer, x)
"""


def written(
    folder: Path,
    body: str,
    size: int = 64,
    rows: int = 1_000_000,
    options: str = "save_every_s=None, save_every_steps=2",
    before: str = "pass",
) -> list[str]:
    """The command line of a training script of its own process: the loop, with more to do in each
    step."""
    loop = LOOP.format(options=options, rows=rows, size=size, before=before) + textwrap.indent(
        textwrap.dedent(body), "    "
    )
    (folder / "own.py").write_text(PRELUDE + loop)
    return [sys.executable, "own.py"]


STOPPED = """
if job.step == 3:
    while not os.path.exists("a/checkpoints/step_00000002-0001.json"): time.sleep(0.01)
    scribe().send_signal(signal.SIGSTOP)
    print("stopped", flush=True)
"""
