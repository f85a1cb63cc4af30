"""Loops and objects that nobody here thought of: each goes on exactly, or is refused in words
before it can go wrong."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import run
from library_runs import Versioned, newest
from loop_data import Stream, points
from s3_server import free_ports
from torch import nn

import harness
from harness import cli, state
from harness.checkpoint import retention
from harness.checkpoint.catalog import read_catalog
from harness.errors import UsageError
from harness.exchange.compare import differences
from harness.store import LocalStore

Make = Callable[["harness.Run"], Callable[[torch.Tensor], torch.Tensor]]


pytestmark = pytest.mark.usefixtures("process_as_it_was")


def loop(
    directory: Path,
    make: Make,
    *,
    leave_at: int | None = None,
    data: object = None,
    **batches: Any,
) -> harness.Run:
    """`make(run)` builds and tracks, and returns what makes a step; `leave_at` abandons the loop
    there."""
    job = harness.init(directory, seed=2, save_every_s=None, save_every_steps=2)
    step = make(job)
    own: dict[str, Any] = {"global_batch_size": 8, "epochs": 2}
    for batch in job.batches(data or points(), **(own | batches)):
        job.log(loss=step(batch[0]))
        if job.step == leave_at:
            break
    return job


def goes_on_exactly(
    tmp_path: Path, make: Make, data: Callable[[], object] = points, **batches: Any
) -> None:
    """A loop that was left and started again ends as the one that was not."""
    loop(tmp_path / "whole", make, data=data(), **batches)
    loop(tmp_path / "left", make, leave_at=5, data=data(), **batches)
    assert loop(tmp_path / "left", make, data=data(), **batches).finished
    assert list(differences(newest(tmp_path / "whole"), newest(tmp_path / "left"))) == []


def simple(
    job: harness.Run, model: nn.Module | None = None, **also: object
) -> Callable[[torch.Tensor], torch.Tensor]:
    model = model or nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    job.track(model=model, optimizer=optimizer, **also)

    def step(x: torch.Tensor) -> torch.Tensor:
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        optimizer.step()
        return loss

    return step


def test_a_module_with_versions_is_not_migrated_at_each_start(tmp_path):
    goes_on_exactly(tmp_path, lambda job: simple(job, Versioned(4, 1)))


def test_a_scheduler_that_is_made_and_tracked_after_its_optimizer_goes_on(tmp_path):
    def make(job):
        model = nn.Linear(4, 1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        job.track(model=model, optimizer=optimizer)
        scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, 1.0, total_iters=10)
        job.track(scheduler=scheduler)

        def step(x):
            optimizer.zero_grad()
            loss = model(x).square().mean()
            loss.backward()
            optimizer.step()
            scheduler.step()
            return loss

        return step

    goes_on_exactly(tmp_path, make)


def test_a_schedule_with_milestones_keeps_its_counter():
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [2, 4])
    assert (
        type(state.capture({"scheduler": scheduler})["scheduler_state_dict"]["milestones"])
        is Counter
    )


@pytest.mark.parametrize("name", ["own", "rng", "data", "kinds"])
def test_a_module_may_be_called_like_another_entry_of_a_checkpoint(name):
    model = nn.Linear(2, 1)
    tracked = {name: model, "optimizer": torch.optim.SGD(model.parameters())}
    values = {"own": [{}, {"x": [1]}], "rng": [{"cuda": []}], "data": {"epoch": 1}, "state": {}}
    payload = state.captured(values, tracked).payload
    assert payload[f"{name}_state_dict"].keys() == {"weight", "bias"} and "names" not in payload


def test_optimizer_state_that_is_nested_keeps_its_dtype():
    class Nested(torch.optim.Optimizer):
        def __init__(self, parameters):
            super().__init__(parameters, {})

    def made():
        return Nested([nn.Parameter(torch.zeros(3, dtype=torch.bfloat16))])

    one, other = made(), made()
    parameter = one.param_groups[0]["params"][0]
    one.state[parameter] = {
        "inner": {
            "mean": torch.full((3,), 1 / 3),
            "codes": [torch.tensor([1, 2, 3], dtype=torch.int8)],
        }
    }
    payload = state.capture({"optimizer": one})
    state.restore({"optimizer": other}, {}, payload, "it")
    assert list(differences(payload, state.capture({"optimizer": other}))) == []


def dropout(job: harness.Run) -> Callable[[torch.Tensor], torch.Tensor]:
    return simple(job, nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 1)))


def test_a_stream_with_randomness_goes_on_exactly(tmp_path):
    goes_on_exactly(tmp_path, dropout, Stream)


def test_an_order_with_randomness_goes_on_exactly(tmp_path):
    goes_on_exactly(tmp_path, dropout, order=lambda epoch: torch.randperm(48))


class OwnRandomness(torch.utils.data.Dataset):
    def __init__(self) -> None:
        self.random = np.random.default_rng()

    def __len__(self) -> int:
        return 48

    def __getitem__(self, index: int):
        return (torch.full((4,), float(self.random.normal())),)


class Objects(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 48

    def __getitem__(self, index: int):
        return torch.ones(4), np.array([f"name {index}", None], dtype=object)


@pytest.mark.parametrize("data", [OwnRandomness, Objects])
def test_data_with_no_fingerprint_of_its_own_is_not_refused_when_the_run_goes_on(data, tmp_path):
    def first_only(samples):
        return [torch.stack([sample[0] for sample in samples])]

    loop(tmp_path, simple, leave_at=5, data=data(), collate_fn=first_only)
    assert loop(tmp_path, simple, data=data(), collate_fn=first_only).finished


@pytest.mark.parametrize(
    "value", [{np.int64(3): 1}, {"count": np.float64(0.5)}, {(1, "a"): [np.int32(2)]}]
)
def test_numbers_of_numpy_in_the_state_can_be_loaded_again(value, tmp_path):
    def make(job):
        step = simple(job)
        if not job.step:
            job.state["value"] = value
        assert job.state["value"] == value
        return step

    loop(tmp_path, make, leave_at=3)
    assert loop(tmp_path, make).finished


@pytest.mark.parametrize(
    "value",
    [
        np.longdouble(1),
        np.datetime64("2020-01-01"),
        1 << 3000,
        {frozenset((1,)): 2},
        np.array([None]),
    ],
)
def test_what_could_be_saved_but_not_loaded_is_refused_at_the_first_save(value, tmp_path):
    def make(job):
        job.state["value"] = value
        return simple(job)

    with pytest.raises(UsageError, match=r"plain data|loaded again"):
        loop(tmp_path, make)
    assert read_catalog(LocalStore(tmp_path)).manifests == []


def test_a_tracked_object_that_cannot_be_saved_is_refused_before_the_first_step(tmp_path):
    class Thing:
        def state_dict(self):
            return {"path": Path("x")}

        def load_state_dict(self, state):
            raise AssertionError

    with pytest.raises(UsageError, match="cannot be saved as plain data"):
        loop(tmp_path, lambda job: simple(job, thing=Thing()))
    assert not (tmp_path / "attempts").exists()
    with pytest.raises(UsageError, match="cannot be saved as plain data"):
        harness.init(tmp_path, config={"folder": Path("x")})


def test_parameters_that_belong_to_nothing_tracked_are_refused(tmp_path):
    def make(job):
        model, temperature = nn.Linear(4, 1), nn.Parameter(torch.ones(()))
        job.track(
            model=model, optimizer=torch.optim.SGD([*model.parameters(), temperature], lr=0.1)
        )
        return lambda x: x.mean()

    with pytest.raises(
        UsageError, match=r"updates 1 parameter\(s\) that belong to nothing tracked"
    ) as refused:
        loop(tmp_path, make)
    assert "own=torch.nn.ParameterList([tensor])" in str(refused.value)


def test_a_sparse_buffer_and_a_lazy_module_go_on(tmp_path):
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("graph", torch.eye(4).to_sparse())
            self.lazy = nn.LazyLinear(1)

        def forward(self, x):
            return self.lazy(x + torch.sparse.mm(self.graph, x.T).T)

    def make(job):
        model = Odd()
        job.track(model=model)

        def step(x):
            return model(x).square().mean()

        return step

    loop(tmp_path, make, leave_at=5)
    assert loop(tmp_path, make).finished


def test_a_loop_over_epochs_around_the_loop_is_refused_also_when_the_run_is_finished(tmp_path):
    for _ in range(2):
        job = harness.init(tmp_path, seed=2)
        step = simple(job)
        for batch in job.batches(points(), global_batch_size=8, epochs=1):
            step(batch[0])
        with pytest.raises(UsageError, match="Loop once"):
            next(job.batches(points(), global_batch_size=8, epochs=1))


def test_a_loop_that_is_left_says_so_and_an_untracked_schedule_too(tmp_path, capsys):
    def make(job):
        step = simple(job)
        torch.optim.lr_scheduler.StepLR(job.tracked["optimizer"], 3)
        return step

    loop(tmp_path, make, leave_at=3)
    said = capsys.readouterr().out
    assert (
        "the loop was left at step 3: nothing more is saved; run.finish() would end the run" in said
    )
    assert "a scheduler moves the learning rate of optimizer" in said


def test_a_loop_that_is_left_after_it_asked_for_its_end_is_told_that_this_was_too_early(
    tmp_path, capsys
):
    job = harness.init(tmp_path, seed=2)
    step = simple(job)
    for batch in job.batches(points(), global_batch_size=8, epochs=1):
        step(batch[0])
        if job.step == 3:
            job.finish()
            break
    said = capsys.readouterr().out
    assert (
        "left at step 3: nothing more is saved; "
        "run.finish() ends the run when the loop asks for its next batch" in said
    )


@pytest.mark.parametrize("how", ["untracked", "late", "tracked", "wrapped"])
def test_an_optimizer_that_updates_and_is_not_tracked_is_told_of_once(how, tmp_path, capsys):
    class Wrapper:
        """As those of other libraries are."""

        def __init__(self, optimizer):
            self.inner = optimizer
            self.step, self.state_dict, self.load_state_dict = (
                optimizer.step,
                optimizer.state_dict,
                optimizer.load_state_dict,
            )

    job = harness.init(tmp_path)
    step, other = simple(job), nn.Linear(2, 1)
    second = torch.optim.Adam(other.parameters())
    if how in ("tracked", "wrapped"):
        job.track(other=other, second=second if how == "tracked" else Wrapper(second))
    for (x,) in job.batches(points(), global_batch_size=8, epochs=1):
        step(x)
        other(torch.ones(2)).sum().backward()
        if how != "late" or job.step > 2:
            second.step()
    warnings = [line for line in capsys.readouterr().out.splitlines() if "(Adam)" in line]
    told = {
        "untracked": ["not tracked, so lost at a restart: ", "second (Adam)"],
        "late": ["an optimizer (Adam) that is not tracked makes updates"],
    }.get(how, [])
    assert len(warnings) == bool(told) and all(words in warnings[0] for words in told), warnings
    torch.optim.SGD(other.parameters(), lr=0.1).step()
    assert "warning" not in capsys.readouterr().out, "the loop is over"


@pytest.mark.parametrize("is_held", [False, True])
def test_an_optimizer_that_each_step_makes_anew_is_not_told_of(is_held, tmp_path, capsys):
    """As the inner loop of meta-learning does, or the fit of a latent."""

    class Fit:
        """It holds the inner optimizer of the last step."""

        inner: torch.optim.Optimizer | None = None

        def state_dict(self):
            return {"nothing": 0}

        def load_state_dict(self, state):
            pass

    job, fit = harness.init(tmp_path), Fit() if is_held else None
    step = simple(job, None, **({"fit": fit} if is_held else {}))
    for (x,) in job.batches(points(), global_batch_size=8, epochs=1):
        latent = nn.Parameter(torch.zeros(4))
        inner = torch.optim.Adam([latent], lr=0.1)
        for _ in range(3):
            inner.zero_grad()
            (x - latent).square().mean().backward()
            inner.step()
        if fit is not None:
            fit.inner = inner
        step(x + latent.detach())
    said = capsys.readouterr().out
    assert "Adam" not in said and "warning" not in said, said


def test_only_what_was_measured_on_its_own_weights_makes_a_checkpoint_a_best_one(tmp_path):
    job = harness.init(
        tmp_path, save_every_s=None, save_every_steps=1, keep_last=2, keep_best=2, best="acc:max"
    )
    step = simple(job)
    accuracies = {2: 0.5, 4: 0.9}
    for batch in job.batches(points(), global_batch_size=8, epochs=1):
        step(batch[0])
        if job.step in accuracies:
            job.evaluate(points(8), lambda batch: {"acc": accuracies[job.step] * len(batch[0])})
            job.evaluate(points(8), lambda batch: {"other": len(batch[0])})
    kept = {m.step: m.metrics for m in read_catalog(LocalStore(tmp_path)).history}
    assert kept == {2: {"acc": 0.5, "other": 1.0}, 4: {"acc": 0.9, "other": 1.0}, 5: {}, 6: {}}
    assert job.metrics == {"acc": 0.9, "other": 1.0}
    assert [
        m.step
        for m in retention.best(
            read_catalog(LocalStore(tmp_path)).history,
            retention.Policy(metric="acc", higher_is_better=True),
        )
    ] == [4, 2]


def test_status_of_a_finished_run_whose_data_is_gone_is_not_finished(tmp_path, capsys):
    loop(tmp_path, simple)
    assert cli.main(["status", str(tmp_path)]) == 0
    files = sorted(tmp_path.glob("checkpoints/*.pt"))
    files[-1].unlink()
    assert cli.main(["status", str(tmp_path)]) == 75
    for file in files[:-1]:
        file.write_bytes(b"")
    assert cli.main(["status", str(tmp_path)]) == 1
    capsys.readouterr()


RANKS = """
import os, sys, time
import torch
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP

