"""State that no `state_dict` tells of: gradients under way, attributes and modes, communication
hooks, generators; and no torn file."""

from __future__ import annotations

import contextlib
import copy
import itertools
import math
import random
import re
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.utils.prune
from conftest import undone
from library_runs import newest, steps_of
from programs import STEP, killed_once, live
from there import there
from torch import nn

import harness
from harness import state
from harness.checkpoint import load
from harness.checkpoint.catalog import read_catalog
from harness.errors import UsageError
from harness.exchange.compare import differences
from harness.state.plain_values import is_same
from harness.store import LocalStore
from harness.tracking.attributes import Attributes
from harness.tracking.shared_containers import Containers
from harness.tracking.watched_part import WatchedPart

pytestmark = pytest.mark.usefixtures("process_as_it_was")

DIE = """
def die(run):
    \"\"\"Be killed in step `$DIE`, when what was saved before it has arrived.\"\"\"
    if run.step == int(os.environ.get("DIE", 0)):
        until = time.monotonic() + 8
        while run._checkpointer.background.is_busy and time.monotonic() < until:
            time.sleep(0.01)
        if not run.is_writer:
            time.sleep(60)
        os.kill(os.getpid(), signal.SIGKILL)


def finish(run, loss, optimizer):
    run.log(loss=loss)
    die(run)
"""

BY_HAND = (
    DIE
    + """
run = init()
model = WRAP(nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 1)))
optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
run.track(model=model, optimizer=optimizer)
for x, y in run.batches(points(192), 16, epochs=1):
    is_update = run.step % 4 == 0
    with model.no_sync() if NO_SYNC and not is_update else contextlib.nullcontext():
        loss = (model(x) - y).square().mean()
        (loss / 4).backward()
    if is_update:
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        optimizer.zero_grad()
    run.log(loss=loss)
    if "STOP" in os.environ:
        time.sleep(0.3)  # several ranks agree on a stop every quarter of a second
    if run.step == int(os.environ.get("STOP", 0)):
        os.kill(os.getpid(), signal.SIGTERM)
    die(run)
"""
)


def by_hand(wrap: str = "", no_sync: bool = False) -> str:
    return "import contextlib\n" + BY_HAND.replace("WRAP", wrap).replace("NO_SYNC", str(no_sync))


def equal(one: Path, other: Path) -> list[object]:
    return list(differences(newest(one), newest(other)))


def data(size: int = 192) -> torch.utils.data.TensorDataset:
    return torch.utils.data.TensorDataset(
        torch.randn(size, 8, generator=torch.Generator().manual_seed(0))
    )


def trained(
    directory: Path, make, *, leave_at: int = 0, stop_at: int = 0, **options
) -> harness.Run:
    """`make(run)` builds and tracks, and returns what makes a step; the loop is left or stopped
    there."""
    with undone():
        run = harness.init(
            directory,
            **({"seed": 1, "save_every_s": None, "save_every_steps": 3, "keep_last": 99} | options),
        )
        step = make(run)
        with contextlib.suppress(SystemExit):
            for (x,) in run.batches(data(), 16, epochs=1):
                run.log(loss=step(x))
                if run.step == stop_at:
                    signal.raise_signal(signal.SIGTERM)
                if run.step == leave_at:
                    break
    return run


def updated(model: nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor) -> torch.Tensor:
    """A step of a loop that has nothing odd about it; returns the loss."""
    optimizer.zero_grad()
    loss = model(x).square().mean()
    loss.backward()
    optimizer.step()
    return loss


def goes_on(tmp_path: Path, make, steps: tuple[int, ...], **options) -> None:
    """Stopped at the first of the steps, left at the next, and so on by turns, it ends as the one
    that was neither."""
    trained(tmp_path / "whole", make, **options)
    for step, how in zip(steps, itertools.cycle(("stop_at", "leave_at")), strict=False):
        trained(tmp_path / f"{how}{step}", make, **{how: step}, **options)
        assert trained(tmp_path / f"{how}{step}", make, **options).finished
        assert equal(tmp_path / "whole", tmp_path / f"{how}{step}") == [], (how, step)


def warnings_in(text: str) -> list[str]:
    """The warnings, without one about this process, which holds more than a program does."""
    return [
        line
        for line in text.splitlines()
        if "warning" in line and "holds more objects than are searched" not in line
    ]


def accumulating(run: harness.Run):
    model = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    run.track(model=model, optimizer=optimizer)

    def step(x):
        loss = model(x).square().mean()
        (loss / 4).backward()
        if run.step % 4 == 0:
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            optimizer.step()
            optimizer.zero_grad()
        return loss

    return step


def test_a_loop_that_accumulates_by_hand_goes_on_exactly_from_any_step(tmp_path):
    goes_on(tmp_path, accumulating, (3, 4, 6))
    whole, stopped = tmp_path / "whole", tmp_path / "stop_at6"
    assert steps_of(whole) == [4, 8, 12]
    assert steps_of(stopped)[:2] == [4, 6]  # a stop does not wait
    assert all("gradients" not in payload for payload in payloads(whole).values())
    assert set(payloads(stopped)[6]["gradients"]) == {
        f"model.{at}.{name}" for at in (0, 1) for name in ("weight", "bias")
    }
    assert payloads(stopped)[6]["format_version"] == 2


def payloads(directory: Path) -> dict[int, dict]:
    store = LocalStore(directory)
    return {manifest.step: load.load(store, manifest) for manifest in read_catalog(store).manifests}


@pytest.mark.parametrize("head", [True, False])
def test_a_loop_that_updates_each_step_keeps_no_gradients(tmp_path, head):
    def make(run):
        model = nn.Linear(8, 1)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
        run.track(model=model, optimizer=optimizer)

        def step(x):
            if head:
                optimizer.zero_grad()
            loss = model(x).square().mean()
            loss.backward()
            optimizer.step()
            if not head:
                optimizer.zero_grad()
            return loss

        return step

    trained(tmp_path / "a", make, stop_at=5)
    assert steps_of(tmp_path / "a") == [3, 5]
    assert all(
        "gradients" not in payload and payload["format_version"] == 1
        for payload in payloads(tmp_path / "a").values()
    )


@pytest.mark.parametrize(("ranks", "no_sync"), [(1, False), (2, True)])
def test_killed_between_two_updates_it_ends_as_the_one_that_was_not(tmp_path, ranks, no_sync):
    source = by_hand("nn.parallel.DistributedDataParallel" if ranks > 1 else "", no_sync)
    outcome = killed_once(tmp_path, source, die=7, ranks=ranks)
    assert outcome.killed.code == -signal.SIGKILL and "resumes from step 4" in outcome.resumed.text
    assert outcome.is_equal, outcome.rows


def test_gradients_that_differ_by_rank_are_each_ranks_own(tmp_path):
    source = by_hand("nn.parallel.DistributedDataParallel", no_sync=True)
    assert live(tmp_path, source, "whole", ranks=2).code == 0
    assert live(tmp_path, source, "stopped", ranks=2, env={"STOP": "7"}).code == 0
    payload = payloads(tmp_path / "stopped")[7]
    own = [entry["gradients"] for entry in payload["own"]]
    assert "gradients" not in payload and not torch.equal(*(one["model.0.weight"] for one in own))
    resumed = live(tmp_path, source, "stopped", ranks=2)
    assert resumed.code == 0 and "resumes from step 7" in resumed.text
    assert equal(tmp_path / "whole", tmp_path / "stopped") == []


