"""One history per run: each rule by the interleaving that breaks without it, on one store with real
records and manifests."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ENVIRONMENT
from there import there

from harness import cli
from harness.checkpoint import attempts, load, resume, retention
from harness.checkpoint import format as fmt
from harness.checkpoint.attempts import Attempt
from harness.checkpoint.catalog import Catalog, going_on_from, read_catalog
from harness.checkpoint.commit import About, commit
from harness.checkpoint.format import Manifest
from harness.distributed import ranks
from harness.errors import DamagedError, HarnessError, SupersededError
from harness.store import LocalStore


def payload(step: int, seed: int = 0) -> dict:
    generator = torch.Generator().manual_seed(1000 * seed + step)
    return {
        "model_state_dict": {"weight": torch.randn(8, generator=generator)},
        "step": step,
        "epoch": 0,
        "loss": 1 / step if step else 1.0,
        "metrics": {"val_loss": 1 / (1 + step)},
        "config": {},
        "format_version": 1,
    }


class Life:
    """An attempt: surveys, chooses what to go on from, claims, commits; several of them can be
    alive at once."""

    def __init__(self, store: LocalStore) -> None:
        self.store = store
        found = read_catalog(store)
        self.origin = found.history[0] if found.history else None
        self.attempt = attempts.claim(found, self.origin, 1)

    def save(
        self,
        step: int,
        final: dict[str, int | None] | None = None,
        config: dict[str, object] | None = None,
    ) -> Manifest:
        about = About(1, going_on_from(self.origin), {"model": "Linear"}, "-", final)
        return commit(
            self.store,
            self.attempt,
            payload(step, self.attempt.number) | {"config": config or {}},
            about,
        )

    def save_blindly(self, step: int) -> Manifest:
        """As a zombie does that was suspended between its fence check and its manifest: nothing
        stops it."""
        others = self.store.root / fmt.ATTEMPTS
        hidden = self.store.root / "hidden"
        others.rename(hidden)
        try:
            return self.save(step)
        finally:
            hidden.rename(others)

    def end(self, why: str, **details: object) -> bool:
        return attempts.end(self.store, self.attempt, why, **details)


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    store = LocalStore(tmp_path / "run")
    store.prepare(fmt.FOLDERS)
    return store


def orders(found: Catalog | LocalStore) -> list[tuple[int, int]]:
    """(step, attempt) of the history, newest first."""
    found = read_catalog(found) if isinstance(found, LocalStore) else found
    return [(m.step, m.attempt) for m in found.history]


def notes(store: LocalStore, capsys: pytest.CaptureFixture[str]) -> dict[str, str]:
    """What `harness ls` notes about each checkpoint."""
    capsys.readouterr()
    assert cli.main(["ls", str(store.root), "--json"]) == 0
    return {
        row["checkpoint"]: row["note"] for row in json.loads(capsys.readouterr().out)["checkpoints"]
    }


# --- which checkpoints count ---


def test_a_zombie_that_commits_a_greater_step_after_its_successor_is_ignored_and_listed_as_cut_off(
    store, world, capsys
):
    zombie = Life(store)
    zombie.save(10)
    successor = Life(store)
    successor.save(20)
    zombie.save_blindly(30)
    zombie.save_blindly(99)
    assert orders(store) == [(20, 2), (10, 1)]
    assert there(resume.choose(store, world).manifest).order == (2, 20)
    listed = notes(store, capsys)
    assert "cut off" in listed[fmt.stem(99, 1)] and "cut off" in listed[fmt.stem(30, 1)]
    assert listed[fmt.stem(20, 2)] == "next start resumes from here"
    assert listed[fmt.stem(10, 1)] == ""
    third = Life(store)
    third.save(25)
    assert orders(store) == [(25, 3), (20, 2), (10, 1)]


def test_a_zombie_that_commits_an_earlier_step_than_its_successor_is_ignored_too(store):
    zombie = Life(store)
    zombie.save(10)
    successor = Life(store)
    successor.save(30)
    zombie.save_blindly(20)
    assert orders(store) == [(30, 2), (10, 1)]


def test_what_was_committed_before_the_successors_first_commit_but_after_its_claim_is_cut_off_by_it(
    store,
):
    zombie = Life(store)
    zombie.save(10)
    successor = Life(store)
    zombie.save_blindly(20)
    assert orders(store) == [(20, 1), (10, 1)], "until then it is the best there is"
    successor.save(15)
    assert orders(store) == [(15, 2), (10, 1)]


def test_a_bare_claim_only_fences(store, world):
    first = Life(store)
    first.save(10)
    first.save(20)
    claimed = Life(store)
    assert orders(store) == [(20, 1), (10, 1)]
    assert there(resume.choose(store, world).manifest).order == (1, 20)
    with pytest.raises(SupersededError):
        first.save(30)
    assert claimed.attempt.number == 2
    assert orders(store) == [(20, 1), (10, 1)]


def test_a_damaged_head_falls_back_within_its_lineage_and_not_to_what_it_cut_off(store, world):
    zombie = Life(store)
    zombie.save(10)
    successor = Life(store)
    successor.save(20)
    zombie.save_blindly(99)
    store.path(fmt.data_key(20, 2)).write_bytes(b"damaged")
    resume_point = resume.choose(store, world)
    assert there(resume_point.manifest).order == (1, 10)
    assert resume_point.damaged == [(0, fmt.manifest_key(20, 2))]


def test_going_on_from_an_older_checkpoint_trims_all_earlier_attempts(store):
    first = Life(store)
    first.save(10)
    first.save(20)
    second = Life(store)
    second.save(30)
    second.save(40)
    third = Life(store)
    third.save(50)
    back = Life(store)
    back.origin = next(m for m in read_catalog(store).manifests if m.order == (1, 10))
    back.save(11)
    assert there(read_catalog(store).head).lineage == ((1, 10), (4, 11))
    assert orders(store) == [(11, 4), (10, 1)]
    after = Life(store)
    after.save(12)
    assert orders(store) == [(12, 5), (11, 4), (10, 1)]


def test_going_on_from_an_older_checkpoint_of_the_middle_trims_that_attempt_and_later_ones(store):
    first = Life(store)
    first.save(10)
    second = Life(store)
    second.save(20)
    second.save(30)
    third = Life(store)
    third.save(40)
    back = Life(store)
    back.origin = next(m for m in read_catalog(store).manifests if m.order == (2, 20))
    back.save(21)
    assert orders(store) == [(21, 4), (20, 2), (10, 1)]


def test_a_vanished_parent_breaks_nothing(store):
    for step in (10, 20, 30):
        Life(store).save(step)
    for kind in (fmt.manifest_key, fmt.data_key):
        store.delete(kind(20, 2))
    assert orders(store) == [(30, 3), (10, 1)]


def test_within_an_attempt_and_across_attempts_steps_are_ordered_as_numbers(store):
    first = Life(store)
    for step in (9, 10, 100, 99_999_999, 100_000_000):
        first.save(step)
    assert [step for step, _ in orders(store)] == [100_000_000, 99_999_999, 100, 10, 9]
    back = Life(store)
    back.origin = next(m for m in read_catalog(store).manifests if m.step == 9)
    back.save(11)
    assert orders(store) == [(11, 2), (9, 1)], "the newer attempt is newer, whatever its step"


def commit_again(life: Life, step: int) -> None:
    """Another state under the name of one that is committed."""
    with pytest.raises(HarnessError):
        commit(life.store, life.attempt, payload(step, seed=7), About(1, (), {}, "-"))


def test_the_manifest_of_a_step_is_written_once_in_an_attempt(store):
    life = Life(store)
    made = life.save(10)
    before = store.read(made.key)
    commit_again(life, 10)
    assert store.read(made.key) == before


def test_committing_a_step_again_leaves_the_committed_data_as_it_was(store):
    life = Life(store)
    life.save(10)
    commit_again(life, 10)
    loaded = load.load(store, there(read_catalog(store).head))
    assert torch.equal(
        loaded["model_state_dict"]["weight"], payload(10, 1)["model_state_dict"]["weight"]
    )


class Interrupted(ranks.World):
    """Between the writer's listing and the reading that follows it, something else happens once."""

    meanwhile: Callable[[], None]

    def on_writer(self, work, **options):
        result = super().on_writer(work, **options)
        act, self.meanwhile = self.meanwhile, lambda: None
        act()
        return result


