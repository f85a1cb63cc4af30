"""Tasks whose models are exported: each with something in it that one format or another has to cope
with."""

from __future__ import annotations

import collections
import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from harness import Task

WIDTH, CLASSES = 6, 3


def sequential(width: int = 16) -> nn.Module:
    """Of torch's own classes only; Dropout and BatchNorm show whether it is in eval mode."""
    return nn.Sequential(
        nn.Linear(WIDTH, width),
        nn.BatchNorm1d(width),
        nn.Tanh(),
        nn.Dropout(0.5),
        nn.Linear(width, CLASSES),
    )


class Net(nn.Module):
    """A class of the user's own, which only its code can load."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.body = sequential(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x)


class Keyed(nn.Module):
    """Takes keyword arguments, one of them optional, and returns a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.body = sequential()

    def forward(
        self, *, points: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor | None = None
    ) -> dict[str, torch.Tensor]:
        logits = self.body(points) * scale.unsqueeze(1)
        return {"logits": logits if shift is None else logits + shift, "sums": logits.sum(1)}


class Mixed(nn.Module):
    """Called with a positional and a keyword argument; the lambda keeps TorchScript's compiler
    out."""

    def __init__(self) -> None:
        super().__init__()
        self.body = sequential()
        self.act = lambda x: x.tanh()

    def forward(self, x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return self.act(self.body(x)) * scale.unsqueeze(1)


class Starred(Mixed):
    """Its second argument is for keywords only, which torch.jit.trace has no way to give."""

    def forward(  # type: ignore[override]
        self, x: torch.Tensor, *, scale: torch.Tensor
    ) -> torch.Tensor:
        return super().forward(x, scale)


class Pairs(nn.Module):
    """Takes two tensors by position and returns nested tuples."""

    def __init__(self) -> None:
        super().__init__()
        self.body = sequential()

    def forward(
        self, x: torch.Tensor, scale: torch.Tensor
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
        logits = self.body(x) * scale.unsqueeze(1)
        return logits, (logits.mean(1), logits.std(1))


class Traced(Net):
    """Cannot be compiled by TorchScript (a lambda), but traced: nothing in it depends on the
    data."""

    def __init__(self) -> None:
        super().__init__()
        self.act = lambda x: x.sin()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.act(self.body(x))


class Branching(nn.Module):
    """A branch that depends on the data: TorchScript compiles it, torch.export cannot."""

    def __init__(self) -> None:
        super().__init__()
        self.body = sequential()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits = self.body(x)
        if float(x.sum()) > 0:
            return logits.sin()
        return logits.cos()


class Leaning(Traced):
    """A branch that depends on the data, which a trace takes for good: for eight samples one side,
    for a single one the other."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits = self.act(self.body(x))
        return logits if (x != 0).sum() > 20 else -logits


class Sizing(Traced):
    """Tracing freezes how many samples the example has: at any other size the answers would be
    silently wrong."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.act(self.body(x)) * float(len(x))


class FixedSize(Traced):
    """Only ever answers eight samples at once."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.act(self.body(x.view(8, WIDTH)))


class Random(Traced):
    """Never answers the same twice, not even in eval mode."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.act(self.body(x)) + torch.rand(len(x), CLASSES)


class Counting(Traced):
    """Takes another way at each call: a trace of it is not worth anything."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = itertools.count()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.act(self.body(x))
        for _ in range(next(self.calls)):
            y = y.sin()
        return y


class Hopeless(nn.Module):
    """Neither to be compiled, nor traced, nor exported: it asks for the data, and returns what is
    no tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.body = sequential()
        self.log: Any = collections.Counter()

    def forward(self, x: torch.Tensor) -> Any:
        logits = self.body(x)
        kept = [row for row in logits.tolist() if sum(row) > 0]
        self.log.update(rows=len(kept))
        return Answer(logits, f"{len(kept)} rows")


@dataclass
class Answer:
    """What torch's own tools know nothing of."""

    logits: torch.Tensor
    words: str


Named = collections.namedtuple("Named", "logits sums")


class Tuples(nn.Module):
    """Returns a named tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.body = sequential()

    def forward(self, x: torch.Tensor) -> Named:
        logits = self.body(x)
        return Named(logits, logits.sum(1))


class Tied(nn.Module):
    """One matrix under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.inward, self.outward = (
            nn.Linear(WIDTH, WIDTH, bias=False),
            nn.Linear(WIDTH, WIDTH, bias=False),
        )
        self.outward.weight = self.inward.weight
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.outward(self.inward(x).tanh()))


class Shell(nn.Module):
    """Everything that it has is called `module.…`, as in the shell of DataParallel, which it is
    not."""

    def __init__(self) -> None:
        super().__init__()
        self.module = sequential()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.module(x)


class Odd(Net):
    """With state beside its tensors."""

    def get_extra_state(self) -> dict[str, int]:
        return {"version": 3}

    def set_extra_state(self, given: dict[str, int]) -> None:
        assert given == {"version": 3}


class Annealed(Net):
    """Training changes more of it than its weights: a plain attribute of it and of a part without
    weights, and a buffer that is not persistent."""

    scale: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.tau = 1.0
        self.squeeze = Squeeze()
        self.register_buffer("scale", torch.ones(CLASSES), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.tau *= 0.7
            self.squeeze.by *= 0.8
            self.scale.mul_(torch.tensor([0.6, 0.7, 0.8]))
        return self.squeeze(self.body(x)) * self.scale / self.tau


class Squeeze(nn.Module):
    """Has no weights."""

    def __init__(self) -> None:
        super().__init__()
        self.by = 1.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x * self.by).tanh()


class Locked(Net):
    """Cannot be pickled."""

    def __init__(self) -> None:
        super().__init__()
        self.act = lambda x: x


def samples(count: int) -> torch.utils.data.TensorDataset:
    """Points and their classes; the same each time."""
    generator = torch.Generator().manual_seed(count)
    x = torch.randn(count, WIDTH, generator=generator)
    return torch.utils.data.TensorDataset(x, x[:, :CLASSES].argmax(1))


def plain(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return model(x)


CALLS = {
    "keyed": lambda model, x: model(points=x, scale=x[:, 0])["logits"],
    "mixed": lambda model, x: model(x, scale=x[:, 0]),
    "starred": lambda model, x: model(x, scale=x[:, 0]),
    "pairs": lambda model, x: model(x, x[:, 0])[0],
    "hopeless": lambda model, x: model(x).logits,
    "tuples": lambda model, x: model(x).logits,
}
MODELS: dict[str, Callable[..., nn.Module]] = {
    "sequential": sequential,
    "net": Net,
    "keyed": Keyed,
    "mixed": Mixed,
    "starred": Starred,
    "pairs": Pairs,
    "traced": Traced,
    "branching": Branching,
    "leaning": Leaning,
    "sizing": Sizing,
    "fixed": FixedSize,
    "random": Random,
    "counting": Counting,
    "hopeless": Hopeless,
    "tuples": Tuples,
    "tied": Tied,
    "shell": Shell,
    "odd": Odd,
    "annealed": Annealed,
    "locked": Locked,
}


def build(
    kind: str = "sequential",
    width: int = 16,
    held_out: int = 48,
    lr: float = 0.05,
    sleep_s: float = 0.0,
) -> Task:
    """One model of a kind."""
    model = MODELS[kind](width) if kind in ("sequential", "net") else MODELS[kind]()
    call = CALLS.get(kind, plain)

    def loss(model: nn.Module, batch: Any) -> torch.Tensor:
        time.sleep(sleep_s if model.training else 0)
        return F.cross_entropy(call(model, batch[0]), batch[1])

    return Task(
        modules=model,
        optimizers=torch.optim.SGD(
            [p for p in model.parameters() if p.requires_grad], lr=lr, momentum=0.9
        ),
        train_data=samples(80),
        eval_data=samples(held_out),
        loss=loss,
        evaluate=lambda model, batch: {"val_loss": loss(model, batch) * len(batch[0])},
    )


def build_pair(flatten: bool = False, names: str = "encoder,head") -> Task:
    """Two modules, and two optimizers; or the second one without any parameter."""
    first, second = names.split(",")
    modules: dict[str, nn.Module] = {
        first: nn.Sequential(nn.Linear(WIDTH, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.5))
    }
    modules[second] = nn.Flatten() if flatten else nn.Linear(8, CLASSES)
    optimizers: dict[str, torch.optim.Optimizer] = {
        f"{first}_optimizer": torch.optim.AdamW(modules[first].parameters(), lr=0.01)
    }
    if not flatten:
        optimizers[f"{second}_optimizer"] = torch.optim.SGD(modules[second].parameters(), lr=0.05)

    def loss(modules: Any, batch: Any) -> torch.Tensor:
        x, y = batch
        return F.cross_entropy(modules[second](modules[first](x)), y)

    def step(run: Any, batch: Any) -> dict[str, Any]:
        value = loss({name: run.tracked[name] for name in modules}, batch)
        for optimizer in optimizers.values():
            optimizer.zero_grad()
        value.backward()
        for optimizer in optimizers.values():
            optimizer.step()
        return {"loss": value.detach()}

    return Task(
        modules=modules,
        optimizers=optimizers,
        train_data=samples(80),
        eval_data=samples(48),
        step=step,
        evaluate=lambda modules, batch: {"val_loss": loss(modules, batch) * len(batch[0])},
    )
