"""What a loop of one's own may look like: epochs around batches, a DataLoader, its own sampling;
and what is refused, in words."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import events, run
from conftest import harness as harness_command
from library_runs import newest, steps_of
from loop_data import Stream, points
from torch import nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)
from torch.utils.data.distributed import DistributedSampler

import harness
from harness import preemption
from harness.data.dataloader import adopt
from harness.errors import UsageError
from harness.exchange.compare import differences
from harness.supervision import launches

pytestmark = pytest.mark.usefixtures("process_as_it_was")
PER_EPOCH = 6  # of the 48 points, in batches of 8


def begin(
    directory: Path, **init: Any
) -> tuple[harness.Run, nn.Module, torch.optim.Optimizer, torch.optim.lr_scheduler.StepLR]:
    own: dict[str, Any] = {"seed": 2, "save_every_s": None, "save_every_steps": 2}
    job = harness.init(directory, **(own | init))
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.7)
    assert job.track(model=model, optimizer=optimizer, scheduler=scheduler) is job
    return job, model, optimizer, scheduler


def update(model: nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor) -> torch.Tensor:
    optimizer.zero_grad()
    loss = model(x).square().mean()
    loss.backward()
    optimizer.step()
    return loss


class LeftError(Exception):
    """Stands for whatever ends a process there."""


def nested(
    directory: Path,
    *,
    leave: tuple[int, str] = (0, ""),
    epochs: int = 3,
    max_steps: int | None = None,
    data: object = None,
    **init: object,
) -> tuple[harness.Run, list[str]]:
    """A loop in a loop, with a schedule and an evaluation once an epoch; what it did, in order. It
    is left `in`, or `after`, a step."""
    job, model, optimizer, scheduler = begin(directory, **init)
    loader = DataLoader(points(), batch_size=8, shuffle=True) if data is None else data
    did = []
    for epoch, batches in job.by_epoch(job.batches(loader, epochs=epochs, max_steps=max_steps)):
        did.append(f"epoch {epoch}")
        for (x,) in batches:
            did.append(f"step {job.step}")
            job.log(loss=update(model, optimizer, x))
            if leave == (job.step, "in"):
                raise LeftError
        if leave == (job.step, "before the rest"):
            raise LeftError
        scheduler.step()
        job.state["draws"] = [*job.state.get("draws", []), random.random()]
        if not job.finished:
            job.evaluate(points(), lambda batch: {"val_loss": model(batch[0]).square().sum()})
        did.append(f"rest of {epoch}")
        if leave == (job.step, "after the rest"):
            raise LeftError
    return job, did


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """The end of the nested loop that nobody disturbed."""
    from conftest import undone

    with undone():
        directory = tmp_path_factory.mktemp("whole") / "a"
        job, did = nested(directory)
        assert job.finished and job.step == 3 * PER_EPOCH and job.epoch == 3
        assert did == [
            word
            for epoch in range(3)
            for word in (
                f"epoch {epoch}",
                *(f"step {epoch * PER_EPOCH + at}" for at in range(1, PER_EPOCH + 1)),
                f"rest of {epoch}",
            )
        ]
        return newest(directory)


@pytest.mark.parametrize(
    "leave",
    [
        (6, "before the rest"),
        (7, "in"),
        *(
            pytest.param(leave, marks=pytest.mark.slow)
            for leave in ((3, "in"), (6, "in"), (6, "after the rest"), (18, "after the rest"))
        ),
    ],
)
def test_a_loop_over_epochs_goes_on_exactly_and_repeats_no_rest_that_was_saved(
    leave, tmp_path, whole
):
    with pytest.raises(LeftError):
        nested(tmp_path / "a", leave=leave)
    job, did = nested(tmp_path / "a")
    assert job.finished and list(differences(whole, newest(tmp_path / "a"))) == []
    at, where = leave
    # Of the step in which it was left nothing is saved.
    saved = max((step for step in range(0, at, 2)), default=0)
    assert did[1] == f"step {saved + 1}"
    assert ("rest of 0" in did) == (saved < PER_EPOCH), where


def test_what_is_done_after_the_last_batch_of_an_epoch_is_saved_with_it(tmp_path):
    with pytest.raises(LeftError):
        nested(tmp_path / "a", leave=(7, "in"))
    payload = newest(tmp_path / "a")
    assert payload["step"] == 6 and payload["data"]["epoch"] == 1 and payload["data"]["sample"] == 0
    assert (
        payload["scheduler_state_dict"]["last_epoch"] == 1
        and len(payload["state"]["draws"]) == 1
        and payload["metrics"]
    )


def test_an_epoch_that_ends_with_the_limit_of_steps_is_gone_on_with_by_who_wants_more(
    tmp_path, whole
):
    job, did = nested(tmp_path / "a", max_steps=8)
    assert job.finished and job.step == 8 and did[-1] == "rest of 1"
    assert newest(tmp_path / "a")["scheduler_state_dict"]["last_epoch"] == 1, (
        "what comes after the end is not the run's"
    )
    job, did = nested(tmp_path / "a")
    assert (
        did[:2] == ["epoch 1", "step 9"] and list(differences(whole, newest(tmp_path / "a"))) == []
    )


def test_a_finished_loop_over_epochs_does_nothing(tmp_path):
    nested(tmp_path / "a", epochs=1)
    job, did = nested(tmp_path / "a", epochs=1)
    assert job.finished and did == []


# The first epoch's rest steps the schedule where no step is made.
@pytest.mark.filterwarnings("ignore:Detected call of")
def test_an_epoch_of_which_a_larger_batch_leaves_nothing_has_an_end_and_no_batch(tmp_path):
    def data(batch_size):
        return DataLoader(points(100), batch_size, shuffle=True, drop_last=True)

    with pytest.raises(LeftError):
        nested(tmp_path / "a", leave=(12, "in"), epochs=2, data=data(8), save_every_steps=1)
    job, did = nested(tmp_path / "a", epochs=2, data=data(16), accept=["config"])
    steps = [f"step {number}" for number in range(12, 18)]
    assert did == ["epoch 0", "rest of 0", "epoch 1", *steps, "rest of 1"]
    assert job.finished and job.step == 17 and len(job.state["draws"]) == 2


@pytest.mark.parametrize("where", ["inner", "outer"])
def test_early_stopping_ends_a_loop_over_epochs(where, tmp_path):
    job, model, optimizer, _ = begin(tmp_path / "a")
    for epoch, batches in job.by_epoch(job.batches(points(), 8, epochs=5)):
        for (x,) in batches:
            update(model, optimizer, x)
            if where == "inner" and job.step == 8:
                job.finish()
        if where == "outer" and epoch == 1:
            job.finish()
    assert (
        job.finished and job.step == (8 if where == "inner" else 12) == steps_of(tmp_path / "a")[-1]
    )


@pytest.mark.parametrize("taken", [0, 2])
def test_an_epoch_that_is_left_before_its_end_is_refused_in_words(taken, tmp_path):
    job, model, optimizer, _ = begin(tmp_path / "a")
    with pytest.raises(UsageError, match=r"batches of epoch 0 was left before its end.*") as caught:
        for _, batches in job.by_epoch(job.batches(points(), 8, epochs=2)):
            for number, (x,) in enumerate(batches):
                if number == taken:
                    break
                update(model, optimizer, x)
    assert "run.finish()" in caught.value.remedy


class Unreadable(torch.utils.data.Dataset):
    """Cannot read one sample after a while, as on a file system that fails."""

    fails = False

    def __len__(self):
        return 48

    def __getitem__(self, at):
        if at == 20 and self.fails:
            raise OSError("input/output error")
        return (torch.ones(4),)


def every(items: Iterator[Any]) -> Iterator[Any]:
    """What a program goes over that skips a batch that cannot be loaded."""
    while True:
        try:
            yield next(items)
        except OSError:
            continue
        except StopIteration:
            return


@pytest.mark.parametrize("how", ["batches", "epochs"])
def test_a_program_that_goes_on_after_an_error_is_not_taken_to_be_complete(how, tmp_path):
    job, model, optimizer, _ = begin(tmp_path / "a")
    data = Unreadable()
    batches = job.batches(data, 8, epochs=2, shuffle=False)
    epochs = [(0, batches)] if how == "batches" else job.by_epoch(batches)
    with pytest.raises(UsageError, match="after an error has ended it") as caught:
        for _, inner in epochs:
            for (x,) in every(inner):
                data.fails = True
                update(model, optimizer, x)
    assert "at step 2, OSError: input/output error" in caught.value.found
    assert isinstance(caught.value.__cause__, OSError) and not job.finished
    with pytest.raises(UsageError, match="after an error has ended it"):
        next(batches)


def test_a_program_that_catches_the_end_by_a_stop_gets_it_again(tmp_path):
    job, model, optimizer, _ = begin(tmp_path / "a")
    batches = iter(job.batches(points(), 8, epochs=2))
    update(model, optimizer, next(batches)[0])
    preemption.request("a test")
    for _ in range(2):
        with pytest.raises(SystemExit) as ended:
            next(batches)
        assert ended.value.code == 0
    assert not job.finished


@pytest.mark.slow
def test_a_stream_is_looped_over_by_epochs(tmp_path):
    with pytest.raises(LeftError):
        nested(tmp_path / "a", leave=(9, "in"), data=DataLoader(Stream(), batch_size=8))
    nested(tmp_path / "a", data=DataLoader(Stream(), batch_size=8))
    nested(tmp_path / "whole", data=DataLoader(Stream(), batch_size=8))
    assert list(differences(newest(tmp_path / "whole"), newest(tmp_path / "a"))) == []


class Levelled(Stream):
    """Reads as the program has set it, as data of a curriculum does."""

    level, begun = 0, 0

    def __iter__(self):
        for (x,) in super().__iter__():
            yield (x + self.level + self.begun,)

    def state_dict(self):
        return {"at": self.at, "begun": self.begun}

    def load_state_dict(self, state):
        self.at, self.begun = state["at"], state["begun"]


def drawing(samples: list[Any]) -> list[torch.Tensor]:
    torch.rand(1)
    return torch.utils.data.default_collate(samples)


def levelled(directory: Path, leave_at: int = 0) -> list[float]:
    """A loop over the epochs of a stream whose collate function draws, and whose head sets the
    stream; the batches, in order."""
    job, model, optimizer, _ = begin(directory)
    stream, seen = Levelled(), []
    for epoch, batches in job.by_epoch(job.batches(stream, 8, epochs=3, collate_fn=drawing)):
        stream.level, stream.begun = 100 * (epoch + 1), stream.begun + 1000
        torch.rand(3)
        for (x,) in batches:
            seen.append(x.sum().item())
            update(model, optimizer, x / 1000 + torch.rand(1))
            if job.step == leave_at:
                raise LeftError
    return seen


@pytest.mark.slow
@pytest.mark.parametrize("leave_at", [4, 7, 9, 13])
def test_an_epoch_of_a_stream_is_yielded_before_anything_of_it_is_read(leave_at, tmp_path):
    whole = levelled(tmp_path / "whole")
    assert [round(value / 32, -2) for value in whole] == [1100.0] * 6 + [2200.0] * 6 + [3300.0] * 6
    with pytest.raises(LeftError):
        levelled(tmp_path / "a", leave_at)
    rest = levelled(tmp_path / "a")
    assert rest == whole[-len(rest) :]
    assert list(differences(newest(tmp_path / "whole"), newest(tmp_path / "a"))) == []


class Mixed:
    """An iterator of the program's, with state: it draws, and counts batches."""

    def __init__(self, run: harness.Run) -> None:
        self.run, self.batches, self.count = run, iter(()), 0
        self.rng = torch.Generator().manual_seed(5)

    def over(self, batches: Iterator[Any]) -> Iterator[Any]:
        for (x,) in batches:
            self.count += 1
            self.run.state["mixed"] = self.run.state.get("mixed", 0) + 1
            noise = torch.rand(1) + torch.rand(1, generator=self.rng)
            yield (x + noise + self.count * 0.01 + self.run.state["mixed"] * 0.01,)

    def state_dict(self):
        return {"count": self.count}

    def load_state_dict(self, state):
        self.count = state["count"]


