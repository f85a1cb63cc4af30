"""What the loop changes in objects of libraries is named: settings, counts, seeds that were given
out. What displays, logs or measures is not."""

from __future__ import annotations

import json

from programs import live

LIBRARY = """
import numpy as np
class Env:
    def __init__(self):
        self.steps, self.state, self.seen, self._cache = 0, np.zeros(4), [], {}
        self.inner = Inner()
class Inner:
    def __init__(self):
        self.calls = 0
class Box(dict):
    __getattr__, __setattr__ = dict.__getitem__, dict.__setitem__
class Fields:
    def __init__(self, **values):
        self._fields, self._locked = values, False
    def keys(self):
        return self._fields.keys()
    def __getitem__(self, key):
        raise RuntimeError("do not load it")
class AverageMeter:
    def __init__(self):
        self.sum = 0.0
class Bar:
    def __init__(self):
        self.n = 0
    def refresh(self):
        self.n += 1
"""
# What is set up, what a step does, and the names that are expected.
CASES: dict[str, tuple[str, str, list[str]]] = {
    "a config": (
        "cfg = omegaconf.OmegaConf.create({'loss': {'kl': 0.1, 'l': [1, 2]}, 'm': '???'})",
        "cfg.loss.kl = min(1.0, cfg.loss.kl + 0.01); cfg.loss.l[1] += 1",
        ["cfg"],  # for several items
    ),
    "seeds": (
        "seeds = np.random.SeedSequence(7)",
        "np.random.default_rng(seeds.spawn(1)[0])",
        ["seeds"],
    ),
    "spawning": ("rng = np.random.default_rng(3)", "rng.spawn(1)", ["rng"]),
    "quasi-random": (
        "held = {'sobol': torch.quasirandom.SobolEngine(2)}",
        "held['sobol'].draw(4)",
        ["held['sobol']"],
    ),
    "scipy's": ("halton = scipy.stats.qmc.Halton(2)", "halton.random(4)", ["halton.num_generated"]),
    "an environment": (
        "env = elsewhere.Env()",
        "env.steps += 1; env.state += 1; env._cache[run.step] = 1; env.inner.calls += 1",
        ["env.state", "env.steps"],
    ),
    "a dict": (
        "box = elsewhere.Box(tau=0.1, more=elsewhere.Box(beta=1.0))",
        "box.tau *= 0.9; box.more.beta *= 0.9",
        ["box"],
    ),
    "fields": (
        "fields = elsewhere.Fields(k=1.0)",
        "fields._fields['k'] *= 0.9; fields._locked = run.step % 3 == 0",
        ["fields['k']"],
    ),
    "displays": (
        "meter, bar = elsewhere.AverageMeter(), elsewhere.Bar()",
        "meter.sum += 1; bar.refresh()",
        [],
    ),
    "logs": (
        "log = logging.getLogger('here'); writer = SummaryWriter('logs')",
        "log.warning('%s', run.step); writer.add_scalar('loss', loss.item(), run.step)",
        [],
    ),
    "the standard library's": (
        "path, day = pathlib.Path('a'), datetime.datetime.now(); pool = ThreadPoolExecutor(1); "
        "args = argparse.ArgumentParser(); tasks = queue.Queue()",
        "path.exists(); pool.submit(int).result(); tasks.put(1); hash(path)",
        [],
    ),
    "torch's": (
        "autocast = torch.autocast('cpu', torch.bfloat16); "
        "profiler = torch.profiler.profile(schedule=lambda step: "
        "torch.profiler.ProfilerAction.NONE)",
        "autocast.__enter__(); autocast.__exit__(None, None, None); profiler.step()",
        [],
    ),
}
PROGRAM = """
import argparse, datetime, logging, pathlib, queue
from concurrent.futures import ThreadPoolExecutor
import omegaconf, scipy.stats
from torch.utils.tensorboard import SummaryWriter
sys.path.append(PACKAGES)
import elsewhere

def main():
    run = init()
    model = nn.Linear(8, 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    SETUP
    run.track(model=model, optimizer=optimizer)
    for x, y in run.batches(points(), 16, epochs=2):
        loss = (model(x) - y).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        STEP
        run.log(loss=loss)

main()
"""


def test_what_the_loop_changes_in_objects_of_libraries_is_named(tmp_path):
    package = tmp_path / "opt/site-packages"
    package.mkdir(parents=True)
    (package / "elsewhere.py").write_text(LIBRARY)
    own = [(setup, step) for setup, step, _ in CASES.values()]
    setup, step = ("; ".join(case[at] for case in own) for at in (0, 1))
    source = PROGRAM.replace("PACKAGES", repr(str(package)))
    source = source.replace("SETUP", setup.replace("; ", "\n    ")).replace("STEP", step)
    lived = live(tmp_path, source, "a")
    assert lived.code == 0, lived.text
    events = [
        json.loads(line) for line in (tmp_path / "a/events/0001.jsonl").read_text().splitlines()
    ]
    names = sorted(
        name.rpartition(": ")[2].partition(" (")[0]
        for event in events
        if event["event"] in ("carried", "untracked")
        for name in event["names"]
    )
    assert names == sorted(name for _, _, names in CASES.values() for name in names)
