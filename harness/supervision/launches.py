"""Record launches in the run's stores: each start of the training by a supervisor.

A supervisor is a SLURM job or `harness launch`.

    launches/1234.0.json          Created before any process is started: the greatest step that the
                                  run has reached, and the failures since then.
    launches/1234.0.failed.json   The first error of a rank or of a node's launcher, if no attempt
                                  can record it.
    launches/1234.0.end.json      How the launch ended, as its supervisor sees it: stopped from
                                  outside, ended, or failed.

In a launch's name, the part before the last dot is the supervisor, and the number after it counts
the launches of that supervisor. A launch has several attempts if torchrun restarts in place, and
none if it dies before training begins.
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
from harness.checkpoint.attempts import first_word
from harness.checkpoint.catalog import Catalog
from harness.checkpoint.format import Manifest
from harness.checkpoint.known import read_files
from harness.errors import UsageError
from harness.store import Store, expanded
from harness.text import now

LAUNCHES = "launches"
LAUNCH_NAME = re.compile(
    r"^launches/(?P<name>[0-9A-Za-z_-]+\.[0-9]+)(?P<end>\.end|\.failed)?\.json\Z"
)
# Marks a run as submitted. If it is missing, a submitted job has the wrong disk or an empty one.
SUBMITTED = "run.json"
ENVIRONMENT = "HARNESS_LAUNCH"  # variable with the name of the launch
OF_LAUNCH = "launch-"  # beginning of the name of `harness launch` as a supervisor
# Variable with the folder of the run's stores under `harness drill`, in place of the program's own.
REDIRECT = "HARNESS_REDIRECT"
# Variable with the stores in which the supervisor of this process looks for the run.
SUPERVISED = "HARNESS_RUN"


@dataclass(frozen=True)
class Launch:
    """One start of the training by a supervisor."""

    name: str
    record: dict[str, Any] = field(default_factory=dict)
    end: dict[str, Any] | None = None
    failure: dict[str, Any] | None = None  # error record of a rank or of a node's launcher

    @property
    def supervisor(self) -> str:
        """Return the name of the supervisor."""
        return self.name.rpartition(".")[0]

    @property
    def number(self) -> int:
        """Return the number of the launch among those of its supervisor."""
        return int(self.name.rpartition(".")[2])

    @property
    def is_of_launch(self) -> bool:
        """Return whether the supervisor is `harness launch`, which no queue starts again."""
        return self.name.startswith(OF_LAUNCH)

    @property
    def has_ended_well(self) -> bool:
        """Return whether all its processes have ended by themselves, with exit code 0."""
        end = self.end or {}
        return end.get("why") == "ended" and end.get("code") == 0

    @property
    def greatest(self) -> int:
        """Return the number of the run's greatest attempt when the launch began."""
        return int(self.record.get("greatest", 0))


def own() -> str | None:
    """Return the name of the launch that this process belongs to, or None without a supervisor."""
    return os.environ.get(ENVIRONMENT)


def key(name: str) -> str:
    """Return the key of a launch's record."""
    return f"{LAUNCHES}/{name}.json"


def is_name(text: str | None) -> bool:
    """Return whether a text is a valid name of a launch."""
    match = LAUNCH_NAME.match(key(text or ""))
    return match is not None and not match["end"]


def begin(stores: Iterable[Store], name: str, catalog: Catalog, **details: Any) -> None:
    """Record a launch in each store, before any process is started.

    Args:
        stores: Stores of the run.
        name: Name of the launch.
        catalog: Catalog of the stores.
        details: Additional fields of the record.

    Raises:
        StorageError: A store fails.
    """
    record = {
        "launch": name,
        "reached": catalog.reached,
        "greatest": catalog.greatest,
        "host": socket.gethostname(),
        "time": now(),
    }
    for store in stores:
        store.prepare((LAUNCHES,))
        first_word(store, key(name), record | details)


def end(store: Store, name: str, why: str, **details: Any) -> bool:
    """Record how a launch ended. The first record stays; later ones are ignored.

    Args:
        store: Store that receives the record.
        name: Name of the launch.
        why: "stopped", "ended" or "failed".
        details: Additional fields of the record.

    Returns:
        True if this call has created the record.

    Raises:
        StorageError: The store fails.
    """
    return first_word(store, f"{LAUNCHES}/{name}.end.json", {"why": why, "time": now()} | details)