def mixing(directory: Path, leave_at: int = 0, *, sets: bool = False) -> list[float]:
    """A loop over epochs whose batches another iterator has mixed; the batches, in order."""
    job, model, optimizer, _ = begin(directory)
    data, mixed, seen = points(), Mixed(job), []
    job.track(mixed=mixed, rng=mixed.rng)
    for epoch, batches in job.by_epoch(mixed.over(job.batches(data, 8, epochs=3))):
        torch.rand(3 + torch.rand(3, generator=mixed.rng).numel())
        mixed.count += 100
        job.state["mixed"] += 100
        if sets:
            vars(data)["level"] = epoch
        for (x,) in batches:
            seen.append(x.sum().item())
            update(model, optimizer, (x + torch.rand(1)).tanh())
            if job.step == leave_at:
                raise LeftError
    return seen


@pytest.mark.slow
@pytest.mark.parametrize("leave_at", [4, 7, 9, 13])
def test_what_a_program_does_to_batches_before_the_head_of_an_epoch_is_not_put_back(
    leave_at, tmp_path
):
    whole = mixing(tmp_path / "whole")
    with pytest.raises(LeftError):
        mixing(tmp_path / "a", leave_at)
    rest = mixing(tmp_path / "a")
    assert rest == whole[-len(rest) :]
    assert list(differences(newest(tmp_path / "whole"), newest(tmp_path / "a"))) == []


