"""Which checkpoints may go. The decision is a pure function; carrying it out lists the attempts again before each delete."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from harness.checkpoint import format as fmt
from harness.checkpoint.attempts import Attempt, check_fence
from harness.checkpoint.catalog import read_catalog
from harness.checkpoint.format import Manifest
from harness.errors import UsageError
from harness.store import Store

ALWAYS_KEPT = 2


@dataclass(frozen=True)
class Policy:
    """Keep the newest `last`, every checkpoint whose step is a multiple of `every_steps`, and the `best` by `metric`."""

    last: int = 3
    every_steps: int | None = None
    best: int = 1
    metric: str = "val_loss"
    higher_is_better: bool = False


def changed(policy: Policy, by: Mapping[str, int | None]) -> Policy:
    """The policy with other numbers of `last`, `every_steps` or `best`; None leaves one as it is. Raises UsageError."""
    if unknown := sorted(set(by) - {"last", "every_steps", "best"}):
        raise UsageError(f"nothing can be kept by {', '.join(unknown)}", "expected: last, every_steps, best")
    return dataclasses.replace(policy, **{name: value for name, value in by.items() if value is not None})  # type: ignore[arg-type]


def score(manifest: Manifest, policy: Policy) -> float | None:
    """How good a checkpoint is by the policy's metric, greater is better; None if that was not measured."""
    value = manifest.metrics.get(policy.metric)
    if value is None or math.isnan(value):
        return None
    return value if policy.higher_is_better else -value


def best(manifests: Iterable[Manifest], policy: Policy) -> list[Manifest]:
    """Those with a score, best first; of equal ones the older first."""
    scored = [(value, m) for m in manifests if (value := score(m, policy)) is not None]
    return [m for value, m in sorted(scored, key=lambda pair: (-pair[0], pair[1].order))]


def better(metrics: Mapping[str, float], so_far: float | None, policy: Policy) -> tuple[float | None, bool]:
    """The best value of the policy's metric, and whether it is from these metrics and worth a checkpoint."""
    value = metrics.get(policy.metric)
    if value is None or math.isnan(value):
        return so_far, False
    improved = so_far is None or (value > so_far if policy.higher_is_better else value < so_far)
    return (value, policy.best > 0) if improved else (so_far, False)


def best_file(stores: Sequence[Store], policy: Policy) -> str | None:
    """The path or URL of the best checkpoint in the run's history, or None. Raises StorageError."""
    found = read_catalog(*stores)
    ranked = best(found.history, policy)
    return found.copies(ranked[0])[0].where(ranked[0].data_key) if ranked else None


def to_delete(history: list[Manifest], verified: set[str], policy: Policy) -> list[Manifest]:
    """The checkpoints that may go, oldest first.

    `verified` names those that were read whole, or written, by this attempt. Only they fill a place of the policy; one that
    was not verified is kept as well if it would have a place, but takes none from another: it may be damaged.
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


def apply(store: Store, attempt: Attempt, verified: set[str], policy: Policy, pinned: Collection[str] = ()) -> list[str]:
    """Delete what the policy lets go but for the `pinned`, and data that earlier attempts left without a manifest; returns the names.

    Call it right after a commit of this attempt: that commit has cut off every earlier attempt, so what those left unfinished
    can never count again. In a remote store it is left alone all the same: its owner may be alive elsewhere, and be confused.
    Raises SupersededError, StorageError.
    """
    found = read_catalog(store)
    gone = []
    for manifest in to_delete(found.history, verified, policy):
        if manifest.name in pinned:
            continue
        check_fence(store, attempt)
        delete(store, manifest)
        gone.append(manifest.name)
    for key in found.orphans if store.is_local else ():
        match = fmt.CHECKPOINT_NAME.match(key)
        if match and int(match["attempt"]) < attempt.number:
            check_fence(store, attempt)
            store.delete(key)
            gone.append(key)
    return gone


def delete(store: Store, manifest: Manifest) -> None:
    """The manifest first: what is left after a crash in between is no checkpoint."""
    store.delete(manifest.key)
    for file in manifest.files:
        store.delete(f"{fmt.CHECKPOINTS}/{file.name}")
