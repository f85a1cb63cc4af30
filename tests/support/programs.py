"""Programs as their authors write them, lived whole and killed once: what a kill must not change.

A program is a text. Its run lies where `sys.argv[1]` says; it calls `die(run)` at the end of each
step. `HEAD` stands before it. The processes are forked from one that has imported torch, so that a
life takes a fraction of a second; they are killed for real.
"""

from __future__ import annotations

import hashlib
import json
import os
import runpy
import signal
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from remote_lives import Born

HEAD = """
import os, random, signal, sys, time
import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler, TensorDataset
import harness
from programs import die


def init(**arguments):
    return harness.init(sys.argv[1], **(
        {"seed": 1, "save_every_s": None, "save_every_steps": 3} | arguments
    ))


def points(count=160):
    generator = torch.Generator().manual_seed(0)
    return TensorDataset(
        torch.randn(count, 8, generator=generator), torch.randn(count, 1, generator=generator)
    )
"""

# A small model under `fully_shard`, which a program has imported, and its optimizer.
SHARDED = """
torch.manual_seed(3)
model = nn.Sequential(nn.Linear(8, 13), nn.BatchNorm1d(13), nn.Linear(13, 1))
fully_shard(model[0])
fully_shard(model)
optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
run.track(model=model, optimizer=optimizer)
"""
STEP = """
    loss = (model(x) - y).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    run.log(loss=loss)
    die(run)
"""  # of a loop over x and y: what follows its first line


def die(run: Any) -> None:
    """Be killed in step `$DIE`, when what was saved before it has arrived."""
    if run.step != int(os.environ.get("DIE", 0)):
        return
    until = time.monotonic() + 30
    folder = Path(sys.argv[1]) / "checkpoints"
    last = (run.step - 1) // 3 * 3
    while (
        run.is_writer
        and last
        and not list(folder.glob(f"step_{last:08d}-*.json"))
        and time.monotonic() < until
    ):
        time.sleep(0.01)
    if not run.is_writer:
        time.sleep(60)  # the test kills the others when the writer is dead
    os.kill(os.getpid(), signal.SIGKILL)


def whole_digest(*values: Any) -> str:
    """In a program: a digest of the tensors in nested dicts, those that are sharded made whole."""
    hasher = hashlib.sha256()

    def add(path: str, value: Any) -> None:
        if isinstance(value, dict):
            for key in sorted(value, key=str):
                add(f"{path}/{key}", value[key])
        elif hasattr(value, "numpy"):
            whole = value.full_tensor() if hasattr(value, "full_tensor") else value
            hasher.update(f"{path} {tuple(whole.shape)}".encode() + whole.numpy().tobytes())

    for value in values:
        add("", value)
    return hasher.hexdigest()


def program(path: str, folder: str, arguments: list[str]) -> None:
    """In a process of the nursery: be that program, started in that folder."""
    os.chdir(folder)
    sys.argv = [path, *arguments]
    sys.path[0] = str(Path(path).parent)
    runpy.run_path(path, run_name="__main__")


@dataclass
class Lived:
    """How one life of a program ended, rank by rank."""

    codes: list[int]
    texts: list[str]

    @property
    def code(self) -> int:
        return self.codes[0]

    @property
    def text(self) -> str:
        """What the writer has printed."""
        return self.texts[0]


def printed(lived: Lived, what: str) -> list[Any]:
    """What a program without an error has printed as JSON after that word, rank by rank."""
    assert set(lived.codes) == {0}, "\n".join(lived.texts)
    return [
        json.loads(line.removeprefix(f"{what} "))
        for text in lived.texts
        for line in text.splitlines()
        if line.startswith(f"{what} ")
    ]


@dataclass
class Outcome:
    """A program that was not killed beside the same one killed once."""

    whole: Lived
    killed: Lived
    resumed: Lived
    # what differs in the last checkpoints
    rows: list[tuple[str, str, str, str]] = field(default_factory=list)

    @property
    def is_equal(self) -> bool:
        return self.whole.code == self.resumed.code == 0 and not self.rows


def born(
    folder: Path,
    source: str,
    name: str,
    *,
    ranks: int = 1,
    env: dict[str, str] | None = None,
    head: str = HEAD,
) -> list[Born]:
    """Begin a life of the program, on the run `name` in the folder; the processes of its ranks."""
    from remote_lives import shared_nursery
    from s3_server import free_ports

    path = folder / "program.py"
    path.write_text(head + source)
    (port,) = free_ports(1)
    joined = {
        "WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "LOCAL_WORLD_SIZE": str(ranks),
    }
    processes = []
    for rank in range(ranks):
        own = (joined | {"RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else {}) | (
            env or {}
        )
        output = folder / f"{name}.{time.monotonic_ns()}.{rank}.txt"
        processes.append(
            shared_nursery().bear(
                "program", own, output, str(path), str(folder), [str(folder / name)]
            )
        )
    return processes


def live(
    folder: Path,
    source: str,
    name: str,
    *,
    ranks: int = 1,
    env: dict[str, str] | None = None,
    limit_s: float = 120,
    head: str = HEAD,
) -> Lived:
    """Let the program live once, on the run `name` in the folder, to whatever end."""
    processes = born(folder, source, name, ranks=ranks, env=env, head=head)
    until = time.monotonic() + limit_s
    try:
        first = processes[0].wait(limit_s)
        for other in processes[1:]:
            if first == -signal.SIGKILL:
                other.kill()
            other.wait(max(1.0, until - time.monotonic()))
    finally:
        for one in processes:
            one.kill()
    return Lived([one.wait() for one in processes], [one.text for one in processes])


def killed_once(
    folder: Path, source: str, *, die: int = 7, ranks: int = 1, env: dict[str, str] | None = None,
    then: dict[str, str] | None = None, ranks_then: int | None = None, head: str = HEAD,
) -> Outcome:  # fmt: skip
    """The program lived whole, and killed in step `die` and started again, there with the variables
    `then` as well."""
    from library_runs import newest

    from harness.exchange.compare import differences

    whole = live(folder, source, "whole", ranks=ranks, env=env, head=head)
    killed = live(
        folder, source, "killed", ranks=ranks, env=(env or {}) | {"DIE": str(die)}, head=head
    )
    resumed = live(
        folder,
        source,
        "killed",
        ranks=ranks_then or ranks,
        env=(env or {}) | (then or {}),
        head=head,
    )
    rows = (
        list(differences(newest(folder / "whole"), newest(folder / "killed")))
        if whole.code == resumed.code == 0
        else []
    )
    return Outcome(whole, killed, resumed, rows)