@pytest.mark.parametrize("sets", [True, False])
def test_a_head_that_sets_the_dataset_after_the_first_batch_is_warned(sets, tmp_path, capfd):
    mixing(tmp_path / "a", sets=sets)
    assert capfd.readouterr().out.count("sets level of its dataset") == sets


def test_an_epoch_for_which_a_stream_has_nothing_left_has_an_end_and_no_batch(tmp_path):
    class Once(Stream):
        def __iter__(self):
            if self.at < 48:
                yield from super().__iter__()
            self.at = 48

    job, model, optimizer, _ = begin(tmp_path / "a")
    did = []
    for epoch, batches in job.by_epoch(job.batches(Once(), 8, epochs=2, check_stream=False)):
        did.append((epoch, sum(update(model, optimizer, x).numel() for (x,) in batches)))
    assert job.finished and did == [(0, 6), (1, 0)]


def test_several_logs_of_a_step_are_merged_and_those_of_the_next_one_begin_anew(tmp_path):
    job, model, optimizer, _ = begin(tmp_path / "a", log_every_steps=1)
    for (x,) in job.batches(points(), 8, epochs=1, max_steps=3):
        loss = update(model, optimizer, x)
        job.log(loss=loss, again=1.0)
        if job.step < 3:
            job.log(acc=0.5, again=2.0)
    steps = events(tmp_path / "a", "step")
    names = {"loss", "again", "acc"}
    assert [{name: step[name] for name in names & step.keys() - {"loss"}} for step in steps] == [
        {"again": 2.0, "acc": 0.5},
        {"again": 2.0, "acc": 0.5},
        {"again": 1.0},
    ]
    assert newest(tmp_path / "a")["loss"] == steps[-1]["loss"] and "loss" in steps[0]


