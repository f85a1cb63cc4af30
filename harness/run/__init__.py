"""The library that `harness/train.py` and a user's own loop are written with.

    run = harness.init("runs/a", save_every_s=60, seed=1)
    run.track(model=model, optimizer=optimizer)
    for x, y in run.batches(dataset, global_batch_size=64, epochs=5):
        …
        run.log(loss=loss)

What follows the `yield` in `batches` runs after the user's step. That is the step boundary, the one place where saving and
stopping are agreed on by all ranks and done.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from harness import ranks, state, stop
from harness.checkpoint import launches, load, retention
from harness.events import fill_closed_streams
from harness.run.ending import Ending
from harness.run.logs import divert
from harness.run.loop import Run
from harness.run.places import check_remembered, listen, places
from harness.run.settings import Settings
from harness.store import DEFAULT_WAIT_S, Store

__all__ = ["Run", "init"]


def init(
    directory: str | Path | None,
    *,
    remote: str | None = None,
    seed: int = 0,
    save_every_s: float | None = 60.0,
    save_every_steps: int | None = None,
    keep_last: int = 3,
    keep_every_steps: int | None = None,
    keep_best: int = 1,
    best: str = "val_loss:min",
    wait_s: float = DEFAULT_WAIT_S,
    remote_keep: Mapping[str, int | None] | None = None,
    config: Mapping[str, Any] | None = None,
    accept: Sequence[str] = (),
    override: Sequence[str] = (),
    deterministic: bool = False,
    timeout_s: float = 600.0,
    log_every_steps: int = 10,
    step_timeout_s: float | None = None,
    grace_s: float | None = None,
    margin_s: float = 30.0,
    is_scratch: bool = False,
    notices: str | None = None,
) -> Run:
    """Join the other ranks, catch signals, seed all generators, and find the newest checkpoint of the run.

    The run lives in `directory`, in `remote` (a URL that fsspec opens, such as s3://bucket/prefix), or in both: then each checkpoint
    is committed in the directory and copied in the background, and whichever has the newest that verifies is gone on from. The
    remote may be unreachable for `wait_s` seconds. It keeps what the directory keeps, but for `remote_keep`: last, every_steps, best.

    A step may take `timeout_s` seconds, or `step_timeout_s`, before it counts as hung. `grace_s` lie between SIGTERM and the kill (None:
    as SLURM says), `margin_s` between a stop and the job's time limit; `is_scratch`: the directory is lost with the job. `notices` is
    the cloud ("aws", "gcp", "azure") that tells when it takes a spot machine away.

    Nothing is changed here; the run is claimed when training begins. `config`, a dict of what training depends on, is kept in each
    checkpoint; a run refuses to go on with another one unless `accept=["config"]`. Collective: every rank must call it.
    """
    fill_closed_streams()
    stores = places(directory, remote, wait_s)
    _be_deterministic(deterministic)
    kept = state.plain_data({"config": dict(config or {})})["config"]
    metric, _, direction = best.rpartition(":")
    policy = retention.Policy(keep_last, keep_every_steps, keep_best, metric or best, direction == "max")
    settings = Settings(
        seed=seed, save_every_s=save_every_s, save_every_steps=save_every_steps, wait_s=wait_s, config=kept, policy=policy,
        remote_policy=retention.changed(policy, remote_keep or {}), accept=tuple(accept), override=tuple(override), grace_s=grace_s,
        log_every_steps=log_every_steps, step_timeout_s=step_timeout_s, margin_s=margin_s, is_scratch=is_scratch, notices=notices,
    )  # fmt: skip
    return _start(directory, stores, settings, timeout_s)


def _start(directory: str | Path | None, stores: tuple[Store, ...], settings: Settings, timeout_s: float) -> Run:
    divert(directory)
    stop.install()
    stop.die_with_launcher()
    ending = Ending()
    ending.watch(stores)
    world = ranks.join(timeout_s)
    atexit.register(world.leave)  # gloo's threads may abort a process that ends under them
    ending.take_hook()
    state.seed_rank(settings.seed, "build")  # alike on all ranks, so that they build the same model
    outage = listen(stores, world.is_writer)
    world.on_writer(lambda: check_remembered(stores, settings.accept), give_up=stop.requested)
    patient = tuple(store.patient(settings.wait_s, stop.requested) for store in stores)
    choice = load.choose(patient, world, give_up=stop.requested, steps_back=lambda: launches.steps_back(patient[-1]))
    return Run(world, stores, choice, settings, ending, outage)


def _be_deterministic(wanted: bool) -> None:
    if not wanted:
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    os.environ.setdefault("NCCL_ALGO", "Ring")
    os.environ.setdefault("NCCL_PROTO", "Simple")
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
