"""Tell what is unusable in the stores, and decide whether a run may start from step 0."""

from __future__ import annotations

import itertools
import math

from harness.checkpoint import format as fmt
from harness.checkpoint.catalog import Catalog
from harness.distributed.ranks import World
from harness.errors import DamagedError, UsageError
from harness.store import Store

REFUSED_FRESH = (
    "To go on, put a good checkpoint back (harness verify RUN names what is damaged) "
    "or import one into a new run directory; "
    "to start over, take a new run.dir."
)


def passed_over(catalog: Catalog) -> list[str]:
    """Return lines about what the listing of a run's stores shows, and a start does not use."""
    notes = [f"skipped: {why}" for part in catalog.parts for why in part.damaged.values()]
    notes += [
        f"ignored, not of this run: {' '.join(key.split())}"
        for key in catalog.foreign + catalog.strangers
    ]
    if catalog.candidates[:1] != catalog.history[:1]:
        notes += [
            f"skipped: {m.name} was found damaged before, and is marked so in "
            f"{' and '.join(map(str, catalog.copies(m)))} (harness verify reads it again)"
            for m in itertools.takewhile(lambda m: m.key in catalog.marked, catalog.history)
        ]
    return notes


def newer_on_other_machines(store: Store, world: World, chosen: tuple[int, int]) -> list[str]:
    """Return lines about newer checkpoints in a directory that other machines have for themselves.

    The writer was on one of them before. Collective: every rank must call it.

    Args:
        store: the directory, of which this rank sees that of its machine.
        world: the ranks.
        chosen: the (attempt, step) of the checkpoint that the run resumes from.
    """

    def newest() -> tuple[int, int]:
        keys = [entry.key for entry in store.entries(fmt.CHECKPOINTS)]
        named = [key for key in keys if fmt.CHECKPOINT_NAME.match(key) and key.endswith(".json")]
        return max(map(fmt.order_of, named), default=(0, 0))

    here, *others = [(attempt, step) for attempt, step in world.on_each(newest)]
    ranks = {order: rank for rank, order in reversed(list(enumerate(others, 1)))}
    return [
        f"not taken: {fmt.stem(step, attempt)}, whose main file is in {store} of rank {rank} alone"
        for (attempt, step), rank in ranks.items()
        if (attempt, step) > max(chosen, here)
    ]


def is_half_imported(catalog: Catalog) -> bool:
    """Return whether all that was begun here are imports, and none has got to its checkpoint."""
    kinds = {record.get("kind") for record in catalog.attempts.values()}
    others = (catalog.manifests, catalog.damaged, catalog.newer, catalog.set_aside)
    return kinds == {"import"} and not any((*others, catalog.strangers, catalog.ends))


def check_fresh_start(catalog: Catalog, where: str, notes: list[str]) -> None:
    """Refuse to start from step 0 if anything hints at a history.

    Only a run without such a hint may start from step 0. A resume point that lay only in a
    machine's memory is none: no store has ever had it. It is recognised by a step beyond all
    that were committed when its attempt was claimed.

    `notes` describe the problem of each checkpoint that was tried. `where` names the stores.

    Raises:
        DamagedError: Something hints at a history.
        UsageError: An import into the run has begun and did not come to its end.
    """
    if is_half_imported(catalog):
        raise UsageError(
            f"an import into {where} did not come to its end; not starting from step 0",
            f"found: attempt {max(catalog.attempts)}, an import without a checkpoint",
            "Repeat it: harness import FILE RUN. To start from step 0, take a new run.dir.",
        )
    unusable = bool(catalog.manifests or catalog.damaged or catalog.strangers)
    hints = (notes if unusable else []) + [f"{key} is set aside" for key in catalog.set_aside]
    for number, record in catalog.attempts.items():
        origin = record.get("from", "unreadable")
        if origin is None or (
            isinstance(origin, dict) and origin["step"] > record.get("reached", math.inf)
        ):
            continue
        hints.append(
            f"{fmt.attempt_key(number)}: resumed from {record.get('from', 'an unreadable record')}"
        )
    hints += [
        f"{fmt.end_key(n)}: saved step {end['saved_step']}"
        for n, end in catalog.ends.items()
        if end.get("saved_step")
    ]
    if hints:
        raise DamagedError(
            f"{where} has a history, but no checkpoint that can be loaded; "
            "not starting from step 0",
            "\n".join(f"  {hint}" for hint in hints),
            REFUSED_FRESH,
        )
