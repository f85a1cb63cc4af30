"""What a remote store does when the network, the service, the credentials or its own process fail:
real S3 behind the fault proxy."""

from __future__ import annotations

import datetime
import http.client
import http.server
import os
import secrets
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import pytest
from blake3 import blake3
from botocore.exceptions import ClientError
from conftest import ENVIRONMENT, wait_until
from fault_proxy import FaultProxy, Rule
from s3_server import S3Server, free_ports

from harness import cli
from harness.checkpoint import format as fmt
from harness.checkpoint.attempts import Attempt
from harness.checkpoint.commit import About, commit
from harness.checkpoint.known import Known
from harness.checkpoint.load import verified_chunks
from harness.cli import prune
from harness.errors import DamagedError, RefusedError, SaveError, StorageError, UsageError
from harness.store import Store, open_store, probe, redacted
from harness.store.bucket import ObjectMetadata
from harness.store.explain import explained
from harness.store.fsspec_client import FsspecClient
from harness.store.remote import RemoteStore
from harness.store.s3_client import S3Client

MB = 1 << 20
KEY = "checkpoints/a.pt"
UPLOAD = "uploadId="  # in the query of a part, of a completion and of an abort


def slowly(value: object) -> Any:
    """One case more for whoever has time."""
    return pytest.param(value, marks=pytest.mark.slow)


@dataclass
class Way:
    """A store that is reached through a proxy, a plain client that is not, and what the store told
    of its troubles."""

    server: S3Server
    bucket: str
    proxy: FaultProxy
    client: Any
    base: RemoteStore
    troubles: list[tuple[str, Any]] = field(default_factory=list)
    successes: list[float] = field(default_factory=list)

    def store(
        self, limit_s: float = 60, give_up: Callable[[], object] = lambda: None
    ) -> RemoteStore:
        store = self.base.with_retry_limit(limit_s, give_up)
        store.listen(
            lambda what, event: self.troubles.append((what, event)),
            lambda: self.successes.append(time.monotonic()),
        )
        return store

    def fault(self, *rules: Rule) -> None:
        """From now on these, with nothing counted yet."""
        self.proxy.clear()
        self.proxy.release_stalled()
        self.troubles.clear()
        self.successes.clear()
        self.proxy.rules += rules

    def requests(self, method: str | None = None, contains: str | None = None) -> int:
        return sum(request.matches(method, contains) for request in self.proxy.requests)

    def held(self, prefix: str = "run/") -> list[str]:
        return [
            found["Key"]
            for found in self.client.list_objects_v2(Bucket=self.bucket, Prefix=prefix).get(
                "Contents", []
            )
        ]

    def stored(self, key: str = KEY) -> bytes:
        return bytes(self.client.get_object(Bucket=self.bucket, Key=f"run/{key}")["Body"].read())

    def put(self, data: bytes, key: str = KEY) -> None:
        self.client.put_object(Bucket=self.bucket, Key=f"run/{key}", Body=data)

    def uploads(self) -> list[str]:
        return [
            upload["Key"]
            for upload in self.client.list_multipart_uploads(Bucket=self.bucket).get("Uploads", [])
        ]


@pytest.fixture(scope="module")
def opened(s3_server: S3Server) -> Iterator[Way]:
    """One store for all tests, as opening one takes most of a second."""
    bucket = s3_server.make_bucket(f"faults-{secrets.token_hex(6)}")
    with FaultProxy(s3_server.host, s3_server.port) as proxy, pytest.MonkeyPatch.context() as patch:
        for name, value in (s3_server.environment | {"AWS_ENDPOINT_URL": proxy.url}).items():
            patch.setenv(name, value)
        store = open_store(f"s3://{bucket}/run")
        assert isinstance(store, RemoteStore)
        yield Way(s3_server, bucket, proxy, s3_server.client(max_pool_connections=16), store)


@pytest.fixture
def way(opened: Way) -> Iterator[Way]:
    """The same with nothing in it, and a server that does nothing wrong until told."""
    for key in opened.held(""):
        opened.client.delete_object(Bucket=opened.bucket, Key=key)
    for upload in opened.client.list_multipart_uploads(Bucket=opened.bucket).get("Uploads", []):
        opened.client.abort_multipart_upload(
            Bucket=opened.bucket, Key=upload["Key"], UploadId=upload["UploadId"]
        )
    opened.fault()
    yield opened
    opened.fault()


def took(action: Callable[..., object], *arguments: object) -> tuple[BaseException | None, float]:
    """What it raised, and after how many seconds."""
    start = time.monotonic()
    try:
        action(*arguments)
    except Exception as error:  # noqa: BLE001
        # refusing is right too; silently beginning with damaged or random weights is not
        return error, time.monotonic() - start
    return None, time.monotonic() - start


def operations(store: RemoteStore) -> dict[str, Callable[[], object]]:
    """Each is one request when nothing goes wrong, but for a write, which looks at what has
    arrived."""
    return {
        "read": lambda: store.read(KEY),
        "exists": lambda: store.exists(KEY),
        "entries": lambda: [
            (entry.key, entry.size_bytes) for entry in store.entries("checkpoints")
        ],
        "create": lambda: store.create("attempts/0001.json", b"ours", 1),
        "delete": lambda: store.delete("attempts/0001.json"),
        "write": lambda: store.write("attempts/0002.json", b"replaced", 1),
    }


