"""One process saves, on an idle machine: how long training would be blocked, how soon it is
durable, CPU time and memory.

The harness is measured as a loop that waits, after the boundary that saves, until the manifest is
there.
"""

from __future__ import annotations

import os
import time
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from benchmark import disk, sampling
from benchmark.bench import Bench
from benchmark.findings import DISK, HARNESS, Finding, ratios

ROW = "saves"
SAVES = 3  # a process; the first, which allocates, is told but does not count
MIB = 1 << 20


def measure(bench: Bench) -> list[Finding]:
    from benchmark.savers import BASELINE, SAVERS

    size_bytes = bench.sample("saves", "size", size_mb=bench.size_mb)
    taken = bench.turns(
        {
            DISK: partial(bench.sample, "disk", "ceiling", size_bytes=size_bytes),
            HARNESS: partial(bench.sample, "saves", "by_harness", size_mb=bench.size_mb),
            **{
                name: partial(bench.sample, "saves", "by_peer", name=name, size_mb=bench.size_mb)
                for name in SAVERS
            },
        }
    )
    rates, found = _disk(taken.pop(DISK, []), size_bytes)
    for who, samples in taken.items():
        found += _of_one(who, samples, rates, taken.get(BASELINE, []))
    return found


def _disk(samples: list[dict[str, float]], size_bytes: int) -> tuple[list[float], list[Finding]]:
    """What the disk can do, turn by turn, by whichever way is the fastest over all turns: the best
    of each turn would be luck."""
    if not samples:
        return [], []
    way = min(samples[0], key=lambda way: median(turn[way] for turn in samples))
    rates = [size_bytes / MIB / turn[way] for turn in samples]
    return rates, [
        Finding(
            ROW, "durable throughput", DISK, "MiB/s", tuple(rates), more_is_better=True, note=way
        )
    ]


def _of_one(
    who: str, samples: list[dict[str, Any]], rates: list[float], baseline: list[dict[str, Any]]
) -> list[Finding]:
    ours = who == HARNESS
    throughput = [turn["size_bytes"] / MIB / turn["durable_s"] for turn in samples]
    found = [
        Finding(ROW, "durable throughput", who, "MiB/s", tuple(throughput), more_is_better=True),
        Finding(ROW, "CPU time of a save", who, "s", tuple(turn["cpu_s"] for turn in samples)),
        Finding(
            ROW,
            "extra memory of a save",
            who,
            "x state",
            tuple(turn["extra_bytes"] / turn["state_bytes"] for turn in samples),
            most=1.05 + 64 * MIB / samples[0]["state_bytes"] if ours else None,
            note="1.05 x state + 64 MiB" if ours else "",
        ),
    ]
    if not ours:
        found.append(
            Finding(
                ROW,
                "training blocked by a save",
                who,
                "copies",
                ratios(*_columns(samples, "blocked_s", "copy_s")),
            )
        )
    if rates:
        share = ratios(throughput, rates)
        found.append(
            Finding(
                ROW,
                "durable throughput over the disk's",
                who,
                "x",
                share,
                least=0.95 if ours else None,
                more_is_better=True,
            )
        )
    if baseline:
        per_byte = ratios(
            *(
                [turn["cpu_s"] / turn["size_bytes"] for turn in turns]
                for turns in (samples, baseline)
            )
        )
        found.append(
            Finding(
                ROW,
                "CPU time a byte over torch.save's",
                who,
                "x",
                per_byte,
                most=0.8 if ours else None,
            )
        )
    return found


def _columns(samples: list[dict[str, Any]], *names: str) -> list[list[float]]:
    return [[turn[name] for turn in samples] for name in names]


# From here on: what runs in a sample's own process.


def size(folder: str, size_mb: int) -> int:
    """How many bytes the state has."""
    return _state_bytes(_built(size_mb))


def _built(size_mb: int) -> Any:
    from benchmark import workload

    work = workload.build(size_mb)
    work.settle()
    return work


def _state_bytes(work: Any) -> int:
    from benchmark.workload import tensors

    return sum(tensor.nbytes for tensor in tensors(work.payload()))


