r"""Train on this machine under supervision: torchrun is started, and started again after a crash.

A failed launch is repeated, with growing pauses, until `run.max_failures` launches in a row (3)
have died without a new checkpoint. That is a crash loop, which no restart can fix. A signal to
this process, the job's time limit and `harness stop` also end the supervision. The configuration is
checked before any process is started. Options that are not listed here go to torchrun. With several
nodes (--nnodes) torchrun is started only once, and the job that starts it on all nodes supervises
(see `harness submit`).

A program of your own may follow the settings, with its arguments: it is started in place of
harness/train.py. `run.dir` and `run.remote` must then name the same stores as the program's call of
harness.init.

Exit code: 0 finished · 75 stopped, to be started again · 78 configuration or usage · 74 storage ·
76 superseded by a newer attempt · 1 failed.

example: harness launch --nproc-per-node 2 --config configs/digits.yaml run.dir=runs/a \
             train.epochs=20
example: harness launch --nproc-per-node 2 run.dir=runs/a my_loop.py --lr 0.1
"""

from __future__ import annotations

import argparse
import os
import secrets
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness import config, preemption, retry, task
from harness.checkpoint.catalog import read_catalog
from harness.cli import supervise
from harness.config import Config
from harness.config.user_program import check_alone, check_loop, check_named
from harness.data.plan import check_batch
from harness.distributed import join
from harness.errors import (
    EXIT_FINISHED,
    EXIT_STOPPED,
    EXIT_STORAGE,
    EXIT_USAGE,
    RefusedError,
    StorageError,
)
from harness.preemption import children
from harness.supervision import launches
from harness.supervision.restart_policy import EXIT_ASKED, outcome
from harness.text import say

if TYPE_CHECKING:
    from harness.distributed.torchrun import WorkersEnd
    from harness.store import Store

# Interval between two looks at the child process; retry limit for recording a failure.
LOOK_S, RECORD_S = 0.1, 10.0


@dataclass(frozen=True)
class CommandLine:
    """The command line of `harness launch`, with the settings that it results in."""

    nproc_per_node: str
    options: list[str]  # other options of torchrun
    config_file: str | None
    settings_given: list[str]  # key=value
    settings: Config
    stored: dict[str, Any]  # the settings without resolved secrets

    @property
    def training(self) -> list[str]:
        """Return the arguments of train.py."""
        return (["--config", self.config_file] if self.config_file else []) + self.settings_given

    @property
    def nodes(self) -> str:
        """Return torchrun's number of nodes as it is given: N or MIN:MAX."""
        found, words = os.environ.get("PET_NNODES", "1"), iter(self.options)
        for word in words:
            name, _, value = word.partition("=")
            if len(name) > 3 and "--nnodes".startswith(name):  # torchrun takes shortened names
                found = value or next(words, "")
        return found

    @property
    def is_for_several_nodes(self) -> bool:
        """Return whether torchrun may meet other nodes; with one node it has nobody to meet."""
        return self.nodes not in ("1", "1:1")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `harness launch`."""
    parser.add_argument("--config", help="YAML file, relative to the working directory")
    parser.add_argument(
        "--nproc-per-node",
        default="1",
        metavar="N",
        help="processes on this node (torchrun's own option)",
    )
    parser.set_defaults(passes_on=True)


def run(given: argparse.Namespace, rest: list[str]) -> int:
    """Train, under supervision if this process has no supervisor; return the exit code.

    A process that a supervisor has started (HARNESS_LAUNCH is set) runs torchrun once and records a
    failure. With several nodes, torchrun also runs only once, and a line says so. Otherwise this
    process supervises.

    Args:
        given: The arguments that the parser knows.
        rest: The others: settings, the program, and options for torchrun.

    Raises:
        UsageError: The settings, the program or the options are invalid.
        StorageError: A store cannot be read.
    """
    line = _command_line(given, rest)
    # A supervisor starts this on each node, after it has made the checks below.
    if (name := launches.own()) is not None:
        return _run_supervised(line, name)
    join.check_environment()
    _check_code(line)
    if line.is_for_several_nodes:
        say(
            f"harness launch: not supervised, because it is for several nodes ({line.nodes}): "
            "torchrun is started once, and not again after a crash. harness submit supervises a "
            "job of several nodes; --max-restarts=3 lets torchrun restart crashed processes",
            sys.stderr,
        )
        return _run_once(line)
    if line.nproc_per_node.isdigit() and int(line.nproc_per_node) and not line.settings.run.loop:
        check_batch(
            line.settings.train.global_batch_size,
            int(line.nproc_per_node),
            line.settings.train.micro_batch_size,
        )
    return _supervise(
        line.settings,
        ["--nproc-per-node", line.nproc_per_node, "--standalone", *line.options, *line.training],
    )


def _command_line(given: argparse.Namespace, rest: list[str]) -> CommandLine:
    """Divide the command line into settings and options, and load the settings.

    `given` and `rest` are the arguments of `run`. Raises UsageError.
    """
    settings_given = [text for text in rest if "=" in text and not text.startswith("-")]
    options = [text for text in rest if text not in settings_given]
    settings, stored = config.load(given.config, settings_given)
    return CommandLine(
        given.nproc_per_node, options, given.config, settings_given, settings, stored
    )


def _check_code(line: CommandLine) -> None:
    """Check that the user's program or task can be started. Raises UsageError."""
    settings = line.settings
    if settings.run.loop:
        check_loop(settings.run.loop)
        check_named(config.given(line.config_file, line.settings_given))
        return
    # If HARNESS_CODE is set, its folder comes before the working directory in the search path.
    if not os.environ.get("HARNESS_CODE"):
        check_alone(Path.cwd(), "the task's code, and a loader's workers,")
    task.find(settings.task.name, settings.task.args, line.stored["task"]["args"])