@pytest.mark.parametrize(
    "other",
    ["a loop that is still alive", "an optimizer of the same parameters", "a second update"],
)
def test_gradients_that_are_used_more_than_once_in_a_step_are_not_taken_for_lasting_ones(
    tmp_path, other
):
    """They would be kept as zeros, and be there after a restart where None would be without it."""
    if other == "a loop that is still alive":
        first, *_ = begin(tmp_path / "first")
        alive = first.batches(points(), 8, epochs=1)
        next(alive)
    job, model, optimizer, _ = begin(tmp_path / "a")
    again = torch.optim.SGD(model.parameters(), lr=0.01)
    for (x,) in job.batches(points(), 8, epochs=1, max_steps=6):
        update(model, optimizer, x)
        if other == "an optimizer of the same parameters":
            again.step()
        if other == "a second update":
            optimizer.step()
    assert "gradients" not in newest(tmp_path / "a")


# Loops that find their data themselves.


def sampling(
    directory: Path, max_steps: int = 12, leave_at: int | None = None
) -> tuple[harness.Run, list[int]]:
    job, model, optimizer, _ = begin(directory)
    numbers = []
    for number in job.steps(max_steps):
        numbers.append(number)
        job.log(loss=update(model, optimizer, torch.randn(8, 4) * random.random()))
        if job.step == leave_at:
            raise LeftError
    return job, numbers


