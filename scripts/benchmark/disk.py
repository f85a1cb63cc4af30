"""The disk: what is durable, what is cold, and how fast it can be."""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import shutil
import subprocess
import threading
import time
from pathlib import Path
from statistics import median

BLOCK_BYTES, ALIGNED_BYTES = 16 << 20, 4096
LIBC = ctypes.CDLL(None, use_errno=True)


def fsync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def make_durable(path: Path) -> None:
    """Fsync a file, or everything in a folder and the folders themselves, and the folder that it
    lies in."""
    if path.is_dir():
        for folder, _, names in os.walk(path, topdown=False):
            for name in names:
                fsync(Path(folder, name))
            fsync(Path(folder))
    else:
        fsync(path)
    fsync(path.parent)


def size_bytes(path: Path) -> int:
    """Of a file, or of all files in a folder."""
    return (
        sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
        if path.is_dir()
        else path.stat().st_size
    )


def remove(path: Path) -> None:
    """Delete it and let the disk come to rest."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
    os.sync()


def warm(path: Path) -> None:
    """Have all of a file in the page cache."""
    # which leaves nothing behind
    with path.open("rb", buffering=0) as file, mmap.mmap(-1, BLOCK_BYTES) as buffer:
        while file.readinto(buffer):
            pass


def chill(path: Path) -> None:
    """Have nothing of a file in the page cache. Raises RuntimeError if that cannot be had."""
    fsync(path)
    fd = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)
    if (share := cached_share(path)) > 0.01:
        raise RuntimeError(
            f"{share:.0%} of {path} stays in the page cache: no cold read can be measured here"
        )


def cached_share(path: Path) -> float:
    """Which share of a file's pages is in the page cache."""
    with (
        path.open("rb") as file,
        mmap.mmap(
            file.fileno(), 0, prot=mmap.PROT_READ | mmap.PROT_WRITE, flags=mmap.MAP_PRIVATE
        ) as mapped,
    ):
        pages = -(-len(mapped) // mmap.PAGESIZE)
        found, first = (ctypes.c_ubyte * pages)(), ctypes.c_char.from_buffer(mapped)
        try:
            if LIBC.mincore(
                ctypes.c_void_p(ctypes.addressof(first)), ctypes.c_size_t(len(mapped)), found
            ):
                raise OSError(ctypes.get_errno(), "mincore")
        finally:
            del first
        return sum(page & 1 for page in bytes(found)) / pages


def ceiling(folder: str, size_bytes: int) -> dict[str, float]:
    """How long the disk takes for so many bytes when nothing else is in the way, in each way:
    aligned buffers that are there already, 16 MiB a write, two at a time past the page cache, then
    fsync of file and folder; a file that grows, and one allocated first."""
    took = {
        name: median(
            _write_direct(Path(folder, "ceiling"), size_bytes, name == "grows") for _ in range(2)
        )
        for name in ("grows", "allocated")
    }
    return took if shutil.which("fio") is None else took | {"fio": _fio(Path(folder), size_bytes)}


def _write_direct(path: Path, size_bytes: int, grows: bool) -> float:
    whole = -(-size_bytes // ALIGNED_BYTES) * ALIGNED_BYTES
    offsets = iter(range(0, whole, BLOCK_BYTES))
    buffers = [mmap.mmap(-1, BLOCK_BYTES) for _ in range(2)]
    for buffer in buffers:
        buffer.write(os.urandom(BLOCK_BYTES))
    os.sync()
    began_at = time.perf_counter()
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_DIRECT, 0o666)

    def work(buffer: mmap.mmap) -> None:
        for offset in offsets:
            os.pwrite(fd, memoryview(buffer)[: min(BLOCK_BYTES, whole - offset)], offset)

    try:
        if not grows:
            os.posix_fallocate(fd, 0, whole)
        threads = [threading.Thread(target=work, args=(buffer,)) for buffer in buffers]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        os.fsync(fd)
    finally:
        os.close(fd)
    fsync(path.parent)
    took_s = time.perf_counter() - began_at
    if path.stat().st_size != whole:
        raise RuntimeError("a direct write failed")
    remove(path)
    return took_s


def _fio(folder: Path, size_bytes: int) -> float:
    """The same by fio."""
    told = [
        "--name=ceiling",
        "--rw=write",
        "--bs=16M",
        "--direct=1",
        "--ioengine=libaio",
        "--iodepth=2",
        "--end_fsync=1",
    ]
    command = [
        "fio",
        *told,
        f"--size={size_bytes}",
        f"--directory={folder}",
        "--output-format=json",
    ]
    written = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)["jobs"][
        0
    ]["write"]
    return float(written["io_bytes"]) / float(written["bw_bytes"])
