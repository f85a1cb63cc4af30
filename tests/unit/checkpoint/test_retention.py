"""Retention: a pure function decides which checkpoints may go, and nothing good goes before
something better is there."""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
import math
import os
import random
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from library_runs import train

import harness
from harness.checkpoint import attempts, load, retention
from harness.checkpoint import format as fmt
from harness.checkpoint.catalog import going_on_from, read_catalog
from harness.checkpoint.commit import About, commit
from harness.checkpoint.format import Manifest
from harness.checkpoint.replicate import replicate
from harness.checkpoint.retention import Policy, to_delete
from harness.cli import main
from harness.errors import SupersededError
from harness.store import SET_ASIDE, LocalStore, Store, open_store
from harness.supervision import run_address


def manifest(step: int, attempt: int = 1, **metrics: float) -> Manifest:
    file = fmt.DataFile(f"{fmt.stem(step, attempt)}.pt", 1, "blake3:0")
    lineage = ((attempt, step),)
    return Manifest(
        "run", attempt, step, 0, None, metrics, 1, lineage, (file,), {}, None, "", "", {}, ""
    )


def names(manifests: list[Manifest]) -> set[str]:
    return {m.name for m in manifests}


values = st.one_of(st.none(), st.just(math.nan), st.just(math.inf), st.integers(-3, 3).map(float))
orders = st.tuples(st.integers(1, 4), st.integers(1, 40))
policies = st.builds(
    Policy,
    last=st.integers(0, 6),
    every_steps=st.one_of(st.none(), st.integers(1, 10)),
    best=st.integers(0, 3),
    metric=st.sampled_from(["val_loss", "val_acc"]),
    higher_is_better=st.booleans(),
)


@st.composite
def cases(draw: st.DrawFn) -> tuple[list[Manifest], set[str], Policy]:
    """A history in any order, what of it is verified, and a policy."""
    history = []
    for attempt, step in draw(st.lists(orders, unique=True, max_size=12)):
        value = draw(values)
        history.append(manifest(step, attempt, **({} if value is None else {"val_loss": value})))
    verified = {m.name for m in history if draw(st.booleans())}
    return history, verified, draw(policies)


def newest_first(manifests: list[Manifest]) -> list[Manifest]:
    return sorted(manifests, key=lambda m: (m.attempt, m.step), reverse=True)


@given(cases())
def test_the_two_newest_verified_ones_always_stay(case):
    history, verified, policy = case
    gone = names(to_delete(history, verified, policy))
    newest = newest_first([m for m in history if m.name in verified])
    assert not gone & names(newest[: max(2, policy.last)])


@given(cases())
def test_nothing_goes_while_fewer_than_two_are_verified(case):
    history, verified, policy = case
    if sum(m.name in verified for m in history) < 2:
        assert to_delete(history, verified, policy) == []


@given(cases())
def test_the_best_verified_one_stays(case):
    history, verified, policy = case
    gone = names(to_delete(history, verified, policy))
    measured = [
        m
        for m in history
        if m.name in verified and not math.isnan(m.metrics.get(policy.metric, math.nan))
    ]
    if policy.best and measured:
        pick = max if policy.higher_is_better else min
        best_value = pick(m.metrics[policy.metric] for m in measured)
        assert {m.name for m in measured if m.metrics[policy.metric] == best_value} - gone, (
            "one of those with the best value"
        )


@given(cases())
def test_every_checkpoint_at_a_multiple_stays(case):
    history, verified, policy = case
    gone = to_delete(history, verified, policy)
    if policy.every_steps:
        assert not [m for m in gone if m.step % policy.every_steps == 0]


@given(cases())
def test_unverified_ones_never_displace_verified_ones(case):
    """What of the verified ones stays does not depend on which unverified ones, perhaps damaged,
    lie beside them."""
    history, verified, policy = case
    only_verified = [m for m in history if m.name in verified]
    kept_without = names(only_verified) - names(to_delete(only_verified, verified, policy))
    kept_with = names(only_verified) - names(to_delete(history, verified, policy))
    assert kept_without <= kept_with


@given(cases())
def test_the_policy_is_carried_out(case):
    """What goes is what has no place; with everything verified that is exactly the rule."""
    history, _, policy = case
    gone = names(to_delete(history, names(history), policy))
    ordered = newest_first(history)
    scored = [m for m in history if not math.isnan(m.metrics.get(policy.metric, math.nan))]
    sign = -1 if policy.higher_is_better else 1
    scored.sort(key=lambda m: (sign * m.metrics[policy.metric], m.attempt, m.step))
    kept = names(ordered[: max(2, policy.last)]) | names(scored[: policy.best])
    kept |= {m.name for m in history if policy.every_steps and m.step % policy.every_steps == 0}
    assert gone == (names(history) - kept if len(history) >= 2 else set())


