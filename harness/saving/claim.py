"""How an attempt begins: claimed in every store, with what earlier ones left behind taken away."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import harness.selfcheck.identity as identity
from harness import config
from harness.arguments import Settings
from harness.checkpoint import attempts, load
from harness.checkpoint import format as fmt
from harness.checkpoint.attempts import Attempt
from harness.checkpoint.catalog import Catalog, read_catalog
from harness.errors import OvertakenError, StorageError
from harness.store import Store, probe
from harness.supervision import control_requests


def claim(
    stores: tuple[Store, ...], choice: load.ResumePoint, world_size: int, settings: Settings, say: Callable[[str], object],
    environment: Mapping[str, Any] | None = None,
) -> Attempt:  # fmt: skip
    """Claim the next attempt; for the writer. Raises SupersededError, OvertakenError, StorageError, UsageError."""
    assert choice.survey is not None, "the writer has listed the stores"
    for store in stores:
        store.prepare(fmt.FOLDERS)
        if not store.is_local:
            probe.check(store)
    more = identity.of_program(settings) | ({"environment": dict(environment)} if environment else {})
    attempt = attempts.claim(choice.survey, choice.manifest, world_size, more=more)
    _check_not_overtaken(stores, choice.survey, attempt)
    for place, key in choice.damaged:
        if _done(partial(load.set_aside, stores[place], key), f"{key} is not set aside in {stores[place]}", say):
            say(f"harness: set aside: {key}" + (f" in {stores[place]}" if len(stores) > 1 else ""))
    text = config.to_yaml(settings.config).encode()
    for store in stores:
        _done(partial(store.sweep, fmt.FOLDERS, attempt.number), f"not all temporary files are deleted in {store}", say)
        _done(partial(control_requests.sweep, [store], attempt.number), f"not all old requests are deleted in {store}", say)
        _done(partial(store.write, "config.yaml", text, attempt.number), f"config.yaml is not written in {store}", say)
    return attempt


def _check_not_overtaken(stores: tuple[Store, ...], before: Catalog, attempt: Attempt) -> None:
    """Raises OvertakenError if the run has got further since it was listed, which may be minutes ago: to go on from what was found then
    would cut that off. The claim stands, so that whoever got further has ended; the next start goes on from there."""
    now = read_catalog(*stores)
    was, head = _newest(before), _newest(now)
    if head <= was:  # or it went back: what this start goes on from was deleted, and it has it in memory, and saves at once
        return
    words = f"the run has got from {_said(was)} to {_said(head)} while this start was under way"
    for store in stores:
        attempts.end(store, attempt, "stopped", error=words, code=OvertakenError.exit_code)
    raise OvertakenError(
        words,
        f"found: another process trained this run until attempt {attempt.number} was claimed here; it ends now",
        "Start again: the next start goes on from what is newest. A supervisor does so by itself.",
    )


def _newest(found: Catalog) -> tuple[int, int]:
    """The (attempt, step) of the newest checkpoint, whether it can be read or not; (0, 0) of none."""
    orders = [fmt.order_of(key) for key in found.newer] if found.unreadable_head is not None else []
    return max([*orders, found.head.order if found.head else (0, 0)])


def _said(order: tuple[int, int]) -> str:
    return fmt.stem(order[1], order[0]) if order[0] else "nothing"


def _done(work: Callable[[], object], failure: str, say: Callable[[str], object]) -> bool:
    """Tidy up: what it fails of is said, and is no reason not to train."""
    try:
        work()
    except StorageError as error:
        say(f"harness: warning: {failure}: {error.what}")
        return False
    return True
