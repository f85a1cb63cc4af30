"""What an attempt runs, and on what: as far as two attempts must be alike for their steps to be equal bit for bit."""

from __future__ import annotations

import hashlib
import os
import socket
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from harness.arguments import Settings
from harness.distributed.ranks import World

ALIKE = ("torch", "device", "world_size", "threads", "deterministic")  # what must be alike for the same bits


def of_machine(world: World) -> dict[str, Any]:
    """What the steps are made on and with; for the writer, whose machine stands for those of all ranks."""
    return {
        "host": socket.gethostname(),
        "device": _device(world.device),
        "torch": torch.__version__,
        "world_size": world.size,
        "threads": torch.get_num_threads(),
        "deterministic": world.device.type == "cpu" or torch.are_deterministic_algorithms_enabled(),
    }


def setting(config: Mapping[str, Any], part: str, name: str) -> Any:
    """One of harness/train.py's settings; None in a configuration of the user's own, which may call anything so."""
    own = config.get(part)
    return own.get(name) if isinstance(own, Mapping) else None


def of_program(settings: Settings) -> dict[str, Any]:
    """The code of the program and of the task, and what this start insists on: whoever changes one of them expects other steps."""
    task = str(setting(settings.config, "task", "name") or "").partition(":")[0]
    code = {}
    for module in filter(None, ("__main__", task)):
        if path := getattr(sys.modules.get(module), "__file__", None):
            try:
                code[Path(path).name] = hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]
            except OSError:  # it has no file any more: nothing is known of it
                continue
    accepted = [what for what in settings.accept if what != "remote"]
    insisted = [f"resume.accept=[{','.join(accepted)}]"] * bool(accepted)
    insisted += [f"resume.override=[{','.join(settings.override)}]"] * bool(settings.override)
    return {"sources": code, "insisted": insisted}


def changed(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Whose code is another one now, of two attempts' records, in words."""
    was, is_now = (record.get("sources") for record in (before, now))
    if not (isinstance(was, dict) and isinstance(is_now, dict)):
        return []
    return [f"{name} has changed" for name in sorted(was.keys() | is_now.keys()) if was.get(name) != is_now.get(name)]


def is_exact(before: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Whether the steps of two attempts are equal bit for bit, if nothing is wrong."""
    return bool(now.get("deterministic")) and all(before.get(name) == now.get(name) for name in ALIKE)


def unlike(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs of what must be alike for the same bits, with both values."""
    return [f"{name}: {before.get(name)} before, {now.get(name)} now" for name in ALIKE if before.get(name) != now.get(name)]


def _device(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return os.uname().machine