def test_on_another_number_of_ranks_it_is_said_what_is_lost(tmp_path):
    source = by_hand("nn.parallel.DistributedDataParallel", no_sync=True)
    assert live(tmp_path, source, "stopped", ranks=2, env={"STOP": "7"}).code == 0
    alone = live(tmp_path, source, "stopped")
    assert alone.code == 0 and "what each rank had for itself is lost (gradients)" in alone.text


def adversaries(run: harness.Run):
    """The critic's gradients, that its own step has not seen, are there at each boundary."""
    critic, generator = nn.Linear(8, 1), nn.Linear(8, 8)
    of_critic, of_generator = (
        torch.optim.Adam(model.parameters(), lr=0.05) for model in (critic, generator)
    )
    run.track(critic=critic, generator=generator, of_critic=of_critic, of_generator=of_generator)

    def step(x):
        loss = (critic(x) - critic(generator(x).detach())).mean()
        if run.step % 2:  # the other half of the time they are used
            critic.zero_grad()
        loss.backward()
        of_critic.step()
        generator.zero_grad()
        critic(generator(x)).mean().backward()
        of_generator.step()
        return loss

    return step


def test_gradients_that_are_always_under_way_are_kept_without_waiting(tmp_path):
    goes_on(tmp_path, adversaries, (4, 7))
    assert steps_of(tmp_path / "whole") == [3, 6, 9, 12]
    assert set(payloads(tmp_path / "whole")[6]["gradients"]) == {"critic.weight", "critic.bias"}


def test_a_gradient_of_zeros_is_another_thing_than_none(tmp_path):
    """To an optimizer that decays weights. Here a part takes part in some steps only."""

    def make(run):
        model = nn.ModuleList([nn.Linear(8, 1), nn.Linear(8, 1)])
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.1)
        run.track(model=model, optimizer=optimizer)

        def step(x):
            if run.step == 5:
                optimizer.zero_grad(set_to_none=True)
            optimizer.zero_grad(set_to_none=False)
            loss = sum(
                part(x).square().mean()
                for part in (model if run.step in (1, 2, 3, 4, 9) else model[:1])
            )
            loss.backward()
            optimizer.step()
            return loss

        return step

    goes_on(tmp_path, make, (4, 11))


@pytest.mark.parametrize("decay", [1.0, 0.9])
def test_gradients_that_nobody_sets_to_zero_are_kept(tmp_path, decay):
    def make(run):
        model = nn.Linear(8, 1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        run.track(model=model, optimizer=optimizer)

        def step(x):
            loss = model(x).square().mean()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            for parameter in model.parameters() if decay < 1 else ():
                there(parameter.grad).mul_(decay)
            return loss

        return step

    goes_on(tmp_path, make, (4, 8))
    assert steps_of(tmp_path / "whole") == [3, 6, 9, 12]


def test_a_save_waits_for_an_optimizer_that_never_steps_no_longer_than_it_must(
    tmp_path, monkeypatch
):
    monkeypatch.setattr("harness.tracking.gradients.MOST_STEPS", 2)

    def make(run):
        model, later = nn.Linear(8, 1), nn.Linear(8, 1)
        optimizer, second = (torch.optim.SGD(part.parameters(), lr=0.05) for part in (model, later))
        run.track(model=model, later=later, optimizer=optimizer, second=second)

        def step(x):
            optimizer.zero_grad()
            loss = (model(x) + later(x)).square().mean()
            loss.backward()
            optimizer.step()
            if run.step >= 10:
                second.step()
                second.zero_grad()
            return loss

        return step

    goes_on(tmp_path, make, (7, 8))
    assert steps_of(tmp_path / "whole") == [5, 6, 9, 12]


def test_an_update_that_was_skipped_is_waited_for(tmp_path):
    """As a gradient scaler does when a gradient is not finite; and sparse gradients stay sparse."""

    def make(run):
        model = nn.Embedding(20, 8, sparse=True)
        optimizer = torch.optim.SparseAdam(model.parameters(), lr=0.05)
        run.track(model=model, optimizer=optimizer)

        def step(x):
            if run.step % 5 == 1:
                optimizer.zero_grad()
            loss = (model(torch.arange(run.step, run.step + 3)) * x[:3]).sum()
            loss.backward()
            if run.step % 5 == 0:
                optimizer.step()
            return loss

        return step

    goes_on(tmp_path, make, (4, 8))
    assert steps_of(tmp_path / "whole") == [5, 10, 12]
    assert payloads(tmp_path / "whole")[12]["gradients"]["model.weight"]["indices"].shape[0] == 1


@pytest.mark.parametrize("is_zeroed", [True, False])
def test_used_sparse_gradients_that_persist_stay_sparse(tmp_path, is_zeroed):
    def make(run):
        model = nn.Embedding(20, 8, sparse=True)
        optimizer = torch.optim.SparseAdam(model.parameters(), lr=0.05)
        run.track(model=model, optimizer=optimizer)

        def step(x):
            if is_zeroed:
                optimizer.zero_grad(set_to_none=False)
            loss = (model(torch.arange(run.step, run.step + 3)) * x[:3]).sum()
            loss.backward()
            optimizer.step()
            return loss

        return step

    goes_on(tmp_path, make, (4, 8))


class Other:
    """An optimizer that is not one of PyTorch's."""

    def __init__(self, parameters):
        self.parameters, self.count = list(parameters), 0

    @torch.no_grad()
    def step(self):
        for parameter in self.parameters:
            parameter -= 0.05 * parameter.grad
            parameter.grad = None
        self.count += 1

    def state_dict(self):
        return {"count": self.count}

    def load_state_dict(self, state):
        self.count = state["count"]


def test_gradients_of_an_optimizer_that_tells_nothing_are_kept(tmp_path):
    def make(run):
        model = nn.Linear(8, 1)
        optimizer = Other(model.parameters())
        run.track(model=model, optimizer=optimizer)

        def step(x):
            loss = model(x).square().mean()
            loss.backward()
            if run.step % 4 == 0:
                optimizer.step()
            return loss

        return step

    goes_on(tmp_path, make, (3, 7))


class Changing(nn.Module):
    """Changes of itself what no `state_dict` tells."""

    def __init__(self, p: float = 0.1) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout(p))
        self.head = nn.Linear(8, 1)
        self.calls = 0
        self.history: list[int] = []
        self.scales = {"loss": 1.0}
        self.mean = torch.zeros(8)  # state that its author has not registered
        self.act = torch.relu
        self.cache: torch.Tensor | None = None  # made when it is first used
        self.register_buffer("mask", torch.ones(8), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.cache is None:
            self.cache = torch.arange(8.0)
        self.calls += 1
        self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0)
        y = self.act(self.body(x - self.mean) * self.mask) + 0 * self.cache
        return (
            self.head(y) * self.scales["loss"]
            + 0.001 * len(self.history)
            + 0.001 * (self.calls % 7)
        )


