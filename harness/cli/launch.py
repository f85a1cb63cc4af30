"""Train on this machine under supervision: torchrun is started, and started again after a crash.

What fails is tried again with growing pauses, until `run.max_failures` launches in a row (3) have died without a new checkpoint: that is
a crash loop, and no restart mends it. A signal to this process, the job's time limit, and `harness stop` end it. The configuration is
checked before any process is spawned. Options that are not listed here go to torchrun; with several nodes torchrun is started once, and
whoever started all of them supervises (see `harness submit`).

A program of your own may be named after the settings, with its arguments: it is started in place of harness/train.py. `run.dir` and
`run.remote` then say where its run lives, as it says to harness.init.

Exit code: 0 finished · 75 stopped, start me again · 78 configuration or usage · 74 storage · 76 superseded by a newer attempt ·
1 failed.

example: harness launch --nproc-per-node 2 --config configs/digits.yaml run.dir=runs/a train.epochs=20
example: harness launch --nproc-per-node 2 run.dir=runs/a my_loop.py --lr 0.1
"""

from __future__ import annotations

import argparse
import logging
import os
import secrets
import socket
import subprocess
import sys
import time
from importlib.machinery import all_suffixes
from pathlib import Path

from harness import config, preemption, retry, task
from harness.checkpoint.catalog import read_catalog
from harness.cli import supervise
from harness.data.plan import check_batch
from harness.distributed import ranks
from harness.errors import (
    EXIT_FAILED,
    EXIT_FINISHED,
    EXIT_STOPPED,
    EXIT_STORAGE,
    EXIT_SUPERSEDED,
    EXIT_USAGE,
    RefusedError,
    StorageError,
    UsageError,
)
from harness.supervision import launches
from harness.supervision.restart_policy import EXIT_ASKED, outcome
from harness.text import say

ITS_OWN = "SIGQUIT"  # the one signal that torchrun is to handle: all others are ours
MOST_RAISED = 2  # by one torchrun ends its workers, by another it does so once more, a third makes it die, and them with it
SHUTDOWN_S = 300  # torchrun's default of 30 s cuts the save of a large model short
LOOK_S, RECORD_S = 0.1, 10.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", help="YAML file, relative to the working directory")
    parser.add_argument("--nproc-per-node", default="1", metavar="N", help="processes on this node (torchrun's own option)")
    parser.set_defaults(passes_on=True)


def run(given: argparse.Namespace, rest: list[str]) -> int:
    settings_given = [text for text in rest if "=" in text and not text.startswith("-")]
    options = [text for text in rest if text not in settings_given]
    settings, stored = config.load(given.config, settings_given)
    training = (["--config", given.config] if given.config else []) + settings_given
    if (name := launches.own()) is not None:  # a supervisor has checked all that, and starts this on each node
        preemption.die_with_parent()
        code, words = _torchrun([f"--nproc-per-node={given.nproc_per_node}", *options], training, settings)
        if code == EXIT_STOPPED:
            return EXIT_FINISHED  # the run's records tell; srun would take anything else for a crash, and end the other nodes
        if code == EXIT_FINISHED and settings.run.loop and _trained_nothing(settings, name):
            code, words = EXIT_USAGE, f"{settings.run.loop[0]} ended, and no harness loop began in it: see harness.init and run.batches"
        if code != EXIT_FINISHED:
            _record(settings, name, code, words)
        return code
    ranks.check_environment()
    if settings.run.loop:
        check_loop(settings.run.loop)
        check_named(settings, settings_given)
    else:
        if not os.environ.get("HARNESS_CODE"):  # which comes before the working directory
            check_alone(Path.cwd(), "the task's code, and a loader's workers,")
        task.find(settings.task.name, settings.task.args, stored["task"]["args"])
    if any(option.startswith(("--nnodes", "--rdzv", "--standalone", "--master")) for option in options):
        code, words = _torchrun([f"--nproc-per-node={given.nproc_per_node}", *options], training, settings)
        if words:
            say(f"harness launch: {words}", sys.stderr)
        return (
            outcome(read_catalog(*supervise.places(settings))).exit_code if code == EXIT_FINISHED else code
        )  # it may have been asked to stop
    if given.nproc_per_node.isdigit() and int(given.nproc_per_node) and not settings.run.loop:
        check_batch(settings.train.global_batch_size, int(given.nproc_per_node), settings.train.micro_batch_size)
    return _supervise(settings, ["--nproc-per-node", given.nproc_per_node, "--standalone", *options, *training])


def check_loop(words: list[str]) -> Path:
    """The file of a program of the user's own. Raises UsageError."""
    file = Path(words[0]).expanduser().absolute()
    if not file.is_file():
        raise UsageError("there is no such program", f"found: no file {file}", "Name the .py file of your loop, from this folder.")
    check_alone(file.resolve().parent, "the program")  # Python looks beside it first
    return file


def check_alone(folder: Path, who: str) -> None:
    """Raises UsageError if whoever imports from this folder first would get another package than this one. A folder without
    __init__.py, or a clone, is none: then this one is found."""
    package = Path(__file__).resolve().parent.parent
    others = [folder / "harness" / "__init__.py", *(folder / f"harness{suffix}" for suffix in all_suffixes())]
    for other in others:
        if other.is_file() and other.resolve().parent != package:
            raise UsageError(f"{who} would import another harness", f"found: {other}", f"Rename it, or move away; this one is {package}.")


def check_named(settings: config.Config, given: list[str]) -> None:
    """Raises UsageError if nothing says which run a program of the user's own trains: the default is another one's."""
    if settings.run.dir == config.Config().run.dir and not any(text.startswith(("run.dir=", "run.remote=")) for text in given):
        raise UsageError("it is not said which run this program trains", remedy="Name it as to harness.init: run.dir=… or run.remote=…")


