"""Read and check every byte of a run's checkpoints, or of one; exit 1 names what is damaged.

Of a run directory that has a remote store only the directory is read; name the remote to have that read.

example: harness verify runs/a
"""

from __future__ import annotations

import argparse

from harness.cli import locate
from harness.errors import EXIT_FAILED
from harness.events import say, size


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", metavar="RUN|CHECKPOINT")


def run(given: argparse.Namespace) -> int:
    if locate.is_run(given.path):
        store, found = locate.run(given.path)
        manifests, problems = found.manifests, [f"{key}: {why}" for key, why in (found.damaged | found.newer).items()]
        problems += [f"{key}: of another run" for key in found.strangers]
        notes = [f"{key}: set aside as damaged, does not count" for key in found.set_aside]
        notes += [f"{key}: was found damaged once, and is the last choice" for key in sorted(found.marked)]
        notes += [f"{key}: data without a manifest, does not count" for key in found.orphans]
    else:
        store, manifest = locate.checkpoint(given.path)
        manifests, problems, notes = [manifest], [], []
    for manifest, problem in locate.verify(store, *manifests):
        if problem:
            problems.append(f"{manifest.name}: {problem}")
        else:
            say(f"ok       {manifest.name}  {size(manifest.size_bytes)}")
    for note in notes:
        say(f"note     {note}")
    for problem in problems:
        say(f"DAMAGED  {problem}")
    if not manifests and not problems:
        say("no checkpoints")
    return EXIT_FAILED if problems else 0