@given(cases(), st.randoms(use_true_random=False))
def test_the_decision_is_pure_and_does_not_depend_on_the_order_of_the_list(
    case, rng: random.Random
):
    history, verified, policy = case
    before = copy.deepcopy((history, verified, policy))
    first = to_delete(history, verified, policy)
    assert to_delete(history, verified, policy) == first
    assert repr((history, sorted(verified), policy)) == repr(
        (before[0], sorted(before[1]), before[2])
    ), "arguments are not changed"
    shuffled = list(history)
    rng.shuffle(shuffled)
    assert [m.name for m in to_delete(shuffled, verified, policy)] == [m.name for m in first]
    assert [m.order for m in first] == sorted(m.order for m in first), "the oldest goes first"
    assert names(first) <= names(history)


@given(cases())
def test_carrying_it_out_leaves_nothing_more_to_carry_out(case):
    history, verified, policy = case
    gone = names(to_delete(history, verified, policy))
    assert to_delete([m for m in history if m.name not in gone], verified, policy) == []


def test_steps_are_ordered_as_numbers_and_attempts_before_steps():
    history = [manifest(step) for step in (9, 10, 100)]
    assert names(to_delete(history, names(history), Policy(last=2, best=0))) == {
        "step_00000009-0001"
    }
    history = [
        manifest(100, 1),
        manifest(99_999_999, 1),
        manifest(100_000_000, 1),
        manifest(20, 9),
        manifest(10, 10),
    ]
    gone = to_delete(history, names(history), Policy(last=2, best=0))
    assert [m.order for m in gone] == [(1, 100), (1, 99_999_999), (1, 100_000_000)]


def test_of_equal_values_the_older_is_the_best():
    history = [manifest(step, val_loss=0.5) for step in (1, 2, 3, 4)]
    assert names(to_delete(history, names(history), Policy(last=2, best=1))) == {
        "step_00000002-0001"
    }


# --- carried out on a store ---


def payload(step: int, val_loss: float) -> dict:
    return {
        "model_state_dict": {"weight": torch.full((4,), float(step))},
        "step": step,
        "epoch": 0,
        "loss": val_loss,
        "metrics": {"val_loss": val_loss},
    }


class Life:
    """An attempt on a real store."""

    def __init__(self, store: Store, *others: Store, **more: Any) -> None:
        self.store = store
        found = read_catalog(store, *others)
        self.origin = found.history[0] if found.history else None
        self.attempt = attempts.claim(found, self.origin, 1, more=more)
        self.verified = {self.origin.name} if self.origin else set()

    def save(self, step: int, val_loss: float = 1.0) -> Manifest:
        made = commit(
            self.store,
            self.attempt,
            payload(step, val_loss),
            About(1, going_on_from(self.origin), {}, "-"),
        )
        self.verified.add(made.name)
        return made

    def apply(self, policy: Policy) -> list[str]:
        return retention.apply(self.store, self.attempt, self.verified, policy)


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    store = LocalStore(tmp_path / "run")
    store.prepare(fmt.FOLDERS)
    return store


def files(store: LocalStore) -> list[str]:
    return sorted(path.name for path in (store.root / fmt.CHECKPOINTS).iterdir())


def of(*orders: tuple[int, int]) -> list[str]:
    """The files of the checkpoints (step, attempt)."""
    return sorted(
        f"{fmt.stem(step, attempt)}.{kind}" for step, attempt in orders for kind in ("pt", "json")
    )


def test_nine_ten_and_a_hundred_go_in_the_order_of_numbers(store):
    life = Life(store)
    for step in (9, 10, 100):
        life.save(step)
    assert life.apply(Policy(last=2, best=0)) == ["step_00000009-0001"]
    assert files(store) == of((10, 1), (100, 1))


def test_a_folder_is_made_durable_once_for_all_shards_that_go(store, monkeypatch):
    keys = [f"{fmt.folder_key(1, 1)}/{rank:05d}.pt" for rank in range(50)]
    store.make_folder(fmt.folder_key(1, 1))
    for key in keys:
        store.write(key, b"data", 1)
    synced, fsync = [], os.fsync

    def syncs(fd: int) -> None:
        synced.append(fd)
        fsync(fd)

    monkeypatch.setattr(os, "fsync", syncs)
    retention.delete_folder(store, fmt.folder_key(1, 1))
    assert len(synced) == 2 and files(store) == []  # the folder's files, and the folder itself


