"""One history per run on a directory for each machine and one bucket for all: each rule by the
interleaving that breaks without it.

The zombies are whole training processes, stopped (SIGSTOP) at the very request that the proxy
holds, and woken (SIGCONT) once their successor has gone on, while what they had sent arrives late.
"""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import alone, run
from fault_proxy import FaultProxy, Hold, Rule
from remote_lives import Born, Life, Nursery, payload, shared_nursery
from s3_server import S3Server, free_ports
from there import there

from harness import cli
from harness.checkpoint import attempts, load, resume
from harness.checkpoint import format as fmt
from harness.checkpoint.catalog import read_catalog
from harness.checkpoint.replicate import replicate
from harness.errors import DamagedError, RefusedError, StorageError, SupersededError, UsageError
from harness.saving.locations import check_remembered
from harness.store import LocalStore, Store, open_store

EXIT_STORAGE, EXIT_STOPPED, EXIT_SUPERSEDED, EXIT_USAGE = 74, 75, 76, 78  # the contract, in figures
LONG = (
    "train.epochs=400",
    "task.args.sleep_s=0.01",
    "checkpoint.every_steps=5",
    "checkpoint.keep_last=2",
    "checkpoint.keep_best=0",
)
# step 2 is uploaded also if it is overtaken
SHORT = ("train.max_steps=4", "checkpoint.every_steps=2", "store.keep.every_steps=2")


