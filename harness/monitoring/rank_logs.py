"""Redirect the output of all ranks but rank 0 (the writer) to files in the run directory.

This applies to supervised runs. Their output then is one readable stream, that of the writer.
"""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path

from harness.distributed.ranks import own_rank, prints
from harness.store import expanded
from harness.supervision import launches
from harness.text import say

LOGS = "logs"


def divert(directory: str | Path | None) -> None:
    """Redirect this rank's stdout and stderr to a file in `logs`.

    Nothing is redirected on rank 0, whose output people read. Without a supervisor or a run
    directory, nothing is redirected on any rank. If the file cannot be opened, the error is printed
    and nothing is redirected.
    """
    name = launches.own()
    if name is None or directory is None or prints():
        return
    folder = expanded(directory) / LOGS
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = os.open(
            folder / f"{name}-rank{own_rank()}.log",
            os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC,
            0o666,
        )
    except OSError as error:
        say(f"harness: rank {own_rank()} prints here: {error}", sys.stderr)
        return
    with contextlib.suppress(OSError, ValueError):
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
            os.dup2(file, stream.fileno())
    os.close(file)
