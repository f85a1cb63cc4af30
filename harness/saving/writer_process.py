"""The process that writes checkpoints to the disk.

A thread would do it in the time of the training thread: each of its calls takes Python's lock, and at a low priority it may be
put to sleep while it holds it. This process shares nothing with training but the memory that it writes from. It decides nothing:
what it has written is a temporary file until the training process gives it its name.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import mmap
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # of all packages called `harness` the one that this file lies in, wherever it lies
    sys.path += sys.argv[1:]
    package = Path(__file__).resolve().parents[1]
    spec = importlib.util.spec_from_file_location("harness", package / "__init__.py", submodule_search_locations=[str(package)])
    assert spec is not None and spec.loader is not None
    sys.modules["harness"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["harness"])

from harness.saving.readback import Reading
from harness.store.staging_buffer import StagingBuffer, write_to

NICE = 10  # gives way to training, but not for ever: on a machine with no idle core it still gets a tenth of one
READ_WITHIN_S = 20.0  # for how long, at most, writing waits for a piece that is read back
MODEST_IO = ("ionice", "-c", "2", "-n", "7")

# Loader workers are forked at each epoch's border, while this may be started from another thread. One that was forked in between would
# hold the pipe by which `Popen` hears that its program runs, and `Popen` would wait for as long as that worker lives.
_starting = threading.Lock()
os.register_at_fork(before=_starting.acquire, after_in_parent=_starting.release, after_in_child=_starting.release)


class WriterProcess:
    """That process, as the one that trains sees it. It is started when there is something to write, and again if it has died."""

    def __init__(self, on_failure: Callable[[str], object] = lambda why: None) -> None:
        """`on_failure` is told once why the process could not be had, or has died; the one that trains writes then."""
        self._process: subprocess.Popen[bytes] | None = None
        self._on_failure: Callable[[str], object] | None = on_failure
        self._has_answered, self._is_unable = False, False
        self._asking = threading.Lock()

    def reread(self, path: str) -> dict[str, Any] | None:
        """Have a piece of a file read back; what `Reading.more` gives, or an `error`. None if there is no process. From any thread: what
        is to be written meanwhile waits for one piece at most."""
        process = self._process
        try:
            return self._ask(process, {"reread": path}, self._asking) if process is not None and process.poll() is None else None
        except (OSError, ValueError):  # it has ended, or been let go
            return None

    def pour(self, image: StagingBuffer, path: Path) -> str:
        """Write an image to a file that is there; returns its digest. If the process cannot be had, or dies, this one writes. Raises
        OSError."""
        reply, why = None, ""
        if not self._is_unable:
            try:
                reply = self._ask(self._alive(image), {"path": str(path), "size_bytes": image.size_bytes, "fd": image.fd})
            except OSError as error:  # it has died, or cannot be started
                why = str(error)
        if reply is None:
            self._fail(why)
            assert image.memory is not None, "there is something in it"
            return write_to(image.memory, image.size_bytes, str(path))
        if "errno" in reply:
            raise OSError(reply["errno"], reply["error"], str(path))
        self._has_answered = True
        return str(reply["digest"])

    def _fail(self, why: str) -> None:
        """Let the process go, and tell of it once; one that never answered is not started again."""
        process = self._process
        self.close()
        self._is_unable = not self._has_answered
        if self._on_failure is not None:
            told, self._on_failure = self._on_failure, None
            told(why if process is None or process.returncode == 0 else f"it ended with {process.returncode}")

    def _ask(
        self, process: subprocess.Popen[bytes], job: dict[str, object], turn: contextlib.AbstractContextManager[Any] | None = None
    ) -> dict[str, Any] | None:
        assert process.stdin is not None and process.stdout is not None
        with turn or self._turn(process):
            process.stdin.write(json.dumps(job).encode() + b"\n")
            process.stdin.flush()
            line = process.stdout.readline()
        return json.loads(line) if line.endswith(b"\n") else None

    @contextlib.contextmanager
    def _turn(self, process: subprocess.Popen[bytes]) -> Iterator[None]:
        """One question at a time, of whoever writes. A process that does not come back from reading is given up: writing comes first."""
        if not self._asking.acquire(timeout=READ_WITHIN_S):
            process.kill()
            self._asking.acquire()
        try:
            yield
        finally:
            self._asking.release()

    def _alive(self, image: StagingBuffer) -> subprocess.Popen[bytes]:
        if self._process is None or self._process.poll() is not None:
            paths = [path for path in sys.path if path]  # of third parties' packages, after those that it finds by itself
            modest = MODEST_IO if shutil.which(MODEST_IO[0]) else ()
            with _starting:
                self._process = subprocess.Popen(
                    [*modest, sys.executable, "-I", str(Path(__file__).resolve()), *paths],  # -I: not what lies in the working directory
                    stdin=subprocess.PIPE, stdout=subprocess.PIPE, pass_fds=(image.fd,),
                )  # fmt: skip
        return self._process

    def close(self) -> None:
        """Let the process end, if it is there. Told in words: forked loader workers may hold its input open."""
        process, self._process = self._process, None
        if process is None or process.stdin is None or process.stdout is None:
            return
        with self._turn(process), contextlib.suppress(OSError):
            process.stdin.write(b"null\n")
            process.stdin.flush()
        process.wait()
        with contextlib.suppress(OSError):
            process.stdin.close()
        process.stdout.close()


def main() -> None:
    """Write what is asked for on standard input, until that ends."""
    from harness import preemption

    preemption.shield_loader_worker()  # until here they are held back, as whoever starts this process does
    os.nice(NICE)
    memory: mmap.mmap | None = None
    readings: dict[str, Reading] = {}
    for line in sys.stdin:
        job = json.loads(line)
        if job is None:
            return
        if "reread" in job:
            print(json.dumps(_reread(job["reread"], readings)), flush=True)
            continue
        try:
            if memory is None or len(memory) < job["size_bytes"]:
                memory = mmap.mmap(job["fd"], 0, prot=mmap.PROT_READ)
            reply: dict[str, object] = {"digest": write_to(memory, job["size_bytes"], job["path"])}
        except OSError as error:
            reply = {"errno": error.errno, "error": error.strerror}
        print(json.dumps(reply), flush=True)


def _reread(path: str, readings: dict[str, Reading]) -> dict[str, Any]:
    try:
        if path not in readings:
            readings[path] = Reading(path)
        return readings[path].more()
    except Exception as error:  # noqa: BLE001 - of reading only, and writing goes on
        return {"error": f"{type(error).__name__}: {error}"}


if __name__ == "__main__":
    main()