def test_what_a_living_attempt_deletes_between_listing_and_reading_means_list_again(store, world):
    """The attempt that is about to be replaced goes on saving, and its retention lets go what was
    listed."""
    alive = Life(store)
    alive.save(10)
    alive.save(20)

    def goes_on() -> None:
        verified = {fmt.stem(step, 1) for step in (10, 20)} | {
            alive.save(step).name for step in (30, 40)
        }
        retention.apply(store, alive.attempt, verified, retention.Policy(last=2, best=0))

    watched = Interrupted(world.rank, world.size, world.device, world.timeout_s)
    watched.meanwhile = goes_on
    resume_point = resume.choose(store, watched)
    assert there(resume_point.manifest).step == 40
    assert resume_point.damaged == [], "nothing of it is damaged"


# --- attempt numbers ---


def test_attempt_numbers_grow_by_one_and_begin_with_one(store):
    assert [Life(store).attempt.number for _ in range(3)] == [1, 2, 3]
    assert len({json.loads(store.read(fmt.attempt_key(n)))["nonce"] for n in (1, 2, 3)}) == 3


@pytest.mark.parametrize(
    "left",
    [
        "attempts/0007.json",
        "attempts/0007.end.json",
        "checkpoints/step_00000010-0007.pt",
        "checkpoints/step_00000010-0007.json",
        "checkpoints/step_00000010-0007.pt.damaged",
        "checkpoints/step_00000010-0007.json.damaged",
    ],
)
def test_an_attempt_number_never_repeats_while_any_name_bears_it(store, left):
    Life(store).save(10)
    store.path(left).write_bytes(b"")
    assert Life(store).attempt.number == 8


