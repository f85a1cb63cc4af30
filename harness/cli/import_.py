"""Let a checkpoint become the beginning of another run, which goes on from there by itself: a fork.

example: harness import runs/a/checkpoints/step_00000120-0003.pt runs/b
"""

from __future__ import annotations

import argparse

from harness.checkpoint import attempts, save
from harness.checkpoint import format as fmt
from harness.checkpoint.history import survey
from harness.cli import locate
from harness.errors import UsageError
from harness.events import say
from harness.store import open_store


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", metavar="CHECKPOINT")
    parser.add_argument("run", metavar="NEWRUN", help="a directory or URL that holds no run yet")


def run(given: argparse.Namespace) -> int:
    source, manifest = locate.checkpoint(given.checkpoint)
    store = open_store(given.run)
    found = survey(store)
    if found.greatest or found.manifests:
        raise UsageError(f"{store} holds a run already", f"found: attempt {found.greatest}", "Choose another directory.")
    locate.check(source, manifest)  # before anything is written
    store.prepare(fmt.FOLDERS)
    attempt = attempts.claim(found, manifest, manifest.world_size, kind="import")
    copy = save.adopt(source, manifest, store, attempt, ())
    attempts.end(store, attempt, "stopped", step=copy.step, saved=True, saved_step=copy.step, by="import")
    say(f"{store} begins with {copy.name}, a copy of {source.where(manifest.data_key)}")
    return 0
