"""Saves whose manifest comes late, or whose data a newer attempt has deleted before it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from remote_lives import payload
from simulated_bucket import Bucket, BucketClient
from simulated_checks import manifests_of, problem_of
from simulated_disk import System
from simulated_lives import simulated
from simulator import Process, Simulator

from harness.checkpoint import attempts, commit, load
from harness.checkpoint import format as fmt
from harness.checkpoint.attempts import Attempt
from harness.checkpoint.commit import About
from harness.errors import SaveError, SupersededError
from harness.store import LocalStore, Store
from harness.store.remote import RemoteStore

ATTEMPT = Attempt(1, "run", "ours")
KEY = fmt.manifest_key(3, 1)


def save(store: Store, *, read_back: bool = False) -> None:
    about = About(1, (), {}, "-", read_back=read_back)
    commit.commit(store, ATTEMPT, payload(3), about)


def claimed(store: Store, number: int = 2) -> None:
    store.create(fmt.attempt_key(number), attempts.spell({"nonce": "theirs"}), number)


class UnheardManifests(BucketClient):
    """Carries out the request to create a manifest `after_s` later, and never replies to it."""

    after_s = 0.0
    then: Callable[[], object] = staticmethod(lambda: None)

    def put(self, key: str, data: bytes, exclusive: bool, limit_s: float) -> str:
        if key != KEY:
            return super().put(key, data, exclusive, limit_s)
        objects, simulator = self.bucket.objects, self.bucket.simulator
        simulator.at(simulator.now + self.after_s, lambda: objects.setdefault(key, data))
        simulator.wait(limit_s=limit_s)
        self.then()
        raise TimeoutError("no reply")


def in_a_bucket(after_s: float, then: Callable[[RemoteStore], object]) -> dict[str, bytes]:
    """Save with manifests that are not heard of; return what the bucket has in the end."""
    simulator = Simulator(0)
    client = UnheardManifests(Bucket(simulator))
    store = RemoteStore("s3://bucket/run", client, 20.0)
    client.after_s, client.then = after_s, lambda: then(store)

    def work() -> None:
        with pytest.raises(SaveError):
            save(store)
        simulator.wait(limit_s=1000.0)

    with simulated(simulator, System(simulator)):
        simulator.run(Process(simulator, "test", None), work)
    return client.bucket.objects


def test_a_manifest_that_a_bucket_creates_late_still_finds_its_data():
    """Its data was deleted, as the save had failed: a head without data, at which a run whose
    first save that was could never start again."""
    objects = in_a_bucket(100.0, lambda store: None)
    files = {file["name"] for file in manifests_of(objects)[1, 3]["files"]}
    assert all(f"checkpoints/{name}" in objects for name in files)
    assert "missing" not in problem_of(objects, manifests_of(objects)[1, 3])


def test_a_failed_save_leaves_nothing_that_counts_in_a_bucket():
    assert KEY not in in_a_bucket(1.0, lambda store: None)


def test_what_a_newer_attempt_may_have_gone_on_from_is_not_cleaned_up():
    objects = in_a_bucket(1.0, claimed)
    assert {KEY, fmt.data_key(3, 1)} <= objects.keys()


def test_an_attempt_whose_data_a_newer_one_has_swept_ends_as_superseded(tmp_path, monkeypatch):
    """It woke between its data and its manifest, and ended with a traceback."""
    store, outline = LocalStore(tmp_path), load.outline
    store.prepare(fmt.FOLDERS)

    def late_outline(store: Store, key: str) -> object:
        claimed(store)
        store.delete(key)
        return outline(store, key)

    monkeypatch.setattr(commit, "outline", late_outline)
    with pytest.raises(SupersededError):
        save(store, read_back=True)


def test_data_that_vanishes_before_its_manifest_fails_the_save(tmp_path, monkeypatch):
    store, outline = LocalStore(tmp_path), load.outline
    store.prepare(fmt.FOLDERS)

    def late_outline(store: Store, key: str) -> object:
        store.delete(key)
        return outline(store, key)

    monkeypatch.setattr(commit, "outline", late_outline)
    with pytest.raises(SaveError, match="has vanished"):
        save(store, read_back=True)
