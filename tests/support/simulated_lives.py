"""Lives of a sharded run in a simulation: each begins as a start does, trains, saves, uploads and
deletes with the package's own code, and ends or dies."""

from __future__ import annotations

import contextlib
import pickle
import random
from collections.abc import Iterator, Mapping
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from simulation import Bucket, Disk, Messages, Process, Simulation

from harness.arguments import Settings
from harness.checkpoint import commit, fresh_start, known, replicate, resume, retention
from harness.checkpoint import format as fmt
from harness.checkpoint.attempts import Attempt
from harness.checkpoint.catalog import going_on_from
from harness.checkpoint.commit import About
from harness.checkpoint.format import DataFile, Manifest
from harness.distributed import ranks, words
from harness.distributed.layout import SHARD, Box, Layout
from harness.distributed.parts import PARTS, Part, Wanted, described
from harness.distributed.ranks import World
from harness.distributed.words import Words
from harness.errors import DamagedError, LostRankError, SaveError, StorageError
from harness.saving import claim
from harness.sharding import resume_shards, shards
from harness.sharding.rank_save import RankSave, Target
from harness.store import Store, remote
from harness.store.remote import RemoteStore

PATH, LENGTH = "model_state_dict/w", 12
COLLECTIVE_S = 120.0  # after which a collective is given up
POLICY = retention.Policy(last=2, best=0)


def _write(content: dict[str, Any], sink: Any) -> None:
    torch.save(content, sink)


def expected(step: int) -> torch.Tensor:
    """What the model of every life holds at a step."""
    return torch.arange(LENGTH) * 1000 + step


class Heartbeats(Words):
    """Messages whose heartbeats need no thread: they go on while the process answers."""

    def __init__(self, life: Life, timeout_s: float = 5.0) -> None:
        super().__init__(life.messages, timeout_s)
        self._life = life

    @contextlib.contextmanager
    def beating(self, *hearts: str) -> Iterator[None]:
        """Note that the heartbeats continue."""
        beating = self._life.beating
        beating += hearts
        try:
            yield
        finally:
            for heart in hearts:
                beating.remove(heart)

    def beats(self, heart: str) -> int:
        """Return a number that grows while the rank lives."""
        if heart.endswith("/heard"):
            return super().beats(heart)
        simulation, name = self._life.simulation, heart.rpartition("/")[2]
        process = self._life.group[int(name) if name.isdigit() else 0]
        is_beating = heart in self._life.beating and simulation.is_answering(process)
        return int(simulation.now * 10) if is_beating else -1


class Ranks(World):
    """The ranks of a life, which have messages alone."""

    def __init__(self, life: Life, rank: int) -> None:
        super().__init__(rank, life.size, torch.device("cpu"), 5.0)
        self._life, self._gathered = life, 0

    @property
    def words(self) -> Words:
        """Return the messages between the ranks."""
        return Heartbeats(self._life)

    def gather(self, value: Any) -> list[Any]:
        """Return every rank's value."""
        if self.size == 1:
            return [value]
        self._gathered += 1
        key, words = f"gather/{self._gathered}", Heartbeats(self._life, COLLECTIVE_S)
        words.tell(f"{key}/{self.rank}", pickle.dumps(value).hex())

        def heard(rank: int) -> Any:
            text = words.receive(f"{key}/{rank}", "", f"rank {rank}", lambda: False)
            return pickle.loads(bytes.fromhex(text))

        return [heard(rank) for rank in range(self.size)]


class Life:
    """One life of the run.

    Args:
        run: the run.
        number: of the life, for the trace.
        size: the number of ranks.
        steps: how many it makes.
    """

    def __init__(self, run: Run, number: int, size: int, steps: int) -> None:
        self.run, self.number, self.size, self.steps = run, number, size, steps
        self.simulation, self.messages = run.simulation, Messages(run.simulation)
        self.group, self.beating = list[Process](), list[str]()
        self.known = max(run.reported, default=(0, 0))  # what a start of now must find
        for rank in range(size):
            name = f"life {number} rank {rank}"
            self.simulation.spawn(Process(name, self.group, partial(self._live, rank)))

    @property
    def is_over(self) -> bool:
        return all(process.is_over for process in self.group)

    @property
    def is_frozen(self) -> bool:
        return not any(map(self.simulation.is_answering, self.group))

    def _live(self, rank: int) -> None:
        with contextlib.suppress(LostRankError):
            self._train(Ranks(self, rank))

    def _train(self, world: Ranks) -> None:
        chosen = resume.choose(self.run.stores, world, add_parts=resume_shards.add_parts)
        origin, payload = chosen.manifest, chosen.take_payload()
        if world.is_writer:
            found = origin.order if origin else (0, 0)
            assert found >= self.known, f"{found} is chosen, {self.known} was reported"
        if origin is not None and payload is not None:
            self._check_content(world, origin, payload)

        def claimed() -> list[Any]:
            attempt = claim.claim(
                self.run.stores, chosen, world.size, Settings(), lambda text: None
            )
            return [attempt.number, attempt.run_id, attempt.nonce]

        attempt = Attempt(*world.on_writer(claimed))
        first = origin.step + 1 if origin else 1
        for step in range(first, first + self.steps):
            world.on_each(lambda: None)
            self._save(world, attempt, origin, step, step - first)

    def _check_content(self, world: Ranks, origin: Manifest, payload: Mapping[str, Any]) -> None:
        found = torch.zeros(LENGTH, dtype=torch.int64)
        payload[PARTS].fill([Wanted(PATH, Box((0,), (LENGTH,)), found)])
        assert torch.equal(found, expected(origin.step)), f"{origin.name} holds {found}"
        if world.size == len(origin.shards):
            own = {"step": origin.step, "rank": world.rank}
            assert payload["rng"][world.rank] == own, f"{payload['rng']} on rank {world.rank}"

    def _save(
        self, world: Ranks, attempt: Attempt, origin: Manifest | None, step: int, number: int
    ) -> None:
        layout = Layout((world.size,), tuple(range(world.size)), ((SHARD, 0),))
        standing = torch.empty(LENGTH, dtype=torch.int64, device="meta")
        box = layout.box(world.rank, (LENGTH,))
        local = expected(step)[box.begin[0] : box.begin[0] + box.size[0]].clone()
        parts = {PATH: Part(local, layout, (LENGTH,), standing)}
        own = {"rng": {"step": step, "rank": world.rank}, "iterator": None, "life": self.number}
        captured: Any = SimpleNamespace(parts=parts, own=own)
        content = shards.content(step, world.rank, captured)
        disk = self.run.stores[0]
        committer: Any = (
            Committer(self.run, attempt, origin, step, parts) if world.is_writer else None
        )
        save = RankSave(
            number, step, world, Target(disk, False, None), attempt, committer, lambda: False
        )
        save.begun()
        save.decide(is_on=True)
        save.write(partial(_write, content), lambda: None)
        save.end()


