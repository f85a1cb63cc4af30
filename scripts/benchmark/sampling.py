"""CPU time and memory of a sample's whole process tree. Imports nothing large: the memory's sampler
is a process of its own.

The processes are found by a variable of their environment, which every child inherits, orphans and
new sessions too.
"""

from __future__ import annotations

import contextlib
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

MARK = "BENCH_SAMPLE"
EVERY_S, LOOK_EVERY_S = 0.010, 0.050
# linux/posix-timers.h: the CPU clock of a process is made of its complement and this
CPUCLOCK_SCHED = 2


def processes(mark: str) -> list[int]:
    """All processes of a sample."""
    wanted, found = f"{MARK}={mark}".encode(), []
    for entry in os.listdir("/proc"):
        if entry.isdecimal():
            with contextlib.suppress(OSError):
                if wanted in Path(f"/proc/{entry}/environ").read_bytes().split(b"\0"):
                    found.append(int(entry))
    return found


def cpu_s() -> float:
    """CPU time of this sample so far: that of its live processes, to the nanosecond, and of this
    one's ended children."""
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    total = ended.ru_utime + ended.ru_stime
    for pid in processes(os.environ[MARK]):
        with contextlib.suppress(OSError):
            total += time.clock_gettime((~pid << 3) | CPUCLOCK_SCHED)
    return total


def pss_bytes(pids: list[int]) -> int:
    """Memory of these processes, each shared page counted once."""
    total = 0
    for pid in pids:
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
                if line.startswith("Pss:"):
                    total += int(line.split()[1]) * 1024
    return total


def memory_bytes() -> int:
    """What this sample's processes hold at the moment."""
    return pss_bytes(processes(os.environ[MARK]))


class Peak:
    """The most memory that the sample's processes held at a time, looked at every 10 ms from
    outside, while the context is open.

    Reading it walks page tables under a lock: what is timed must not be sampled.
    """

    most_bytes = 0

    def __enter__(self) -> Peak:
        mark = os.environ[MARK]
        outside = {name: value for name, value in os.environ.items() if name != MARK}
        self._sampler = subprocess.Popen(
            [sys.executable, "-S", __file__, mark],
            env=outside,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._sampler.stdout is not None
        self._sampler.stdout.readline()
        return self

    def __exit__(self, *_: object) -> None:
        self.most_bytes = int(self._sampler.communicate()[0])


def _sample(mark: str) -> None:
    """Until standard input is closed."""
    import select

    print("ready", flush=True)
    most, looked_at, is_over = 0, 0.0, False
    pids: list[int] = []
    while not is_over:
        # what is held at the end is looked at too
        is_over = bool(select.select([sys.stdin], [], [], EVERY_S)[0])
        if is_over or time.monotonic() - looked_at > LOOK_EVERY_S:
            pids, looked_at = processes(mark), time.monotonic()
        most = max(most, pss_bytes(pids))
    print(most)


if __name__ == "__main__":
    _sample(sys.argv[1])
