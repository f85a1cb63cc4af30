"""The power fails after any system call of a commit: what is there afterwards is the old or the
new, whole, on a real file system.

The file system is told to forget everything that it has not written to its disk (ext4's and XFS's
shutdown without a flush of the journal), unmounted and mounted again.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ENVIRONMENT

from harness.checkpoint import format as fmt
from harness.store import LocalStore

SHUTDOWN, WITHOUT_FLUSH = 0x8004587D, 2
SIZES_MIB = {"ext4": 64, "xfs": 320}
OLD, NEW = b"old" * 100_000, b"new" * 1_500_000  # the new one is written around the page cache

COMMIT = """
import sys
from harness.store import LocalStore
from harness.store.staging_buffer import StagingBuffer, write_to
store, image = LocalStore(sys.argv[1]), StagingBuffer()
data = b"new" * 1_500_000
image.reserve(len(data))
image.memory[: len(data)] = data
with store.writer("checkpoints/step_00000002-0001.pt", 1) as sink:
    sink.write_staged(
        image,
        lambda image, path: write_to(
            image.memory, image.size_bytes, str(path), direct_from_bytes=1 << 20
        ),
    )
    sink.commit()
store.create("checkpoints/step_00000002-0001.json", sink.digest().encode(), 1)
store.write("config.yaml", data, 1)
store.delete("checkpoints/step_00000001-0001.json")
store.delete("checkpoints/step_00000001-0001.pt")
"""


def unavailable(why: str) -> None:
    if os.environ.get("CI"):
        pytest.fail(why)
    pytest.skip(why)


@contextlib.contextmanager
def mounted(image: Path, kind: str) -> Iterator[Path]:
    """The image's file system; at the end the power fails."""
    point = image.with_suffix(".mnt")
    point.mkdir(exist_ok=True)
    done = subprocess.run(
        ["mount", "-t", kind, "-o", "loop", str(image), str(point)], capture_output=True, text=True
    )
    if done.returncode:
        unavailable(f"cannot mount a {kind} image: {done.stderr}")
    try:
        yield point
        folder = os.open(point, os.O_RDONLY)
        try:
            fcntl.ioctl(folder, SHUTDOWN, struct.pack("I", WITHOUT_FLUSH))
        finally:
            os.close(folder)
    finally:
        subprocess.run(["umount", str(point)], check=True)


def prepare(image: Path, kind: str) -> None:
    """A file system with a whole old checkpoint on it, all of it durable."""
    if shutil.which(f"mkfs.{kind}") is None or shutil.which("strace") is None or os.geteuid() != 0:
        unavailable(f"needs root, strace and mkfs.{kind}")
    with image.open("wb") as file:
        file.truncate(SIZES_MIB[kind] << 20)
    subprocess.run([f"mkfs.{kind}", "-q", str(image)], check=True)
    with mounted(image, kind) as root:
        store = LocalStore(root)
        store.prepare(fmt.FOLDERS)
        with store.writer("checkpoints/step_00000001-0001.pt", 1) as sink:
            sink.write(OLD)
            sink.commit()
        store.create("checkpoints/step_00000001-0001.json", sink.digest().encode(), 1)
        store.write("config.yaml", OLD, 1)
        os.sync()


def check(root: Path, *, completed: bool) -> None:
    """Whatever has a manifest is whole; one of the two checkpoints always is."""
    found = {}
    for step, content in ((1, OLD), (2, NEW)):
        manifest = root / "checkpoints" / f"step_{step:08d}-0001.json"
        if manifest.exists():
            assert manifest.read_text().startswith("blake3:") and len(manifest.read_text()) == 71, (
                "a torn manifest"
            )
            assert (root / "checkpoints" / f"step_{step:08d}-0001.pt").read_bytes() == content, (
                f"step {step} has a manifest, but is not whole"
            )
            found[step] = True
    assert found, "neither the old nor the new checkpoint is there"
    assert (root / "config.yaml").read_bytes() in (OLD, NEW)
    if completed:
        assert list(found) == [2], "what was reported as done is not there"
        assert (root / "config.yaml").read_bytes() == NEW


@pytest.mark.parametrize("kind", ["ext4", pytest.param("xfs", marks=pytest.mark.slow)])
def test_after_a_power_loss_at_any_system_call_the_old_or_the_new_is_whole(
    kind: str, tmp_path: Path
) -> None:
    fresh, image = tmp_path / "fresh.img", tmp_path / "disk.img"
    prepare(fresh, kind)
    cases = 0
    for call in ("write", "pwrite64", "fsync", "rename", "link", "unlink"):
        for nth in range(1, 30):
            shutil.copyfile(fresh, image)
            with mounted(image, kind) as root:
                inject = f"inject={call}:signal=SIGKILL:when={nth}"
                command = [
                    "strace",
                    "-qq",
                    "-o",
                    "/dev/null",
                    "-e",
                    f"trace={call}",
                    "-e",
                    inject,
                    sys.executable,
                    "-c",
                    COMMIT,
                    str(root),
                ]
                done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True)
            with mounted(image, kind) as root:
                check(root, completed=done.returncode == 0)
            cases += 1
            if done.returncode == 0:
                break
        else:
            pytest.fail(f"more than 29 calls of {call}: the sequence was not enumerated to its end")
    assert cases >= 15
