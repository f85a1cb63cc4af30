"""Delete what the run's retention lets go, and what crashes and rollbacks left behind.

Without --yes it only says what it would delete. Everything is read and verified first, so that a damaged checkpoint never takes
the place of a good one. Files that were set aside as damaged are listed, and deleted only with --set-aside.

example: harness prune runs/a --keep-last 1 --yes
"""

from __future__ import annotations

import argparse
from typing import Any

from harness import config
from harness.checkpoint import format as fmt
from harness.checkpoint import load, retention
from harness.checkpoint.history import Survey
from harness.cli import locate
from harness.errors import HarnessError, StorageError
from harness.events import say
from harness.store import TEMP, LocalStore


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN")
    parser.add_argument("--keep-last", type=int, metavar="N", help="instead of the run's checkpoint.keep_last")
    parser.add_argument("--keep-every-steps", type=int, metavar="N", help="instead of checkpoint.keep_every_steps")
    parser.add_argument("--keep-best", type=int, metavar="N", help="instead of checkpoint.keep_best")
    parser.add_argument("--best", metavar="NAME:max|min", help="instead of checkpoint.best")
    parser.add_argument("--set-aside", action="store_true", help="also what was set aside as damaged")
    parser.add_argument("--yes", action="store_true", help="delete, do not only say so")


def run(given: argparse.Namespace) -> int:
    store, found = locate.run(given.run)
    good = {m.name for m in found.history if _verifies(store, m)}
    manifests = retention.to_delete(found.history, good, _policy(store, given))
    history = {m.name for m in found.history}
    if good:  # nothing is deleted before something better is there
        manifests += [m for m in found.manifests if m.name not in history]
    keys = _left_behind(store, found) + (found.set_aside if given.set_aside else [])
    for manifest in manifests:
        say(f"{'delete' if given.yes else 'would delete'}  {manifest.name}" + ("" if manifest.name in history else "  (cut off)"))
        if given.yes:
            retention.delete(store, manifest)
    for key in keys:
        say(f"{'delete' if given.yes else 'would delete'}  {key}")
        if given.yes:
            store.delete(key)
    if not given.set_aside and found.set_aside:
        say(f"kept, set aside as damaged: {', '.join(found.set_aside)}")
    if not manifests and not keys:
        say("nothing to delete")
    elif not given.yes:
        say("nothing was deleted; add --yes")
    return 0


def _verifies(store: LocalStore, manifest: fmt.Manifest) -> bool:
    try:
        load.verified(store, manifest).close()
    except HarnessError:
        return False
    return True


def _left_behind(store: LocalStore, found: Survey) -> list[str]:
    """Data without a manifest and temporary files, of attempts that a newer one has replaced: those may still be writing."""
    orphans = [key for key in found.orphans if (match := fmt.CHECKPOINT_NAME.match(key)) and int(match["attempt"]) < found.greatest]
    entries = [entry.key for folder in fmt.FOLDERS for entry in store.entries(folder)]
    return orphans + [key for key in entries if (match := TEMP.match(key)) and int(match["attempt"]) < found.greatest]


def _policy(store: LocalStore, given: argparse.Namespace) -> retention.Policy:
    try:
        kept: dict[str, Any] = config.from_yaml(store.read("config.yaml")).get("checkpoint") or {}
    except (FileNotFoundError, StorageError):
        kept = {}
    default = retention.Policy()
    best = given.best or kept.get("best", f"{default.metric}:min")
    return retention.Policy(
        given.keep_last or kept.get("keep_last", default.last),
        given.keep_every_steps or kept.get("keep_every_steps", default.every_steps),
        given.keep_best if given.keep_best is not None else kept.get("keep_best", default.best),
        best.rpartition(":")[0] or best,
        best.endswith(":max"),
    )
