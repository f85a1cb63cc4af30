"""One seed: what is tried, in which order lives begin and what befalls them, and what must hold."""

from __future__ import annotations

import random
from collections.abc import Callable

from simulated_bucket import Bucket
from simulated_checks import Place, expected, files_of, manifests_of
from simulated_disk import Disk
from simulated_lives import Cluster, Life, Machine, Setting, simulated
from simulator import Process, Simulator

from harness.checkpoint.retention import Policy

PATIENCE_S = 100_000.0  # after which a life must have come to its end
POSSIBLE = {  # of the shapes of a run: (disk, bucket, ranks, sharded)
    "a disk": (True, False, 1, False),
    "a disk and a bucket": (True, True, 1, False),
    "a bucket": (False, True, 1, False),
    "shards on a disk": (True, False, 3, True),
    "shards on a disk and in a bucket": (True, True, 2, True),
    "shards in a bucket": (False, True, 2, True),
}


class Simulation:
    """A run of a few lives under one seed."""

    def __init__(self, seed: int, shape: str | None = None) -> None:
        self.simulator, self.random = Simulator(seed), random.Random(f"plan {seed}")
        self.shape = shape or self.random.choice(list(POSSIBLE))
        every = self.random.choice([None, None, 6])
        policies = (
            Policy(last=2, best=self.random.choice([0, 1])),
            Policy(last=2, best=self.random.choice([0, 1]), every_steps=every),
        )
        self.cluster = Cluster(self.simulator, Setting(*POSSIBLE[self.shape], *policies))
        self.ledger = self.cluster.ledger
        self.disks = [Disk(0)]
        self.machine = Machine(self.disks[0])

    def run(self) -> list[str]:
        """Run it, and return the trace. Raises SimulationError."""
        director = Process(self.simulator, "director", None)
        self.simulator.note(f"{self.shape}: {self.cluster.setting}")
        with simulated(self.simulator, self.cluster.system):
            self.simulator.run(director, self._direct)
        return self.simulator.trace

    # --- what happens ---

    def _direct(self) -> None:
        for _ in range(self.random.randrange(2, 6)):
            life = self._begin(self.random.randrange(4, 12), self.random.choice([1, 2, 3]))
            self._plan(life)
            # Perhaps the next one begins before this one is over, or has claimed.
            limit_s = self.random.choice([PATIENCE_S, self.random.uniform(0, 60), 0.02])
            if self.random.random() < 0.7:  # else the start has its share of faults, too
                self._set_faults(0.0)
                self._wait_for(life, limit_s, until_claim=True)
            self._set_faults(1.0)
            self._wait_for(life, limit_s)
            self.ledger.check_places(self._places())
            self._between()
        self._end()

    def _begin(self, steps: int, every: int) -> Life:
        life = Life(self.cluster, self.machine, steps, every)
        self.simulator.note(f"life {life.number} begins on disk {self.machine.disk.number}")
        life.start()
        return life

    def _wait_for(self, life: Life, limit_s: float, *, until_claim: bool = False) -> None:
        """Wait until a life is over, or frozen; or has claimed its attempt."""

        def is_enough() -> bool:
            return life.is_over or _is_frozen(life) or (until_claim and life.attempt > 0)

        self.simulator.wait(is_enough, limit_s)

    def _set_faults(self, share: float) -> None:
        """Draw how often disk and bucket fail."""
        system, bucket, draw = self.cluster.system, self.cluster.bucket, self.random.choice
        system.refused = share * draw([0, 0, 0.002, 0.01])
        bucket.refused = share * draw([0, 0, 0.02, 0.2])
        bucket.unheard = share * draw([0, 0, 0.05, 0.2])
        bucket.late = share * draw([0, 0, 0.05, 0.2])
        if self.random.random() < 0.15 * share:
            bucket.away_until = self.simulator.now + self.random.uniform(1, 200)

    def _plan(self, life: Life) -> None:
        """Draw what befalls a life, and in which call of which rank."""
        victim = self.random.choice(life.processes)
        most = self.random.choice([20, 60, 400, 400])
        seconds = self.random.choice([5.0, 60.0, 3000.0])
        machine = life.machine
        befalls: list[Callable[[], object]] = [
            life.kill,
            lambda: self._kill_one(life, victim),
            lambda: life.freeze(seconds),
            lambda: victim.freeze(seconds),
            lambda: self._power_loss(machine),
        ]
        if self.random.random() < 0.85:
            what = self.random.choice(befalls)
            victim.due[self.random.randrange(1, most)] = what

    def _kill_one(self, life: Life, victim: Process) -> None:
        victim.kill()
        later = self.simulator.now + self.simulator.random.uniform(0, 30)
        self.simulator.at(later, life._kill_running)

    def _power_loss(self, machine: Machine) -> None:
        self.simulator.note(f"power loss of disk {machine.disk.number}")
        for life in self.cluster.lives:
            if life.machine.disk is machine.disk:
                life.kill()
        machine.disk.crash(self.simulator)

    def _between(self) -> None:
        setting, chance = self.cluster.setting, self.random.random
        if setting.has_disk and setting.has_bucket and chance() < 0.4:
            self._move()
        elif chance() < 0.6 and all(life.is_over for life in self.cluster.lives):
            self._damage()

    def _move(self) -> None:
        """Go on with another disk: an older one, or a new one, perhaps as this one is lost."""
        if len(self.disks) > 1 and self.random.random() < 0.5:
            self.machine = Machine(self.disks[0])
            return
        if self.random.random() < 0.5:
            self._power_loss(self.machine)
            self.disks.remove(self.machine.disk)
        self.disks.append(Disk(len(self.cluster.lives)))
        self.machine = Machine(self.disks[-1])

    def _damage(self) -> None:
        """Flip a bit of a checkpoint that is not the only one that is whole."""
        place = self.random.choice(self._places())
        files, known = files_of(place), [p.order for p in self.ledger.promises]
        good = [o for o in manifests_of(files) if (id(place), o) not in self.ledger.damaged]
        if len(good) < 3 or self.ledger.damaged:
            return
        order = self.random.choice([*good[:-1], *good[-2:]])
        names = [f["name"] for f in manifests_of(files)[order]["files"]]
        key = f"checkpoints/{self.random.choice(names)}"
        self.simulator.note(f"damage: {key} (promised: {order in known})")
        data = bytearray(files[key])
        at = self._of_state(data, manifests_of(files)[order])
        data[at] ^= 1
        self.ledger.damaged.add((id(place), order))
        if isinstance(place, Bucket):
            place.objects[key] = bytes(data)
        else:
            file = place.file(f"/sim/run/{key}")
            file.data, file.durable = data, bytes(data)

    def _of_state(self, data: bytearray, manifest: dict) -> int:
        """The offset of a byte of the state in a file: of a tensor, which no parser checks."""
        state = expected(manifest["lineage"])
        for length in (32, 16, 11, 10):
            for start in range(0, 32, length):
                if (at := data.find(state[start : start + length])) >= 0:
                    return at + self.random.randrange(length // 2)
        return self.random.randrange(len(data))

    def _places(self) -> list[Place]:
        setting = self.cluster.setting
        disks: list[Place] = list(self.disks) if setting.has_disk else []
        return disks + ([self.cluster.bucket] if setting.has_bucket else [])

    # --- how it ends ---

    def _end(self) -> None:
        """All that goes wrong ends, and then one more life must do all that is promised."""
        system, bucket = self.cluster.system, self.cluster.bucket
        system.refused = bucket.refused = bucket.unheard = bucket.late = 0.0
        bucket.away_until = 0.0

        def is_quiet() -> bool:
            return all(life.is_over for life in self.cluster.lives) and not bucket.pending

        assert self.simulator.wait(is_quiet, PATIENCE_S), "a life does not come to its end"
        self.ledger.check_places(self._places())
        last = self._begin(5, 2)
        promised = self.ledger.least(last)
        assert self.simulator.wait(lambda: last.is_over, PATIENCE_S), "the last life hangs"
        if promised is None and "not starting from step 0" in last.ends.get(0, ""):
            return  # what was promised is lost with a disk: said, and not begun anew
        for rank, end in sorted(last.ends.items()):
            assert end == "finished", f"without a fault rank {rank} ends: {end}"
        self.ledger.check_places(self._places())
        for place in {id(p): p for p in (last.machine.disk, bucket)}.values():
            if place in self._places():
                newest = max(manifests_of(files_of(place)), default=None)
                assert newest is not None and newest[0] == last.attempt, (
                    f"the newest of the last life is not there: {newest}"
                )
                self.ledger.check_clean(place, last.attempt)


def _is_frozen(life: Life) -> bool:
    now = life.cluster.simulator.now
    return any(now < process.frozen_until for process in life.processes)
