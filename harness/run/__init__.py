"""The library with which `harness/train.py` and user training loops are written.

    run = harness.init("runs/a", save_every_s=60, seed=1)
    run.track(model=model, optimizer=optimizer)
    for x, y in run.batches(dataset, global_batch_size=64, epochs=5):
        …
        run.log(loss=loss)

The code after the `yield` in `Loop._steps`, which `batches` drives, runs after the user's step.
This is the step boundary: the only place where all ranks agree on saving and stopping, and do both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from harness.config.init_arguments import DEFAULTS
from harness.run.api import Run
from harness.run.assembly import assemble

__all__ = ["Run", "init"]


def init(
    directory: str | Path | None,
    *,
    remote: str | None = None,
    seed: int = DEFAULTS["seed"],
    save_every_s: float | str | None = DEFAULTS["save_every_s"],
    save_every_steps: int | None = DEFAULTS["save_every_steps"],
    keep_last: int = DEFAULTS["keep_last"],
    keep_every_steps: int | None = DEFAULTS["keep_every_steps"],
    keep_best: int = DEFAULTS["keep_best"],
    best: str = DEFAULTS["best"],
    snapshot: str = DEFAULTS["snapshot"],
    when_busy: str = DEFAULTS["when_busy"],
    memory: bool | int = DEFAULTS["memory"],
    wait_s: float = DEFAULTS["wait_s"],
    remote_keep: Mapping[str, int | None] | None = None,
    config: Mapping[str, Any] | None = None,
    accept: Sequence[str] = DEFAULTS["accept"],
    override: Sequence[str] = DEFAULTS["override"],
    environment: str = DEFAULTS["environment"],
    on_mismatch: str = DEFAULTS["on_mismatch"],
    deterministic: bool = DEFAULTS["deterministic"],
    timeout_s: float = DEFAULTS["timeout_s"],
    log_every_steps: int = DEFAULTS["log_every_steps"],
    step_timeout_s: float | None = DEFAULTS["step_timeout_s"],
    grace_s: float | None = DEFAULTS["grace_s"],
    margin_s: float = DEFAULTS["margin_s"],
    is_scratch: bool = DEFAULTS["is_scratch"],
    notices: str | None = DEFAULTS["notices"],
    log_to: Sequence[str] = DEFAULTS["log_to"],
    rehearse: bool = DEFAULTS["rehearse"],
) -> Run:
    """Join the process group, catch signals, seed all generators, and find the newest checkpoint.

    A run is stored in `directory`, in `remote`, or in both. With both, each checkpoint is committed
    in the directory and uploaded in the background. The run resumes from the newest checkpoint that
    verifies, in whichever store it is found. Saves run in the background. `init` changes nothing in
    the run; the run is claimed when training begins.

    Collective: every rank must call it.

    Args:
        directory: Local or shared directory of the run. None: the run is stored only in `remote`.
        remote: URL of a remote store that fsspec opens, such as s3://bucket/prefix. None: no remote
            store.
        seed: Seed of the generators of Python, NumPy and torch and of the order of samples.
        save_every_s: Seconds between two saves, 60 by default. "auto": the interval is chosen
            from the measured cost of a save and of an interruption of this run. None: no saves by
            the clock.
        save_every_steps: Also save in every step whose number is a multiple of this. None: no saves
            by step number.
        keep_last: Number of newest checkpoints that retention keeps. The two newest are always
            kept.
        keep_every_steps: Also keep every checkpoint whose step is a multiple of this. None: no
            such rule.
        keep_best: Number of best checkpoints to keep, as measured by `best`. 0: none.
        best: Metric that ranks checkpoints, as "NAME:min" or "NAME:max". Default: the lowest
            `val_loss`.
        snapshot: How optimizer-owned state is copied for a save. "overlapped" (default): during
            the next forward and backward passes. "at_once": while training waits. "checked": while
            training waits, and each copy is compared with the state before the next update, to
            detect mutation; "overlapped" does this for the first save only.
        when_busy: What to do with a save that is due while the previous one is still in flight.
            "wait" (default): wait for the previous one. "skip": leave out a save that the clock
            asks for.
        memory: Also keep the newest step in the memory of the machine (the memory tier), every
            step (True) or every so many steps (a number), unless the previous save is still in
            flight. A process that dies then loses nothing as long as its machine stays up. False
            (default): no memory tier.
        wait_s: Seconds for which the remote store may be unreachable, 300 by default.
        remote_keep: Retention in the remote store where it differs from that of the directory:
            `last`, `every_steps` and `best`. None, for one of them or for all: as in the directory.
        config: Plain data that training depends on. It is stored in each checkpoint, and a resume
            with a different config is refused unless `accept` contains "config". None: {}.
        accept: Differences from the checkpoint that are accepted in a resume: "config" (other
            settings, or data that is sharded differently), "data" (another dataset), "dtype"
            (parameters in another precision), "remote" (another remote store). Default: none.
        override: Names of changed config settings to apply. If there are any, optimizers and
            schedulers keep the settings that they are built with, in place of those of the
            checkpoint. Default: the settings of the checkpoint.
        environment: What to do when hardware or software differ from those that the checkpoint was
            made on. "warn" (default): print a warning. "refuse": end the start.
        on_mismatch: What to do when a recomputed step differs from the step that an earlier attempt
            recorded. "warn" (default): print a warning. "stop": end the run before its next save.
        deterministic: True: use deterministic algorithms of torch, cuDNN, cuBLAS and NCCL. False
            (default): these libraries choose.
        timeout_s: Seconds, 600 by default: the longest wait for another rank, and the longest step.
            The first step and a batch of an evaluation may take three times as long, a save six
            times as long.
        log_every_steps: Steps between two records of the logged values, 10 by default.
        step_timeout_s: Seconds that a step may take before it counts as hung. None: 300 s more than
            thirty times the longest step so far, at most `timeout_s`. If it is longer than
            `timeout_s`, the first step may take three times as long as it.
        grace_s: Seconds between SIGTERM and SIGKILL. None: as configured in SLURM, if the run is a
            SLURM job.
        margin_s: Seconds to leave between a stop and the time limit of the job, 30 by default.
        is_scratch: True: the directory is lost with the job, and a save before a stop counts only
            if it is uploaded; each node may have its own. False (default): it outlives the job.
        notices: Cloud whose metadata service announces that a spot machine is taken away: "aws",
            "gcp" or "azure". None: no service is polled.
        log_to: Trackers that receive all logged values: "tensorboard", "wandb". Default: none.
        rehearse: True (default): read the first checkpoint of a new run back and load it into
            copies, in order to report what a restart would fail on. False: skip this.

    Returns:
        The run, at its resume point. `Run.track` restores the state of objects.

    Raises:
        UsageError: An argument is invalid, or the run must not resume with these arguments.
        StorageError: A store cannot be listed or read.
        DamagedError: The run has a history, but no checkpoint of it loads.
        LostRankError: Another rank died or did not answer.
    """
    return assemble(dict(locals()))
