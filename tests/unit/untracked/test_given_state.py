"""Of what a tracked object of the program's own holds, only what its state_dict gives is kept: the
rest is named, and what is given is not, in whatever form."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from programs import live

from harness.untracked.given_state import GivenState

PROGRAM = """
import copy, json
from collections import deque

class Own:
    def __init__(self, **values):
        self.__dict__ |= values
    def state_dict(self):
        return {"level": self.level}
    def load_state_dict(self, state):
        self.level = state["level"]

class Whole(Own):
    def state_dict(self):
        return GIVEN
    def load_state_dict(self, state):
        raise NotImplementedError

class Mean:
    def __init__(self, model):
        self.of = {name: tensor.data.clone() for name, tensor in model.named_parameters()}
    def update(self, model):
        for name, tensor in model.named_parameters():
            self.of[name] = 0.9 * self.of[name] + 0.1 * tensor.data

def main():
    run = init()
    model = nn.Linear(8, 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    own = CLASS(
        level=100.5,
        losses=deque(maxlen=50),
        mean=torch.zeros(3),
        sums=np.zeros(4),
        nested={"of": {"count": 7}},
        average=Mean(model),
        teacher=copy.deepcopy(model),
        rngs=[np.random.default_rng(3)],
        model=model,
        run=run,
        batch=None,
        unused=[1, 2, 3],
    )
    run.track(model=model, optimizer=optimizer, own=own)
    losses = own.losses
    for x, y in run.batches(points(), 16, epochs=2):
        loss = (model(x) - y).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        own.level += 1
        own.losses.append(loss.item())
        own.mean += 1
        own.sums += 1
        own.nested["of"]["count"] += 1
        own.average.update(model)
        own.teacher.weight.data.lerp_(model.weight.data, 0.5)
        own.rngs[0].random()
        own.batch = x.detach()
        run.log(loss=loss)

main()
"""
LOST = ["average", "losses", "mean", "nested['of']['count']", "rngs[0]", "sums", "teacher"]
GIVEN = {
    "itself": (
        "{**{k: vars(self)[k] for k in ('level', 'losses', 'mean', 'sums', 'nested')}, "
        "'average': self.average.of, 'teacher': self.teacher.state_dict(), "
        "'rng': self.rngs[0].bit_generator.state}"
    ),
    "copies": (
        "copy.deepcopy({**{k: vars(self)[k] for k in ('level', 'mean', 'sums', 'nested')}, "
        "'losses': list(self.losses), "
        "'average': self.average.of, 'teacher': self.teacher.state_dict(), "
        "'rng': self.rngs[0].bit_generator.state})"
    ),
    "other forms": (
        "{'level': torch.tensor(self.level), 'losses': torch.tensor(self.losses), "
        "'mean': self.mean.tolist(), 'sums': torch.from_numpy(self.sums.copy()), "
        "'counts': json.dumps({**self.nested, 'of a long text': 'that is JSON' * 9}), "
        "'average': list(map(torch.clone, self.average.of.values())), "
        "'teacher': [p.detach().clone() for p in self.teacher.parameters()], "
        "'rng': repr(self.rngs[0].bit_generator.state)}"
    ),
}


def named(tmp_path, kind, given=""):
    lived = live(tmp_path, PROGRAM.replace("CLASS", kind).replace("GIVEN", given or "{}"), "a")
    assert lived.code == 0, lived.text
    assert "cannot be looked for" not in lived.text
    events = [
        json.loads(line) for line in (tmp_path / "a/events/0001.jsonl").read_text().splitlines()
    ]
    return sorted(
        name.rpartition(": ")[2].removeprefix("own.").partition(" (")[0]
        for event in events
        if event["event"] in ("carried", "untracked")
        for name in event["names"]
    )


def test_what_a_tracked_object_leaves_out_of_its_state_dict_is_named(tmp_path):
    assert named(tmp_path, "Own") == LOST


@pytest.mark.parametrize("given", GIVEN.values(), ids=GIVEN)
def test_what_a_tracked_object_gives_is_not_named(tmp_path, given):
    assert named(tmp_path, "Whole", given) == []


class Holder:
    def __init__(self, state):
        self.state = state

    def state_dict(self):
        return self.state


@pytest.mark.parametrize(
    ("state", "value", "is_given"),
    [
        ({"n": 3}, 3, True),
        ({"n": 3}, 3.0, True),
        ({"n": 1}, True, False),
        ({"n": float("nan")}, float("nan"), True),
        ({"n": np.float64(0.1)}, 0.1, True),
        ({"n": 0.1}, 0.2, False),
        ({"ids": [3, 1, 2]}, {1, 2, 3}, True),
        ({"ids": [3, 1, 2]}, [1, 2], False),
        ({"ids": [3, 1, 2]}, [], True),
        ({"rng": torch.arange(9)}, [1, 2], False),
        ({"rows": torch.ones(3, 2)}, [torch.ones(2)] * 3, True),
        ({"rows": torch.ones(3, 2)}, [torch.zeros(2)] * 3, False),
        ({"w": torch.ones(3)}, torch.ones(3).double(), True),
        ({"w": torch.cat([torch.ones(99), torch.zeros(1)])}, torch.ones(100), False),
        ({"w": torch.ones(3)}, torch.ones(4), False),
        ({"w": torch.zeros(2, 0)}, torch.zeros(2, 0), True),
        ({"records": [{"a": 1, "b": 2}]}, [Holder(1)], False),
        ({"records": [{"a": 1}, {"a": 2}]}, [Holder(1), Holder(2)], True),
    ],
)
def test_a_value_is_given_in_whatever_form(state, value, is_given):
    assert GivenState({"own": Holder(state)}).has(value) == is_given
