"""What the program makes of restored state before its loop is told from what it makes alike at each
start."""

from __future__ import annotations

import json

import numpy as np
import torch
from programs import STEP, live
from torch import nn

from harness.selfcheck.start_values import MOST, digests_of

PROGRAM = (
    """
import copy
class Holder:
    pass
def main():
    run = init()
    model = nn.Linear(8, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    data = points()
    first, noise, table = copy.deepcopy(model), torch.randn(8), np.arange(9.0)
    run.track(model=model, optimizer=optimizer)
    teacher, after, began, pid = copy.deepcopy(model), torch.rand(4), time.time(), os.getpid()
    view, wrapped = model.weight.data[0], nn.ModuleList([model])
    numbers = model.weight.detach().numpy()
    holder = Holder()
    holder.centre = model(data.tensors[0])[:9].detach()
    anchors = {name: value.detach().clone() for name, value in model.named_parameters()}
    norms = [value.norm().item() for value in model.parameters()]
    for x, y in run.batches(data, 16, epochs=1):
"""
    + STEP.replace("\n    ", "\n        ")
    + "main()\n"
)
OTHER = {"teacher", "holder.centre", "norms", "anchors['weight']"}


def test_what_is_made_of_restored_state_before_the_loop_is_named_at_each_restart(tmp_path):
    lives = [live(tmp_path, PROGRAM, "a", env={"DIE": str(step)}) for step in (5, 8)]
    lives.append(live(tmp_path, PROGRAM, "a"))
    assert [one.code for one in lives] == [-9, -9, 0], lives[-1].text
    assert "not as when the run began" not in lives[0].text
    for one in lives[1:]:
        (line,) = [text for text in one.text.splitlines() if "not as when the run began" in text]
        names = line.partition(": not as when the run began: ")[2].partition(". It is")[0]
        assert set(names.replace("program.py: main(): ", "").split(", ")) == OTHER
    for number in (1, 2, 3):
        lines = (tmp_path / f"a/events/{number:04d}.jsonl").read_text().splitlines()
        found = [json.loads(line) for line in lines if '"held_at_start"' in line]
        assert len(found) == 1 and found[0]["digests"]["program.py: main(): table"]


def test_what_is_compared_is_bounded_and_never_the_runs_failure():
    class Odd(nn.Module):
        def parameters(self, recurse: bool = True):
            raise LookupError

    tracked = torch.randn(4)
    own = {str(at): (None, torch.zeros(2)) for at in range(MOST + 5)}
    assert len(digests_of(own, ())) == MOST
    odd = {"odd": Odd(), "one": torch.zeros(1), "meta": torch.zeros(2, device="meta"), "n": [1, 2]}
    odd |= {"tracked": tracked, "texts": np.array(["a", "b"]), "view": tracked.numpy()}
    held = {tracked.data_ptr()}
    assert digests_of({name: (None, value) for name, value in odd.items()}, held) == {}
