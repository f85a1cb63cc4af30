r"""Let a checkpoint become the beginning of a run, which resumes from there by itself.

FILE is a run or a checkpoint of this harness: then NEWRUN is a fork. Or it is a file that another
program wrote with torch.save, safetensors or TorchScript: then key=value (and --config) name the
task, as for training. The task is built, and the recognised parts of the file are shown as a table,
loaded into the task, and committed as step k of NEWRUN. Parts that do not fit are refused, or left
out with init.strict=false; init.rename={'^backbone\.': 'encoder.'} renames. Nothing in FILE is
executed, unless --trust allows it.

example: harness import runs/a/checkpoints/step_00000120-0003.pt runs/b
example: harness import theirs.pth runs/b task.name=my_task:build task.args.width=128
"""

from __future__ import annotations

import argparse
import shlex
import sys

from harness.checkpoint import attempts, commit
from harness.checkpoint import format as fmt
from harness.cli import locate
from harness.errors import UsageError
from harness.exchange import importing
from harness.exchange.files import is_ours
from harness.store import is_url
from harness.text import say


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `harness import`."""
    parser.add_argument("file", metavar="FILE")
    parser.add_argument("run", metavar="NEWRUN", help="a directory or URL that holds no run yet")
    parser.add_argument(
        "settings", nargs="*", metavar="key=value", help="of the new run; the task above all"
    )
    parser.add_argument("--config", metavar="FILE", help="the same as a YAML file")
    parser.add_argument(
        "--as",
        dest="parts",
        action="append",
        default=[],
        metavar="NAME=KEY",
        help="the task's NAME is KEY in the file",
    )
    parser.add_argument(
        "--without",
        action="append",
        default=[],
        metavar="NAME",
        help="leave it out: it begins anew",
    )
    parser.add_argument(
        "--epoch", type=int, help="to go on with, counted from 0; else as in the file"
    )
    parser.add_argument(
        "--step", type=int, help="updates made so far; else as in the file, or by the epoch"
    )
    parser.add_argument(
        "--trust", action="store_true", help="let the file run code when it is loaded"
    )
    parser.add_argument("--dry-run", action="store_true", help="write nothing")


def run(given: argparse.Namespace) -> int:
    """Fork a run, or import a file of another program; print what was done and return 0.

    Raises:
        UsageError: The arguments, the settings, the file or the run directory cannot be used, or
            the file does not fit the task.
        DamagedError: The file or the checkpoint is damaged.
    """
    if is_ours(given.file) and not (given.settings or given.config):
        return _fork(given.file, given.run, given.dry_run)
    wrong = [part for part in given.parts if not all(part.partition("="))]
    if wrong:
        raise UsageError(
            "--as takes NAME=KEY",
            f"found: --as {wrong[0]}",
            "Such as --as generator=netG: the generator of the task is netG in the file.",
        )
    if given.trust:
        say(f"harness: warning: {given.file} may run any code while it is loaded", sys.stderr)
    asked = importing.ImportOptions(
        settings=given.settings,
        parts=dict(part.split("=", 1) for part in given.parts),
        without=given.without,
        epoch=given.epoch,
        step=given.step,
        trust=given.trust,
        config=given.config,
        dry_run=given.dry_run,
    )
    summary = importing.import_as_asked(given.file, given.run, asked)
    say(summary)
    if not given.dry_run:
        config = ["--config", given.config] if given.config else []
        place = f"run.{'remote' if is_url(given.run) else 'dir'}={given.run}"
        say(
            f"""to go on: {
                shlex.join(
                    ["harness", "launch", "--nproc-per-node", "1", *config, *given.settings, place]
                )
            }"""
        )
    return 0


def _fork(file: str, place: str, dry_run: bool) -> int:
    """Copy a checkpoint of this harness as the first checkpoint of a new run.

    Args:
        file: Path or URL of a run or of one of its checkpoints.
        place: Directory or URL of the new run.
        dry_run: Verify the checkpoint, but write nothing.
    """
    source, manifest = locate.checkpoint(file)
    store, catalog = importing.empty_store(place)
    locate.check(source, manifest)  # before anything is written
    if dry_run:
        say(f"{store} would begin with {manifest.name}; nothing was written")
        return 0
    store.prepare(fmt.FOLDERS)
    attempt = attempts.claim(catalog, manifest, manifest.world_size, kind="import")
    copy = commit.adopt(source, manifest, store, attempt, ())
    attempts.end_copied(store, attempt, copy, by="import")
    say(f"{store} begins with {copy.name}, a copy of {source.where(manifest.data_key)}")
    return 0