def _trained_nothing(settings: config.Config, name: str) -> bool:
    """Whether nothing was heard of the run in a launch whose processes all ended well: nobody trained, or stopped, or found it finished."""
    try:
        stores = [store.patient(RECORD_S) for store in supervise.places(settings)]
        found, known = read_catalog(*stores), launches.read(stores)
    except StorageError:
        return False
    is_ended = any(launch.name == name and launch.end is not None for launch in known)
    return not (is_ended or launches.attempts_of(found, name) or outcome(found).exit_code == EXIT_FINISHED)


def _supervise(settings: config.Config, arguments: list[str]) -> int:
    """Start this very command as a child that runs torchrun, until nothing is left to do or somebody wants it to stop."""
    supervisor = f"launch-{secrets.token_hex(6)}"
    preemption.install()
    count = misses = 0

    def once() -> tuple[int, bool]:
        nonlocal count, misses
        if preemption.requested():
            return EXIT_STOPPED, False
        name, count = f"{supervisor}.{count}", count + 1
        try:
            code, misses = supervise.before(settings, name), 0
        except RefusedError:
            raise
        except StorageError as error:  # a store that cannot be read cannot count this failure either
            misses += 1
            if misses >= settings.run.max_failures:
                raise
            say(f"harness launch: {error.what}; trying again", sys.stderr)
            return EXIT_STORAGE, True
        if code != EXIT_STOPPED:
            return code, False
        code, kind = _child(name, arguments), preemption.requested()
        stands = supervise.after(settings, name, code, stopped=kind is not None)
        if kind is not None and stands.exit_code == EXIT_STORAGE:
            return EXIT_STOPPED, False  # it was stopped, and has said where the checkpoint lies; the next start asks the store again
        return stands.exit_code, stands.exit_code in (EXIT_STOPPED, EXIT_STORAGE) and kind is None and not stands.is_leaving

    code, _ = retry.until_enough(once, lambda result: result[1], give_up=preemption.requested)
    return EXIT_STOPPED if code == EXIT_ASKED else code  # to be continued, by whoever wants to


def _child(name: str, arguments: list[str]) -> int:
    """Run torchrun in a child of its own session, so that a terminal's signals come to it through us, once."""
    command = [sys.executable, str(Path(__file__).resolve().parent.parent / "__main__.py"), "launch", *arguments]
    child = subprocess.Popen(
        command, env={"TORCH_CPP_LOG_LEVEL": "ERROR"} | os.environ | {launches.ENVIRONMENT: name}, start_new_session=True
    )
    forwarded = 0
    while child.poll() is None:
        for why in preemption.requests()[forwarded:]:
            preemption.forward(child.pid, why)
            forwarded += 1
        time.sleep(LOOK_S)
    return child.returncode if child.returncode >= 0 else 128 - child.returncode


def _record(settings: config.Config, name: str, code: int, words: str) -> None:
    """Leave word of a failure on this node: a rank that was killed could not, and srun's exit code may tell of another node."""
    for store in supervise.places(settings):
        try:
            launches.failed(store.patient(RECORD_S), name, code=code, error=words)
        except StorageError as error:
            say(f"harness launch: this failure is not recorded: {error.what}", sys.stderr)


def _program(training: list[str], settings: config.Config) -> list[str]:
    """What torchrun starts, with its arguments: train.py, or a program of the user's own, which finds this very package."""
    package = Path(__file__).resolve().parent.parent
    launches.supervise(settings.run.dir, settings.run.remote)
    if not settings.run.loop:
        return [str(package / "train.py"), *training]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(package.parent), os.environ.get("PYTHONPATH"))))
    return [str(check_loop(settings.run.loop)), *settings.run.loop[1:]]


def _torchrun(options: list[str], training: list[str], settings: config.Config) -> tuple[int, str]:
    """Run torchrun in this process; returns the exit code of the first worker that failed, or 75 if a signal ended it, and words."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError
    from torch.distributed.run import get_args_parser, parse_args
    from torch.distributed.run import run as torchrun

    os.environ.setdefault("OMP_NUM_THREADS", "1")  # what torchrun would set, without its warning
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(SHUTDOWN_S))  # the workers plan by it
    own = {"--signals-to-handle": ITS_OWN, "--shutdown-timeout": os.environ["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"]}
    known = get_args_parser()._option_string_actions  # older versions lack them
    arguments = [*(f"{name}={value}" for name, value in own.items() if name in known), *options, *_program(training, settings)]
    try:
        parsed = parse_args(arguments)  # type: ignore[no-untyped-call]
    except SystemExit:
        raise UsageError("torchrun does not take these options", f"found: {' '.join(arguments)}", "See torchrun --help.") from None
    logging.disable(logging.WARNING)  # of each signal that torchrun passes on, at length
    try:
        with preemption.raising(SignalException, MOST_RAISED):
            torchrun(parsed)  # type: ignore[no-untyped-call]
    except SignalException as signal:
        return EXIT_STOPPED, f"ended by {signal.sigval.name}"
    except RendezvousError as error:
        return EXIT_FAILED, f"{socket.gethostname()} did not meet the other nodes: {error}"
    except ChildFailedError as error:
        rank, first = error.get_first_failure()
        how = f"exit code {first.exitcode}" if first.exitcode > 0 else preemption.name_of(-first.exitcode)
        codes = {failure.exitcode for failure in error.failures.values()}
        code = next((code for code in (EXIT_USAGE, EXIT_SUPERSEDED, EXIT_STORAGE, EXIT_STOPPED) if code in codes), EXIT_FAILED)
        return code, f"rank {rank} of {socket.gethostname()} was the first to end, by {how}"
    return EXIT_FINISHED, ""