VERBS = {
    "read": "read",
    "exists": "look",
    "entries": "list",
    "create": "create",
    "delete": "delete",
    "write": "upload",
}
# aiohttp itself tries once more, untold, if the connection was not a new one
RESETS = ("reset_before", "drop_response")
EXPECTED = {
    "read": b"whole",
    "exists": True,
    "entries": [(KEY, 5)],
    "create": None,
    "delete": None,
    "write": None,
}


# --- what passes by itself ---


@pytest.mark.parametrize(
    "fault", ["503", slowly("500"), slowly("429"), "409", "reset_before", "drop_response"]
)
def test_a_failure_that_passes_is_tried_again_once_and_told(way, fault):
    way.put(b"whole")
    for name, operation in operations(way.store()).items():
        # who only reads meets with no conflict
        if fault == "409" and name not in ("create", "write"):
            continue
        way.fault(Rule(fault, first=1))
        assert operation() == EXPECTED[name], name
        told = [(what.split(" ")[0], event.tries) for what, event in way.troubles]
        if fault not in RESETS or told:
            assert told == [(VERBS[name], 1)], (
                f"{name}: the libraries below try nothing again by themselves"
            )
        # the look at what has arrived, or whose it is
        extra = {"write": 1, "create": 1 if fault == "drop_response" else 0}.get(name, 0)
        assert way.requests() == 2 + extra, name
        assert len(way.successes) == 1 + (name == "write"), (
            f"{name}: that it works again is told too"
        )
    assert "run/attempts/0002.json" in way.held() and way.stored() == b"whole"


def test_a_burst_is_waited_out_with_few_requests(way):
    way.put(b"whole")
    way.fault(Rule("503", first=2))
    assert way.store(60).read(KEY) == b"whole"
    assert way.requests() == 3
    assert [event.tries for _, event in way.troubles] == [1, 2]


@pytest.mark.parametrize("fault", ["500", slowly("503"), "reset_before", slowly("drop_response")])
def test_a_failure_that_does_not_pass_ends_within_the_limit_and_keeps_what_was_there(way, fault):
    way.put(b"before")
    way.fault(Rule(fault))
    error, elapsed_s = took(lambda: way.store(1.5).read(KEY))
    assert isinstance(error, StorageError) and not isinstance(error, RefusedError)
    assert elapsed_s < 15
    assert "cannot read" in error.what and KEY in error.what and error.remedy
    assert 1 <= way.requests() <= 10
    way.fault(Rule("500"))
    error, elapsed_s = took(lambda: way.store(1).write(KEY, b"after", 1))
    assert isinstance(error, StorageError) and elapsed_s < 15
    assert way.stored() == b"before"


def test_a_server_that_is_away_for_a_moment_is_found_again(way):
    way.put(b"whole")
    way.proxy.down()
    store = way.store()
    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(store.read, KEY)
        wait_until(lambda: way.troubles, "a failure")
        way.proxy.up()
        assert reading.result() == b"whole"


def test_a_name_that_is_not_resolved_may_be_later(way, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://no-such-host.invalid:1")
    error, elapsed_s = took(lambda: open_store("s3://bucket/run", 1.5).entries("attempts"))
    assert (
        isinstance(error, StorageError) and not isinstance(error, RefusedError) and elapsed_s < 20
    )
    assert "reachable" in error.remedy


def test_a_silent_server_is_given_no_longer_than_what_is_left(way):
    way.put(b"whole")
    way.fault(Rule("stall"))
    error, elapsed_s = took(lambda: way.store(1.2).read(KEY))
    assert isinstance(error, StorageError)
    assert 1 < elapsed_s < 15, "not as long as any request may take"


def test_a_later_try_has_only_the_time_that_is_left(way):
    way.put(b"whole")
    way.fault(Rule("503", first=2), Rule("stall"))
    error, elapsed_s = took(lambda: way.store(1.6).read(KEY))
    assert isinstance(error, StorageError)
    assert elapsed_s < 15


def test_giving_up_ends_a_wait_at_once(way):
    way.put(b"whole")
    given_up = threading.Event()
    way.fault(Rule("503"))
    threading.Timer(1.0, given_up.set).start()
    error, elapsed_s = took(lambda: way.store(60, given_up.is_set).read(KEY))
    assert isinstance(error, StorageError) and given_up.is_set()
    assert elapsed_s < 20
    seen = way.requests()
    time.sleep(0.3)
    assert way.requests() == seen, "nothing goes on behind our back"


def test_a_listing_is_whole_or_an_error(way):
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda number: way.put(b"", f"checkpoints/{number:04d}"), range(1001)))
    way.fault(Rule("503", "GET", "continuation-token", first=1))
    assert len(way.store().entries("checkpoints")) == 1001
    way.fault(Rule("503", "GET", "continuation-token"))
    error, _ = took(lambda: way.store(0.3).entries("checkpoints"))
    assert isinstance(error, StorageError)


# --- lost replies and rivals ---


def test_a_create_whose_reply_was_lost_is_recognised_as_ours(way):
    way.fault(Rule("drop_response", "PUT", first=1))
    way.store().create("attempts/0001.json", b"nonce 1", 1)
    assert way.stored("attempts/0001.json") == b"nonce 1"
    assert [request.status for request in way.proxy.requests] == [None, 412, 200]


