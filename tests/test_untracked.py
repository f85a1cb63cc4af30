"""What lives and is not tracked is named with the path to it; of what is tracked, and of an evaluation's, nothing is said."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from programs import live

PROGRAM = """
BEFORE
def main():
    run = init()
    model = nn.Linear(8, 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    data = points()
    SETUP
    run.track(model=model, optimizer=optimizer)
    for x, y in run.batches(data, 16, epochs=2):
        loss = (model(x) - y).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        STEP
        run.log(loss=loss)
    print("suspects:", run.suspects)

main()
"""

AUGMENT = """
class Augment:
    def __init__(self, rng):
        self.inner = {"rng": rng}
    def __call__(self, x):
        return x
"""


def named(tmp_path, setup="", step="pass", before=AUGMENT):
    source = PROGRAM.replace("BEFORE", before).replace("SETUP", setup).replace("STEP", step)
    lived = live(tmp_path, source, "whole")
    assert lived.code == 0, lived.text
    lines = [line for line in lived.text.splitlines() if "not tracked, so lost" in line]
    events = [json.loads(line) for line in (tmp_path / "whole/events/0001.jsonl").read_text().splitlines()]
    names = [name for event in events if event["event"] == "untracked" for name in event["names"]]
    assert f"suspects: {names}" in lived.text
    assert len(lines) == sum(event["event"] == "untracked" for event in events)
    return names


FOUND = {
    "aug = Augment(np.random.default_rng(0))": ("aug.inner['rng'].random()", "aug.inner['rng'] (Generator)"),
    "legacy = np.random.RandomState(0)": ("legacy.rand()", "legacy (RandomState)"),
    "python = Augment(random.Random(0))": ("python.inner['rng'].random()", "python.inner['rng'] (Random)"),
    "rngs = [torch.Generator()]": ("torch.rand(1, generator=rngs[0])", "rngs[0] (Generator)"),
    "noise = (lambda rng: lambda: rng.random())(np.random.default_rng(0))": ("noise()", "noise.rng (Generator)"),
    "data = Noisy()": ("pass", None),  # its generator is seeded for each sample
    "schedule = torch.optim.lr_scheduler.StepLR(optimizer, 3)": ("schedule.step()", "schedule (StepLR)"),
    "other = torch.optim.SGD([nn.Parameter(torch.zeros(1))], 0.1)": ("other.step()", "other (SGD)"),
    "ema = torch.optim.swa_utils.AveragedModel(model)": ("ema.update_parameters(model)", "ema (AveragedModel)"),
    "scaler = torch.amp.GradScaler('cpu')": ("pass", "scaler (GradScaler)"),
    "mine = {'sampler': Draws(data)}": ("pass", "mine['sampler'] (Draws)"),
}

MORE = (
    AUGMENT
    + """
class Noisy(Dataset):
    def __init__(self):
        self.rng = np.random.default_rng(0)
    def __len__(self):
        return 160
    def __getitem__(self, number):
        return torch.full((8,), self.rng.random()).float(), torch.zeros(1)

class Draws(Sampler):
    def __init__(self, data):
        self.data = data
    def state_dict(self):
        return {"at": 1}
    def load_state_dict(self, state):
        pass
"""
)


def test_what_lives_and_is_not_tracked_is_named_with_the_path_to_it(tmp_path):
    setup, step = "; ".join(FOUND), "; ".join(step for step, _ in FOUND.values())
    assert sorted(named(tmp_path, setup, step, MORE)) == sorted(f"program.py: main(): {path}" for _, path in FOUND.values() if path)


def test_a_generator_of_the_module_that_is_drawn_from_later_is_named_then(tmp_path):
    step = "run.step > 5 and RNG.random()"
    assert named(tmp_path, "", step, "RNG = np.random.default_rng(0)") == ["program.py: RNG (Generator)"]


QUIET = {
    "drawn before": "rng = np.random.default_rng(0); rng.random(); g = torch.Generator().manual_seed(0); w = torch.rand(3, generator=g)",
    "another optimizer": "other = torch.optim.SGD(model.parameters(), 0.1); late = torch.optim.lr_scheduler.StepLR(other, 3)",
    "evaluation": "held = DataLoader(points(), 8, shuffle=True, generator=torch.Generator()); val = Noisy()",
    "a tracked object's": "holder = Holder(); run.track(holder=holder); inner = holder.rng",
    "no scaling": "scaler = torch.amp.GradScaler('cpu', enabled=False)",
    "global ones": "a, b, c = random._inst, np.random.mtrand._rand, torch.default_generator",
    "parts of a tracked schedule": "one, two = [torch.optim.lr_scheduler.StepLR(optimizer, n) for n in (2, 3)]",
    "that schedule": "run.track(both=torch.optim.lr_scheduler.SequentialLR(optimizer, [one, two], [3]))",
}
HOLDER = (
    MORE
    + """
class Holder:
    def __init__(self):
        self.rng = np.random.default_rng(0)
    def state_dict(self):
        return {"rng": repr(self.rng.bit_generator.state)}
    def load_state_dict(self, state):
        pass
"""
)


def test_nothing_is_said_of_what_need_not_be_tracked(tmp_path):
    step = "val[0]; holder.rng.random(); random.random(); np.random.rand(); torch.rand(1); list(held)"
    assert named(tmp_path, "; ".join(QUIET.values()), step, HOLDER) == []


def test_what_the_program_lets_go_is_not_kept_alive(tmp_path):
    before = "import weakref\nclass Big:\n    pass\n"
    step = "if run.step == 1:\n            del big\n            assert seen() is None"
    assert named(tmp_path, "big = Big(); seen = weakref.ref(big)", step, before) == []


LOOPS = Path(__file__).parent / "loops"


@pytest.mark.parametrize("loop", ["ddp.py", *(pytest.param(name, marks=pytest.mark.slow) for name in ("gan.py", "gpt.py", "stream.py"))])
def test_no_loop_of_ours_is_suspected(tmp_path, loop):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1])}
    env = os.environ | alone | {"PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, str(LOOPS / loop)], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert not re.search(
        "not tracked, so lost|not rehearsed|would fail or not be exact|another one on each rank", done.stdout + done.stderr
    )
