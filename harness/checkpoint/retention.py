"""Retention: select the checkpoints to delete, and delete them.

The selection is a pure function. The deletion lists the attempts again before each delete, so that
a superseded attempt deletes nothing more.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from harness.checkpoint import format as fmt
from harness.checkpoint.attempts import Attempt, check_fence
from harness.checkpoint.catalog import Catalog, read_catalog
from harness.checkpoint.format import Manifest
from harness.checkpoint.known import Known
from harness.checkpoint.records import is_count
from harness.errors import UsageError
from harness.store import SET_ASIDE, TEMP, Store

ALWAYS_KEPT = 2
RECORDED = "retention"  # field of an attempt's record


@dataclass(frozen=True)
class Policy:
    """Which checkpoints to keep.

    These are the newest `last`, every checkpoint whose step is a multiple of `every_steps`, and the
    `best` by `metric`.
    """

    last: int = 3
    every_steps: int | None = None
    best: int = 1
    metric: str = "val_loss"
    higher_is_better: bool = False

    @property
    def ranking(self) -> str:
        """Return the metric and its direction, as "NAME:min" or "NAME:max"."""
        return f"{self.metric}:{'max' if self.higher_is_better else 'min'}"


def policy(last: int, every_steps: int | None, best: int, metric: str) -> Policy:
    """Return the policy that ranks by `metric`, which is written "NAME:min" or "NAME:max"."""
    name, _, direction = metric.rpartition(":")
    return Policy(last, every_steps, best, name, direction == "max")


def record(policy: Policy, remote_policy: Policy) -> dict[str, Any]:
    """Return the policies of the first and of a remote store as a field of an attempt's record."""
    return {
        RECORDED: {"run": dataclasses.asdict(policy), "remote": dataclasses.asdict(remote_policy)}
    }


def recorded(
    catalog: Catalog, *, is_local: bool, manifest: Manifest | None = None
) -> Policy | None:
    """Return the policy of the newest attempt in a lineage that has recorded a valid one.

    None if there is none: an earlier harness recorded no policy.

    Args:
        catalog: Catalog of the run's stores.
        is_local: Whether the policy of the run directory is returned, or that of a remote store.
        manifest: The checkpoint whose lineage counts; None: the head.
    """
    of = manifest or catalog.head
    for number, _ in reversed(of.lineage if of else ()):
        both = catalog.attempts.get(number, {}).get(RECORDED)
        fields = both.get("run" if is_local else "remote") if isinstance(both, dict) else None
        if isinstance(fields, dict) and _is_policy(fields):
            return Policy(**fields)
    return None


def _is_policy(fields: Mapping[str, Any]) -> bool:
    """Return whether the fields from outside are those of a policy, each of its type."""
    return (
        fields.keys() == {field.name for field in dataclasses.fields(Policy)}
        and all(is_count(fields[name]) for name in ("last", "best"))
        and (fields["every_steps"] is None or is_count(fields["every_steps"]))
        and isinstance(fields["metric"], str)
        and isinstance(fields["higher_is_better"], bool)
    )


def changed(policy: Policy, by: Mapping[str, int | None]) -> Policy:
    """Return the policy with other values of `last`, `every_steps` or `best`.

    None leaves a value unchanged. Raises UsageError for any other name.
    """
    if unknown := sorted(set(by) - {"last", "every_steps", "best"}):
        raise UsageError(
            f"nothing can be kept by {', '.join(unknown)}", "expected: last, every_steps, best"
        )
    return dataclasses.replace(
        policy,
        **{name: value for name, value in by.items() if value is not None},  # type: ignore[arg-type]
    )


def score(manifest: Manifest, policy: Policy) -> float | None:
    """Return the score of a checkpoint by the policy's metric; greater is better.

    Returns None if the metric was not measured or is NaN.
    """
    value = manifest.metrics.get(policy.metric)
    if value is None or math.isnan(value):
        return None
    return value if policy.higher_is_better else -value


def best(manifests: Iterable[Manifest], policy: Policy) -> list[Manifest]:
    """Return the checkpoints that have a score, best first; of equal ones the older first."""
    scored = [(value, m) for m in manifests if (value := score(m, policy)) is not None]
    return [m for value, m in sorted(scored, key=lambda pair: (-pair[0], pair[1].order))]


def better(
    metrics: Mapping[str, float], so_far: float | None, policy: Policy
) -> tuple[float | None, bool]:
    """Return the best value of the policy's metric, and whether to save a checkpoint for it.

    Args:
        metrics: New measurements.
        so_far: Best value so far, or None.
        policy: Retention policy.

    Returns:
        The best value including `metrics`, and True if `metrics` have improved it and the policy
        keeps best checkpoints.
    """
    value = metrics.get(policy.metric)
    if value is None or math.isnan(value):
        return so_far, False
    improved = so_far is None or (value > so_far if policy.higher_is_better else value < so_far)
    return (value, policy.best > 0) if improved else (so_far, False)


def best_file(stores: Sequence[Store], policy: Policy) -> str | None:
    """Return the path or URL of the best checkpoint in the run's history, or None.

    Raises StorageError.
    """
    catalog = read_catalog(*stores)
    ranked = best(catalog.history, policy)
    return catalog.copies(ranked[0])[0].where(ranked[0].data_key) if ranked else None


