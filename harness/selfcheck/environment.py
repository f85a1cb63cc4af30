"""Detect the hardware and software of this process, once per attempt, and report differences.

The differences are those from the hardware and software on which the resume point was written.
"""

from __future__ import annotations

import functools
import importlib.metadata
import os
import platform
import re
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

from harness.checkpoint.catalog import Catalog
from harness.checkpoint.format import Manifest
from harness.distributed.ranks import World
from harness.errors import UsageError
from harness.supervision.machine_record import (
    DISTRIBUTIONS,
    HASHING,
    NOT_EXACT,
    RANDOM,
    Difference,
    describe,
    differences,
    recorded,
)

VARIABLES = (
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "NCCL_ALGO",
    "NCCL_PROTO",
    "CUBLAS_WORKSPACE_CONFIG",
)
HERE_ALREADY = ("torch", "numpy")
REFUSE = "refuse"


class Environment:
    """The detection of hardware and software.

    Listing the installed distributions takes a moment, so rank 0 starts it in a thread on creation.
    """

    def __init__(self, world: World) -> None:
        self.world = world
        self._installed = None
        if world.is_writer:
            with_thread = ThreadPoolExecutor(1, thread_name_prefix="environment")
            self._installed = with_thread.submit(installed)
            with_thread.shutdown(wait=False)

    def collect(self) -> dict[str, Any]:
        """Return hardware and software on rank 0, and {} on the other ranks.

        Collective: every rank must call it.
        """
        own = hardware(self.world.device)
        ranks = self.world.gather(own)
        if self._installed is None:
            return {}
        unlike = {f"rank {rank}": other for rank, other in enumerate(ranks) if other != own}
        return (
            own
            | software(self.world.device)
            | {"ranks unlike rank 0": unlike, DISTRIBUTIONS: imported(self._installed.result())}
        )


def hardware(device: torch.device) -> dict[str, Any]:
    """Return the hardware that this rank computes on."""
    is_cuda = device.type == "cuda"
    return {
        "cpu": _cpu(),
        "cpu instructions": torch.backends.cpu.get_cpu_capability(),
        "device": torch.cuda.get_device_name(device) if is_cuda else device.type,
        "driver": _driver() if is_cuda else None,
    }


def software(device: torch.device) -> dict[str, Any]:
    """Return what determines the last bits of a result apart from the hardware.

    These are versions, the number of threads, environment variables and flags.
    """
    facts: dict[str, Any] = {
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "float32 matmul precision": _asked(torch.get_float32_matmul_precision),
        HASHING: string_hashing(),
        **{name: os.environ.get(name) for name in VARIABLES},
    }
    if device.type != "cuda":
        return facts
    cudnn = torch.backends.cudnn
    return facts | {
        "CUDA": torch.version.cuda,
        "cuDNN": cudnn.version(),  # type: ignore[no-untyped-call]
        "NCCL": _asked(
            lambda: ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]
        ),
        "TF32 in matmul": _asked(lambda: torch.backends.cuda.matmul.allow_tf32),
        "TF32 in cuDNN": _asked(lambda: cudnn.allow_tf32),
        "cuDNN deterministic": cudnn.deterministic,
        "cuDNN benchmark": cudnn.benchmark,
    }


@functools.cache
def string_hashing() -> str:
    """Return what the hashes of strings are made with: "PYTHONHASHSEED=0", or `RANDOM`.

    The order of a set of strings depends on them. A program that sets the variable itself comes too
    late, so it is read as this process was started with it.
    """
    if not sys.flags.hash_randomization:
        return "PYTHONHASHSEED=0"
    try:
        variables = Path("/proc/self/environ").read_bytes().split(b"\0")
    except OSError:
        variables = []
    prefix = b"PYTHONHASHSEED="
    seed = next((item for item in variables if item.startswith(prefix)), prefix).decode()
    is_fixed = seed.partition("=")[2].isdigit() and not sys.flags.ignore_environment
    return seed if is_fixed else RANDOM


def _asked(flag: Callable[[], Any]) -> Any:
    """Return the value of a torch flag, or the reason why it is unknown.

    torch raises an error if flags were set with both its old and its new API.
    """
    try:
        return flag()
    except (RuntimeError, AttributeError) as error:
        return f"unknown: {str(error).splitlines()[0][:80]}"


def _cpu() -> str:
    try:
        name = re.search(
            r"^(?:model name|Model|cpu model)\s*:\s*(.+)$",
            Path("/proc/cpuinfo").read_text(),
            re.MULTILINE,
        )
    except OSError:
        name = None
    return name[1].strip() if name else platform.processor() or platform.machine()


def _driver() -> str | None:
    try:
        version = re.search(
            r"\b\d+\.\d+(?:\.\d+)?\b", Path("/proc/driver/nvidia/version").read_text()
        )
    except OSError:
        return None
    return version[0] if version else None


@functools.cache
def installed() -> Mapping[str, list[str]]:
    """Return the names of the installed distributions by their top-level packages."""
    return importlib.metadata.packages_distributions()


def imported(installed: Mapping[str, list[str]]) -> dict[str, str]:
    """Return the versions of the distributions of all modules imported so far.

    torch and NumPy are left out. `installed` maps a top-level package to its distributions.
    """
    tops = {name.partition(".")[0] for name in tuple(sys.modules)}
    names = {
        name for top in tops for name in installed.get(top, ()) if name.lower() not in HERE_ALREADY
    }
    versions = {}
    for name in sorted(names):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:  # removed since the listing
            continue
    return versions


def check(
    catalog: Catalog,
    origin: Manifest | None,
    now: Mapping[str, Any],
    insist: str,
    say: Callable[[str], object],
) -> list[Difference]:
    """Report how hardware and software differ from those that wrote the resume point.

    Called on rank 0, before the claim.

    Args:
        catalog: Catalog of the run's stores.
        origin: The resume point; None for step 0.
        now: Hardware and software of this attempt.
        insist: Value of resume.environment.
        say: Prints a line for the user.

    Returns:
        The differences; empty if there are none or if no record exists.

    Raises:
        UsageError: `insist` is "refuse" and results would differ.
    """
    if origin is None:
        return []
    before = recorded(catalog, origin.attempt)
    if before is None:
        if catalog.attempts.get(origin.attempt, {}).get("kind") == "train":
            say(f"harness: it is not recorded which machine and software {origin.name} was made on")
        return []
    differing = differences(before, now)
    inexact = [difference for difference in differing if not difference.is_exact]
    if inexact and insist == REFUSE:
        raise UsageError(
            f"this is not the machine and software that {origin.name} was made on: {NOT_EXACT}",
            "\n".join(
                f"  {difference.name}: found {difference.now!r}, expected {difference.before!r}"
                for difference in inexact
            ),
            "Start it where it was started before. To go on all the same: resume.environment=warn.",
        )
    if differing:
        say(f"harness: not as {origin.name} was made: {describe(differing)}")
    return differing