def test_ranks_on_other_machines_delete_what_the_writer_has_deleted_and_nothing_newer(store):
    for step, attempt in ((1, 1), (2, 1), (3, 1), (9, 1), (1, 2), (2, 3)):
        store.make_folder(fmt.folder_key(step, attempt))
        store.write(f"{fmt.folder_key(step, attempt)}/00001.pt", b"data", attempt)
    store.write(f"{fmt.folder_key(1, 1)}/00003.pt.tmp-0001-ab", b"half", 1)
    store.write(fmt.manifest_key(3, 1), b"{}", 1)
    retention.follow(store, [fmt.stem(2, 1)], (2, 1))
    assert files(store) == sorted(
        [fmt.stem(*of) for of in ((2, 1), (3, 1), (1, 2), (2, 3))] + [f"{fmt.stem(3, 1)}.json"]
    )


def test_what_stays_still_loads(store):
    life = Life(store)
    for step, val_loss in ((1, 0.3), (2, 0.1), (3, 0.2), (4, 0.4), (5, 0.5), (6, 0.6)):
        life.save(step, val_loss)
    life.apply(Policy(last=2, best=1, every_steps=3))
    assert files(store) == of((2, 1), (3, 1), (5, 1), (6, 1))
    for left in read_catalog(store).history:
        assert load.load(store, left)["step"] == left.step


def test_mixed_attempts_are_ordered_by_attempt_first(store):
    first = Life(store)
    for step in (10, 20, 30):
        first.save(step)
    second = Life(store)
    second.save(40)
    third = Life(store)
    third.save(50)
    assert third.verified == {fmt.stem(40, 2), fmt.stem(50, 3)}
    third.apply(Policy(last=2, best=0))
    assert files(store) == of((40, 2), (50, 3))


def test_what_an_earlier_attempt_left_without_being_read_counts_for_nothing(store):
    first = Life(store)
    for step in (10, 20, 30):
        first.save(step)
    second = Life(store)
    second.save(40)
    second.verified -= {fmt.stem(30, 1)}  # as if it had gone on from nothing that it read
    assert second.apply(Policy(last=2, best=0)) == []
    second.save(50)
    second.apply(Policy(last=2, best=0))
    assert files(store) == of((40, 2), (50, 2))


def test_a_damaged_one_takes_no_place_from_a_good_one(store):
    life = Life(store)
    for step in (10, 20, 30, 40):
        life.save(step)
    store.path(fmt.data_key(30, 1)).write_bytes(b"damaged")
    life.verified = {fmt.stem(step, 1) for step in (10, 20, 40)}
    life.apply(Policy(last=2, best=0))
    assert files(store) == of((20, 1), (30, 1), (40, 1))


def test_only_the_history_is_looked_at(store):
    """What a later attempt has cut off may be what somebody rolls back to: only `harness prune`
    deletes it."""
    first = Life(store)
    for step in (10, 20, 30):
        first.save(step)
    second = Life(store)
    second.origin = read_catalog(store).manifests[0]
    for step in (11, 12, 13):
        second.save(step)
    second.apply(Policy(last=2, best=0))
    assert files(store) == of((20, 1), (30, 1), (12, 2), (13, 2))


def test_data_that_earlier_attempts_left_without_a_manifest_goes_and_ones_own_stays(store):
    first = Life(store)
    first.save(10)
    store.write(fmt.data_key(20, 1), b"orphan", 1)
    second = Life(store)
    second.save(30)
    store.write(fmt.data_key(40, 2), b"being written", 2)
    store.write(fmt.data_key(40, 3), b"of a newer one", 3)
    assert second.apply(Policy(last=2, best=0)) == [fmt.data_key(20, 1)]
    assert files(store) == sorted(
        [*of((10, 1), (30, 2)), f"{fmt.stem(40, 2)}.pt", f"{fmt.stem(40, 3)}.pt"]
    )


def test_data_whose_manifest_is_damaged_is_no_leftover(store):
    first = Life(store)
    first.save(10)
    first.save(20)
    store.path(fmt.manifest_key(20, 1)).write_bytes(b"damaged")
    second = Life(store)
    second.save(30)
    second.apply(Policy(last=2, best=0))
    assert files(store) == of((10, 1), (20, 1), (30, 2))


def test_an_attempt_that_is_superseded_deletes_nothing(store):
    first = Life(store)
    for step in (10, 20, 30, 40):
        first.save(step)
    store.write(fmt.data_key(5, 0), b"orphan", 0)
    before = files(store)
    Life(store)
    with pytest.raises(SupersededError):
        first.apply(Policy(last=2, best=0))
    assert files(store) == before


