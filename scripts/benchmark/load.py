"""Loading a checkpoint, verified, beside `torch.load` of the same file, which verifies nothing."""

from __future__ import annotations

import os
import time
from functools import partial
from pathlib import Path
from typing import Any

from benchmark import disk, sampling
from benchmark.bench import Bench
from benchmark.findings import HARNESS, Finding, ratios

ROW, TORCH = "load", "torch.load, unverified"
AT_START = "harness, at a start"
LIMITS = {"cold": 1.1, "warm": 1.5}


def measure(bench: Bench) -> list[Finding]:
    place = bench.scratch / "kept"  # outlives the samples' own folders
    run = str(place / "run")
    bench.sample("load", "make", size_mb=bench.size_mb, run=run)
    functions = {TORCH: "by_torch", HARNESS: "by_harness", AT_START: "at_start"}
    samples = {
        f"{who}: {state}": partial(bench.sample, "load", function, run=run, state=state)
        for state in ("cold", "warm", "memory") for who, function in functions.items()
    }  # fmt: skip
    taken = bench.turns(samples)
    disk.remove(place)
    found = []
    for who in functions:
        for state in LIMITS:
            found += _times(taken, who, state)
        extra = tuple(
            sample["extra_bytes"] / sample["size_bytes"]
            for sample in taken.get(f"{who}: memory", [])
        )
        if extra:
            most = None if who == TORCH else 1.1
            found.append(
                Finding(
                    ROW,
                    f"extra memory of a {_called(who)}",
                    _whose(who),
                    "x state",
                    extra,
                    most=most,
                )
            )
    return found


def _called(who: str) -> str:
    """A start searches the run before it loads."""
    return "search and load" if who == AT_START else "load"


def _whose(who: str) -> str:
    return HARNESS if who == AT_START else who


def _times(taken: dict[str, list[Any]], who: str, state: str) -> list[Finding]:
    ours, theirs = taken.get(f"{who}: {state}"), taken.get(f"{TORCH}: {state}")
    if not ours:
        return []
    what, whose = _called(who), _whose(who)
    found = [
        Finding(ROW, f"{what}, {state}", whose, "s", tuple(sample["load_s"] for sample in ours))
    ]
    if who != TORCH and theirs:
        for more, name, most in (
            ("", "load_s", LIMITS[state]),
            (" and copy into what is there", "used_s", None),
        ):
            ratio = ratios([sample[name] for sample in ours], [sample[name] for sample in theirs])
            found.append(
                Finding(
                    ROW, f"{what}{more}, {state}, over torch.load", whose, "x", ratio, most=most
                )
            )
    return found


# From here on: what runs in a sample's own process.


def make(folder: str, size_mb: int, run: str) -> None:
    """A run with one checkpoint."""
    import harness
    from benchmark import workload

    work = workload.build(size_mb)
    made = harness.init(run, save_every_s=None)
    made.track(model=work.model, optimizer=work.optimizer)
    for (tokens,) in made.batches(work.dataset, 1, epochs=1, max_steps=1):
        work.forward_backward(tokens)
        work.optimizer.step()


def _measured(run: str, state: str, load: Any) -> dict[str, float]:
    from benchmark.workload import tensors

    (path,) = Path(run, "checkpoints").glob("*.pt")
    disk.warm(path)
    if state == "memory":
        base = sampling.memory_bytes()
        with sampling.Peak() as peak:
            payload = load(path)
            for tensor in tensors(payload):
                tensor.sum()  # what nobody has touched counts as nobody's
        return {
            "extra_bytes": peak.most_bytes - base,
            "size_bytes": sum(tensor.nbytes for tensor in tensors(payload)),
        }
    # what is there; and whatever is imported late is imported
    copies = [tensor.clone() for tensor in tensors(load(path))]
    os.sync()
    if state == "cold":
        disk.chill(path)
    began_at = time.perf_counter()
    payload = load(path)
    loaded_at = time.perf_counter()
    for copy, tensor in zip(copies, tensors(payload), strict=True):
        copy.copy_(tensor)
    return {"load_s": loaded_at - began_at, "used_s": time.perf_counter() - began_at}


def by_torch(folder: str, run: str, state: str) -> dict[str, float]:
    import torch

    return _measured(
        run, state, lambda path: torch.load(path, map_location="cpu", weights_only=True)
    )


def by_harness(folder: str, run: str, state: str) -> dict[str, float]:
    from harness.checkpoint import load
    from harness.supervision import run_address

    return _measured(run, state, lambda path: load.load(*run_address.checkpoint(str(path))))


def at_start(folder: str, run: str, state: str) -> dict[str, float]:
    """The search among all checkpoints of the run is in it."""
    from harness.checkpoint import resume
    from harness.distributed import join
    from harness.store import open_store

    world, store = join.join(60.0), open_store(run, 30.0)
    measured = _measured(run, state, lambda path: resume.choose(store, world).payload)
    world.leave()
    return measured
