"""Streams, and second sources in one loop: exact after a kill, or refused before training, or
said."""

from __future__ import annotations

import copy
import os
import random
import subprocess
import sys
from multiprocessing.shared_memory import SharedMemory
from typing import Any

import numpy as np
import pytest
import torch
from conftest import REPO
from library_runs import newest
from programs import HEAD, STEP, killed_once, live

import harness
from harness.data import stream_check
from harness.data.stream import StreamSource
from harness.distributed.ranks import World
from harness.errors import UsageError
from harness.exchange.compare import differences

STREAM = """
class Stream(IterableDataset):
    '''Numbers through a shuffle buffer, which its state forgets unless it is KEPT.'''
    def __init__(self, size=96, buffer=8, kept=False):
        self.size, self.buffer, self.kept = size, buffer, kept
        self.at, self.held = 0, []
    def __iter__(self):
        while self.at < self.size or self.held:
            while self.at < self.size and len(self.held) < self.buffer:
                self.held.append(self.at)
                self.at += 1
            number = self.held.pop(int(torch.randint(len(self.held), ())))
            yield torch.full((8,), number / self.size), torch.ones(1)
        self.at = 0
    def state_dict(self):
        return {"at": self.at} | ({"held": list(self.held)} if self.kept else {})
    def load_state_dict(self, state):
        self.at, self.held = state["at"], list(state.get("held", []))
"""
LOOP = (
    """
run = init()
model = nn.Linear(8, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
run.track(model=model, optimizer=optimizer)
for x, y in run.batches(DATA, 8, epochs=2):"""
    + STEP
)


def test_a_stream_whose_state_loses_its_shuffle_buffer_is_refused_before_training(tmp_path):
    lived = live(tmp_path, STREAM + LOOP.replace("DATA", "Stream()"), "whole")
    assert lived.code == 78
    assert "Stream would not go on exactly: its state_dict does not bring back" in lived.text
    assert "check_stream=False" in lived.text and "attempt" not in lived.text


def test_one_whose_state_keeps_it_is_exact_and_trains_as_if_it_had_not_been_tried(tmp_path):
    source = STREAM + LOOP.replace("DATA", "Stream(kept=True)")
    outcome = killed_once(tmp_path, source)
    assert "resumes from step 6" in outcome.resumed.text
    assert outcome.is_equal, outcome.rows
    assert "warning" not in outcome.whole.text
    live(tmp_path, source.replace("epochs=2", "epochs=2, check_stream=False"), "unchecked")
    assert list(differences(newest(tmp_path / "whole"), newest(tmp_path / "unchecked"))) == []
    assert newest(tmp_path / "whole")["format_version"] == 1


def test_generators_that_a_stream_holds_are_seeded_where_that_makes_it_exact(tmp_path):
    source = """
class Noisy(IterableDataset):
    def __init__(self):
        self.at, self.noise = 0, np.random.default_rng(0)
    def __iter__(self):
        while self.at < 96:
            self.at += 1
            yield torch.full((8,), self.at / 96 + self.noise.normal()).float(), torch.ones(1)
        self.at = 0
    def state_dict(self):
        return {"at": self.at}
    def load_state_dict(self, state):
        self.at = state["at"]
"""
    outcome = killed_once(tmp_path, source + LOOP.replace("DATA", "Noisy()"))
    assert outcome.is_equal, outcome.rows
    assert newest(tmp_path / "whole")["data"]["kinds"] == {"sample_rng": "held in the stream"}


def test_a_stream_is_told_its_epoch_before_its_first_sample(tmp_path):
    source = """
class Told(IterableDataset):
    epoch = begin = 0
    def set_epoch(self, epoch):
        self.epoch = epoch
    def __iter__(self):
        order = torch.randperm(96, generator=torch.Generator().manual_seed(self.epoch)).tolist()
        begin = self.begin if self.begun == self.epoch else 0
        for self.at in range(begin, 96):
            yield torch.full((8,), order[self.at] / 96), torch.ones(1)
    begun, at = -1, 0
    def state_dict(self):
        return {"at": self.at + 1, "epoch": self.epoch}
    def load_state_dict(self, state):
        self.begin, self.begun = state["at"], state["epoch"]
"""
    outcome = killed_once(tmp_path, source + LOOP.replace("DATA", "Told()"), die=17)
    assert "resumes from step 15" in outcome.resumed.text
    assert outcome.is_equal, outcome.rows
    assert newest(tmp_path / "whole")["data"]["kinds"] == {"order": "told the epoch"}


