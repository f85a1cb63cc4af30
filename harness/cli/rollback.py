"""Let a run resume from an older checkpoint.

The checkpoint is copied as the first one of a new attempt, which cuts off all later ones, also
those where this command does not look: in a machine's memory, or in a directory whose bucket is
named here. Nothing is deleted. A training process of the run that is still alive ends as
superseded, and its job resumes from there. To undo a rollback, roll back to the former newest
checkpoint, by its name.

example: harness rollback runs/a 1200
example: harness rollback runs/a step_00002000-0003
"""

from __future__ import annotations

import argparse

from harness.checkpoint import attempts, commit
from harness.checkpoint.catalog import Catalog, going_on_from
from harness.checkpoint.format import Manifest
from harness.cli import locate
from harness.errors import DamagedError, HarnessError, StorageError, UsageError
from harness.store import Store
from harness.text import say


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `harness rollback`."""
    parser.add_argument("run", metavar="RUN")
    parser.add_argument(
        "to", metavar="STEP", help="a step of the run's history, or a checkpoint's name"
    )


def run(given: argparse.Namespace) -> int:
    """Copy the checkpoint as a new attempt and return 0; do nothing if the run has ended with it.

    Raises:
        UsageError: There is no run, or it has no such checkpoint.
        DamagedError: The checkpoint does not verify.
        SupersededError: A newer attempt has begun.
        StorageError: A store fails.
    """
    store, catalog = locate.run(*locate.stores(given.run))
    manifest = _find(catalog, given.to, str(store))
    if manifest is catalog.head and _has_ended_with(catalog, manifest):
        say(f"the run stands at {manifest.name} already; nothing to do")
        return 0
    source, target = _verified(catalog, manifest), catalog.stores[-1]
    more = {"built": catalog.attempts.get(manifest.attempt, {}).get("built", {})}
    attempt = attempts.claim(catalog, manifest, manifest.world_size, "rollback", more)
    copy = commit.adopt(source, manifest, target, attempt, going_on_from(manifest))
    for store in catalog.stores:
        attempts.end_copied(store, attempt, copy, by="rollback")
    say(f"{copy.name}: the next start resumes from step {copy.step}, as {manifest.name} was")
    return 0


def _verified(catalog: Catalog, manifest: Manifest) -> Store:
    """Return the first store whose copy of a checkpoint verifies, before anything is claimed.

    Raises the error of the first copy if there is none.
    """
    problems, copies = list[HarnessError](), catalog.copies(manifest)
    whole = catalog.whole_copies(manifest)
    for store in sorted(copies, key=lambda store: store not in whole):
        try:
            locate.check(store, manifest)
        except (DamagedError, StorageError) as error:
            problems.append(error)
        else:
            return store
    raise problems[0]


def _has_ended_with(catalog: Catalog, head: Manifest) -> bool:
    """Return whether the newest attempt was stopped and has saved its last step as `head`.

    After any other end there may be a newer checkpoint in the memory of some machine, or in a store
    that is not listed here, or the attempt may still be alive. A finished run ends with no step to
    go on from.
    """
    end = catalog.ends.get(catalog.greatest, {})
    is_whole = bool(end.get("saved")) and end.get("saved_step") == head.step
    return is_whole and head.final is None and catalog.unreadable_head is None


def _find(catalog: Catalog, wanted: str, where: str) -> Manifest:
    """Return the checkpoint with this step in the history, or with this name. Raises UsageError."""
    for manifest in catalog.history if wanted.isdigit() else catalog.manifests:
        if wanted in (str(manifest.step), manifest.name):
            return manifest
    steps = ", ".join(str(m.step) for m in catalog.history) or "none"
    raise UsageError(
        f"{where} has no checkpoint {wanted}",
        f"found: steps {steps}",
        "harness ls RUN shows all of them.",
    )
