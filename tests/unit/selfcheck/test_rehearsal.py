"""What could not be gone on from is said at the first save, and nothing is said of what can."""

from __future__ import annotations

import json

import pytest
import torch
from programs import live

from harness.saving import readback

TRAINED = """
run = init()
model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 1))
optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
TRACK
for x, y in run.batches(points(), 16, epochs=1):
    loss = (model(x) - y).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    run.log(loss=loss)
    if run.step > 3:
        wait()
"""

WAIT = """
def wait():
    import json
    until = time.monotonic() + 20
    while (
        time.monotonic() < until
        and '"rehearsed"' not in open(sys.argv[1] + "/events/0001.jsonl").read()
    ):
        time.sleep(0.01)
"""


def rehearsed(tmp_path, track, before="", after_init=""):
    source = WAIT + before + TRAINED.replace("TRACK", track)
    lived = live(tmp_path, source, "whole")
    assert lived.code == 0, lived.text
    events = [
        json.loads(line) for line in (tmp_path / "whole/events/0001.jsonl").read_text().splitlines()
    ]
    (event,) = [event for event in events if event["event"] == "rehearsed"]
    return event, lived.text


def test_of_what_loads_again_nothing_is_said(tmp_path):
    track = """
class Count:
    n = 0
    def state_dict(self):
        return {"n": self.n, "kinds": {"tuple": (1, 2), "text": "x"}}
    def load_state_dict(self, state):
        self.n = state["n"]

warmup, cosine = (
    torch.optim.lr_scheduler.LinearLR(optimizer),
    torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10),
)
scheduler = torch.optim.lr_scheduler.SequentialLR(optimizer, [warmup, cosine], [2])
other = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
nn.utils.parametrizations.spectral_norm(model[0])
ema = torch.optim.swa_utils.AveragedModel(model)
scaler = torch.amp.GradScaler("cpu")
run.track(
    model=model,
    optimizer=optimizer,
    scheduler=scheduler,
    other=other,
    ema=ema,
    scaler=scaler,
    count=Count(),
)
"""
    event, text = rehearsed(tmp_path, track)
    assert (event["problems"], event["not_rehearsed"]) == ([], [])
    assert "restart" not in text
    assert event["seconds"] < 60
    assert event["training_s"] < 10


KINDS = """
from collections import defaultdict, deque

class Normaliser:
    def __init__(self):
        self.mean, self.best = np.zeros(8), np.float32(0.5)
        self.last, self.counts = deque([1, 2], maxlen=2), defaultdict(int, a=3)
    def state_dict(self):
        return dict(vars(self))
    def load_state_dict(self, state):
        state["mean"].astype(np.float32), state["last"].appendleft, state["counts"]["missing"]
        state["counts"].pop("missing")
        vars(self).update(state)

class Holding(Normaliser):  # it is not loaded: it holds a tensor
    def __init__(self):
        super().__init__()
        self.sum = torch.zeros(2)
"""


def test_values_of_other_kinds_come_back_and_are_not_named(tmp_path):
    track = (
        "run.track(model=model, optimizer=optimizer, normaliser=Normaliser(), holding=Holding())"
    )
    event, text = rehearsed(tmp_path, track, KINDS)
    assert event["problems"] == [] and "would fail or not be exact" not in text
    (skipped,) = event["not_rehearsed"]
    assert skipped.startswith("holding (it holds ")


BROKEN = {
    "raises": ("self.rows[state['n']]", "cannot be loaded again: AttributeError"),
    "forgets": ("pass", "thing['n'] was 3 and is 0 afterwards"),
    "loses its kind": (
        "self.n = np.int64(state['n'])",
        "thing['n'] was a int and is a numpy.int64 afterwards",
    ),
    "adds": ("self.n = state['n']; self.more = 1", "thing['more'] is there afterwards only"),
}


