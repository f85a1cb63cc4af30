"""Calls of the library with values of another kind: each is refused in words, none by a traceback
from inside."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, SequentialSampler, TensorDataset

import harness
from harness.errors import UsageError

pytestmark = pytest.mark.usefixtures("process_as_it_was")

DATA = TensorDataset(torch.arange(32.0).view(32, 1), torch.ones(32, 1))
LOADER = DataLoader(DATA, 8)
SAMPLER = SequentialSampler(DATA)


class Endless(IterableDataset[int]):
    def __iter__(self):
        yield 1


INIT: dict[str, tuple[dict[str, Any], str]] = {
    "a number as directory": ({"directory": 5}, "the path of a directory"),
    "no text as directory": ({"directory": " "}, "the path of a directory"),
    "a list as remote": ({"remote": ["s3://a/b"]}, "a URL like"),
    "a number as config": ({"config": 5}, "a dict of plain data"),
    "a file's name as config": ({"config": "a.yaml"}, "a dict of plain data"),
    "a class as config": ({"config": SimpleNamespace}, "a dict of plain data"),
    "a name as override": ({"override": "lr"}, 'as in ["lr"]'),
    "numbers as override": ({"override": [5]}, 'as in ["lr"]'),
    "None as override": ({"override": None}, "or none: []"),
    "a name as accept": ({"accept": "data"}, "a list of: config, data"),
    "a word as deterministic": ({"deterministic": "no"}, "True or False"),
}


@pytest.mark.parametrize("case", INIT)
def test_a_start_with_a_wrong_argument_is_refused_in_words(case, tmp_path):
    arguments, words = INIT[case]
    with pytest.raises(UsageError) as refused:
        harness.init(**({"directory": tmp_path / "run"} | arguments))
    assert words in str(refused.value) and next(iter(arguments)) in str(refused.value)


def batches(*given: Any, **options: Any) -> Callable[[harness.Run], object]:
    """A call that asks for a first batch."""
    return lambda run: next(run.batches(*given, **({"epochs": 1} | options)))


def epochs(
    of: Callable[[harness.Run], Any],
) -> Callable[[harness.Run], object]:
    """A loop over epochs around these batches."""
    return lambda run: [list(inner) for _, inner in run.by_epoch(of(run))]


AROUND = "for epoch, batches in run.by_epoch(run.batches(loader, epochs=5))"
BEFORE: dict[str, tuple[Callable[[harness.Run], object], str]] = {
    "track a class": (lambda run: run.track(other=nn.Linear), "Build one, Linear(…)"),
    "track an optimizer's class": (lambda run: run.track(o=torch.optim.SGD), "Build one, SGD(…)"),
    "batches of None": (batches(None, 8), "takes a dataset or a DataLoader\nfound: a NoneType"),
    "batches of a number": (batches(5, 8), "takes a dataset or a DataLoader\nfound: a int"),
    "batches of a class": (batches(TensorDataset, 8), "found: the class TensorDataset"),
    "batches of a dict": (batches({"train": DATA}, 8), "found: a dict with 'train'"),
    "order is a list": (batches(DATA, 8, order=list(range(32))), "order=lambda epoch:"),
    "order is a tensor": (batches(DATA, 8, order=torch.randperm(32)), "order=lambda epoch:"),
    "order is a sampler": (batches(DATA, 8, order=SAMPLER), "sampler=sampler"),
    "order gives None": (batches(DATA, 8, order=lambda _: None), "order(0) gives no order"),
    "collate_fn is a number": (batches(DATA, 8, collate_fn=5), "from a list of samples"),
    "shuffle is a word": (batches(DATA, 8, shuffle="no"), "True or False"),
    "beside is a DataLoader": (batches(DATA, 8, beside=LOADER), 'beside={"unlabelled": loader}'),
    "beside is a list": (batches(DATA, 8, beside=[LOADER]), 'beside={"unlabelled": loader}'),
    "beside has numbers": (batches(DATA, 8, beside={1: LOADER}), 'beside={"unlabelled": loader}'),
    "beside has a number": (batches(DATA, 8, beside={"u": 5}), "found: a int"),
    "by_epoch around a DataLoader": (epochs(lambda _: LOADER), AROUND),
    "by_epoch around one batch": (epochs(lambda _: DataLoader(DATA, 32)), AROUND),
    "by_epoch around an iterator over it": (epochs(lambda _: enumerate(LOADER)), AROUND),
    "by_epoch around one batch in a list": (epochs(lambda _: [1]), AROUND),
    "by_epoch around a dataset": (epochs(lambda _: DATA), AROUND),
    "by_epoch around a number": (epochs(lambda _: 5), AROUND),
    "by_epoch around epochs": (epochs(lambda _: range(5)), AROUND),
    "by_epoch around a method": (epochs(lambda run: run.batches), AROUND),
}


@pytest.mark.parametrize("case", BEFORE)
def test_a_loop_that_begins_with_a_wrong_argument_is_refused_in_words(case, tmp_path):
    call, words = BEFORE[case]
    run = harness.init(tmp_path / "run", save_every_s=None)
    run.track(model=nn.Linear(1, 1))
    with pytest.raises(UsageError) as refused:
        call(run)
    assert words in str(refused.value)


def evaluates(data: Any = DATA, fn: Any = lambda _: {"v": 1}, **options: Any):
    return lambda run: run.evaluate(data, fn, **options)


WITHIN: dict[str, tuple[Callable[[Any], object], str]] = {
    "log an array": (lambda run: run.log(loss=np.zeros(3)), "log(loss=…) takes one number"),
    "log a complex": (lambda run: run.log(x=torch.tensor(1j)), "log(x=…) takes one number"),
    "due in words": (lambda run: run.due("5"), "As in run.due(100)"),
    "due at steps": (lambda run: run.due([5]), "As in run.due(100)"),
    "keep as a number": (lambda run: run.keep(5, b""), "Give a relative path"),
    "state is replaced": (lambda run: setattr(run, "state", 5), "run.state has been replaced"),
    "evaluate a stream": (evaluates(Endless()), "a dataset with __len__ and __getitem__"),
    "evaluate None": (evaluates(None), "a dataset with __len__ and __getitem__"),
    "evaluate swapped": (evaluates(len, DATA), "found: fn="),
    "evaluate a sampler": (
        evaluates(DataLoader(DATA, 8, sampler=[0, 1])),
        "evaluate(Subset(dataset, numbers)",
    ),
    "evaluate batches of none": (evaluates(batch_size=0), "batch_size=0, expected: a whole number"),
    "evaluate, collate": (evaluates(collate_fn=5), "collate_fn=5, expected: a function"),
    "evaluate to a number": (evaluates(fn=lambda _: 1.0), '{"val_loss": loss.sum()}'),
    "evaluate to nothing": (evaluates(fn=lambda _: None), '{"val_loss": loss.sum()}'),
    "evaluate to numbers": (evaluates(fn=lambda _: {1: 2}), '{"val_loss": loss.sum()}'),
    "evaluate to a vector": (
        evaluates(fn=lambda _: {"v": torch.zeros(3)}),
        "evaluate() takes one number as v",
    ),
}


@pytest.mark.parametrize("case", WITHIN)
def test_a_wrong_argument_inside_the_loop_is_refused_in_words(case, tmp_path):
    call, words = WITHIN[case]
    run = harness.init(tmp_path / "run", save_every_s=None, rehearse=False)
    run.track(model=nn.Linear(1, 1))

    def train() -> None:
        for _ in run.batches(DATA, 8, epochs=1):
            call(run)

    with pytest.raises(UsageError) as refused:
        train()
    assert words in str(refused.value)


@dataclasses.dataclass
class Config:
    lr: float = 0.1
    model: Any = dataclasses.field(default_factory=lambda: SimpleNamespace(width=8, parts=[1, 2]))


@pytest.mark.parametrize(
    "config", [Config(), argparse.Namespace(**vars(Config())), {"lr": 0.1, "model": Config().model}]
)
def test_a_config_may_be_a_namespace_or_an_object_of_a_dataclass(config, tmp_path):
    run = harness.init(tmp_path / "run", config=config)
    assert run._settings.config == {"lr": 0.1, "model": {"width": 8, "parts": [1, 2]}}


def first_and_last(samples: list[Any]) -> torch.Tensor:
    return torch.stack([samples[0][0], samples[-1][0]])


def of_batch(batch: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"v": batch.sum()}


def test_a_dataloader_is_evaluated_as_its_dataset_is(tmp_path):
    run = harness.init(tmp_path / "run", save_every_s=None)
    run.track(model=nn.Linear(1, 1))
    for _ in run.batches(DATA, 8, epochs=1):
        loader = DataLoader(DATA, 10, shuffle=True, collate_fn=first_and_last, drop_last=True)
        found = [
            run.evaluate(DATA, of_batch, batch_size=10, collate_fn=first_and_last),
            run.evaluate(loader, of_batch),
        ]
        run.keep(Path("a") / "b.txt", b"kept")
        run.finish()
    assert found[0] == found[1] == {"v": (0 + 9 + 10 + 19 + 20 + 29 + 30 + 31) / 32}
    assert (tmp_path / "run/files/a/b.txt").read_bytes() == b"kept"
