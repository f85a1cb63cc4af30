"""The process that writes checkpoints to the disk.

A thread would do it in the time of the training thread: each of its calls takes Python's lock, and at a low priority it may be
put to sleep while it holds it. This process shares nothing with training but the memory that it writes from. It decides nothing:
what it has written is a temporary file until the training process gives it its name.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

from harness.store.image import Image, pour

NICE = 10  # gives way to training, but not for ever: on a machine with no idle core it still gets a tenth of one
MODEST_IO = ("ionice", "-c", "2", "-n", "7")

# Loader workers are forked at each epoch's border, while this may be started from another thread. One that was forked in between would
# hold the pipe by which `Popen` hears that its program runs, and `Popen` would wait for as long as that worker lives.
_starting = threading.Lock()
os.register_at_fork(before=_starting.acquire, after_in_parent=_starting.release, after_in_child=_starting.release)


class Scribe:
    """That process, as the one that trains sees it. It is started when there is something to write, and again if it has died."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None

    def pour(self, image: Image, path: Path) -> str:
        """Write an image to a file that is there; returns its digest. If the process cannot be had, or dies, this one writes. Raises
        OSError."""
        try:
            reply = self._ask(self._alive(image), {"path": str(path), "size_bytes": image.size_bytes, "fd": image.fd})
        except OSError:  # it has died, or cannot be started
            reply = None
        if reply is None:
            self.close()
            assert image.memory is not None, "there is something in it"
            return pour(image.memory, image.size_bytes, str(path))
        if "errno" in reply:
            raise OSError(reply["errno"], reply["error"], str(path))
        return str(reply["digest"])

    def _ask(self, process: subprocess.Popen[bytes], job: dict[str, object]) -> dict[str, Any] | None:
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(json.dumps(job).encode() + b"\n")
        process.stdin.flush()
        line = process.stdout.readline()
        return json.loads(line) if line.endswith(b"\n") else None

    def _alive(self, image: Image) -> subprocess.Popen[bytes]:
        if self._process is None or self._process.poll() is not None:
            root = str(Path(__file__).resolve().parents[2])
            paths = os.pathsep.join(path for path in (root, os.environ.get("PYTHONPATH", "")) if path)
            modest = MODEST_IO if shutil.which(MODEST_IO[0]) else ()
            with _starting:
                self._process = subprocess.Popen(
                    [*modest, sys.executable, "-m", "harness.checkpoint.scribe"],
                    stdin=subprocess.PIPE, stdout=subprocess.PIPE, pass_fds=(image.fd,), env=os.environ | {"PYTHONPATH": paths},
                )  # fmt: skip
        return self._process

    def close(self) -> None:
        """Let the process end, if it is there. Told in words: forked loader workers may hold its input open."""
        process, self._process = self._process, None
        if process is None or process.stdin is None or process.stdout is None:
            return
        with contextlib.suppress(OSError):
            process.stdin.write(b"null\n")
            process.stdin.flush()
        process.wait()
        with contextlib.suppress(OSError):
            process.stdin.close()
        process.stdout.close()


def main() -> None:
    """Write what is asked for on standard input, until that ends."""
    from harness import stop

    stop.shield_loader_worker()  # until here they are held back, as whoever starts this process does
    os.nice(NICE)
    memory: mmap.mmap | None = None
    for line in sys.stdin:
        job = json.loads(line)
        if job is None:
            return
        try:
            if memory is None or len(memory) < job["size_bytes"]:
                memory = mmap.mmap(job["fd"], 0, prot=mmap.PROT_READ)
            reply: dict[str, object] = {"digest": pour(memory, job["size_bytes"], job["path"])}
        except OSError as error:
            reply = {"errno": error.errno, "error": error.strerror}
        print(json.dumps(reply), flush=True)


if __name__ == "__main__":
    main()
