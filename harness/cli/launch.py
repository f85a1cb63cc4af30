"""Start torchrun on this machine's part of a run, and tell by the exit code how it ended.

The configuration is checked before any process is spawned. Options that are not listed here go to torchrun; without any about
nodes or rendezvous, one node is assumed.

Exit code: 0 finished · 75 stopped, start me again · 78 configuration or usage · 74 storage · 76 superseded by a newer attempt ·
1 failed.

example: harness launch --nproc-per-node 2 --config configs/digits.yaml run.dir=runs/a train.epochs=20
"""

from __future__ import annotations

import argparse
import os
import secrets
import sys
from pathlib import Path
from typing import Any

from harness import config, ranks, task
from harness.checkpoint.history import survey
from harness.cli.status import outcome
from harness.data.order import Plan, accumulation
from harness.errors import EXIT_FAILED, EXIT_FINISHED, EXIT_STOPPED, EXIT_STORAGE, EXIT_SUPERSEDED, EXIT_USAGE, StorageError, UsageError
from harness.events import say
from harness.store import open_store

SIGNALS = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1,SIGUSR2"  # torchrun dies of the last two otherwise, and orphans its workers
SHUTDOWN_S = 300  # torchrun's default of 30 s cuts the save of a large model short


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", help="YAML file, relative to the working directory")
    parser.add_argument("--nproc-per-node", default="1", metavar="N", help="processes on this node (torchrun's own option)")
    parser.set_defaults(passes_on=True)


def run(given: argparse.Namespace, rest: list[str]) -> int:
    ranks.check_environment()
    if loops := [text for text in rest if text.endswith(".py")]:
        raise UsageError(
            "harness launch starts harness/train.py on a task", f"found: {', '.join(loops)}",
            "Start a loop of your own with torchrun; harness status RUN then tells how it ended.",
        )  # fmt: skip
    settings_given = [text for text in rest if "=" in text and not text.startswith("-")]
    options = [text for text in rest if text not in settings_given]
    settings, stored = config.load(given.config, settings_given)
    task.find(settings.task.name, settings.task.args, stored["task"]["args"])
    if not any(option.startswith(("--nnodes", "--rdzv", "--standalone", "--master")) for option in options):
        options.append("--standalone")
        _check_batch(settings.train, given.nproc_per_node)
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # what torchrun would set, without its warning
    launch = os.environ["HARNESS_LAUNCH"] = secrets.token_hex(8)
    program = [str(Path(__file__).resolve().parent.parent / "train.py")]
    program += ["--config", given.config] if given.config else []
    own = [f"--nproc-per-node={given.nproc_per_node}", f"--signals-to-handle={SIGNALS}", f"--shutdown-timeout={SHUTDOWN_S}"]
    code = _torchrun([*own, *options, *program, *settings_given])
    return _exit_code(settings.run, launch, code)


def _check_batch(train: config.TrainSettings, nproc: str) -> None:
    if nproc.isdigit() and int(nproc):
        accumulate = accumulation(train.global_batch_size, int(nproc), train.micro_batch_size)
        Plan(train.global_batch_size, train.global_batch_size, accumulate, 0, int(nproc), train.seed).check()


def _torchrun(arguments: list[str]) -> int | None:
    """Run torchrun in this process; returns the first failed worker's exit code, 0, or None if a signal ended it."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args
    from torch.distributed.run import run as torchrun

    try:
        parsed = parse_args(arguments)  # type: ignore[no-untyped-call]
    except SystemExit:
        raise UsageError("torchrun does not take these options", f"found: {' '.join(arguments)}", "See torchrun --help.") from None
    try:
        torchrun(parsed)  # type: ignore[no-untyped-call]
    except SignalException as signal:
        say(f"harness launch: ended by {signal.sigval.name}; start again to go on", sys.stderr)
        return None
    except ChildFailedError as error:
        rank, first = error.get_first_failure()
        say(f"harness launch: rank {rank} was the first to fail, with exit code {first.exitcode}", sys.stderr)
        codes = {failure.exitcode for failure in error.failures.values()}
        return next((code for code in (EXIT_USAGE, EXIT_SUPERSEDED, EXIT_STORAGE) if code in codes), EXIT_FAILED)
    return EXIT_FINISHED


def _exit_code(run: config.RunSettings, launch: str, code: int | None) -> int:
    """What the run says of the attempt that this launch started; where it says nothing, what torchrun says."""
    try:
        found = survey(open_store(run.dir or run.remote or ""))
    except StorageError:
        return EXIT_STORAGE
    own = max((number for number, record in found.attempts.items() if record.get("launch") == launch), default=None)
    end: dict[str, Any] | None = found.ends.get(own) if own is not None else None
    if own is not None and (own < max(found.attempts) or (end or {}).get("why") == "superseded"):
        return EXIT_SUPERSEDED
    if code not in (EXIT_FINISHED, EXIT_FAILED, None):
        return code
    if end is None:
        if code == EXIT_FINISHED:  # a finished run starts no attempt
            return outcome(found).exit_code
        return EXIT_STOPPED if code is None else code
    if end.get("why") == "failed":
        say(f"harness launch: attempt {own} failed first on rank {end.get('rank')}: {end.get('error')}", sys.stderr)
    return {"finished": EXIT_FINISHED, "stopped": EXIT_STOPPED}.get(str(end.get("why")), EXIT_FAILED)
