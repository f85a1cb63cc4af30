"""System calls at which strace kills a process or lets the disk refuse, for real."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest

# Whether these happen depends on how full the heap is, not on what is done.
OF_THE_HEAP = {"brk", "mmap", "munmap", "mremap", "madvise", "mprotect", "futex"}
CALL = re.compile(r"^(?:\d+ +)?(?P<name>\w+)\((?P<rest>.*)$")


@dataclass(frozen=True)
class Point:
    """The k-th call of a name within a life."""

    name: str
    k: int
    on_store: bool
    text: str


def points_in(trace: str, root: Path | str) -> list[Point]:
    """The calls in an output of strace, in order; those on the store name `root`."""
    counts: Counter[str] = Counter()
    found = []
    for line in trace.splitlines():
        match = CALL.match(line)
        if match is None or "resumed" in line:  # a signal, an exit, the stop that it woke from
            continue
        counts[match["name"]] += 1
        found.append(Point(match["name"], counts[match["name"]], str(root) in line, line))
    return found


def cannot(why: str) -> None:
    """Where the tools should be there, their absence is a failure; elsewhere it is said."""
    if os.environ.get("CI"):
        pytest.fail(why)
    pytest.skip(why)


def check_strace() -> None:
    if shutil.which("strace") is None:
        cannot("strace is not installed")
    tried = subprocess.run(
        ["strace", "-o", "/dev/null", "-e", "inject=getpid:error=EIO", "true"],
        capture_output=True,
        text=True,
    )
    if tried.returncode != 0:
        cannot(f"strace cannot trace here: {tried.stderr.strip()}")


def injecting(faults: dict[str, str]) -> list[str]:
    """The options with which strace lets a life meet these faults, by name of the system call."""
    given = [
        option for call, fault in faults.items() for option in ("-e", f"inject={call}:{fault}")
    ]
    return ["-o", "/dev/null", "-e", f"trace={','.join(faults)}", *given]
