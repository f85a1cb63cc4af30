"""Killed anywhere and started again on other machines, over a bad network: the run in the bucket is
the uninterrupted one, bit for bit."""

from __future__ import annotations

import random
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from conftest import alone, kill_tree, run, start, torchrun
from fault_proxy import FaultProxy, Request
from remote_runs import (
    STEPS,
    TASK,
    Home,
    Trained,
    differing,
    fetched_bytes,
    losses,
    trained,  # noqa: F401 - a fixture
)
from s3_server import S3Server

FAULTS = (
    "500",
    "503",
    "reset_before",
    "drop_response",
    "reset_body",
    "truncate",
    "flip_put",
    "delay",
)
HOW = ("task.args.sleep_s=0.04", "checkpoint.every_steps=3", "checkpoint.keep_last=2")
Place = tuple[str | None, bool]  # a directory, or none; whether it is emptied before the start


@dataclass(frozen=True)
class Storm:
    """Where the run is started, one after another, all but the last time to be killed."""

    ranks: int
    seed: int
    places: tuple[Place, ...]
    startup_share: float = 0.0


def killed_and_moved(home: Home, plan: Storm, tmp_path: Path, proxy: FaultProxy) -> int:
    """Returns how many attempts went on from the bucket's copy; what each one went on from must be
    the newest that there was."""
    chance, log, fetched = random.Random(plan.seed), tmp_path / "log", 0
    for number, (name, emptied) in enumerate(plan.places, 1):
        directory = tmp_path / name if name else None
        if emptied and directory:
            shutil.rmtree(directory, ignore_errors=True)
        newest, before = home.head(), len(home.attempts())
        proxy.clear()
        with log.open("a") as output:
            settings = (*TASK, *HOW, f"run.dir={directory or 'null'}", f"run.remote={home.url}")
            process = start(torchrun(plan.ranks, *settings), env=home.env(proxy), output=output)
        try:
            if number < len(plan.places):
                _kill_at_random(process.pid, process.poll, home, chance, plan)
            else:
                assert process.wait(timeout=240) == 0, log.read_text()[-5000:]
        finally:
            kill_tree(process.pid)
            process.wait()
        if len(home.attempts()) > before:
            fetched += _check_origin(home, newest, proxy, must_fetch=emptied or directory is None)
    return fetched


def _check_origin(home: Home, newest: tuple[int, int], proxy: FaultProxy, must_fetch: bool) -> bool:
    """That the newest attempt went on from what was newest, and that its bytes have left the bucket
    once, or never."""
    origin = home.attempts()[max(home.attempts())]["from"]
    went_on_from = (origin["attempt"], origin["step"]) if origin else (0, 0)
    assert went_on_from >= newest, f"went on from {went_on_from}, but {newest} was there"
    if went_on_from == (0, 0):
        return False
    requests = [
        r
        for r in proxy.requests
        if r.method == "GET" and f"step_{origin['step']:08d}-{origin['attempt']:04d}.pt" in r.path
    ]
    ranges = sorted(r.headers["range"] for r in requests)
    assert len(set(ranges)) == len(ranges), f"fetched more than once: {ranges}"
    assert ranges or not must_fetch
    return bool(ranges)


def _kill_at_random(
    pid: int, ended: Callable[[], object], home: Home, chance: random.Random, plan: Storm
) -> None:
    """After some uploads, each of which is followed by a segment of events, and a moment; sometimes
    during start-up."""

    def heard() -> int:
        return sum(key.startswith("events/") for key in set(home.keys()))

    if chance.random() < plan.startup_share:
        until, needed = time.monotonic() + chance.uniform(0.5, 9), 10**9
    else:
        until, needed = time.monotonic() + 120, heard() + chance.randint(2, 5)
    while ended() is None and time.monotonic() < until and heard() < needed:
        time.sleep(0.03)
    time.sleep(chance.uniform(0, 0.25))
    kill_tree(pid)


STORMS = [
    pytest.param(Storm(2, 1, (("a", False), ("a", True), (None, False))), id="2-ranks"),
    pytest.param(
        Storm(
            2,
            2,
            (
                ("a", False),
                ("b", False),
                ("a", False),
                (None, False),
                ("b", False),
                ("a", True),
                ("a", False),
                ("c", False),
            ),
            0.25,
        ),
        id="2-ranks-long",
        marks=pytest.mark.slow,
    ),
    pytest.param(
        Storm(3, 3, (("a", False), ("a", True), (None, False), ("b", False)), 0.0),
        id="3-ranks",
        marks=pytest.mark.slow,
    ),
    pytest.param(Storm(2, 4, ((None, False),) * 5), id="no-directory", marks=pytest.mark.slow),
]


