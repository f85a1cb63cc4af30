"""The errors that a user may see, how they are printed, and their exit codes.

A message has three parts: what failed, the values (found, expected), and the remedy.
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
    """A failure that is reported by a message, without a traceback."""

    exit_code = EXIT_FAILED

    def __init__(self, what: str, found: str = "", remedy: str = "") -> None:
        self.what, self.found, self.remedy = what, found, remedy
        # A traceback may print the message: remove control characters.
        super().__init__(printable("\n".join(part for part in (what, found, remedy) if part)))


class UsageError(HarnessError):
    """The configuration, the command line or the user's code is invalid."""

    exit_code = EXIT_USAGE


class StorageError(HarnessError):
    """A store cannot be listed, read or written."""

    exit_code = EXIT_STORAGE


class RefusedError(StorageError):
    """A store refuses permanently: no such bucket, no permission, wrong credentials.

    A retry would not help.
    """

    exit_code = EXIT_USAGE


class DamagedError(HarnessError):
    """A checkpoint does not verify, or a run has a history but none of its checkpoints loads."""


class ChangedError(DamagedError):
    """A file was replaced or changed while it was read."""

    def __init__(self, where: str) -> None:
        super().__init__(
            f"{where} changed while it was read", remedy="Try again when nobody writes to it."
        )


class SaveError(HarnessError):
    """A checkpoint could not be committed; the previous one is intact."""


class NonFiniteError(HarnessError):
    """Loss, gradients or parameters are not finite."""


class LostRankError(HarnessError):
    """Another rank of this attempt died or does not answer."""


class SupersededError(HarnessError):
    """A newer attempt of the same run has begun; this one must not write any more."""

    exit_code = EXIT_SUPERSEDED


class OvertakenError(HarnessError):
    """The resume point of this start is not the newest checkpoint any more.

    Nothing has failed; the run must be started again.
    """

    exit_code = EXIT_STOPPED


def by_exit_code(code: int, message: str) -> HarnessError:
    """Rebuild an error that another rank raised, from its exit code and message."""
    kinds: dict[int, type[HarnessError]] = {
        EXIT_USAGE: UsageError,
        EXIT_STORAGE: StorageError,
        EXIT_SUPERSEDED: SupersededError,
        EXIT_STOPPED: OvertakenError,
    }
    return kinds.get(code, HarnessError)(message)


def printable(text: str) -> str:
    """Escape the control characters of a text, except newlines and tabs."""
    return "".join(
        c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text
    )


def report(error: HarnessError) -> None:
    """Print an error to stderr: in full on rank 0, in one line on other ranks.

    Errors that all ranks raise alike are printed on rank 0 only.
    """
    rank = int(os.environ.get("RANK", "0"))
    first, *rest = str(error).split("\n")
    text = "\n".join([f"harness: error: {first}", *(f"  {line}" for line in rest)])
    if rank != 0:
        if isinstance(error, UsageError | SupersededError | OvertakenError):
            return
        text = f"harness: error on rank {rank}: {first}"
    # stderr may be closed; the exit code still reports the error.
    with contextlib.suppress(OSError, ValueError, AttributeError):
        sys.stderr.write(text + "\n")  # one write: else the lines of two ranks may interleave
        sys.stderr.flush()