def test_a_rival_is_not_taken_for_us_when_a_reply_is_lost(way):
    way.put(b"nonce 2", "attempts/0001.json")
    way.fault(Rule("drop_response", "PUT", first=1))
    with pytest.raises(FileExistsError):
        way.store().create("attempts/0001.json", b"nonce 1", 1)
    assert way.stored("attempts/0001.json") == b"nonce 2"


def test_a_taken_key_is_refused_at_once(way):
    way.put(b"nonce 2", "attempts/0001.json")
    with pytest.raises(FileExistsError):
        way.store().create("attempts/0001.json", b"nonce 1", 1)
    assert (way.requests("PUT"), way.troubles) == (1, [])


def test_a_rival_that_vanishes_while_we_look_was_there_all_the_same(way):
    way.put(b"nonce 2", "attempts/0001.json")
    hold = way.proxy.hold("GET", "0001.json")
    with ThreadPoolExecutor(1) as pool:
        creating = pool.submit(way.store().create, "attempts/0001.json", b"nonce 1", 1)
        assert hold.reached.wait(60)
        way.client.delete_object(Bucket=way.bucket, Key="run/attempts/0001.json")
        hold.release()
        with pytest.raises(FileExistsError):
            creating.result()


def test_a_conflict_is_tried_again_and_the_key_created(way):
    way.fault(Rule("409", "PUT", first=2))
    way.store().create("attempts/0001.json", b"ours", 1)
    assert (way.requests("PUT"), way.stored("attempts/0001.json")) == (3, b"ours")


# --- large uploads ---


@pytest.mark.parametrize(
    "rules",
    [
        [Rule("drop_response", "POST", UPLOAD, first=1)],
        [Rule("200_error", "POST", UPLOAD, first=1)],
        slowly([Rule("503", "POST", UPLOAD, first=1)]),
        [Rule("drop_response", "POST", "uploads", first=1)],
        [
            Rule("drop_response", "PUT", "partNumber=1", first=1),
            Rule("503", "PUT", "partNumber=2", first=2),
        ],
        [Rule("flip_put", "PUT", "partNumber=1", first=1)],
        [Rule("reset_before", "PUT", "partNumber=3", first=1), Rule("500", "HEAD", first=1)],
    ],
    ids=[
        "complete, reply lost",
        "complete, 200 with an error",
        "complete, 503",
        "begin, reply lost",
        "parts",
        "flipped",
        "last part",
    ],
)
def test_a_large_upload_survives_what_passes(way, rules):
    data = os.urandom(17 * MB)
    way.fault(*(Rule(rule.fault, rule.method, rule.contains, rule.first) for rule in rules))
    way.store().write(KEY, data, 1)
    assert way.stored() == data
    assert sum(request.fault is not None for request in way.proxy.requests) == sum(
        rule.first for rule in rules
    )
    assert len(way.troubles) >= sum(rule.first for rule in rules if rule.fault not in RESETS)


@pytest.mark.parametrize(
    "rule",
    [
        Rule("500", "PUT", "partNumber=2"),
        Rule("denied", "PUT", "partNumber=2"),
        slowly(Rule("flip_put", "PUT", "partNumber=1")),
        Rule("200_error", "POST", UPLOAD),
        slowly(Rule("503", "POST", UPLOAD)),
        slowly(Rule("reset_before", "PUT", "partNumber=3")),
    ],
    ids=lambda rule: f"{rule.fault} {rule.contains}",
)
def test_a_large_upload_that_fails_leaves_no_object_and_no_upload(way, rule):
    way.fault(Rule(rule.fault, rule.method, rule.contains))
    limit_s = 60 if rule.fault == "denied" else 2.5  # the parts that succeed must have time to
    error, elapsed_s = took(lambda: way.store(limit_s).write(KEY, os.urandom(17 * MB), 1))
    assert isinstance(error, StorageError) and KEY in error.what
    assert isinstance(error, RefusedError) == (rule.fault == "denied")
    assert elapsed_s < 30
    assert (way.held(), way.uploads()) == ([], [])


def test_parts_of_an_upload_that_has_failed_are_not_tried_again(way):
    """One part is refused at once; the other one would be retried for a minute and a half."""
    way.fault(Rule("denied", "PUT", "partNumber=1"), Rule("503", "PUT", "partNumber=2"))
    error, elapsed_s = took(lambda: way.store(90).write(KEY, os.urandom(17 * MB), 1))
    assert isinstance(error, RefusedError) and elapsed_s < 60
    assert (way.held(), way.uploads()) == ([], [])


def test_files_that_are_read_together_wait_for_one_limit_and_not_for_one_each(way):
    """One is refused at once, and the others would be retried for a minute and a half."""
    way.fault(Rule("denied", "GET", "0001.json"), Rule("503", "GET", ".json"))
    keys = [fmt.attempt_key(number) for number in range(1, 30)]
    error, elapsed_s = took(lambda: Known().read_records(way.store(90), keys))
    assert isinstance(error, RefusedError) and elapsed_s < 60
    way.put(os.urandom(30 * MB))
    for after in range(4):  # whichever part it is, and whichever one the reader waits for
        way.fault(Rule("denied", "GET", first=1, after=after), Rule("503", "GET"))
        error, elapsed_s = took(lambda: list(way.store(90).chunks(KEY)))
        assert isinstance(error, RefusedError) and elapsed_s < 60


