"""How much longer training takes for each save: two ranks, and between two saves as many steps
beside the saving as after it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from benchmark.bench import Bench
from benchmark.findings import HARNESS, Finding

ROW, RANKS = "total", 2
SAVES = 4  # a process; the first, which allocates, does not count
SPACE = 5  # so much time as torch.save takes, times this, is given to a save


def measure(bench: Bench) -> list[Finding]:
    pace = bench.sample("blocked", "pace", ranks=RANKS, size_mb=bench.size_mb)
    within = max(3, math.ceil(SPACE * pace["save_s"] / pace["step_s"]))
    bench.say(f"two ranks: a step takes {pace['step_s']:.2f} s; saving every {2 * within} steps")
    contenders = {HARNESS: "by_harness", "torch.save in a thread": "by_thread"}
    samples = {
        who: partial(
            bench.sample, "total", function, ranks=RANKS, size_mb=bench.size_mb, within=within
        )
        for who, function in contenders.items()
    }
    found = []
    for who, taken in bench.turns(samples, math.ceil(bench.repeats / (SAVES - 1))).items():
        added = tuple(
            seconds / sample["copy_s"] for sample in taken for seconds in sample["added_s"]
        )
        late = sum(sample["late"] for sample in taken)
        note = (
            f"{late} saves of {len(added)} took longer than the {within} steps given to them"
            if late
            else ""
        )
        most = 5.0 if who == HARNESS else None
        found.append(
            Finding(
                ROW,
                "time that a save adds to training, 2 ranks",
                who,
                "copies",
                added,
                most=most,
                note=note,
            )
        )
    return found


# From here on: what runs in a sample's own process.


class Segments:
    """When each step began, and whether a save was over after the steps given to it."""

    def __init__(self, within: int, is_durable: Callable[[int], bool]) -> None:
        self.within, self.is_durable = within, is_durable
        self.began_at: list[float] = []
        self.late = 0

    @property
    def over(self) -> bool:
        return len(self.began_at) > 2 * self.within * (SAVES + 1)

    def begin(self) -> None:
        """Before what ends one step and begins the next: at the index of the steps made."""
        made = len(self.began_at)
        self.began_at.append(time.perf_counter())
        if made > 3 * self.within and made % (2 * self.within) == self.within:
            self.late += not self.is_durable(made - self.within)

    def added_s(self) -> list[float]:
        """By each save but the first: the steps beside it took so much longer than as many after
        it."""
        at = self.began_at
        starts = [2 * self.within * number for number in range(2, SAVES + 1)]
        return [
            2 * at[start + self.within] - at[start] - at[start + 2 * self.within]
            for start in starts
        ]


def _built(size_mb: int) -> tuple[Any, float]:
    from benchmark import ddp, workload

    ddp.join()
    work = workload.build(size_mb)
    work = workload.Workload(ddp.wrap(work.model), work.optimizer, work.dataset)
    work.settle()
    copy_s = workload.copy_s(work.payload()) if ddp.rank() == 0 else 0.0
    ddp.meet()
    return work, copy_s


def _result(segments: Segments, copy_s: float) -> dict[str, Any]:
    return {"copy_s": copy_s, "added_s": segments.added_s(), "late": segments.late}


def by_harness(folder: str, size_mb: int, within: int) -> dict[str, Any]:
    import harness

    work, copy_s = _built(size_mb)
    directory = Path(folder, "run")
    run = harness.init(directory, save_every_s=None, save_every_steps=2 * within, keep_last=1)
    run.track(model=work.model, optimizer=work.optimizer)
    segments = Segments(
        within, lambda step: (directory / f"checkpoints/step_{step:08d}-0001.json").exists()
    )
    batches: Any = run.batches(work.dataset, RANKS, epochs=1000)
    while not segments.over:
        segments.begin()
        (tokens,) = next(batches)
        work.forward_backward(tokens)
        work.optimizer.step()
    batches.close()
    return _result(segments, copy_s)


def by_thread(folder: str, size_mb: int, within: int) -> dict[str, Any]:
    from benchmark import ddp

    work, copy_s = _built(size_mb)
    threads: dict[int, Any] = {}
    segments = Segments(within, lambda step: ddp.rank() > 0 or not threads[step].is_alive())
    for made, (tokens,) in enumerate(ddp.batches(work.dataset, 1)):
        segments.begin()
        if segments.over:
            break
        if made and made % (2 * within) == 0 and ddp.rank() == 0:
            threads[made] = ddp.saver_thread(
                {"model": work.model.module.state_dict(), "optimizer": work.optimizer.state_dict()},
                Path(folder, "checkpoint.pt"),
            )
        work.forward_backward(tokens)
        work.optimizer.step()
    ddp.leave()
    return _result(segments, copy_s)
