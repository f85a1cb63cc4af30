"""What must hold in a simulated cluster: what was told to users, compared with the raw bytes of
disks and bucket. Nothing here is read by the program's own code."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import itertools
import json
import random
import re
from typing import TYPE_CHECKING, Any

from blake3 import blake3
from simulated_bucket import Bucket
from simulated_disk import Disk

if TYPE_CHECKING:
    from simulated_lives import Life

RUN, ELEMENTS = "/sim/run", 32
BEGIN = bytes(ELEMENTS)
MANIFEST = re.compile(r"^checkpoints/step_(\d{8})-(\d{4})\.json\Z")
DATA = re.compile(r"^checkpoints/(step_\d{8}-(\d{4}))(\.pt|/\d{5}\.pt)\Z")
TEMPORARY = re.compile(r"\.tmp-(\d+)-[0-9a-f]+\Z")
RECORD = re.compile(r"^attempts/(\d{4})\.json\Z")
Order = tuple[int, int]  # attempt, step
Place = Disk | Bucket


def after(state: bytes, attempt: int, step: int) -> bytes:
    """The state that a step of an attempt makes of a state: it tells the whole history."""
    return hashlib.blake2b(state + f"{attempt} {step}".encode(), digest_size=ELEMENTS).digest()


def expected(lineage: Any) -> bytes:
    """The state at the end of a lineage."""
    state, step = BEGIN, 0
    for attempt, last in lineage:
        while step < last:
            step += 1
            state = after(state, attempt, step)
    return state


def metric(step: int) -> float:
    return random.Random(step).random()


def files_of(place: Place, *, durable: bool = False) -> dict[str, bytes]:
    return dict(place.objects) if isinstance(place, Bucket) else place.files(RUN, durable=durable)


def manifests_of(files: dict[str, bytes]) -> dict[Order, dict[str, Any]]:
    """The manifests in a store, by (attempt, step), but for torn ones."""
    keys = {(int(m[2]), int(m[1])): key for key in files if (m := MANIFEST.match(key))}
    found = dict[Order, dict[str, Any]]()
    for order, key in sorted(keys.items()):
        with contextlib.suppress(ValueError):
            found[order] = json.loads(files[key])
    return found


def history_of(files: dict[str, bytes]) -> dict[Order, dict[str, Any]]:
    """Those within the lineage of the newest."""
    manifests = manifests_of(files)
    limits = dict(manifests[max(manifests)]["lineage"]) if manifests else {}
    return {o: m for o, m in manifests.items() if o[1] <= limits.get(o[0], -1)}


def problem_of(files: dict[str, bytes], manifest: dict[str, Any]) -> str:
    """What is wrong with a checkpoint: its bytes, or what they say; "" if it is whole."""
    for file in manifest["files"]:
        data = files.get(f"checkpoints/{file['name']}")
        if data is None:
            return f"{file['name']} is missing"
        if f"blake3:{blake3(data).hexdigest()}" != file["digest"]:
            return f"{file['name']} has other bytes than its manifest says"
    main = files[f"checkpoints/{manifest['files'][0]['name']}"]
    if expected(manifest["lineage"]).hex().encode() not in main:
        return f"{manifest['files'][0]['name']} is not the state of its lineage"
    return ""


def _nth(orders: set[Order], policy: Any) -> list[Order]:
    """Those that a policy keeps as every n-th."""
    return [o for o in orders if policy.every_steps and o[1] % policy.every_steps == 0]


@dataclasses.dataclass(frozen=True)
class Promise:
    """A checkpoint that a user was told to be safe in a place."""

    order: Order
    place: Place
    lineage: tuple[Order, ...]


class Ledger:
    """What users were told, and what was done to the stores on purpose."""

    def __init__(self, bucket: Bucket) -> None:
        self.bucket = bucket
        self.promises = list[Promise]()
        self.claims: dict[int, Life] = {}
        self.damaged = set[tuple[int, Order]]()  # by identity of the place
        self.said = list[str]()  # what was done and told, for people

    # --- when something is told ---

    def least(self, life: Life) -> Order | None:
        """The oldest checkpoint that this life may go on from; None: it may begin anew."""
        seen = [p for p in self.promises if p.place in (life.machine.disk, self.bucket)]
        if not seen:
            return None
        limits = dict(max(seen, key=lambda promise: promise.order).lineage)
        good = [
            p.order
            for p in seen
            if p.order[1] <= limits.get(p.order[0], -1)
            and (id(p.place), p.order) not in self.damaged
        ]
        return max(good, default=None)

    def check_chosen(self, life: Life, manifest: Any, least: Order | None, state: bytes) -> None:
        """It goes on from nothing older than what was promised, and from exactly that state.

        None for `least` if others have begun meanwhile: what they save and delete while a start
        looks is looked at when it claims.
        """
        self._check_least(life, manifest, least)
        if manifest is None:
            return
        assert state == expected(manifest.lineage), f"{manifest.name} holds another state"
        self._check_lineage(manifest.name, manifest.lineage)

    def _check_least(self, life: Life, manifest: Any, least: Order | None) -> None:
        order = manifest.order if manifest else None
        assert least is None or (order is not None and order >= least), (
            f"life {life.number} goes on from {order}, but {least} was promised"
        )

    def _check_lineage(self, name: str, lineage: Any) -> None:
        pairs = itertools.pairwise(lineage)
        ascends = all(a[0] < b[0] and a[1] < b[1] for a, b in pairs)
        assert ascends, f"{name}: steps or attempts go back: {lineage}"

    def claimed(self, life: Life, point: Any, least: Order | None) -> None:
        """No two lives are the same attempt, and none cuts off what was promised before it."""
        self._check_least(life, point.manifest, least)
        other = self.claims.setdefault(life.attempt, life)
        assert other is life, (
            f"lives {other.number} and {life.number} are both attempt {life.attempt}"
        )
        life.lineage = point.manifest.lineage if point.manifest else ()
        if point.manifest is not None and point.place == 0:
            life.good.add(point.manifest.order)

    def is_superseded(self, life: Life) -> bool:
        """Whether a newer attempt has begun where this one commits."""
        return any(n > life.attempt and o.place is life.place for n, o in self.claims.items())

    def check_superseded(self, life: Life) -> None:
        """Only a newer attempt, or another of the same number, ends one as superseded."""
        keys = [*self.bucket.objects, *files_of(life.place)]
        numbers = [int(m[1]) for key in keys if (m := RECORD.match(key))]
        assert max(numbers, default=0) > life.attempt, f"nobody has superseded life {life.number}"

    def committed(self, life: Life, step: int, *, is_late: bool) -> None:
        """A save is told to be committed: it is whole, and durable, and what it needs is there."""
        assert not is_late, f"life {life.number} saves, though it was superseded before"
        order, place = (life.attempt, step), life.place
        if not self.is_superseded(life):
            self._check_safe(order, place)
        life.good.add(order)
        self._promise(life, order, place)
        self._check_kept(life)

    def _check_safe(self, order: Order, place: Place) -> None:
        for durable in (False, True):
            files = files_of(place, durable=durable)
            manifest = manifests_of(files).get(order)
            problem = "no manifest" if manifest is None else problem_of(files, manifest)
            when = "after a power loss " if durable else ""
            assert not problem, f"{order} is told to be saved, but {when}there is {problem}"

    def _promise(self, life: Life, order: Order, place: Place) -> None:
        lineage = (*(entry for entry in life.lineage if entry[0] != order[0]), order)
        self.promises.append(Promise(order, place, lineage))

    def settled(self, life: Life, step: int | None) -> None:
        """All is told to be uploaded."""
        if step is None:
            return
        order = (life.attempt, step)
        if not self.is_superseded_there(life):
            self._check_safe(order, self.bucket)
        self._promise(life, order, self.bucket)

    def is_superseded_there(self, life: Life) -> bool:
        return max(self.claims) > life.attempt

    def _check_kept(self, life: Life) -> None:
        """Retention keeps of what this attempt knows to be good: the newest two, the best, every
        n-th; and what the bucket is still to get."""
        if self.is_superseded_there(life):
            return
        setting = life.cluster.setting
        policy = setting.policy if setting.has_disk else setting.remote_policy
        here = {o for o in life.good if (id(life.place), o) not in self.damaged}
        files = files_of(life.place)
        manifests = manifests_of(files)
        for order in self._wanted(here, policy):
            assert order in manifests, f"{order} was deleted, though it is to be kept"
        if setting.has_disk and setting.has_bucket:
            there = manifests_of(files_of(self.bucket))
            for order in {max(here), *_nth(here, setting.remote_policy)}:
                is_safe = order in manifests or order in there
                assert is_safe, f"{order} was deleted before it was uploaded"

    def _wanted(self, orders: set[Order], policy: Any) -> set[Order]:
        by_metric = sorted(orders, key=lambda order: metric(order[1]))
        return {*sorted(orders)[-2:], *by_metric[: policy.best], *_nth(orders, policy)}

    # --- at any time ---

    def check_places(self, places: list[Place]) -> None:
        """Each checkpoint of each store's history is whole, unless it was damaged on purpose.

        A bucket may carry out the PUT of a manifest when retention, or the sweep of a newer
        attempt, has deleted files of it. No client can prevent that; such a copy is damaged, and
        not the newest.
        """
        for place in places:
            files = files_of(place)
            for order, manifest in history_of(files).items():
                self._check_lineage(str(order), manifest["lineage"])
                problem = problem_of(files, manifest)
                is_ours = (id(place), order) in self.damaged
                key = f"checkpoints/step_{order[1]:08d}-{order[0]:04d}.json"
                is_risen = isinstance(place, Bucket) and key in place.risen
                assert not problem or is_ours or is_risen, f"{order}: {problem}"

    def check_clean(self, place: Place, attempt: int) -> None:
        """After the first commit of an attempt nothing unfinished of earlier ones is left."""
        files = files_of(place)
        named = {
            f"checkpoints/{file['name']}"
            for manifest in manifests_of(files).values()
            for file in manifest["files"]
        }
        for key in files:
            if (match := TEMPORARY.search(key)) and 0 < int(match[1]) < attempt:
                raise AssertionError(f"{key} is left over")
            match = DATA.match(key)
            if match is None or key in named or int(match[2]) >= attempt:
                continue
            if f"checkpoints/{match[1]}.json.damaged" in files:
                continue
            # A main file in a bucket stays: its owner may be alive.
            if not (isinstance(place, Bucket) and match[3] == ".pt"):
                raise AssertionError(f"{key} is left over")
