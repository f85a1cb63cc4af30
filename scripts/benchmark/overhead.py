"""What a loop costs a step beside the same DDP loop by hand: a model so small that little else is
left."""

from __future__ import annotations

import itertools
import resource
import time
from functools import partial
from pathlib import Path
from typing import Any

from benchmark.bench import Bench
from benchmark.findings import HARNESS, Finding

ROW, HAND = "overhead", "DDP by hand"
WARM, STEPS, BATCH = 300, 3000, 16
CONTENDERS = {
    HAND: "by_hand",
    HARNESS: "by_harness",
    "Lightning Fabric": "by_fabric",
    "Lightning Trainer": "by_trainer",
}


def measure(bench: Bench) -> list[Finding]:
    samples = {
        f"{who}, {ranks} rank{'s' * (ranks > 1)}": partial(
            bench.sample,
            "overhead",
            function,
            ranks=ranks,
            environment={"OMP_NUM_THREADS": "1"},
            size=ranks,
        )
        for ranks in (1, 2)
        for who, function in CONTENDERS.items()
    }
    taken = bench.turns(samples)
    found = []
    for ranks in (1, 2):
        of_ranks = f"{ranks} rank{'s' * (ranks > 1)}"
        by_hand = taken.get(f"{HAND}, {of_ranks}", [])
        for who in CONTENDERS:
            steps = taken.get(f"{who}, {of_ranks}", [])
            for what, key in (
                ("a step", "wall_us"),
                ("Python and library code in a step, without the kernel's", "user_us"),
            ):
                if steps:
                    found.append(
                        Finding(
                            ROW,
                            f"{what}, {of_ranks}",
                            who,
                            "us",
                            tuple(step[key] for step in steps),
                        )
                    )
                if who != HAND and steps and by_hand:
                    over = tuple(
                        ours[key] - theirs[key] for ours, theirs in zip(steps, by_hand, strict=True)
                    )
                    most = 50.0 if who == HARNESS and key == "wall_us" else None
                    name = "overhead a step" if key == "wall_us" else "user time a step"
                    found.append(
                        Finding(
                            ROW, f"{name} over DDP by hand, {of_ranks}", who, "us", over, most=most
                        )
                    )
    return found


# From here on: what runs in a sample's own process.


class Counter:
    """Tells, by a call a step, how long a step takes: the mean of a hundred, with all that is not
    done in each.

    Of thirty hundreds the third quickest counts: whatever else the machine does makes some of them
    longer, and none shorter. Where there are as many ranks as cores, the kernel's way of moving
    their threads about makes steps half as long again in some processes, of whoever, and not in
    others; the time spent outside of the kernel does not know of that.
    """

    def __init__(self) -> None:
        self.calls = 0
        self.hundreds: list[float] = []
        self.user_s = 0.0

    def is_over(self) -> bool:
        self.calls += 1
        if self.calls >= WARM and self.calls % 100 == 0:
            self.hundreds.append(time.perf_counter())
            self.user_s = self.user_s or _user_s()
        return self.calls >= WARM + STEPS

    def result(self) -> dict[str, float]:
        wall_s = (
            sorted(after - before for before, after in itertools.pairwise(self.hundreds))[2] / 100
        )
        return {
            "wall_us": wall_s * 1e6,
            "user_us": (_user_s() - self.user_s) / (self.calls - WARM) * 1e6,
        }


def _user_s() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_utime


def _parts() -> tuple[Any, Any]:
    import torch
    from torch import nn

    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 10))
    return model, torch.utils.data.TensorDataset(
        torch.rand(16_000, 32), torch.randint(10, (16_000,))
    )


def _optimizer(model: Any) -> Any:
    import torch

    return torch.optim.SGD(model.parameters(), lr=0.01)


def by_hand(folder: str, size: int) -> dict[str, float]:
    from torch.nn.functional import cross_entropy

    from benchmark import ddp

    ddp.join()
    model, dataset = _parts()
    model, counter = ddp.wrap(model), Counter()
    optimizer = _optimizer(model)
    for x, y in ddp.batches(dataset, BATCH):
        loss = cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if counter.is_over():
            break
    ddp.leave()
    return counter.result()


def by_harness(folder: str, size: int) -> dict[str, float]:
    """As the README's loop, `log` included."""
    from torch.nn.functional import cross_entropy

    import harness
    from benchmark import ddp

    run = harness.init(Path(folder, "run"))
    model, dataset = _parts()
    ddp.join()
    model, counter = ddp.wrap(model), Counter()
    optimizer = _optimizer(model)
    run.track(model=model, optimizer=optimizer)
    for x, y in run.batches(dataset, BATCH * size, epochs=100):
        loss = cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        run.log(loss=loss)
        if counter.is_over():
            break
    return counter.result()


def by_fabric(folder: str, size: int) -> dict[str, float]:
    from lightning.fabric import Fabric
    from torch.nn.functional import cross_entropy
    from torch.utils.data import DataLoader

    fabric = Fabric(accelerator="cpu", devices=size, strategy="ddp")
    fabric.launch()
    model, dataset = _parts()
    model, optimizer = fabric.setup(model, _optimizer(model))
    loader: Any = fabric.setup_dataloaders(DataLoader(dataset, BATCH, shuffle=True, drop_last=True))
    counter = Counter()
    for _ in itertools.count():  # it sets the sampler's epoch itself
        for x, y in loader:
            loss = cross_entropy(model(x), y)
            optimizer.zero_grad()
            fabric.backward(loss)
            optimizer.step()
            if counter.is_over():
                return counter.result()
    raise AssertionError("unreachable")


def by_trainer(folder: str, size: int) -> dict[str, float]:
    """With nothing switched on that can be switched off: no logger, no progress bar, no
    checkpoints."""
    import lightning
    from torch.nn.functional import cross_entropy
    from torch.utils.data import DataLoader

    counter = Counter()

    class Module(lightning.LightningModule):
        def __init__(self, model: Any) -> None:
            super().__init__()
            self.model = model

        def training_step(self, batch: Any, number: int) -> Any:
            counter.is_over()
            return cross_entropy(self.model(batch[0]), batch[1])

        def configure_optimizers(self) -> Any:
            return _optimizer(self.model)

    model, dataset = _parts()
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=size,
        strategy="ddp",
        max_steps=WARM + STEPS + 1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        max_epochs=-1,
    )
    trainer.fit(Module(model), DataLoader(dataset, BATCH, shuffle=True, drop_last=True))
    return counter.result()
