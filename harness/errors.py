"""Every error that a user may meet, how it is said, and the exit code that it ends the process with.

A message has three parts: what failed, the values (found, expected), and what to do.
"""

from __future__ import annotations

import contextlib
import os
import sys

EXIT_FINISHED = 0
EXIT_FAILED = 1
EXIT_STORAGE = 74
EXIT_STOPPED = 75
EXIT_SUPERSEDED = 76
EXIT_USAGE = 78


class HarnessError(Exception):
    """A failure that is explained in words instead of a traceback."""

    exit_code = EXIT_FAILED

    def __init__(self, what: str, found: str = "", remedy: str = "") -> None:
        self.what, self.found, self.remedy = what, found, remedy
        super().__init__(printable("\n".join(part for part in (what, found, remedy) if part)))  # a traceback may show it


class UsageError(HarnessError):
    """The configuration, the command line or the user's code asks for something impossible."""

    exit_code = EXIT_USAGE


class StorageError(HarnessError):
    """A store cannot be listed, read or written."""

    exit_code = EXIT_STORAGE


class RefusedError(StorageError):
    """A store says no for good: no such bucket, no permission, wrong credentials. Trying again would not help."""

    exit_code = EXIT_USAGE


class DamagedError(HarnessError):
    """A checkpoint does not verify, or a run has history but nothing in it loads."""


class ChangedError(DamagedError):
    """A file is not the one any more that was begun to be read."""

    def __init__(self, where: str) -> None:
        super().__init__(f"{where} changed while it was read", remedy="Try again when nobody writes to it.")


class SaveError(HarnessError):
    """A checkpoint could not be committed; the previous one is whole."""


class NonFiniteError(HarnessError):
    """Loss, gradients or parameters are not finite."""


class LostRankError(HarnessError):
    """Another rank of this attempt died or does not answer."""


class SupersededError(HarnessError):
    """A newer attempt of the same run has begun; this one may not write any more."""

    exit_code = EXIT_SUPERSEDED


class OvertakenError(HarnessError):
    """What this start was to go on from is not the newest any more: it has to be started again, and nothing has failed."""

    exit_code = EXIT_STOPPED


def by_exit_code(code: int, message: str) -> HarnessError:
    """Rebuild on one rank the error that another rank has raised."""
    kinds: dict[int, type[HarnessError]] = {
        EXIT_USAGE: UsageError, EXIT_STORAGE: StorageError, EXIT_SUPERSEDED: SupersededError, EXIT_STOPPED: OvertakenError
    }  # fmt: skip
    return kinds.get(code, HarnessError)(message)


def printable(text: str) -> str:
    """Text that came out of a file, without what a terminal would obey."""
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)


def report(error: HarnessError) -> None:
    """Print an error for people: in full on rank 0, in one line on the others, once where all ranks have the same."""
    rank = int(os.environ.get("RANK", "0"))
    first, *rest = str(error).split("\n")
    text = "\n".join([f"harness: error: {first}", *(f"  {line}" for line in rest)])
    if rank != 0:
        if isinstance(error, UsageError | SupersededError | OvertakenError):
            return
        text = f"harness: error on rank {rank}: {first}"
    with contextlib.suppress(OSError, ValueError, AttributeError):  # nobody reads; the exit code still tells
        sys.stderr.write(text + "\n")  # in one piece, or two ranks' lines run together
        sys.stderr.flush()