def _run_supervised(line: CommandLine, name: str) -> int:
    """Run torchrun once for the supervisor of the launch `name`; return the exit code.

    A failure is recorded in the run's stores. Raises UsageError for an invalid program or options.
    """
    preemption.die_with_parent()
    end = _run_torchrun(line)
    code, error = end.exit_code, end.error
    if code == EXIT_STOPPED:
        # The run's records show the stop. srun would treat any other exit code as a crash and end
        # the other nodes. They do not show what became of a program after its loop.
        return EXIT_STOPPED if _is_after_loop(line.settings, name) else EXIT_FINISHED
    if code == EXIT_FINISHED and _trained_nothing(line.settings, name):
        # Started again, the program would end in the same way.
        code = EXIT_USAGE
        loop = line.settings.run.loop
        error = (
            f"{loop[0]} ended, and no harness loop began in it: see harness.init and run.batches"
            if loop
            else f"{line.settings.task.name} ended the process with exit code 0 before training"
        )
    if code != EXIT_FINISHED:
        _record(line.settings, name, code, error)
    return code


def _run_once(line: CommandLine) -> int:
    """Run torchrun once, without a supervisor, and print a failure; return the exit code.

    Raises:
        UsageError: The program or the options are invalid.
        StorageError: A store cannot be read.
    """
    end = _run_torchrun(line)
    if end.error:
        say(f"harness launch: {end.error}", sys.stderr)
    if end.exit_code != EXIT_FINISHED:
        return end.exit_code
    # After a stop on request, torchrun also ends with 0; the run's records show the difference.
    catalog = read_catalog(*supervise.places(line.settings))
    if supervise.is_complete(catalog, line.settings):
        return EXIT_FINISHED
    return outcome(catalog).exit_code


def _run_torchrun(line: CommandLine) -> WorkersEnd:
    """Run torchrun in this process. Raises UsageError for an invalid program or options."""
    from harness.distributed import torchrun  # a supervisor does not need it

    processes = f"--nproc-per-node={line.nproc_per_node}"
    return torchrun.run([processes, *line.options, *_program(line)])


def _program(line: CommandLine) -> list[str]:
    """Return the program that torchrun starts, with its arguments.

    It is train.py or the user's program. The environment is prepared for it: HARNESS_RUN names the
    run, and PYTHONPATH lets a user's program import this package. Raises UsageError.
    """
    package, run = Path(__file__).resolve().parent.parent, line.settings.run
    launches.supervise(run.dir, run.remote)
    if not run.loop:
        return [str(package / "train.py"), *line.training]
    os.environ["PYTHONPATH"] = os.pathsep.join(
        filter(None, (str(package.parent), os.environ.get("PYTHONPATH")))
    )
    return [str(check_loop(run.loop)), *run.loop[1:]]