def test_a_policy_of_nothing_still_keeps_two(store):
    life = Life(store)
    for step in (1, 2, 3):
        life.save(step)
    life.apply(dataclasses.replace(Policy(), last=0, best=0))
    assert files(store) == of((2, 1), (3, 1))


@pytest.mark.usefixtures("process_as_it_was")
def test_the_best_of_a_programs_own_loop_is_that_by_its_metric_and_prune_keeps_it(tmp_path, capsys):
    """`init` was told the metric; its config is the program's own, and may hold anything under
    names of settings."""
    scores = {
        2: (0.9, 0.5),
        4: (0.3, 0.9),
        6: (0.2, 0.4),
        8: (0.1, 0.3),
        10: (0.15, 0.2),
        12: (0.12, 0.1),
    }

    def evaluate(job: harness.Run) -> None:
        if job.step in scores:
            acc, f1 = scores[job.step]
            job.evaluate(
                [0.0],
                lambda batch: {
                    "val_acc": torch.tensor(acc),
                    "f1": torch.tensor(f1),
                    "val_loss": torch.tensor(acc),
                },
            )

    for name, keep in (("kept", {"keep_last": 9}), ("few", {"keep_last": 9, "keep_best": 2})):
        train(
            tmp_path / name,
            each=evaluate,
            save_every_steps=2,
            best="val_acc:max",
            config={"checkpoint": "mine.pt"},
            **keep,
        )
        assert run_address.checkpoint(str(tmp_path / name), "best")[1].step == 2
        capsys.readouterr()
        assert main(["prune", str(tmp_path / name), "--yes"]) == 0
        assert capsys.readouterr().out == "nothing to delete\n"
    assert main(["prune", str(tmp_path / "few"), "--yes", "--keep-last", "2"]) == 0
    assert [m.step for m in read_catalog(LocalStore(tmp_path / "few")).manifests] == [
        2,
        4,
        10,
        12,
    ], "two, and the two best"


@pytest.mark.parametrize("when", ["before it is read", "before it is parsed"])
def test_what_retention_deletes_while_others_are_read_is_not_damaged(
    when, store, capsys, monkeypatch
):
    life = Life(store)
    for step in (10, 20, 30):
        life.save(step)

    def deleting(check: Callable[..., Any]) -> Callable[..., Any]:
        def deletes_first(*arguments: Any) -> Any:
            life.apply(Policy(last=2, best=0))
            return check(*arguments)

        return deletes_first

    name = "check" if when == "before it is read" else "outline"
    monkeypatch.setattr(load, name, deleting(getattr(load, name)))
    assert main(["verify", str(store)]) == 0
    out = capsys.readouterr().out
    assert "note     step_00000010-0001: deleted meanwhile" in out and out.count("ok  ") == 2
    life.save(40)
    assert main(["ls", "--verify", str(store)]) == 0
    assert "deleted meanwhile" in capsys.readouterr().out
    life.save(50)
    assert main(["prune", str(store), "--keep-best", "0"]) == 0
    assert capsys.readouterr().out == "nothing to delete\n"


def test_what_loses_its_data_alone_while_others_are_read_is_damaged(store, capsys):
    life = Life(store)
    life.save(10)
    store.delete(fmt.data_key(10, 1))
    assert main(["verify", str(store)]) == 1
    assert "DAMAGED  step_00000010-0001" in capsys.readouterr().out


def marked(store: LocalStore) -> tuple[Life, Store]:
    """A run whose remote copy of step 20 was damaged, and marked so."""
    remote = open_store(f"memory://{secrets.token_hex(6)}/run")
    life = Life(store, remote)
    for step in (10, 20, 30):
        replicate(store, life.save(step), remote, life.attempt)
    with remote.writer(fmt.data_key(20, 1), 1) as sink:
        sink.write(b"damaged")
        sink.commit()
    remote.set_aside([fmt.manifest_key(20, 1)])
    return life, remote


def test_a_copy_that_is_sent_again_whole_is_not_marked_any_more(store, monkeypatch):
    life, remote = marked(store)
    of_20 = read_catalog(store).manifests[1]
    mark, order = of_20.key + SET_ASIDE, list[str]()

    def noted(name: str, does: Callable[..., Any], key: str, *more: Any) -> Any:
        load.check(remote, of_20)  # whole already
        order.append(f"{name} {key}")
        return does(key, *more)

    for name in ("delete", "create"):
        monkeypatch.setattr(remote, name, functools.partial(noted, name, getattr(remote, name)))
    replicate(store, of_20, remote, life.attempt)
    assert order == [f"create {of_20.key}", f"delete {mark}"]
    found = read_catalog(store, remote)
    assert not found.parts[-1].marked and len(found.whole_copies(of_20)) == 2
    assert [entry.key for entry in remote.entries(fmt.CHECKPOINTS) if "damaged" in entry.key] == []