def by_peer(folder: str, name: str, size_mb: int) -> dict[str, Any]:
    """What a save by one of the others costs."""
    from benchmark.savers import SAVERS
    from benchmark.workload import copy_s

    work = _built(size_mb)
    unit_s = copy_s(work.payload())
    start, base = SAVERS[name](work), sampling.memory_bytes()
    saves, path = [], Path(folder, "checkpoints")
    for _ in range(SAVES):
        saves.append(_timed(start, path))
    blocked = (
        [_overlapped(start, path, work) for _ in range(SAVES - 1)]
        if saves[0]["is_staged"]
        else [s["blocked_s"] for s in saves[1:]]
    )
    path.mkdir()
    with sampling.Peak() as peak:
        start(path).durable()
    told = {
        "copy_s": unit_s,
        "state_bytes": _state_bytes(work),
        "extra_bytes": peak.most_bytes - base,
        "first": saves[0],
    }
    return told | _medians(saves[1:]) | {"blocked_s": median(blocked)}


def _timed(start: Any, path: Path) -> dict[str, Any]:
    path.mkdir()
    before_s, began_at = sampling.cpu_s(), time.perf_counter()
    pending = start(path)
    went_on_at = time.perf_counter()
    pending.durable()
    durable_at, after_s = time.perf_counter(), sampling.cpu_s()
    size_bytes = disk.size_bytes(path)
    disk.remove(path)
    return {
        "blocked_s": went_on_at - began_at,
        "durable_s": durable_at - began_at,
        "cpu_s": after_s - before_s,
        "size_bytes": size_bytes,
        "is_staged": pending.staged is not None,
    }


def _overlapped(start: Any, path: Path, work: Any) -> float:
    """How long training is blocked by somebody who copies while the next step is computed: at
    first, and before the update."""
    path.mkdir()
    tokens = work.dataset.tensors[0][:1]
    began_at = time.perf_counter()
    pending = start(path)
    went_on_at = time.perf_counter()
    work.forward_backward(tokens)
    ready_at = time.perf_counter()
    pending.staged()
    updating_at = time.perf_counter()
    pending.durable()
    disk.remove(path)
    return (went_on_at - began_at) + (updating_at - ready_at)


def _medians(saves: list[dict[str, Any]]) -> dict[str, Any]:
    return {name: median(save[name] for save in saves) for name in saves[0] if name != "is_staged"}


def by_harness(folder: str, size_mb: int) -> dict[str, Any]:
    """What a save by the harness costs while its loop waits."""
    import harness

    directory = Path(folder, "run")
    run = harness.init(directory, save_every_s=None, save_every_steps=2, keep_last=1)
    work = _built(size_mb)
    small = work.track(run)
    batches: Any = run.batches(work.dataset, 1, epochs=100)
    (tokens,) = next(batches)
    work.forward_backward(tokens)
    work.optimizer.step()
    base, saves, peak = sampling.memory_bytes(), [], sampling.Peak()
    for number in range(1, SAVES + 2):
        (tokens,) = next(batches)
        work.forward_backward(tokens)
        work.optimizer.step()
        if number <= SAVES:
            saves.append(_boundary(batches, small, directory, 2 * number))
        else:
            with peak:
                _boundary(batches, small, directory, 2 * number)
    told = {
        "state_bytes": _state_bytes(work),
        "extra_bytes": peak.most_bytes - base,
        "first": saves[0],
    }
    batches.close()
    return told | _medians(saves[1:])


def _boundary(batches: Any, small: Any, directory: Path, step: int) -> dict[str, Any]:
    """The boundary at which a step is saved, an update that costs nothing, and the wait until it is
    durable."""
    manifest = directory / f"checkpoints/step_{step:08d}-0001.json"
    os.sync()
    before_s, began_at = sampling.cpu_s(), time.time()
    next(batches)
    # until the next update a checkpoint is not committed: something may still write into the state
    small.step()
    before_waiting_s = time.thread_time()
    while not manifest.exists():
        time.sleep(0.005)
    waiting_s = time.thread_time() - before_waiting_s  # is not the save's
    after_s = sampling.cpu_s()
    time.sleep(0.5)  # what was replaced is deleted meanwhile
    # of its last link or rename; next() may return long after it
    durable_at = manifest.stat().st_ctime
    return {
        "durable_s": durable_at - began_at, "cpu_s": after_s - before_s - waiting_s,
        "size_bytes": manifest.with_suffix(".pt").stat().st_size,
    }  # fmt: skip