def test_a_loop_that_samples_itself_goes_on_exactly(tmp_path):
    job, numbers = sampling(tmp_path / "whole")
    assert job.finished and numbers == list(range(12)) and job.step == 12 and job.epoch == 0
    with pytest.raises(LeftError):
        sampling(tmp_path / "a", leave_at=7)
    job, numbers = sampling(tmp_path / "a")
    assert (
        numbers == list(range(6, 12))
        and list(differences(newest(tmp_path / "whole"), newest(tmp_path / "a"))) == []
    )
    assert sampling(tmp_path / "a")[1] == []
    assert sampling(tmp_path / "a", max_steps=14)[1] == [12, 13]


def test_a_loop_that_samples_itself_may_not_be_gone_on_with_over_a_dataset(tmp_path):
    sampling(tmp_path / "a", max_steps=4)
    job, *_ = begin(tmp_path / "a")
    with pytest.raises(UsageError, match="dealt out differently"):
        next(job.batches(points(), 8, epochs=5))


def test_the_progress_of_a_loop_without_samples_is_told_in_steps(tmp_path, capfd):
    job, model, optimizer, _ = begin(tmp_path / "a", log_every_steps=1)
    for _ in job.steps(3):
        update(model, optimizer, torch.randn(8, 4))
    printed = capfd.readouterr().out
    assert (
        "steps/s" in printed
        and "samples/s" not in printed
        and "epoch" not in printed.replace("attempt", "")
    )


# DataLoaders.


def dealt(directory: Path, data: object, **batches: Any) -> list[list[float]]:
    """The first number of each sample of each batch, over two epochs."""
    job, model, optimizer, _ = begin(directory)
    found = []
    batches.setdefault("epochs", 2)
    for (x,) in job.batches(data, **batches):
        found.append(x[:, 0].tolist())
        update(model, optimizer, x)
    return found


class Odd(torch.utils.data.Sampler[int]):
    """An order of its own: the odd numbers, from the end in the second epoch."""

    ORDERS = (range(1, 48, 2), range(47, 0, -2))

    def __init__(self) -> None:
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        return iter(self.ORDERS[self.epoch])

    def __len__(self) -> int:
        return 24