def to_delete(history: list[Manifest], verified: set[str], policy: Policy) -> list[Manifest]:
    """Return the checkpoints to delete, oldest first: those that the policy does not keep.

    The policy is applied twice: to all checkpoints, and to the verified ones alone. A checkpoint
    that either of the two keeps stays. An unverified checkpoint may be damaged, and would otherwise
    take the place of a good one. Nothing is deleted while fewer than `ALWAYS_KEPT` checkpoints are
    verified.

    Args:
        history: Checkpoints of the run's history in this store.
        verified: Names of the checkpoints that this attempt has written or read in full.
        policy: Retention policy.
    """
    kept = _places(history, policy) | _places([m for m in history if m.name in verified], policy)
    if sum(m.name in verified for m in history) < ALWAYS_KEPT:
        return []
    return sorted((m for m in history if m.name not in kept), key=lambda m: m.order)


def _places(history: list[Manifest], policy: Policy) -> set[str]:
    newest_first = sorted(history, key=lambda m: m.order, reverse=True)
    kept = newest_first[: max(policy.last, ALWAYS_KEPT)]
    kept += [m for m in newest_first if policy.every_steps and m.step % policy.every_steps == 0]
    kept += best(newest_first, policy)[: policy.best]
    return {m.name for m in kept}


def apply(
    store: Store,
    attempt: Attempt,
    verified: set[str],
    policy: Policy,
    pinned: Collection[str] = (),
    known: Known | None = None,
) -> list[str]:
    """Delete checkpoints that the policy does not keep, and unfinished data of earlier attempts.

    Call it right after a commit of this attempt. That commit has cut off every earlier attempt, so
    data that those left without a manifest can never count again. In a remote store a main file
    stays all the same: its owner may be alive elsewhere and would fail without it. Shards go there,
    too: a kill leaves as many as there are ranks.

    The store is listed each time, because others may have deleted checkpoints.

    Args:
        store: Store to delete from.
        attempt: The current attempt.
        verified: Names of the checkpoints that this attempt has written or read in full.
        policy: Retention policy.
        pinned: Names of checkpoints that must stay.
        known: What this process has read and written of the store; none of it is read again.

    Returns:
        Names of the deleted checkpoints and keys of the deleted data files.

    Raises:
        SupersededError: A newer attempt has begun.
        StorageError: The store fails.
    """
    catalog = read_catalog(store, known=[known or Known()])
    gone = []
    for manifest in to_delete(catalog.history, verified, policy):
        if manifest.name in pinned:
            continue
        check_fence(store, attempt)
        delete(store, manifest)
        gone.append(manifest.name)
    return gone + _sweep(store, attempt, catalog)


def _sweep(store: Store, attempt: Attempt, catalog: Catalog) -> list[str]:
    """Delete what earlier attempts have left without a manifest; return the keys."""
    gone = []
    for key in (*(catalog.orphans if store.is_local else ()), *catalog.orphan_folders):
        match = fmt.CHECKPOINT_NAME.match(key) or fmt.FOLDER_NAME.match(key)
        if match and int(match["attempt"]) < attempt.number:
            check_fence(store, attempt)
            store.delete(key) if key in catalog.orphans else delete_folder(store, key)
            gone.append(key)
    return gone


def delete(store: Store, manifest: Manifest) -> None:
    """Delete a checkpoint, manifest first.

    Data that remains after a crash in between is no checkpoint.
    """
    store.delete(manifest.key)
    store.delete(*(file.key for file in manifest.files))
    if manifest.shards:
        store.drop_folder(f"{fmt.CHECKPOINTS}/{manifest.name}")


def follow(store: Store, standing: Collection[str], before: tuple[int, int]) -> None:
    """Delete shards on this machine whose checkpoint the writer has deleted on its own machine.

    Nothing is deleted that has a manifest here. Raises StorageError.

    Args:
        store: Store of this machine: a directory, or the memory tier.
        standing: Names of the checkpoints that stand on the writer's machine.
        before: The (attempt, step) of the writer's newest one; what is newer stays.
    """
    files, folders = store.listing(fmt.CHECKPOINTS)
    keys = {entry.key for entry in files}
    for folder in folders:
        if fmt.FOLDER_NAME.match(folder) and fmt.order_of(f"{folder}.json") < before:
            is_named = {f"{folder}.json", f"{folder}.json{SET_ASIDE}"} & keys
            if fmt.stem_of(folder) not in standing and not is_named:
                delete_folder(store, folder)


def shards_in(store: Store, folder: str) -> list[str]:
    """Return the keys of the shards in a folder, unfinished and damaged ones too; of no others."""
    keys = [entry.key for entry in store.entries(folder)]
    return [key for key in keys if fmt.SHARD_NAME.match(key) or TEMP.match(key)]


def delete_folder(store: Store, folder: str) -> None:
    """Delete shards that no manifest names, with their folder if nothing else is in it.

    Raises StorageError.
    """
    if keys := shards_in(store, folder):
        store.delete(*keys)
    store.drop_folder(folder)
