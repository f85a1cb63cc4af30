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

from harness import preemption, state
from harness.arguments import Settings, check_numbers
from harness.checkpoint import load, retention
from harness.distributed import ranks
from harness.monitoring.goodput import RESTORE, Goodput, age_s
from harness.monitoring.rank_logs import divert
from harness.monitoring.wait_notices import watch
from harness.run.drill_hooks import redirected
from harness.run.loop import Run
from harness.saving.locations import check_remembered, listen, places
from harness.store import DEFAULT_WAIT_S
from harness.supervision import launches
from harness.supervision.exit_record import ExitRecord
from harness.text import fill_closed_streams
from harness.untracked.stray_loaders import watch as watch_loaders

__all__ = ["Run", "init"]


def init(
    directory: str | Path | None,
    *,
    remote: str | None = None,
    seed: int = 0, save_every_s: float | str | None = 60.0, save_every_steps: int | None = None,
    keep_last: int = 3, keep_every_steps: int | None = None, keep_best: int = 1, best: str = "val_loss:min",
    snapshot: str = "overlapped", when_busy: str = "wait", memory: bool | int = False,
    wait_s: float = DEFAULT_WAIT_S,
    remote_keep: Mapping[str, int | None] | None = None, config: Mapping[str, Any] | None = None,
    accept: Sequence[str] = (), override: Sequence[str] = (), environment: str = "warn", on_mismatch: str = "warn",
    deterministic: bool = False,
    timeout_s: float = 600.0,
    log_every_steps: int = 10,
    step_timeout_s: float | None = None,
    grace_s: float | None = None,
    margin_s: float = 30.0,
    is_scratch: bool = False, notices: str | None = None,
    log_to: Sequence[str] = (), rehearse: bool = True,
) -> Run:  # fmt: skip
    """Join the other ranks, catch signals, seed all generators, and find the newest checkpoint of the run.

    The run lives in `directory`, in `remote` (a URL for fsspec, as s3://bucket/prefix), or in both: then each checkpoint is committed in
    the directory and copied in the background, and the newest that verifies is gone on from, wherever it lies. The remote may be
    unreachable for `wait_s` seconds. It keeps what the directory keeps, but for `remote_keep`: last, every_steps, best. It saves every
    `save_every_s` seconds; "auto": as often as is worth it, by what a save and what an interruption costs this run. Saves run in the
    background. What an optimizer owns is copied during the next forward and backward passes; `snapshot="at_once"`: while training waits;
    "checked": compared, too. A save that is due before the last has arrived waits for it, or (`when_busy="skip"`) is left out if the clock
    asks for it. With `memory` each step (a number: every so many) is kept in the machine's memory as well, unless the one before is on its
    way: a process that dies, on a machine that does not, loses nothing. A step may take `timeout_s` seconds, or `step_timeout_s`, before it
    counts as hung. `grace_s` lie between SIGTERM and the kill (None: as SLURM says), `margin_s` between a stop and the job's time limit;
    `is_scratch`: the directory is lost with the job. `notices` is the cloud ("aws", "gcp", "azure") that tells when it takes a spot machine
    away. `log_to` names who is told of all that is logged: "tensorboard", "wandb". `rehearse`: the first checkpoint of a new run is read
    back and loaded into copies, to tell what a restart would fail of. `config`, what training depends on, is kept in each checkpoint; a run
    refuses to go on with another unless `accept=["config"]`. On another machine or software than the checkpoint was made on
    `environment="refuse"` ends the start. A step that is made again is compared with what it was; `on_mismatch="stop"` ends the run before
    its next save if it is another. Nothing is changed here; the run is claimed when training begins. Collective: every rank must call it.
    """
    ending = ExitRecord()  # from here on a user's mistake is said in words
    check_numbers(locals())
    _be_deterministic(deterministic)
    policy = retention.Policy(keep_last, keep_every_steps, keep_best, best.rpartition(":")[0] or best, best.endswith(":max"))
    settings = Settings(
        seed=seed, save_every_s=save_every_s, save_every_steps=save_every_steps, wait_s=wait_s, policy=policy,
        remote_policy=retention.changed(policy, remote_keep or {}), accept=tuple(accept), override=tuple(override), grace_s=grace_s,
        log_every_steps=log_every_steps, step_timeout_s=step_timeout_s, margin_s=margin_s, is_scratch=is_scratch, notices=notices,
        snapshot=snapshot, when_busy=when_busy, memory_every_steps=int(memory) or None, log_to=tuple(log_to), on_mismatch=on_mismatch,
        rehearse=rehearse, environment=environment, config=state.plain_data({"config": dict(config or {})})["config"],
    )  # fmt: skip
    return _start(directory, remote, settings, timeout_s, ending)


def _start(directory: str | Path | None, remote: str | None, settings: Settings, timeout_s: float, ending: ExitRecord) -> Run:
    directory, remote, settings = redirected(directory, remote, settings)
    fill_closed_streams()
    account = Goodput(age_s=age_s())
    launches.check_supervised(directory, remote)
    stores = places(directory, remote, settings.wait_s)
    divert(directory)
    watch_loaders()
    preemption.install()
    preemption.die_with_launcher()
    ending.watch(stores)
    if ranks.prints():
        watch(account)
    with preemption.noticed_at_once() as noticed, account.joining():
        world = ranks.join(timeout_s, noticed, ending.leave_alone)
    atexit.register(world.leave)  # gloo's threads may abort a process that ends under them
    ending.take_hook()
    state.seed_rank(settings.seed, "build")  # alike on all ranks, so that they build the same model
    outage = listen(stores, world.is_writer)
    world.on_writer(lambda: check_remembered(stores, settings.accept), give_up=preemption.requested)
    patient = tuple(store.patient(settings.wait_s, preemption.requested) for store in stores)
    with account.during(RESTORE):
        choice = load.choose(patient, world, give_up=preemption.requested, steps_back=lambda: launches.steps_back(patient[-1]))
    return Run(world, stores, choice, settings, ending, outage, account)


def _be_deterministic(wanted: bool) -> None:
    if not wanted:
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    os.environ.setdefault("NCCL_ALGO", "Ring")
    os.environ.setdefault("NCCL_PROTO", "Simple")
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