def test_a_commit_that_could_not_begin_cleans_nothing_up(way):
    """It asks whether the step is committed already, in vain; nothing was written."""
    way.fault(Rule("503", "HEAD"))
    payload: dict[str, Any] = {"step": 3, "epoch": 0, "loss": None, "metrics": {}}
    with pytest.raises(SaveError):
        commit(way.store(0.5), Attempt(1, "run", ""), payload, About(1, (), {}, "-"))
    assert way.requests("DELETE") == 0 == way.requests("PUT")


def test_an_error_of_a_part_is_heard_while_writing_and_kept_for_who_hides_it(way):
    way.fault(Rule("denied", "PUT", "partNumber=1"))
    with way.store().writer(KEY, 1) as sink:
        with pytest.raises(RefusedError):
            for _ in range(20):
                sink.write(bytes(8 * MB))
        assert isinstance(sink.failure, RefusedError), "torch.save puts an error of its own over it"
        assert way.requests("PUT") < 10
    assert way.uploads() == []


def test_that_an_upload_cannot_be_aborted_does_not_hide_why_it_failed(way):
    way.fault(Rule("denied", "PUT", "partNumber=2"), Rule("500", "DELETE"))
    error, elapsed_s = took(lambda: way.store(3).write(KEY, os.urandom(17 * MB), 1))
    assert isinstance(error, RefusedError) and "AccessDenied" in error.found
    assert elapsed_s < 30
    assert way.held() == [] and way.uploads() == [f"run/{KEY}"], "harness prune finds it"


@pytest.mark.parametrize("before", [b"", b"o" * 17 * MB], ids=["nothing", "another file as large"])
@pytest.mark.parametrize(
    ("method", "request_", "said"),
    [
        ("PUT", "partNumber=1", "the upload of .* is gone"),
        ("PUT", "partNumber=3", "the upload of .* is gone"),
        ("POST", UPLOAD, "did not arrive as it was sent"),
    ],
    ids=["while the first part is sent", "while the last part is sent", "before its end"],
)
def test_an_upload_that_somebody_aborted_has_not_succeeded(way, before, method, request_, said):
    if before:
        way.put(before)
    hold = way.proxy.hold(method, request_)
    with ThreadPoolExecutor(1) as pool:
        writing = pool.submit(way.store().write, KEY, b"n" * 17 * MB, 1)
        assert hold.reached.wait(60)
        for upload in way.client.list_multipart_uploads(Bucket=way.bucket)["Uploads"]:
            way.client.abort_multipart_upload(
                Bucket=way.bucket, Key=upload["Key"], UploadId=upload["UploadId"]
            )
        hold.release()
        with pytest.raises(StorageError, match=said):
            writing.result()
    assert way.held() == ([f"run/{KEY}"] if before else [])


# --- wrong bytes ---


def test_an_upload_that_was_changed_on_its_way_is_sent_again(way):
    way.fault(Rule("flip_put", "PUT", first=1))
    way.store().write(KEY, b"whole" * 1000, 1)
    assert way.stored() == b"whole" * 1000
    assert way.requests("PUT") == 2


def test_a_create_that_was_changed_on_its_way_is_sent_again(way):
    way.fault(Rule("flip_put", "PUT", first=1))
    way.store().create(KEY, b"whole" * 1000, 1)
    assert way.stored() == b"whole" * 1000


class SilentS3(S3Client):
    """As if the server had never heard of newer checksums than MD5."""

    def _call(self, limit_s: float, method: str, **arguments: Any) -> dict[str, Any]:
        arguments.pop("ChecksumAlgorithm", None)
        return super()._call(limit_s, method, **arguments)


class RefusingS3(S3Client):
    """As if the server refused what it does not know."""

    def _call(self, limit_s: float, method: str, **arguments: Any) -> dict[str, Any]:
        if "ChecksumAlgorithm" in arguments:
            said = {
                "Error": {"Code": "NotImplemented"},
                "ResponseMetadata": {"HTTPStatusCode": 501},
            }
            raise OSError(
                "A header you provided implies functionality that is not implemented."
            ) from ClientError(said, method)
        return super()._call(limit_s, method, **arguments)


@pytest.mark.parametrize("kind", [S3Client, SilentS3, RefusingS3])
def test_a_part_that_was_changed_on_its_way_is_sent_again_whatever_checksum_the_server_knows(
    way, kind
):
    data, store = os.urandom(17 * MB), RemoteStore(way.base.url, kind(way.base.url), 60)
    for _ in range(2):
        way.fault(Rule("flip_put", "PUT", "partNumber=2", first=1))
        store.write(KEY, data, 1)
        assert way.stored() == data
        parts = [request.headers for request in way.proxy.requests if "partNumber" in request.query]
        assert len(parts) == 4
        with_crc, with_md5 = (
            [name in headers for headers in parts]
            for name in ("x-amz-checksum-crc32", "content-md5")
        )
        assert (all(with_crc), any(with_md5)) == (
            (True, False) if kind is S3Client else (False, True)
        )
        assert all(with_crc) or all(with_md5)


