"""State that no `state_dict` tells of: gradients under way, attributes and modes, communication hooks, generators; and no torn file."""

from __future__ import annotations

import contextlib
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import events, undone
from programs import killed_once, live
from test_library import newest, steps_of
from torch import nn

import harness
from harness.checkpoint import load
from harness.checkpoint.history import survey
from harness.errors import UsageError
from harness.exchange.compare import differences
from harness.store import LocalStore

pytestmark = pytest.mark.usefixtures("process_as_it_was")

DIE = """
def die(run):
    \"\"\"Be killed in step `$DIE`, when what was saved before it has arrived.\"\"\"
    if run.step == int(os.environ.get("DIE", 0)):
        until = time.monotonic() + 8
        while run._saver.background.is_busy and time.monotonic() < until:
            time.sleep(0.01)
        if not run.is_writer:
            time.sleep(60)
        os.kill(os.getpid(), signal.SIGKILL)


def finish(run, loss, optimizer):
    run.log(loss=loss)
    die(run)
"""

BY_HAND = DIE + """
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
    if run.step == int(os.environ.get("TERM", 0)):
        os.kill(os.getpid(), signal.SIGTERM)
    die(run)
"""


def by_hand(wrap: str = "", no_sync: bool = False) -> str:
    return "import contextlib\n" + BY_HAND.replace("WRAP", wrap).replace("NO_SYNC", str(no_sync))


def equal(one: Path, other: Path) -> list[object]:
    return list(differences(newest(one), newest(other)))


def data(size: int = 192) -> torch.utils.data.TensorDataset:
    return torch.utils.data.TensorDataset(torch.randn(size, 8, generator=torch.Generator().manual_seed(0)))


def trained(directory: Path, make, *, leave_at: int = 0, stop_at: int = 0, **options) -> harness.Run:
    """`make(run)` builds and tracks, and returns what makes a step; the loop is left or stopped there."""
    with undone():
        run = harness.init(directory, **({"seed": 1, "save_every_s": None, "save_every_steps": 3, "keep_last": 99} | options))
        step = make(run)
        with contextlib.suppress(SystemExit):
            for (x,) in run.batches(data(), 16, epochs=1):
                run.log(loss=step(x))
                if run.step == stop_at:
                    signal.raise_signal(signal.SIGTERM)
                if run.step == leave_at:
                    break
    return run


def goes_on(tmp_path: Path, make, steps: tuple[int, ...], **options) -> None:
    """Left at each of the steps, and stopped there, it ends as the one that was neither."""
    trained(tmp_path / "whole", make, **options)
    for step in steps:
        for how in ("leave_at", "stop_at"):
            trained(tmp_path / f"{how}{step}", make, **{how: step}, **options)
            assert trained(tmp_path / f"{how}{step}", make, **options).finished
            assert equal(tmp_path / "whole", tmp_path / f"{how}{step}") == [], (how, step)


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
    goes_on(tmp_path, accumulating, (2, 3, 4, 6, 9))
    whole, stopped = tmp_path / "whole", tmp_path / "stop_at6"
    assert steps_of(whole) == [4, 8, 12]
    assert steps_of(stopped)[:2] == [4, 6]  # a stop does not wait
    assert all("gradients" not in payload for payload in payloads(whole).values())
    assert set(payloads(stopped)[6]["gradients"]) == {f"model.{at}.{name}" for at in (0, 1) for name in ("weight", "bias")}
    assert payloads(stopped)[6]["format_version"] == 2


def payloads(directory: Path) -> dict[int, dict]:
    store = LocalStore(directory)
    return {manifest.step: load.load(store, manifest) for manifest in survey(store).manifests}


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
    assert all("gradients" not in payload and payload["format_version"] == 1 for payload in payloads(tmp_path / "a").values())


@pytest.mark.parametrize(("ranks", "no_sync"), [(1, False), (2, True)])
def test_killed_between_two_updates_it_ends_as_the_one_that_was_not(tmp_path, ranks, no_sync):
    source = by_hand("nn.parallel.DistributedDataParallel" if ranks > 1 else "", no_sync)
    outcome = killed_once(tmp_path, source, die=7, ranks=ranks)
    assert outcome.killed.code == -signal.SIGKILL and "goes on from step 4" in outcome.resumed.text
    assert outcome.is_equal, outcome.rows


def test_gradients_that_differ_by_rank_are_each_ranks_own(tmp_path):
    source = by_hand("nn.parallel.DistributedDataParallel", no_sync=True)
    assert live(tmp_path, source, "whole", ranks=2).code == 0
    assert live(tmp_path, source, "stopped", ranks=2, env={"TERM": "7"}).code == 0
    payload = payloads(tmp_path / "stopped")[7]
    own = [entry["gradients"] for entry in payload["own"]]
    assert "gradients" not in payload and not torch.equal(*(one["model.0.weight"] for one in own))
    resumed = live(tmp_path, source, "stopped", ranks=2)
    assert resumed.code == 0 and "goes on from step 7" in resumed.text
    assert equal(tmp_path / "whole", tmp_path / "stopped") == []


def test_on_another_number_of_ranks_it_is_said_what_is_lost(tmp_path):
    source = by_hand("nn.parallel.DistributedDataParallel", no_sync=True)
    assert live(tmp_path, source, "stopped", ranks=2, env={"TERM": "7"}).code == 0
    alone = live(tmp_path, source, "stopped")
    assert alone.code == 0 and "what each rank had for itself is lost (gradients)" in alone.text


def adversaries(run: harness.Run):
    """The critic's gradients, that its own step has not seen, are there at each boundary."""
    critic, generator = nn.Linear(8, 1), nn.Linear(8, 8)
    of_critic, of_generator = (torch.optim.Adam(model.parameters(), lr=0.05) for model in (critic, generator))
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
            loss = sum(part(x).square().mean() for part in (model if run.step in (1, 2, 3, 4, 9) else model[:1]))
            loss.backward()
            optimizer.step()
            return loss

        return step

    goes_on(tmp_path, make, (4, 7, 11))


def test_a_save_waits_for_an_optimizer_that_never_steps_no_longer_than_it_must(tmp_path, monkeypatch):
    monkeypatch.setattr("harness.state.gradients.MOST_STEPS", 2)

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