def changing(p: float = 0.1, build=Changing):
    def make(run: harness.Run):
        model = build(p)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        run.track(model=model, optimizer=optimizer)
        model.body.requires_grad_(False)  # frozen at first

        def step(x):
            if run.step == 4:
                model.body.requires_grad_(True)
                model.body[1].eval()
                model.body[1].momentum = 0.3
                model.body[2].p = 0.4
                model.mask[3:] = 0.5
            if run.step in (5, 8):
                model.history.append(run.step)
                model.scales["loss"] *= 0.5
            return updated(model, optimizer, x)

        return step

    return make


def test_what_changed_of_modules_comes_back_after_two_resumes(tmp_path, capsys):
    trained(tmp_path / "whole", changing())
    trained(tmp_path / "a", changing(), leave_at=7)
    trained(tmp_path / "a", changing(), leave_at=10)
    assert trained(tmp_path / "a", changing()).finished
    assert equal(tmp_path / "whole", tmp_path / "a") == []
    assert "changes in training" not in capsys.readouterr().out
    attributes = payloads(tmp_path / "a")[9]["attributes"]["model"]
    assert attributes["body.1"]["training"] == {"built": True, "now": False}
    assert attributes["body.2"] == {"p": {"built": 0.1, "now": 0.4}}
    assert attributes["body.0"] == {
        f"{name}.requires_grad": {"built": False, "now": True} for name in ("weight", "bias")
    }
    assert set(attributes[""]) == {"calls", "history", "scales", "mean", "cache", "buffer mask"}


SHARED = (
    """
run = init()
torch.manual_seed(0)
cfg, own = {"noise": 1.0, "widths": [1.0, 2.0], "by": {"layer": 1.0}}, {"noise": 1.0}
by = cfg["by"]
class Noisy(nn.Linear):
    def __init__(self):
        super().__init__(8, 8)
        self.cfg, self.pair, self.own = cfg, (cfg["widths"], 1.0), own
    def forward(self, x):
        noise = self.cfg["noise"] * self.pair[0][-1] * self.cfg["by"]["layer"] * self.own["noise"]
        return super().forward(x) * noise
layers = [Noisy(), Noisy()]
model = nn.Sequential(*layers, nn.Linear(8, 1))
optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
run.track(model=model, optimizer=optimizer)
for x, y in run.batches(points(), 16, epochs=2):
    cfg["noise"] *= 0.99
    cfg["widths"].append(cfg["widths"][-1] * 0.99)
    by["layer"] *= 0.99
    if run.step == 5:
        layers[0].own = {"noise": 0.5}
    own["noise"] *= 1.01
"""
    + STEP
)


def test_a_dict_that_layers_and_the_loop_share_is_shared_after_a_restart(tmp_path):
    """But for the one that a layer has replaced: the other layer's is another one."""
    outcome = killed_once(tmp_path, SHARED, die=11)
    assert outcome.is_equal, (outcome.rows, outcome.resumed.text)
    kept = payloads(tmp_path / "killed")[18]["attributes"]["model"]
    assert kept["0"]["own"]["replaced"] and "replaced" not in kept["1"]["own"]
    assert not any("replaced" in kept[path][key] for path in "01" for key in ("cfg", "pair"))


TORN = (
    """
run = init()
torch.manual_seed(0)
shared = {"counts": [0, 0], "alpha": 0.0, "by": {"layer": 1.0}}
class Block(nn.Linear):
    def __init__(self):
        super().__init__(8, 8)
        self.shared, self.swapped, self.made, self.seen = shared, [0.0], {"sum": 0.0}, [[0.0]]
    def forward(self, x):
        if self is layers[0]:  # one inner list is another one in each step
            self.shared["counts"] = [0, 0]
        self.shared["counts"][0] += 1
        self.shared["by"]["layer"] *= 0.99
        self.made["sum"] += 0.01
        noise = self.shared["counts"][0] + self.made["sum"] + self.alias[0] + self.swapped[0]
        y = super().forward(x) * self.shared["by"]["layer"] + self.seen[-1][0]
        return 0.2 * noise * y
layers = [Block(), Block(), Block()]
swapped = layers[0].swapped
for layer in layers:
    layer.alias = [1.0]
model = nn.Sequential(*layers, nn.Linear(8, 1))
optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
run.track(model=model, optimizer=optimizer)
for x, y in run.batches(points(), 16, epochs=2):
    if run.step == 4:
        one = {"sum": 0.5}  # another one for all
        for layer in layers:
            layer.made = one
        layers[2].alias = layers[1].alias = layers[0].swapped
        layers[1].seen.append(layers[0].seen[0])
        layers[2].seen.append([0.25])
    swapped[0] += 0.125
    layers[0].seen[0][0] += 0.01
    layers[2].seen[-1][0] += 0.01
"""
    + STEP
)


def test_a_dict_stays_shared_where_what_is_in_it_is_replaced_or_all_of_it_is(tmp_path):
    """Or where another attribute comes to hold what one was built with."""
    outcome = killed_once(tmp_path, TORN, die=11)
    assert outcome.is_equal, (outcome.rows, outcome.whole.text, outcome.resumed.text)
    kept = payloads(tmp_path / "killed")[18]["attributes"]["model"]
    for path in "012":
        assert kept[path]["shared"]["replaced"] == [(("counts",), 0)]
        assert kept[path]["made"]["replaced"] == [((), 1)]
    place = ("model", "0", "swapped", ())
    assert kept["2"]["alias"]["replaced"] == [((), place)] and "replaced" not in kept["0"]["seen"]


def test_what_an_older_file_says_of_a_replaced_dict_is_understood():
    shared = {"a": [1], "b": 2}
    tracked = {"model": nn.Sequential(nn.ReLU(), nn.ReLU())}
    for part in tracked["model"]:
        vars(part)["shared"] = shared
    attributes = Attributes(dict)
    attributes.begin(tracked)
    entry = {"built": {"a": [1], "b": 2}, "now": {"a": [3], "b": 4}}
    attributes.restore({"model": {"0": {"shared": entry | {"replaced": True}}}})
    assert vars(tracked["model"][0])["shared"] == entry["now"] and shared == entry["built"]


class Becoming(nn.Module):
    """Has attributes that become something of another kind."""

    once: torch.Tensor | None

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(8, 1)
        self.mean: torch.Tensor | None = None  # made by the first forward pass, then carried on
        self.start: torch.Tensor | None = torch.full((8,), 0.1)
        self.shift: torch.Tensor | float = torch.full((8,), 0.2)
        self.gone = torch.full((8,), 0.3)
        self.warm = 1
        self.pair: tuple[list[int], float] = ([], 0.5)
        self.register_buffer("once", torch.full((8,), 0.4), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        now = x.detach().mean(0)
        self.mean = now if self.mean is None else 0.9 * self.mean + 0.1 * now
        self.late = getattr(self, "late", 0 * now) + now
        for shift in (
            self.mean,
            self.late,
            self.start,
            self.shift,
            getattr(self, "gone", None),
            self.once,
        ):
            x = x if shift is None else x - 0.1 * shift
        return self.body(x) * (0.5 if self.warm is True else 1.0) + len(self.pair[0])


def test_attributes_that_become_something_of_another_kind_come_back(tmp_path, capsys):
    def make(run: harness.Run):
        model = Becoming()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        run.track(model=model, optimizer=optimizer)

        def step(x):
            if run.step == 3:
                model.start, model.shift, model.once, model.warm = None, 0.25, None, True
                model.pair[0].append(1)
                del model.gone
            return updated(model, optimizer, x)

        return step

    goes_on(tmp_path, make, (2, 4, 7))
    trained(tmp_path / "twice", make, leave_at=4)
    trained(tmp_path / "twice", make, leave_at=7)
    assert trained(tmp_path / "twice", make).finished
    assert equal(tmp_path / "whole", tmp_path / "twice") == []
    assert "changes in training" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "becomes",
    [object(), nn.Parameter(torch.ones(8)), {"held": object()}],
    ids=["object", "trained", "container"],
)
def test_a_tensor_that_becomes_what_cannot_be_kept_is_named(tmp_path, capsys, becomes):
    """Once is enough: what a restart would build is the tensor."""

    def make(run: harness.Run):
        model = Becoming()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        run.track(model=model, optimizer=optimizer)

        def step(x):
            if run.step == 2:
                vars(model)["unused"] = becomes
            return updated(model, optimizer, x)

        model.unused = torch.zeros(8)
        return step

    trained(tmp_path / "a", make)
    assert "model.unused changes in training" in capsys.readouterr().out