class MuteS3(S3Client):
    """As if the server promised to compare, and did not."""

    def _call(self, limit_s: float, method: str, **arguments: Any) -> dict[str, Any]:
        promised = (
            {"ChecksumAlgorithm": "CRC32"} if arguments.pop("ChecksumAlgorithm", None) else {}
        )
        arguments.pop("ChecksumCRC32", None)
        for part in arguments.get("MultipartUpload", {}).get("Parts", ()):
            part.pop("ChecksumCRC32")
        return super()._call(limit_s, method, **arguments) | promised


def test_a_server_that_does_not_say_what_it_compared_is_not_believed(way):
    data, store = os.urandom(17 * MB), RemoteStore(way.base.url, MuteS3(way.base.url), 60)
    store.write(KEY, data, 1)
    assert way.stored() == data
    way.fault(Rule("flip_put", "PUT", "partNumber=2", first=1))
    with pytest.raises(StorageError, match="did not arrive as it was sent"):
        store.write(KEY, data, 1)


def test_expired_credentials_are_no_refusal_of_a_checksum(way):
    way.fault(Rule("expired", "POST", "uploads", first=1))
    way.store().write(KEY, os.urandom(17 * MB), 1)
    assert all(
        "x-amz-checksum-crc32" in request.headers
        for request in way.proxy.requests
        if "partNumber" in request.query
    )


def test_an_upload_that_is_always_changed_on_its_way_is_never_done(way):
    way.fault(Rule("flip_put", "PUT"))
    for action in (
        lambda store: store.write(KEY, b"whole", 1),
        lambda store: store.create(KEY, b"whole", 1),
    ):
        error, _ = took(lambda action: action(way.store(1)), action)
        assert isinstance(error, StorageError)
    assert way.held() == []


class CarelessS3(S3Client):
    """Sends other bytes, and says that all is well: a server that compares nothing."""

    def put(self, key: str, data: bytes, exclusive: bool, limit_s: float) -> str:
        right = super().put(key, data, exclusive, limit_s)
        super().put(key, bytes([data[0] ^ 1]) + data[1:], exclusive, limit_s)
        return right


class CarelessMemory(FsspecClient):
    """Keeps other bytes."""

    def put(self, key: str, data: bytes, exclusive: bool, limit_s: float) -> str:
        return super().put(key, bytes([data[0] ^ 1]) + data[1:], exclusive, limit_s)


@pytest.mark.parametrize("size_bytes", [5, 17 * MB], ids=["small", "large"])
def test_what_a_store_keeps_wrongly_is_noticed_before_it_counts(way, size_bytes):
    stores = [
        RemoteStore(
            "memory://careless/run",
            CarelessMemory(f"memory://careless-{secrets.token_hex(4)}/run"),
            60,
        )
    ]
    if size_bytes == 5:
        stores.append(RemoteStore(way.base.url, CarelessS3(way.base.url), 60))
    for store in stores:
        with pytest.raises(StorageError, match="did not arrive as it was sent"):
            store.write(KEY, os.urandom(size_bytes), 1)


class OddTags(S3Client):
    """ETags that are no MD5, as of some servers."""

    def head(self, key: str, limit_s: float) -> ObjectMetadata | None:
        found = super().head(key, limit_s)
        return found and ObjectMetadata(found.key, found.size_bytes, "0123456789abcdef")


def test_where_the_servers_checksum_tells_nothing_the_upload_is_read_back(way):
    store = RemoteStore(way.base.url, OddTags(way.base.url), 60)
    for data in (b"whole", os.urandom(17 * MB)):
        way.fault()
        store.write(KEY, data, 1)
        assert way.requests("GET", "a.pt") >= 1
    assert way.stored() == data


def test_where_the_servers_checksum_tells_it_nothing_is_read_back(way):
    way.store().write(KEY, os.urandom(17 * MB), 1)
    assert way.requests("GET") == 0


@pytest.mark.parametrize("fault", ["truncate", "reset_body", slowly("reset_before"), slowly("503")])
def test_a_download_survives_what_passes(way, fault):
    data = os.urandom(12 * MB)
    way.put(data)
    way.fault(Rule(fault, "GET", "a.pt", first=2))
    assert b"".join(way.store().chunks(KEY)) == data
    assert len(way.troubles) == 2 or fault in RESETS
    way.fault(Rule(fault, "GET", "a.pt", first=1))
    assert way.store().read(KEY) == data
    way.fault(Rule(fault, "GET", "a.pt", first=1))
    with way.store().open(KEY) as file:
        file.seek(7 * MB)
        assert file.read(2 * MB) == data[7 * MB : 9 * MB]


@pytest.mark.parametrize("fault", ["truncate", slowly("reset_body")])
def test_a_download_that_never_comes_whole_is_an_error(way, fault):
    way.put(os.urandom(20 * MB))
    way.fault(Rule(fault, "GET", "a.pt"))
    for action in (lambda store: list(store.chunks(KEY)), lambda store: store.read(KEY)):
        error, elapsed_s = took(lambda action: action(way.store(1)), action)
        assert isinstance(error, StorageError) and elapsed_s < 20


