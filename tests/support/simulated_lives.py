"""Lives of a run in a simulated cluster: each chooses, claims, trains, saves, uploads and ends, or
dies. All of it is the program's own code, above `os` and the client of the bucket."""

from __future__ import annotations

import contextlib
import dataclasses
import random
import secrets
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any
from unittest import mock

import torch
from simulated_bucket import Bucket, BucketClient
from simulated_checks import BEGIN, ELEMENTS, RUN, Ledger, after, metric
from simulated_disk import Disk, SimulatedPath, System
from simulator import Pool, Process, Simulator, Threading, Time

from harness import retry
from harness.arguments import Settings
from harness.checkpoint import format as fmt
from harness.checkpoint import known, resume, retention
from harness.checkpoint.attempts import Attempt
from harness.distributed import ranks, words
from harness.distributed.layout import Box, Layout
from harness.distributed.parts import PARTS, Part, TakenParts, Wanted
from harness.errors import HarnessError, LostRankError, SupersededError
from harness.monitoring import event_log
from harness.monitoring.goodput import Goodput
from harness.monitoring.store_health import StoreHealth
from harness.saving import checkpointer, current_attempt, locations, uploader
from harness.saving.checkpointer import Checkpointer
from harness.saving.claim import claim
from harness.saving.current_attempt import Parts
from harness.selfcheck.recomputed import RecomputedSteps
from harness.sharding import rank_save, resume_shards, shard_uploads
from harness.sharding.sharded_save import ShardedSave
from harness.state import Captured
from harness.state.plain_values import TensorRefs
from harness.store import LocalStore, Store, folders, local, remote, remote_sink
from harness.store.remote import RemoteStore
from harness.supervision.exit_record import ExitRecord

PATH = "model_state_dict/weight"


@dataclasses.dataclass
class Machine:
    """A computer. Its disk is its own, or that of a file server."""

    disk: Disk


@dataclasses.dataclass
class Setting:
    """What one seed tries."""

    has_disk: bool
    has_bucket: bool
    ranks: int
    is_sharded: bool
    policy: retention.Policy
    remote_policy: retention.Policy


class Cluster:
    """The machines, the bucket, and what the lives have told their users."""

    def __init__(self, simulator: Simulator, setting: Setting) -> None:
        self.simulator, self.setting = simulator, setting
        self.system, self.bucket = System(simulator), Bucket(simulator)
        self.ledger = Ledger(self.bucket)
        self.lives = list[Life]()

    def stores(self) -> tuple[Store, ...]:
        """The stores, as one process opens them."""
        stores = list[Store]()
        if self.setting.has_disk:
            store = LocalStore(RUN)
            store.root = SimulatedPath(RUN)
            stores.append(store)
        if self.setting.has_bucket:
            stores.append(RemoteStore("s3://bucket/run", BucketClient(self.bucket), 20.0))
        return tuple(stores)


class Words:
    """The TCP store of one attempt."""

    def __init__(self, simulator: Simulator) -> None:
        self._simulator, self._values = simulator, dict[str, Any]()

    def set(self, key: str, value: str) -> None:
        self._simulator.call(f"tell {key}")
        self._values[key] = value

    def get(self, key: str) -> str:
        return str(self._values[key])

    def check(self, keys: list[str]) -> bool:
        return all(key in self._values for key in keys)

    def add(self, key: str, count: int) -> int:
        self._values[key] = self._values.get(key, 0) + count
        return int(self._values[key])

    def delete_key(self, key: str) -> None:
        self._values.pop(key, None)


class World(ranks.World):
    """The ranks of one life. Those of a collective whose peer is dead or frozen lose it."""

    def __init__(self, life: Life, rank: int) -> None:
        super().__init__(rank, life.ranks, torch.device("cpu"), 10.0, life, life.words)
        self._gathers = 0

    def gather(self, value: Any) -> list[Any]:
        if self.size == 1:
            return [value]
        self._gathers += 1
        life: Life = self._group
        values = life.gathered.setdefault(self._gathers, {})
        values[self.rank] = value
        simulator = life.cluster.simulator
        simulator.call("gather")

        def is_over() -> bool:
            lacking = (life.processes[rank] for rank in range(self.size) if rank not in values)
            return len(values) == self.size or any(process.is_dead for process in lacking)

        simulator.wait(is_over, self.timeout_s)
        if len(values) < self.size:
            raise LostRankError("another rank of this attempt is lost", "in a collective")
        return [values[rank] for rank in range(self.size)]

    def agree(self, values: list[int]) -> list[int]:
        return [max(column) for column in zip(*self.gather(values), strict=True)]


class Quiet(ExitRecord):
    """Records an end, and leaves the hooks of the test's own process alone."""

    def take_hook(self) -> None:
        pass