@pytest.mark.parametrize(
    "becomes",
    [torch.ones(8, requires_grad=True), torch.eye(8).to_sparse()],
    ids=["trained", "sparse"],
)
def test_a_buffer_that_becomes_what_cannot_be_kept_is_named_and_not_taken_for_gone(
    tmp_path, capsys, becomes
):
    seen = []

    def make(run: harness.Run):
        model = Becoming()
        model.register_buffer("unused", torch.zeros(8), persistent=False)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        run.track(model=model, optimizer=optimizer)

        def step(x):
            seen.append(model.unused)
            if run.step == 2:
                model.unused = becomes
            return updated(model, optimizer, x)

        return step

    trained(tmp_path / "a", make, leave_at=4)
    assert "model.buffer unused changes in training" in capsys.readouterr().out
    seen.clear()
    trained(tmp_path / "a", make)
    assert seen[0] is not None  # as built, which was said


def test_a_program_that_builds_another_value_has_its_way_and_both_are_told(tmp_path, capsys):
    trained(tmp_path / "a", changing(), leave_at=7)
    model: dict[str, Changing] = {}

    def build(p):
        model["it"] = Changing(p)
        return model["it"]

    trained(tmp_path / "a", changing(0.2, build), leave_at=7)
    assert (
        "model.body.2.p was built as 0.1 and had become 0.4; it is built as 0.2 now, "
        "and that stands" in capsys.readouterr().out
    )
    assert model["it"].body[2].p == 0.2 and not model["it"].body[1].training


def test_what_cannot_be_kept_is_named_once(tmp_path, capsys):
    class Odd(Changing):
        def forward(self, x):
            self.act = torch.tanh if self.calls > 2 else torch.relu
            # More than is kept of what is made on the way.
            self.seen = x.detach().sum().expand(20_000).clone()
            return super().forward(x)

    trained(tmp_path / "a", changing(build=Odd))
    said = capsys.readouterr().out
    assert said.count("warning: model.act changes in training") == 1
    assert said.count("warning: model.seen changes in training") == 1
    assert said.count("changes in training") == 2


class Bank(nn.Module):
    """Has buffers that are empty at first."""

    keys: torch.Tensor
    scale: torch.Tensor | None
    wide: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("keys", torch.empty(0, 2))
        self.register_buffer("scale", None)
        self.register_buffer("wide", torch.zeros(1, 8))

    def grow(self) -> None:
        self.keys, self.scale = torch.zeros(5, 2), torch.ones(())
        self.register_buffer("cache", torch.zeros(8), persistent=False)


class Prepares(Bank):
    """Makes what it lacks when it is loaded."""

    def _load_from_state_dict(self, state_dict, prefix, *others):
        self.register_buffer("made", torch.zeros_like(state_dict[f"{prefix}made"]))
        super()._load_from_state_dict(state_dict, prefix, *others)

    def grow(self) -> None:
        super().grow()
        self.register_buffer("made", torch.zeros(8))


def resized(resize):
    def make(run):
        banks = nn.ModuleList([Bank(), Prepares()])
        model = nn.Sequential(nn.Linear(8, 4), nn.LazyLinear(4), nn.LazyBatchNorm1d(), nn.ReLU())
        model[3].banks = banks
        layers: list[Any] = list(model)
        optimizer = torch.optim.SGD([layers[0].weight, layers[1].weight], lr=0.05)
        run.track(model=model, optimizer=optimizer)

        def step(x):
            if run.step == 2:
                resize(model, optimizer, banks)
            return updated(model, optimizer, x)

        return step

    return make


def test_what_gets_its_size_in_training_and_can_be_loaded_needs_no_words(tmp_path, capsys):
    def resize(model, optimizer, banks):
        for bank in banks:
            bank.grow()

    trained(tmp_path / "a", resized(resize), leave_at=7)
    assert trained(tmp_path / "a", resized(lambda *_: None)).finished
    assert "warning" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("resize", "said"),
    [
        (
            lambda model, *_: model[0].register_buffer("mean", torch.zeros(8)),
            "model does not have the tensors with which it was tracked: 0.mean is new. A",
        ),
        (
            lambda model, *_: nn.utils.prune.l1_unstructured(model[0], "weight", 0.5),
            ": 0.weight is gone, 0.weight_orig is new, 0.weight_mask is new. A",
        ),
        (lambda _, __, banks: setattr(banks[0], "wide", None), "3.banks.0.wide is gone. A"),
        (
            lambda _, __, banks: setattr(banks[0], "wide", torch.zeros(5, 8)),
            "3.banks.0.wide was 1x8 and is 5x8. A",
        ),
        (
            lambda model, optimizer, _: optimizer.add_param_group({"params": [model[0].bias]}),
            "optimizer does not have the tensors with which it was tracked: "
            "parameter group 1 is new. A",
        ),
    ],
    ids=["made", "pruned", "gone", "grown", "group"],
)
def test_tensors_that_a_restart_could_not_load_are_told_at_the_first_save(
    tmp_path, capsys, resize, said
):
    trained(tmp_path / "a", resized(resize), leave_at=10)
    out = capsys.readouterr().out
    (warning,) = warnings_in(out)
    assert said in warning and "A restart that builds it as" in out
    with pytest.raises(UsageError):
        trained(tmp_path / "a", resized(resize))


def test_an_attribute_that_comes_to_hold_another_generator_is_named(tmp_path, capsys):
    """But not one that gets a new generator, whose state is kept in its place."""

    def make(run):
        model = nn.Linear(8, 1)
        own: dict[str, Any] = vars(model)
        for name in ("a", "b", "new"):
            own[f"rng_{name}"] = np.random.default_rng(0)
        own["rng"], own["by"] = own["rng_a"], {"now": own["rng_a"]}
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        run.track(model=model, optimizer=optimizer)

        def step(x):
            if run.step == 2:
                own["rng"] = own["rng_b"]
            if run.step == 5:
                own["by"]["now"] = own["rng_b"]
            own["rng_new"] = np.random.default_rng(run.step)
            drawn = own["rng"].normal() + own["rng_new"].normal() + own["by"]["now"].normal()
            return updated(model, optimizer, x + 0.01 * drawn)

        return step

    trained(tmp_path / "a", make)
    said = capsys.readouterr().out
    for name in ("model.rng", "model.by"):
        assert said.count(f"warning: {name} changes in training, and is not saved") == 1
    assert said.count("changes in training") == 2