def _stores_for_records(settings: Config) -> list[Store]:
    """Return the run's stores, with the retry limit of the records at the end of a launch."""
    return [store.with_retry_limit(RECORD_S) for store in supervise.places(settings)]


def _trained_nothing(settings: Config, name: str) -> bool:
    """Return whether the stores show no trace of training in a launch that ended well.

    No attempt has begun in the launch, no end was recorded for it, and the run is not complete.
    Returns False if a store cannot be read.
    """
    try:
        stores = _stores_for_records(settings)
        catalog, known = read_catalog(*stores), launches.read(stores)
    except StorageError:
        return False
    is_ended = any(launch.name == name and launch.end is not None for launch in known)
    return not (
        is_ended
        or launches.attempts_of(catalog, name)
        or supervise.found_complete(catalog, settings, name)
    )


def _is_after_loop(settings: Config, name: str) -> bool:
    """Return whether a program of the user's own has finished its run; False if it is not known."""
    if not settings.run.loop:
        return False
    try:
        stores = _stores_for_records(settings)
        return supervise.found_complete(read_catalog(*stores), settings, name)
    except StorageError:
        return False


def _record(settings: Config, name: str, code: int, message: str) -> None:
    """Record a failure on this node in the run's stores.

    A rank that was killed could not record it, and srun's exit code may be that of another node. A
    StorageError is printed only.
    """
    for store in supervise.places(settings):
        try:
            launches.failed(store.with_retry_limit(RECORD_S), name, code=code, error=message)
        except StorageError as error:
            say(f"harness launch: this failure is not recorded: {error.what}", sys.stderr)


def _supervise(settings: Config, arguments: list[str]) -> int:
    """Run this command as a child that runs torchrun, until the run is done or stopped.

    Returns the exit code. Raises RefusedError, or another StorageError if the stores could not be
    read or written before `run.max_failures` launches in a row. After as many it returns 74.
    """
    supervisor = f"{launches.OF_LAUNCH}{secrets.token_hex(6)}"
    preemption.install()
    count = misses = misses_after = 0

    def once() -> tuple[int, bool]:
        nonlocal count, misses, misses_after
        if preemption.requested():
            return EXIT_STOPPED, False
        name, count = f"{supervisor}.{count}", count + 1
        try:
            code, misses = supervise.before(settings, name), 0
        except RefusedError:
            raise
        except StorageError as error:
            # A store that cannot be read cannot count this failure either, so it is counted here.
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
            # The launch was stopped and has printed the path of the checkpoint. The next start
            # tries the store again.
            return EXIT_STOPPED, False
        misses_after = misses_after + 1 if stands.exit_code == EXIT_STORAGE else 0
        is_again = stands.exit_code in (EXIT_STOPPED, EXIT_STORAGE) and kind is None
        is_enough = stands.is_leaving or misses_after >= settings.run.max_failures
        return stands.exit_code, is_again and not is_enough

    code, _ = retry.until_enough(once, lambda result: result[1], give_up=preemption.requested)
    # A run that was stopped by `harness stop` can be continued by a new start.
    return EXIT_STOPPED if code == EXIT_ASKED else code


def _child(name: str, arguments: list[str]) -> int:
    """Run torchrun in a child process and return its exit code (128 + N after signal N).

    The child has a session of its own. A terminal's signals therefore reach it only through this
    process, and only once.
    """
    command = [
        sys.executable,
        str(Path(__file__).resolve().parent.parent / "__main__.py"),
        "launch",
        *arguments,
    ]
    child = subprocess.Popen(
        command,
        env={"TORCH_CPP_LOG_LEVEL": "ERROR"} | os.environ | {launches.ENVIRONMENT: name},
        start_new_session=True,
    )
    forwarded = 0
    while child.poll() is None:
        for why in preemption.requests()[forwarded:]:
            children.forward(child.pid, why)
            forwarded += 1
        time.sleep(LOOK_S)
    return child.returncode if child.returncode >= 0 else 128 - child.returncode
