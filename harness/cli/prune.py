"""Delete what the run's retention lets go, and what crashes and rollbacks left behind.

Without --yes it only prints what it would delete. All checkpoints of the run's history are read and
verified first, so that a damaged checkpoint never displaces a good one. Files that were set aside
as damaged are listed; they are deleted only with --set-aside.

Of a run directory, what the run's remote store still lacks and would keep stays. Nothing is deleted
if the remote store cannot be listed. In a bucket it also finds the run's uploads that were begun
more than a day ago and never completed.

example: harness prune runs/a --keep-last 1 --yes
example: harness prune s3://bucket/a
"""

from __future__ import annotations

import argparse
import datetime
import re
from typing import Any

from harness.checkpoint import format as fmt
from harness.checkpoint import load, replicate, retention
from harness.checkpoint.catalog import Catalog, read_catalog
from harness.checkpoint.load import GoneError
from harness.cli import locate
from harness.config.init_arguments import check
from harness.config.names import stored_under_todays_names
from harness.selfcheck import step_records
from harness.store import SET_ASIDE, TEMP, Store
from harness.store.bucket import Unfinished
from harness.store.remote import RemoteStore
from harness.text import say

# The keys of the files that a run uploads; see `fmt`. Only a large file is uploaded in parts.
OWN = re.compile(rf"{fmt.CHECKPOINTS}/step_\d+-\d+[./]|{fmt.EVENTS}/\d+[.-]|{fmt.FILES}/.")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `harness prune`."""
    parser.add_argument("run", metavar="RUN")
    parser.add_argument(
        "--keep-last", type=int, metavar="N", help="instead of the run's checkpoint.keep_last"
    )
    parser.add_argument(
        "--keep-every-steps", type=int, metavar="N", help="instead of checkpoint.keep_every_steps"
    )
    parser.add_argument(
        "--keep-best", type=int, metavar="N", help="instead of checkpoint.keep_best"
    )
    parser.add_argument("--best", metavar="NAME:max|min", help="instead of checkpoint.best")
    parser.add_argument(
        "--set-aside",
        action="store_true",
        help="also what was set aside as damaged; of marks on whole copies, the mark alone",
    )
    parser.add_argument("--yes", action="store_true", help="delete, do not only say so")


def run(given: argparse.Namespace) -> int:
    """Print the files to delete, delete them with --yes, and return 0.

    Raises:
        NewerFormatError: Only a newer harness can read a checkpoint of the run's history.
        UsageError: There is no run, or a number is none that the setting may have.
        StorageError: The store fails.
    """
    check({name: value for name, value in vars(given).items() if value is not None})
    store, catalog = locate.run(given.run)
    # Raises if only a newer harness can derive the run's history.
    catalog.check_readable()
    waiting = _waiting(store, catalog, given.run)
    manifests, history = _to_delete(store, catalog, given), {m.name for m in catalog.history}
    kept = [m.name for m in manifests if m.name in waiting]
    manifests = [m for m in manifests if m.name not in waiting]
    keys = (
        _left_behind(store, catalog)
        + _done(store, catalog)
        + (_still_damaged(store, catalog) if given.set_aside else [])
    )
    uploads = _unfinished(store)
    for manifest in manifests:
        say(
            f"{'delete' if given.yes else 'would delete'}  {manifest.name}"
            + ("" if manifest.name in history else "  (cut off)")
        )
        if given.yes:
            retention.delete(store, manifest)
    for key in keys:
        say(f"{'delete' if given.yes else 'would delete'}  {key}")
        if given.yes:
            _delete(store, key)
    for upload in uploads:
        say(
            f"{'abort' if given.yes else 'would abort'}  the upload of {upload.key}, "
            f"begun {upload.began:%Y-%m-%d %H:%M}"
        )
        if given.yes and isinstance(store, RemoteStore):
            store.abort(upload)
    if kept:
        say(f"kept, to be uploaded by the next start: {', '.join(kept)}")
    if not given.set_aside and _set_aside(catalog):
        say(f"kept, set aside as damaged: {', '.join(_set_aside(catalog))}")
    if not manifests and not keys and not uploads:
        say("nothing to delete")
    elif not given.yes:
        say("nothing was deleted; add --yes")
    return 0


def _to_delete(store: Store, catalog: Catalog, given: argparse.Namespace) -> list[fmt.Manifest]:
    """Return the checkpoints to delete, after reading all of the run's history.

    Raises:
        NewerFormatError: Only a newer harness can read one of them.
        StorageError: The store fails.
    """
    problems = {m.name: problem for m, problem in locate.verify(store, *catalog.history)}
    for problem in problems.values():
        if isinstance(problem, locate.UNKNOWN):
            raise problem
    good = {name for name, problem in problems.items() if problem is None}
    # A run that trains deletes checkpoints, too.
    here = [m for m in catalog.history if not isinstance(problems[m.name], GoneError)]
    manifests = retention.to_delete(here, good, _policy(store, catalog, given))
    history = {m.name for m in catalog.history}
    # Checkpoints that were cut off are kept as long as the history has no intact one.
    return manifests + [m for m in catalog.manifests if good and m.name not in history]


def _waiting(store: Store, catalog: Catalog, path: str) -> set[str]:
    """Return the names of a run directory's checkpoints that are still to be uploaded.

    These are the ones that a start, or the uploader of a running one, copies to the remote store.

    Raises:
        StorageError: The run's remote store cannot be listed.
        UsageError: It cannot be opened, or holds another run.
    """
    _, *others = locate.stores(path)
    if not others:
        return set()
    both = read_catalog(store, *others)
    both.check_same_run()
    here = [m for m in both.history if m in catalog.manifests]
    policy = retention.recorded(catalog, is_local=False) or _of_settings(store, catalog, False)
    return {m.name for m in replicate.wanted(here, replicate.arrived(both), policy)}


def _set_aside(catalog: Catalog) -> list[str]:
    """Return the keys of what was set aside as damaged.

    Where the store can rename, these are the renamed files. Where it marks instead, they are the
    manifests of the checkpoints.
    """
    return catalog.set_aside + sorted(catalog.marked)


def _still_damaged(store: Store, catalog: Catalog) -> list[str]:
    """Return the keys of what was set aside as damaged, in the order of deletion.

    A checkpoint that is only marked is read again. If it is whole, as after a second upload, only
    the mark goes; else its manifest comes first, then its data, then the mark.

    Raises:
        NewerFormatError: Only a newer harness can read a marked checkpoint.
        StorageError: The store fails.
    """
    keys, manifests = list(catalog.set_aside), {m.key: m for m in catalog.manifests}
    for key in catalog.set_aside:
        if key.endswith(f".json{SET_ASIDE}"):
            keys += retention.shards_in(store, key.removesuffix(f".json{SET_ASIDE}"))
    for key in sorted(catalog.marked):
        is_damaged, mark = True, key + SET_ASIDE
        if key in manifests:
            (_, problem), *_ = locate.verify(store, manifests[key])
            if isinstance(problem, locate.UNKNOWN):
                raise problem
            # Since it was listed, the run may have uploaded it again, and lifted the mark.
            is_damaged = problem is not None and store.exists(mark)
        if is_damaged:
            data = key.removesuffix(".json")
            keys += [key, f"{data}.pt", *retention.shards_in(store, data)]
        keys.append(mark)
    return keys


def _unfinished(store: Store) -> list[Unfinished]:
    """Return the uploads of this run's own files that were begun more than a day ago.

    The age is measured by the server's own clock. Younger uploads may still be in flight. Under the
    run's prefix, above all in a bucket's root, there may be uploads of others.
    """
    if not isinstance(store, RemoteStore):
        return []
    oldest = store.now() - datetime.timedelta(days=1)
    return [
        upload for upload in store.unfinished() if upload.began < oldest and OWN.match(upload.key)
    ]


def _delete(store: Store, key: str) -> None:
    """Delete a file, and its folder if that is one of shards and empty then."""
    store.delete(key)
    if fmt.FOLDER_NAME.match(folder := key.rpartition("/")[0]):
        store.drop_folder(folder)


def _left_behind(store: Store, catalog: Catalog) -> list[str]:
    """Return the keys of data without a manifest and of temporary files.

    Those of the newest attempt are left out as long as it has not ended: it may still be writing.
    """
    over = catalog.greatest + int(catalog.greatest in catalog.ends)  # those before write no more
    orphans = [
        key
        for key in catalog.orphans
        if (match := fmt.CHECKPOINT_NAME.match(key)) and int(match["attempt"]) < over
    ]
    entries = [entry.key for folder in fmt.FOLDERS for entry in store.entries(folder)]
    for folder in catalog.orphan_folders:
        if (match := fmt.FOLDER_NAME.match(folder)) and int(match["attempt"]) < over:
            orphans += retention.shards_in(store, folder)
    return orphans + [
        key for key in entries if (match := TEMP.match(key)) and int(match["attempt"]) < over
    ]


def _done(store: Store, catalog: Catalog) -> list[str]:
    """Return the keys of the step records of earlier attempts that are no longer needed.

    They are not needed if the newest checkpoint is at or after the last step that they record.
    """
    by_attempt = step_records.files(catalog.event_files(store))
    newest = catalog.head.step if catalog.head else 0
    earlier = [
        entries for attempt, entries in sorted(by_attempt.items()) if attempt < catalog.greatest
    ]
    return [
        entry.key
        for entries in earlier
        if step_records.read(store, entries).last <= newest
        for entry in entries
    ]


def _settings(store: Store, catalog: Catalog) -> dict[str, Any]:
    """Return the settings of the newest checkpoint in the history that can be read; {} without one.

    The file config.yaml may belong to an attempt that was cut off.
    """
    for manifest in catalog.history:
        try:
            return dict(load.outline(store, manifest.data_key).get("config") or {})
        except (FileNotFoundError, *load.UNPARSEABLE):
            continue
    return {}


def _policy(store: Store, catalog: Catalog, given: argparse.Namespace) -> retention.Policy:
    """Return the retention policy: the command line first, then that of the run."""
    own = {"last": given.keep_last, "every_steps": given.keep_every_steps, "best": given.keep_best}
    policy = retention.recorded(catalog, is_local=store.is_local)
    if policy is None:
        policy = _of_settings(store, catalog, store.is_local)
    if given.best:
        policy = retention.policy(policy.last, policy.every_steps, policy.best, given.best)
    return retention.changed(policy, own)


def _of_settings(store: Store, catalog: Catalog, is_local: bool) -> retention.Policy:
    """Return the policy by the run's settings, for a run without a recorded policy.

    For a remote store, `store.keep` takes precedence over `checkpoint.keep_*`.

    Args:
        store: Store that the settings are read from.
        catalog: Catalog of this store.
        is_local: Whether the policy of the run directory is returned, or that of a remote store.
    """
    settings, default = stored_under_todays_names(_settings(store, catalog)), retention.Policy()
    policy = retention.policy(
        settings.get("checkpoint.keep_last", default.last),
        settings.get("checkpoint.keep_every_steps", default.every_steps),
        settings.get("checkpoint.keep_best", default.best),
        settings.get("checkpoint.best", f"{default.metric}:min"),
    )
    return policy if is_local else retention.changed(policy, settings.get("store.keep") or {})
