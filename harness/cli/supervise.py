"""Decide for a job script whether a launch may begin, and whether another one must follow it.

`before` records the launch. `after` records its end and prints the cause of a failure in its last
lines. HARNESS_LAUNCH holds the launch's name: the job's number and how often it was started, as in
1234.0. The settings name the run, and are the same as for training. Failures are counted in the
run's stores, so that they are not forgotten when the job is queued again. A stop on request or
before the time limit, and the loss of a machine, do not count as failures.

Exit code: 75 begin, or start again · 0 finished · 1 failed for good · 78 configuration or usage ·
74 storage · 76 superseded by a newer start · 130 stopped by `harness stop`.

example: harness supervise before --config configs/digits.yaml run.dir=runs/a
example: harness supervise after --code 1 --config configs/digits.yaml run.dir=runs/a
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import PurePath

from harness import config
from harness.checkpoint.attempts import spell
from harness.checkpoint.catalog import Catalog, reaches, read_catalog
from harness.config import Config
from harness.errors import (
    EXIT_FAILED,
    EXIT_FINISHED,
    EXIT_STOPPED,
    EXIT_STORAGE,
    EXIT_USAGE,
    StorageError,
    UsageError,
)
from harness.store import Store, open_store, redacted
from harness.supervision import control_requests, launches
from harness.supervision.launches import Launch
from harness.supervision.notify import notify
from harness.supervision.restart_policy import (
    ASKED,
    EXIT_ASKED,
    Failure,
    Outcome,
    crash_loop,
    failures,
    has_final,
    outcome,
    verdict,
)
from harness.text import now, say


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `harness supervise`."""
    parser.add_argument("when", choices=("before", "after"))
    parser.add_argument("--config", help="YAML file, relative to the working directory")
    parser.add_argument(
        "--code", type=int, default=EXIT_FAILED, help="after: the exit code of what was launched"
    )
    parser.add_argument(
        "--stopped",
        action="store_true",
        help="after: it was ended from outside; that is no failure",
    )
    parser.add_argument(
        "--submitted",
        action="store_true",
        help="before: refuse unless the run's record is there, made by harness submit",
    )
    parser.add_argument(
        "settings", nargs="*", metavar="key=value", help="settings that override the file's"
    )


def run(given: argparse.Namespace) -> int:
    """Run `before` or `after` and return the exit code. Raises UsageError, StorageError."""
    settings, _ = config.load(given.config, given.settings)
    name = launches.own()
    if name is None or not launches.is_name(name):
        raise UsageError(
            f"{launches.ENVIRONMENT} does not name a launch",
            f"found: {name!r}",
            "export HARNESS_LAUNCH=$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}",
        )
    if given.when == "before":
        return before(settings, name, submitted=given.submitted)
    return after(settings, name, given.code, stopped=given.stopped).exit_code


def places(settings: Config) -> list[Store]:
    """Return the run's stores, the directory first."""
    return [
        open_store(place, settings.store.wait_s)
        for place in (settings.run.dir, settings.run.remote)
        if place is not None
    ]


def before(settings: Config, name: str, *, submitted: bool = False) -> int:
    """Record the launch and return 75, or return the exit code of a run that needs no launch.

    Args:
        settings: Settings of the run.
        name: Name of the launch.
        submitted: Raise UsageError unless a store has the record of `harness submit`.

    Returns:
        75 if the launch may begin; 0 if the run is finished; 1 after a crash loop; 130 if
        `harness stop` has stopped it. A finished run's own program begins nevertheless, unless this
        supervisor has seen it end well.

    Raises:
        StorageError: A store cannot be read or written.
        UsageError: The record of `harness submit` is missing, or the stores hold different runs, or
            only a newer harness can read the newest checkpoint.
    """
    stores = [store.with_retry_limit(settings.store.wait_s) for store in places(settings)]
    catalog = read_catalog(*stores)
    if submitted:
        _check_submitted(stores, catalog)
    catalog.check_same_run()
    catalog.check_readable()
    known = launches.read(stores)
    supervisor = name.rpartition(".")[0]
    if (code := _code_without_launch(catalog, known, settings, supervisor)) is not None:
        return code
    failed, most = failures(catalog, known, supervisor), settings.run.max_failures
    details = {
        "failures": len(failed),
        "most_failures": most,
        "steps_back": len(failed) == most - 1 and _have_resumed(catalog, failed),
    } | ({"loop": _name_of(settings)} if settings.run.loop else {})
    launches.begin(stores, name, catalog, **details)
    if catalog.attempts and not is_complete(catalog, settings):
        step = catalog.head.step if catalog.head else 0
        message = f"resumes from step {step}"
        notify(settings.notify, "resumed", str(stores[0]), message, step=step, launch=name)
    return EXIT_STOPPED


