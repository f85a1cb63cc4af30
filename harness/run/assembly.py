"""Put a run together: join the ranks, open the stores, find the resume point, build the parts."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch

from harness import preemption, state
from harness.arguments import Settings, check_kinds, plain_config
from harness.checkpoint import resume, retention
from harness.checkpoint.format import Manifest
from harness.config.init_arguments import check
from harness.distributed import join, ranks
from harness.distributed.ranks import World
from harness.meta import uninitialised
from harness.monitoring.console import Console
from harness.monitoring.goodput import RESTORE, Goodput, age_s
from harness.monitoring.metric_buffer import MetricBuffer
from harness.monitoring.rank_logs import divert
from harness.monitoring.step_timeouts import StepTimeouts
from harness.monitoring.throughput import Throughput
from harness.monitoring.wait_notices import watch
from harness.preemption import blocked, children
from harness.run.api import Run
from harness.run.build_work import WorkBuilder
from harness.run.drill_hooks import Traces, redirected
from harness.run.evaluation import evaluate
from harness.run.kept_state import KeptState
from harness.run.protocols import LoopParts, StepCounter
from harness.run.stop_agreement import StopAgreement
from harness.saving.checkpointer import Checkpointer
from harness.saving.current_attempt import Parts
from harness.saving.locations import check_remembered, listen, places
from harness.sharding.resume_shards import add_parts
from harness.store import Store
from harness.supervision import launches
from harness.supervision.exit_record import ExitRecord
from harness.text import fill_closed_streams
from harness.untracked.stray_loaders import watch as watch_loaders


def assemble(arguments: Mapping[str, Any]) -> Run:
    """Check the arguments of `init`, join the process group, and return the run.

    It is at its resume point. Collective: every rank must call it.

    Args:
        arguments: The arguments of `init`, by name.

    Raises:
        UsageError, StorageError, DamagedError, LostRankError: As `init`.
    """
    before = preemption.current_run()
    try:
        return _assembled(arguments)
    except BaseException:
        if preemption.current_run() != before:
            preemption.over(preemption.current_run())
        raise


def _assembled(arguments: Mapping[str, Any]) -> Run:
    exit_record = ExitRecord()  # from here on user errors are reported without a traceback
    check(arguments)
    check_kinds(arguments)
    if arguments["deterministic"]:
        _be_deterministic()
    # A drill replaces the stores and some settings.
    directory, remote, settings = redirected(
        arguments["directory"], arguments["remote"], _settings(arguments)
    )
    fill_closed_streams()
    launches.check_supervised(directory, remote)
    stores = places(directory, remote, settings.wait_s)
    divert(directory)
    console = Console()
    goodput = Goodput(age_s=age_s(), say=console.say)
    watch_loaders()
    uninitialised.watch()
    world = _joined(arguments["timeout_s"], stores, exit_record, goodput)
    state.seed_rank(settings.seed, "build")  # the same on all ranks: equal models
    store_health = listen(stores, world.is_writer)
    with goodput.during(RESTORE):
        resume_point = _resume_point(stores, world, settings)
    parts = Parts(stores, world, resume_point, settings, exit_record, store_health, goodput)
    return _wired(parts, console)


def _joined(
    timeout_s: float, stores: tuple[Store, ...], exit_record: ExitRecord, goodput: Goodput
) -> World:
    """Catch signals, join the process group, and return its ranks."""
    preemption.install()
    preemption.die_with_launcher()
    exit_record.watch(stores)
    if ranks.prints():
        watch(goodput)
    with blocked.noticed_at_once() as noticed, goodput.joining():
        world = join.join(timeout_s, noticed, exit_record.leave_alone)
    children.at_exit(world.leave)  # else gloo threads may abort a process that exits
    exit_record.take_hook()
    return world


def _resume_point(
    stores: tuple[Store, ...], world: World, settings: Settings
) -> resume.ResumePoint:
    """Choose the checkpoint to resume from, and load it."""
    retrying = tuple(
        store.with_retry_limit(settings.wait_s, preemption.requested) for store in stores
    )
    chosen = resume.choose(
        retrying,
        world,
        give_up=preemption.requested,
        steps_back=partial(launches.steps_back, retrying[-1]),
        check=partial(check_remembered, stores, settings.accept),
        add_parts=add_parts,
        are_apart=settings.is_scratch and len(stores) > 1,
    )
    if chosen.payload is not None and chosen.payload["best"] is not None:
        _rank_anew(chosen, chosen.payload, world, settings.policy.ranking)
    if chosen.manifest is not None:
        _note_built(chosen, chosen.manifest, world)
    return chosen


def _note_built(chosen: resume.ResumePoint, manifest: Manifest, world: World) -> None:
    """Note the settings as built with which the checkpoint's optimizers and schedulers have begun.

    The record of its attempt has them. Collective: every rank must call it.
    """

    def recorded() -> dict[str, str]:
        found = chosen.catalog.attempts.get(manifest.attempt, {}) if chosen.catalog else {}
        return found["built"] if isinstance(found.get("built"), dict) else {}

    chosen.built_before.update(world.on_writer(recorded, give_up=preemption.requested))


def _rank_anew(
    chosen: resume.ResumePoint, payload: dict[str, Any], world: World, ranking: str
) -> None:
    """Drop the best value so far if it is one of another metric than the one that ranks now.

    Collective: every rank must call it.
    """

    def recorded() -> str | None:
        if chosen.catalog is None:
            return None
        policy = retention.recorded(chosen.catalog, is_local=True, manifest=chosen.manifest)
        return policy.ranking if policy else None

    settings = payload["config"].get("checkpoint")  # for a run of an earlier version
    configured = settings.get("best") if isinstance(settings, dict) else None
    before = world.on_writer(recorded, give_up=preemption.requested) or configured
    if before not in (None, ranking):
        payload["best"] = None
        chosen.notes.append(
            f"checkpoints were ranked by {before}, and are ranked by {ranking} from here on: "
            "the best value so far begins anew"
        )


def _wired(parts: Parts, console: Console) -> Run:
    """Build the parts of the loop, and the run from them."""
    world, settings, exit_record = parts.world, parts.settings, parts.exit_record

    def say(text: str) -> None:
        if world.is_writer:
            console.say(text)

    counter, traces, throughput = StepCounter(), Traces(world), Throughput(parts.clock)
    step_timeouts = StepTimeouts(
        world.timeout_s, settings.step_timeout_s, exit_record.hung, parts.clock
    )
    exit_record.count(lambda: counter.step, lambda: counter.made)
    checkpointer = Checkpointer(parts, partial(traces.point, "save"))
    kept_state = KeptState(
        world,
        settings,
        parts.resume_point,
        counter,
        say,
        checkpointer.note,
        parts.suspects,
    )
    loop_parts = LoopParts(
        world,
        settings,
        parts.resume_point,
        parts.suspects,
        counter,
        console,
        parts.goodput,
        MetricBuffer(partial(retention.better, policy=settings.policy)),
        throughput,
        checkpointer,
        kept_state,
        StopAgreement(world, settings, checkpointer, step_timeouts, throughput, parts.clock),
        step_timeouts,
        traces,
        exit_record,
        WorkBuilder(world, settings.seed, traces.workers),
        partial(evaluate, world),
    )
    return Run(loop_parts)


def _settings(arguments: Mapping[str, Any]) -> Settings:
    """Return the settings for the arguments of `init`, which are given by name.

    Raises:
        UsageError: An argument is invalid.
    """
    policy = retention.policy(
        arguments["keep_last"],
        arguments["keep_every_steps"],
        arguments["keep_best"],
        arguments["best"],
    )
    remote_policy = retention.changed(policy, arguments["remote_keep"] or {})
    converted = {
        "policy": policy,
        "remote_policy": remote_policy,
        "accept": tuple(arguments["accept"]),
        "override": tuple(arguments["override"]),
        "memory_every_steps": int(arguments["memory"]) or None,
        "log_to": tuple(arguments["log_to"]),
        "config": state.plain_data({"config": dict(plain_config(arguments["config"] or {}))})[
            "config"
        ],
    }
    fields = {field.name for field in dataclasses.fields(Settings)}
    unchanged = {name: value for name, value in arguments.items() if name in fields}
    return Settings(**(unchanged | converted))


def _be_deterministic() -> None:
    """Let torch, cuDNN, cuBLAS and NCCL use deterministic algorithms only."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    os.environ.setdefault("NCCL_ALGO", "Ring")
    os.environ.setdefault("NCCL_PROTO", "Simple")
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
