"""The writer dies, or the server refuses, at every single request of a life: the bucket still holds
the last committed checkpoint.

A life begins on a bucket whose newest checkpoint is damaged, so it passes that one over and marks
it, claims its attempt, saves three steps of which the last is final, lets old ones go, and ends. A
proxy counts its requests and strikes at the n-th one.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from conftest import wait_until
from fault_proxy import FaultProxy, Rule
from remote_lives import Born, Life, Nursery, payload, shared_nursery
from s3_server import S3Server
from there import there

from harness.checkpoint import attempts, load, resume
from harness.checkpoint import format as fmt
from harness.checkpoint.catalog import Catalog, going_on_from, read_catalog
from harness.checkpoint.commit import About, commit
from harness.distributed import join, ranks
from harness.errors import DamagedError
from harness.store import TEMP, LocalStore, Store, open_store
from harness.store.remote import RemoteStore
from harness.store.s3_client import S3Client

OLD, DAMAGED, STEPS = 20, 30, [40, 50, 60]
WHERE = ("bucket", "directory")
LANES = 2
SAID = (0, 1, 74, 78)  # how a life may end that is not killed: finished, or in words
TINY_S = 0.3


class Lives:
    """Many small runs in one bucket, each begun as a copy of the same one."""

    def __init__(
        self, server: S3Server, name: str, nursery: Nursery, folder: Path, world: ranks.World
    ) -> None:
        self.server, self.name, self.nursery, self.folder, self.world = (
            server,
            name,
            nursery,
            folder,
            world,
        )
        self.client = server.client()
        base = open_store(f"s3://{name}/template", 30)
        assert isinstance(base, RemoteStore)
        self._base, self._numbers = base, itertools.count(1)
        life = Life(base)
        for step in (10, OLD, DAMAGED):
            life.save(step)
        keys = [
            item["Key"].removeprefix("template/")
            for item in self.client.list_objects_v2(Bucket=name, Prefix="template/")["Contents"]
        ]
        self._template = {key: base.read(key) for key in keys}
        data = bytearray(self._template[fmt.data_key(DAMAGED, 1)])
        data[len(data) // 2] ^= 1
        self._template[fmt.data_key(DAMAGED, 1)] = bytes(data)

    def store(self, prefix: str) -> Store:
        """A prefix of the bucket, over the one connection that there is."""
        bucket = copy.copy(self._base.bucket)
        assert isinstance(bucket, S3Client)
        bucket.prefix = f"{prefix}/"
        return RemoteStore(f"s3://{self.name}/{prefix}", bucket, 30)

    def new(self, where: str, steps: list[int] | None = None) -> Case:
        prefix = f"run-{next(self._numbers)}"
        for key, data in self._template.items():
            self.client.put_object(Bucket=self.name, Key=f"{prefix}/{key}", Body=data)
        return Case(self, prefix, where, steps or STEPS)


class Case:
    """One of them."""

    def __init__(self, lives: Lives, prefix: str, where: str, steps: list[int]) -> None:
        self.lives, self.prefix, self.where, self.steps = lives, prefix, where, steps
        self.remote = lives.store(prefix)
        self.folder = lives.folder / prefix
        self.folder.mkdir()
        self.local = LocalStore(self.folder / "a") if where == "directory" else None

    def begin(self, proxy: FaultProxy, wait_s: float = 20) -> Born:
        places = ([str(self.local)] if self.local else []) + [
            f"s3://{self.lives.name}/{self.prefix}"
        ]
        environment = self.lives.server.environment | {"AWS_ENDPOINT_URL": proxy.url}
        (self.folder / "told").touch()
        return self.lives.nursery.bear(
            "write",
            environment,
            self.folder / "output",
            places,
            self.steps,
            wait_s,
            str(self.folder / "told"),
        )

    def told(self, what: str) -> int:
        """The last step of which it was said that it is committed (c), or in every store (u)."""
        lines = [line.split() for line in (self.folder / "told").read_text().splitlines()]
        return max((int(step) for kind, step in lines if kind == what), default=OLD)

    def check(self) -> Catalog:
        """A fresh attempt in a new directory finds what was said to be there, whole, and commits
        the next one."""
        found = read_catalog(self.remote)
        whole = [m for m in found.history if self._is_whole(m)]
        assert len(whole) >= 2, "the two newest are kept"
        assert not found.foreign and not found.strangers and not found.damaged
        chosen = self._choose(self.remote, self.told("u"))
        if self.local is not None:
            self._choose_in((self.local, self.remote), self.told("c"))
        fresh = LocalStore(self.folder / "b")
        life = Life(fresh, self.remote)
        life.origin = chosen
        life.copied(99)
        after = read_catalog(self.remote)
        assert (there(after.head).step, there(after.head).attempt) == (99, found.greatest + 1)
        assert after.history[1] == chosen
        self._choose(self.remote, 99)
        return found

    def _is_whole(self, manifest: fmt.Manifest) -> bool:
        try:
            load.check(self.remote, manifest)
        except DamagedError:
            assert manifest.order == (1, DAMAGED), manifest.name
            return False
        return True

    def _choose(self, store: Store, at_least: int) -> fmt.Manifest:
        return self._choose_in((store,), at_least)

    def _choose_in(self, stores: tuple[Store, ...], at_least: int) -> fmt.Manifest:
        resume_point = resume.choose(stores, self.lives.world)
        assert resume_point.manifest is not None and resume_point.payload is not None
        assert resume_point.manifest.step >= at_least and resume_point.manifest.order != (
            1,
            DAMAGED,
        )
        expected = payload(resume_point.manifest.step, resume_point.manifest.attempt)
        assert torch.equal(
            resume_point.payload["model_state_dict"]["weight"],
            expected["model_state_dict"]["weight"],
        )
        return resume_point.manifest


@pytest.fixture(scope="module")
def lives(s3_server: S3Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lives]:
    name = s3_server.make_bucket("crash-points")
    own = not torch.distributed.is_initialized()
    world, nursery = join.join(60), shared_nursery()
    with pytest.MonkeyPatch.context() as patch:
        s3_server.lend(patch)
        yield Lives(s3_server, name, nursery, tmp_path_factory.mktemp("lives"), world)
    nursery.end_all()
    if own:
        world.leave()


@pytest.fixture(scope="module")
def requests(lives: Lives) -> dict[str, list[str]]:
    """What an undisturbed life asks for, in order, with a directory and without."""
    return {where: undisturbed(lives, where) for where in WHERE}


def undisturbed(lives: Lives, where: str) -> list[str]:
    case = lives.new(where)
    with FaultProxy(lives.server.host, lives.server.port) as proxy:
        born = case.begin(proxy)
        assert born.wait() == 0, born.text
        asked = [
            f"{request.method} {request.target.partition(f'{case.prefix}')[2]}"
            for request in proxy.requests
        ]
    found = case.check()
    assert [m.step for m in found.history] == [60, 50] and there(found.head).final
    return asked


def each(cases: list[tuple[str, int]], act: Callable[[str, int], None]) -> None:
    """`act` on every case, a few at a time; fails with all that went wrong."""

    def one(case: tuple[str, int]) -> str | None:
        try:
            act(*case)
        except Exception as error:  # noqa: BLE001 - whatever it is, it is the finding
            return f"{case}: {type(error).__name__}: {error}"
        return None

    with ThreadPoolExecutor(LANES) as pool:
        wrong = [said for said in pool.map(one, cases) if said]
    assert not wrong, f"{len(wrong)} of {len(cases)} cases:\n" + "\n".join(wrong)


def killed(lives: Lives, where: str, n: int, *, forward: bool) -> None:
    """SIGKILL when the n-th request has arrived, which is then done all the same, or lost with its
    sender."""
    case = lives.new(where)
    with FaultProxy(lives.server.host, lives.server.port) as proxy:
        hold = proxy.hold(skip=n - 1)
        born = case.begin(proxy)
        while not hold.reached.wait(0.01) and born.code is None:
            pass
        code = born.kill()
        before = len(proxy.requests)
        hold.release(forward=forward)
        if forward and hold.request is not None:
            wait_until(lambda: there(hold.request).status is not None, "the server has done it")
        assert code == -9 or (code == 0 and before < n), (code, born.text)
    case.check()


def refused(lives: Lives, where: str, n: int, rule: Rule, wait_s: float) -> None:
    """The n-th request fails, or all from there on: the life ends in words, or in success if all is
    well."""
    case = lives.new(where)
    with FaultProxy(lives.server.host, lives.server.port) as proxy:
        proxy.rules.append(rule)
        born = case.begin(proxy, wait_s)
        code = born.wait(120)
    assert code in SAID and "Traceback" not in born.text, (code, born.text)
    found = case.check()
    if code == 0:
        assert there(found.head).step == STEPS[-1] and there(found.head).final, born.text
    assert case.told("c") == STEPS[-1] or code != 0, born.text
    assert found.ends.get(2, {}).get("why") != "finished" or there(found.head).final, (
        "the word about the end is true"
    )


def denied(lives: Lives, where: str, n: int) -> None:
    refused(lives, where, n, Rule("denied", after=n - 1, first=1), 1)


def failing(lives: Lives, where: str, n: int) -> None:
    refused(lives, where, n, Rule("500", after=n - 1), TINY_S)


def kinds(asked: list[str], wanted: tuple[str, ...]) -> list[int]:
    """The number of the first request that looks like each of these."""
    found = []
    for text in wanted:
        numbers = [n for n, request in enumerate(asked, 1) if text in request]
        assert numbers, f"no such request in a life: {text}"
        found.append(numbers[0])
    return sorted(set(found))


def sample(
    requests: dict[str, list[str]], *wanted: str, where: tuple[str, ...] = WHERE
) -> list[tuple[str, int]]:
    """The first request of each kind, in a life with a directory, without, or both."""
    return [(place, n) for place in where for n in kinds(requests[place], wanted)]


def all_of(requests: dict[str, list[str]]) -> list[tuple[str, int]]:
    return [(where, n) for where in WHERE for n in range(1, len(requests[where]) + 1)]


# The points where a life may be cut in two: what was begun is half done.
CUTS = (
    f"PUT /{fmt.attempt_key(2)}",
    f"PUT /{fmt.data_key(50, 2)}",
    f"PUT /{fmt.manifest_key(50, 2)}",
    "DELETE /checkpoints/",
)


def test_a_life_makes_every_kind_of_request_that_there_is(requests):
    for where in WHERE:
        kinds(
            requests[where],
            (
                *CUTS,
                ".json.damaged",
                "PUT /config.yaml",
                "PUT /events/",
                "PUT /attempts/0002.end.json",
                "PUT /probe/",
            ),
        )


def test_a_kill_while_a_request_is_done_leaves_the_last_committed_checkpoint(lives, requests):
    each(sample(requests, *CUTS), lambda where, n: killed(lives, where, n, forward=True))


def test_a_kill_while_a_request_is_lost_leaves_the_last_committed_checkpoint(lives, requests):
    each(
        sample(requests, *CUTS[2:], where=WHERE[1:]),
        lambda where, n: killed(lives, where, n, forward=False),
    )


def test_a_request_that_is_refused_ends_in_words_and_leaves_the_last_committed_checkpoint(
    lives, requests
):
    each(sample(requests, *CUTS[2:], ".end.json"), lambda where, n: denied(lives, where, n))


def test_a_server_that_fails_from_a_request_on_ends_in_words_and_leaves_the_last_committed_checkpoint(  # noqa: E501
    lives, requests
):
    each(sample(requests, CUTS[2]), lambda where, n: failing(lives, where, n))


@pytest.mark.slow
def test_a_kill_at_any_request_that_is_done_leaves_the_last_committed_checkpoint(lives, requests):
    each(all_of(requests), lambda where, n: killed(lives, where, n, forward=True))


@pytest.mark.slow
def test_a_kill_at_any_request_that_is_lost_leaves_the_last_committed_checkpoint(lives, requests):
    each(all_of(requests), lambda where, n: killed(lives, where, n, forward=False))


@pytest.mark.slow
def test_any_request_that_is_refused_ends_in_words_and_leaves_the_last_committed_checkpoint(
    lives, requests
):
    each(all_of(requests), lambda where, n: denied(lives, where, n))


@pytest.mark.slow
def test_a_server_that_fails_from_any_request_on_ends_in_words_and_leaves_the_last_committed_checkpoint(  # noqa: E501
    lives, requests
):
    each(all_of(requests), lambda where, n: failing(lives, where, n))


# --- killed in the middle of a download ---


def large(lives: Lives) -> Case:
    """A run whose newest checkpoint is fetched in three ranges."""
    case = lives.new("directory", [70])
    found = read_catalog(case.remote)
    attempt = attempts.claim(found, found.history[1], 1)
    generator = torch.Generator().manual_seed(5)
    content = payload(OLD + 1, attempt.number)
    content["model_state_dict"]["bytes"] = torch.randint(
        0, 256, (20 << 20,), generator=generator, dtype=torch.uint8
    )
    commit(case.remote, attempt, content, About(1, going_on_from(found.history[1]), {}, "-"))
    return case


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_a_kill_in_the_middle_of_a_download_leaves_nothing_behind(lives):
    case = large(lives)
    assert case.local is not None
    key = fmt.data_key(OLD + 1, 2)
    for n in (1, 2, 3):
        with FaultProxy(lives.server.host, lives.server.port) as proxy:
            hold = proxy.hold("GET", key, skip=n - 1)
            born = case.begin(proxy)
            wait_until(hold.reached.is_set, "the range is asked for", every_s=0.01)
            assert born.kill() == -9
        assert case.local.entries(fmt.CHECKPOINTS) == []
        found = read_catalog(case.local, case.remote)
        assert (
            read_catalog(case.local).manifests == []
            and there(found.head).step == OLD + 1
            and found.greatest == 2
        ), "nothing was claimed"
    assert files(case.folder) <= {"told", "output"}, "it came into memory, and nowhere else"
    with FaultProxy(lives.server.host, lives.server.port) as proxy:
        born = case.begin(proxy)
        assert born.wait() == 0, born.text
    found = read_catalog(case.local, case.remote)
    assert [m.order for m in found.history[:2]] == [(3, 70), (2, OLD + 1)]
    assert not [
        entry
        for folder in fmt.FOLDERS
        for entry in case.local.entries(folder)
        if TEMP.match(entry.key)
    ]


def test_a_download_that_is_cut_off_is_fetched_again_and_never_taken_for_whole(lives):
    case = large(lives)
    with FaultProxy(lives.server.host, lives.server.port) as proxy:
        proxy.rules += [
            Rule(fault, "GET", fmt.data_key(OLD + 1, 2), first=1)
            for fault in ("truncate", "reset_body")
        ]
        born = case.begin(proxy)
        assert born.wait() == 0, born.text
        assert sum(request.fault is not None for request in proxy.requests) == 2
    assert read_catalog(case.remote).history[1].order == (2, OLD + 1), born.text