class Counting(torch.utils.data.IterableDataset):
    """Numbers from 0 on, pass after pass; its subclasses lose something."""

    size = 1000
    shared = np.random.default_rng(1)

    def __init__(self):
        self.at = 0

    def __iter__(self):
        while self.at < self.size:
            self.at += 1
            yield self.value()
        self.at = 0

    def value(self):
        return torch.tensor(
            [self.at, random.random(), float(np.random.normal()), float(torch.randn(()))]
        )

    def state_dict(self):
        return {"at": self.at}

    def load_state_dict(self, state):
        self.at = state["at"]


class Short(Counting):
    size = 5


class Endless(Counting):
    size = 10**12


class Drawing(Counting):
    def value(self):
        return self.at + self.shared.normal()


class Buffered(Counting):
    """Reads ahead, and tells where it has read to."""

    def __iter__(self):
        for number in super().__iter__():
            self.at = min(self.size, self.at + 3)
            yield number


class Shuffled(Counting):
    """Of an order that a generator of its own gives at the beginning of a pass."""

    def __init__(self):
        self.at, self.generator = 0, np.random.default_rng(0)

    def __iter__(self):
        order = self.generator.permutation(self.size)
        begin = self.at
        for number in order[begin:]:
            self.at += 1
            yield int(number)
        self.at = 0


class Sticking(Counting):
    """Where it was told to begin, every pass begins."""

    begin = 0

    def __iter__(self):
        for number in range(self.begin, self.size):
            self.at = number + 1
            yield number

    def load_state_dict(self, state):
        self.begin = self.at = state["at"]


class StickingShort(Sticking):
    size = 20


class Ahead(Counting):
    """Begins to read ahead when it is restored."""

    def load_state_dict(self, state):
        self.at = state["at"] + 1


class Failing(Counting):
    def load_state_dict(self, state):
        raise KeyError("shard")


def as_it_is(state):
    return state


@pytest.mark.parametrize(
    ("stream", "is_exact", "seeds"),
    [
        (Counting, True, False),
        (Short, True, False),
        (Endless, True, False),
        (Drawing, True, True),
        (Shuffled, False, False),
        (Sticking, False, False),
        (StickingShort, False, False),
        (Ahead, False, False),
        (Failing, False, False),
    ],
)
def test_what_a_state_loses_is_found(stream, is_exact, seeds):
    dataset, state = stream(), copy.deepcopy(stream().__dict__)
    before = (
        random.getstate(),
        np.random.get_state(legacy=False)["state"]["key"].tolist(),
        torch.get_rng_state().tolist(),
        Counting.shared.bit_generator.state,
    )
    tried = stream_check.attempt(dataset, as_it_is)
    assert (tried.is_exact, tried.seeds, tried.untried) == (is_exact, seeds, "")
    assert bool(tried.unlike) != is_exact
    after = (
        random.getstate(),
        np.random.get_state(legacy=False)["state"]["key"].tolist(),
        torch.get_rng_state().tolist(),
        Counting.shared.bit_generator.state,
    )
    assert before == after and dataset.at == state["at"] == 0


def source_of(dataset):
    return StreamSource(dataset, World(0, 1, torch.device("cpu"), 10), 4, 1, as_it_is, 1)


def test_what_cannot_be_tried_is_said():
    class Locked(Counting):
        def __init__(self):
            super().__init__()
            self.file = open("/dev/null")  # noqa: SIM115

    class Sharing(Counting):
        def __init__(self, memory):
            super().__init__()
            self.memory = [memory]

    memory = SharedMemory(create=True, size=8)
    try:
        for stream in (Locked(), Sharing(memory)):
            assert "could not be tried" in stream_check.prove(source_of(stream), as_it_is)
    finally:
        memory.close()
        memory.unlink()


