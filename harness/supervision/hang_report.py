"""Report where each rank of an attempt hangs, on one page whose first sentence is the summary."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.checkpoint import attempts
from harness.checkpoint.attempts import Attempt
from harness.errors import StorageError
from harness.store import Store
from harness.supervision import attempt_history
from harness.text import now

FOLDER = "hangs"
OTHERS_S, LOOK_S = 3.0, 0.2  # limit and interval, in seconds, of the wait for other ranks
# A rank whose innermost frame is in one of these files waits for other ranks.
COLLECTIVES = (
    "torch/distributed",
    "torch/nn/parallel/distributed.py",
    "torch/autograd",
    "harness/distributed/ranks.py",
)
LIBRARIES = (
    "/torch/",
    f"{Path(__file__).resolve().parents[1]}/",
    "/site-packages/",
    "/lib/python",
    "<frozen",
)
# Most bytes of one rank's hang event, so that the report can read those of all ranks.
RANK_BYTES = 1 << 14
CUT = "(the beginning is cut off)\n"
FRAME = re.compile(r'^  File "(?P<file>[^"]+)", line (?P<line>\d+), in (?P<function>.+)$')


@dataclass(frozen=True)
class Place:
    """Where a rank hangs: the innermost line of the user's code; whether it waits for others."""

    description: str
    waits: bool


def place(stacks: str) -> Place:
    """Find where a rank hangs in its stacks, from that of the main thread, which comes last."""
    frames = [match for line in stacks.splitlines() if (match := FRAME.match(line))]
    if not frames:
        return Place("an unknown place", False)
    own = [match for match in frames if not any(part in match["file"] for part in LIBRARIES)]
    match = (own or frames)[-1]
    description = f"{match['function']} ({match['file'].rpartition('/')[2]}:{match['line']})"
    return Place(description, any(part in frames[-1]["file"] for part in COLLECTIVES))


def sentence(hangs: Sequence[dict[str, Any]], world_size: int) -> str:
    """Summarise which ranks are stuck, which wait for others, and which have left no hang event.

    `hangs` are the hang events of the ranks that could still write one.
    """
    places = {int(event["rank"]): place(str(event.get("stacks", ""))) for event in hangs}
    stuck = {rank: location for rank, location in places.items() if not location.waits}
    waiting = [rank for rank, location in places.items() if location.waits]
    silent = [rank for rank in range(world_size) if rank not in places]
    parts = [
        f"rank {rank} is stuck in {location.description}"
        for rank, location in sorted(stuck.items())
    ]
    if silent:
        parts.append(f"{_ranks(silent)} said nothing: stopped, dead, or busy outside of Python")
    if waiting and (stuck or silent):
        parts.append(f"{_ranks(waiting)} waited for the others")
    elif waiting:
        parts += [
            f"rank {rank} waits for the others in {places[rank].description}"
            for rank in sorted(waiting)
        ]
    return "; ".join(parts)


def page(hangs: Sequence[dict[str, Any]], world_size: int) -> str:
    """Return the text of the report.

    After the summary sentence, each rank that left an event has its step, the work that exceeded
    its time limit, its last collective if that is known, and the stacks of all its threads.
    """
    parts = [sentence(hangs, world_size) + "."]
    for event in sorted(hangs, key=lambda event: int(event["rank"])):
        last = f"\nlast collective: {event['collective']}" if event.get("collective") else ""
        parts.append(
            f"--- rank {event['rank']}, step {event['step']}: "
            f"{event['error']}{last}\n\n{event['stacks']}"
        )
    return "\n\n".join(parts) + "\n"


def tell(store: Store, attempt: Attempt, world_size: int) -> str:
    """Write the report to one store, as `hangs/0003.txt`, and return its summary sentence.

    The report is written as soon as every rank has left a hang event, or after `OTHERS_S` seconds.
    Every rank that hangs writes this report, so it is enough that one of them can.

    Args:
        store: Store that holds the events and receives the report.
        attempt: Attempt that hangs.
        world_size: Number of ranks.

    Raises:
        StorageError: The store fails.
    """
    until = time.monotonic() + OTHERS_S
    most_bytes = attempt_history.TAIL_BYTES + RANK_BYTES * world_size
    while True:
        hangs = [
            event
            for event in attempt_history.events([store], attempt.number, most_bytes)
            if event.get("event") == "hang" and event.get("rank") is not None
        ]
        events = {
            event["rank"]: event for event in hangs if {"step", "error", "stacks"} <= event.keys()
        }
        if len(events) >= world_size or time.monotonic() > until:
            break
        time.sleep(LOOK_S)
    reported = list(events.values())
    store.prepare((FOLDER,))
    store.write(
        f"{FOLDER}/{attempt.number:04d}.txt", page(reported, world_size).encode(), attempt.number
    )
    return sentence(reported, world_size)


def report(
    stores: Sequence[Store], attempt: Attempt, world_size: int, patience_s: float
) -> tuple[str, str]:
    """Write the report to every store that accepts it.

    A local store on another node's disk, which does not hold the attempt, has no events of it and
    receives no report.

    Args:
        stores: Stores of the run.
        attempt: Attempt that hangs.
        world_size: Number of ranks.
        patience_s: Retry limit of each request to a remote store in seconds.

    Returns:
        The summary sentence from the last of these stores, and the path or URL of the report in the
        first; empty texts if no store receives the report.
    """
    summary = where = ""
    for store in stores:
        try:
            if store.is_local and not attempts.holds(store, attempt):
                continue
            summary = tell(store.with_retry_limit(patience_s), attempt, world_size) or summary
            where = where or store.where(f"{FOLDER}/{attempt.number:04d}.txt")
        except StorageError:
            continue
    return summary, where


def line(rank: int, step: int | None, error: str, stacks: str, collective: str) -> bytes:
    """Return the hang event of a rank, as one line of JSON of at most `RANK_BYTES`.

    Args:
        rank: Rank that hangs.
        step: Its current step.
        error: Work that exceeded its time limit, in words.
        stacks: Stacks of all threads, the main thread's last. The beginning is cut off if they are
            too long.
        collective: Its last collective, or "" if that is unknown.
    """
    event = {"event": "hang", "time": now(), "rank": rank, "step": step, "error": error[:500]}
    event |= {"collective": collective[:500]} if collective else {}
    while True:
        encoded = (json.dumps(event | {"stacks": stacks}) + "\n").encode()
        excess = len(encoded) - RANK_BYTES
        if excess <= 0:
            return encoded
        # A character has at most twelve bytes in JSON.
        stacks = CUT + stacks.removeprefix(CUT)[excess // 12 + 1 :]


def _ranks(ranks: Sequence[int]) -> str:
    listed = ", ".join(map(str, sorted(ranks)))
    return f"rank {listed}" if len(ranks) == 1 else f"ranks {listed}"
