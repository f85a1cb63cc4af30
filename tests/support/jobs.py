"""A supervisor that stands in for SLURM."""

from __future__ import annotations

from typing import Any

import pytest
from remote_lives import Life

from harness.checkpoint import attempts
from harness.checkpoint.catalog import read_catalog
from harness.store import Store
from harness.supervision import launches
from harness.supervision.restart_policy import Failure, Outcome, failures, outcome, verdict

FINAL = {"epochs": 30, "max_steps": None}  # as the defaults say


class Job:
    """A supervisor, as a SLURM job is one: it leaves the records that the program's own functions
    make."""

    def __init__(self, name: str, *stores: Store) -> None:
        self.name, self.stores, self.count = name, stores, 0

    @property
    def launch(self) -> str:
        return f"{self.name}.{self.count - 1}"

    def begin(self, **details: Any) -> Job:
        self.count += 1
        launches.begin(self.stores, self.launch, read_catalog(*self.stores), **details)
        return self

    def attempt(
        self, *steps: int, why: str | None = None, final: bool = False, **details: Any
    ) -> Life:
        """One attempt of the present launch, which commits these steps, and ends so; without `why`
        no end is recorded."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv(launches.ENVIRONMENT, self.launch)
            life = Life(*self.stores)
        for step in steps:
            (life.copied if len(self.stores) > 1 else life.save)(
                step, FINAL if final and step == steps[-1] else None
            )
        if why:
            for store in self.stores:
                attempts.end(store, life.attempt, why, **details)
        return life

    def end(self, why: str = "ended", **details: Any) -> Job:
        for store in self.stores:
            launches.end(store, self.launch, why, **details)
        return self

    def fails(
        self, *steps: int, step: int | None = None, error: str = "ValueError: no", **details: Any
    ) -> Job:
        """A whole launch, whose one attempt commits these steps and then fails."""
        self.begin()
        self.attempt(*steps, why="failed", error=error, step=step, rank=0, **details)
        return self.end(code=1)

    def stops(self, *steps: int, **details: Any) -> Job:
        """A whole launch, whose one attempt commits these steps and is then stopped with all
        saved."""
        self.begin()
        self.attempt(*steps, why="stopped", saved=True, step=max(steps, default=0), **details)
        return self.end(code=0)

    def dies(self, *steps: int) -> Job:
        """A whole launch, whose one attempt is killed, and the launch outlives it."""
        self.begin()
        self.attempt(*steps)
        return self.end(code=137)

    @property
    def failures(self) -> list[Failure]:
        return failures(read_catalog(*self.stores), launches.read(self.stores), self.name)

    @property
    def verdict(self) -> Outcome:
        return verdict(read_catalog(*self.stores), launches.read(self.stores), self.launch)[0]

    @property
    def outcome(self) -> Outcome:
        return outcome(read_catalog(*self.stores), launches.read(self.stores))
