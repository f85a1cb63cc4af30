"""Gradients that are under way at a save: kept where the next update uses them, and waited for."""

from __future__ import annotations

import signal

import pytest
import torch
import torch.nn.utils.prune
from library_runs import steps_of
from more_state import by_hand, equal, goes_on, payloads, trained
from programs import killed_once, live
from there import there
from torch import nn

import harness

pytestmark = pytest.mark.usefixtures("process_as_it_was")


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


@pytest.mark.slow
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


@pytest.mark.slow
def test_gradients_that_are_always_under_way_are_kept_without_waiting(tmp_path):
    goes_on(tmp_path, adversaries, (4, 7))
    assert steps_of(tmp_path / "whole") == [3, 6, 9, 12]
    assert set(payloads(tmp_path / "whole")[6]["gradients"]) == {"critic.weight", "critic.bias"}


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
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