@pytest.mark.parametrize(
    ("loader", "same"),
    [
        (lambda data: DataLoader(data, batch_size=8, shuffle=True), {"shuffle": True}),
        (lambda data: DataLoader(data, batch_size=8), {"shuffle": False}),
        (
            lambda data: DataLoader(data, batch_size=8, sampler=DistributedSampler(data, 1, 0)),
            {"shuffle": True},
        ),
        (
            lambda data: DataLoader(
                data, batch_size=8, sampler=DistributedSampler(data, 1, 0, shuffle=False)
            ),
            {"shuffle": False},
        ),
        (
            lambda data: DataLoader(
                data, batch_sampler=BatchSampler(SequentialSampler(data), 8, False)
            ),
            {"shuffle": False},
        ),
        (
            lambda data: DataLoader(data, batch_size=8, sampler=Odd()),
            {"order": lambda epoch: Odd.ORDERS[epoch]},
        ),
    ],
    ids=[
        "shuffled",
        "in order",
        "distributed",
        "distributed in order",
        "a batch sampler",
        "a sampler of its own",
    ],
)
def test_a_dataloader_is_dealt_out_as_its_dataset_would_be(loader, same, tmp_path):
    data = points()
    assert dealt(tmp_path / "a", loader(data)) == dealt(
        tmp_path / "b", data, global_batch_size=8, **same
    )


def test_a_dataloader_with_a_short_last_batch_keeps_it_unless_it_says_not_to(tmp_path):
    data = points(20)
    assert [len(batch) for batch in dealt(tmp_path / "a", DataLoader(data, batch_size=8))] == [
        8,
        8,
        4,
    ] * 2
    assert [
        len(batch)
        for batch in dealt(tmp_path / "b", DataLoader(data, batch_size=8, drop_last=True))
    ] == [8, 8] * 2


@pytest.mark.parametrize(
    "sampler",
    [SubsetRandomSampler(range(10)), WeightedRandomSampler([1.0] * 24 + [0.0] * 24, 16)],
    ids=["subset", "weighted"],
)
def test_a_sampler_that_draws_is_asked_under_randomness_that_follows_from_the_epoch(
    sampler, tmp_path
):
    found = [
        dealt(tmp_path / name, DataLoader(points(), batch_size=2, sampler=sampler)) for name in "ab"
    ]
    assert found[0] == found[1] and len(found[0]) in (10, 16)
    half = len(found[0]) // 2
    assert found[0][:half] != found[0][half:], "each epoch has another order"


def test_micro_batches_are_as_large_as_the_dataloader_says(tmp_path):
    job, model, optimizer, _ = begin(tmp_path / "a")
    for micro_batches in job.batches(DataLoader(points(), batch_size=4), accumulate=3, epochs=1):
        assert [len(x) for (x,) in micro_batches] == [4, 4, 4]
        update(model, optimizer, micro_batches[0][0])
    assert job.step == 4


def test_the_loader_processes_are_as_the_dataloader_wants_them(tmp_path):
    def said(number: int) -> None:
        (tmp_path / f"worker-{number}").touch()

    loader = DataLoader(
        points(), batch_size=8, num_workers=2, worker_init_fn=said, prefetch_factor=3
    )
    adopted = adopt(loader)
    assert (
        adopted is not None
        and adopted.batching.workers.number == 2
        and adopted.batching.workers.others["prefetch_factor"] == 3
    )
    assert dealt(tmp_path / "a", loader) == dealt(
        tmp_path / "b", points(), global_batch_size=8, shuffle=False
    )
    assert {file.name for file in tmp_path.glob("worker-*")} == {"worker-0", "worker-1"}


@pytest.mark.parametrize(
    ("loader", "words"),
    [
        (
            lambda data: DataLoader(data, batch_size=None),
            "does not batch samples by a number of its own",
        ),
        (
            lambda data: DataLoader(data, batch_sampler=[[1, 2], [3]]),
            "does not batch samples by a number of its own",
        ),
        (
            lambda data: DataLoader(
                data, 4, sampler=type("Weighted", (DistributedSampler,), {})(data, 2, 0)
            ),
            "splits the samples",
        ),
    ],
    ids=["no batches", "batches by hand", "a rank's own"],
)
def test_a_dataloader_that_could_not_be_found_again_in_the_middle_is_refused(
    loader, words, tmp_path
):
    job, *_ = begin(tmp_path / "a")
    with pytest.raises(UsageError, match=words):
        next(job.batches(loader(points()), epochs=1))
    assert not (tmp_path / "a" / "attempts").exists(), "nothing was begun"


