"""Does a step feel that a save is running? Two ranks, many short steps, and much more to save than
they train."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from benchmark.bench import Bench
from benchmark.findings import HARNESS, Finding, percentile

ROW, RANKS = "p99", 2
SAVES = 5  # a process; the first, which allocates, does not count
SPACE = 2  # between two saves lies so much time as torch.save takes, times this
FEW = 200  # steps, of which the slowest of a hundred says little


def measure(bench: Bench) -> list[Finding]:
    pace = bench.sample("p99", "pace", ranks=RANKS, size_mb=bench.size_mb)
    every = max(200, math.ceil(SPACE * pace["save_s"] / pace["step_s"]))
    bench.say(f"short steps take {pace['step_s'] * 1e3:.1f} ms; saving every {every} steps")
    contenders = {HARNESS: "by_harness", "torch.save in a thread": "by_thread"}
    samples = {
        who: partial(bench.sample, "p99", function, ranks=RANKS, size_mb=bench.size_mb, every=every)
        for who, function in contenders.items()
    }
    found = []
    for who, taken in bench.turns(samples).items():
        useful = [sample for sample in taken if sample["steps"] >= SAVES]
        if not useful:
            bench.missing[f"{ROW}, {who}"] = (
                "no step ran while a save was running: it saves in the foreground"
            )
            continue
        fewest = min(sample["steps"] for sample in useful)
        note = f"only {fewest} steps while saving" if fewest < FEW else ""
        ratio = tuple(sample["saving_s"] / sample["usual_s"] for sample in useful)
        what = "p99 step time while a save is running over p99 without"
        found.append(
            Finding(ROW, what, who, "x", ratio, most=1.3 if who == HARNESS else None, note=note)
        )
        longest = tuple(sample["first_s"] * 1e3 for sample in useful)
        found.append(
            Finding(
                ROW,
                "longest step that begins a save (its wait for the copy in it)",
                who,
                "ms",
                longest,
            )
        )
        usual = tuple(sample["usual_s"] * 1e3 for sample in useful)
        found.append(Finding(ROW, "p99 step time without a save", who, "ms", usual))
    return found


# From here on: what runs in a sample's own process.


def _built(size_mb: int) -> tuple[Any, Any, Any, Any]:
    """A small model that is trained, and a large one that has no gradients, and so only state."""
    import torch
    from torch import nn

    from benchmark import ddp

    ddp.join()
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(256, 1024), nn.ReLU(), nn.Linear(1024, 256))
    large = nn.ParameterList(torch.rand(16 * 250_000) for _ in range(max(1, size_mb // 16)))
    wrapped = ddp.wrap(model)
    dataset = torch.utils.data.TensorDataset(torch.rand(4096, 256))
    return (
        wrapped,
        large,
        torch.optim.AdamW([*model.parameters(), *large.parameters()], fused=True),
        dataset,
    )


def _train(model: Any, optimizer: Any, x: Any) -> None:
    optimizer.zero_grad()
    (model(x) - x).square().mean().backward()
    optimizer.step()


BATCH = 64  # a rank


def pace(folder: str, size_mb: int) -> dict[str, float]:
    from benchmark import ddp
    from benchmark.savers import write

    model, large, optimizer, dataset = _built(size_mb)
    x, began_at = dataset.tensors[0][:BATCH], 0.0
    for step in range(150):
        if step == 50:
            began_at = time.perf_counter()
        _train(model, optimizer, x)
    step_s, began_at = (time.perf_counter() - began_at) / 100, time.perf_counter()
    if ddp.rank() == 0:
        write(large.state_dict(), Path(folder, "pace.pt"))
    save_s = time.perf_counter() - began_at
    ddp.leave()
    return {"step_s": step_s, "save_s": save_s}


class Steps:
    """The time of each step, sorted by whether a save was running while it was made.

    The step that begins a save waits for the copy, or makes it: how long training is blocked is
    another row. Of a hundred steps it would be the slowest anyway, and hide what the other
    ninety-nine feel.
    """

    def __init__(self, every: int) -> None:
        self.every = every
        self.saving: list[float] = []
        self.usual: list[float] = []
        self.first: list[float] = []

    def run(self, batches: Iterator[Any], train: Any, is_saving: Any) -> None:
        """`is_saving(step)`: whether the save of that step is still running."""
        last = 0
        for made in range(self.every * (SAVES + 1)):
            if made and made % self.every == 0:
                last = made
            is_beside = is_saving(last)
            began_at = time.perf_counter()
            (x,) = next(batches)
            train(x)
            took_s = time.perf_counter() - began_at
            if last > self.every:
                (self.first if made == last else self.saving if is_beside else self.usual).append(
                    took_s
                )

    def result(self) -> dict[str, Any]:
        saving = self.saving or [0.0]
        return {
            "steps": len(self.saving),
            "saving_s": percentile(saving, 0.99),
            "first_s": max(self.first),
            "usual_s": percentile(self.usual, 0.99) if self.usual else 0.0,
        }


def by_harness(folder: str, size_mb: int, every: int) -> dict[str, Any]:
    import harness

    model, large, optimizer, dataset = _built(size_mb)
    directory = Path(folder, "run")
    run = harness.init(directory, save_every_s=None, save_every_steps=every, keep_last=1)
    run.track(model=model, large=large, optimizer=optimizer)
    batches: Any = run.batches(dataset, RANKS * BATCH, epochs=10**6)
    steps, durable = Steps(every), set()

    def is_saving(step: int) -> bool:
        if step not in durable and (directory / f"checkpoints/step_{step:08d}-0001.json").exists():
            durable.add(step)
        return step not in durable

    steps.run(batches, partial(_train, model, optimizer), is_saving)
    batches.close()
    return steps.result()


def by_thread(folder: str, size_mb: int, every: int) -> dict[str, Any]:
    from benchmark import ddp

    model, large, optimizer, dataset = _built(size_mb)
    threads: list[Any] = []

    def saving(batches: Iterator[Any]) -> Iterator[Any]:
        for made, batch in enumerate(batches):
            if made and made % every == 0 and ddp.rank() == 0:
                payload = {
                    "model": model.module.state_dict(),
                    "large": large.state_dict(),
                    "optimizer": optimizer.state_dict(),
                }
                threads.append(ddp.saver_thread(payload, Path(folder, "checkpoint.pt")))
            yield batch

    steps = Steps(every)
    batches = saving(ddp.batches(dataset, BATCH))
    steps.run(
        batches,
        partial(_train, model, optimizer),
        lambda _: bool(threads) and threads[-1].is_alive(),
    )
    ddp.leave()
    return steps.result()
