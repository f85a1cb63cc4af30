"""A model on a GPU, and a save due after every step: the next begins as soon as the last is
durable."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from benchmark.bench import Bench
from benchmark.findings import HARNESS, Finding

ROW = "gpu"
SEQUENCES = 64  # a step
PLAIN_STEPS = 20
WARM_SAVES, SAVES = 2, 4  # a process; the first ones, which allocate, do not count
PEERS = (
    "torch.save + fsync + rename",
    "DCP async_save, thread",
    "DCP async_save, staged in background",
)


def measure(bench: Bench) -> list[Finding]:
    name = bench.sample("gpu", "name")
    if not name:
        bench.missing["saves of a model on a GPU"] = "there is no GPU here"
        return []
    samples = {HARNESS: partial(bench.sample, "gpu", "by_harness", size_mb=bench.size_mb)}
    samples |= {
        who: partial(bench.sample, "gpu", "by_peer", who=who, size_mb=bench.size_mb)
        for who in PEERS
    }
    found = []
    for who, taken in bench.turns(samples).items():
        for what, unit, value in QUANTITIES:
            if taken and (who == HARNESS or "events" not in what):
                found.append(
                    Finding(
                        ROW,
                        what,
                        who,
                        unit,
                        tuple(map(value, taken)),
                        note=name if value is _added_steps else "",
                    )
                )
    return found


def _added_steps(sample: dict[str, Any]) -> float:
    return float(
        (sample["beside_s"] - sample["step_s"])
        * sample["steps"]
        / sample["saves"]
        / sample["step_s"]
    )


QUANTITIES: tuple[tuple[str, str, Callable[[dict[str, Any]], float]], ...] = (
    ("time that a save adds to training on a GPU", "steps", _added_steps),
    (
        "step time while saves follow one another, over that without",
        "x",
        lambda sample: sample["beside_s"] / sample["step_s"],
    ),
    ("steps from one save to the next", "steps", lambda sample: sample["steps"] / sample["saves"]),
    ("a step without saves", "s", lambda sample: sample["step_s"]),
    (
        "training blocked by a save, as the run's events say",
        "steps",
        lambda sample: sample["blocked_s"] / sample["step_s"],
    ),
    (
        "a copy out of the GPU's memory, as the run's events say",
        "s",
        lambda sample: sample["copy_s"],
    ),
)


# From here on: what runs in a sample's own process.


def name(folder: str) -> str:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else ""


def _built(size_mb: int) -> tuple[Any, Iterator[Any], float]:
    """The work on the GPU, its batches there, and how long a step takes that nobody saves."""
    import torch

    from benchmark import workload

    work = workload.build(size_mb, "cuda")

    def batches() -> Iterator[Any]:
        while True:
            for tokens in work.dataset.tensors[0].split(SEQUENCES):
                yield tokens.pin_memory().to("cuda", non_blocking=True)

    steps, took_s = batches(), 0.0
    for count in (3, PLAIN_STEPS):  # the first are slow
        torch.cuda.synchronize()
        began_at = time.perf_counter()
        for _ in range(count):
            work.forward_backward(next(steps))
            work.optimizer.step()
        torch.cuda.synchronize()
        took_s = (time.perf_counter() - began_at) / count
    return work, steps, took_s


def _timed(step: Callable[[], None], saves: Callable[[], int]) -> dict[str, float]:
    """Make steps until so many saves are durable; what they took from the first that counts to the
    last."""
    import torch

    def until(count: int) -> int:
        steps = 0
        while saves() < count:
            step()
            steps += 1
        torch.cuda.synchronize()
        return steps

    until(WARM_SAVES)
    began_at, before = time.perf_counter(), saves()
    steps = until(before + SAVES)
    return {
        "beside_s": (time.perf_counter() - began_at) / steps,
        "steps": steps,
        "saves": saves() - before,
    }


def by_harness(folder: str, size_mb: int) -> dict[str, float]:
    import json

    import harness

    work, _, step_s = _built(size_mb)
    directory = Path(folder, "run")
    run = harness.init(directory, save_every_s=1e-6, when_busy="skip", keep_last=1)
    run.track(model=work.model, optimizer=work.optimizer)
    batches: Any = run.batches(work.dataset, SEQUENCES, epochs=1000)
    told = directory / "events/0001.jsonl"

    def step() -> None:
        (tokens,) = next(batches)
        work.forward_backward(tokens)
        work.optimizer.step()

    def saved() -> list[bytes]:
        return (
            [line for line in told.read_bytes().splitlines() if b'"saved"' in line]
            if told.exists()
            else []
        )

    taken = _timed(step, lambda: len(saved()))
    of_each = [json.loads(line) for line in saved()[WARM_SAVES:]]
    batches.close()
    means = {
        name: sum(event[name] for event in of_each) / len(of_each)
        for name in ("blocked_s", "copy_s")
    }
    return {"step_s": step_s} | means | taken


def by_peer(folder: str, who: str, size_mb: int) -> dict[str, float]:
    from benchmark import disk
    from benchmark.savers import SAVERS

    work, steps, step_s = _built(size_mb)
    start, made, going = SAVERS[who](work), 0, threading.Thread()
    durable: list[Path] = []
    errors: list[Exception] = []

    def finish(pending: Any, path: Path) -> None:
        try:
            pending.durable()
        except Exception as error:  # noqa: BLE001
            # of whatever kind it is, by whomever: the loop raises it
            errors.append(error)
            return
        durable.append(path)
        for old in durable[-2:-1]:
            disk.remove(old)

    def step() -> None:
        nonlocal made, going
        pending = None
        if errors:
            raise errors[0]
        if not going.is_alive():
            made += 1
            path = Path(folder, f"checkpoint-{made}")
            path.mkdir()
            pending = start(path)
            going = threading.Thread(target=finish, args=(pending, path))
            going.start()
        work.forward_backward(next(steps))
        if pending is not None and pending.staged is not None:
            pending.staged()
        work.optimizer.step()

    taken = _timed(step, lambda: len(durable))
    going.join()
    return {"step_s": step_s} | taken