@pytest.mark.parametrize(
    "given",
    [
        {"global_batch_size": 8},
        {"num_workers": 1},
        {"collate_fn": lambda samples: samples},
        {"order": lambda epoch: [0]},
    ],
)
def test_a_dataloader_and_what_it_says_itself_are_refused_together(given, tmp_path):
    job, *_ = begin(tmp_path / "a")
    with pytest.raises(UsageError, match="says itself"):
        next(job.batches(DataLoader(points(), batch_size=8), epochs=1, **given))


def test_a_dataset_without_a_batch_size_is_refused(tmp_path):
    job, *_ = begin(tmp_path / "a")
    with pytest.raises(UsageError, match="needs global_batch_size"):
        next(job.batches(points(), epochs=1))


# Misuse.


@pytest.mark.parametrize(
    "thing", [random.SystemRandom(), object()], ids=["of the machine", "no state"]
)
def test_what_has_no_state_cannot_be_tracked(thing, tmp_path):
    job = harness.init(tmp_path / "a")
    with pytest.raises(UsageError, match="cannot be tracked"):
        job.track(generator=thing)


@pytest.mark.parametrize("first", ["batches", "steps"])
def test_a_loop_inside_the_first_is_refused(first, tmp_path):
    job, *_ = begin(tmp_path / "a")
    outer = job.batches(points(), 8, epochs=1) if first == "batches" else job.steps(3)
    next(outer)
    with pytest.raises(UsageError, match="inside the loop"):
        next(job.steps(3))
    with pytest.raises(UsageError, match="inside the loop"):
        next(job.batches(points(), 8, epochs=1))


def test_arguments_that_are_no_such_numbers_are_all_named_before_anything_begins(tmp_path):
    with pytest.raises(UsageError) as caught:
        harness.init(
            tmp_path / "a",
            seed="x",  # type: ignore[arg-type]
            save_every_steps=0,
            keep_last="3",  # type: ignore[arg-type]
            wait_s=None,  # type: ignore[arg-type]
            grace_s=None,
            save_every_s=0.5,
        )
    assert caught.value.what.startswith("4 arguments")
    for words in (
        "seed='x'",
        "save_every_steps=0",
        "keep_last='3'",
        "wait_s=None, expected: a number of seconds from 0 on",
    ):
        assert words in caught.value.found
    assert not (tmp_path / "a").exists()
    job, *_ = begin(tmp_path / "a")
    with pytest.raises(UsageError, match="epochs='3', expected: a whole number above 0"):
        next(job.batches(points(), 8, epochs="3"))  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=r"max_steps=2\.5"):
        next(job.steps(2.5))  # type: ignore[arg-type]


# Under a launcher.

LOOP = """\
import sys
if "--nothing" in sys.argv:
    sys.exit()
import torch, harness

run = harness.init({where!r}, save_every_s=None, save_every_steps=2)
model = torch.nn.Linear(2, 1)
run.track(model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1))
print("arguments", sys.argv[1:], flush=True)
if "--no-loop" in sys.argv:
    sys.exit()
for number in run.steps(4):
    if number == 3 and run.origin is None and "--crash" in sys.argv:
        raise SystemExit("crashed on purpose")
"""
Write = Callable[[str], Path]


@pytest.fixture
def program(tmp_path: Path) -> Write:
    def write(where: str) -> Path:
        (tmp_path / "my_loop.py").write_text(LOOP.format(where=where))
        return tmp_path

    return write