class Place:
    """A bucket of the test's own on the real server, and how to get there."""

    def __init__(self, server: S3Server, name: str, proxy: FaultProxy) -> None:
        self.server, self.name, self.proxy = server, name, proxy
        self.client = server.client()
        self.url = f"s3://{name}/run"
        self.slow_way = server.environment | {"AWS_ENDPOINT_URL": proxy.url}

    def store(self) -> Store:
        """The run's bucket as this process sees it, directly."""
        return open_store(self.url, 30)

    def through_proxy(self, monkeypatch: pytest.MonkeyPatch) -> Store:
        """The same through the proxy; connected at once, while the variable points there."""
        with monkeypatch.context() as patch:
            patch.setenv("AWS_ENDPOINT_URL", self.proxy.url)
            store = open_store(self.url, 30)
            store.exists("nothing")
        self.proxy.clear()
        return store

    def tags(self) -> dict[str, str]:
        """Every object of the bucket with its ETag."""
        reply = self.client.list_objects_v2(Bucket=self.name)
        assert not reply["IsTruncated"]
        return {
            item["Key"].removeprefix("run/"): item["ETag"] for item in reply.get("Contents", [])
        }

    def get(self, key: str) -> bytes:
        return self.client.get_object(Bucket=self.name, Key=f"run/{key}")["Body"].read()

    def put(self, key: str, data: bytes) -> None:
        self.client.put_object(Bucket=self.name, Key=f"run/{key}", Body=data)

    def drop(self, *keys: str) -> None:
        for key in keys:
            self.client.delete_object(Bucket=self.name, Key=f"run/{key}")

    def flip(self, key: str) -> None:
        """One bit in the middle."""
        data = bytearray(self.get(key))
        data[len(data) // 2] ^= 1
        self.put(key, bytes(data))


@pytest.fixture
def place(bucket: tuple[S3Server, str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    server, name = bucket
    server.lend(monkeypatch)
    with FaultProxy(server.host, server.port) as proxy:
        yield Place(server, name, proxy)


@pytest.fixture
def remote(place: Place) -> Store:
    return place.store()


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    yield shared_nursery()
    shared_nursery().end_all()


@pytest.fixture
def train(nursery: Nursery, place: Place, tmp_path: Path) -> Iterator[Callable[..., Born]]:
    """Begin a training in a process of its own: on directory `dir` (or none) and the bucket,
    through the proxy if so told."""
    numbers = iter(range(100))

    def begin(
        directory: str | None, *settings: str, proxied: bool = False, remote: str | None = place.url
    ) -> Born:
        where = [
            f"run.dir={tmp_path / directory if directory else 'null'}",
            f"run.remote={remote or 'null'}",
            "store.wait_s=30",
        ]
        environment = place.slow_way if proxied else place.server.environment
        arguments = [*where, "task.name=small_task:build", *settings]
        return nursery.bear("train", environment, tmp_path / f"output-{next(numbers)}", arguments)

    yield begin
    nursery.end_all()


def machine(tmp_path: Path, name: str) -> LocalStore:
    """The run directory of a machine."""
    store = LocalStore(tmp_path / name)
    store.prepare(fmt.FOLDERS)
    return store


def orders(*stores: Store) -> list[tuple[int, int]]:
    """(step, attempt) of the history, newest first."""
    return [(m.step, m.attempt) for m in read_catalog(*stores).history]


def names(attempt: int) -> tuple[str, ...]:
    """What the keys contain that belong to one attempt."""
    return f"-{attempt:04d}.", f"attempts/{attempt:04d}.", f"events/{attempt:04d}"


def listed(url: str, capsys: pytest.CaptureFixture[str]) -> dict[str, str]:
    """What `harness ls` notes about each checkpoint."""
    capsys.readouterr()
    assert cli.main(["ls", url, "--json"]) == 0
    return {
        row["checkpoint"]: row["note"] for row in json.loads(capsys.readouterr().out)["checkpoints"]
    }


def snapshot(root: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}


def weight(content: dict[str, Any]) -> torch.Tensor:
    return content["model_state_dict"]["weight"]


# --- zombies: stopped at the very point, woken when their successor has gone on ---

# where the zombie commits: in the bucket, or in its machine's directory with copies to the bucket
WHERE = (
    "bucket",
    pytest.param("directory", marks=pytest.mark.slow),
)


def reached(hold: Hold, born: Born) -> None:
    """Wait until the request is held; who has ended will not make it any more."""
    while not hold.reached.wait(0.05):
        assert born.code is None, born.text


def stopped_at(
    train: Callable[..., Born], place: Place, where: str, **point: Any
) -> tuple[Born, Hold]:
    """A training that is stopped while the request of `point` is on its way."""
    hold = place.proxy.hold(**point)
    zombie = train("a" if where == "directory" else None, *LONG, proxied=True)
    reached(hold, zombie)
    zombie.stop()
    return zombie, hold


def wakes_and_is_told(
    zombie: Born, hold: Hold, place: Place, number: int, tmp_path: Path, where: str
) -> None:
    """Its late request arrives, it runs on, and ends as superseded; it changes nothing but what
    bears its own number."""
    before = place.tags()
    hold.release()
    zombie.wake()
    assert zombie.wait() == EXIT_SUPERSEDED, zombie.text
    assert "superseded" in zombie.text and "Traceback" not in zombie.text
    after = place.tags()
    changed = {key for key in before.keys() | after.keys() if before.get(key) != after.get(key)}
    assert all(any(name in key for name in names(number)) for key in changed), changed
    gone = {key for key in before if key not in after}
    assert (
        not gone or where == "directory" or all(key.endswith((".pt", ".steps")) for key in gone)
    ), "it deletes no checkpoint"
    assert json.loads(place.get(fmt.end_key(number)))["why"] == "superseded"
    if where == "directory":
        assert json.loads((tmp_path / "a" / fmt.end_key(number)).read_text())["why"] == "superseded"


@pytest.mark.parametrize("where", WHERE)
def test_a_zombie_stopped_before_its_claim_loses_the_number_and_writes_nothing(
    train, place, remote, tmp_path, where
):
    zombie, hold = stopped_at(train, place, where, method="PUT", contains=fmt.attempt_key(1))
    successor = Life(remote)
    successor.save(3)
    before = place.tags()
    hold.release()
    zombie.wake()
    assert zombie.wait() == EXIT_SUPERSEDED, zombie.text
    assert "faster" in zombie.text
    assert place.tags() == before
    assert attempts.holds(remote, successor.attempt)
    if where == "directory":
        assert not any((tmp_path / "a" / fmt.ATTEMPTS).iterdir()), (
            "no number is claimed there without the bucket's word"
        )
    assert orders(remote) == [(3, 1)]


@pytest.mark.parametrize("where", WHERE)
def test_a_zombie_stopped_between_its_claim_and_its_first_commit_commits_nothing_in_the_bucket(
    train, place, remote, tmp_path, where
):
    zombie, hold = stopped_at(train, place, where, method="PUT", contains=f"{fmt.stem(5, 1)}.pt")
    successor = Life(remote)
    assert successor.attempt.number == 2 and successor.origin is None
    successor.save(3)
    wakes_and_is_told(zombie, hold, place, 1, tmp_path, where)
    assert fmt.manifest_key(5, 1) not in place.tags()
    assert orders(remote) == [(3, 2)]


def test_a_zombie_whose_settings_arrive_late_does_not_change_what_is_kept_of_its_successor(
    train, place, remote
):
    """config.yaml is the one file that each attempt replaces; nothing may be decided by it."""
    zombie, hold = stopped_at(train, place, "bucket", method="PUT", contains="config.yaml")
    successor = Life(remote)
    successor.config = {"checkpoint": {"keep_last": 4}}
    for step in (3, 4, 5, 6, 7):
        successor.save(step)
    hold.release()
    zombie.wake()
    assert zombie.wait() == EXIT_SUPERSEDED, zombie.text
    assert b"keep_last: 2" in place.get("config.yaml"), "the zombie's"
    assert cli.main(["prune", place.url, "--yes"]) == 0
    assert [step for step, _ in orders(remote)] == [7, 6, 5, 4]


@pytest.mark.parametrize("where", WHERE)
def test_a_zombie_stopped_between_data_and_manifest_commits_what_nobody_looks_at(
    train, place, remote, tmp_path, where, capsys
):
    zombie, hold = stopped_at(train, place, where, method="PUT", contains=f"{fmt.stem(5, 1)}.json")
    successor = Life(remote)
    assert successor.origin is None, "data alone is no checkpoint"
    successor.save(3)
    wakes_and_is_told(zombie, hold, place, 1, tmp_path, where)
    assert fmt.manifest_key(5, 1) in place.tags(), "the late request was done"
    assert orders(remote) == [(3, 2)]
    notes = listed(place.url, capsys)
    assert (
        "cut off" in notes[fmt.stem(5, 1)]
        and notes[fmt.stem(3, 2)] == "next start resumes from here"
    )


@pytest.mark.parametrize("where", WHERE)
def test_a_zombie_stopped_after_its_manifest_is_gone_on_from_and_adds_nothing_to_it(
    train, place, remote, tmp_path, where, world
):
    zombie, hold = stopped_at(
        train, place, where, method="PUT", contains=f"{fmt.stem(5, 1)}.json", after=True
    )
    successor = Life(remote)
    assert there(successor.origin).order == (1, 5)
    successor.save(6)
    wakes_and_is_told(zombie, hold, place, 1, tmp_path, where)
    assert orders(remote) == [(6, 2), (5, 1)]
    assert there(resume.choose(remote, world).manifest).order == (2, 6)


@pytest.mark.parametrize("where", WHERE)
def test_a_zombie_whose_manifest_arrives_between_its_successors_claim_and_commit_counts_until_then(
    train, place, remote, tmp_path, where
):
    zombie, hold = stopped_at(train, place, where, method="PUT", contains=f"{fmt.stem(5, 1)}.json")
    successor = Life(remote)
    wakes_and_is_told(zombie, hold, place, 1, tmp_path, where)
    assert orders(remote) == [(5, 1)], "a bare claim only fences"
    successor.save(3)
    assert orders(remote) == [(3, 2)]


@pytest.mark.parametrize("where", WHERE)
def test_a_zombie_stopped_in_its_retention_deletes_nothing_that_its_successor_needs(
    train, place, remote, tmp_path, where
):
    zombie, hold = stopped_at(train, place, where, method="DELETE", contains=f"{fmt.CHECKPOINTS}/")
    successor = Life(remote)
    origin = there(successor.origin)
    assert origin.attempt == 1
    kept = {
        m.name for m in (origin, successor.save(origin.step + 1), successor.save(origin.step + 2))
    }
    doomed = there(hold.request).path.rsplit("/", 1)[1].removesuffix(".json")
    before = place.tags()
    hold.release()
    zombie.wake()
    assert zombie.wait() == EXIT_SUPERSEDED, zombie.text
    left = place.tags()
    # of its own steps it needs no longer those before its checkpoint
    gone = {key for key in before if key not in left and not key.endswith(".steps")}
    assert {key.rsplit("/", 1)[1].rsplit(".", 1)[0] for key in gone} == {doomed}, (
        "what was on its way, and its data"
    )
    history = read_catalog(remote).history
    assert kept <= {m.name for m in history} and doomed not in kept
    for manifest in history:
        load.check(remote, manifest)


def test_a_woken_retention_asks_before_each_delete_whether_it_is_superseded(
    place, remote, monkeypatch
):
    zombie = Life(place.through_proxy(monkeypatch))
    for step in (1, 2, 3, 4, 5):
        zombie.save(step)
    hold = place.proxy.hold("DELETE", fmt.stem(1, 1))
    said: list[BaseException] = []

    def let_go() -> None:
        try:
            zombie.let_go(2)
        except SupersededError as error:
            said.append(error)

    thread = threading.Thread(target=let_go)
    thread.start()
    assert hold.reached.wait(100)
    Life(remote)
    hold.release()
    thread.join(100)
    assert len(said) == 1
    assert [m.step for m in read_catalog(remote).manifests] == [2, 3, 4, 5], (
        "one delete was on its way, none came after"
    )


@pytest.mark.parametrize("late", ["data", "manifest"])
def test_a_zombie_that_shares_its_directory_with_its_successor_takes_back_nothing_that_this_one_has_copied(  # noqa: E501
    place, remote, tmp_path, monkeypatch, late
):
    """Both run on one machine: what the zombie was copying to the bucket is copied by its successor
    too, byte for byte."""
    local = machine(tmp_path, "a")
    zombie = Life(local, place.through_proxy(monkeypatch))
    manifest = zombie.save(5)
    hold = place.proxy.hold("PUT", f"{fmt.stem(5, 1)}.{'pt' if late == 'data' else 'json'}")
    thread = threading.Thread(
        target=lambda: _suppressed(
            lambda: replicate(local, manifest, zombie.stores[1], zombie.attempt)
        )
    )
    thread.start()
    assert hold.reached.wait(100)
    successor = Life(local, remote)
    assert successor.origin == manifest
    replicate(local, manifest, remote, successor.attempt)
    hold.release()
    thread.join(100)
    assert orders(remote) == [(5, 1)]
    load.check(remote, there(read_catalog(remote).head))


def _suppressed(work: Callable[[], object]) -> None:
    with contextlib.suppress(SupersededError):
        work()


def test_a_run_that_is_superseded_during_its_very_last_upload_is_not_finished(
    train, place, remote, tmp_path
):
    hold = place.proxy.hold("PUT", f"{fmt.stem(4, 1)}.pt")
    born = train("a", *SHORT, proxied=True)
    reached(hold, born)
    successor = Life(remote)
    hold.release()
    assert born.wait() == EXIT_SUPERSEDED, born.text
    assert {
        read_catalog(store).ends[1]["why"] for store in (remote, LocalStore(tmp_path / "a"))
    } == {"superseded"}
    assert fmt.manifest_key(4, 1) not in place.tags()
    successor.save(3)
    assert orders(remote)[0] == (3, 2)


def test_an_attempt_whose_origin_a_zombie_deletes_saves_at_once(train, place, remote):
    assert train(None, *SHORT).wait() == 0
    hold = place.proxy.hold("PUT", fmt.attempt_key(2))
    second = train(
        None,
        "train.epochs=400",
        "task.args.sleep_s=0.02",
        "checkpoint.every_s=null",
        "resume.accept=[config]",
        proxied=True,
    )
    reached(hold, second)
    origin = there(read_catalog(remote).head)
    place.drop(origin.key, fmt.data_key(origin.step, 1))
    hold.release()
    while (head := there(read_catalog(remote).head)).attempt == 1:
        assert second.code is None, second.text
    assert head.step < origin.step + 1000, "not at the end of the run"


def test_a_first_save_while_the_uploader_looks_for_the_origin_is_a_save_like_any_other(
    train, place, remote, tmp_path
):
    assert train("a", *SHORT).wait() == 0
    hold = place.proxy.hold("GET", "attempts%2F", skip=2)
    second = train("a", "train.max_steps=8", "checkpoint.every_steps=2", proxied=True)
    reached(hold, second)
    assert remote.exists(fmt.attempt_key(2)), "the claim has been looked over"
    while not LocalStore(tmp_path / "a").exists(fmt.manifest_key(6, 2)):
        assert second.code is None, second.text
    hold.release()
    assert second.wait() == 0, second.text
    assert orders(remote)[0] == (8, 2)


# --- two at once ---


def history_is_one_line(remote: Store) -> None:
    """Exactly one manifest for each step, each attempt's after its predecessor's, all of them
    whole."""
    history = read_catalog(remote).history
    steps = [m.step for m in history]
    assert len(steps) == len(set(steps))
    assert history == sorted(history, key=lambda m: m.order, reverse=True) and steps == sorted(
        steps, reverse=True
    )
    for manifest in history:
        load.check(remote, manifest)


KEEP_ALL = ("checkpoint.keep_last=1000", "checkpoint.every_steps=5", "task.args.sleep_s=0.01")


@pytest.mark.slow
def test_of_two_launches_by_hand_the_later_takes_over_and_the_first_ends_as_superseded(
    train, place, remote, tmp_path
):
    """The worst one: two machines, a directory each, one bucket, both alive to the end."""
    first = train("a", *KEEP_ALL, "train.epochs=400")
    while not orders(remote):
        assert first.code is None, first.text
    # of the second: if the first gets further while it starts, it asks to be started again
    starts = 1
    while (
        code := (second := train("b", *KEEP_ALL, "train.epochs=400", "train.max_steps=400")).wait()
    ) == EXIT_STOPPED:
        assert "while this start was under way" in second.text and starts < 5
        starts += 1
    assert code == 0, second.text
    assert first.wait() == EXIT_SUPERSEDED, first.text
    assert json.loads(place.get(fmt.end_key(1)))["why"] == "superseded"
    last = 1 + starts
    assert json.loads(place.get(fmt.end_key(last)))["why"] == "finished"
    history_is_one_line(remote)
    found = read_catalog(remote)
    assert there(found.head).order == (last, 400) and there(found.head).final
    assert {m.attempt for m in found.history} == {1, last}
    origin = json.loads(place.get(fmt.attempt_key(last)))["from"]
    assert max(m.step for m in found.history if m.attempt == 1) == origin["step"]
    assert read_catalog(LocalStore(tmp_path / "a")).ends[1]["why"] == "superseded"


@pytest.mark.slow
def test_two_starts_at_the_same_moment_make_one_history(train, place, remote):
    hold = place.proxy.hold("PUT", fmt.attempt_key(1), count=2)
    both = [train(name, *KEEP_ALL, "train.max_steps=20", proxied=True) for name in ("a", "b")]
    reached(hold, both[0])
    while sum(fmt.attempt_key(1) in request.path for request in place.proxy.requests) < 2:
        assert all(born.code is None for born in both)
    hold.release()
    assert sorted(born.wait() for born in both) == [0, EXIT_SUPERSEDED]
    found = read_catalog(remote)
    assert found.greatest == 1 and there(found.head).order == (1, 20) and there(found.head).final
    history_is_one_line(remote)


def test_of_many_that_claim_one_number_in_the_bucket_exactly_one_has_it(
    nursery, place, remote, tmp_path
):
    rivals = [
        nursery.bear("race", place.server.environment, tmp_path / f"out-{k}", place.url)
        for k in range(4)
    ]
    for rival in rivals:
        rival.wait_stopped()
    for rival in rivals:
        rival.wake()
    said = [(rival.wait(), rival.text) for rival in rivals]
    assert [code for code, _ in said].count(0) == 1
    assert all("another start of this run was faster" in text for code, text in said if code)
    assert [key for key in place.tags() if key.startswith(fmt.ATTEMPTS)] == [fmt.attempt_key(1)]


def test_a_claim_whose_reply_is_lost_is_recognised_as_ours(train, place, remote):
    place.proxy.rules.append(Rule("drop_response", "PUT", fmt.attempt_key(1), first=1))
    born = train("a", *SHORT, proxied=True)
    assert born.wait() == 0, born.text
    puts = [
        request
        for request in place.proxy.requests
        if request.method == "PUT" and fmt.attempt_key(1) in request.path
    ]
    assert len(puts) >= 2 and {put.headers["if-none-match"] for put in puts} == {"*"}
    assert orders(remote) == [(4, 1), (2, 1)]


def test_a_claim_whose_reply_is_lost_and_that_a_rival_made_is_not_ours(place, remote, monkeypatch):
    """The same answer to the second try, and a record that differs in nothing but what a nonce
    makes differ."""
    slow = place.through_proxy(monkeypatch)
    found = read_catalog(slow)
    ours = attempts.claim(found, None, 1)
    rival = json.loads(place.get(fmt.attempt_key(1))) | {"nonce": "0" * 32}
    place.put(fmt.attempt_key(1), (json.dumps(rival, indent=1, sort_keys=True) + "\n").encode())
    assert not attempts.holds(remote, ours)
    with pytest.raises(SupersededError, match="faster"):
        attempts.claim(found, None, 1)
    assert json.loads(place.get(fmt.attempt_key(1)))["nonce"] == "0" * 32


def test_a_lost_reply_to_a_manifest_is_recognised_as_ours(place, remote, monkeypatch):
    life = Life(place.through_proxy(monkeypatch))
    place.proxy.rules.append(Rule("drop_response", "PUT", fmt.manifest_key(7, 1), first=1))
    life.save(7)
    life.save(8)
    assert orders(remote) == [(8, 1), (7, 1)]


# --- attempt numbers, from both stores ---

BEARS_SEVEN = (
    "attempts/0007.json",
    "attempts/0007.end.json",
    "checkpoints/step_00000010-0007.pt",
    "checkpoints/step_00000010-0007.json",
    "checkpoints/step_00000010-0007.json.damaged",
)


@pytest.mark.parametrize("side", ["directory", "bucket"])
def test_an_attempt_number_never_repeats_while_any_name_on_either_store_bears_it(
    place, remote, tmp_path, side
):
    local = machine(tmp_path, "a")
    Life(local, remote).copied(10)
    for number, left in enumerate(BEARS_SEVEN, 7):
        key = left.replace("0007", f"{number:04d}")
        if side == "directory":
            local.path(key).write_bytes(b"")
        else:
            place.put(key, b"")
        assert read_catalog(local, remote).greatest == number, key
    life = Life(local, remote)
    assert life.attempt.number == 7 + len(BEARS_SEVEN)
    assert attempts.holds(local, life.attempt) and attempts.holds(remote, life.attempt)


def test_a_new_directory_goes_on_with_the_buckets_numbers_and_run(remote, tmp_path):
    first = Life(machine(tmp_path, "a"), remote)
    first.copied(10)
    second = Life(machine(tmp_path, "b"), remote)
    assert second.attempt.number == 2 and second.attempt.run_id == first.attempt.run_id
    assert there(second.origin).order == (1, 10)


def test_who_claimed_in_the_bucket_and_died_before_the_directory_has_used_the_number_up(
    remote, tmp_path
):
    attempts.claim(read_catalog(remote), None, 1)
    local = machine(tmp_path, "a")
    life = Life(local, remote)
    assert life.attempt.number == 2
    assert [entry.key for entry in local.entries(fmt.ATTEMPTS)] == [fmt.attempt_key(2)]


# --- a directory remembers its bucket ---


def test_a_directory_that_has_a_bucket_is_refused_without_it_or_with_another(
    train, place, tmp_path
):
    assert train("a", *SHORT).wait() == 0
    before, tags = snapshot(tmp_path / "a"), place.tags()
    more = ("train.max_steps=8", "checkpoint.every_steps=2")
    for other in (None, f"s3://{place.name}/other"):
        refused = train("a", *more, remote=other)
        assert refused.wait() == EXIT_USAGE
        assert place.url in refused.text and "resume.accept=[remote]" in refused.text
    assert snapshot(tmp_path / "a") == before and place.tags() == tags
    insisted = train("a", *more, "resume.accept=[remote]", remote=None)
    assert insisted.wait() == 0, insisted.text
    assert orders(LocalStore(tmp_path / "a"))[0] == (8, 2)
    assert place.tags() == tags, "nothing was written where it was told not to go"


def test_who_insisted_on_another_bucket_is_remembered_with_that_one(place, tmp_path):
    local, other = machine(tmp_path, "a"), open_store(f"s3://{place.name}/other", 30)
    Life(local, place.store()).copied(10)
    with pytest.raises(UsageError, match="null"):
        check_remembered((local,), (), read_catalog(local))
    check_remembered((local, other), ("remote",), read_catalog(local))
    Life(local, other).copied(20)
    check_remembered((local, other), (), read_catalog(local))
    with pytest.raises(UsageError):
        check_remembered((local, place.store()), (), read_catalog(local))


def test_a_directory_whose_newest_record_cannot_be_read_still_remembers_its_bucket(
    remote, tmp_path
):
    local = machine(tmp_path, "a")
    Life(local, remote).copied(10)
    Life(local, remote).copied(20)
    for record in (b"", b"{", b"[]", bytes(100)):
        local.path(fmt.attempt_key(2)).write_bytes(record)
        with pytest.raises(UsageError, match="belongs to a run whose remote"):
            check_remembered((local,), (), read_catalog(local))


def test_a_rollback_does_not_make_a_directory_forget_its_bucket(remote, tmp_path):
    local = machine(tmp_path, "a")
    life = Life(local, remote)
    life.copied(10)
    life.copied(20)
    assert cli.main(["rollback", str(local.root), "10"]) == 0
    with pytest.raises(UsageError, match="belongs to a run whose remote"):
        check_remembered((local,), (), read_catalog(local))
    assert orders(local, remote) == [(10, 2), (10, 1)] == orders(remote)
    after = Life(local, remote)
    after.copied(11)
    assert orders(local, remote) == [(11, 3), (10, 2), (10, 1)]


@pytest.mark.parametrize("first", [1, 5], ids=["same numbers", "other numbers"])
def test_a_directory_and_a_bucket_of_different_runs_are_refused(
    train, place, remote, tmp_path, first
):
    Life(remote).save(10)
    local = machine(tmp_path, "a")
    if first > 1:
        # numbers that both runs have would tell by themselves
        local.path(fmt.data_key(1, first - 1)).write_bytes(b"")
    assert Life(local).attempt.number == first
    before, tags = snapshot(tmp_path / "a"), place.tags()
    born = train("a", *SHORT)
    assert born.wait() == EXIT_USAGE, born.text
    assert "different runs" in born.text and "Traceback" not in born.text
    assert snapshot(tmp_path / "a") == before and place.tags() == tags


def test_a_run_that_was_trained_on_both_sides_without_the_other_is_refused(remote, tmp_path):
    local = machine(tmp_path, "a")
    Life(local, remote).copied(10)
    Life(local).save(20)
    Life(remote).save(30)
    with pytest.raises(UsageError, match="two attempts 2"):
        read_catalog(local, remote).check_same_run()


# --- which side is newest ---


def test_a_stale_directory_that_is_newer_by_step_but_older_by_attempt_loses_against_the_bucket(
    remote, tmp_path, world
):
    stale, elsewhere = machine(tmp_path, "a"), machine(tmp_path, "b")
    old = Life(stale, remote)
    old.copied(10)
    new = Life(elsewhere, remote)
    new.copied(20)
    old.save(90)
    resume_point = resume.choose((stale, remote), world)
    assert there(resume_point.manifest).order == (2, 20)
    assert torch.equal(weight(there(resume_point.payload)), weight(payload(20, 2)))
    assert orders(stale, remote) == [(20, 2), (10, 1)]
    assert any(
        "step_00000090-0001 in" in note and "taking step_00000020-0002" in note
        for note in resume_point.notes
    )


def test_what_was_never_uploaded_wins_if_nobody_has_committed_since(remote, tmp_path, world):
    local = machine(tmp_path, "a")
    life = Life(local, remote)
    life.copied(10)
    life.save(20)
    Life(machine(tmp_path, "b"), remote)
    resume_point = resume.choose((local, remote), world)
    assert there(resume_point.manifest).order == (1, 20), "a bare claim elsewhere cuts nothing off"
    assert torch.equal(weight(there(resume_point.payload)), weight(payload(20, 1)))
    assert there(resume.choose(remote, world).manifest).order == (1, 10)


def test_what_was_never_uploaded_is_uploaded_by_the_next_attempt(train, place, remote, tmp_path):
    place.proxy.rules.append(Rule("500", "PUT", f"/{fmt.CHECKPOINTS}/"))
    killed = train("a", *LONG, "checkpoint.every_steps=2", proxied=True)
    local = LocalStore(tmp_path / "a")
    while not local.exists(fmt.manifest_key(4, 1)):
        assert killed.code is None, killed.text
    killed.kill()
    newest = there(read_catalog(local).head)
    assert remote.exists(newest.key) is False
    # with nothing newer, which might come first
    again = train("a", *LONG, "checkpoint.every_steps=2000")
    while not remote.exists(newest.key):
        assert again.code is None, again.text
    load.check(remote, newest)


# --- damage is per copy ---


@pytest.fixture
def both(remote: Store, tmp_path: Path) -> LocalStore:
    """Steps 10 and 20 on both sides."""
    local = machine(tmp_path, "a")
    life = Life(local, remote)
    life.copied(10)
    life.copied(20)
    return local


def damage(place: Place, local: LocalStore, *copies: tuple[str, int]) -> None:
    for side, step in copies:
        if side == "remote":
            place.flip(fmt.data_key(step, 1))
        else:
            path = local.path(fmt.data_key(step, 1))
            data = bytearray(path.read_bytes())
            data[len(data) // 2] ^= 1
            path.write_bytes(data)


@pytest.mark.parametrize(
    ("damaged", "step", "passed_over"),
    [
        ([("local", 20)], 20, [(0, 20)]),
        ([("remote", 20)], 20, []),
        ([("local", 20), ("remote", 20)], 10, [(0, 20), (1, 20)]),
        ([("local", 20), ("remote", 20), ("local", 10)], 10, [(0, 20), (1, 20), (0, 10)]),
    ],
    ids=["here", "there", "both", "both and the older one here"],
)
def test_a_damaged_copy_is_looked_for_on_the_other_store_before_an_older_one_is_taken(
    place, remote, both, world, damaged, step, passed_over
):
    damage(place, both, *damaged)
    resume_point = resume.choose((both, remote), world)
    assert there(resume_point.manifest).step == step
    assert torch.equal(weight(there(resume_point.payload)), weight(payload(step, 1)))
    assert resume_point.damaged == [
        (side, fmt.manifest_key(number, 1)) for side, number in passed_over
    ]


def test_a_manifest_that_is_damaged_on_one_store_is_read_from_the_other(place, remote, both, world):
    both.path(fmt.manifest_key(20, 1)).write_bytes(b"{")
    resume_point = resume.choose((both, remote), world)
    assert there(resume_point.manifest).step == 20 and resume_point.damaged == [
        (0, fmt.manifest_key(20, 1))
    ]
    place.put(fmt.manifest_key(10, 1), b"{")
    assert orders(both, remote) == [(20, 1), (10, 1)]


def test_all_copies_damaged_is_no_fresh_start(place, remote, both, world):
    damage(place, both, *((side, step) for side in ("local", "remote") for step in (10, 20)))
    before, tags = snapshot(both.root), place.tags()
    with pytest.raises(DamagedError, match="not starting from step 0"):
        resume.choose((both, remote), world)
    assert snapshot(both.root) == before and place.tags() == tags


def test_a_damaged_remote_copy_is_marked_after_a_second_full_read_and_not_renamed(
    train, place, remote
):
    assert train(None, *SHORT).wait() == 0
    place.flip(fmt.data_key(4, 1))
    before = place.tags()
    born = train("b", "train.max_steps=8", "checkpoint.every_steps=4", proxied=True)
    assert born.wait() == 0, born.text
    reads = [
        r
        for r in place.proxy.requests
        if r.method == "GET" and fmt.data_key(4, 1) in r.path and r.status in (200, 206)
    ]
    assert len(reads) == 2, "one range each time"
    after = place.tags()
    assert {key: after.get(key) for key in before if key.startswith(fmt.CHECKPOINTS)} == {
        key: tag for key, tag in before.items() if key.startswith(fmt.CHECKPOINTS)
    }
    assert (
        fmt.manifest_key(4, 1) + ".damaged" in after
        and fmt.data_key(4, 1) + ".damaged" not in after
    )
    assert "skipped" in born.text and fmt.stem(4, 1) in born.text
    assert json.loads(place.get(fmt.attempt_key(2)))["from"] == {"attempt": 1, "step": 2}


def test_what_arrives_whole_when_it_is_read_again_is_not_damaged(place, both, world, monkeypatch):
    slow = place.through_proxy(monkeypatch)
    place.proxy.rules.append(Rule("flip_get", "GET", fmt.data_key(20, 1), first=1))
    resume_point = resume.choose(slow, world)
    assert there(resume_point.manifest).step == 20 and resume_point.damaged == []


def test_a_newest_checkpoint_that_cannot_be_fetched_is_not_passed_over_as_if_it_were_damaged(
    place, both, world, monkeypatch
):
    """Unreachable is not damaged: going on from the older one would cut off what is whole."""
    # the requests that succeed must have time to
    slow = place.through_proxy(monkeypatch).with_retry_limit(3)
    place.proxy.rules.append(Rule("500", "GET", fmt.data_key(20, 1)))
    with pytest.raises(StorageError):
        pytest.fail(str(resume.choose(slow, world).notes))
    resume_point = resume.choose((both, slow), world)
    assert there(resume_point.manifest).step == 20, "the directory has it"


def test_a_marked_copy_is_the_last_choice_but_a_choice(place, remote, both, world):
    remote.set_aside([fmt.manifest_key(20, 1)])
    resume_point = resume.choose(remote, world)
    assert there(resume_point.manifest).step == 10
    said = f"skipped: {fmt.stem(20, 1)} was found damaged before, and is marked so in {remote}"
    assert [note.startswith(said) for note in resume_point.notes] == [True], "not without a word"
    resume_point = resume.choose((both, remote), world)
    assert there(resume_point.manifest).step == 20, "the directory's copy has no mark"
    assert not any("skipped" in note for note in resume_point.notes)
    damage(place, both, ("remote", 10))
    resume_point = resume.choose(remote, world)
    assert there(resume_point.manifest).step == 20, "what was seen broken there may be whole here"
    assert torch.equal(weight(there(resume_point.payload)), weight(payload(20, 1)))


def test_what_vanishes_while_it_is_restored_means_list_again(place, remote, world, monkeypatch):
    """The attempt that is about to be replaced goes on, and its retention lets go what was
    listed."""
    alive = Life(remote)
    alive.save(10)
    alive.save(20)
    slow = place.through_proxy(monkeypatch)
    hold = place.proxy.hold("HEAD", fmt.data_key(20, 1))

    def go_on() -> None:
        if hold.reached.wait(100):
            alive.save(30)
            alive.save(40)
            alive.let_go(2)
        hold.release()

    thread = threading.Thread(target=go_on)
    thread.start()
    resume_point = resume.choose(slow, world)
    thread.join()
    assert [m.step for m in read_catalog(remote).history] == [40, 30]
    assert there(resume_point.manifest).step == 40 and resume_point.damaged == []


# --- step 0 ---

HINTS: dict[str, tuple[str, bytes]] = {
    "a manifest that cannot be read": (fmt.manifest_key(10, 1), b""),
    "a mark of what is gone": (fmt.manifest_key(10, 1) + ".damaged", b"{}"),
    "a record that went on from something": (
        fmt.attempt_key(1),
        b'{"from": {"attempt": 1, "step": 5}, "run_id": "r"}',
    ),
    "a record that cannot be read": (fmt.attempt_key(1), b"{"),
    "an end with something saved": (fmt.end_key(1), b'{"why": "stopped", "saved_step": 10}'),
}


@pytest.mark.parametrize("side", ["directory", "bucket"])
def test_step_0_is_refused_if_either_store_hints_at_a_history(place, remote, tmp_path, world, side):
    for at, (hint, (key, data)) in enumerate(HINTS.items()):
        local = machine(tmp_path, f"a{at}")
        assert resume.choose((local, remote), world).manifest is None
        if side == "bucket":
            place.put(key, data)
        else:
            local.path(key).write_bytes(data)
        before, tags = snapshot(tmp_path), place.tags()
        with pytest.raises(DamagedError, match="not starting from step 0"):
            pytest.fail(f"{hint}: {resume.choose((local, remote), world)}")
        assert snapshot(tmp_path) == before and place.tags() == tags
        place.drop(key)


def test_attempts_that_went_on_from_nothing_allow_step_0_on_two_stores(remote, tmp_path, world):
    Life(machine(tmp_path, "a"), remote)
    assert resume.choose((machine(tmp_path, "b"), remote), world).manifest is None


def test_a_missing_bucket_is_a_wrong_setting_and_not_an_empty_run(train, place, tmp_path, world):
    with pytest.raises(RefusedError, match="no such bucket"):
        resume.choose(open_store("s3://there-is-no-such-bucket/run", 5), world)
    born = train("a", *SHORT, remote="s3://there-is-no-such-bucket/run")
    assert born.wait() == EXIT_USAGE, born.text
    assert "no such bucket" in born.text and "Traceback" not in born.text
    assert snapshot(tmp_path / "a") == {}


def test_a_server_that_does_not_answer_at_the_start_is_74_and_never_step_0(
    nursery, place, tmp_path
):
    dead = place.server.environment | {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{free_ports(1)[0]}"}
    settings = [
        f"run.dir={tmp_path / 'a'}",
        f"run.remote={place.url}",
        "task.name=small_task:build",
        "store.wait_s=1",
        *SHORT,
    ]
    born = nursery.bear("train", dead, tmp_path / "out", settings)
    assert born.wait() == EXIT_STORAGE, born.text
    assert "begins at step 0" not in born.text and "Traceback" not in born.text
    assert snapshot(tmp_path / "a") == {}


def test_a_server_that_goes_between_listing_and_claim_leaves_no_attempt_in_the_directory(
    train, place, tmp_path
):
    hold = place.proxy.hold("PUT", fmt.attempt_key(1))
    born = train("a", *SHORT, "store.wait_s=5", proxied=True)
    reached(hold, born)
    place.proxy.down()
    hold.release(forward=False)
    assert born.wait() == EXIT_STORAGE, born.text
    assert snapshot(tmp_path / "a") == {} and place.tags() == {}


# --- finished ---


@pytest.mark.parametrize(
    "directory", ["a", "b", None], ids=["its directory", "a new directory", "no directory"]
)
def test_a_finished_run_is_left_as_it_is(train, place, tmp_path, directory):
    finished = train("a" if directory else None, *SHORT)
    assert finished.wait() == 0, finished.text
    before, tags = snapshot(tmp_path / "a"), place.tags()
    again = train(directory, *SHORT, proxied=True)
    assert again.wait() == 0, again.text
    assert "is finished: step 4" in again.text and "nothing to do" in again.text
    assert snapshot(tmp_path / "a") == before and place.tags() == tags
    assert {request.method for request in place.proxy.requests} <= {"GET", "HEAD"}
    assert snapshot(tmp_path / "b") == {}


@pytest.mark.slow
def test_a_run_that_is_finished_but_for_its_last_upload_says_so_and_the_next_start_uploads_it(
    train, place, remote, tmp_path
):
    place.proxy.rules.append(Rule("denied", "PUT", fmt.manifest_key(4, 1)))
    first = train("a", *SHORT, "store.wait_s=5", proxied=True)
    assert first.wait() not in (0, EXIT_SUPERSEDED), first.text
    assert "not everything is in the remote store" in first.text
    assert orders(LocalStore(tmp_path / "a"))[0] == (4, 1) and orders(remote) == [(2, 1)]
    again = train("a", *SHORT)
    assert again.wait() == 0, again.text
    assert "was missing in" in again.text
    found = read_catalog(remote)
    assert there(found.head).order == (1, 4) and there(found.head).final and found.greatest == 1
    load.check(remote, there(found.head))


@pytest.mark.slow
def test_the_whole_program_alone_goes_on_from_the_bucket_on_another_machine(
    train, place, tmp_path, remote
):
    """Once without the nursery: started as a user starts it."""
    assert train("a", *SHORT).wait() == 0
    settings = [
        f"run.dir={tmp_path / 'b'}",
        f"run.remote={place.url}",
        "task.name=small_task:build",
    ]
    ran = run(
        alone(*settings, "checkpoint.every_steps=2", "train.max_steps=8"),
        env=place.server.environment,
    )
    assert ran.returncode == 0, ran.stderr
    assert "resumes from step 4 (step_00000004-0001)" in ran.stdout
    assert [m.order for m in read_catalog(remote).history][:2] == [(2, 8), (2, 6)]