@pytest.mark.slow
@pytest.mark.parametrize("plan", STORMS)
def test_killed_and_started_elsewhere_the_run_in_the_bucket_equals_the_uninterrupted_one(
    plan: Storm,
    trained: Trained,  # noqa: F811
    bucket: tuple[S3Server, str],
    tmp_path: Path,
) -> None:
    home, whole = Home(*bucket), trained.home
    if plan.ranks != 2:  # another number of ranks has other last bits
        whole = Home(*bucket, "whole")
        done = run(
            torchrun(plan.ranks, *TASK, "run.dir=null", f"run.remote={whole.url}"), env=home.env()
        )
        assert done.returncode == 0, done.stdout + done.stderr
    with FaultProxy(home.server.host, home.server.port) as proxy:
        fetched = killed_and_moved(home, plan, tmp_path, proxy)
    assert fetched >= 1, "no start took anything from the bucket"
    assert sorted(home.attempts()) == list(range(1, len(home.attempts()) + 1))
    home.check_none_is_torn()
    assert differing(whole, home) == []
    found, expected = losses(home), losses(whole)
    assert found.items() <= expected.items() and STEPS in found
    last = max(event["step"] for event in home.events("begun"))
    assert set(range(last + 1, STEPS + 1)) <= found.keys()


@pytest.mark.parametrize(
    ("where", "seed", "rate"),
    [
        pytest.param("null", 5, 0.12, id="no-directory", marks=pytest.mark.slow),
        pytest.param("here", 6, 0.2, id="directory", marks=pytest.mark.slow),
        pytest.param("null", 7, 0.2, id="no-directory-worse", marks=pytest.mark.slow),
    ],
)
def test_in_a_storm_of_faults_nothing_is_lost_or_torn_and_people_read_few_lines(
    where: str, seed: int, rate: float, bucket: tuple[S3Server, str], tmp_path: Path
) -> None:
    home, calm = Home(*bucket), Home(*bucket, "calm")
    directory = "null" if where == "null" else str(tmp_path / where)
    settings = (
        *TASK,
        "train.epochs=4",
        "checkpoint.every_steps=1",
        "checkpoint.keep_last=2",
        f"run.remote={home.url}",
    )
    assert (
        run(
            alone(*TASK, "train.epochs=4", "run.dir=null", f"run.remote={calm.url}"), env=home.env()
        ).returncode
        == 0
    )
    with FaultProxy(home.server.host, home.server.port) as proxy:
        proxy.storm(seed, rate, FAULTS, longest_delay_s=0.2)
        outputs = []
        for steps in (12, 20):  # the second start restores through the storm
            # from a directory what is overtaken is not uploaded
            pace = f"task.args.sleep_s={0.02 if where == 'null' else 0.6}"
            done = run(
                alone(*settings, f"run.dir={directory}", f"train.max_steps={steps}", pace),
                env=home.env(proxy),
            )
            assert done.returncode == 0, done.stdout + done.stderr
            outputs.append(done.stdout + done.stderr)
        struck = [request for request in proxy.requests if request.fault not in (None, "delay")]
        asked = len(proxy.requests)
    assert asked > 200 and len(struck) > 15, (asked, len(struck))
    home.check_none_is_torn()
    assert "resumes from step 12" in outputs[1]
    assert home.steps()[-1] == 20 and differing(calm, home) == []
    assert losses(home) == losses(calm)
    assert sum("warning" in line for line in "".join(outputs).splitlines()) <= 4, outputs
    told = home.events("retry")
    assert all({"what", "tries", "wait_s", "error"} <= event.keys() for event in told)
    told += [
        event
        for kind in ("not_uploaded", "not_saved", "not_deleted")
        for event in home.events(kind)
    ]
    failed = failed_while_events_are_kept(proxy.requests)
    assert len(told) >= 0.9 * len(failed), f"{len(told)} of {len(failed)} failures are told of"
    assert where != "null" or fetched_bytes(proxy, "step_00000012-0001.pt") >= 1


def failed_while_events_are_kept(requests: list[Request]) -> list[Request]:
    """What was answered with an error, from where an attempt has its ledger to where that is sent
    the last time. (A connection that is reset is not counted: aiohttp itself asks once more where
    it took an old connection up again.)"""
    found: list[Request] = []
    seen: list[Request] = []
    listening = False
    for request in requests:
        if request.path.endswith("/config.yaml") and request.status == 200:
            listening, seen = True, []
        if request.path.endswith(".end.json"):
            listening = False
        if listening and request.fault and (request.status or 0) >= 400:
            seen.append(request)
        if listening and "/events/" in request.path and request.status == 200:
            found, seen = found + seen, []
    return found
