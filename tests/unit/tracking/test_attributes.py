"""Attributes, modes, buffers and modules that training changes and that no `state_dict` holds."""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.utils.prune
from more_state import DIE, equal, goes_on, payloads, trained, updated, warnings_in
from programs import STEP, killed_once
from torch import nn

import harness
from harness.errors import UsageError
from harness.state.plain_values import is_same
from harness.tracking.attributes import Attributes
from harness.tracking.shared_containers import Containers
from harness.tracking.watched_part import WatchedPart

pytestmark = pytest.mark.usefixtures("process_as_it_was")


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


@pytest.mark.slow
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
    assert warnings_in(capsys.readouterr().out) == []


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


@pytest.mark.slow
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


@pytest.mark.slow
def test_a_list_that_grows_beyond_what_is_looked_into_as_built_is_kept(tmp_path, capsys):
    goes_on(tmp_path, growing(700), (4, 7))
    assert warnings_in(capsys.readouterr().out) == []
    kept = payloads(tmp_path / "whole")[9]["attributes"]["model"][""]
    assert len(kept["history"]["now"]) == len(kept["late"]["now"]) == 6300
    assert kept.keys() == {"history", "late"}


@pytest.mark.slow
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
    assert "it is not plain data any more" in said and len(warnings_in(said)) == 2


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


@pytest.mark.slow
def test_a_part_that_is_replaced_by_one_of_its_class_comes_back(tmp_path, capsys):
    goes_on(tmp_path, replacing(lambda: nn.Dropout(0.5)), (4,))
    assert warnings_in(capsys.readouterr().out) == []
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
    assert len(warnings_in(said)) == 1
    assert trained(tmp_path / "a", make).finished


class Wrapped(nn.Module):
    """With a wrapper inside; what is in the wrappers is called directly, as there may be a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.drop = nn.Linear(8, 8), nn.DataParallel(nn.Dropout(0.5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.drop.module(self.layer(x))


@pytest.mark.slow
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
    assert warnings_in(capsys.readouterr().out) == []


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


@pytest.mark.slow
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