def described(data: bytes) -> fmt.Manifest:
    """The manifest of a checkpoint with this data, whose file is stored under its name."""
    return fmt.Manifest(
        run_id="r",
        attempt=1,
        step=1,
        epoch=0,
        loss=None,
        metrics={},
        world_size=1,
        lineage=((1, 1),),
        files=(
            fmt.DataFile(f"{fmt.stem(1, 1)}.pt", len(data), f"blake3:{blake3(data).hexdigest()}"),
        ),
        classes={},
        final=None,
        time="",
        host="",
        versions={},
        config_digest="",
    )


@pytest.mark.parametrize("position", [0, 5 * MB])
def test_a_bit_that_flips_on_its_way_to_us_is_caught_by_the_digest(way, position):
    data = os.urandom(20 * MB)
    way.put(data, fmt.data_key(1, 1))
    way.fault(Rule("flip_get", "GET", ".pt", first=1, argument=position))
    with pytest.raises(DamagedError, match="checksum does not match"):
        list(verified_chunks(way.store(), described(data).data))
    assert b"".join(verified_chunks(way.store(), described(data).data)) == data, (
        "the copy was whole all the time"
    )


def test_a_file_that_is_overwritten_while_it_is_read_is_told(way):
    data = os.urandom(64 * MB)
    way.put(data, fmt.data_key(1, 1))
    chunks = verified_chunks(way.store(), described(data).data)
    next(chunks)
    way.put(os.urandom(64 * MB), fmt.data_key(1, 1))
    with pytest.raises(DamagedError, match="changed while it was read"):
        list(chunks)


def test_a_file_that_has_become_shorter_while_it_is_open_is_an_error(way):
    way.put(os.urandom(2 * MB))
    store = way.store()
    with store.open(KEY) as file:
        store.limit_s = 0.5
        way.put(os.urandom(MB))
        file.seek(MB - 10)
        with pytest.raises(DamagedError, match="changed while it was read"):
            file.read(20)


def test_reading_a_whole_open_file_takes_few_requests(way):
    data = os.urandom(17 * MB)
    way.put(data)
    with way.store().open(KEY) as file:
        assert file.read(10) + file.read() == data
    assert way.requests("GET") <= 8


# --- refusals ---


REFUSALS = {
    "denied": (1, "AccessDenied", "Ask for the rights"),
    "skewed": (1, "RequestTimeTooSkewed", "Set this machine's clock"),
    # once more with credentials that were read again
    "expired": (2, "ExpiredToken", "Renew the credentials"),
}


@pytest.mark.parametrize("fault", REFUSALS)
def test_a_refusal_is_final_at_once_and_says_what_to_do(way, fault):
    way.put(b"whole")
    requests, code, remedy = REFUSALS[fault]
    for name, operation in operations(way.store(60)).items():
        way.fault(Rule(fault))
        # an answer to HEAD has no body to say why
        if name == "exists" or (fault == "expired" and name in ("delete", "write")):
            continue
        error, elapsed_s = took(operation)
        assert isinstance(error, RefusedError), name
        assert error.exit_code == 78 and elapsed_s < 30
        assert f"found: {code}" in error.found and remedy in error.remedy
        assert way.requests() == requests and len(way.troubles) == requests - 1, name
    assert way.held() == [f"run/{KEY}"]


def test_a_refusal_without_a_word_is_one_of_rights(way):
    way.fault(Rule("denied"))
    error, _ = took(lambda: way.store(60).exists(KEY))
    assert isinstance(error, RefusedError) and "Ask for the rights" in error.remedy
    assert way.requests() == 1


@pytest.mark.parametrize(
    ("method", "contains"), [("PUT", None), ("GET", "list-type"), ("DELETE", None)]
)
def test_the_probe_finds_a_right_that_is_missing(way, method, contains):
    way.fault(Rule("denied", method, contains))
    with pytest.raises(RefusedError, match="AccessDenied"):
        probe.check(way.store())


def test_a_wrong_secret_is_refused_at_once_and_never_said(way, monkeypatch):
    wrong = secrets.token_hex(20)
    for name, value in (
        ("AWS_SECRET_ACCESS_KEY", wrong),
        ("AWS_ACCESS_KEY_ID", secrets.token_hex(10)),
    ):
        monkeypatch.setenv(name, value)
        store = open_store(way.base.url, 60)
        way.fault()
        for ask in (
            lambda store=store: store.entries("attempts"),
            lambda store=store: store.create("attempts/1", b"x", 1),
        ):
            error, elapsed_s = took(ask)
            assert isinstance(error, RefusedError) and elapsed_s < 40
            assert "AWS_SECRET_ACCESS_KEY" in error.remedy
            assert not any(
                secret in str(error)
                for secret in (wrong, value, way.server.secret_key, way.server.access_key)
            )
        assert way.requests() == 2


def test_no_credentials_at_all_are_said_in_words(way, monkeypatch, tmp_path):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    error, elapsed_s = took(lambda: open_store(way.base.url, 60).entries("attempts"))
    assert isinstance(error, RefusedError) and elapsed_s < 40
    assert "AWS_ACCESS_KEY_ID" in error.remedy


