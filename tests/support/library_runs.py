"""Short runs of the library in this process, and what they leave."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from small_task import Noisy
from there import there
from torch import nn

import harness
from harness.checkpoint import load
from harness.checkpoint.catalog import read_catalog
from harness.saving.checkpointer import Checkpointer
from harness.sharding.shards import made_whole
from harness.store import open_store


def net() -> nn.Module:
    return nn.Sequential(
        nn.Linear(12, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Dropout(0.3), nn.Linear(16, 1)
    )


def train(
    directory: Path,
    *,
    leave_at: int | None = None,
    fail_at: int | None = None,
    epochs: int = 2,
    size: int = 60,
    each: Callable[[harness.Run], object] = lambda run: None,
    **init: Any,
):
    """A loop as a user would write it; `leave_at` abandons it in that step, after the update.
    `each` is called then, too."""
    own: dict[str, Any] = {"seed": 3, "save_every_s": None, "save_every_steps": 4}
    run_ = harness.init(directory, **(own | init))
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.5)
    run_.track(model=model, optimizer=optimizer, scheduler=scheduler)
    for x, y in run_.batches(Noisy(size), global_batch_size=10, epochs=epochs):
        loss = F.mse_loss(model(x), y) + 0.01 * torch.rand(()) * random.random() * float(
            np.random.rand()
        )
        optimizer.zero_grad()
        loss.backward()
        if run_.step == fail_at:
            raise ZeroDivisionError("the user's step fails")
        optimizer.step()
        scheduler.step()
        run_.state["steps"] = run_.state.get("steps", 0) + 1
        run_.log(loss=loss)
        each(run_)
        if run_.step == leave_at:
            break
    return run_


def checkpointer_of(run_: harness.Run) -> Checkpointer:
    """What saves in this run, with all that it has; the run itself knows less of it."""
    checkpointer = run_._checkpointer
    assert isinstance(checkpointer, Checkpointer)
    return checkpointer


def steps_of(directory: Path) -> list[int]:
    return [manifest.step for manifest in read_catalog(open_store(directory)).manifests]


def newest(place: Path | str) -> dict:
    store = open_store(place)
    manifest = there(read_catalog(store).head)
    payload = load.load(store, manifest)
    return made_whole(store, manifest, payload) if manifest.shards else payload


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    directory = tmp_path_factory.mktemp("uninterrupted")
    train(directory)
    return directory


class Versioned(nn.Linear):
    """As PyTorch documents it: state of an older version is migrated."""

    _version = 2

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *rest):
        if local_metadata.get("version") is None or local_metadata["version"] < 2:
            state_dict[prefix + "bias"] = state_dict[prefix + "bias"] + 1
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *rest)


class Custom:
    """Something with a state of its own."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def state_dict(self):
        return {"value": self.value}

    def load_state_dict(self, given):
        self.value = given["value"]


def saved_and_read(tmp_path: Path, payload: dict) -> dict:
    torch.save(payload, tmp_path / "x.pt")
    return torch.load(tmp_path / "x.pt", weights_only=True)