def test_attempt_numbers_go_on_beyond_four_digits(store):
    store.path("attempts/9999.json").write_bytes(b"{}")
    life = Life(store)
    assert life.attempt.number == 10_000
    life.save(10)
    Life(store)
    assert read_catalog(store).greatest == 10_001
    with pytest.raises(SupersededError):
        life.save(20)


def test_of_two_racing_claims_one_is_superseded(store):
    found = read_catalog(store)
    winner = attempts.claim(found, None, 1)
    record = store.read(fmt.attempt_key(1))
    with pytest.raises(SupersededError, match="faster"):
        attempts.claim(found, None, 1)
    assert store.read(fmt.attempt_key(1)) == record
    assert attempts.holds(store, winner)
    assert not attempts.holds(store, attempts.Attempt(1, winner.run_id, "another nonce"))
    assert [path.name for path in (store.root / fmt.ATTEMPTS).iterdir()] == ["0001.json"]


RACE = """
import os, sys
from harness.checkpoint import attempts
from harness.checkpoint.catalog import read_catalog
from harness.errors import SupersededError
from harness.store import LocalStore
store, go = LocalStore(sys.argv[1]), os.pipe()
for rival in range(6):
    if os.fork() == 0:
        os.close(go[1])
        found = read_catalog(store)
        os.read(go[0], 1)
        try:
            attempts.claim(found, None, 1)
            os._exit(0)
        except SupersededError:
            os._exit(76)
os.close(go[1])
print(sorted(os.waitstatus_to_exitcode(os.wait()[1]) for _ in range(6)))
"""