def test_expired_credentials_are_read_again_from_the_environment(way, monkeypatch):
    way.put(b"whole")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", secrets.token_hex(20))
    store = open_store(way.base.url, 60)
    with pytest.raises(RefusedError):
        store.read(KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", way.server.secret_key)
    way.fault(Rule("expired", first=1))
    assert store.read(KEY) == b"whole"
    assert way.requests() == 2


@pytest.mark.slow
def test_credentials_that_expire_again_later_are_renewed_again(way):
    way.put(b"whole")
    for _ in range(2):
        way.fault(Rule("expired", first=1))
        assert way.store().read(KEY) == b"whole"


def test_credentials_that_expire_under_many_parts_at_once_are_renewed_for_all(way):
    data = os.urandom(26 * MB)
    way.fault(Rule("expired", "PUT", "partNumber", first=3))
    way.store().write(KEY, data, 1)
    assert way.stored() == data
    way.fault(Rule("expired", "GET", "a.pt", first=3))
    assert b"".join(way.store().chunks(KEY)) == data


# --- secrets ---

LEAKY = (
    "s3://user:hunter2@bucket/run",
    "s3://hunter2@bucket/run",
    "gs://user:hunter2@bucket/run",
    "s3://bucket/run?secret=hunter2",
    "s3://bucket/run#hunter2",
    "s3://user:p@hunter2@bucket/run",
    "s3://user:hunter2/x@bucket/run",
    "s3://hunter2@bucket/run?key=hunter2#hunter2",
    "gs://hunter2:@bucket/../run",
)


@pytest.mark.parametrize("url", LEAKY)
def test_a_url_with_a_secret_is_refused_without_repeating_it(url):
    with pytest.raises(UsageError) as caught:
        open_store(url)
    assert "hunter2" not in str(caught.value)
    assert "hunter2" not in redacted(url)


@pytest.mark.parametrize(
    "name", ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"]
)
def test_what_a_library_repeats_of_the_credentials_is_not_said(monkeypatch, name):
    monkeypatch.setenv(name, "hunter2hunter2")
    error = explained(
        "cannot read s3://hunter2hunter2/run", ValueError("the key hunter2hunter2 is wrong")
    )
    assert "hunter2" not in str(error) and "the key *** is wrong" in str(error)
    assert redacted("hunter2hunter2!") == "***!"


def test_an_endpoint_with_a_secret_is_not_repeated(way, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://user:hunter2@127.0.0.1:{free_ports(1)[0]}")
    store = open_store(way.base.url, 0.7)
    for ask in (lambda: store.entries("attempts"), lambda: store.create(KEY, b"x", 1)):
        error, _ = took(ask)
        assert isinstance(error, StorageError)
        assert "hunter2" not in str(error) and "Is the server up" in str(error)


# --- memory ---

MEASURED = """
import os, resource, sys
from harness.store import open_store
store, block = open_store(sys.argv[1], 60), os.urandom(1 << 20)
store.write("checkpoints/b.pt", block, 1)
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
start = peak()
with store.writer("checkpoints/a.pt", 1) as sink:
    for _ in range(200):
        sink.write(block)
    sink.commit()
up = peak()
read = sum(map(len, store.chunks("checkpoints/a.pt")))
print(up - start, peak() - start, read)
"""


@pytest.mark.slow
def test_a_large_file_is_never_held_as_a_whole(way):
    environment = ENVIRONMENT | way.server.environment
    ran = subprocess.run(
        [sys.executable, "-c", MEASURED, way.base.url],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ran.returncode == 0, ran.stderr
    up_mb, both_mb, read = map(int, ran.stdout.split())
    assert read == 200 * MB
    assert up_mb < 130 and both_mb < 170, (
        f"{up_mb} and {both_mb} MB; four parts of 8 MiB on their way, six ranges of 8 MiB ahead"
    )


# --- killed in the middle ---

UPLOADING = """
import sys
from harness.store import open_store
store = open_store(sys.argv[1], 60)
with store.writer("checkpoints/step_00000002-0001.pt", 1) as sink:
    for _ in range(40):
        sink.write(bytes(1 << 20))
    sink.commit()
"""


def kill_while_uploading(way: Way, started: Callable[..., Any], url: str) -> None:
    """SIGKILL in the middle of an upload in parts: nobody is left to abort it."""
    hold = way.proxy.hold("PUT", "partNumber=3")
    environment = way.server.environment | {"AWS_ENDPOINT_URL": way.proxy.url}
    process = started([sys.executable, "-c", UPLOADING, url], env=environment)
    assert hold.reached.wait(120)
    process.kill()
    process.wait()
    hold.release(forward=False)


class DayLater(http.server.BaseHTTPRequestHandler):
    """Passes everything on, and says that it is a day and an hour later."""

    protocol_version = "HTTP/1.1"
    upstream: tuple[str, int]

    def _pass_on(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        connection = http.client.HTTPConnection(*self.upstream)
        connection.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
        for name, value in self.headers.items():
            connection.putheader(name, value)
        connection.endheaders(body)
        answer = connection.getresponse()
        content = answer.read()
        self.send_response_only(answer.status)
        later = datetime.datetime.now(datetime.timezone.utc) + datetime.timedelta(days=1, hours=1)
        length = (
            answer.headers.get("Content-Length", "0")
            if self.command == "HEAD"
            else str(len(content))
        )
        changed = {
            "date": f"{later:%a, %d %b %Y %H:%M:%S} GMT",
            "content-length": length,
            "transfer-encoding": None,
            "connection": None,
        }
        for name, value in answer.getheaders():
            if name.lower() not in changed:
                self.send_header(name, value)
        for name, own in changed.items():
            if own is not None:
                self.send_header(name, own)
        self.end_headers()
        self.wfile.write(content)
        connection.close()

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _pass_on  # noqa: N815

    def log_message(self, format: str, *args: object) -> None:
        """Nobody reads it."""


@pytest.fixture
def a_day_later(way: Way) -> Iterator[str]:
    """The URL of the same server, but for its clock."""
    kind = type("DayLaterHere", (DayLater,), {"upstream": (way.server.host, way.server.port)})
    with http.server.ThreadingHTTPServer(("127.0.0.1", free_ports(1)[0]), kind) as proxy:
        thread = threading.Thread(target=proxy.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{proxy.server_address[1]}"
        proxy.shutdown()
        thread.join()


class ClockAhead(RemoteStore):
    """Its server's clock is so far ahead of ours."""

    ahead = datetime.timedelta(0)

    def now(self) -> datetime.datetime:
        return super().now() + self.ahead


def test_an_upload_is_found_by_prune_only_when_it_is_older_than_a_day_by_the_servers_clock(
    way, started
):
    kill_while_uploading(way, started, way.base.url)
    assert way.held() == [] and way.uploads() == ["run/checkpoints/step_00000002-0001.pt"]
    store = ClockAhead(way.base.url, S3Client(way.base.url), 60)
    found = {}
    for hours in (-48, 0, 23.9, 24.1, 1000):
        store.ahead = datetime.timedelta(hours=hours)
        found[hours] = [upload.key for upload in prune._unfinished(store)]
    key = "checkpoints/step_00000002-0001.pt"
    assert found == {-48: [], 0: [], 23.9: [], 24.1: [key], 1000: [key]}
    store.abort(prune._unfinished(store)[0])
    assert way.uploads() == []


def begin(way: Way, key: str) -> str:
    way.client.create_multipart_upload(Bucket=way.bucket, Key=key)
    return key


def test_prune_ends_old_uploads_of_this_run_and_of_no_other(way, a_day_later, monkeypatch, capsys):
    """The day is the server's: ours has not passed. Another run may lie below this one, as all runs
    do below one in the bucket's root."""
    theirs = [
        begin(way, key)
        for key in (
            "run2/checkpoints/a.pt",
            "ru/a",
            "run",
            "another/run/checkpoints/a.pt",
            "run/deeper/checkpoints/step_00000002-0001.pt",
            "run/checkpoints/theirs.pt",
            "run/data.tar",
        )
    ]
    ours = [
        begin(way, key) for key in ("run/checkpoints/step_00000002-0001.pt", "run/files/deeper/a")
    ]
    way.put(b"{}", "attempts/0001.json")
    assert cli.main(["prune", way.base.url, "--yes"]) == 0
    assert capsys.readouterr().out == "nothing to delete\n"
    monkeypatch.setenv("AWS_ENDPOINT_URL", a_day_later)
    assert cli.main(["prune", way.base.url]) == 0
    assert capsys.readouterr().out.count("would abort  the upload of") == 2
    assert sorted(way.uploads()) == sorted(ours + theirs)
    assert cli.main(["prune", way.base.url, "--yes"]) == 0
    assert capsys.readouterr().out.count("abort  the upload of") == 2
    assert sorted(way.uploads()) == sorted(theirs)
    assert way.held() == ["run/attempts/0001.json"]


class IgnoresPrefix(S3Client):
    """A server that lists the uploads of the whole bucket, whatever it is asked for."""

    def _call(self, limit_s: float, method: str, **arguments: Any) -> dict[str, Any]:
        if method == "list_multipart_uploads":
            del arguments["Prefix"]
        return super()._call(limit_s, method, **arguments)


def test_uploads_of_others_are_not_taken_for_ours_where_the_server_names_them_too(way):
    for key in ("run/checkpoints/a.pt", "run2/checkpoints/a.pt", "a"):
        begin(way, key)
    store = RemoteStore(way.base.url, IgnoresPrefix(way.base.url), 60)
    assert [upload.key for upload in store.unfinished()] == ["checkpoints/a.pt"]


def test_an_upload_that_goes_on_elsewhere_is_not_disturbed_by_others(way):
    """A second store on the same prefix begins, fails and sweeps while the first one uploads."""
    data, hold = os.urandom(17 * MB), way.proxy.hold("PUT", "partNumber=2")
    other = open_store(way.base.url, 60)
    with ThreadPoolExecutor(1) as pool:
        writing = pool.submit(way.store().write, KEY, data, 1)
        assert hold.reached.wait(60)
        with pytest.raises(ZeroDivisionError), other.writer(KEY, 2) as sink:
            sink.write(os.urandom(9 * MB))
            raise ZeroDivisionError
        assert other.sweep(fmt.FOLDERS, 99) == []
        hold.release()
        writing.result()
    assert way.stored() == data
    wait_until(lambda: way.uploads() == [], "no upload is left")


def test_a_patient_twin_tells_the_same_listener_and_leaves_its_origin_alone(way):
    way.put(b"whole")
    store = way.store()
    twin: Store = store.with_retry_limit(0.3)
    way.fault(Rule("503"))
    error, elapsed_s = took(lambda: twin.read(KEY))
    assert isinstance(error, StorageError) and elapsed_s < 15
    way.fault(Rule("503", first=2))
    assert store.read(KEY) == b"whole" and len(way.troubles) == 2
