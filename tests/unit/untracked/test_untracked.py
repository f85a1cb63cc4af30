"""What lives and is not tracked is named with the path to it; of what is tracked, and of an
evaluation's, nothing is said."""

from __future__ import annotations

import json
import os
import re
import runpy
import subprocess
import sys
import time

import pytest
from conftest import REPO
from programs import STEP, live
from s3_server import free_ports

from harness.untracked import program_values
from harness.untracked.object_walk import TimeLimit

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
    events = [
        json.loads(line) for line in (tmp_path / "whole/events/0001.jsonl").read_text().splitlines()
    ]
    names = [name for event in events if event["event"] == "untracked" for name in event["names"]]
    assert f"suspects: {names}" in lived.text
    assert len(lines) == sum(event["event"] == "untracked" for event in events)
    return names


FOUND = {
    "aug = Augment(np.random.default_rng(0))": (
        "aug.inner['rng'].random()",
        "aug.inner['rng'] (Generator)",
    ),
    "legacy = np.random.RandomState(0)": ("legacy.rand()", "legacy (RandomState)"),
    "python = Augment(random.Random(0))": (
        "python.inner['rng'].random()",
        "python.inner['rng'] (Random)",
    ),
    "rngs = [torch.Generator()]": ("torch.rand(1, generator=rngs[0])", "rngs[0] (Generator)"),
    "noise = (lambda rng: lambda: rng.random())(np.random.default_rng(0))": (
        "noise()",
        "noise.rng (Generator)",
    ),
    "data = Noisy()": ("pass", None),  # its generator is seeded for each sample
    "schedule = torch.optim.lr_scheduler.StepLR(optimizer, 3)": (
        "schedule.step()",
        "schedule (StepLR)",
    ),
    "other = torch.optim.SGD([nn.Parameter(torch.zeros(1))], 0.1)": ("other.step()", "other (SGD)"),
    "ema = torch.optim.swa_utils.AveragedModel(model)": (
        "ema.update_parameters(model)",
        "ema (AveragedModel)",
    ),
    "scaler = torch.amp.GradScaler('cpu')": ("pass", "scaler (GradScaler)"),
    "mine = {'sampler': Draws(data)}": ("pass", "mine['sampler'] (Draws)"),
    "teacher = nn.Linear(8, 1)": (
        "teacher.weight.data.lerp_(model.weight.data, 0.5)",
        "teacher (Linear)",
    ),
    "criterion = Centred()": ("criterion(x)", "criterion (Centred)"),
    "mean = Mean(model)": ("mean.update(model)", "mean (Mean)"),
    "pool = Pool()": ("pool.seen.append(x)", "pool (Pool)"),
    "queue = torch.zeros(40, 8)": ("queue[run.step] = x[0]", "queue (Tensor)"),
    "memory = np.zeros(40)": ("memory[run.step] = 1", "memory (ndarray)"),
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

class Centred(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("centre", torch.zeros(1))
    def forward(self, x):
        self.centre = self.centre * 0.9 + x.mean() * 0.1

class Mean:
    def __init__(self, model):
        self.of = {name: tensor.data.clone() for name, tensor in model.named_parameters()}
    def update(self, model):
        for name, tensor in model.named_parameters():
            self.of[name] = 0.9 * self.of[name] + 0.1 * tensor.data

class Pool:
    def __init__(self):
        self.seen = []

class Trainer:
    def __init__(self, model):
        self.model, self.x = model, torch.zeros(16, 8)
    def set(self, x):
        self.x, self.both = x, [x, x]
"""
)


def test_what_lives_and_is_not_tracked_is_named_with_the_path_to_it(tmp_path):
    setup, step = "; ".join(FOUND), "; ".join(step for step, _ in FOUND.values())
    assert sorted(named(tmp_path, setup, step, MORE)) == sorted(
        f"program.py: main(): {path}" for _, path in FOUND.values() if path
    )


def test_a_generator_of_the_module_that_is_drawn_from_later_is_named_then(tmp_path):
    step = "run.step > 5 and RNG.random()"
    assert named(tmp_path, "", step, "RNG = np.random.default_rng(0)") == [
        "program.py: RNG (Generator)"
    ]


QUIET = {
    "drawn before": (
        "rng = np.random.default_rng(0); rng.random(); "
        "g = torch.Generator().manual_seed(0); w = torch.rand(3, generator=g)"
    ),
    "another optimizer": (
        "other = torch.optim.SGD(model.parameters(), 0.1); "
        "late = torch.optim.lr_scheduler.StepLR(other, 3)"
    ),
    "evaluation": (
        "held = DataLoader(points(), 8, shuffle=True, generator=torch.Generator()); val = Noisy()"
    ),
    "a tracked object's": "holder = Holder(); run.track(holder=holder); inner = holder.rng",
    "no scaling": "scaler = torch.amp.GradScaler('cpu', enabled=False)",
    "global ones": "a, b, c = random._inst, np.random.mtrand._rand, torch.default_generator",
    "parts of a tracked schedule": (
        "one, two = [torch.optim.lr_scheduler.StepLR(optimizer, n) for n in (2, 3)]"
    ),
    "what does not change": (
        "frozen = nn.BatchNorm1d(8).eval(); table = torch.zeros(4, 4); late = nn.Linear(8, 1)"
    ),
    "a tracked object's tensors": (
        "wrapped = nn.ModuleList([model]); weights = list(model.parameters()); "
        "weight = model.weight.data"
    ),
    "a batch, a sum": "trainer = Trainer(model); total = torch.zeros(1); x = torch.zeros(16, 8)",
    "that schedule": (
        "run.track(both=torch.optim.lr_scheduler.SequentialLR(optimizer, [one, two], [3]))"
    ),
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
    step = "trainer.set(x); frozen(x); total += loss.detach()"
    step += (
        "; val[0]; holder.rng.random(); random.random(); np.random.rand(); "
        "torch.rand(1); list(held)"
    )
    assert named(tmp_path, "; ".join(QUIET.values()), step, HOLDER) == []


def test_what_the_program_lets_go_is_not_kept_alive(tmp_path):
    before = "import weakref\nclass Big:\n    pass\n"
    step = "if run.step == 1:\n            del big\n            assert seen() is None"
    assert named(tmp_path, "big = Big(); seen = weakref.ref(big)", step, before) == []


LOOPS = REPO / "tests/loops"


ODD = {
    "slots": """
class Odd:
    __slots__ = ("count", "__weakref__")
    def __init__(self):
        self.count = 0
""",
    "every question raises": """
class Odd:
    def __getattribute__(self, name):
        raise LookupError(f"no {name} here")
""",
    "another class than it is": """
class Odd:
    @property
    def __class__(self):
        raise ValueError("who asks?")
""",
    "a dict without items": """
class Odd(dict):
    def __init__(self):
        super().__init__(a=1)
    def items(self):
        raise KeyError("none")
    __iter__ = keys = values = items
""",
    "attributes that cannot be compared": """
class Value:
    __hash__ = None
    def __eq__(self, other):
        raise TypeError("not with that")
class Odd:
    def __init__(self):
        self.held, self.key = [Value()], {"a": Value()}
""",
}


WHERE = {
    "in a variable": "odds = [Odd(), {'odd': Odd()}]",
    "in the dataset": "data.odd = Odd()",
    "in the model": "model.__dict__['odd'] = Odd()",
}


@pytest.mark.parametrize("setup", WHERE.values(), ids=WHERE)
@pytest.mark.parametrize("before", ODD.values(), ids=ODD)
def test_an_object_that_answers_with_an_error_is_never_the_runs_failure(tmp_path, before, setup):
    assert named(tmp_path, setup, before=before) == []


def test_what_is_installed_for_another_python_is_a_library_all_the_same(tmp_path):
    """As where a virtual environment lies on top of another, or a site keeps its libraries in a
    folder of its own."""
    package = tmp_path / "opt/python/lib/site-packages"
    package.mkdir(parents=True)
    (package / "elsewhere.py").write_text(
        "class Counter:\n    def __init__(self):\n        self._count = 0\n"
    )
    before = f"import sys\nsys.path.append({str(package)!r})\nimport elsewhere"
    source = (
        PROGRAM.replace("BEFORE", before)
        .replace("SETUP", "counter = elsewhere.Counter()")
        .replace("STEP", "counter._count += 1")
    )
    assert "counter" not in live(tmp_path, source, "whole").text
    source = source.replace(str(package), str(package.parent))
    (package / "elsewhere.py").rename(package.parent / "elsewhere.py")
    assert "counter._count" in live(tmp_path, source, "mine").text


@pytest.mark.parametrize(
    "loop",
    [
        "ddp.py",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("gan.py", "gpt.py", "stream.py")),
    ],
)
def test_no_loop_of_ours_is_suspected(tmp_path, loop):
    alone = {
        "RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_ports(1)[0]),
    }
    env = os.environ | alone | {"PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(LOOPS / loop)],
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert not re.search(
        "not tracked, so lost|carries from step|not rehearsed|would fail or not be exact|"
        "another one on each rank",
        done.stdout + done.stderr,
    )


CARRIED = """
class Stopper:
    def __init__(self):
        self.best, self.history, self.patience = 1e9, [], 3
    def look(self, value):
        self.best = min(self.best, value)
        self.history.append(value)
        return False

def main():
    run = init()
    model = nn.RNN(8, 4, batch_first=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    run.track(model=model, optimizer=optimizer)
    hidden, count, best, stopper, unused, gradients = (
        torch.zeros(1, 16, 4), 0, 1e9, Stopper(), 3, [p for p in model.parameters()]
    )
    for x, y in run.batches(points(), 16, epochs=2):
        out, hidden = model(x[:, None], hidden.detach())
        optimizer.zero_grad()
        loss = out.square().mean()
        loss.backward()
        optimizer.step()
        count += 1
        if loss < best:
            best = loss.item()
        means = [value.mean() for value in out]
        if stopper.look(loss.item()):
            run.finish()
        run.log(loss=loss)

main()
"""


def test_what_the_loop_carries_from_step_to_step_by_itself_is_named_once(tmp_path):
    lived = live(tmp_path, CARRIED, "a")
    assert lived.code == 0, lived.text
    events = [
        json.loads(line) for line in (tmp_path / "a/events/0001.jsonl").read_text().splitlines()
    ]
    names = [name for event in events if event["event"] == "carried" for name in event["names"]]
    own = [
        f"program.py: main(): {name}"
        for name in ("best", "count", "hidden", "stopper.best", "stopper.history")
    ]
    assert sorted(names) == own
    assert (
        "warning" not in lived.text
        and "What training depends on belongs in run.state" in lived.text
    )


SUMMED = """
def main():
    run = init(log_every_steps=1000)
    model = nn.Linear(8, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    run.track(model=model, optimizer=optimizer)
    for epoch, loader in run.by_epoch(run.batches(points(), 16, epochs=2)):
        total, scale, margin = 0.0, 1.0 + epoch, 1.0 + epoch
        for x, y in loader:
            loss = (model(x) - y).square().mean() * scale
            part = 0.0
            for value in x[:3]:
                part += value.sum().item()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item()
        mean = total / len(loader) * margin
CALL
"""


@pytest.mark.parametrize(("scope", "call"), [("def main()", "main()"), ("if True", "")])
def test_a_sum_over_an_epoch_is_named_and_what_each_step_or_epoch_sets_anew_is_not(
    tmp_path, scope, call
):
    source = SUMMED.replace("def main()", scope).replace("CALL", call)
    lived = live(tmp_path, source, "a")
    assert lived.code == 0, lived.text
    events = [
        json.loads(line) for line in (tmp_path / "a/events/0001.jsonl").read_text().splitlines()
    ]
    names = [name for event in events if event["event"] == "carried" for name in event["names"]]
    assert [name.rpartition(": ")[2] for name in names] == ["total"]


# What the program keeps, and is no tracked object's: what is set up, what a step does, and how it
# is named.
KEPT = {
    "a dict of averages": (
        "ema = {n: p.detach() + 0 for n, p in model.named_parameters()}",
        "ema.update({n: 0.9 * ema[n] for n in ema})",
        "ema",
    ),
    "a buffer": ("buffer = deque(maxlen=99)", "buffer.append(x[0])", "buffer"),
    "a global": ("", "count_up()", "counted"),
    "a closure": ("warm = closure()", "warm()", "warm.n"),
    "of a function": ("", "scaled()", "scaled.n"),
    "a default": ("", "kept_default(x)", "kept_default.seen"),
    "of a class": ("", "Net.calls += 1", "Net.calls"),
    "a namespace": (
        "args = argparse.Namespace(tau=1.0); ns = types.SimpleNamespace(k=1.0)",
        "args.tau *= 0.9; ns.k *= 0.9",
        "args.tau, ns.k",
    ),
    "an item": (
        "config = {'tau': 1.0, 'other': 1}; rates = [0.1, 0.2]",
        "config['tau'] *= 0.9; rates[0] *= 0.9",
        "config['tau'], rates[0]",
    ),
    "a loss module": (
        "loss_module = Net()",
        "loss_module.beta += 0.1; loss_module(x)",
        "loss_module.beta, loss_module.center",
    ),
    "slots": ("slotted = Slotted()", "slotted.t *= 0.9", "slotted.t"),
    "late": ("late = Late()", "late.look(x)", "late.mean"),
    "iterators": (
        "ticks = itertools.count(); turns = itertools.cycle([1, 2, 3]); "
        "rows = iter(range(999)); endless = drawn()",
        "next(ticks); next(turns); next(rows); next(endless)",
        "ticks, turns (its position), rows, endless (its position)",
    ),
    "few of many numbers": ("priorities = np.ones(5000)", "priorities[17] += 1", "priorities"),
    "another object": (
        "teacher = copy.deepcopy(model)",
        "teacher = teacher if run.step % 3 else copy.deepcopy(model)",
        "teacher",
    ),
    "set at times": (
        "noise = torch.zeros(16, 8); masks = {}",
        "noise, _ = (noise, 0) if run.step % 3 else (x + 1, masks.update(a=x))",
        "noise, masks",
    ),
    "deep": (
        "deep = types.SimpleNamespace(a={'b': [types.SimpleNamespace(c=[{'d': 0}])]})",
        "deep.a['b'][0].c[0]['d'] += 1",
        "deep.a['b'][0].c[0]['d']",
    ),
    "of the dataset": ("data = Own(data)", "data.level = 0.1 * run.step", "data.level"),
    "of the optimizer": ("optimizer.updates = 0", "optimizer.updates += 1", "optimizer.updates"),
    "of a parameter": (
        "model.weight.momentum = torch.zeros(8)",
        "model.weight.momentum = 0.9 * model.weight.momentum + 1",
        "model.weight.momentum",
    ),
    "a hook's": ("model.register_forward_hook(Hook())", "pass", "model (its hooks)[0].calls"),
    "an optimizer's hook's": (
        "optimizer.register_step_pre_hook(clipping([]))",
        "pass",
        "optimizer (its hooks)[0].norms",
    ),
    "half a state_dict": (
        "half = Half(); run.track(half=half)",
        "half.saved += 1; half.lost += 1",
        "half.lost",
    ),
    "a forgotten generator": (
        "forgets = Half(); run.track(forgets=forgets)",
        "forgets.rng.random()",
        "forgets.rng",
    ),
    "another thread's": (
        "threading.Thread(target=produce, daemon=True).start()",
        "time.sleep(0.02)",
        "produce(): made",
    ),
    "passing": ("old = 0", "twice = [x, x]; old = run.step; text = str(old)", ""),
    "run.state": (
        "own = run.state; own['n'] = 0; seen = own.setdefault('h', [])",
        "own['n'] += 1; seen.append(own['n'])",
        "",
    ),
    "clocks": (
        "at, since = time.time(), time.perf_counter()",
        "at, since = at + 0.01, max(since, time.perf_counter())",
        "",
    ),
    "empty at first": ("cache, made = {}, None", "made = cache.setdefault('a', 7)", ""),
    "told the epoch": (
        "data.set_epoch = lambda epoch: None; data.epoch = 0",
        "data.epoch = run.epoch",
        "",
    ),
    "told the epoch by itself": (
        "curriculum = Curriculum(points())",
        "curriculum.set_epoch(run.epoch); curriculum.level += 1; curriculum.calls[0] += 1",
        "curriculum.calls[0], curriculum.level, curriculum.times",
    ),
    "a rehearsal memory": (
        "replay = Replay(points())",
        "replay.items.append(x[0]); replay.ring[run.step] = 1.0",
        "replay.items, replay.ring",
    ),
    "an evaluation's": (
        "held, whole = Own(points()), DataLoader(Own(points()), generator=torch.Generator()); "
        "held.cache, held.rng, held.rows = {}, np.random.default_rng(2), iter(range(99))",
        "held.rng.random(), next(held.rows), next(iter(whole)); "
        "held.cache.update(dict.fromkeys(range(run.step // 4 * 4)) if run.step < 8 else {})",
        "",
    ),
}
KEEPERS = """
import argparse, copy, itertools, threading, time, types
from collections import deque
counted = 0
def count_up():
    global counted
    counted += 1
def closure():
    n = 0
    def up():
        nonlocal n
        n += 1
    return up
def scaled():
    scaled.n += 1
scaled.n = 0
def kept_default(x, seen=[]):
    seen.append(1)
class Net(nn.Module):
    calls = 0
    def __init__(self):
        super().__init__()
        self.beta, self.center, self.last = 0.0, torch.zeros(8), None
    def forward(self, x):
        self.last = x.sum(0)
        self.center = 0.9 * self.center + x.mean(0)
class Slotted:
    __slots__ = ("t",)
    def __init__(self):
        self.t = 1.0
class Late:
    def look(self, x):
        if not hasattr(self, "mean"):
            self.mean = None
        self.mean = x.mean(0) if self.mean is None else 0.9 * self.mean + x.mean(0)
class Hook:
    calls = 0
    def __call__(self, module, given, out):
        self.calls += 1
def clipping(norms):
    return lambda optimizer, args, kwargs: norms.append(1)
class Half:
    def __init__(self):
        self.saved, self.lost, self.rng = 100, 0, np.random.default_rng(1)
    def state_dict(self):
        return {"saved": self.saved}
    def load_state_dict(self, state):
        self.saved = state["saved"]
class Own(Dataset):
    def __init__(self, other):
        self.other = other
    def __len__(self):
        return len(self.other)
    def __getitem__(self, at):
        return self.other[at]
class Replay(Own):
    def __init__(self, other):
        self.other, self.items, self.ring = other, [], np.zeros(40)
class Curriculum(Own):
    def __init__(self, other):
        self.other, self.level, self.calls, self.times = other, 0, [0], 0
        self.set_epoch(0)
    def set_epoch(self, epoch):
        self.rate, self.seed = 0.1 * epoch, epoch + 7
        self.times += 1
        self.mix()
    def mix(self):
        self.order = [(at * 7 + self.seed) % 9 for at in range(9)]
def drawn():
    while True:
        for i in range(4):
            yield i
def produce():
    made = 0
    while True:
        time.sleep(0.001)
        made += 1
"""


def test_whatever_the_program_keeps_from_step_to_step_is_named(tmp_path):
    setup, step = ("; ".join(part for row in KEPT.values() if (part := row[at])) for at in (0, 1))
    source = PROGRAM.replace("BEFORE", KEEPERS).replace("SETUP", setup).replace("STEP", step)
    lived = live(tmp_path, source, "whole")
    assert lived.code == 0, lived.text
    events = [
        json.loads(line) for line in (tmp_path / "whole/events/0001.jsonl").read_text().splitlines()
    ]
    names = {
        name
        for event in events
        if event["event"] in ("carried", "untracked")
        for name in event["names"]
    }
    found = {
        re.sub(r" \((?!its)\w+\)$", "", name).removeprefix("program.py: ").removeprefix("main(): ")
        for name in names
    }
    expected = {path for _, _, paths in KEPT.values() for path in paths.split(", ") if path}
    assert found == expected


SET_ONCE = """
import copy, types
class Once:
    def __init__(self):
        self.first, self.ref, self.table = None, None, None
    def __call__(self, loss, model):
        if self.first is None:
            self.first = loss.detach()
        if self.ref is None:
            self.ref = copy.deepcopy(model)
        if not hasattr(self, "late"):
            self.late = torch.randn(8)
        if self.table is None:
            self.table = torch.ones(8).to(loss.device)
        return loss / self.first * self.late.sum() * self.table.sum()
class Window(nn.Module):
    def __init__(self):
        super().__init__()
        self.window = None
    def forward(self, x):
        if self.window is None or self.window.shape[0] != x.shape[1]:
            size, kind = x.shape[1], x.dtype
            self.window = torch.hann_window(size, dtype=kind).to(x)
        return x * self.window
def once_closure():
    kept = None
    def up(x):
        nonlocal kept
        if kept is None:
            kept = x.mean(0)
        return x * kept
    return up
global_first = None
def set_global(loss):
    global global_first
    if global_first is None:
        global_first = loss.detach()
    return global_first
def by_attribute(loss):
    if by_attribute.first is None:
        by_attribute.first = loss.detach()
by_attribute.first = None
def main():
    run = init()
    model = nn.Linear(8, 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    run.track(model=model, optimizer=optimizer)
    first, hold, listed, config, mode = None, {"at": None}, [], types.SimpleNamespace(c=None), None
    once, lazy, window, cache = Once(), once_closure(), Window(), {}
    for x, y in run.batches(points(), 16, epochs=2):
        loss = (model(x) - y).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if first is None:
            first = loss.detach() + 0
        if not listed:
            listed.append(loss.item())
        if mode is None:
            mode = "train"
        if run.step == 1:
            start, hold["at"], config.c, best, shown = 1.0, x.mean(0), 1.5, loss.item(), 7
            cache["mask"] = torch.ones(3)
        ratio = loss / start
        late = ratio.item()
        once(loss, model), lazy(x), set_global(loss), by_attribute(loss), window(x)
    print(best)
main()
"""


def test_what_is_set_once_in_the_first_step_is_named_and_what_is_computed_again_is_not(tmp_path):
    lived = live(tmp_path, SET_ONCE, "whole")
    assert lived.code == 0, lived.text
    (line,) = [line for line in lived.text.splitlines() if "carries from step" in line]
    names = "by_attribute.first best config.c first global_first hold['at'] lazy.kept listed "
    names += "once.first once.late once.ref start"
    path = tmp_path / "whole/events/0001.jsonl"
    events = [json.loads(text) for text in path.read_text().splitlines()]
    (found,) = [event["names"] for event in events if event["event"] == "carried"]
    assert {name.split(": ")[-1] for name in found} == set(names.split()), line


SELDOM = """
import harness.untracked.candidates
harness.untracked.candidates.MOST_AT_SAVES = 1.0  # a look takes a share of the time of few steps
def main():
    run = init(save_every_steps=7)
    model = nn.Linear(8, 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 3)
    trainer = [optimizer]
    run.track(model=model, optimizer=optimizer, scheduler=scheduler)
    factor, late, best = 1.0, 1.0, run.state.get("best")
    for epoch, loader in run.by_epoch(run.batches(points(80), 16, epochs=5)):
        if epoch == 4:
            factor, scheduler = 0.1, torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
            trainer[0] = torch.optim.SGD(model.parameters(), lr=0.05)
        for x, y in an_epoch(epoch, loader, [0.0] * epoch):
            loss = (model(x) - y).square().mean() * factor * late
            if best is None:
                best = run.state["best"] = loss.item()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if run.step == SAVED:
                late = 0.1
        scheduler.step()
def an_epoch(epoch, loader, given):
    for x, y in loader:
        yield x, y
main()
"""


@pytest.mark.parametrize("saved", [21, 99])
def test_what_changes_seldom_is_named_in_that_epoch_or_at_the_next_save(tmp_path, saved):
    lived = live(tmp_path, SELDOM.replace("SAVED", str(saved)), "whole")
    assert lived.code == 0, lived.text
    path = tmp_path / "whole/events/0001.jsonl"
    events = [json.loads(text) for text in path.read_text().splitlines()]
    names = [name for event in events if event["event"] == "carried" for name in event["names"]]
    assert {name.removeprefix("program.py: main(): ") for name in names} == {
        "factor",
        "scheduler (another object than the tracked scheduler)",
        "trainer[0] (another object than the tracked optimizer)",
        *(["late"] if saved == 21 else []),
    }


@pytest.mark.parametrize("started_s_ago", [30.0, 7200.0])
def test_a_reading_of_a_clock_is_none_of_a_programs_values_also_on_a_machine_just_started(
    monkeypatch, started_s_ago
):
    clock = time.perf_counter
    first = clock() - started_s_ago
    monkeypatch.setattr(time, "perf_counter", lambda: clock() - first)
    monkeypatch.setattr(time, "monotonic", time.perf_counter)
    monkeypatch.setattr(program_values, "IMPORTED_AT", time.perf_counter() - 10)
    values = {"since": time.perf_counter() - 1, "wall": time.time(), "loss": 3.5}
    marked, _ = program_values.marks(values.items(), lambda *_: True, (), {})
    assert set(marked) == {"loss"}


def test_memory_that_tracked_tensors_come_to_share_or_cease_to_is_named(tmp_path):
    """A restart gives each of them its own: torch's optimizers share the state that one loads from
    another. Weights that are tied as built are tied again."""
    setup = (
        "other = torch.nn.Linear(8, 1); "
        "second = torch.optim.SGD(other.parameters(), 0.1, momentum=0.9); "
    )
    setup += (
        "first = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9); "
        "tied = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)); "
        "tied[1].weight = tied[0].weight; "
        "run.track(other=other, first=first, second=second, tied=tied)"
    )
    step = (
        "other(x).sum().backward(); first.step(); second.step(); "
        "run.step == 3 and second.load_state_dict(first.state_dict()); "
        "_ = run.step == 3 and setattr(tied[1], 'weight', torch.nn.Parameter(torch.ones(8, 8)))"
    )
    lived = live(
        tmp_path,
        PROGRAM.replace("BEFORE", "").replace("SETUP", setup).replace("STEP", step),
        "whole",
    )
    assert lived.code == 0, lived.text
    assert (
        "first.state[0]['momentum_buffer'] = second.state[0]['momentum_buffer'] (shared memory)"
        in lived.text
    )
    assert "tied.0.weight = tied.1.weight (no longer shared memory)" in lived.text


OF_EPOCHS = """
class Meter:
    def __init__(self):
        self.total = 0.0

def note(value):
    noted.append(value)

class Unbound:
    @property
    def __class__(self):
        raise RuntimeError("outside of its context")

def produce():  # its loops know no epoch
    while True:
        stats = {}
        for _ in range(50):
            stats["a"] = random.Random().random()
            time.sleep(0.0002)

import threading
threading.Thread(target=produce, daemon=True).start()
proxy = Unbound()
model = nn.Linear(8, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
run = init()
run.track(model=model, optimizer=optimizer)
for epoch, batches in run.by_epoch(run.batches(points(), 16, epochs=3)):
    HEAD
    for x, y in batches:
        loss = (model(x) - y).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        BODY
    print(epoch)
"""


@pytest.mark.parametrize(
    ("head", "body", "names"),
    [
        ("meter = Meter()", "meter.total += loss.item()", "meter.total"),
        ("losses = []", "losses.append(loss.item())", "losses"),
        ("seen = {'n': 0}", "seen['n'] += 1", "seen['n']"),
        ("counts = np.zeros(3)", "counts[0] += 1", "counts"),
        ("sums = torch.zeros(8)", "sums.add_(x.sum(0))", "sums"),
        ("others = iter([[1] * 99][0])", "next(others)", "others"),
        ("meters = (Meter(), Meter())", "meters[0].total += 1.0", "meters[0].total"),
        ("noted = []", "note(loss.item())", "noted"),
        # Each epoch sets these, its steps only read them.
        ("rates, text, at = [0.1 * epoch], str(epoch), time.time()", "(rates, text, at)", ""),
        ("loss_of, two = nn.MSELoss(), (epoch, epoch)", "loss_of(model(x), y), two", ""),
        ("noise = torch.full((8,), float(epoch))", "model(x + noise)", ""),
        ("options = {'a: b': epoch}", "options['a: b']", ""),
        ("held = enumerate(batches, run.batch)", "held", ""),
        ("scaled = map(lambda batch, by=(epoch,): batch[0] * by[0], batches)", "scaled", ""),
    ],
)
def test_what_the_steps_of_an_epoch_fill_is_named_and_what_they_only_read_is_not(
    tmp_path, head, body, names
):
    lived = live(tmp_path, OF_EPOCHS.replace("HEAD", head).replace("BODY", body), "whole")
    assert lived.code == 0, lived.text
    found = [line for line in lived.text.splitlines() if "begins anew" in line]
    expected = [f"program.py: {names}. What"] if names else []
    assert len(found) == len(expected), lived.text
    assert all(words in line for words, line in zip(expected, found, strict=True)), found


TWO_LOOPS = """
model = nn.Linear(8, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
run = init()
run.track(model=model, optimizer=optimizer)
def step(x, y, weight):
    loss = (model(x) - y).square().mean() * weight
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()
for epoch, batches in run.by_epoch(run.batches(points(), 16, epochs=3)):
    total = 0.0
    for x, y in batches:
        step(x, y, 1 + total)
        if run.batch >= 5:
            break
    for x, y in batches:
        total += step(x, y, 1 + total)
"""


def test_what_one_of_two_inner_loops_carries_is_named_although_the_other_only_reads_it(tmp_path):
    lived = live(tmp_path, TWO_LOOPS, "whole")
    assert lived.code == 0, lived.text
    assert "begins anew after a restart: program.py: total." in lived.text


LOOP_OF = """
import sys
from harness.source_code.loops import names_of

def batches():
    found.append(names_of(sys._getframe(1)).passing)
    yield 1

found, a, b, c, d, e, f, h, k = [], 1, 1, 1, 1, 1, [0, 1], 1, 1
def g():
    a, b, c, d, e, f, h, k = 1, 1, 1, 1, 1, [0, 1], 1, 1
    for x in batches():
        BODY
BODY_OUTSIDE
"""


@pytest.mark.parametrize(
    ("body", "names"),
    [
        ("a = x; b = a", "a b"),
        ("b = a; a = x", "b"),
        ("a += 1", ""),
        ("f[0] += 1; f.append(a)", ""),
        ("a, b = b, a", ""),
        ("(a := a + 1)", ""),
        ("a = [b for b in f]", "a"),
        ("a = [a for b in f]", ""),
        ("a = {b: c for b in f for c in f}; c = 1", "a c"),
        ("a = (lambda: b)(); b = 1", "a b"),
        ("e: int = e + 1", ""),
        ("for h in f: k = h", "h k"),
        ("for h in f: k = k + h", "h"),
        ("a = a if x else b", ""),
        ("if x: a = x\nb = a", "b"),
        ("if x: a = x\nelse: a = b\nc = a", "a c"),
        ("if x: a = x; b = a", "a b"),
        ("if not x: continue\nelse: a = x\nb = a", "a b"),
        ("try: a = x\nexcept ValueError: pass\nb = a", "b"),
    ],
)
def test_variables_hold_nothing_if_they_are_set_before_they_are_read(tmp_path, body, names):
    path = tmp_path / "loop.py"
    outside = "for x in batches():\n    " + body.replace("\n", "\n    ") + "\ng()\n"
    path.write_text(
        LOOP_OF.replace("BODY_OUTSIDE", outside).replace("BODY", body.replace("\n", "\n        "))
    )
    assert runpy.run_path(str(path))["found"][:2] == [{"x", *names.split()}] * 2, (
        "in a module, and in a function"
    )


IN_WORKERS = """
import tempfile
DRAWN = 0

class Inner:
    calls = 0
    def __call__(self, x):
        self.calls += 1
        return x

class Counting(Dataset):
    def __init__(self):
        self.inner = Inner()
        self.seen, self.mean, self.stats = [], np.zeros(8), {"samples": 0}
        # what follows changes, too, and no sample is another one for it
        self.file, self.is_open, self.epoch, self.images = None, False, 0, {}
        self.filled = [None] * 160
        self.rngs = [random.Random(1), np.random.default_rng(1), torch.Generator()]
        self.scratch, self.took, self.names = np.zeros(8), time.perf_counter(), ["a"] * 5000
    def __len__(self):
        return 160
    def set_epoch(self, epoch):
        self.epoch = epoch
    def __getitem__(self, at):
        global DRAWN
        DRAWN += 1
        if self.file is None:
            self.file, self.is_open = tempfile.TemporaryFile(), True
        self.rngs[0].random(), self.rngs[1].random(), torch.rand(1, generator=self.rngs[2])
        self.scratch = np.full(8, at)
        self.took = time.perf_counter()
        if at not in self.images:
            self.images[at] = self.filled[at] = torch.full((8,), at / 160)
        self.stats["samples"] += 1
        self.mean += self.scratch
        self.seen.append(at)
        return self.inner(self.images[at]), torch.ones(1)

class Collate:
    batch_count, img_size = 0, 416
    def __call__(self, samples):
        self.batch_count += 1
        if self.batch_count % 2 == 0:
            self.img_size = random.choice([320, 352, 384, 448, 480])
        return torch.utils.data.default_collate(samples)

run = init()
model = nn.Linear(8, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
run.track(model=model, optimizer=optimizer)
data = torch.utils.data.Subset(Counting(), range(160))
for x, y in run.batches(DataLoader(data, 16, num_workers=WORKERS, collate_fn=Collate()), epochs=2):
"""
IN_WORKERS_NAMES = {
    "collate_fn.batch_count",
    "collate_fn.img_size",
    "dataset.dataset.inner.calls",
    "dataset.dataset.mean",
    "dataset.dataset.seen",
    "dataset.dataset.stats['samples']",
    "program.py: DRAWN",
}


def test_what_loader_workers_carry_from_batch_to_batch_is_named_once(tmp_path):
    lived = live(tmp_path, IN_WORKERS.replace("WORKERS", "1") + STEP, "run")
    assert lived.code == 0, lived.text
    said = re.findall("changes in the worker processes that load samples: (.*?)\\. It", lived.text)
    names = [name for names in said for name in names.split(", ")]
    assert sorted(names) == sorted(IN_WORKERS_NAMES), lived.text


COUNTED = """
import itertools, sys
from types import SimpleNamespace
from harness.run.epochs import Batches
from harness.source_code.loops import counted_anew

found, run, lrs = [], SimpleNamespace(batch=0), [1, 2]
bar = lambda batches, **_: batches
def made():
    for at in range(2):
        found.extend(counted_anew(sys._getframe(1)))
        yield at
batches = Batches(print, print, print)
def look():
    found.extend(counted_anew(sys._getframe(1)))
def g():
    for LOOP
g()
"""


@pytest.mark.parametrize(
    ("loop", "named"),
    [
        ("i, b in enumerate(made()): f = i / 2", "i of enumerate(made())"),
        ("i, b in bar(enumerate(made(), 1), of=2): f = i", "i of enumerate(made(), 1)"),
        ("i, b in enumerate(bar(made())): (lambda: i)", "i of enumerate(bar(made()))"),
        ("i, (b, f) in enumerate(zip(made(), lrs)): (b, f)", "zip(made(), lrs)"),
        ("f, b in zip(itertools.count(), made()): f", "zip(itertools.count(), made())"),
        ("at in enumerate(made()): at[0]", "the counter of enumerate(made())"),
        ("i, b in enumerate([batches]): look(); i", "i of enumerate([batches])"),
        ("i, b in enumerate(made()): b", ""),
        ("i, b in enumerate(made()):\n        if i % 2 == 0: print(i, b)", ""),
        ("i, b in enumerate(made()):\n        if i % 2 == 0: f = i", "i of enumerate(made())"),
        ("i, b in enumerate(made(), run.batch): i", ""),
        ("i, b in zip(itertools.count(run.batch), made()): i", ""),
        ("b, f in zip(made(), itertools.repeat(1)): b * f", ""),
        ("b, f in zip(made(), lrs): b", ""),
        ("i, f in enumerate(lrs):\n        for b in made(): i", ""),
        ("i, f in enumerate(lrs): look(); i", ""),
        ("i, f in enumerate(list(made())): i", ""),
    ],
)
def test_what_a_loop_counts_beside_the_batches_is_named(tmp_path, loop, named):
    path = tmp_path / "loop.py"
    path.write_text(COUNTED.replace("LOOP", loop))
    assert ", ".join(dict.fromkeys(runpy.run_path(str(path))["found"])) == named


def test_that_it_begins_anew_is_said_once(tmp_path):
    source = SUMMED.replace("for x, y in loader:", "for i, (x, y) in enumerate(loader):").replace(
        "total += loss.item()", "optimizer.param_groups[0]['lr'] = 0.05 / (1 + i)"
    )
    lived = live(tmp_path, source.replace("CALL", "main()"), "a")
    assert lived.code == 0, lived.text
    said = [line for line in lived.text.splitlines() if "begins anew after a restart" in line]
    assert len(said) == 1 and "main(): i of enumerate(loader). run.enumerate" in said[0], said


def test_a_search_is_not_cut_short_because_the_machine_is_busy():
    limit = TimeLimit(0.05)
    time.sleep(0.1)  # others compute
    assert not limit.is_over()
    while not limit.is_over():
        sum(range(1000))