def _code_without_launch(
    catalog: Catalog, known: Sequence[Launch], settings: Config, supervisor: str
) -> int | None:
    """Return the exit code of a supervisor that needs no launch, after a line that says why."""
    own = [launch for launch in known if launch.supervisor == supervisor]
    if catalog.head is not None and is_complete(catalog, settings):
        where = catalog.copies(catalog.head)[0]
        finished = f"the run in {where} is finished, at step {catalog.head.step}"
        if not settings.run.loop or (own and own[-1].has_ended_well):
            say(f"harness: {finished}; nothing to do")
            return EXIT_FINISHED
        # Only the program knows its length, and what stands after its loop.
        say(f"harness: {finished}; {_name_of(settings)} is started, in case that it goes on")
    if own:
        # After `harness stop`, SLURM may have queued the job again before it could end itself.
        asked = _asked(catalog, supervisor) or verdict(catalog, known, own[-1].name)[0]
        if asked.exit_code == EXIT_ASKED:
            show(asked, [])
            return EXIT_ASKED
    failed = failures(catalog, known, supervisor)
    if len(failed) >= settings.run.max_failures:
        show(Outcome("failed", crash_loop(failed), EXIT_FAILED), failed)
        return EXIT_FAILED
    return None


def _asked(catalog: Catalog, supervisor: str) -> Outcome | None:
    """Return the outcome if the newest attempt could not act on a request to stop any more.

    It was killed, or ended for another reason. The request concerns this supervisor, if the attempt
    was its own: a new one is started by somebody who wants the run to go on.
    """
    newest = max(catalog.attempts, default=0)
    if str(catalog.attempts.get(newest, {}).get("launch")).rpartition(".")[0] != supervisor:
        return None
    if not any(
        "stop" in control_requests.pending(store, newest).values() for store in catalog.stores
    ):
        return None
    why = f"attempt {newest} was asked to by {ASKED}, and has ended without it; not started again"
    return Outcome("stopped", why, EXIT_ASKED)


def _name_of(settings: Config) -> str:
    """Return the name of the user's program."""
    return PurePath(settings.run.loop[0]).name


def _have_resumed(catalog: Catalog, failed: Sequence[Failure]) -> bool:
    """Return whether any of the launches that failed had an attempt that resumed a checkpoint."""
    return any(
        record.get("from")
        for failure in failed
        for record in launches.attempts_of(catalog, failure.launch).values()
    )


def _check_submitted(stores: Sequence[Store], catalog: Catalog) -> None:
    """Raise UsageError unless a store has the record of `harness submit`, or attempts of the run.

    The record is written anew, since a file system may delete files that are old.
    """
    has_begun = catalog.greatest or catalog.manifests
    if not (has_begun or any(store.exists(launches.SUBMITTED) for store in stores)):
        raise UsageError(
            "this run was submitted, but its record is not here: the disk is another one, or empty",
            f"searched: {' and '.join(store.where(launches.SUBMITTED) for store in stores)}",
            "Put run.dir on a file system that all nodes share, or give the run a run.remote.",
        )
    try:
        record = stores[-1].read(launches.SUBMITTED)
    except FileNotFoundError:
        record = spell({"submitted": now()})
    stores[-1].prepare((launches.LAUNCHES,))
    stores[-1].write(launches.SUBMITTED, record, 0)


def is_complete(catalog: Catalog, settings: Config) -> bool:
    """Return whether the run is finished, and as long as these settings require.

    An attempt to extend it that has saved nothing changes nothing. A program of the user's own
    decides its length itself: if it has begun to extend its run, it wants more.
    """
    head = catalog.head
    if head is None or head.final is None or not has_final(catalog):
        return False
    if settings.run.loop:
        return outcome(catalog).exit_code == EXIT_FINISHED
    return reaches(
        head.final, {"epochs": settings.train.epochs, "max_steps": settings.train.max_steps}
    )


