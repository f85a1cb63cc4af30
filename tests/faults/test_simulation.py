"""Lives of a sharded run on a disk and a bucket of a simulation, one after the other and two at
once: whatever befalls them between any two requests, what was reported is found again, whole."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
from simulated_lives import Life, Run, in_simulated_time
from simulation import Disk, Simulation

from harness.checkpoint import commit, load, retention
from harness.checkpoint.catalog import read_catalog
from harness.checkpoint.format import DataFile
from harness.errors import DamagedError, HarnessError
from harness.sharding import rank_save, shards


def simulate(seed: int, monkeypatch: pytest.MonkeyPatch, lives: int = 6) -> list[str]:
    """Let a run live so often; return what was asked for, request by request."""
    rng = random.Random(f"plan {seed}")
    simulation = Simulation(seed, trouble=rng.choice([0.0, 0.005, 0.02, 0.05]))
    with monkeypatch.context() as patch:
        in_simulated_time(simulation, patch)
        run, all_lives = Run(simulation, has_bucket=rng.random() < 0.5), list[Life]()
        try:
            for number in range(lives):
                if all(each.is_over for each in all_lives):
                    check_whole(run)
                    if rng.random() < 0.4:
                        run.damage(rng)
                life = Life(run, number, rng.choice([1, 2, 2, 3]), rng.randint(1, 5))
                all_lives.append(life)
                is_joined = rng.random() < 0.4  # by the next one
                until = simulation.now + rng.choice([1, 2, 20]) if is_joined else float("inf")
                simulation.run_until(partial(has_ended, life, until))
            simulation.trouble = 0.0
            simulation.run_until(lambda: False)
            last = Life(run, lives, 2, 3)
            all_lives.append(last)
            simulation.run_until(lambda: False)
            assert not any(process.error for process in last.group), last.group[0].error
            check(run, all_lives)
        except AssertionError as error:
            trace = "\n".join(simulation.trace[-60:])
            raise AssertionError(f"seed {seed}: {error}\n{trace}") from error
    return simulation.trace


def has_ended(life: Life, until: float) -> bool:
    """Whether the next life may begin."""
    return life.is_over or life.is_frozen or life.simulation.now > until


def check_whole(run: Run) -> None:
    """Each checkpoint in the history of each store is whole, unless the test has damaged it."""
    for store in run.stores:
        for manifest in read_catalog(store).history:
            if manifest.name not in run.damaged:
                try:
                    load.check(store, manifest)
                except DamagedError as error:
                    raise AssertionError(f"{manifest.name} is not whole: {error}") from error


def check(run: Run, lives: list[Life]) -> None:
    """What the checks of the lives themselves do not see."""
    for life in lives:
        for process in life.group:
            known = process.error is None or isinstance(process.error, HarnessError)
            assert known, f"{process.name}: {process.error!r}"
    check_whole(run)
    for store in run.stores:
        catalog = read_catalog(store)
        steps = [manifest.step for manifest in catalog.history]
        assert steps == sorted(set(steps), reverse=True), f"{steps} in {store}"
    catalog = read_catalog(run.stores[0])
    assert catalog.head is not None and len(catalog.history) >= 2, "too little is kept"
    assert not catalog.orphans and not catalog.orphan_folders, "something was left behind"


@pytest.mark.parametrize(
    ("first", "count"), [(0, 25), pytest.param(1000, 1500, marks=pytest.mark.slow)]
)
def test_what_was_reported_is_found_again_whatever_befalls_the_lives(
    first: int, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for seed in range(first, first + count):
        simulate(seed, monkeypatch)


def test_a_seed_decides_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = (
        [re.sub("probe/.*", "probe", line) for line in simulate(7, monkeypatch)] for _ in range(2)
    )
    assert first == second


def _words_left_out(patch: pytest.MonkeyPatch) -> None:
    outcome = rank_save._outcome

    def of_some(heard: list[Any], committer: Any, costs: Any) -> dict[str, Any]:
        return outcome([word for word in heard if "problem" not in word] or heard, committer, costs)

    patch.setattr(rank_save, "_outcome", of_some)


def _shard_after_its_word(patch: pytest.MonkeyPatch) -> None:
    write = commit.write_shard
    late = list[Callable[[], object]]()

    def later(store: Any, attempt: Any, step: int, rank: int, fill: Any) -> DataFile:
        while late:
            late.pop()()
        file = write(store, attempt, step, rank, fill)
        data = store.files.pop(file.key)
        late.append(lambda: store.files.__setitem__(file.key, data))
        return file

    patch.setattr(rank_save, "write_shard", later)
    patch.setattr(rank_save, "check_readable", lambda *given: None)


def _claim_of_anybody(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Disk, "create", Disk.write)


def _digest_not_compared(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(load, "compare", lambda *given: None)


def _the_newest_goes(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(retention, "to_delete", lambda history, *given: history[:1])


def _generators_of_the_first(patch: pytest.MonkeyPatch) -> None:
    give = shards.ShardFiles.give_own
    patch.setattr(
        shards.ShardFiles, "give_own", lambda parts, payload, ranks: give(parts, payload, [0])
    )


@pytest.mark.parametrize(
    "mutate",
    [
        _words_left_out,
        _shard_after_its_word,
        _claim_of_anybody,
        _digest_not_compared,
        _the_newest_goes,
        _generators_of_the_first,
    ],
)
def test_a_fault_in_the_protocol_is_found(
    mutate: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    mutate(monkeypatch)
    with pytest.raises(AssertionError, match="seed"):
        for seed in range(60):
            simulate(seed, monkeypatch)
