"""Let a run resume from an older checkpoint.

The older checkpoint is copied as the first one of a new attempt, which cuts off all later
checkpoints. Nothing is deleted. A training process of the run that is still alive ends as
superseded. To undo a rollback, roll back to the former newest checkpoint, by its name.

example: harness rollback runs/a 1200
example: harness rollback runs/a step_00002000-0003
"""

from __future__ import annotations

import argparse

from harness.checkpoint import attempts, commit
from harness.checkpoint.catalog import Catalog, going_on_from
from harness.checkpoint.format import Manifest
from harness.cli import locate
from harness.errors import UsageError
from harness.text import say


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `harness rollback`."""
    parser.add_argument("run", metavar="RUN")
    parser.add_argument(
        "to", metavar="STEP", help="a step of the run's history, or a checkpoint's name"
    )


def run(given: argparse.Namespace) -> int:
    """Copy the older checkpoint as a new attempt and return 0; do nothing if it is the newest one.

    Raises:
        UsageError: There is no run, or it has no such checkpoint.
        DamagedError: The checkpoint does not verify.
        SupersededError: A newer attempt has begun.
        StorageError: A store fails.
    """
    store, catalog = locate.run(*locate.stores(given.run))
    manifest = _find(catalog, given.to, str(store))
    if manifest is catalog.head and manifest.final is None and catalog.unreadable_head is None:
        say(f"the run stands at {manifest.name} already; nothing to do")
        return 0
    source, target = catalog.copies(manifest)[0], catalog.stores[-1]
    locate.check(source, manifest)  # before anything is claimed
    attempt = attempts.claim(catalog, manifest, manifest.world_size, kind="rollback")
    copy = commit.adopt(source, manifest, target, attempt, going_on_from(manifest))
    for store in catalog.stores:
        attempts.end_copied(store, attempt, copy, by="rollback")
    say(f"{copy.name}: the next start resumes from step {copy.step}, as {manifest.name} was")
    return 0


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