def test_a_slow_stream_is_tried_within_its_time():
    now = [0.0]

    class Slow(Counting):
        takes_s: float

        def value(self):
            now[0] += self.takes_s
            return self.at

    Slow.takes_s = 0.1
    assert stream_check.attempt(Slow(), as_it_is, clock=lambda: now[0]) == stream_check.Tried()
    assert now[0] < stream_check.BUDGET_S
    Slow.takes_s = 2.0
    began = now[0]
    assert "too slowly" in stream_check.attempt(Slow(), as_it_is, clock=lambda: now[0]).untried
    assert now[0] - began < stream_check.BUDGET_S


@pytest.mark.parametrize("stream", [Counting, Drawing])
@pytest.mark.parametrize("seeds", [False, True])
@pytest.mark.parametrize("takes_s", [0.0, 2.0])
def test_a_resumed_run_reads_a_stream_as_it_began_however_fast_it_is(stream: Any, seeds, takes_s):
    now = [0.0]

    class Timed(stream):
        def value(self):
            now[0] += takes_s
            return super().value()

    source = source_of(Timed())
    source.reading.seeds_held = seeds
    if stream is Drawing and not (seeds or takes_s):
        with pytest.raises(UsageError, match="would not go on exactly"):
            stream_check.prove(source, as_it_is, is_new=False, clock=lambda: now[0])
    else:
        note = stream_check.prove(source, as_it_is, is_new=False, clock=lambda: now[0])
        assert ("too slowly" in note) == bool(takes_s)
    assert source.reading.seeds_held == seeds


def test_a_large_array_is_not_copied_and_not_written_to():
    class Large(Counting):
        def __init__(self):
            super().__init__()
            self.numbers = np.arange(1 << 18)

        def __iter__(self):
            np.random.shuffle(self.numbers)
            yield from super().__iter__()

    dataset = Large()
    assert "ValueError" in stream_check.attempt(dataset, as_it_is).untried
    assert dataset.numbers[:3].tolist() == [0, 1, 2]


def test_a_refusal_says_what_to_do():
    with pytest.raises(UsageError, match="would not go on exactly") as caught:
        stream_check.prove(source_of(Sticking()), as_it_is)
    assert "what the next pass gives is another one" in str(
        caught.value
    ) and "check_stream=False" in str(caught.value)


BESIDE = """
class Numbered(Dataset):
    def __init__(self, size, scale):
        self.size, self.scale = size, scale
    def __len__(self):
        return self.size
    def __getitem__(self, index):
        return torch.full((8,), (index + random.random()) * self.scale)

OTHERS

if __name__ == "__main__":
    run = init()
    model = nn.Linear(8, 1)
    if run.world_size > 1:
        model = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    run.track(model=model, optimizer=optimizer)
    seen = []
    for x, more in run.batches(Numbered(80, 0.01), 8, epochs=2, beside=MORE):
        seen.append(sorted(more))
        loss = sum((model(value) - 1).square().mean() for value in (x, *more.values()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        run.log(loss=loss)
        die(run)
    assert all(names == ["stream", "unlabelled"] for names in seen)
"""
MORE = (
    '{"unlabelled": DataLoader(Numbered(50, 0.02), 6, shuffle=True, num_workers=WORKERS), '
    '"stream": Stream(size=40, kept=True)}'
)