class Part(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(16, 8, sparse=True)
        self.inner = DDP(
            nn.Sequential(
                nn.Linear(8, 64), nn.BatchNorm1d(64), nn.ReLU(),
                nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1),
            )
        )
    def forward(self, x):
        return self.inner(self.embed(x).detach())

def main(rank, size, directory, steps, kind):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": sys.argv[1]}
    import harness
    run = harness.init(
        directory,
        seed=4,
        save_every_s=None,
        save_every_steps=3,
        timeout_s=4 if kind == "slowing" else 60,
    )
    if kind == "sparse":
        model = DDP(nn.Sequential(nn.Embedding(16, 8, sparse=True), nn.Flatten(), nn.Linear(8, 1)))
    else:
        model = Part()
    optimizer = torch.optim.SGD(
        [p for p in model.parameters()], lr=0.05, momentum=0 if kind == "sparse" else 0.9
    )
    run.track(model=model, optimizer=optimizer)
    data = torch.utils.data.TensorDataset(
        torch.randint(16, (960,), generator=torch.Generator().manual_seed(0))
    )
    for (x,) in run.batches(data, global_batch_size=12, epochs=4 if kind == "slowing" else 1):
        optimizer.zero_grad()
        model(x[:, None] if kind == "sparse" else x).square().mean().backward()
        optimizer.step()
        if kind == "slowing" and run.step > 280:
            time.sleep(0.12)
        if run.step == steps:
            os._exit(9)