def test_a_number_that_is_not_one_as_built_comes_back(tmp_path, capsys):
    def make(run):
        model = nn.Linear(8, 1)
        own: dict[str, Any] = vars(model)
        own["ema"], own["by"] = float("nan"), {"low": [float("nan")], "high": 0.0}
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        run.track(model=model, optimizer=optimizer)

        def step(x):
            mean = x.mean().item()
            own["ema"] = mean if math.isnan(own["ema"]) else 0.9 * own["ema"] + 0.1 * mean
            own["by"]["high"] = max(own["by"]["high"], mean)
            return updated(model, optimizer, x * (1 + own["ema"] + own["by"]["high"]))

        return step

    goes_on(tmp_path, make, (4,))
    assert "that stands" not in capsys.readouterr().out


def test_values_that_are_no_numbers_are_the_same():
    nan = float("nan")
    assert is_same({"a": [nan, complex(nan, 1)]}, {"a": [-nan, complex(nan, 1)]})
    assert not is_same(nan, 0.0) and not is_same(complex(nan, 1), complex(nan, 2))
    assert not is_same(np.float32("nan"), nan) and is_same(np.float32("nan"), np.float32("nan"))


class Growing(nn.Linear):
    """Scales by the middle of a list that grows by so many items in each step."""

    late: list[float]

    def __init__(self, each: int) -> None:
        super().__init__(8, 1)
        self.each = each
        self.history: list[float] = []
        self.names = {f"word {n}": n for n in range(5_000)}  # as built: never looked into
        self.cache: list[int] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.cache = self.cache or [0] * 120_000
        mean = x.detach().mean().item()
        self.history.extend(mean / n for n in range(1, self.each + 1))
        vars(self).setdefault("late", []).extend(self.history[-self.each :])
        return super().forward(x) * (1 + self.history[len(self.late) // 2])


def growing(each: int, at_step=lambda _model, _step: None):
    def make(run):
        model = Growing(each)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        run.track(model=model, optimizer=optimizer)

        def step(x):
            at_step(model, run.step)
            return updated(model, optimizer, x)

        return step

    return make


def test_a_list_that_grows_beyond_what_is_looked_into_as_built_is_kept(tmp_path, capsys):
    goes_on(tmp_path, growing(700), (4, 7))
    assert warnings_in(capsys.readouterr().out) == []
    kept = payloads(tmp_path / "whole")[9]["attributes"]["model"][""]
    assert len(kept["history"]["now"]) == len(kept["late"]["now"]) == 6300
    assert kept.keys() == {"history", "late"}


def test_what_was_kept_and_cannot_be_any_more_is_named_at_the_first_save_without_it(
    tmp_path, capsys
):
    def at_step(model, step):
        if step == 8:
            model.late.append(object())

    for leave_at in (7, 10):
        trained(tmp_path / "a", growing(12_000, at_step), leave_at=leave_at)
    said = capsys.readouterr().out
    assert said.count("warning: model.history was saved until now and is not any more") == 1
    assert "it has more than 100,000 items" in said
    assert said.count("warning: model.late was saved until now and is not any more") == 1
    assert "it is not plain data any more" in said and said.count("warning") == 2


class Replacing(nn.Module):
    """Has parts without parameters, which the loop replaces."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Dropout(0.1)
        self.drop: nn.Module | None = nn.Dropout(0.1)
        self.body: nn.Module = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.2), nn.LazyLinear(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.one(x)
        return self.body(x if self.drop is None else self.drop(x))


def replacing(with_what):
    def make(run):
        model = Replacing()
        model(torch.zeros(1, 8))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        run.track(model=model, optimizer=optimizer)

        def step(x):
            if run.step == 2:
                model.drop = with_what()
            return updated(model, optimizer, x)

        return step

    return make


def test_a_part_that_is_replaced_by_one_of_its_class_comes_back(tmp_path, capsys):
    goes_on(tmp_path, replacing(lambda: nn.Dropout(0.5)), (4,))
    assert "warning" not in capsys.readouterr().out
    kept = payloads(tmp_path / "whole")[9]["attributes"]["model"]
    assert kept == {"drop": {"p": {"built": 0.1, "now": 0.5}}}


@pytest.mark.parametrize(
    ("with_what", "word"),
    [
        (nn.Identity, "Identity"),
        (lambda: None, "nothing"),
        (lambda: nn.Sequential(nn.Dropout(0.5)), "Sequential"),
    ],
)
def test_a_part_that_is_replaced_by_another_is_named_once_and_a_resume_does_not_fail(
    tmp_path, capsys, with_what, word
):
    make = replacing(with_what)
    trained(tmp_path / "a", make, leave_at=10)
    said = capsys.readouterr().out
    assert said.count(f"warning: model.drop was built as Dropout and is {word} now") == 1
    assert said.count("warning") == 1
    assert trained(tmp_path / "a", make).finished


class Wrapped(nn.Module):
    """With a wrapper inside; what is in the wrappers is called directly, as there may be a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.drop = nn.Linear(8, 8), nn.DataParallel(nn.Dropout(0.5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.drop.module(self.layer(x))


@pytest.mark.parametrize("inside_only", [False, True])
def test_the_mode_of_a_wrapper_comes_back_with_that_of_what_is_inside(tmp_path, inside_only):
    def make(run):
        model = nn.DataParallel(Wrapped())
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        run.track(model=model, optimizer=optimizer)

        def step(x):
            if run.step == 3:
                for part in (model, model.module.drop):
                    (part.module if inside_only else part).eval()
            if run.step == 8:  # a validation of the program's own
                for part in (model.module.drop, model):
                    was = part.training
                    part.eval()
                    part.train(was)
            return updated(model.module, optimizer, x)

        return step

    goes_on(tmp_path, make, (4, 7))


def test_an_ordinary_model_has_nothing_to_keep(tmp_path, capsys):
    """With an evaluation of the program's own in each step, modules of torch that keep something to
    themselves, and all."""

    def make(run):
        normed = nn.utils.parametrizations.spectral_norm(nn.Linear(8, 8))
        model = nn.Sequential(
            normed, nn.BatchNorm1d(8), nn.Unflatten(1, (2, 4)), nn.LSTM(4, 4, batch_first=True)
        )
        average = torch.optim.swa_utils.AveragedModel(model)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
        run.track(model=model, optimizer=optimizer, average=average)

        def step(x):
            model.train()
            optimizer.zero_grad()
            loss = model(x)[0].square().mean()
            loss.backward()
            optimizer.step()
            average.update_parameters(model)
            model.eval()
            model(x)
            model.train()
            return loss

        return step

    trained(tmp_path / "a", make)
    assert all(payload["format_version"] == 1 for payload in payloads(tmp_path / "a").values())
    assert "warning" not in capsys.readouterr().out


def test_attributes_that_differ_by_rank_are_each_ranks_own(tmp_path):
    source = (
        DIE
        + """
class Model(nn.Linear):
    factor = 1.0

run = init()
model = Model(8, 1)
model.factor, model.steps = 1.0, 0
ddp = nn.parallel.DistributedDataParallel(model)
optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
run.track(model=ddp, optimizer=optimizer)
for x, y in run.batches(points(), 16, epochs=1):
    model.steps += 1
    model.factor *= 1.5 + run.rank
    loss = (ddp(x) * (model.factor % 1) - y).square().mean()
    optimizer.zero_grad()
    loss.backward()
    finish(run, loss, optimizer.step() or optimizer)
"""
    )
    outcome = killed_once(tmp_path, source, ranks=2)
    assert outcome.is_equal, outcome.rows
    payload = payloads(tmp_path / "killed")[6]
    assert (
        payload["own"][1]["attributes"]["model"][""]["factor"]["now"] == 2.5**6
        and "attributes" not in payload
    )


GENERATORS = (
    DIE
    + """
run = init()
model = nn.Linear(8, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
seed = run.rank
kinds = ("PCG64", "MT19937", "Philox", "SFC64", "PCG64DXSM")
many = {kind: np.random.Generator(getattr(np.random, kind)(seed)) for kind in kinds}
t, old, r, bits = (
    torch.Generator().manual_seed(seed),
    np.random.RandomState(seed),
    random.Random(seed),
    np.random.PCG64(seed),
)
run.track(model=model, optimizer=optimizer, t=t, old=old, r=r, bits=bits, **many)
for x, y in run.batches(points(), 16, epochs=1):
    drawn = [
        torch.rand(1, generator=t).item(),
        old.standard_normal(),
        r.gauss(0, 1),
        bits.random_raw() % 7,
    ]
    for one in many.values():
        drawn += [
            one.standard_normal(),
            float(one.integers(0, 9, dtype=np.uint32)),
            one.spawn(1)[0].random(),
        ]
    loss = (model(x) * sum(drawn) - y).square().mean() * 0.001
    optimizer.zero_grad()
    loss.backward()
    for parameter in model.parameters() if run.world_size > 1 else ():
        torch.distributed.all_reduce(parameter.grad)
    optimizer.step()
    run.log(loss=loss)
    die(run)
"""
)


@pytest.mark.parametrize("ranks", [1, 2])
def test_generators_that_are_tracked_go_on(tmp_path, ranks):
    outcome = killed_once(tmp_path, GENERATORS, ranks=ranks)
    assert outcome.killed.code == -signal.SIGKILL and outcome.is_equal, (
        outcome.rows,
        outcome.resumed.text,
    )


def test_a_generator_of_another_kind_or_none_is_refused(tmp_path):
    def make(**generators):
        def build(run):
            model = nn.Linear(8, 1)
            optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
            run.track(model=model, optimizer=optimizer, **generators)
            return lambda x: torch.zeros(())

        return build

    trained(tmp_path / "a", make(rng=np.random.default_rng(0)), leave_at=5)
    with pytest.raises(
        UsageError,
        match=r"found: numpy.random.RandomState \(MT19937\), "
        r"expected: numpy.random.Generator \(PCG64\)",
    ):
        trained(tmp_path / "a", make(rng=np.random.RandomState(0)), leave_at=5)
    with pytest.raises(UsageError, match="holds what is not tracked: rng"):
        trained(tmp_path / "a", make(), leave_at=5)
    with pytest.raises(UsageError, match="SystemRandom without state_dict"):
        trained(tmp_path / "b", make(rng=random.SystemRandom()))


POWER = (
    DIE
    + """
from torch.distributed.algorithms.ddp_comm_hooks import powerSGD_hook
run = init()
model = nn.parallel.DistributedDataParallel(nn.Sequential(nn.Linear(8, 64), nn.Linear(64, 1)))
state = powerSGD_hook.PowerSGDState(
    None, matrix_approximation_rank=1, start_powerSGD_iter=2, min_compression_rate=1
)
model.register_comm_hook(state, powerSGD_hook.powerSGD_hook)
optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
run.track(model=model, optimizer=optimizer)
for x, y in run.batches(points(), 16, epochs=1):"""
    + STEP
)


def test_the_state_of_a_communication_hook_is_each_ranks_own(tmp_path):
    outcome = killed_once(tmp_path, POWER, ranks=2)
    assert outcome.killed.code == -signal.SIGKILL and outcome.is_equal, (
        outcome.rows,
        outcome.resumed.text,
    )
    one, other = (
        entry["hooks"]["model: powerSGD_hook 0.0"]["error_dict"]
        for entry in payloads(tmp_path / "killed")[6]["own"]
    )
    assert one and not torch.equal(*(next(iter(errors.values())) for errors in (one, other)))


@pytest.mark.parametrize(
    ("state", "words"),
    [
        (
            "post_localSGD_hook.PostLocalSGDState(None, None, 1)",
            "groups of ranks train weights of their own",
        ),
        ("type('State', (), {})()", "finished"),
        ("late", "was registered after track"),
        (
            "setattr(odd := type('State', (), {})(), 'inner', object()) or odd",
            "cannot be saved: model: hook 0.0, inner",
        ),
    ],
)
def test_a_hook_whose_state_cannot_be_kept_is_refused_at_track(tmp_path, state, words):
    hook = """
def hook(state, bucket):
    return (
        torch.distributed.all_reduce(bucket.buffer().div_(2), async_op=True)
        .get_future()
        .then(lambda done: done.value()[0])
    )
"""
    source = POWER.replace("import powerSGD_hook", f"import post_localSGD_hook{hook}")
    begin, end = source.index("state = power"), source.index("optimizer =")
    register = f"model.register_comm_hook({state}, hook)"
    if state == "late":
        register, source = (
            "",
            source.replace(
                "for x, y in",
                "model.register_comm_hook(type('State', (), {})(), hook)\nfor x, y in",
            ),
        )
    lived = live(tmp_path, f"{source[:begin]}{register}\n{source[end:]}", "a", ranks=2)
    assert words in lived.text


def swap_values(model: nn.Module, average: nn.Module) -> None:
    for own, other in zip(model.parameters(), average.parameters(), strict=True):
        kept = own.data.clone()
        own.data.copy_(other.data)
        other.data.copy_(kept)


def swap_tensors(model: nn.Module, average: nn.Module) -> None:
    for own, other in zip(model.parameters(), average.parameters(), strict=True):
        own.data, other.data = other.data, own.data


def reset(model: nn.Module, average: nn.Module) -> None:
    for own, other in zip(model.parameters(), average.parameters(), strict=True):
        own.data.lerp_(other.data, 0.5)


def average_later(model: nn.Module, average: nn.Module) -> None:
    for own, other in zip(average.parameters(), model.parameters(), strict=True):
        own.data.mul_(0.9).add_(other.data, alpha=0.1)


class Two(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner, self.out = nn.Linear(8, width), nn.Linear(width, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.inner(x))


@pytest.mark.parametrize("width", [8, 100_000])
@pytest.mark.parametrize(
    ("at_head", "undo"),
    [
        (swap_values, swap_values),
        (swap_tensors, swap_tensors),
        (swap_tensors, None),
        (reset, None),
        (average_later, None),
    ],
)
def test_no_file_is_torn_by_what_is_written_behind_pytorchs_back(tmp_path, width, at_head, undo):
    """At the loop's head, and not before the first save: then it is another state than that of the
    boundary before."""
    seen: dict[int, dict] = {}

    def make(run):
        model, average = Two(width), Two(width)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1 / width, momentum=0.9)
        run.track(model=model, optimizer=optimizer, average=average)

        def step(x):
            seen[run.step - 1] = copy.deepcopy(state.capture(run.tracked))
            if run.step >= 5:
                at_head(model, average)
                if undo:
                    undo(model, average)
            return updated(model, optimizer, x)

        return step

    trained(tmp_path / "a", make, save_every_steps=2)
    saved = payloads(tmp_path / "a")
    assert {2, 12} <= set(saved) and len(saved) >= 5
    for number, payload in saved.items():
        if number in seen:
            assert (
                list(differences({name: payload[name] for name in seen[number]}, seen[number]))
                == []
            ), number


LOOP_OF_TWO_EPOCHS = """
run.track(model=model, optimizer=optimizer)
for x, y in run.batches(points(), 16, epochs=2):
    loss = (model(x) - y).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    run.log(loss=loss)
    die(run)
"""
OWN_OPTIMIZER = (
    """
run = init()
torch.manual_seed(0)
class Own(torch.optim.SGD):
    def __init__(self, *given, **named):
        super().__init__(*given, **named)
        self.steps, self._seen, self.warm = 0, torch.zeros(3), {"lr": 0.1}
    @torch.no_grad()
    def step(self, closure=None):
        self.steps += 1
        self._seen += 1
        self.warm["lr"] *= 0.9
        for group in self.param_groups:
            group["lr"] = self.warm["lr"] / self.steps / self._seen[0].item()
        return super().step(closure)
model = nn.Linear(8, 1)
optimizer = Own(model.parameters(), lr=0.1)
"""
    + LOOP_OF_TWO_EPOCHS
)
OWN_GENERATORS = (
    """
run = init()
torch.manual_seed(0)
class Noisy(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.rng, self.others = (
            nn.Linear(8, 1),
            torch.Generator().manual_seed(3),
            [np.random.default_rng(0)],
        )
        self.unused = random.Random(3)
    def forward(self, x):
        return self.inner(
            x + torch.randn(x.shape, generator=self.rng) + float(self.others[0].normal())
        )
class Langevin(torch.optim.SGD):
    def __init__(self, *given, **named):
        super().__init__(*given, **named)
        self.rng = torch.Generator().manual_seed(0)
    @torch.no_grad()
    def step(self, closure=None):
        super().step(closure)
        for parameter in self.param_groups[0]["params"]:
            parameter.add_(0.01 * torch.randn(parameter.shape, generator=self.rng))
model = nn.Sequential(Noisy())
optimizer = Langevin(model.parameters(), lr=0.1)
"""
    + LOOP_OF_TWO_EPOCHS
)


LATE_GENERATORS = (
    """
run = init()
torch.manual_seed(0)
class Noise:
    def __init__(self):
        self.words = {str(number): [number] * 1000 for number in range(900)}
        self.by = {"rng": np.random.default_rng(0)}
def normal():
    g = torch.Generator().manual_seed(0)
    return lambda: torch.randn((), generator=g).item()
class Noisy(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.rng, self.noise, self.others = nn.Linear(8, 1), None, Noise(), {}
        self.draw, self.more = normal(), []
    def forward(self, x):
        if self.rng is None:
            self.rng = torch.Generator().manual_seed(3)
        if "b" not in self.others:
            self.others["b"] = random.Random(3)
        if not self.more:
            self.more.append(np.random.RandomState(0))
        drawn = self.noise.by["rng"].normal() + self.others["b"].random() + self.draw()
        return self.inner(
            x + torch.randn(x.shape, generator=self.rng) + drawn + self.more[0].normal()
        )
model = nn.Sequential(Noisy())
optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
"""
    + LOOP_OF_TWO_EPOCHS
)


HIDDEN_GENERATORS = (
    """
run = init()
torch.manual_seed(0)
class Noise(nn.Module):
    def __init__(self):
        super().__init__()
        self.rng = torch.Generator().manual_seed(3)
    def forward(self, x):
        return x + torch.randn(x.shape, generator=self.rng)
class Noisy(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.first = nn.Linear(8, 1), Noise()
        self.noise, self.same = [nn.Sequential(Noise())], [self.inner, self, self.first]
    def forward(self, x):
        return self.inner(self.noise[0](self.first(x)))
model = Noisy()
optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
"""
    + LOOP_OF_TWO_EPOCHS
)


@pytest.mark.parametrize(
    "source",
    [OWN_OPTIMIZER, OWN_GENERATORS, LATE_GENERATORS, HIDDEN_GENERATORS],
    ids=[
        "attributes of an optimizer",
        "generators of modules and optimizers",
        "generators that are made late, or lie in objects of the program",
        "generators of modules in a list",
    ],
)
def test_what_no_state_dict_tells_of_goes_on(tmp_path, source):
    outcome = killed_once(tmp_path, source)
    assert outcome.is_equal, (outcome.rows, outcome.resumed.text)
    assert "warning" not in outcome.whole.text + outcome.resumed.text


def test_generators_of_modules_are_each_ranks_own_and_those_that_nobody_draws_from_are_not_kept(
    tmp_path,
):
    source = OWN_GENERATORS.replace("manual_seed(3)", "manual_seed(3 + run.rank)").replace(
        "default_rng(0)", "default_rng(run.rank)"
    )
    source = source.replace(
        "nn.Sequential(Noisy())", "nn.parallel.DistributedDataParallel(nn.Sequential(Noisy()))"
    )
    outcome = killed_once(tmp_path, source, ranks=2)
    assert outcome.is_equal, (outcome.rows, outcome.resumed.text)
    kept = [own["generators"] for own in payloads(tmp_path / "killed")[18]["own"]]
    assert [set(of) for of in kept] == [{"model.0.rng", "model.0.others[0]", "optimizer.rng"}] * 2


class Noise:
    """Not a module, and made by the first forward pass."""

    def __init__(self):
        self.rng = np.random.default_rng(0)


class Held(dict):
    """A container that is not searched."""


class Late(nn.Linear):
    noise: Noise | None = None

    held: Held

    def forward(self, x):
        self.noise = self.noise or Noise()
        return super().forward(x) + self.noise.rng.normal() + self.held["rng"].random()


def test_generators_that_cannot_be_kept_are_named(tmp_path, capsys):
    def make(run):
        model = Late(8, 1)
        model.held = Held(rng=random.Random(0))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        run.track(model=model, optimizer=optimizer)
        return lambda x: updated(model, optimizer, x)

    trained(tmp_path / "a", make, leave_at=5)
    said = capsys.readouterr().out
    assert said.count("warning: model.held changes in training, and is not saved") == 1
    assert said.count("changes in training") == 1
    trained(tmp_path / "a", make, leave_at=5)
    assert (
        "warning: the generator model.noise.rng is not there when training begins, "
        "so its state is lost" in capsys.readouterr().out
    )


class Aux(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale, self.cache, self.inner = 1.0, None, nn.Dropout(0.5)
        self.rates, self.last = [0.1], None

    def forward(self, x):
        self.scale *= 0.9
        self.cache = self.cache or {"size": len(x)}
        self.last = x * 2
        return x


class Hiding(nn.Linear):
    """It hides modules from itself, and holds itself and its child in a list, too."""

    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.norm, self.kept = nn.BatchNorm1d(8), 0
        self.aux, self.by, self.whole = [Aux()], {"a": nn.Sequential(Aux())}, [self, self.norm]

    def forward(self, x):
        self.kept += 1
        return super().forward(self.aux[0](self.norm(x)))


def test_what_changes_in_modules_that_are_hidden_from_their_parent_is_named(tmp_path, capsys):
    def make(run):
        model = Hiding(8, 1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        run.track(model=model, optimizer=optimizer)

        def step(x):
            model.norm.train(run.step % 2 == 0)
            model.by["a"].train(run.step < 2)
            model.aux[0].rates[0] *= 0.9
            return updated(model, optimizer, x)

        return step

    trained(tmp_path / "a", make, leave_at=9)
    said = capsys.readouterr().out
    named = re.findall(r"warning: (\S+) changes in training, and is not saved", said)
    assert sorted(named) == [
        "model.aux[0].rates",
        "model.aux[0].scale",
        "model.by['a'].training",
    ]


def test_an_optimizers_tensors_that_are_in_no_state_dict_are_told(tmp_path, capsys):
    class Momenta(torch.optim.Optimizer):
        def __init__(self, parameters):
            super().__init__(parameters, {})
            self.momenta, self.cache = {}, {}

        @torch.no_grad()
        def step(self, closure=None):
            for parameter in self.param_groups[0]["params"]:
                momentum = self.momenta.setdefault(parameter, torch.zeros_like(parameter))
                self.cache.setdefault(parameter, torch.ones_like(parameter))
                parameter.sub_(momentum.mul_(0.9).add_(parameter.grad), alpha=0.05)

    def make(run):
        model = nn.Linear(8, 1)
        optimizer = Momenta(model.parameters())
        run.track(model=model, optimizer=optimizer)

        def step(x):
            return updated(model, optimizer, x)

        return step

    trained(tmp_path / "a", make)
    said = capsys.readouterr().out
    assert said.count("warning: optimizer.momenta changes in training, and is not saved") == 1
    assert "optimizer.cache" not in said


class Parting(nn.Module):
    """Tensors that are one memory as built and part in training; others that come to be one."""

    def __init__(self) -> None:
        super().__init__()
        self.normed = nn.utils.spectral_norm(nn.Linear(8, 8))
        self.body = nn.Linear(8, 1)
        self.h = self.c = torch.zeros(8)
        self.bias = self.body.bias.data
        self.mask, self.same = torch.ones(8), torch.zeros(8)
        self.joined = torch.zeros(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(self.normed(x * self.mask)) + 0.1 * (self.h - self.c)
        now = x.detach().mean(0)
        self.h, self.c = self.h + now, 0.5 * self.c + now
        return self.body(x) * (self.bias + 1)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_tensors_that_part_in_training_have_parted_after_a_restart(tmp_path, capsys):
    def make(run):
        model = Parting()
        held = model.mask
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        run.track(model=model, optimizer=optimizer)

        def step(x):
            with torch.no_grad():
                model(x)  # computes the attribute `weight` of the layer that is normed
            held.mul_(0.9)
            if run.step == 2:
                model.bias = model.body.bias.data * 2
                model.same = model.joined = model.same + 1
            if run.step > 2:
                model.same.add_(1)
                model.body.bias.data.mul_(1 + 0.01 * model.joined[0])
            loss = updated(model, optimizer, x)
            with torch.no_grad():
                model(x)
            return loss

        return step

    goes_on(tmp_path, make, (2, 5))
    assert "changes in training" not in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(
    "reparametrized",
    [
        nn.utils.weight_norm,
        nn.utils.spectral_norm,
        lambda layer: nn.utils.prune.l1_unstructured(layer, "weight", 0.5),
    ],
    ids=["weight_norm", "spectral_norm", "prune"],
)
def test_a_weight_that_is_computed_before_each_forward_pass_needs_no_words(
    tmp_path, capsys, reparametrized
):
    def make(run):
        hidden = nn.Linear(8, 2100)  # more than a tensor of an attribute that becomes one may have
        model = nn.Sequential(reparametrized(hidden), nn.Tanh(), nn.Linear(2100, 1))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        run.track(model=model, optimizer=optimizer)

        def step(x):
            loss = updated(model, optimizer, x)
            with torch.no_grad():
                model(x)
            return loss

        return step

    trained(tmp_path / "a", make)
    assert "changes in training" not in capsys.readouterr().out


def repackaged(hidden):
    return tuple(part.detach() for part in hidden)


class Carrying(nn.Module):
    """A recurrent part whose state has its graph until the next step reads it."""

    h: Any
    pair: Any
    parts: Any
    cache: Any
    aux: Any
    of_sequence: Any

    def __init__(self) -> None:
        super().__init__()
        self.h = self.pair = self.parts = None
        self.cell, self.lstm, self.body = nn.RNN(8, 4), nn.LSTM(8, 4), nn.Linear(4, 1)

    def forward(self, x: torch.Tensor) -> Any:
        h = None if self.h is None else self.h.detach()
        y, self.h = self.cell(x, h)
        pair = self.pair
        z, self.pair = self.lstm(x, pair and tuple(part.detach() for part in pair))
        w, self.parts = self.lstm(x, repackaged(self.parts) if self.parts else None)
        self.reset()
        for row in x.split(4):
            y = y + self.inner(row).mean()
        return self.body(torch.tanh(y + z + w)) + self.cached() + self.aux

    def reset(self) -> None:
        self.cache, self.aux, self.of_sequence = None, 0.0, torch.zeros(1)

    def inner(self, row: torch.Tensor) -> Any:
        """What only the calls of one forward pass carry on."""
        self.aux = self.aux + self.body.weight.mean()
        self.of_sequence = torch.tanh(self.cell(row)[0].mean() + self.of_sequence)
        self.shown = self.of_sequence.detach()
        return self.of_sequence

    def cached(self) -> Any:
        if self.cache is None:
            self.cache = self.body.weight.mean()
        return self.cache


def test_what_is_carried_on_with_its_graph_is_named_and_no_cache_is(tmp_path, capsys):
    def make(run):
        model = Carrying()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        run.track(model=model, optimizer=optimizer)
        return lambda x: updated(model, optimizer, x)

    trained(tmp_path / "a", make, leave_at=4)
    named = re.findall(r"model\.(\w+) is carried on to the next step", capsys.readouterr().out)
    assert sorted(named) == ["h", "pair", "parts"]


@pytest.mark.parametrize("held", [1.0, float("nan")])
def test_memory_that_buffers_view_is_written_where_these_stay_as_they_are(held):
    module, memory = nn.Module(), torch.tensor([0.0, held, held, 0.0])
    module.memory = memory
    module.register_buffer("view", memory[1:3])
    containers = Containers({"model": [WatchedPart("", module)]})
    containers.begin_restore()
    now = torch.tensor([5.0, held, held, 5.0])
    assert containers.parted(memory, now, {}) == {}
    assert containers.parted(memory, now + 1, {}) == ({"replaced": True} if held == 1.0 else {})
