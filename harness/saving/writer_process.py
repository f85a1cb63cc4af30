"""Write checkpoints to the disk in a process of its own.

A thread would slow the training thread down: each of its calls takes the GIL, and at a low priority
it may be descheduled while it holds the GIL. This process shares nothing with training but the
memory that it writes from. It makes no decisions: a file that it has written is a temporary file
until the training process renames it.
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

# As a script: import the `harness` package that contains this file, and no other one of that name.
if __name__ == "__main__":
    sys.path += sys.argv[1:]
    package = Path(__file__).resolve().parents[1]
    spec = importlib.util.spec_from_file_location(
        "harness", package / "__init__.py", submodule_search_locations=[str(package)]
    )
    assert spec is not None and spec.loader is not None
    sys.modules["harness"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["harness"])

from harness.saving.readback import Reading
from harness.store.staging_buffer import StagingBuffer, write_to

# The process gives way to training, but does not starve: on a machine with no idle core it still
# gets a tenth of one.
NICE = 10
READ_WITHIN_S = 20.0  # how long a write waits at most for a slice that is read back
MODEST_IO = ("ionice", "-c", "2", "-n", "7")

# Loader workers are forked at each epoch boundary, while another thread may start the writer
# process. A worker that is forked in between would inherit the pipe through which `Popen` learns
# that its program runs, and `Popen` would wait for as long as that worker lives.
_starting = threading.Lock()
os.register_at_fork(
    before=_starting.acquire, after_in_parent=_starting.release, after_in_child=_starting.release
)


class WriterProcess:
    """The training process's handle on the writer process.

    The process is started when there is something to write, and again if it has died.
    """

    def __init__(self, on_failure: Callable[[str], object] = lambda why: None) -> None:
        """Initialise the handle; the process is not started yet.

        `on_failure` is called once, with the reason, when the process cannot be started or has
        died. The training process then writes the file itself.
        """
        self._process: subprocess.Popen[bytes] | None = None
        self._on_failure: Callable[[str], object] | None = on_failure
        self._has_answered, self._is_unable = False, False
        self._asking = threading.Lock()

    def reread(self, path: str) -> dict[str, Any] | None:
        """Have the process read back the next slice of a file. May be called from any thread.

        A write that is requested meanwhile waits for one slice at most.

        Returns:
            The result of `Reading.more`, or a dict with an `error`; None if there is no process.
        """
        process = self._process
        try:
            return (
                self._ask(process, {"reread": path}, self._asking)
                if process is not None and process.poll() is None
                else None
            )
        except (OSError, ValueError):  # the process has ended, or `close` has closed the pipes
            return None

    def write_staged(self, staging: StagingBuffer, path: Path) -> str:
        """Write a staging buffer to an existing file; return the digest of the file.

        If the writer process cannot be started, or dies, the calling process writes the file.

        Raises:
            OSError: the file cannot be written.
        """
        reply, why = None, ""
        if not self._is_unable:
            try:
                reply = self._ask(
                    self._alive(staging),
                    {"path": str(path), "size_bytes": staging.size_bytes, "fd": staging.fd},
                )
            except OSError as error:  # the process has died, or cannot be started
                why = str(error)
        if reply is None:
            self._fail(why)
            assert staging.memory is not None, "there is something in it"
            return write_to(staging.memory, staging.size_bytes, str(path))
        if "errno" in reply:
            raise OSError(reply["errno"], reply["error"], str(path))
        self._has_answered = True
        return str(reply["digest"])

    def _fail(self, why: str) -> None:
        """End the process and report the failure once.

        A process that has never answered is not started again.
        """
        process = self._process
        self.close()
        self._is_unable = not self._has_answered
        if self._on_failure is not None:
            on_failure, self._on_failure = self._on_failure, None
            on_failure(
                why
                if process is None or process.returncode == 0
                else f"it ended with {process.returncode}"
            )

    def _ask(
        self,
        process: subprocess.Popen[bytes],
        job: dict[str, object],
        turn: contextlib.AbstractContextManager[Any] | None = None,
    ) -> dict[str, Any] | None:
        assert process.stdin is not None and process.stdout is not None
        with turn or self._turn(process):
            process.stdin.write(json.dumps(job).encode() + b"\n")
            process.stdin.flush()
            line = process.stdout.readline()
        return json.loads(line) if line.endswith(b"\n") else None

    @contextlib.contextmanager
    def _turn(self, process: subprocess.Popen[bytes]) -> Iterator[None]:
        """Wait for the current request to end; used for writes and to end the process.

        Writing has priority: a process that does not return from a read in time is killed.
        """
        if not self._asking.acquire(timeout=READ_WITHIN_S):
            process.kill()
            self._asking.acquire()
        try:
            yield
        finally:
            self._asking.release()

    def _alive(self, staging: StagingBuffer) -> subprocess.Popen[bytes]:
        if self._process is None or self._process.poll() is not None:
            # For third-party packages; the process appends these to the paths that it finds itself.
            paths = [path for path in sys.path if path]
            modest = MODEST_IO if shutil.which(MODEST_IO[0]) else ()
            with _starting:
                self._process = subprocess.Popen(
                    [
                        *modest,
                        sys.executable,
                        "-I",  # import nothing from the working directory
                        str(Path(__file__).resolve()),
                        *paths,
                    ],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    pass_fds=(staging.fd,),
                )
        return self._process

    def close(self) -> None:
        """End the process if it is running.

        It is asked to end by a message, as forked loader workers may hold its input open.
        """
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
    """Serve the requests on standard input, one JSON line each, until it ends or a null arrives."""
    from harness.preemption import children

    # Until here the stop signals are blocked: the thread that starts this process has blocked them.
    children.shield_loader_worker()
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
    except Exception as error:  # noqa: BLE001 - only the read has failed; writing goes on
        return {"error": f"{type(error).__name__}: {error}"}


if __name__ == "__main__":
    main()