@pytest.mark.parametrize("is_whole", [False, True])
def test_prune_deletes_of_what_is_marked_only_what_is_damaged(is_whole, store, capsys):
    """One that an earlier harness has sent again still bears its mark."""
    _, remote = marked(store)
    if is_whole:
        with remote.writer(fmt.data_key(20, 1), 1) as sink:
            sink.write(store.read(fmt.data_key(20, 1)))
            sink.commit()
    assert main(["prune", str(remote), "--keep-last", "3"]) == 0
    assert f"kept, set aside as damaged: {fmt.manifest_key(20, 1)}" in capsys.readouterr().out
    assert main(["prune", str(remote), "--keep-last", "3", "--set-aside", "--yes"]) == 0
    left = [entry.key.partition("/")[2] for entry in remote.entries(fmt.CHECKPOINTS)]
    assert left == of((10, 1), *([(20, 1)] if is_whole else []), (30, 1))


def test_data_whose_manifest_is_set_aside_is_kept_with_it(store, capsys):
    """A kill between the two renames."""
    Life(store).save(10)
    store.set_aside([fmt.manifest_key(10, 1)])
    second = Life(store)
    for step in (20, 30, 40):
        second.save(step)
    assert second.apply(Policy(last=2, best=0)) == ["step_00000020-0002"]
    assert store.exists(fmt.data_key(10, 1))
    assert main(["prune", str(store), "--yes"]) == 0
    assert f"kept, set aside as damaged: {fmt.manifest_key(10, 1)}{SET_ASIDE}, " in (
        capsys.readouterr().out
    )
    assert main(["prune", str(store), "--set-aside", "--yes"]) == 0
    assert files(store) == of((30, 2), (40, 2))


def test_prune_keeps_what_waits_for_its_upload(store, capsys):
    """The bucket was away: it lacks the best one and an n-th one, and wants neither of the rest."""
    remote = open_store(f"memory://{secrets.token_hex(6)}/run")
    policies = retention.record(Policy(last=2, best=0), Policy(last=2, every_steps=30))
    life = Life(store, remote, **policies)
    for step in range(10, 80, 10):
        made = life.save(step, val_loss=0.1 if step == 40 else 1.0)
        if step in (10, 70):
            replicate(store, made, remote, life.attempt)
    assert main(["prune", str(store), "--yes"]) == 0
    out = capsys.readouterr().out
    assert (
        "kept, to be uploaded by the next start: step_00000030-0001, step_00000040-0001" in out
    ), out
    assert files(store) == of((30, 1), (40, 1), (60, 1), (70, 1))
    for manifest in read_catalog(store).manifests[:2]:
        replicate(store, manifest, remote, life.attempt)
    assert main(["prune", str(store), "--yes"]) == 0
    assert files(store) == of((60, 1), (70, 1))


def test_prune_deletes_nothing_while_it_is_not_known_what_was_uploaded(store, tmp_path, capsys):
    remote = LocalStore(tmp_path / "remote")
    remote.prepare(fmt.FOLDERS)
    life = Life(store, remote)
    for step in (10, 20, 30):
        life.save(step)
    remote.root.rename(tmp_path / "gone")
    remote.root.touch()
    assert main(["prune", str(store), "--keep-last", "2", "--keep-best", "0", "--yes"]) == 74
    assert f"cannot list {remote}" in capsys.readouterr().err
    assert files(store) == of((10, 1), (20, 1), (30, 1))


@pytest.mark.usefixtures("process_as_it_was")
@pytest.mark.parametrize(
    "wrong",
    [True, "x", [], {"run": 1}, {"run": {"last": 1}}, {"run": dict.fromkeys(vars(Policy()), -1)}],
    ids=repr,
)
def test_a_recorded_policy_that_is_none_does_not_count(tmp_path, wrong):
    train(tmp_path, leave_at=7)
    path = tmp_path / fmt.attempt_key(1)
    path.write_bytes(attempts.spell(json.loads(path.read_text()) | {retention.RECORDED: wrong}))
    assert retention.recorded(read_catalog(LocalStore(tmp_path)), is_local=True) is None
    assert main(["prune", str(tmp_path)]) == 0
