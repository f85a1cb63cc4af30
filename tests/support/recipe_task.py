"""The task of the files in recipes.py: what their script trains, for the harness to go on with."""

from __future__ import annotations

import os
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from recipes import (
    BATCH,
    CLASSES,
    LR,
    SIZE,
    Net,
    make_optimizer,
    make_scheduler,
    pair_modules,
    points,
)

from harness import Task


def loss(model, batch):
    x, y = batch
    return F.cross_entropy(model(x), y)


def evaluate(model, batch):
    x, y = batch
    logits = model(x)
    return {
        "val_loss": F.cross_entropy(logits, y, reduction="sum"),
        "val_acc": (logits.argmax(1) == y).sum(),
    }


def build(
    optimizer: str = "sgd",
    schedule: bool = True,
    width: int = 16,
    classes: int = CLASSES,
    lr: float = LR,
    size: int = SIZE,
    record: str = "",
    sleep_s: float = 0.0,
) -> Task:
    """What recipes.trained trains; no dropout and no augmentation, so that it can be checked by
    hand. Each rank of each start keeps in the folder `record` the state that it first goes forward
    with."""
    model = Net(width, classes)
    chosen = make_optimizer(optimizer, model.parameters(), lr)
    recorded = not record

    def recording_loss(wrapped, batch):
        nonlocal recorded
        if not recorded:
            recorded = True
            state = {key: value.clone() for key, value in model.state_dict().items()}
            torch.save(state, Path(record) / f"rank{os.environ.get('RANK', 0)}-{time.time_ns()}.pt")
        time.sleep(sleep_s)
        return loss(wrapped, batch)

    return Task(
        modules=model,
        optimizers=chosen,
        schedulers=make_scheduler(chosen) if schedule else {},
        train_data=points(size, classes),
        eval_data=points(2 * BATCH, classes),
        loss=recording_loss,
        evaluate=evaluate,
    )


def build_taught(record: str) -> Task:
    """A student, and a teacher that is not trained: DistributedDataParallel does not look at the
    latter, so nothing makes it equal on all ranks by the way. Each rank keeps the teacher that it
    began with."""
    student, teacher = Net(), Net().requires_grad_(False).eval()
    with torch.no_grad():  # as if each rank had been seeded by its number
        teacher.head.bias.fill_(float(os.environ.get("RANK", 0)))
    torch.manual_seed(0)

    def taught(modules, batch):
        file = Path(record) / f"rank{os.environ.get('RANK', 0)}-0.pt"
        if not file.exists():
            torch.save(teacher.state_dict(), file)
        return F.mse_loss(modules["student"](batch[0]), modules["teacher"](batch[0]))

    optimizer = make_optimizer("sgd", student.parameters())
    return Task(
        modules={"student": student, "teacher": teacher},
        optimizers=optimizer,
        train_data=points(),
        loss=taught,
    )


def build_pair(
    modules: str = "generator,discriminator",
    optimizers: str = "optimizer_g,optimizer_d",
    lr: float = 2e-4,
) -> Task:
    """Two modules, each with an optimizer of its own, by the names that are given."""
    parts = dict(zip(modules.split(","), pair_modules(), strict=True))
    owners = {
        name: torch.optim.Adam(module.parameters(), lr=lr, betas=(0.5, 0.999))
        for name, module in zip(optimizers.split(","), parts.values(), strict=True)
    }

    def step(run, batch):
        x, _ = batch
        first, second = (run.tracked[name] for name in parts)
        values = {}
        for name, value in (
            ("loss", second(first(x[:, :3])).pow(2).mean()),
            ("second_loss", (second(x) - 1).pow(2).mean()),
        ):
            owner = owners[optimizers.split(",")[name != "loss"]]
            for optimizer in owners.values():
                optimizer.zero_grad()
            value.backward()
            owner.step()
            values[name] = value.detach()
        return values

    return Task(modules=parts, optimizers=owners, train_data=points(), step=step)


class Twins(torch.nn.Module):
    """Two layers of one shape, defined in the order that is given."""

    first: torch.nn.Linear
    second: torch.nn.Linear

    def __init__(self, order: str) -> None:
        super().__init__()
        for name in order.split(","):
            setattr(self, name, torch.nn.Linear(6, 6))

    def forward(self, x):
        return self.second(self.first(x).tanh())


def build_twins(
    order: str = "first,second",
    given: str = "",
    kind: str = "AdamW",
    more: dict | None = None,
    groups: bool = False,
) -> Task:
    """Twins, and an optimizer that gets their parameters in the order `given`, else by default; in
    a group for each layer, if that is asked for."""
    model = Twins(order)
    layers = [list(getattr(model, name).parameters()) for name in (given or order).split(",")]
    flat = [parameter for layer in layers for parameter in layer]
    parameters = [{"params": layer} for layer in layers] if groups else flat
    return Task(
        modules=model,
        optimizers=getattr(torch.optim, kind)(parameters, lr=0.01, **(more or {})),
        train_data=points(),
        loss=loss,
    )