if __name__ == "__main__":
    mp.start_processes(
        main,
        (int(sys.argv[2]), sys.argv[3], int(sys.argv[4]), sys.argv[5]),
        nprocs=int(sys.argv[2]),
        start_method="spawn",
    )
"""


def ranks(tmp_path: Path, size: int, directory: Path, steps: int, kind: str) -> int:
    import sys

    port = free_ports(1)[0]
    (tmp_path / "program.py").write_text(RANKS)
    done = run(
        [
            sys.executable,
            str(tmp_path / "program.py"),
            str(port),
            str(size),
            str(directory),
            str(steps),
            kind,
        ]
    )
    print(done.stdout, done.stderr)  # shown when the test fails
    return done.returncode


@pytest.mark.slow
@pytest.mark.parametrize(("size", "kind"), [(3, "nested"), (2, "sparse")])
def test_ranks_without_torchrun_go_on_exactly_and_all_exit_well(size, kind, tmp_path):
    assert ranks(tmp_path, size, tmp_path / "whole", -1, kind) == 0
    assert ranks(tmp_path, size, tmp_path / "killed", 32, kind) != 0
    assert ranks(tmp_path, size, tmp_path / "killed", -1, kind) == 0
    assert list(differences(newest(tmp_path / "whole"), newest(tmp_path / "killed"))) == []


@pytest.mark.slow
def test_steps_that_become_slower_do_not_alarm_the_watch(tmp_path):
    assert ranks(tmp_path, 2, tmp_path / "run", -1, "slowing") == 0
