"""The program and the machine of an attempt, as far as they determine its steps.

Two attempts must agree in them for their steps to be equal bit for bit.
"""

from __future__ import annotations

import hashlib
import os
import socket
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from harness.arguments import Settings
from harness.distributed.ranks import World

SHARDING = ("shard", "shard_size")  # settings of `train`
# Fields that must be equal for bitwise equal steps.
ALIKE = ("torch", "device", "world_size", "data_size", "sharding", "threads", "deterministic")


def of_machine(world: World) -> dict[str, Any]:
    """Return what determines whether steps can be equal bit for bit: host, device, software, ranks.

    Called on rank 0, whose machine represents those of all ranks.
    """
    machine = {
        "host": socket.gethostname(),
        "device": _device(world.device),
        "torch": torch.__version__,
        "world_size": world.size,
        "threads": torch.get_num_threads(),
        "deterministic": world.device.type == "cpu" or torch.are_deterministic_algorithms_enabled(),
    }
    machine |= {"sharding": world.sharding} if world.sharding else {}
    return machine | ({"data_size": world.data_size} if world.data_size < world.size else {})


def setting(config: Mapping[str, Any], part: str, name: str) -> Any:
    """Return one setting of harness/train.py, or None if the configuration does not have it.

    In a configuration of the user's own, `part` may be any value; one that is no mapping gives
    None.
    """
    own = config.get(part)
    return own.get(name) if isinstance(own, Mapping) else None


def of_program(settings: Settings) -> dict[str, Any]:
    """Return digests of the program's and the task's source, and the accepted deviations.

    A user who changes the source, or sets resume.accept or resume.override, expects different
    steps. How `train.shard` shards is there, too: the order of sums depends on it.
    """
    task = str(setting(settings.config, "task", "name") or "").partition(":")[0]
    code = {}
    for module in filter(None, ("__main__", task)):
        if path := getattr(sys.modules.get(module), "__file__", None):
            try:
                code[Path(path).name] = hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]
            except OSError:  # the file no longer exists, so its digest is unknown
                continue
    accepted = [deviation for deviation in settings.accept if deviation != "remote"]
    insisted = [f"resume.accept=[{','.join(accepted)}]"] * bool(accepted)
    insisted += [f"resume.override=[{','.join(settings.override)}]"] * bool(settings.override)
    sharding = [setting(settings.config, "train", name) for name in SHARDING]
    if sharding == ["hsdp", None]:
        sharding[1] = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return {"sources": code, "insisted": insisted, "sharding": sharding}


@dataclass(frozen=True)
class AttemptIdentities:
    """The machine and the program of the current attempt and of earlier ones."""

    attempt: int  # the current one
    machine: Mapping[str, Any]  # of the current attempt
    machines: Mapping[int, Mapping[str, Any]]  # of each earlier attempt that has step records
    programs: Mapping[int, Mapping[str, Any]]  # record of each attempt, the current one included
    # The attempts whose steps led to the state of the resume point. When this attempt recomputes
    # steps of attempt N, those of them after N may be the cause of a difference, too: they computed
    # some of the steps again, maybe on another machine or with another program.
    lineage: Sequence[int] = ()

    def is_exact(self, number: int) -> bool:
        """Return whether the steps of an attempt and of this one must be equal bit for bit."""
        return bool(self.machine.get("deterministic")) and not self.unlike(number)

    def unlike(self, number: int) -> list[str]:
        """Return the fields of `ALIKE` that differ since an attempt, with both values, in words."""
        return [
            f"{name}: {was} {when}, {self.machine.get(name)} now"
            for name in ALIKE
            for was, when in self._others(number, name)
        ]

    def other_ranks(self, number: int) -> list[str]:
        """Return which other numbers of ranks there were since an attempt, in words."""
        return [
            f"{was} rank(s) {when}, {self.machine.get('world_size')} now"
            for was, when in self._others(number, "world_size")
        ]

    def expected(self, number: int) -> list[str]:
        """Return the deliberate changes since an attempt that explain other steps, in words."""
        later = [
            self.programs[other]
            for other in sorted(self.programs)
            if number < other <= self.attempt
        ]
        insisted = [
            str(deviation) for record in later for deviation in record.get("insisted") or ()
        ]
        rolled = ["rollback" for record in later if record.get("kind") == "rollback"]
        changed = [
            change
            for other in (number, *self._since(number))
            for change in _changed(self.programs.get(other, {}), self.programs[self.attempt])
        ]
        return list(dict.fromkeys(insisted + rolled + changed))

    def _since(self, number: int) -> list[int]:
        return [other for other in self.lineage if other > number]

    def _others(self, number: int, name: str) -> list[tuple[Any, str]]:
        """Return the values of a field that are not today's, since an attempt, each with when."""
        now, before = self.machine.get(name), self.machines[number].get(name)
        values = [(before, "before")] if before != now else []
        for other in self._since(number):
            machine = self.machines.get(other) or _machine_of(self.programs.get(other, {}))
            if machine.get(name, now) != now:
                values.append((machine[name], f"in attempt {other}"))
        return values


def _machine_of(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the record of an attempt tells of its machine; {} if it has not trained."""
    if record.get("kind") != "train":
        return {}
    known = record.get("environment") or {}
    machine = {name: known[name] for name in ("torch", "threads") if name in known}
    if "world_size" in record:
        machine["world_size"] = record["world_size"]
    if "device" in known:
        machine["deterministic"] = known["device"] == "cpu" or bool(known.get("deterministic"))
    return machine


def _changed(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return what differs between the programs of two attempts, in words."""
    kinds = [_sharding(record) for record in (before, now)]
    sharding = [f"train.shard: {kinds[0]} before, {kinds[1]} now"] * (kinds[0] != kinds[1])
    was, is_now = (record.get("sources") for record in (before, now))
    if not (isinstance(was, dict) and isinstance(is_now, dict)):
        return sharding
    return sharding + [
        f"{name} has changed"
        for name in sorted(was.keys() | is_now.keys())
        if was.get(name) != is_now.get(name)
    ]


def _sharding(record: Mapping[str, Any]) -> str:
    kind = record.get("sharding")
    shard, size = kind if isinstance(kind, list) and len(kind) == 2 else (None, None)
    return "none" if shard in (None, "none") else f"{shard}" + (f" by {size}" if size else "")


def _device(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(
            line.partition(":")[2].strip() for line in lines if line.startswith("model name")
        )
    except (OSError, StopIteration):
        return os.uname().machine