def failed(store: Store, name: str, **details: Any) -> bool:
    """Record the error of a launch, if the store has the launch's own record.

    The first error record stays; later ones are ignored.

    Returns:
        True if this call has created the error record.

    Raises:
        StorageError: The store fails.
    """
    return store.exists(key(name)) and first_word(
        store, f"{LAUNCHES}/{name}.failed.json", {"why": "failed", "time": now()} | details
    )


def supervise(directory: str | None, remote: str | None) -> None:
    """Set the environment variable by which child processes know the supervised run.

    `check_supervised` compares it with the run that a child process begins.
    """
    os.environ[SUPERVISED] = json.dumps(_spelled(directory, remote))


def _spelled(directory: str | Path | None, remote: str | None) -> list[str | None]:
    """Return the run's directory and URL in a form that can be compared."""
    return [
        str(expanded(directory)) if directory is not None else None,
        remote.rstrip("/") if remote else None,
    ]


def check_supervised(directory: str | Path | None, remote: str | None) -> None:
    """Raise UsageError if this process's supervisor supervises another run than this one."""
    here, supervised = _spelled(directory, remote), json.loads(os.environ.get(SUPERVISED, "null"))
    # Under `harness drill` the stores are redirected, so the program's arguments do not count.
    if supervised is not None and supervised != here and REDIRECT not in os.environ:
        raise UsageError(
            "the launcher supervises another run than this program's",
            f"found: harness.init({here[0]!r}, remote={here[1]!r}), "
            f"expected: run.dir={supervised[0]} run.remote={supervised[1]}",
            "Name the same places to harness.init and on the command line.",
        )


def attempts_of(catalog: Catalog, name: str) -> dict[int, dict[str, Any]]:
    """Return the attempts of a launch: number -> record."""
    return {
        number: record
        for number, record in catalog.attempts.items()
        if record.get("launch") == name
    }


def read(stores: Sequence[Store]) -> list[Launch]:
    """Read all launches of a run, sorted by the run's greatest attempt when they began.

    Launches that began at the same attempt are sorted by supervisor, then by number. If a launch
    has an error record and was not stopped from outside, the error record is its `end`, too. If two
    stores have a record under the same name, that of the first store is used.

    Raises:
        StorageError: A store cannot be listed or read.
    """
    begun: dict[str, dict[str, Any]] = {}
    ends: dict[str, dict[str, Any]] = {}
    failures: dict[str, dict[str, Any]] = {}
    kinds = {None: begun, ".end": ends, ".failed": failures}
    for store in stores:
        names = [LAUNCH_NAME.match(entry.key) for entry in store.entries(LAUNCHES)]
        matches = {match.string: match for match in names if match}
        contents = dict(read_files(store, list(matches)))
        for key, match in matches.items():
            content = records.parse(contents.get(key, b""))
            kinds[match["end"]].setdefault(match["name"], content)
    launches = []
    for name in begun.keys() | ends.keys() | failures.keys():
        end, failure = ends.get(name), failures.get(name) or None
        # An error that is a consequence of the stop is no failure.
        if failure and (end is None or end.get("why") != "stopped"):
            end = failure
        launches.append(Launch(name, begun.get(name, {}), end, failure))
    return sorted(launches, key=lambda launch: (launch.greatest, launch.supervisor, launch.number))


def steps_back(store: Store, catalog: Catalog, newest: Manifest) -> bool:
    """Return whether this process's launch must resume from an older checkpoint than the newest.

    It must if one more failure makes its supervisor give up, and an attempt of this supervisor has
    died that had resumed from the newest: it may pass the verification and still crash every
    process that loads it. Failures before an attempt, as of an import or a rendezvous, do not count
    against a checkpoint.

    Args:
        store: Store with the records of launches.
        catalog: Catalog of the run's stores.
        newest: The checkpoint that would be chosen else.

    Raises:
        StorageError: The store fails.
    """
    name = own()
    if name is None:
        return False
    origin = {"attempt": newest.attempt, "step": newest.step}
    has_died = any(
        record.get("from") == origin
        and str(record.get("launch")).rpartition(".")[0] == name.rpartition(".")[0]
        and catalog.ends.get(number, {}).get("why", "failed") == "failed"
        for number, record in catalog.attempts.items()
    )
    try:
        return has_died and bool(records.parse(store.read(key(name))).get("steps_back"))
    except FileNotFoundError:
        return False