def test_of_many_starts_at_once_every_number_has_one_owner(store):
    ran = subprocess.run(
        [sys.executable, "-c", RACE, str(store)],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert ran.returncode == 0, ran.stderr
    codes = json.loads(ran.stdout)
    records = sorted(path.name for path in (store.root / fmt.ATTEMPTS).iterdir())
    assert codes.count(0) == len(records) >= 1 and codes.count(0) + codes.count(76) == 6
    assert records == [f"{number:04d}.json" for number in range(1, len(records) + 1)]


# --- the fence ---


def test_an_old_attempt_is_stopped_before_it_commits_and_leaves_nothing(store):
    old = Life(store)
    old.save(10)
    Life(store)
    before = sorted(path.name for path in store.root.rglob("*"))
    with pytest.raises(SupersededError, match="attempt 2"):
        old.save(20)
    with pytest.raises(SupersededError):
        attempts.check_fence(store, old.attempt)
    assert sorted(path.name for path in store.root.rglob("*")) == before


def test_the_newest_attempt_passes_the_fence(store):
    Life(store)
    attempts.check_fence(store, Life(store).attempt)


def test_the_first_word_about_an_end_stands(store):
    life = Life(store)
    assert life.end("failed", error="the cause")
    assert not life.end("stopped")
    assert read_catalog(store).ends[1]["error"] == "the cause"


# --- rollback and import ---


@pytest.fixture
def grown(store: LocalStore) -> LocalStore:
    """Two attempts: steps 10 and 20, then 30 and 40."""
    first = Life(store)
    first.save(10)
    first.save(20)
    second = Life(store)
    second.save(30)
    second.save(40)
    return store


def test_after_a_rollback_the_next_start_goes_on_from_there(grown, world, capsys):
    files = {path: path.read_bytes() for path in grown.root.rglob("*") if path.is_file()}
    assert cli.main(["rollback", str(grown.root), "20"]) == 0
    assert orders(grown) == [(20, 3), (20, 1), (10, 1)]
    resume_point = resume.choose(grown, world)
    assert there(resume_point.manifest).order == (3, 20)
    assert torch.equal(
        there(resume_point.payload)["model_state_dict"]["weight"],
        payload(20, 1)["model_state_dict"]["weight"],
    )
    assert all(path.read_bytes() == data for path, data in files.items()), (
        "nothing is deleted or changed"
    )
    assert "cut off" in notes(grown, capsys)[fmt.stem(40, 2)]
    life = Life(grown)
    life.save(21)
    assert orders(grown) == [(21, 4), (20, 3), (20, 1), (10, 1)]


def test_a_rollback_stops_a_training_that_is_alive(grown):
    alive = Life(grown)
    assert cli.main(["rollback", str(grown.root), "10"]) == 0
    with pytest.raises(SupersededError):
        alive.save(50)
    assert orders(grown) == [(10, 4), (10, 1)]


def test_a_rollback_is_undone_by_name(grown, world):
    assert cli.main(["rollback", str(grown.root), "10"]) == 0
    assert cli.main(["rollback", str(grown.root), fmt.stem(40, 2)]) == 0
    assert orders(grown) == [(40, 4), (40, 2), (30, 2), (20, 1), (10, 1)]
    resume_point = resume.choose(grown, world)
    assert torch.equal(
        there(resume_point.payload)["model_state_dict"]["weight"],
        payload(40, 2)["model_state_dict"]["weight"],
    )


@pytest.mark.parametrize("end", ["none", "failed", "stopped, not saved", "stopped elsewhere"])
def test_a_rollback_to_the_newest_checkpoint_cuts_off_what_may_lie_elsewhere(grown, end):
    """In the memory of another machine, or in a store that is not listed."""
    details: dict[str, Any] = {
        "failed": {"step": 45},
        "stopped, not saved": {"step": 45, "saved": False, "saved_step": 40},
        "stopped elsewhere": {"step": 50, "saved": True, "saved_step": 50},
    }.get(end, {})
    if details:
        attempts.end(grown, Attempt(2, "", ""), end.partition(",")[0].split()[0], **details)
    assert cli.main(["rollback", str(grown.root), "40"]) == 0
    assert orders(grown) == [(40, 3), (40, 2), (30, 2), (20, 1), (10, 1)]


def test_a_rollback_to_what_is_not_there_or_to_where_it_ended_changes_nothing(grown, capsys):
    attempts.end(grown, Attempt(2, "", ""), "stopped", step=40, saved=True, saved_step=40)
    before = sorted(grown.root.rglob("*"))
    assert cli.main(["rollback", str(grown.root), "25"]) == 78
    assert "40, 30, 20, 10" in capsys.readouterr().err
    assert cli.main(["rollback", str(grown.root), "40"]) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert sorted(grown.root.rglob("*")) == before


def test_a_rollback_to_a_damaged_checkpoint_does_not_move_the_run(grown, world):
    grown.path(fmt.data_key(20, 1)).write_bytes(b"damaged")
    assert cli.main(["rollback", str(grown.root), "20"]) == 1
    assert there(resume.choose(grown, world).manifest).order == (2, 40)


def test_a_finished_run_that_is_rolled_back_is_finished_no_more(store):
    life = Life(store)
    life.save(10)
    life.save(20, final={"epochs": 2, "max_steps": None})
    assert cli.main(["status", str(store.root)]) == 0
    assert cli.main(["rollback", str(store.root), "20"]) == 0
    assert cli.main(["status", str(store.root)]) == 75
    assert orders(store) == [(20, 2), (20, 1), (10, 1)]
    assert there(read_catalog(store).head).final is None


def test_an_import_forks_a_run_of_its_own(grown, world, tmp_path):
    before = {path: path.read_bytes() for path in grown.root.rglob("*") if path.is_file()}
    fork = LocalStore(tmp_path / "fork")
    assert cli.main(["import", str(grown.path(fmt.data_key(20, 1))), str(fork.root)]) == 0
    found = read_catalog(fork)
    assert orders(found) == [(20, 1)] and there(found.head).lineage == ((1, 20),)
    assert found.run_id != read_catalog(grown).run_id and there(found.head).run_id == found.run_id
    assert fork.read(fmt.data_key(20, 1)) == grown.read(fmt.data_key(20, 1))
    assert there(resume.choose(fork, world).manifest).step == 20
    Life(fork).save(21)
    assert orders(fork) == [(21, 2), (20, 1)]
    assert {path: path.read_bytes() for path in grown.root.rglob("*") if path.is_file()} == before
    assert (
        cli.main(
            ["diff", str(fork.path(fmt.data_key(20, 1))), str(grown.path(fmt.data_key(20, 1)))]
        )
        == 0
    )
    assert cli.main(["diff", str(fork.root), str(grown.root)]) == 1


def test_an_import_into_a_run_is_refused(grown, tmp_path):
    other = LocalStore(tmp_path / "other")
    other.prepare(fmt.FOLDERS)
    Life(other)
    before = sorted(other.root.rglob("*"))
    assert cli.main(["import", str(grown.path(fmt.data_key(20, 1))), str(other.root)]) == 78
    assert sorted(other.root.rglob("*")) == before


def test_an_import_of_a_damaged_checkpoint_brings_no_checkpoint(grown, tmp_path):
    grown.path(fmt.data_key(20, 1)).write_bytes(b"damaged")
    assert cli.main(["import", str(grown.path(fmt.data_key(20, 1))), str(tmp_path / "fork")]) == 1
    assert read_catalog(LocalStore(tmp_path / "fork")).manifests == []


# --- how a run stands ---


def status(store: LocalStore, capsys: pytest.CaptureFixture[str]) -> tuple[int, dict]:
    capsys.readouterr()
    code = cli.main(["status", str(store.root), "--json"])
    return code, json.loads(capsys.readouterr().out)


def test_status_tells_finished_continue_failed_and_cannot_tell_apart(store, capsys):
    assert cli.main(["status", str(store.root)]) == 74, "nothing is there"
    assert cli.main(["status", str(store.root / "none")]) == 74
    first = Life(store)
    assert status(store, capsys)[0] == 75, "it has just begun"
    first.save(10)
    assert status(store, capsys)[0] == 75, "it was killed, or is running"
    first.end("failed", error="ValueError: the cause")
    code, said = status(store, capsys)
    assert code == 1 and "the cause" in said["why"]
    second = Life(store)
    assert status(store, capsys)[0] == 75, "a newer attempt has begun since"
    second.end("stopped", step=10, saved=True, saved_step=10, signals=["SIGTERM"])
    code, said = status(store, capsys)
    assert code == 75 and "SIGTERM" in said["why"]
    third = Life(store)
    third.save(20, final={"epochs": 2, "max_steps": None})
    code, said = status(store, capsys)
    assert (code, said["state"], said["step"]) == (0, "finished", 20), (
        "what is committed counts, also without an end record"
    )
    Life(store).end("failed", error="later")
    code, said = status(store, capsys)
    assert code == 1 and "later" in said["why"], "an attempt to extend a finished run failed"


def test_a_store_that_cannot_be_listed_cannot_be_told(tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoints").write_bytes(b"")
    for command in (["status"], ["ls"], ["verify"], ["prune", "--yes"]):
        assert cli.main([command[0], str(tmp_path / "run"), *command[1:]]) == 74
        assert "checkpoints" in capsys.readouterr().err


# --- step 0 ---


def test_an_empty_directory_is_a_fresh_start(store, world, tmp_path):
    assert resume.choose(store, world).manifest is None
    assert resume.choose(LocalStore(tmp_path / "none"), world).manifest is None
    assert not (tmp_path / "none").exists()


def test_attempts_that_died_before_their_first_commit_allow_a_fresh_start(store, world):
    Life(store)
    Life(store).end("failed", error="x", saved_step=None)
    Life(store).end("stopped", step=0, saved=False, saved_step=None)
    store.write(fmt.data_key(10, 1), b"data without a manifest", 1)
    resume_point = resume.choose(store, world)
    assert resume_point.manifest is None
    assert attempts.claim(there(resume_point.catalog), None, 1).number == 4


def drop_checkpoints(store: LocalStore) -> None:
    for path in (store.root / fmt.CHECKPOINTS).iterdir():
        path.unlink()


def test_a_fresh_start_is_refused_after_an_attempt_that_went_on_from_something(store, world):
    Life(store).save(10)
    Life(store)
    drop_checkpoints(store)
    before = sorted(store.root.rglob("*"))
    with pytest.raises(DamagedError, match=r"attempts/0002\.json"):
        resume.choose(store, world)
    assert sorted(store.root.rglob("*")) == before


@pytest.mark.parametrize("record", [b"", b"{", b"[]", b"null", b"\xff", b"{}", bytes(100)])
def test_a_fresh_start_is_refused_if_an_attempt_record_cannot_be_read(store, world, record):
    Life(store)
    store.path(fmt.attempt_key(1)).write_bytes(record)
    with pytest.raises(DamagedError, match=r"attempts/0001\.json"):
        resume.choose(store, world)


def test_a_fresh_start_is_refused_after_an_attempt_that_ended_with_something_saved(store, world):
    life = Life(store)
    life.save(10)
    life.end("stopped", step=10, saved=True, saved_step=10)
    drop_checkpoints(store)
    with pytest.raises(DamagedError, match=r"attempts/0001\.end\.json"):
        resume.choose(store, world)


@pytest.mark.parametrize(
    "name", ["step_00000010-0001.pt.damaged", "step_00000010-0001.json.damaged"]
)
def test_a_fresh_start_is_refused_if_something_is_set_aside(store, world, name):
    store.path(f"{fmt.CHECKPOINTS}/{name}").write_bytes(b"")
    with pytest.raises(DamagedError, match="set aside"):
        resume.choose(store, world)


def test_a_fresh_start_is_refused_if_a_manifest_is_there_that_cannot_be_read(store, world):
    store.path(fmt.manifest_key(10, 1)).write_bytes(b"")
    with pytest.raises(DamagedError, match=fmt.stem(10, 1)):
        resume.choose(store, world)


# --- checkpoints of another run ---


def test_checkpoints_of_another_run_are_ignored_loudly(store, world, tmp_path, capsys):
    other = LocalStore(tmp_path / "other")
    other.prepare(fmt.FOLDERS)
    for _ in range(3):
        Life(other).save(90)
    Life(store).save(10)
    for key in (fmt.manifest_key(90, 3), fmt.data_key(90, 3)):
        shutil.copy(other.path(key), store.path(key))
    found = read_catalog(store)
    assert found.strangers == [fmt.manifest_key(90, 3)]
    assert orders(found) == [(10, 1)]
    resume_point = resume.choose(store, world)
    assert there(resume_point.manifest).step == 10 and resume_point.damaged == []
    assert any(fmt.stem(90, 3) in note and "not of this run" in note for note in resume_point.notes)
    assert cli.main(["verify", str(store.root)]) == 1
    assert fmt.stem(90, 3) in capsys.readouterr().out
    cli.main(["ls", str(store.root)])
    assert "of another run" in capsys.readouterr().out
    life = Life(store)
    assert life.attempt.number == 4, "its name counts, so that no key is written twice"
    assert life.attempt.run_id == found.run_id


def test_only_checkpoints_of_another_run_are_no_fresh_start(store, world, tmp_path):
    other = LocalStore(tmp_path / "other")
    other.prepare(fmt.FOLDERS)
    Life(other).save(90)
    Life(store)
    for key in (fmt.manifest_key(90, 1), fmt.data_key(90, 1)):
        shutil.copy(other.path(key), store.path(key))
    with pytest.raises(DamagedError, match=fmt.stem(90, 1)):
        resume.choose(store, world)


def test_a_run_whose_attempt_records_are_lost_is_still_the_run_of_its_checkpoints(store, world):
    Life(store).save(10)
    shutil.rmtree(store.root / fmt.ATTEMPTS)
    store.prepare(fmt.FOLDERS)
    assert there(resume.choose(store, world).manifest).step == 10
    assert Life(store).attempt.run_id == read_catalog(store).manifests[0].run_id


# --- prune ---


def test_prune_only_speaks_without_yes_and_deletes_with_it(grown, capsys):
    Life(grown).save(50)
    before = sorted(grown.root.rglob("*"))
    assert cli.main(["prune", str(grown.root), "--keep-last", "2", "--keep-best", "0"]) == 0
    assert "nothing was deleted" in capsys.readouterr().out
    assert sorted(grown.root.rglob("*")) == before
    assert (
        cli.main(["prune", str(grown.root), "--keep-last", "2", "--keep-best", "0", "--yes"]) == 0
    )
    assert orders(grown) == [(50, 3), (40, 2)]
    assert len(list((grown.root / fmt.CHECKPOINTS).iterdir())) == 4
    assert (
        cli.main(["prune", str(grown.root), "--keep-last", "2", "--keep-best", "0", "--yes"]) == 0
    )
    assert "nothing to delete" in capsys.readouterr().out


@pytest.mark.parametrize(
    "given", ["--keep-last 0", "--keep-last -1", "--keep-best -1", "--keep-every-steps 0"]
)
def test_prune_refuses_a_number_that_no_run_may_have(grown, capsys, given):
    before = sorted(grown.root.rglob("*"))
    assert cli.main(["prune", str(grown.root), *given.split(), "--yes"]) == 78
    assert (
        f"found: {given.split()[0].strip('-').replace('-', '_')}={given.split()[1]},"
        " expected: a whole number" in capsys.readouterr().err
    )
    assert sorted(grown.root.rglob("*")) == before


def test_prune_deletes_what_rollbacks_cut_off_and_crashes_left_and_keeps_what_may_still_be_written(
    grown,
):
    assert cli.main(["rollback", str(grown.root), "20"]) == 0
    left = {
        "checkpoints/step_00000050-0002.pt": False,
        "checkpoints/step_00000050-0003.pt": True,
        "checkpoints/step_00000050-0003.pt.tmp-0003-0f": True,
        "attempts/0002.json.tmp-0002-0f": False,
        "events/0001.jsonl": True,
        "checkpoints/notes.txt": True,
    }
    for key in left:
        grown.path(key).write_bytes(b"x")
    end = grown.path("attempts/0003.end.json")
    elsewhere = end.rename(grown.root / "elsewhere")  # as of an attempt that still runs
    assert cli.main(["prune", str(grown.root), "--keep-last", "3", "--yes"]) == 0
    assert [(m.step, m.attempt) for m in read_catalog(grown).manifests] == [
        (10, 1),
        (20, 1),
        (20, 3),
    ]
    assert {key: grown.exists(key) for key in left} == left
    elsewhere.rename(end)
    assert cli.main(["prune", str(grown.root), "--keep-last", "3", "--yes"]) == 0
    assert [key for key in left if grown.exists(key)] == [
        "events/0001.jsonl",
        "checkpoints/notes.txt",
    ]


def test_prune_keeps_what_is_set_aside_unless_told(grown, capsys):
    resume.set_aside(grown, fmt.manifest_key(30, 2))
    assert cli.main(["prune", str(grown.root), "--yes"]) == 0
    assert len(read_catalog(grown).set_aside) == 2
    assert cli.main(["prune", str(grown.root), "--yes", "--set-aside"]) == 0
    assert read_catalog(grown).set_aside == []


def test_prune_lets_no_damaged_checkpoint_take_the_place_of_a_good_one(grown):
    for step, attempt in ((40, 2), (30, 2)):
        grown.path(fmt.data_key(step, attempt)).write_bytes(b"damaged")
    assert (
        cli.main(["prune", str(grown.root), "--keep-last", "1", "--keep-best", "0", "--yes"]) == 0
    )
    assert orders(grown) == [(40, 2), (30, 2), (20, 1), (10, 1)]


def test_prune_keeps_what_was_cut_off_while_nothing_better_loads(grown):
    """Nothing good is deleted before something better is committed: here the good ones are those
    that a rollback left."""
    assert cli.main(["rollback", str(grown.root), "10"]) == 0
    for attempt in (1, 3):
        grown.path(fmt.data_key(10, attempt)).write_bytes(b"damaged")
    assert cli.main(["prune", str(grown.root), "--yes"]) == 0
    good = [m.order for m in read_catalog(grown).manifests if m.step != 10]
    assert len(good) >= 2, "they were the only checkpoints left that load"
    load.load(grown, read_catalog(grown).manifests[1])


def test_prune_obeys_the_settings_of_the_newest_checkpoint_and_not_what_a_zombie_wrote_beside_it(
    grown,
):
    life = Life(grown)
    life.save(
        50, config={"checkpoint": {"keep_last": 2, "keep_every_steps": 10, "best": "val_loss:min"}}
    )
    grown.write("config.yaml", b"checkpoint:\n  keep_last: 1\n", 1)
    assert cli.main(["prune", str(grown.root), "--yes"]) == 0
    assert [step for step, _ in orders(grown)] == [50, 40, 30, 20, 10]
    life.save(55, config={"checkpoint": {"keep_last": 2, "keep_best": 1, "best": "val_loss:max"}})
    assert cli.main(["prune", str(grown.root), "--yes"]) == 0
    assert [step for step, _ in orders(grown)] == [55, 50, 10]
