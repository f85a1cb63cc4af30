"""Put a run together: join the ranks, open the stores, find the resume point, wire the parts."""

from __future__ import annotations

import atexit
from pathlib import Path

from harness import preemption, state
from harness.arguments import Settings
from harness.checkpoint import resume
from harness.distributed import join, ranks
from harness.monitoring.console import Console
from harness.monitoring.goodput import RESTORE, Goodput, age_s
from harness.monitoring.rank_logs import divert
from harness.monitoring.wait_notices import watch
from harness.run.api import Run
from harness.run.drill_hooks import Traces, redirected
from harness.saving.current_attempt import Parts
from harness.saving.locations import check_remembered, listen, places
from harness.supervision import launches
from harness.supervision.exit_record import ExitRecord
from harness.text import fill_closed_streams
from harness.untracked.stray_loaders import watch as watch_loaders


def assemble(
    directory: str | Path | None,
    remote: str | None,
    settings: Settings,
    timeout_s: float,
    exit_record: ExitRecord,
) -> Run:
    """Join the process group, seed the generators, and return the run at its resume point.

    Collective: every rank must call it.

    Args:
        directory: As in `init`.
        remote: As in `init`.
        settings: The settings of the run; under `harness drill` others replace some of them.
        timeout_s: As in `init`.
        exit_record: Record of how this process ends.

    Raises:
        UsageError, StorageError, DamagedError, LostRankError: As `init`.
    """
    directory, remote, settings = redirected(directory, remote, settings)
    fill_closed_streams()
    launches.check_supervised(directory, remote)
    stores = places(directory, remote, settings.wait_s)
    divert(directory)
    console = Console()
    goodput = Goodput(age_s=age_s(), say=console.say)
    watch_loaders()
    preemption.install()
    preemption.die_with_launcher()
    exit_record.watch(stores)
    if ranks.prints():
        watch(goodput)
    with preemption.noticed_at_once() as noticed, goodput.joining():
        world = join.join(timeout_s, noticed, exit_record.leave_alone)
    atexit.register(world.leave)  # else gloo threads may abort a process that exits
    exit_record.take_hook()
    state.seed_rank(settings.seed, "build")  # the same on all ranks: equal models
    store_health = listen(stores, world.is_writer)
    world.on_writer(lambda: check_remembered(stores, settings.accept), give_up=preemption.requested)
    retrying = tuple(
        store.with_retry_limit(settings.wait_s, preemption.requested) for store in stores
    )
    with goodput.during(RESTORE):
        resume_point = resume.choose(
            retrying,
            world,
            give_up=preemption.requested,
            steps_back=lambda: launches.steps_back(retrying[-1]),
        )
    parts = Parts(stores, world, resume_point, settings, exit_record, store_health, goodput)
    return Run(parts, console, Traces(world))
