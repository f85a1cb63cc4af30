"""Saves of a model that FSDP2 shards over two ranks, beside DCP's ways.

A step is a pause in place of forward and backward, and a real update.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from benchmark.bench import Bench
from benchmark.findings import HARNESS, Finding, ratios

ROW, RANKS = "sharded", 2
SAVES, BETWEEN, PAUSE_S = 5, 10, 0.25  # a process; the first save, which allocates, does not count
SAVE = "dcp.save"
CONTENDERS = {
    HARNESS: "by_harness",
    SAVE: "by_dcp_save",
    "DCP async_save, thread": "by_dcp_thread",
    "DCP async_save, staged in background": "by_dcp_staged",
}
QUANTITIES = {
    "blocked": ("training blocked by a save of a sharded model", "copies"),
    "added": ("time that a save of a sharded model adds to training", "s"),
    "durable": ("time until a sharded checkpoint is durable", "s"),
}


def measure(bench: Bench) -> list[Finding]:
    samples = {
        who: partial(bench.sample, ROW, function, ranks=RANKS, size_mb=bench.size_mb)
        for who, function in CONTENDERS.items()
    }
    taken = bench.turns(samples)
    found = []
    for who, turns in taken.items():
        for name, (what, unit) in QUANTITIES.items():
            most = 0.1 if who == HARNESS and name == "blocked" else None
            values = tuple(sample[name] for sample in turns)
            found.append(Finding(ROW, what, who, unit, values, most=most))
    if len(taken.get(HARNESS, [])) == len(taken.get(SAVE, [])) > 0:
        ours, theirs = ([sample["durable"] for sample in taken[who]] for who in (HARNESS, SAVE))
        what = "durable throughput of a sharded model over that of dcp.save"
        found.append(Finding(ROW, what, HARNESS, "x", ratios(theirs, ours), least=1.3))
    others = [turns for who, turns in taken.items() if who != HARNESS]
    if taken.get(HARNESS) and others:
        best = [min(sample["added"] for sample in turn) for turn in zip(*others, strict=False)]
        ours = [sample["added"] for sample in taken[HARNESS]][: len(best)]
        what = "time that a save of a sharded model adds, over the best of DCP"
        found.append(Finding(ROW, what, HARNESS, "x", ratios(ours, best), most=0.5))
    return found


# From here on: what runs in a sample's own process.


class Steps:
    """How long the parts of each step took: what comes before it, and the update."""

    def __init__(self) -> None:
        self.before_s: list[float] = []
        self.update_s: list[float] = []
        self.whole_s: list[float] = []
        self.durable_s: dict[int, float] = {}  # by the number of the save

    def result(self, copy_s: float) -> dict[str, float]:
        """The medians of the saves but the first, on the slower rank."""
        import torch
        import torch.distributed as dist

        saves = [number * BETWEEN for number in range(2, SAVES + 1)]
        plain = [at for at in range(BETWEEN + 2, len(self.whole_s)) if at % BETWEEN > BETWEEN // 2]

        def usual(values: list[float]) -> float:
            return median(values[at] for at in plain)

        blocked = [
            self.before_s[at] + self.update_s[at] - usual(self.before_s) - usual(self.update_s)
            for at in saves
        ]
        added = [
            sum(self.whole_s[at : at + BETWEEN // 2]) - BETWEEN // 2 * usual(self.whole_s)
            for at in saves
        ]
        durable = [seconds for number, seconds in self.durable_s.items() if number > 1]
        values = [median(blocked) / copy_s, median(added), median(durable) if durable else 0.0]
        slower = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(slower, op=dist.ReduceOp.MAX)
        return dict(zip(("blocked", "added", "durable"), slower.tolist(), strict=True))


def _built(size_mb: int) -> tuple[Any, float]:
    import torch
    from torch.distributed.fsdp import fully_shard

    from benchmark import ddp, workload

    ddp.join()
    model = workload.Gpt(size_mb)
    for block in model.blocks:
        fully_shard(block)
    fully_shard(model)
    made = workload.build(16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    work = workload.Workload(model, optimizer, made.dataset)
    work.settle()
    held: list[Any] = list(workload.tensors(work.payload()))
    parts = [tensor.to_local() for tensor in held if hasattr(tensor, "to_local")]
    copy_s = workload.copy_s(parts)
    ddp.meet()
    return work, copy_s


def _run(work: Any, steps: Steps, begins: Iterator[Any]) -> None:
    """Make steps as long as there are some; each begins by taking an item."""
    gradients = [parameter.grad for parameter in work.model.parameters()]
    while True:
        began_at = time.perf_counter()
        if next(begins, None) is None:
            return
        ready_at = time.perf_counter()
        time.sleep(PAUSE_S)
        for parameter, gradient in zip(work.model.parameters(), gradients, strict=True):
            parameter.grad = gradient
        computed_at = time.perf_counter()
        work.optimizer.step()
        work.optimizer.zero_grad()
        updated_at = time.perf_counter()
        steps.before_s.append(ready_at - began_at)
        steps.update_s.append(updated_at - computed_at)
        steps.whole_s.append(updated_at - began_at)


def by_harness(folder: str, size_mb: int) -> dict[str, float]:
    import harness

    work, copy_s = _built(size_mb)
    directory = Path(folder, "run")
    run = harness.init(directory, save_every_s=None, save_every_steps=BETWEEN, keep_last=1)
    run.track(model=work.model, optimizer=work.optimizer)
    batches: Any = run.batches(
        work.dataset, RANKS, epochs=1000, max_steps=(SAVES + 1) * BETWEEN + 1
    )
    steps = Steps()
    _run(work, steps, iter(batches))
    lines = (directory / "events/0001.jsonl").read_text().splitlines()
    saved = [event for event in map(json.loads, lines) if event["event"] == "saved"]
    steps.durable_s = {number + 1: event["seconds"] for number, event in enumerate(saved[:SAVES])}
    return steps.result(copy_s)


def _by_dcp(folder: str, size_mb: int, start: Callable[[Any, Path], Any]) -> dict[str, float]:
    from benchmark import ddp

    work, copy_s = _built(size_mb)
    steps = Steps()
    waiting: list[threading.Thread] = []

    def begins() -> Iterator[int]:
        staged: Any = None
        for made in range((SAVES + 1) * BETWEEN):
            if made and made % BETWEEN == 0 and made // BETWEEN <= SAVES:
                for thread in waiting:
                    thread.join()
                number, began_at = made // BETWEEN, time.perf_counter()
                pending = start(work, Path(folder, str(number)))
                staged, arguments = pending.staged, (pending, steps, number, began_at)
                waiting[:] = [threading.Thread(target=_await, args=arguments)]
                waiting[0].start()
            if staged is not None:  # the state must not change before
                staged()
                staged = None
            yield made + 1

    _run(work, steps, begins())
    for thread in waiting:
        thread.join()
    result = steps.result(copy_s)
    ddp.leave()
    return result


def _await(pending: Any, steps: Steps, number: int, began_at: float) -> None:
    pending.durable()
    steps.durable_s[number] = time.perf_counter() - began_at


def by_dcp_save(folder: str, size_mb: int) -> dict[str, float]:
    from torch.distributed.checkpoint.state_dict_saver import save

    from benchmark.savers import Pending

    def start(work: Any, path: Path) -> Pending:
        save(work.payload(), checkpoint_id=path)
        return Pending()

    return _by_dcp(folder, size_mb, start)


def _asynchronous(folder: str, size_mb: int, *, background: bool) -> dict[str, float]:
    from benchmark import savers

    kept: list[Any] = []

    def start(work: Any, path: Path) -> Any:
        if not kept:
            kept.append((savers.dcp_staged if background else savers.dcp_thread)(work))
        return kept[0](path)

    return _by_dcp(folder, size_mb, start)


def by_dcp_thread(folder: str, size_mb: int) -> dict[str, float]:
    return _asynchronous(folder, size_mb, background=False)


def by_dcp_staged(folder: str, size_mb: int) -> dict[str, float]:
    return _asynchronous(folder, size_mb, background=True)
