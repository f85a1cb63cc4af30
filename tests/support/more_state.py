"""Training in this process that is stopped, left and gone on with, for tests of what is kept beside
the `state_dict`s."""

from __future__ import annotations

import contextlib
import itertools
import signal
from pathlib import Path

import torch
from conftest import undone
from library_runs import newest
from torch import nn

import harness
from harness.checkpoint import load
from harness.checkpoint.catalog import read_catalog
from harness.exchange.compare import differences
from harness.store import LocalStore

DIE = """
def die(run):
    \"\"\"Be killed in step `$DIE`, when what was saved before it has arrived.\"\"\"
    if run.step == int(os.environ.get("DIE", 0)):
        until = time.monotonic() + 8
        while run._checkpointer.background.is_busy and time.monotonic() < until:
            time.sleep(0.01)
        if not run.is_writer:
            time.sleep(60)
        os.kill(os.getpid(), signal.SIGKILL)


def finish(run, loss, optimizer):
    run.log(loss=loss)
    die(run)
"""


BY_HAND = (
    DIE
    + """
run = init()
model = WRAP(nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 1)))
optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
run.track(model=model, optimizer=optimizer)
for x, y in run.batches(points(192), 16, epochs=1):
    is_update = run.step % 4 == 0
    with model.no_sync() if NO_SYNC and not is_update else contextlib.nullcontext():
        loss = (model(x) - y).square().mean()
        (loss / 4).backward()
    if is_update:
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        optimizer.zero_grad()
    run.log(loss=loss)
    if "STOP" in os.environ:
        time.sleep(0.3)  # several ranks agree on a stop every quarter of a second
    if run.step == int(os.environ.get("STOP", 0)):
        os.kill(os.getpid(), signal.SIGTERM)
    die(run)
"""
)


def by_hand(wrap: str = "", no_sync: bool = False) -> str:
    return "import contextlib\n" + BY_HAND.replace("WRAP", wrap).replace("NO_SYNC", str(no_sync))


def equal(one: Path, other: Path) -> list[object]:
    return list(differences(newest(one), newest(other)))


def data(size: int = 192) -> torch.utils.data.TensorDataset:
    return torch.utils.data.TensorDataset(
        torch.randn(size, 8, generator=torch.Generator().manual_seed(0))
    )


def trained(
    directory: Path, make, *, leave_at: int = 0, stop_at: int = 0, **options
) -> harness.Run:
    """`make(run)` builds and tracks, and returns what makes a step; the loop is left or stopped
    there."""
    with undone():
        run = harness.init(
            directory,
            **({"seed": 1, "save_every_s": None, "save_every_steps": 3, "keep_last": 99} | options),
        )
        step = make(run)
        with contextlib.suppress(SystemExit):
            for (x,) in run.batches(data(), 16, epochs=1):
                run.log(loss=step(x))
                if run.step == stop_at:
                    signal.raise_signal(signal.SIGTERM)
                if run.step == leave_at:
                    break
    return run


def updated(model: nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor) -> torch.Tensor:
    """A step of a loop that has nothing odd about it; returns the loss."""
    optimizer.zero_grad()
    loss = model(x).square().mean()
    loss.backward()
    optimizer.step()
    return loss


def goes_on(tmp_path: Path, make, steps: tuple[int, ...], **options) -> None:
    """Stopped at the first of the steps, left at the next, and so on by turns, it ends as the one
    that was neither."""
    trained(tmp_path / "whole", make, **options)
    for step, how in zip(steps, itertools.cycle(("stop_at", "leave_at")), strict=False):
        trained(tmp_path / f"{how}{step}", make, **{how: step}, **options)
        assert trained(tmp_path / f"{how}{step}", make, **options).finished
        assert equal(tmp_path / "whole", tmp_path / f"{how}{step}") == [], (how, step)


def warnings_in(text: str) -> list[str]:
    """The warnings, without one about this process, which holds more than a program does."""
    return [
        line
        for line in text.splitlines()
        if "warning" in line and "holds more objects than are searched" not in line
    ]


def payloads(directory: Path) -> dict[int, dict]:
    store = LocalStore(directory)
    return {manifest.step: load.load(store, manifest) for manifest in read_catalog(store).manifests}
