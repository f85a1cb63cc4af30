"""Begin an attempt: claim it in every store and clean up what earlier attempts left behind."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import harness.selfcheck.identity as identity
from harness.arguments import Settings
from harness.checkpoint import attempts, resume, retention
from harness.checkpoint import format as fmt
from harness.checkpoint.attempts import Attempt
from harness.checkpoint.catalog import Catalog, read_catalog
from harness.config import stored_form
from harness.errors import OvertakenError, StorageError
from harness.store import Store, probe
from harness.supervision import control_requests, launches

# Folders that supervisors and commands write to.
WRITTEN_BY_OTHERS = (launches.LAUNCHES, control_requests.REQUESTS)


def claim(
    stores: tuple[Store, ...],
    resume_point: resume.ResumePoint,
    world_size: int,
    settings: Settings,
    say: Callable[[str], object],
    environment: Mapping[str, Any] | None = None,
) -> Attempt:
    """Claim the next attempt in every store; for the writer.

    The claim also sets damaged checkpoints aside, deletes temporary files and requests of earlier
    attempts, and writes config.yaml. If one of these fails, a warning is printed and training goes
    on.

    Args:
        stores: the stores of the run; the last one is the authority on attempts.
        resume_point: the resume point, with the writer's listing of the stores.
        world_size: the number of ranks, for the attempt's record.
        settings: the validated settings of the run.
        say: prints a line to the user.
        environment: the software and hardware of this start, for the attempt's record.

    Raises:
        SupersededError: another start has claimed this attempt.
        OvertakenError: the run has got further since the stores were listed.
        StorageError: a store cannot be read or written, or a remote store fails the probe.
        UsageError: passed through, if anything called here raises it.
    """
    assert resume_point.catalog is not None, "the writer has listed the stores"
    for store in stores:
        store.prepare(fmt.FOLDERS)
        if not store.is_local:
            probe.check(store)
    more = (
        identity.of_program(settings)
        | retention.record(settings.policy, settings.remote_policy)
        | ({"environment": dict(environment)} if environment else {})
        | {"built": dict(resume_point.built), "is_scratch": settings.is_scratch}
    )
    attempt = attempts.claim(resume_point.catalog, resume_point.manifest, world_size, more=more)
    _check_not_overtaken(stores, resume_point.catalog, attempt)
    _set_aside(stores, resume_point, say)
    text = stored_form.to_yaml(settings.config).encode()
    for store in stores:
        _clean_up(store, attempt, text, say)
    return attempt


def _set_aside(
    stores: tuple[Store, ...], resume_point: resume.ResumePoint, say: Callable[[str], object]
) -> None:
    """Set the damaged checkpoints of the stores aside, and say which."""
    for place, key in resume_point.damaged:
        if _done(
            partial(resume.set_aside, stores[place], key),
            f"{key} is not set aside in {stores[place]}",
            say,
        ):
            say(f"harness: set aside: {key}" + (f" in {stores[place]}" if len(stores) > 1 else ""))


def _clean_up(store: Store, attempt: Attempt, text: bytes, say: Callable[[str], object]) -> None:
    """Delete the temporary files and requests of earlier attempts, and write config.yaml anew."""
    _done(
        partial(store.sweep, ("", *fmt.FOLDERS, *WRITTEN_BY_OTHERS), attempt.number),
        f"not all temporary files are deleted in {store}",
        say,
    )
    _done(
        partial(control_requests.sweep, [store], attempt.number),
        f"not all old requests are deleted in {store}",
        say,
    )
    _done(
        partial(store.write, "config.yaml", text, attempt.number),
        f"config.yaml is not written in {store}",
        say,
    )


def _check_not_overtaken(stores: tuple[Store, ...], before: Catalog, attempt: Attempt) -> None:
    """Raise OvertakenError if the run has got further since the stores were listed.

    The listing may be minutes old, and resuming from it would cut off the newer checkpoints. The
    claim remains in force, so the process that got further is fenced off and ends. The claimed
    attempt is recorded as stopped, and the next start resumes from the newest checkpoint.
    """
    # What the first listing has read is known by now; only the listing itself may have changed.
    now = read_catalog(*stores, known=[part.known for part in before.parts])
    was, head = _newest(before), _newest(now)
    # An older head means that the resume point was deleted. This start holds it in memory and
    # saves it at once.
    if head <= was:
        return
    message = (
        f"the run has got from {_checkpoint_name(was)} to {_checkpoint_name(head)} "
        "while this start was under way"
    )
    for store in stores:
        attempts.end(store, attempt, "stopped", error=message, code=OvertakenError.exit_code)
    raise OvertakenError(
        message,
        "found: another process trained this run until "
        f"attempt {attempt.number} was claimed here; it ends now",
        "Start again: the next start resumes from what is newest. A supervisor does so by itself.",
    )


def _newest(catalog: Catalog) -> tuple[int, int]:
    """Return the (attempt, step) of the newest checkpoint, readable or not.

    Returns (0, 0) if there is no checkpoint.
    """
    orders = (
        [fmt.order_of(key) for key in catalog.newer] if catalog.unreadable_head is not None else []
    )
    return max([*orders, catalog.head.order if catalog.head else (0, 0)])


def _checkpoint_name(order: tuple[int, int]) -> str:
    return fmt.stem(order[1], order[0]) if order[0] else "nothing"


def _done(work: Callable[[], object], failure: str, say: Callable[[str], object]) -> bool:
    """Run a clean-up task; return False after a warning if it raises StorageError.

    A failed clean-up is no reason not to train.
    """
    try:
        work()
    except StorageError as error:
        say(f"harness: warning: {failure}: {error.what}")
        return False
    return True
