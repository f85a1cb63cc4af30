"""Check whether a run may resume from a checkpoint, and restore tracked objects and generators.

Each error message of a check names the setting that accepts the difference, if there is one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from harness import state
from harness.arguments import Settings
from harness.checkpoint.format import Manifest
from harness.data.source import Source
from harness.distributed.data_ranks import changed_ranks, dealt_to
from harness.distributed.parts import PARTS
from harness.distributed.ranks import World
from harness.errors import UsageError
from harness.meta import uninitialised
from harness.selfcheck.data_checks import check_data
from harness.untracked import foreign_optimizers

DRAW = "The global generators of Python, NumPy and torch are saved for each rank: draw from them."
EMPTY = (
    "nothing of it survives a kill. Let it give its values (torchmetrics: metric.persistent(True)),"
    " or do not track it."
)


def check(
    tracked: Mapping[str, Any],
    payload: Mapping[str, Any],
    data: Mapping[str, Any],
    accept: tuple[str, ...],
) -> list[str]:
    """Check that the run can resume exactly, now and later from its own checkpoints.

    Args:
        tracked: The tracked objects, by name.
        payload: Contents of the checkpoint at the resume point; {} for a new run.
        data: Description of the data that the loop uses now.
        accept: Names of the differences that are accepted.

    Returns:
        Warnings to print.

    Raises:
        UsageError: The run could not resume exactly.
    """
    check_tracked(tracked, payload)
    state.check(tracked)
    if payload:
        check_data(data, payload["data"], accept)
    forgotten = foreign_optimizers.untracked_schedule(tracked)
    return (
        [f"a scheduler moves the learning rate of {forgotten}, but is not tracked: no exact resume"]
        if forgotten
        else []
    )


def give_back(
    tracked: Mapping[str, Any],
    new: Mapping[str, Any],
    built: dict[str, Any],
    origin: Manifest | None,
    payload: Mapping[str, Any] | None,
    settings: Settings,
    before: Mapping[str, str],
) -> list[str]:
    """Restore the state of all tracked objects, if there is a checkpoint.

    All are restored at each call: a new scheduler has changed the learning rate of its optimizer.

    Args:
        tracked: All tracked objects, by name.
        new: Those of them that were added by this call of `track`.
        built: Settings with which each object was built; those of the new objects are added.
        origin: Manifest of the resume point, or None.
        payload: Contents of the checkpoint at the resume point, or None.
        settings: Validated arguments of `harness.init`.
        before: Digests of the settings as built with which the checkpoint's objects have begun.

    Returns:
        Warnings and notices to print.

    Raises:
        UsageError: The checkpoint does not fit the objects, or one of them is not initialised.
    """
    messages = [
        f"warning: {name}.state_dict() is empty: {EMPTY}"
        for name, obj in new.items()
        if foreign_optimizers.gives_nothing(obj)
    ]
    built |= {name: state.as_built(obj) for name, obj in new.items()}
    if payload is None or origin is None:
        uninitialised.check(new)
        return messages
    written = "harness" in origin.versions  # every parameter name that the file does not imply
    accept = settings.accept
    notes = state.restore(tracked, origin.classes, payload, origin.name, accept, says_names=written)
    uninitialised.check(new)
    messages += [f"warning: {note}" for note in notes]
    if settings.override:
        lines = state.apply_override(built, _built_anew(tracked, built, before))
        return messages + [f"overridden: {line}" for line in lines]
    changed = state.other_settings(built, {name: tracked[name] for name in new})
    return messages + [
        f"warning: {line}. The checkpoint's is taken; for the one as built: {_override(line)}"
        for line in changed
    ]


def _built_anew(
    tracked: Mapping[str, Any], built: Mapping[str, Any], before: Mapping[str, str]
) -> dict[str, Any]:
    """Return the objects to which `resume.override` applies.

    Their settings as built are others than those that they have begun with. Those of the others
    were applied before, and what has changed since then is the training's.
    """
    return {
        name: obj
        for name, obj in tracked.items()
        if state.digest_of_built(built[name]) != before.get(name)
    }


def _override(line: str) -> str:
    return f"resume.override=[{line.partition(':')[0]}]"


def check_tracked(tracked: Mapping[str, Any], payload: Mapping[str, Any]) -> None:
    """Raise UsageError if nothing is tracked, or an object of the checkpoint is not tracked."""
    if not tracked:
        raise UsageError(
            "nothing is tracked: nothing would survive",
            remedy="Call run.track(model=…, optimizer=…) before the loop.",
        )
    saved = [key.removesuffix("_state_dict") for key in payload if key.endswith("_state_dict")]
    if missing := [name for name in saved if name not in tracked]:
        raise UsageError(
            f"the checkpoint holds what is not tracked: {', '.join(missing)}",
            f"found: {', '.join(tracked)}",
            "Track the same names as before, or take a new run directory.",
        )


def check_same_ranks(iterators: list[Any], change: str) -> None:
    """Raise UsageError if the states of iterable datasets are those of another number of ranks.

    Call it only when the number of ranks has changed.
    """
    if any(iterator is not None for iterator in iterators):
        raise UsageError(
            "an iterable dataset keeps its state per rank, so the number of ranks cannot change",
            f"found: {change}",
            "Start as many as before.",
        )


def check_trackable(name: str, obj: Any, tracked: Mapping[str, Any], *, is_late: bool) -> None:
    """Raise UsageError if an object cannot be tracked.

    Args:
        name: Name of the object; it must not be taken.
        obj: The object: a generator, or one with `state_dict` and `load_state_dict`.
        tracked: The objects that are tracked already, by name.
        is_late: True if training has begun; then nothing can be tracked any more.
    """
    if is_late:
        raise UsageError(
            f"track({name}=…) came after the first batch",
            remedy="Track everything before the loop.",
        )
    if name in tracked:
        raise UsageError(
            f"two objects are tracked as {name!r}", remedy="Give each one a name of its own."
        )
    if isinstance(obj, type):
        raise UsageError(
            f"{name} cannot be tracked",
            f"found: the class {obj.__name__}, not an object of it",
            f"Build one, {obj.__name__}(…), and track that.",
        )
    if not state.is_generator(obj) and not (
        hasattr(obj, "state_dict") and hasattr(obj, "load_state_dict")
    ):
        raise UsageError(
            f"{name} cannot be tracked",
            f"found: a {type(obj).__name__} without state_dict and load_state_dict",
            DRAW if "Generator" in type(obj).__name__ else "Plain values go into run.state.",
        )


def put_back(
    tracked: Mapping[str, Any],
    changed: Mapping[str, Any],
    built: Mapping[str, Any],
    origin: Manifest | None,
    payload: Mapping[str, Any],
    settings: Settings,
    before: Mapping[str, str],
) -> None:
    """Restore some of the tracked objects once more, in place.

    Args:
        tracked: All tracked objects, by name.
        changed: Those to restore.
        built: Settings with which each object was built, from `give_back`.
        origin: Manifest of the resume point, or None.
        payload: Contents of the checkpoint at the resume point.
        settings: Validated arguments of `harness.init`.
        before: See `give_back`.

    Raises:
        UsageError: The checkpoint does not fit an object any more.
    """
    if origin is None or not changed:
        return
    state.restore(
        tracked,
        origin.classes,
        payload,
        origin.name,
        settings.accept,
        says_names="harness" in origin.versions,
        only=changed,
    )
    if settings.override:
        state.apply_override(built, _built_anew(changed, built, before))


def set_generators(payload: Mapping[str, Any], world: World, seed: int, step: int) -> list[str]:
    """Restore the generators of this rank; a rank that the checkpoint does not have gets new ones.

    The arguments are those of `restore_generators`.

    Returns:
        A notice if a generator of a GPU could not be restored, else [].
    """
    before = dealt_to(payload)
    is_same = before == list(world.data_ranks)
    if is_same or world.data_rank in before:  # ranks that compute together need the same ones
        at = world.rank if is_same else before.index(world.data_rank)
        generators = payload["rng"]
        if generators[at] is None:  # in a shard that this rank has not needed before
            generators[at] = payload[PARTS].own(at)["rng"]
        notice = state.restore_rng_state(generators[at], world.rank)
        return [notice] * bool(notice)
    state.seed_rank(seed, "rank", world.data_rank, step)
    return []


def restore_generators(
    payload: Mapping[str, Any], world: World, source: Source, seed: int, step: int
) -> list[str]:
    """Restore the generators and the iterator of this rank.

    A rank that the checkpoint does not have gets newly seeded generators, as every rank does in a
    new run.

    Args:
        payload: Contents of the checkpoint at the resume point; {} for a new run.
        world: The ranks of this attempt.
        source: Source of the steps, which restores its iterator.
        seed: Seed of the run.
        step: Number of the step at the resume point.

    Returns:
        Notices if the number of ranks has changed, or generators of GPUs cannot be restored.

    Raises:
        UsageError: The data is an iterable dataset and the number of ranks has changed.
    """
    before = dealt_to(payload)
    notices = set_generators(payload, world, seed, step)
    if before in ([], list(world.data_ranks)):
        source.restore(payload["data"]["iterators"][world.rank] if before else None)
        return notices
    check_same_ranks(payload["data"]["iterators"], changed_ranks(payload, world))
    same = (
        "the loop finds its data itself, and other data now"
        if source.is_own
        else "same samples, same global batches, other last bits"
    )
    return [*notices, f"{changed_ranks(payload, world)}: {same}"]
