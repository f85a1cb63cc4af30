"""When the clock asks for a save: by a number of seconds, or by what saves and kills cost."""

from __future__ import annotations

import math

import pytest
import torch
from big_state import Big
from conftest import Clock, events
from library_runs import steps_of

import harness
from harness.checkpoint.catalog import Catalog
from harness.errors import UsageError
from harness.saving import save_policy
from harness.saving.save_policy import (
    ASSUMED_S,
    FIRST_S,
    LEAST_S,
    MOST_S,
    KillHistory,
    SavePolicy,
    best_interval_s,
    kill_history,
)


def saved_once(
    clock: Clock, auto: SavePolicy, plain_s: float, beside_s: float, steps: int, save_s: float
) -> None:
    """Twenty steps, then a save that `steps` steps feel."""
    for _ in range(20):
        clock.now += plain_s
        auto.step(False, save_s)
    auto.begun()
    for left in range(steps - 1, -1, -1):
        clock.now += beside_s
        auto.step(left > 0, save_s)


def test_the_interval_weighs_what_saves_cost_against_what_a_kill_costs():
    assert best_interval_s(0.5, 3600, 1) == pytest.approx(60)  # sqrt(2 * 0.5 * 3600)
    assert best_interval_s(2, 3600, 1) == pytest.approx(120), "four times the cost, half as often"
    assert best_interval_s(0.5, 900, 1) == pytest.approx(30), "four times the kills, twice as often"
    assert best_interval_s(0, 3600, 1) == LEAST_S and best_interval_s(1e6, 1e6, 1) == MOST_S
    assert best_interval_s(0.001, 3600, 40) == 40, "the one before has arrived"


def test_a_number_of_seconds_is_what_it_says():
    clock = Clock(1000.0)
    plain = SavePolicy(10.0, "wait", clock)
    clock.now += 9.9
    assert not plain.is_due(math.inf, 0, is_busy=False)
    clock.now += 0.1
    assert plain.is_due(math.inf, 0, is_busy=False) and plain.is_due(math.inf, 0, is_busy=True)
    plain.begun()
    assert not plain.is_due(math.inf, 0, is_busy=False)
    clock.now += 1e6
    assert not SavePolicy(None, "wait", clock).is_due(math.inf, 0, is_busy=False)
    saved_once(clock, plain, 0.1, 0.5, 5, 1)
    assert plain.every_s == 10


def test_what_is_left_out_because_one_is_on_its_way_is_told_and_due_again_later():
    clock, told = Clock(1000.0), []
    skips = SavePolicy(10.0, "skip", clock, lambda kind, **fields: told.append(kind))
    clock.now += 10
    assert not skips.is_due(math.inf, 0, is_busy=True) and told == ["skipped"]
    assert not skips.is_due(math.inf, 0, is_busy=False), "it was left out"
    clock.now += 10
    assert skips.is_due(math.inf, 0, is_busy=False) and told == ["skipped"]


def test_the_end_is_saved_anyway():
    clock = Clock(1000.0)
    plain = SavePolicy(10.0, "wait", clock)
    clock.now += 100
    assert plain.is_due(3.1, 3.0, is_busy=False)
    assert not plain.is_due(2.9, 3.0, is_busy=False), "that one would arrive when the run is over"


def test_auto_makes_room_between_saves_that_follow_one_another():
    clock = Clock(1000.0)
    auto = SavePolicy("auto", "wait", clock)
    for _ in range(3):
        auto.begun()
        clock.now += 40
        auto.step(True, save_s=40)
    assert auto.every_s == 80


@pytest.mark.parametrize("steps", [1, 8])
def test_auto_measures_what_a_save_costs_and_tells_what_it_chooses(steps):
    clock, told = Clock(1000.0), []
    auto = SavePolicy("auto", "wait", clock, lambda kind, **fields: told.append((kind, fields)))
    auto.history = KillHistory(seconds=7200, kills=2)
    assert auto.every_s == FIRST_S
    for _ in range(3):
        saved_once(clock, auto, plain_s=0.1, beside_s=0.1 + 0.4 / steps, steps=steps, save_s=1.5)
    between_s = (ASSUMED_S + 7200 + clock.now - 1000) / 3
    assert auto.every_s == pytest.approx(best_interval_s(0.4, between_s, 1.5), rel=0.01)
    ((kind, fields),) = told
    assert kind == "interval" and fields["cost_s"] == pytest.approx(0.4) and fields["kills"] == 2
    assert (
        fields["every_s"] == pytest.approx(auto.every_s, rel=0.02)
        and "2 kills in 2:00:" in fields["why"]
    )
    for _ in range(5):  # costs less now
        saved_once(clock, auto, plain_s=0.1, beside_s=0.1, steps=steps, save_s=1.5)
    assert auto.every_s == LEAST_S and [fields["every_s"] for _, fields in told][-1] == LEAST_S


def at(minute: int) -> str:
    return f"2026-01-01T10:{minute:02d}:00+00:00"


def test_of_the_attempts_before_those_count_as_killed_that_had_not_saved():
    found = Catalog()
    found.attempts = {number: {"kind": "train", "time": at(0)} for number in range(1, 6)} | {
        6: {"kind": "import", "time": at(0)},
        7: {},
    }
    found.ends = {
        1: {"why": "stopped", "saved": True, "time": at(10)},
        2: {"why": "failed", "time": at(20)},
        3: {"why": "stopped", "saved": False, "time": at(5)},
        4: {"why": "finished", "time": at(1)},
    }  # of the fifth nothing is recorded
    assert kill_history(found) == KillHistory(seconds=36 * 60, kills=3)


@pytest.mark.usefixtures("process_as_it_was")
def test_a_run_chooses_by_itself(tmp_path, monkeypatch):
    for name in ("FIRST_S", "LEAST_S"):
        monkeypatch.setattr(save_policy, name, 1e-3)
    job = harness.init(tmp_path / "a", seed=1, save_every_s="auto", keep_last=99)
    model = Big()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    job.track(model=model, optimizer=optimizer)
    data = torch.utils.data.TensorDataset(torch.randn(64, 16))
    for (x,) in job.batches(data, 8, epochs=10_000):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
        if job.step % 20 == 0 and events(tmp_path / "a", "interval"):
            job.finish()
    chosen = events(tmp_path / "a", "interval")
    assert chosen and all(
        event["kills"] == 0 and "0 kills" in event["why"] and event["every_s"] <= MOST_S
        for event in chosen
    )
    assert len(steps_of(tmp_path / "a")) > 2


@pytest.mark.slow
@pytest.mark.usefixtures("process_as_it_was")
def test_a_run_does_not_save_twice_at_its_end(tmp_path):
    """A save is always due, and takes much longer than the steps that are left when it is known how
    long."""
    job = harness.init(tmp_path / "a", seed=1, save_every_s=1e-6, keep_last=99)
    model = Big(1_000_000)
    optimizer = torch.optim.SGD(model.out.parameters(), lr=0.01)
    job.track(model=model, optimizer=optimizer)
    for (x,) in job.batches(torch.utils.data.TensorDataset(torch.randn(64, 16)), 8, epochs=1):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    steps = steps_of(tmp_path / "a")
    assert steps[-1] == 8 and 7 not in steps and len(steps) > 1


@pytest.mark.usefixtures("process_as_it_was")
def test_another_word_is_refused(tmp_path):
    with pytest.raises(
        UsageError,
        match="save_every_s='often', expected: a number of seconds above 0, auto, or None",
    ):
        harness.init(tmp_path / "a", save_every_s="often")
