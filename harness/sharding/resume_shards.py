"""Verify the shards of the checkpoint that a run resumes from, on all ranks together.

Each rank verifies a share of them, so that each is read once. A shard that is damaged or missing in
one store is taken from the next one. Directories and memory may be those of one machine each: a
shard that a rank does not see there is no damage, but lies elsewhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from harness.checkpoint.format import DataFile, Manifest
from harness.checkpoint.load import AbsentError, ElsewhereError, GoneError, check_bytes
from harness.distributed.parts import PARTS
from harness.distributed.ranks import World
from harness.errors import DamagedError, HarnessError, StorageError
from harness.sharding.shards import ShardFiles
from harness.store import Store


def add_parts(
    stores: tuple[Store, ...],
    manifest: Manifest,
    payload: dict[str, Any] | None,
    world: World,
    are_apart: bool,
) -> tuple[list[str], list[str]]:
    """Verify this rank's share of a checkpoint's shards, and add the parts to its content.

    Collective: every rank must call it, with None where the main file could not be read.

    Args:
        stores: the stores in which shards are looked for, one after the other.
        manifest: the manifest of the checkpoint.
        payload: the content of its main file.
        world: the ranks.
        are_apart: whether each machine may have stores of its own, of which this rank sees one.

    Returns:
        Lines about what was read from another store than the first, and why; and the keys of the
        shards that are damaged in the first one. The same on all ranks.

    Raises:
        DamagedError: A shard is not what was written.
        StorageError: A shard cannot be read by this rank.
        ElsewhereError: The shards are on several machines, and not each where it is needed.
    """
    problem: HarnessError | None = None
    parts: ShardFiles | None = None
    try:
        if payload is not None:
            parts = ShardFiles(stores, manifest, payload, are_apart=are_apart)
            payload[PARTS] = parts
    except HarnessError as error:
        problem = error
    if are_apart:
        _check_reach(parts, manifest, world)

    answers, problem = _keep_all(parts, problem, payload or {}, manifest, stores, world)
    _check_for_all(answers, problem, stores, manifest, world)
    if any(answer["has_failed"] for answer in answers):
        return [], []
    rows = [row for answer in answers for row in answer["found_elsewhere"]]
    return _lines(rows, stores, manifest), _damaged_here(rows, stores[0], manifest, world)


def _keep_all(
    parts: ShardFiles | None,
    problem: HarnessError | None,
    payload: dict[str, Any],
    manifest: Manifest,
    stores: tuple[Store, ...],
    world: World,
) -> tuple[list[dict[str, Any]], HarnessError | None]:
    """Verify the shards; return what each rank has found, and the problem of this rank.

    Collective: every rank must call it.
    """
    is_same = world.size == len(manifest.shards)

    def keep() -> dict[str, Any]:
        nonlocal problem
        try:
            if parts is not None:
                parts.keep(world.rank, world.size)
                parts.give_own(payload, [world.rank] if is_same else [])
        except HarnessError as error:
            problem = error
        return {
            "has_failed": problem is not None,
            "is_damaged": isinstance(problem, DamagedError),
            "found_elsewhere": _found_elsewhere(parts, stores) if parts is not None else [],
        }

    return world.on_each(keep), problem


def _check_for_all(
    answers: Sequence[dict[str, Any]],
    problem: HarnessError | None,
    stores: tuple[Store, ...],
    manifest: Manifest,
    world: World,
) -> None:
    """Raise the problem of this rank, if there is one.

    A shard that is damaged for another rank than the writer alone is not damaged: it was so on the
    way, or this rank's machine does not see it.
    Collective: every rank must call it.
    """
    if ranks := [rank for rank, answer in enumerate(answers) if answer["is_damaged"] and rank]:
        shares = [manifest.shards[rank :: world.size] for rank in ranks]
        whole = world.on_writer(lambda: [_are_whole(stores, share) for share in shares])
        if problem is not None and world.rank in ranks and whole[ranks.index(world.rank)]:
            raise StorageError(
                f"{problem.what}, for this rank alone",
                problem.found,
                "Is run.dir on a file system that all nodes share? Else start again.",
            )
    if problem is not None:
        raise problem


def _lines(
    rows: Sequence[dict[str, Any]], stores: tuple[Store, ...], manifest: Manifest
) -> list[str]:
    """Return a line about the shards that were not read from the first store, if there are any."""
    if not rows:
        return []
    reasons = "".join(f"; {row['why']}" for row in rows if row["why"])
    return [
        f"{len(rows)} of {len(manifest.shards)} shards of {manifest.name} are read from "
        f"{stores[-1]}{reasons}"
    ]


def _damaged_here(
    rows: Sequence[dict[str, Any]], store: Store, manifest: Manifest, world: World
) -> list[str]:
    """Return the keys of the shards that the writer finds damaged in the first store, too.

    Collective: every rank must call it.
    """
    if files := [manifest.shards[row["number"]] for row in rows if row["is_damaged"]]:
        return world.on_writer(
            lambda: [
                file.key for file in files if store.exists(file.key) and not _is_whole(store, file)
            ]
        )
    return []


def _found_elsewhere(parts: ShardFiles, stores: tuple[Store, ...]) -> list[dict[str, Any]]:
    """Return a row for each shard that was not whole in the first store."""
    first, rows = stores[0], list[dict[str, Any]]()
    for number, (store, problems) in parts.found.items():
        if store is not first:
            error = problems[first]
            is_there = not isinstance(error, AbsentError | GoneError)
            why = f"{error.what} in {first}" if is_there else ""
            is_damaged = is_there and isinstance(error, DamagedError)
            rows.append({"number": number, "why": why, "is_damaged": is_damaged})
    return rows


def _check_reach(parts: ShardFiles | None, manifest: Manifest, world: World) -> None:
    """Check that each rank reaches the shards that it needs, before any of them is read.

    With another number of ranks, or with other parts on the ranks, each needs several.
    Collective: every rank must call it.

    Raises:
        ElsewhereError: At least one rank does not.
        StorageError: A store cannot be listed.
    """
    count = len(manifest.shards)
    missing = world.on_each(lambda: [] if parts is None else parts.missing_here())
    for rank, numbers in enumerate(missing):
        needed = {rank} if world.size == count else set(range(count))
        if lacking := sorted(needed & set(numbers)):
            raise ElsewhereError(
                f"{manifest.shards[lacking[0]].name} lies on another machine than that of rank "
                f"{rank}, or is lost with one",
                f"{count} ranks have saved, {world.size} resume" if world.size != count else "",
            )


def _are_whole(stores: tuple[Store, ...], files: Sequence[DataFile]) -> bool:
    """Return whether each file is whole in one of the stores, as far as they can be read."""
    return all(any(_is_whole(store, file) for store in stores) for file in files)


def _is_whole(store: Store, file: DataFile) -> bool:
    """Return whether a file is not damaged, as far as it can be read."""
    try:
        check_bytes(store, [file])
    except DamagedError:
        return False
    except HarnessError:
        pass
    return True