@pytest.mark.slow
def test_launch_starts_a_loop_of_ones_own_with_its_arguments_and_again_after_a_crash(
    program: Write,
) -> None:
    folder = program("runs/a")
    words = (
        "launch",
        "--nproc-per-node",
        "2",
        "run.dir=runs/a",
        "my_loop.py",
        "--config",
        "theirs.yaml",
        "key=value",
        "--crash",
    )
    done = run(harness_command(*words), cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "arguments ['--config', 'theirs.yaml', 'key=value', '--crash']" in done.stdout
    assert (
        "crashed on purpose" in done.stdout + done.stderr
        and "attempt 2 resumes from step 2" in done.stdout
    )
    assert json.loads((folder / "runs/a/attempts/0002.end.json").read_text())["why"] == "finished"
    end = json.loads((folder / "runs/a/attempts/0001.end.json").read_text())
    assert end["why"] == "failed" and "the loop was left at step 4" in end["error"], (
        "that is how it looks from here"
    )
    again = run(harness_command(*words), cwd=folder)
    # It is asked again whether it is longer now, and says that it is not.
    assert again.returncode == 0 and "is finished" in again.stdout, again.stdout
    assert "arguments" in again.stdout and "nothing to do" in again.stdout, again.stdout
    assert not (folder / "runs/a/attempts/0003.json").exists()


@pytest.mark.slow
def test_launch_refuses_to_watch_over_another_run_than_the_loops_own(program: Write) -> None:
    folder = program("runs/other")
    done = run(harness_command("launch", "run.dir=runs/a", "my_loop.py"), cwd=folder)
    assert done.returncode == 78, done.stdout + done.stderr
    assert (
        "the launcher supervises another run" in done.stdout + done.stderr
        and "runs/other" in done.stdout + done.stderr
    )
    assert not (folder / "runs/other").exists()


@pytest.mark.parametrize("how", ["--nothing", pytest.param("--no-loop", marks=pytest.mark.slow)])
def test_a_program_that_trains_without_the_harness_is_not_started_again_for_ever(
    program: Write, how: str
) -> None:
    done = run(
        harness_command("launch", "--nproc-per-node", "2", "run.dir=runs/a", "my_loop.py", how),
        cwd=program("runs/a"),
    )
    assert done.returncode == 78, done.stdout + done.stderr
    assert "no harness loop began in it" in done.stderr and "Traceback" not in done.stderr
    assert done.stdout.count("arguments") == (how == "--no-loop"), "it was started once"


@pytest.mark.parametrize("command", [("launch",), ("submit", "--dry-run")])
def test_a_program_is_not_taken_for_that_of_the_default_run(
    program: Write, command: tuple[str, ...]
) -> None:
    folder = program("runs/a")
    done = run(harness_command(*command, "my_loop.py"), cwd=folder)
    assert (
        done.returncode == 78
        and "which run this program trains" in done.stderr
        and "run.dir=" in done.stderr
    ), done.stderr
    assert not (folder / "runs").exists()


@pytest.mark.parametrize("place", ["dir: runs/digits", "remote: file:///somewhere/else"])
def test_the_run_of_a_program_may_be_named_in_the_file(program: Write, place: str) -> None:
    """The directory may be the one that is the default, too."""
    folder = program("runs/a")
    (folder / "mine.yaml").write_text(f"run:\n  {place}\n")
    done = run(
        harness_command("submit", "--dry-run", "--config", "mine.yaml", "my_loop.py"), cwd=folder
    )
    assert done.returncode == 0 and "my_loop.py" in done.stdout, done.stderr


def test_launch_of_a_loop_that_is_not_there_names_it(tmp_path: Path) -> None:
    done = run(harness_command("launch", "run.dir=runs/a", "my_lop.py"), cwd=tmp_path)
    assert done.returncode == 78 and "my_lop.py" in done.stderr and "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_without_a_launcher_any_run_may_be_begun(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    # Taken away again afterwards, whatever it is then.
    monkeypatch.setenv(launches.SUPERVISED, "null")
    launches.check_supervised(tmp_path, None)
    launches.supervise(str(tmp_path), "s3://bucket/a/")
    launches.check_supervised(tmp_path, "s3://bucket/a")
    with pytest.raises(UsageError, match="another run"):
        launches.check_supervised(tmp_path, None)