class NoSteps(RecomputedSteps):
    """No records of single steps."""

    def begin(self, event_log: Any, until: int) -> None:
        pass


class SavesInSight(Checkpointer):
    """The checkpointer as it is where states cannot be copied: training waits for each save. What
    looks at the real machine is left out."""

    def __init__(self, parts: Parts, sharded: ShardedSave | None) -> None:
        with mock.patch.object(current_attempt, "Environment"):
            super().__init__(parts)
        self.environment = mock.Mock(collect=dict)
        self.recomputed = NoSteps(parts.world, parts.settings, lambda: None, [])
        self.background.is_unable, self.sharded = True, sharded

    def _claim(self, progress: Any, environment: dict[str, Any]) -> Attempt:
        catalog = self._resume_point.catalog
        assert catalog is not None
        settings, size = self.settings, self.world.size
        attempt = claim(self.stores, self._resume_point, size, settings, progress.say)
        self._listen(attempt, catalog)
        return attempt


class Life:
    """One attempt: a process for each rank, on one machine."""

    def __init__(self, cluster: Cluster, machine: Machine, steps: int, every: int) -> None:
        self.cluster, self.machine, self.steps, self.every = cluster, machine, steps, every
        self.number = len(cluster.lives) + 1
        setting, simulator = cluster.setting, cluster.simulator
        self.ranks, self.words = setting.ranks, Words(simulator)
        self.gathered = dict[int, dict[int, Any]]()
        self.attempt = 0
        self.lineage: tuple[tuple[int, int], ...] = ()
        self.good = set[tuple[int, int]]()  # (attempt, step) of what it has read or written
        self.ends = dict[int, str]()  # by rank: how it ended
        self.checkpointer: SavesInSight | None = None  # of rank 0
        self.processes = [
            Process(simulator, f"life {self.number}.{rank}", machine) for rank in range(self.ranks)
        ]
        cluster.lives.append(self)

    def start(self) -> None:
        for rank, process in enumerate(self.processes):
            self.cluster.simulator.spawn(process, "", partial(self._main, rank))

    @property
    def is_over(self) -> bool:
        return all(process.is_dead for process in self.processes)

    @property
    def place(self) -> Disk | Bucket:
        """Where its checkpoints are committed."""
        return self.machine.disk if self.cluster.setting.has_disk else self.cluster.bucket

    def kill(self) -> None:
        for process in self.processes:
            process.kill()

    def freeze(self, seconds: float) -> None:
        for process in self.processes:
            process.freeze(seconds)

    def _main(self, rank: int) -> None:
        record = Quiet()
        record.watch(())
        try:
            self._live(rank, record)
            self.ends[rank] = "finished"
        except HarnessError as error:
            self.cluster.simulator.note(f"ends: {type(error).__name__}: {error}")
            self.ends[rank] = f"{type(error).__name__}: {error}"
            if isinstance(error, SupersededError) and self.attempt:
                self.cluster.ledger.check_superseded(self)
            why = "superseded" if isinstance(error, SupersededError) else "failed"
            record.record(why, record._stores, error=str(error))
        self.processes[rank].kill()  # with all its threads
        # The launcher ends the others, if they do not come to their end.
        self.cluster.simulator.at(self.cluster.simulator.now + 40, self._kill_running)

    def _kill_running(self) -> None:
        for process in self.processes:
            if self.cluster.simulator.now >= process.frozen_until:
                process.kill()

    def _live(self, rank: int, record: ExitRecord) -> None:
        cluster, world = self.cluster, World(self, rank)
        stores, setting, ledger = cluster.stores(), cluster.setting, cluster.ledger
        least, others = ledger.least(self), len(ledger.claims)
        point = resume.choose(stores, world, add_parts=resume_shards.add_parts)
        step, state = 0, BEGIN
        if point.manifest is not None and point.payload is not None:
            step, state = point.manifest.step, self._state_of(point.payload)
            if setting.is_sharded:
                own = point.payload["rng"][rank]
                assert own == [step, rank], f"rank {rank} of step {step} gets {own} as its own"
        if world.is_writer:
            is_alone = len(ledger.claims) == others
            ledger.check_chosen(self, point.manifest, least if is_alone else None, state)
        settings = Settings(
            policy=setting.policy, remote_policy=setting.remote_policy, wait_s=20.0, rehearse=False
        )
        clock = Time(cluster.simulator).monotonic
        health = StoreHealth("the bucket", lambda text: None, clock)
        parts = Parts(stores, world, point, settings, record, health, Goodput(clock), clock)
        sharded = ShardedSave(world, stores, {}) if setting.is_sharded else None
        own = SavesInSight(parts, sharded)
        if world.is_writer:
            self.checkpointer = own
        least = ledger.least(self)
        attempt = own.begin(mock.Mock(say=cluster.simulator.note), lambda: None)
        if world.is_writer:
            self.attempt = attempt.number
            ledger.claimed(self, point, least)
        try:
            for _ in range(self.steps):
                step += 1
                cluster.simulator.wait(limit_s=cluster.simulator.random.uniform(0.1, 2.0))
                state = after(state, attempt.number, step)
                is_due = step % self.every == 0 or bool(world.is_writer and own.is_due(1e9))
                if world.agree([int(is_due)])[0]:
                    self._save(own, step, state)
            own.end("stopped", lambda: None, step=step)
        finally:
            own.close()

    def _save(self, own: SavesInSight, step: int, state: bytes) -> None:
        world, ledger = own.world, self.cluster.ledger
        is_late = world.is_writer and ledger.is_superseded(self)
        about = partial(own.about, {}, {"val_loss": metric(step)}, None)
        is_saved = own.save(
            lambda: self._captured(world, step, state), about, lambda: None, wait=True
        )
        if not world.is_writer:
            return
        self.cluster.simulator.note(f"step {step} is {'saved' if is_saved else 'NOT saved'}")
        if is_saved:
            ledger.committed(self, step, is_late=is_late)
        if own._uploader and self.cluster.simulator.chance(0.3) and not own._settle(20.0):
            ledger.settled(self, step if is_saved else None)

    def _state_of(self, payload: Mapping[str, Any]) -> bytes:
        weight = payload["model_state_dict"]["weight"]
        if PARTS in payload:
            weight = torch.empty(ELEMENTS, dtype=torch.uint8)
            payload[PARTS].fill([Wanted(PATH, Box((0,), (ELEMENTS,)), weight)])
        if (found := bytes(weight.tolist()).hex()) != payload["history"]:
            raise AssertionError(f"parts of two states: {found}, {payload['history']}")
        return bytes(weight.tolist())

    def _captured(self, world: ranks.World, step: int, state: bytes) -> Captured:
        whole = torch.tensor(list(state), dtype=torch.uint8)
        payload = {"model_state_dict": {"weight": whole}, "step": step, "epoch": 0}
        payload |= {"loss": 1.0, "metrics": {}, "config": {}, "history": state.hex()}
        if not self.cluster.setting.is_sharded:
            return Captured(payload | {"format_version": 1}, set(), {}, {})
        layout = Layout((world.size,), tuple(range(world.size)), (("shard", 0),))
        box, standing = layout.box(world.rank, (ELEMENTS,)), whole.to("meta")
        own = whole[box.begin[0] : box.begin[0] + box.size[0]].clone()
        parts = TakenParts()
        parts.take(PATH, Part(own, layout, (ELEMENTS,), standing))
        tensors = {PATH: [0, [["shard", 0]]]}
        names = {"data_ranks": [*range(world.size)], "own": [], "has_iterators": False}
        payload |= {"format_version": fmt.SHARDED, "model_state_dict": {"weight": standing}}
        payload |= {"data": {}, "ranks": names}
        payload["layout"] = {"meshes": [list(range(world.size))], "tensors": tensors}
        for_itself = {"rng": [step, world.rank], "iterator": None}
        return Captured(payload, set(), {}, {}, TensorRefs(parts), for_itself)


