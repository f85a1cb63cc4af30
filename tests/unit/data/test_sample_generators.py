"""Generators that datasets, transforms and collate functions hold: after a kill the samples are
those that would have come."""

from __future__ import annotations

import functools
import random
from typing import Any

import numpy as np
import pytest
import torch
from library_runs import newest
from programs import STEP, killed_once

from harness.data.held_generators import Randomness, find

LOOP = (
    """
run = init()
model = nn.Linear(8, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
run.track(model=model, optimizer=optimizer)
for x, y in run.batches(DATA, epochs=2):"""
    + STEP
)
NOISY = """
class Noisy(Dataset):
    def __init__(self):
        self.x, self.y = points().tensors
        self.noise = MADE
    def __len__(self):
        return len(self.x)
    def __getitem__(self, index):
        return self.x[index] + self.draw(), self.y[index]
    def draw(self):
        return DRAWN
"""
HELD = {
    "numpy": ("np.random.default_rng(0)", "float(self.noise.normal())", 0),
    "legacy, in workers": ("np.random.RandomState(0)", "float(self.noise.normal())", 2),
    "torch": ("torch.Generator().manual_seed(0)", "torch.randn((), generator=self.noise)", 0),
    "python, in a transform": (
        "[lambda value, mine=random.Random(0): mine.random()]",
        "self.noise[0](1)",
        0,
    ),
    "made with the first sample": (
        "None",
        "self.__dict__.setdefault('made', np.random.default_rng()).normal()",
        2,
    ),
}


@pytest.mark.parametrize("name", HELD)
def test_samples_that_draw_from_a_generator_that_is_held_are_the_same_after_a_kill(tmp_path, name):
    made, drawn, workers = HELD[name]
    data = f"DataLoader(Noisy(), 16, shuffle=True, num_workers={workers})"
    source = NOISY.replace("MADE", made).replace("DRAWN", drawn) + LOOP.replace("DATA", data)
    outcome = killed_once(tmp_path, source)
    assert "resumes from step 6" in outcome.resumed.text
    assert outcome.is_equal, outcome.rows
    assert "differ each time" not in outcome.whole.text


def test_a_collate_function_and_a_global_of_the_program_too(tmp_path):
    source = """
generator = np.random.default_rng(0)

def mixed(samples, weights=np.random.default_rng(1)):
    x, y = map(torch.stack, zip(*samples))
    weight = weights.beta(1.0, 1.0)
    return (x * weight + x.flip(0) * (1 - weight)).float(), y

class Noisy(Dataset):
    def __len__(self):
        return 160
    def __getitem__(self, index):
        return torch.full((8,), index / 160 + generator.normal()).float(), torch.ones(1)
"""
    outcome = killed_once(tmp_path, source + LOOP.replace("DATA", "Noisy(), 16, collate_fn=mixed"))
    assert outcome.is_equal, outcome.rows
    assert newest(tmp_path / "whole")["data"]["kinds"] == {"sample_rng": "held"}
    assert newest(tmp_path / "whole")["format_version"] == 2


@pytest.mark.parametrize("collate", ["lambda samples: mixed(samples)", "mixer()"])
def test_a_collate_function_that_cannot_be_pickled_is_used_by_workers(tmp_path, collate):
    source = """
def mixed(samples, weights=np.random.default_rng(1)):
    x, y = map(torch.stack, zip(*samples))
    weight = weights.beta(1.0, 1.0)
    return (x * weight + x.flip(0) * (1 - weight)).float(), y

def mixer():
    class Mixer:
        def collate(self, samples):
            return mixed(samples)
    return Mixer().collate
"""
    data = f"points(160), 16, num_workers=2, collate_fn={collate}"
    outcome = killed_once(tmp_path, source + LOOP.replace("DATA", f"DataLoader({data})"))
    assert outcome.is_equal, outcome.rows
    assert newest(tmp_path / "whole")["data"]["kinds"] == {"sample_rng": "held"}


def test_samples_that_differ_each_time_all_the_same_are_told_at_the_start(tmp_path):
    source = NOISY.replace("MADE", "random.SystemRandom()").replace("DRAWN", "self.noise.random()")
    outcome = killed_once(tmp_path, source + LOOP.replace("DATA", "Noisy(), 16"))
    assert "warning: samples of Noisy differ each time they are loaded" in outcome.whole.text
    assert "Draw from the global generators" in outcome.whole.text


def test_a_program_without_such_generators_keeps_its_file(tmp_path):
    source = NOISY.replace("MADE", "0").replace("DRAWN", "random.random()")
    outcome = killed_once(tmp_path, source + LOOP.replace("DATA", "Noisy(), 16"))
    assert outcome.is_equal, outcome.rows
    assert "warning" not in outcome.whole.text + outcome.resumed.text
    payload = newest(tmp_path / "whole")
    assert "kinds" not in payload["data"] and payload["format_version"] == 1


def test_a_run_that_began_without_seeding_them_goes_on_so_and_says_it(tmp_path):
    """As an older harness has left it: without `kinds`, and with a fingerprint that knows no
    content."""
    from harness.data.fingerprint import describe

    data = describe(Holding(), 4, True, True, 0)
    old = {name: value for name, value in data.items() if name != "kinds"} | {
        "fingerprint": "Holding, its samples differ each time they are loaded"
    }
    assert data["kinds"] == {"sample_rng": "held"}
    assert describe(Holding(), 4, True, True, 0, before=data) == data
    assert describe(Holding(), 4, True, True, 0, before=old) == old


class Holding:
    shared = np.random.default_rng(5)

    def __init__(self):
        self.transforms: list[Any] = [
            functools.partial(print, noise=np.random.RandomState(1)),
            {"inner": random.Random(1)},
        ]
        mine = torch.Generator()
        self.function = lambda: mine
        self.again = self.transforms[0].keywords["noise"]
        self.globals = torch.default_generator, np.random.mtrand._rand, random._inst

    def __len__(self):
        return 4

    def __getitem__(self, index):
        return index + self.shared.normal() + self.transforms[1]["inner"].random()


def test_each_is_found_once_wherever_it_is_held():
    found = find({"dataset": Holding()})
    assert [type(one.generator).__name__ for one in found] == [
        "RandomState",
        "Generator",
        "Generator",
        "Random",
    ]
    assert [one.path for one in found] == [
        "dataset.again",
        "dataset.shared",
        "dataset.function: mine",
        "dataset.transforms[1]['inner']",
    ]


def test_a_large_dataset_is_not_walked_item_by_item():
    class Large:
        def __init__(self):
            self.files = [[f"{at}.png"] for at in range(300_000)]
            self.generator = random.Random(0)

    assert [one.path for one in find({"dataset": Large()})] == ["dataset.generator"]


def test_each_is_seeded_in_its_own_way_and_left_as_it_was():
    holding = Holding()
    randomness = Randomness({"dataset": holding})
    assert randomness.look() and not randomness.look()
    before = (
        holding.shared.bit_generator.state,
        holding.again.get_state()[1].tolist(),
        holding.transforms[1]["inner"].getstate(),
    )
    drawn = []
    with randomness.kept():
        for _ in range(2):
            randomness.seed(1, "sample", 0, 3)
            drawn.append(
                (
                    holding.shared.normal(),
                    holding.again.normal(),
                    holding.transforms[1]["inner"].gauss(0, 1),
                )
            )
    assert drawn[0] == drawn[1] and len(set(drawn[0])) == 3
    assert before == (
        holding.shared.bit_generator.state,
        holding.again.get_state()[1].tolist(),
        holding.transforms[1]["inner"].getstate(),
    )