def found_complete(catalog: Catalog, settings: Config, name: str) -> bool:
    """Return whether the run was complete for the processes of a launch that have all ended well.

    An own program that has claimed no attempt did not want to extend its run.
    """
    is_idle = bool(settings.run.loop) and not launches.attempts_of(catalog, name)
    return is_complete(catalog, settings) or (is_idle and has_final(catalog))


def after(settings: Config, name: str, code: int, *, stopped: bool) -> Outcome:
    """Record how the launch ended; print and return what its supervisor must do.

    An exit code of 75 in the outcome means that the supervisor must start again. If a store fails,
    the exit code is 74.

    Args:
        settings: Settings of the run.
        name: Name of the launch.
        code: Exit code of the launch.
        stopped: Whether the launch was ended from outside, which is no failure.
    """
    try:
        stores = [store.with_retry_limit(settings.store.wait_s) for store in places(settings)]
        catalog = read_catalog(*stores)
        is_over = code == EXIT_FINISHED and found_complete(catalog, settings, name)
        why, details = (
            ("ended", {"code": code})
            if is_over
            else _ended(catalog, settings, name, code, stopped=stopped)
        )
        for store in stores:
            launches.end(store, name, why, **details)
        stands, failed = verdict(catalog, launches.read(stores), name)
    except StorageError as error:
        say(f"harness: cannot tell how the run stands: {redacted(str(error))}", sys.stderr)
        return Outcome("unknown", error.what, EXIT_STORAGE)
    show(stands, failed)
    if (kind := _notice(stands, failed)) is not None:
        step = catalog.head.step if catalog.head else 0
        notify(settings.notify, kind, str(stores[0]), stands.why, step=step, launch=name)
    return stands


def _notice(stands: Outcome, failed: Sequence[Failure]) -> str | None:
    """Return the kind of notification for this end of a launch.

    Returns None for a superseded launch, because another start continues the run.
    """
    if stands.exit_code == EXIT_STOPPED:
        return "crashed" if failed else "stopped"
    return {
        EXIT_FINISHED: "finished",
        EXIT_ASKED: "stopped",
        EXIT_FAILED: "failed",
        EXIT_USAGE: "failed",
    }.get(stands.exit_code)


def _ended(
    catalog: Catalog, settings: Config, name: str, code: int, *, stopped: bool
) -> tuple[str, dict[str, object]]:
    """Return how the launch ended, and the details for its record.

    Only the exit code is known here. The end records of attempts hold more.

    Args:
        catalog: Catalog of the run's stores.
        settings: Settings of the run.
        name: Name of the launch.
        code: Exit code of the launch.
        stopped: Whether the launch was ended from outside.
    """
    is_alone = not launches.attempts_of(catalog, name)
    # `before` detects a finished run, and `harness launch` records a program that ended well
    # without training as failed. Otherwise, exit code 0 without an attempt means that a signal
    # ended the launcher before any rank began to train.
    if stopped or (is_alone and code == EXIT_FINISHED):
        return "stopped", {"code": code}
    if not is_alone:
        return "ended", {"code": code}
    # What the program does after its loop needs no attempt.
    is_rest = settings.run.loop and found_complete(catalog, settings, name)
    what = f"exit code {code}" if is_rest else f"no rank began to train (exit code {code})"
    return "failed", {"code": code, "error": f"{what}; the log above says why"}


def show(stands: Outcome, failed: Sequence[Failure]) -> None:
    """Print the state of the run, after the traceback of the first failure.

    A finished run's own line does not hold the error of a failure, so that is printed as well.
    """
    for failure in failed[:1]:
        if failure.trace:
            say(
                f"harness: {failure.subject}, the first error:\n{failure.trace.rstrip()}",
                sys.stderr,
            )
        elif stands.exit_code == EXIT_FINISHED:
            say(f"harness: {failure}; the last checkpoint is in place all the same", sys.stderr)
    say(f"harness: {stands.state}: {stands.why}", sys.stderr)
