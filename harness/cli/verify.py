"""Read and check every byte of a run's checkpoints, or of one.

For a run directory that has a remote store, only the directory is read. Name the remote store to
check it. A checkpoint that retention deletes meanwhile is noted, and is no damage.

Exit code: 0 intact · 1 something is damaged, and is named · 74 nothing is known to be damaged, but
something could not be read · 78 the same, but only a newer harness can check one of the
checkpoints.

example: harness verify runs/a
"""

from __future__ import annotations

import argparse

from harness.checkpoint.format import NewerFormatError
from harness.checkpoint.load import AbsentError, GoneError
from harness.cli import locate
from harness.errors import EXIT_FAILED, EXIT_FINISHED, EXIT_STORAGE, EXIT_USAGE, StorageError
from harness.text import say, size


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `harness verify`."""
    parser.add_argument("path", metavar="RUN|CHECKPOINT")


def run(given: argparse.Namespace) -> int:
    """Print the result for each checkpoint and return the exit code.

    Raises UsageError, DamagedError, StorageError.
    """
    if locate.is_run(given.path):
        store, catalog = locate.run(given.path)
        manifests = catalog.manifests
        problems = [f"{key}: {why}" for key, why in catalog.damaged.items()]
        problems += [f"{key}: of another run" for key in catalog.strangers]
        newer = [f"{error.what}; {error.found}" for error in catalog.newer.values()]
        notes = [f"{key}: set aside as damaged, does not count" for key in catalog.set_aside]
        notes += [
            f"{key}: was found damaged once, and is the last choice"
            for key in sorted(catalog.marked)
        ]
        notes += [
            f"{key}: data without a manifest, does not count"
            for key in (*catalog.orphans, *catalog.orphan_folders)
        ]
    else:
        store, manifest = locate.checkpoint(given.path)
        manifests, problems, newer, notes = [manifest], [], [], []
    unread, is_run = [], locate.is_run(given.path)
    for manifest, problem in locate.verify(store, *manifests):
        if isinstance(problem, GoneError) and is_run:
            notes.append(f"{manifest.name}: deleted meanwhile")
        elif isinstance(problem, AbsentError) and is_run and catalog.may_be_apart(manifest):
            notes.append(f"{manifest.name}: not all of its shards are on this node (run.scratch)")
        elif isinstance(problem, StorageError | GoneError):
            unread.append(f"{manifest.name}: {problem.what} {problem.found}".rstrip())
        elif isinstance(problem, NewerFormatError):
            newer.append(f"{problem.what}; {problem.found}")
        elif problem is not None:
            problems.append(f"{manifest.name}: {problem.what} {problem.found}".rstrip())
        else:
            say(f"ok       {manifest.name}  {size(manifest.size_bytes)}")
    for note in notes:
        say(f"note     {note}")
    for message in problems:
        say(f"DAMAGED  {message}")
    for message in unread:
        say(f"NOT READ {message}")
    for message in newer:
        say(f"NEWER    {message}")
    if not manifests and not problems and not newer:
        say("no checkpoints")
    if problems:
        return EXIT_FAILED
    return EXIT_STORAGE if unread else EXIT_USAGE if newer else EXIT_FINISHED