@pytest.mark.parametrize(("ranks", "workers"), [(1, 2), (2, 0)])
def test_second_sources_go_on_where_they_were(tmp_path, ranks, workers):
    stream = STREAM.replace(
        "yield torch.full((8,), number / self.size), torch.ones(1)",
        "yield torch.full((8,), number / self.size)",
    )
    source = BESIDE.replace("OTHERS", stream).replace("MORE", MORE.replace("WORKERS", str(workers)))
    outcome = killed_once(tmp_path, source, die=17, ranks=ranks)
    assert "resumes from step 15" in outcome.resumed.text
    assert outcome.is_equal, outcome.rows
    assert "warning" not in outcome.whole.text + outcome.resumed.text
    data = newest(tmp_path / "whole")["data"]
    steps = 50 // (6 * ranks)
    assert data["beside_at"] == {
        "unlabelled": [20 // steps, 20 % steps * 6 * ranks],
        "stream": [20 // (5 * ranks), 20 % (5 * ranks) * 8],
    }
    assert newest(tmp_path / "whole")["format_version"] == 2
    without = live(
        tmp_path, BESIDE.replace("OTHERS", "").replace("MORE", "{}"), "killed", ranks=ranks
    )
    assert without.code == 78 and "beside" in without.text


class Numbers(torch.utils.data.Dataset):
    def __init__(self, size):
        self.size = size

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        return index


def pairs(directory, leave_at=None, **options):
    run = harness.init(directory, seed=3, save_every_s=None, save_every_steps=1)
    run.track(model=torch.nn.Linear(1, 1))
    found = []
    for step in run.batches(Numbers(10), 2, epochs=3, beside={"more": Numbers(7)}, **options):
        found.append(step)
        if run.step == leave_at:
            break
    return found


def test_a_second_source_goes_round_in_epochs_of_its_own(tmp_path):
    found = pairs(tmp_path / "a")
    assert len(found) == 15
    for at in range(0, 15, 3):
        once = torch.cat([more["more"] for _, more in found[at : at + 3]]).tolist()
        assert len(set(once)) == 6 and set(once) <= set(range(7))
    assert [more["more"].tolist() for _, more in found[:3]] != [
        more["more"].tolist() for _, more in found[3:6]
    ]
    pairs(tmp_path / "b", leave_at=8)
    again = pairs(tmp_path / "b")
    assert [(x.tolist(), more["more"].tolist()) for x, more in again] == [
        (x.tolist(), more["more"].tolist()) for x, more in found[7:]
    ]


def test_with_micro_batches_each_comes_with_its_own(tmp_path):
    step = pairs(tmp_path / "a", leave_at=1, accumulate=2)[0]
    assert [(len(x), len(more["more"])) for x, more in step] == [(1, 1), (1, 1)]


READ_BESIDE = """
from itertools import cycle
run = init()
model = nn.Linear(8, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
run.track(model=model, optimizer=optimizer)
loader = DataLoader(points(48), 8, num_workers=WORKERS, persistent_workers=WORKERS > 0)
def update(x, y):
    loss = (model(x) - y).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    run.log(loss=loss)
"""
OPEN = {
    "zip": (
        "for (x, y), (a, b) in zip(run.batches(points(), 16, epochs=1), cycle(loader)):\n"
        "    update(x, y)"
    ),
    "live iterator": "it = iter(loader)\nfor step in run.steps(5):\n    update(*next(it))",
}
CLOSED = {
    "evaluation": (
        "for x, y in run.batches(points(), 16, epochs=1):\n    update(x, y)\n"
        "    for a, b in loader: model(a)"
    ),
    "left early": (
        "for x, y in run.batches(points(), 16, epochs=1):\n    update(x, y)\n"
        "    for a, b in loader: break"
    ),
    "of the run": "for x, y in run.batches(loader, epochs=1):\n    update(x, y)",
    "one batch kept": (
        "it = iter(loader); shown = next(it)\n"
        "for x, y in run.batches(points(), 16, epochs=1):\n    update(x, y)"
    ),
}


@pytest.mark.parametrize(("name", "workers"), [("zip", 0), ("live iterator", 2)])
def test_a_loader_that_is_read_across_steps_is_named_once(tmp_path, name, workers):
    lived = live(tmp_path, READ_BESIDE.replace("WORKERS", str(workers)) + OPEN[name], "whole")
    assert lived.code == 0
    assert (
        lived.text.count(
            "a DataLoader over TensorDataset that is not the run's"
            " is read across steps (program.py:"
        )
        == 1
    )


@pytest.mark.parametrize("workers", [0, 1])
def test_one_that_is_read_within_a_step_is_not(tmp_path, workers):
    for name, loop in CLOSED.items():
        lived = live(
            tmp_path, READ_BESIDE.replace("WORKERS", str(workers)) + loop, name.replace(" ", "")
        )
        assert lived.code == 0 and "warning" not in lived.text, (name, lived.text)


def test_a_stream_that_shuffles_a_large_tensor_in_place_is_not_changed_by_being_tried(tmp_path):
    source = """
class Shuffled(IterableDataset):
    def __init__(self):
        self.numbers, self.at = torch.arange(300_000, dtype=torch.float64), 0
    def __iter__(self):
        while self.at < 96:
            self.numbers.copy_(self.numbers[torch.randperm(len(self.numbers))])
            self.at += 1
            yield torch.full((8,), self.numbers[0].item() / 3e5), torch.zeros(1)
    def state_dict(self):
        return {"at": self.at}
    def load_state_dict(self, state):
        self.at = state["at"]
run = init()
data, model = Shuffled(), nn.Linear(8, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
run.track(model=model, optimizer=optimizer)
try:
    next(iter(run.batches(data, 8, epochs=1)))
finally:
    print(
        "as it was"
        if data.at == 0 and torch.equal(data.numbers, torch.arange(300_000.0))
        else "changed"
    )
"""
    lived = live(tmp_path, source, "whole")
    assert "as it was" in lived.text, lived.text


def on_its_own(folder, source, limit_s=120, **env):
    """The program in a process that nothing was loaded into before."""
    path = folder / "program.py"
    path.write_text(HEAD.replace("from programs import die", "") + source)
    command = [sys.executable, str(path), str(folder / "a")]
    return subprocess.run(
        command,
        env=os.environ | env,
        timeout=limit_s,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


BEGINS = """
class Numbers(Dataset):
    def __len__(self):
        return 64
    def __getitem__(self, at):
        return torch.randn(8), torch.randn(1)
run = init()
model = nn.Linear(8, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
BEFORE
run.track(model=model, optimizer=optimizer)
for x, y in run.batches(Numbers(), 8, epochs=1, num_workers=2):
    pass
"""
ENDS = {
    "a stop": ("os.kill(os.getpid(), signal.SIGTERM)", 0, "stopped before training began"),
    # What is set when all else has begun.
    "an error": ("type(run)._throughput = property(lambda self: None)", 1, "AttributeError"),
}


@pytest.mark.parametrize("end", ENDS)
def test_what_ends_when_its_workers_live_and_before_its_first_step_does_not_wait_for_them(
    tmp_path, end
):
    """Workers outlive the signals of their rank, and so the one by which multiprocessing ends them
    as well."""
    before, code, said = ENDS[end]
    ended = on_its_own(tmp_path, BEGINS.replace("BEFORE", before), limit_s=60)
    assert ended.returncode == code and said in ended.stdout, ended.stdout
    assert "AssertionError" not in ended.stdout


@pytest.mark.parametrize("name", ["of the run", "evaluation"])
def test_the_runs_own_is_not_where_the_package_is_installed(tmp_path, name):
    installed = tmp_path / "lib/site-packages"
    installed.mkdir(parents=True)
    (installed / "harness").symlink_to(REPO / "harness")
    source = READ_BESIDE.replace("WORKERS", "1") + CLOSED[name] + "\nprint(harness.__file__)"
    ended = on_its_own(tmp_path, source, PYTHONPATH=str(installed))
    assert ended.returncode == 0 and str(installed) in ended.stdout, ended.stdout
    assert "warning" not in ended.stdout


def test_a_loader_with_a_state_is_a_stream_of_its_batches(tmp_path):
    source = STREAM.replace("class Stream(", "class Numbers(") + """
class Resumable(DataLoader):
    def state_dict(self):
        return self.dataset.state_dict()
    def load_state_dict(self, state):
        self.dataset.load_state_dict(state)
""" + LOOP.replace("DATA, 8", "Resumable(Numbers(kept=True), 8)")  # fmt: skip
    outcome = killed_once(tmp_path, source, die=17)
    assert "resumes from step 15" in outcome.resumed.text
    assert outcome.is_equal, outcome.rows
    assert newest(tmp_path / "whole")["step"] == 24
