"""A script that torchrun starts again: `python -m benchmark.lives WHO FOLDER SIZE_MB`. It reports
when it reaches what."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

SAVE_EVERY = 10


def report(stage: str) -> None:
    """Add a line to this rank's file."""
    rank = int(os.environ["RANK"])
    line = json.dumps({"stage": stage, "at": time.monotonic(), "rank": rank, "pid": os.getpid()})
    with Path(sys.argv[2], f"stages-{rank}.jsonl").open("a") as file:
        file.write(line + "\n")


def train(work: Any, tokens: Any) -> None:
    work.forward_backward(tokens)
    work.optimizer.step()
    report("stepped")
    time.sleep(0.02)  # so that a save that comes every few steps is over at times


def by_hand(folder: Path, size_mb: int) -> None:
    """What a careful person writes: a save made durable and renamed, and at the start a load of
    what is there."""
    import torch

    from benchmark import ddp, workload
    from benchmark.savers import write

    report("imported")
    ddp.join()
    report("joined")
    work, path, step = workload.build(size_mb), folder / "checkpoint.pt", 0
    model = work.model
    work = workload.Workload(ddp.wrap(model), work.optimizer, work.dataset)
    if path.exists():
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        model.load_state_dict(checkpoint["model_state_dict"])
        work.optimizer.load_state_dict(checkpoint["optimizer_state_dict"])
        step = checkpoint["step"]
    report("restored")
    for (tokens,) in ddp.batches(work.dataset, 1):
        train(work, tokens)
        step += 1
        if step % SAVE_EVERY == 0 and ddp.rank() == 0:
            write(
                {
                    "model_state_dict": model.state_dict(),
                    "optimizer_state_dict": work.optimizer.state_dict(),
                    "step": step,
                },
                path,
            )


def by_harness(folder: Path, size_mb: int) -> None:
    import torch  # noqa: F401  as a script that trains does

    import harness
    from benchmark import ddp, workload

    harness.init  # noqa: B018  imports what it is in
    report("imported")
    run = harness.init(folder / "run", save_every_s=None, save_every_steps=SAVE_EVERY)
    report("joined")  # and the checkpoint is found, verified and read
    work = workload.build(size_mb)
    work = workload.Workload(ddp.wrap(work.model), work.optimizer, work.dataset)
    run.track(model=work.model, optimizer=work.optimizer)
    report("restored")
    for (tokens,) in run.batches(work.dataset, run.world_size, epochs=1000):
        train(work, tokens)


def main() -> None:
    report("started")
    who, folder, size_mb = sys.argv[1:]
    (by_harness if who == "harness" else by_hand)(Path(folder), int(size_mb))


if __name__ == "__main__":
    main()