@contextlib.contextmanager
def simulated(simulator: Simulator, system: System) -> Iterator[None]:
    """Give the program the time, the threads, the disk and the random names of the simulator."""
    time, threads, names = Time(simulator), Threading(simulator), random.Random(0)
    SimulatedPath.system = system

    retrying = partial(retry.retrying, clock=time.monotonic, sleep=time.sleep)

    def token_hex(size_bytes: int = 32) -> str:
        return names.randbytes(size_bytes).hex()

    with contextlib.ExitStack() as stack:
        patch = lambda *what: stack.enter_context(mock.patch.object(*what))  # noqa: E731
        for module in (retry, words, ranks, uploader, shard_uploads, rank_save, locations):
            patch(module, "time", time)
        for module in (checkpointer, current_attempt, event_log, local):
            patch(module, "time", time)
        for module in (words, uploader, shard_uploads, rank_save):
            patch(module, "threading", threads)
        for module in (known, remote, remote_sink):
            patch(module, "ThreadPoolExecutor", Pool)
        for module in (local, folders):
            patch(module, "os", system)
        patch(secrets, "token_hex", token_hex)
        patch(retry, "JITTER", random.Random(0))
        # How often a wait looks whether to give up: less often, as each look takes real time.
        patch(retry, "SLICE_S", 5.0)
        patch(shard_uploads, "LOOK_S", 1.0)
        patch(remote, "retrying", retrying)
        patch(uploader.Uploader.__init__, "__defaults__", (None, time.monotonic))
        yield
