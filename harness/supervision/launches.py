"""Launches: what a supervisor (a SLURM job, `harness launch`) starts, each recorded in the run's stores.

    launches/1234.0.json       created before anything is started: how far the run had ever come, what died since
    launches/1234.0.failed.json   the first error, of a rank or of a node's launcher, where no attempt can tell it
    launches/1234.0.end.json   how it ended, in its supervisor's view: stopped from outside, ended, or failed

The part before the last dot names the supervisor, the number counts what it has started. One launch may hold several attempts, if
torchrun restarts in place, or none, if it dies before training begins.
"""

from __future__ import annotations

import json
import os
import re
import socket
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from harness.checkpoint import records
from harness.checkpoint.attempts import first_word, now
from harness.checkpoint.catalog import Catalog
from harness.errors import UsageError
from harness.store import Store

LAUNCHES = "launches"
LAUNCH_NAME = re.compile(r"^launches/(?P<name>[0-9A-Za-z_-]+\.[0-9]+)(?P<end>\.end|\.failed)?\.json\Z")
SUBMITTED = "run.json"  # that the run was submitted: without it, and without anything else, a job stands before an empty disk
ENVIRONMENT = "HARNESS_LAUNCH"
REDIRECT = "HARNESS_REDIRECT"  # the folder in which a run lives under `harness drill`, whatever its program says
SUPERVISED = "HARNESS_RUN"  # where the supervisor of this process looks for its run


@dataclass(frozen=True)
class Launch:
    """One start by a supervisor."""

    name: str
    record: dict[str, Any] = field(default_factory=dict)
    end: dict[str, Any] | None = None
    failure: dict[str, Any] | None = None  # what a rank, or a node's launcher, has said of it

    @property
    def supervisor(self) -> str:
        return self.name.rpartition(".")[0]

    @property
    def number(self) -> int:
        return int(self.name.rpartition(".")[2])

    @property
    def greatest(self) -> int:
        """The greatest attempt when it began."""
        return int(self.record.get("greatest", 0))


def own() -> str | None:
    """The launch that this process belongs to, or None without a supervisor."""
    return os.environ.get(ENVIRONMENT)


def key(name: str) -> str:
    return f"{LAUNCHES}/{name}.json"


def is_name(text: str | None) -> bool:
    """Whether this can be a launch's name."""
    match = LAUNCH_NAME.match(key(text or ""))
    return match is not None and not match["end"]


def begin(stores: Iterable[Store], name: str, found: Catalog, **details: Any) -> None:
    """Record a launch before anything is started. Raises StorageError."""
    record = {"launch": name, "reached": found.reached, "greatest": found.greatest, "host": socket.gethostname(), "time": now()}
    for store in stores:
        store.prepare((LAUNCHES,))
        first_word(store, key(name), record | details)


def end(store: Store, name: str, why: str, **details: Any) -> bool:
    """Record how a launch ended; the first word stands. Returns whether it was ours. Raises StorageError."""
    return first_word(store, f"{LAUNCHES}/{name}.end.json", {"why": why, "time": now()} | details)


def failed(store: Store, name: str, **details: Any) -> bool:
    """Record what a launch fails of, if it is one of this store; the first word stands. Returns whether it was ours. Raises
    StorageError."""
    return store.exists(key(name)) and first_word(store, f"{LAUNCHES}/{name}.failed.json", {"why": "failed", "time": now()} | details)


def supervise(directory: str | None, remote: str | None) -> None:
    """Let the processes that are started from here know which run is being supervised."""
    os.environ[SUPERVISED] = json.dumps(_spelled(directory, remote))


def _spelled(directory: str | Path | None, remote: str | None) -> list[str | None]:
    return [str(Path(directory).expanduser().absolute()) if directory is not None else None, remote.rstrip("/") if remote else None]


def check_supervised(directory: str | Path | None, remote: str | None) -> None:
    """Raises UsageError if a supervisor watches over another run than the one that is begun here."""
    here, told = _spelled(directory, remote), json.loads(os.environ.get(SUPERVISED, "null"))
    if told is not None and told != here and REDIRECT not in os.environ:  # there the program does not say where
        raise UsageError(
            "the launcher supervises another run than this program's",
            f"found: harness.init({here[0]!r}, remote={here[1]!r}), expected: run.dir={told[0]} run.remote={told[1]}",
            "Name the same places to harness.init and on the command line.",
        )


def attempts_of(found: Catalog, name: str) -> dict[int, dict[str, Any]]:
    """The attempts that a launch has made, by number."""
    return {number: record for number, record in found.attempts.items() if record.get("launch") == name}


def read(stores: Sequence[Store]) -> list[Launch]:
    """All launches of a run, in the order of their numbers. Raises StorageError."""
    begun: dict[str, dict[str, Any]] = {}
    ends: dict[str, dict[str, Any]] = {}
    failures: dict[str, dict[str, Any]] = {}
    kinds = {None: begun, ".end": ends, ".failed": failures}
    for store in stores:
        for entry in store.entries(LAUNCHES):
            match = LAUNCH_NAME.match(entry.key)
            if match is None:
                continue
            try:
                content = records.parse(store.read_once(entry.key))
            except FileNotFoundError:
                content = {}
            kinds[match["end"]].setdefault(match["name"], content)
    found = []
    for name in begun.keys() | ends.keys() | failures.keys():
        end, failure = ends.get(name), failures.get(name) or None
        if failure and (end is None or end.get("why") != "stopped"):  # what breaks while it is stopped is no failure
            end = failure
        found.append(Launch(name, begun.get(name, {}), end, failure))
    return sorted(found, key=lambda launch: (launch.greatest, launch.supervisor, launch.number))


def steps_back(store: Store) -> bool:
    """Whether this process's launch is the last that its supervisor makes: then the newest checkpoint, which may verify and still
    kill whoever loads it, is not the one to go on from. Raises StorageError."""
    name = own()
    if name is None:
        return False
    try:
        return bool(records.parse(store.read(key(name))).get("steps_back"))
    except FileNotFoundError:
        return False