@pytest.mark.parametrize("how", BROKEN)
def test_an_object_that_does_not_take_its_state_is_named(tmp_path, how):
    load, words = BROKEN[how]
    before = f"""
class Thing:
    def __init__(self):
        self.n = 0
    def state_dict(self):
        return dict(vars(self))
    def load_state_dict(self, state):
        {load}
    def __deepcopy__(self, memo):
        return Thing()
"""
    track = "thing = Thing(); thing.n = 3; run.track(model=model, optimizer=optimizer, thing=thing)"
    event, text = rehearsed(tmp_path, track, before)
    assert any(words in problem for problem in event["problems"]), event
    assert "would fail or not be exact" in text


def test_of_a_buffer_that_is_expanded_nothing_is_said(tmp_path):
    track = (
        "model.register_buffer('mask', torch.ones(1, 8).expand(4, 8)); "
        "run.track(model=model, optimizer=optimizer)"
    )
    event, _ = rehearsed(tmp_path, track)
    assert (event["problems"], event["not_rehearsed"]) == ([], [])


def test_generators_that_an_object_sets_are_as_they_were(tmp_path):
    before = """
class Random:
    def state_dict(self):
        return {"words": torch.tensor(random.getstate()[1]), "torch": torch.get_rng_state()}
    def load_state_dict(self, state):
        random.seed(0)
        torch.manual_seed(0)
        np.random.seed(0)

def drawn():
    return random.random(), torch.rand(()).item(), np.random.random()
"""
    source = (
        WAIT
        + before
        + TRAINED.replace("TRACK", "run.track(model=model, optimizer=optimizer, thing=Random())")
    )
    source += "print('drawn:', drawn())\n"
    texts = [
        live(tmp_path, source.replace("init()", f"init(rehearse={on})"), f"run{on}")
        for on in (True,)
    ]
    quiet = source.replace("init()", "init(rehearse=False)").replace(
        "        wait()", "        pass"
    )
    texts.append(live(tmp_path, quiet, "quiet"))
    lines = [
        next(line for line in lived.text.splitlines() if line.startswith("drawn:"))
        for lived in texts
    ]
    assert lines[0] == lines[1]
    assert '"rehearsed"' not in (tmp_path / "quiet/events/0001.jsonl").read_text()


CUSTOM = """
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(8, 1)
    def forward(self, x):
        return self.inner(x)
    def load_state_dict(self, state, **kinds):
        raise AssertionError("not in the background")

class Table:
    def __init__(self):
        self.inner = nn.Linear(1, 3)
    def state_dict(self):
        return {"rows": self.inner.bias, "best": np.float32(1)}
    def load_state_dict(self, state):
        raise AssertionError("not with tensors")
"""


def test_what_is_not_rehearsed_is_named_in_one_line(tmp_path):
    track = (
        "model = Net(); optimizer = torch.optim.SGD(model.parameters(), 0.1); "
        "run.track(model=model, optimizer=optimizer, table=Table())"
    )
    event, text = rehearsed(tmp_path, track, CUSTOM)
    assert event["problems"] == []
    assert event["not_rehearsed"] == [
        "table (it holds tensors)",
        "model (Net has a load_state_dict of its own)",
    ]
    (line,) = [line for line in text.splitlines() if "not rehearsed" in line]
    assert "table (it holds tensors)" in line


def test_bytes_that_come_back_otherwise_are_told(tmp_path):
    torch.save({"step": 1, "a": torch.zeros(4), "b": torch.ones(4)}, tmp_path / "a.pt")
    with (tmp_path / "a.pt").open("rb", buffering=0) as file:
        rows = readback.file_rows(file)
    swapped = [
        [path, kind, [*content[:4], content[4] + 64] if kind == "tensor" else content]
        for path, kind, content in rows
    ]
    assert [words.split()[0] for words in readback.unlike(rows, swapped)] == ["a", "b"]
    assert readback.unlike(rows, rows[:-1]) == ["b is not in the file"]
