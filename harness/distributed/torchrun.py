"""Run torchrun in this process, and describe how its workers ended."""

from __future__ import annotations

import logging
import os
import socket
from argparse import Namespace
from dataclasses import dataclass

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous import RendezvousError
from torch.distributed.run import get_args_parser, parse_args
from torch.distributed.run import run as run_workers

from harness import preemption
from harness.errors import (
    EXIT_FAILED,
    EXIT_FINISHED,
    EXIT_STOPPED,
    EXIT_STORAGE,
    EXIT_SUPERSEDED,
    EXIT_USAGE,
    UsageError,
)
from harness.preemption import blocked

ITS_OWN = "SIGQUIT"  # the only signal that torchrun handles; this package handles all others
# A signal's exception makes torchrun end its workers, and a second one makes it do so again. A
# third one would end torchrun itself, and the workers with it.
MOST_RAISED = 2
SHUTDOWN_S = 300  # torchrun's default of 30 s cuts the save of a large model short


@dataclass(frozen=True)
class WorkersEnd:
    """How the workers of torchrun ended on this node.

    The exit code is 0 if all workers ended well, and 75 if a signal ended torchrun. After a failure
    of workers, it is the first of 78, 76, 74 and 75 with which any of them ended, else 1. It is
    also 1 if the rendezvous with the other nodes failed.
    """

    exit_code: int
    # The signal, the rendezvous error or the first worker that failed; "" without a failure.
    error: str = ""


def run(arguments: list[str]) -> WorkersEnd:
    """Run torchrun in this process until all workers have ended.

    `arguments` are options of torchrun, then the program with its arguments. The environment is
    prepared for the workers: OMP_NUM_THREADS, PYTHONHASHSEED and TORCH_ELASTIC_SHUTDOWN_TIMEOUT
    are set, unless the user has set them.

    Raises:
        UsageError: torchrun does not accept the options.
    """
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # torchrun's value, without its warning
    # Else a set of strings, and what is numbered by it, has another order at each start.
    os.environ.setdefault("PYTHONHASHSEED", "0")
    # The workers read this variable to know how much time they have for a save.
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(SHUTDOWN_S))
    parsed = _parsed([*_own_options(), *arguments])
    # torchrun logs a long warning for each signal that it forwards.
    logging.disable(logging.WARNING)
    try:
        with blocked.raising(SignalException, MOST_RAISED):
            run_workers(parsed)  # type: ignore[no-untyped-call]
    except SignalException as signal:
        return WorkersEnd(EXIT_STOPPED, f"ended by {signal.sigval.name}")
    except RendezvousError as error:
        return WorkersEnd(
            EXIT_FAILED, f"{socket.gethostname()} did not meet the other nodes: {error}"
        )
    except ChildFailedError as error:
        return _failed(error)
    return WorkersEnd(EXIT_FINISHED)


def _own_options() -> list[str]:
    """Return the options of this package, without those that an older torchrun lacks."""
    own = {
        "--signals-to-handle": ITS_OWN,
        "--shutdown-timeout": os.environ["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"],
    }
    known = get_args_parser()._option_string_actions
    return [f"{name}={value}" for name, value in own.items() if name in known]


def _parsed(arguments: list[str]) -> Namespace:
    """Parse the command line of torchrun. Raises UsageError if torchrun does not accept it."""
    try:
        return parse_args(arguments)  # type: ignore[no-untyped-call, no-any-return]
    except SystemExit:
        raise UsageError(
            "torchrun does not take these options",
            f"found: {' '.join(arguments)}",
            "See torchrun --help.",
        ) from None


def _failed(error: ChildFailedError) -> WorkersEnd:
    """Return how the workers ended, of which at least one failed: exit code and first failure."""
    rank, first = error.get_first_failure()
    how = (
        f"exit code {first.exitcode}" if first.exitcode > 0 else preemption.name_of(-first.exitcode)
    )
    codes = {failure.exitcode for failure in error.failures.values()}
    reported_codes = (EXIT_USAGE, EXIT_SUPERSEDED, EXIT_STORAGE, EXIT_STOPPED)
    return WorkersEnd(
        next((code for code in reported_codes if code in codes), EXIT_FAILED),
        f"rank {rank} of {socket.gethostname()} was the first to end, by {how}",
    )