class Committer:
    """What the writer does with a save: commit, report, delete and upload."""

    def __init__(
        self,
        run: Run,
        attempt: Attempt,
        origin: Manifest | None,
        step: int,
        parts: Mapping[str, Part],
    ) -> None:
        self.run, self.attempt, self.origin, self.step, self.parts = (
            run,
            attempt,
            origin,
            step,
            parts,
        )

    def not_saved(self, problem: str) -> str:
        return problem

    def commit(self, files: tuple[DataFile, ...], costs: object) -> tuple[str, bool]:
        size = len(files)
        names = {"data_ranks": [*range(size)], "own": ["life"], "has_iterators": False}
        payload = {
            "format_version": fmt.SHARDED,
            "step": self.step,
            "epoch": 0,
            "loss": None,
            "metrics": {},
            "config": {},
            "data": {},
            "ranks": names,
            "model_state_dict": {"w": self.parts[PATH].standing},
            "layout": described(self.parts),
        }
        about = About(size, going_on_from(self.origin), {}, "", shards=files)
        disk, *others = self.run.stores
        try:
            manifest = commit.commit(disk, self.attempt, payload, about)
        except SaveError as error:
            return str(error), False
        self.run.reported.append(manifest.order)
        self.run.verified.add(manifest.name)
        with contextlib.suppress(StorageError):
            retention.apply(disk, self.attempt, self.run.verified, POLICY)
        for bucket in others:
            with contextlib.suppress(StorageError, DamagedError):
                replicate.replicate(disk, manifest, bucket, self.attempt)
                self.run.uploaded.append(manifest.order)
                retention.apply(bucket, self.attempt, self.run.verified, POLICY)
        return "", False


class Run:
    """A run on a simulated disk, and in a simulated bucket where there is one."""

    def __init__(self, simulation: Simulation, has_bucket: bool) -> None:
        self.simulation = simulation
        self.disk, self.bucket = Disk("/simulated/run", simulation), Bucket(simulation)
        client: Any = self.bucket  # it has no uploads in parts
        remote_store = RemoteStore("s3://simulated/run", client, 0.0)
        self.stores: tuple[Store, ...] = (self.disk, remote_store) if has_bucket else (self.disk,)
        self.reported, self.uploaded = list[tuple[int, int]](), list[tuple[int, int]]()
        self.verified, self.damaged = set[str](), set[str]()

    def damage(self, rng: random.Random) -> None:
        """Change a byte of a file on the disk, if the bucket has the checkpoint whole."""
        last = max(self.reported, default=None)
        if last is None or last not in self.uploaded:
            return
        stem = fmt.stem(last[1], last[0])
        prefix = f"{fmt.CHECKPOINTS}/{stem}"
        keys = [key for key in self.disk.files if key.startswith(prefix) and key.endswith(".pt")]
        key = rng.choice(sorted(keys))
        data = bytearray(self.disk.files[key])
        # Where a shard has a number of the model, else anywhere.
        number = rng.choice(expected(last[1]).tolist()[1:]).to_bytes(8, "little")
        at = data.find(number) if number in data else rng.randrange(len(data))
        data[at] ^= 0xFF
        self.disk.files[key] = bytes(data)
        self.damaged.add(stem)


def in_simulated_time(simulation: Simulation, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let ranks wait for one another in the time of the simulation; one request at a time."""
    clock = SimpleNamespace(sleep=simulation.sleep, monotonic=simulation.monotonic)
    monkeypatch.setattr(words, "time", clock)
    monkeypatch.setattr(ranks, "time", clock)
    monkeypatch.setattr(remote, "DELETED_AT_ONCE", 1)
    monkeypatch.setattr(remote, "READ_AHEAD", 1)
    monkeypatch.setattr(known, "READERS", 1)
    monkeypatch.setattr(fresh_start, "check_fresh_start", lambda *given: None)
