"""The proxy itself: unnoticed without a fault, and every fault is what it says. Without this, a
storm that passes says nothing."""

from __future__ import annotations

import hashlib
import random
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from fault_proxy import ERRORS, FAULTS, FaultProxy, Rule
from s3_server import S3Server

botocore = pytest.importorskip("botocore", reason="no S3 client: botocore is not installed")
from botocore.exceptions import BotoCoreError, ClientError  # noqa: E402

LARGE = 64 << 20


pytestmark = pytest.mark.slow  # of what other tests are made with, not of the harness


@pytest.fixture
def proxied(bucket: tuple[S3Server, str]) -> Iterator[tuple[FaultProxy, Any, Any, str]]:
    """A proxy before the shared server; a client that goes through it, one that does not, and a
    bucket."""
    server, name = bucket
    with FaultProxy(server.host, server.port) as proxy:
        yield proxy, server.client(proxy.url, read_timeout=5), server.client(), name


def stored(direct: Any, bucket: str, key: str) -> bytes | None:
    try:
        return direct.get_object(Bucket=bucket, Key=key)["Body"].read()
    except ClientError:
        return None


def outcome(action: Callable[..., Any], *arguments: object) -> Any:
    """What came of it: a result, a (status, code), or the kind of broken connection."""
    try:
        return action(*arguments)
    except ClientError as error:
        return error.response["ResponseMetadata"]["HTTPStatusCode"], error.response["Error"]["Code"]
    except (BotoCoreError, OSError) as error:
        return type(error).__name__


def test_unnoticed_by_s3fs(bucket: tuple[S3Server, str]) -> None:
    """Single puts, an upload in parts, ranges, listings and deletions come through as they are."""
    s3fs = pytest.importorskip("s3fs", reason="no S3 client: s3fs is not installed")
    server, name = bucket
    with FaultProxy(server.host, server.port) as proxy:
        options = {
            "endpoint_url": proxy.url,
            "key": server.access_key,
            "secret": server.secret_key,
            "skip_instance_cache": True,
        }
        remote = s3fs.S3FileSystem(use_listings_cache=False, **options)
        for size, part in ((0, None), (1, None), (9_000_000, None), (40_000_000, 5 << 20)):
            data = random.Random(size).randbytes(size)
            remote.pipe_file(f"{name}/a b/{size}", data, **({"chunksize": part} if part else {}))
            assert (
                hashlib.sha256(remote.cat_file(f"{name}/a b/{size}")).digest()
                == hashlib.sha256(data).digest()
            )
            assert remote.info(f"{name}/a b/{size}")["size"] == size
            if size > 1:
                assert (
                    remote.cat_file(f"{name}/a b/{size}", start=size // 3, end=size // 2)
                    == data[size // 3 : size // 2]
                )
        assert len(remote.ls(f"{name}/a b")) == 4
        remote.rm(f"{name}/a b", recursive=True)
        assert remote.find(name) == []
        seen = proxy.requests
    assert {request.method for request in seen} >= {"GET", "PUT", "POST", "HEAD"}
    assert sum("partNumber" in request.query for request in seen) >= 8
    assert all(request.fault is None and request.status and request.forwarded for request in seen)


def test_large_bodies_and_one_connection(proxied: tuple[FaultProxy, Any, Any, str]) -> None:
    """64 MiB both ways, answers without a body, and refusals, one after the other on connections
    that are kept."""
    proxy, client, direct, name = proxied
    data = random.Random(0).randbytes(LARGE)
    client.put_object(Bucket=name, Key="k", Body=data)
    assert stored(direct, name, "k") == data
    assert client.get_object(Bucket=name, Key="k")["Body"].read() == data
    for _ in range(3):
        assert client.head_object(Bucket=name, Key="k")["ContentLength"] == LARGE
        assert outcome(lambda: client.head_object(Bucket=name, Key="none")) == (404, "404")
        assert outcome(
            lambda: client.put_object(Bucket=name, Key="k", Body=data, IfNoneMatch="*")
        ) == (412, "PreconditionFailed")
        client.delete_object(Bucket=name, Key="none")
    assert [request.status for request in proxy.requests] == [200, 200, *[200, 404, 412, 204] * 3]


@pytest.mark.parametrize("fault", sorted(set(ERRORS) - {"200_error"}))
def test_refusals(proxied: tuple[FaultProxy, Any, Any, str], fault: str) -> None:
    """The answer is the service's own, nothing reaches the server, and the next request is
    served."""
    proxy, client, direct, name = proxied
    proxy.rules.append(Rule(fault, method="PUT", contains="/k", first=1, after=1))
    client.put_object(Bucket=name, Key="other", Body=b"1")
    client.put_object(Bucket=name, Key="k1", Body=b"1")
    assert (
        outcome(lambda: client.put_object(Bucket=name, Key="k2", Body=b"1" * 100_000))
        == ERRORS[fault][:2]
    )
    client.put_object(Bucket=name, Key="k3", Body=b"1")
    assert [stored(direct, name, key) for key in ("k1", "k2", "k3")] == [b"1", None, b"1"]
    assert [(r.fault, r.forwarded) for r in proxy.requests] == [
        (None, True),
        (None, True),
        (fault, False),
        (None, True),
    ]


def test_broken_connections(proxied: tuple[FaultProxy, Any, Any, str]) -> None:
    """Before the request, after it, and in the middle of the answer."""
    proxy, client, direct, name = proxied
    data = random.Random(1).randbytes(1_000_000)
    proxy.rules[:] = [
        Rule("reset_before", contains="/before"),
        Rule("drop_response", contains="/drop", first=1),
    ]
    assert (
        outcome(lambda: client.put_object(Bucket=name, Key="before", Body=data))
        == "ConnectionClosedError"
    )
    assert (
        outcome(lambda: client.put_object(Bucket=name, Key="drop", Body=data))
        == "ConnectionClosedError"
    )
    assert (stored(direct, name, "before"), stored(direct, name, "drop")) == (None, data)
    assert client.get_object(Bucket=name, Key="drop")["Body"].read() == data
    got = []
    for fault in ("reset_body", "truncate"):
        proxy.rules[:] = [Rule(fault, "GET")]
        body = client.get_object(Bucket=name, Key="drop")["Body"]
        got.append(outcome(body.read))
    assert got == ["ResponseStreamingError", "ResponseStreamingError"] or set(got) <= {
        "ResponseStreamingError",
        "IncompleteReadError",
    }, got
    assert [r.fault for r in proxy.requests] == [
        "reset_before",
        "drop_response",
        None,
        "reset_body",
        "truncate",
    ]


def test_flipped_bits(proxied: tuple[FaultProxy, Any, Any, str]) -> None:
    """Exactly one bit, there and back; the server notices it on the way there, by the client's
    checksum."""
    proxy, client, direct, name = proxied
    data = random.Random(2).randbytes(100_000)
    direct.put_object(Bucket=name, Key="k", Body=data)
    proxy.rules[:] = [
        Rule("flip_get", first=1),
        Rule("flip_get", first=1, argument=7),
        Rule("flip_put"),
    ]
    for position in (50_000, 7):
        body = client.get_object(Bucket=name, Key="k", ChecksumMode="DISABLED")["Body"].read()
        assert [at for at in range(len(data)) if body[at] != data[at]] == [position]
        assert body[position] ^ data[position] == 1
    status, code = outcome(lambda: client.put_object(Bucket=name, Key="flipped", Body=data))
    assert status == 400 and code in ("BadDigest", "XAmzContentSHA256Mismatch"), code
    assert stored(direct, name, "flipped") is None
    assert [r.fault for r in proxy.requests] == ["flip_get", "flip_get", "flip_put"]


def test_an_error_that_looks_like_success(proxied: tuple[FaultProxy, Any, Any, str]) -> None:
    """S3 may say 200 to the completion of an upload, and only then that it failed."""
    proxy, client, direct, name = proxied
    upload = client.create_multipart_upload(Bucket=name, Key="k")["UploadId"]
    part = client.upload_part(Bucket=name, Key="k", UploadId=upload, PartNumber=1, Body=b"part")
    parts = {"Parts": [{"PartNumber": 1, "ETag": part["ETag"]}]}
    proxy.rules.append(Rule("200_error", first=1))
    assert (
        outcome(
            lambda: client.complete_multipart_upload(
                Bucket=name, Key="k", UploadId=upload, MultipartUpload=parts
            )
        )[1]
        == "InternalError"
    )
    assert (proxy.requests[-1].status, stored(direct, name, "k")) == (200, None)
    client.complete_multipart_upload(Bucket=name, Key="k", UploadId=upload, MultipartUpload=parts)
    assert stored(direct, name, "k") == b"part"


def test_slow_and_silent(
    proxied: tuple[FaultProxy, Any, Any, str], bucket: tuple[S3Server, str]
) -> None:
    proxy, client, _, name = proxied
    impatient = bucket[0].client(proxy.url, read_timeout=0.5)
    proxy.rules[:] = [Rule("delay", first=1, argument=0.7), Rule("stall", first=2)]
    began = time.monotonic()
    client.put_object(Bucket=name, Key="k", Body=b"1")
    assert 0.7 <= time.monotonic() - began < 30
    assert outcome(lambda: impatient.list_buckets()) == "ReadTimeoutError"
    threading.Timer(0.3, proxy.release_stalled).start()
    assert outcome(lambda: client.list_buckets()) == "ConnectionClosedError"
    client.list_buckets()
    assert [(r.fault, r.status) for r in proxy.requests] == [
        ("delay", 200),
        ("stall", None),
        ("stall", None),
        (None, 200),
    ]


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("forward", [False, True])
def test_hold(proxied: tuple[FaultProxy, Any, Any, str], after: bool, forward: bool) -> None:
    """Held before the server sees it, or after it was done; then let go, or dropped."""
    proxy, client, direct, name = proxied
    hold = proxy.hold("PUT", "/k", after=after)
    results: list[Any] = []
    writer = threading.Thread(
        target=lambda: results.append(
            outcome(lambda: client.put_object(Bucket=name, Key="k", Body=b"1"))
        )
    )
    writer.start()
    assert hold.reached.wait(10) and hold.request is not None and hold.request.method == "PUT"
    client.put_object(Bucket=name, Key="other", Body=b"2")
    assert stored(direct, name, "k") == (b"1" if after else None) and not results
    hold.release(forward)
    writer.join(10)
    assert (results == ["ConnectionClosedError"]) is not forward
    assert stored(direct, name, "k") == (b"1" if after or forward else None)


def test_down_and_up(proxied: tuple[FaultProxy, Any, Any, str]) -> None:
    proxy, client, _, _ = proxied
    client.list_buckets()
    held = proxy.pause()
    results: list[Any] = []
    waiting = threading.Thread(
        target=lambda: results.append(outcome(lambda: client.list_buckets()))
    )
    waiting.start()
    assert held.reached.wait(10)
    proxy.down()
    waiting.join(10)
    assert results[0] in ("ConnectionClosedError", "EndpointConnectionError")
    assert outcome(lambda: client.list_buckets()) == "EndpointConnectionError"
    held.release(forward=False)
    proxy.up()
    client.list_buckets()


def test_storm_is_the_same_again(proxied: tuple[FaultProxy, Any, Any, str]) -> None:
    proxy, client, _, name = proxied

    def weather(seed: int) -> list[str | None]:
        proxy.clear()
        proxy.storm(
            seed, 0.5, [fault for fault in FAULTS if fault != "stall"], longest_delay_s=0.01
        )
        for turn in range(20):
            key = f"k{turn}"
            outcome(lambda key: client.put_object(Bucket=name, Key=key, Body=b"12345"), key)
            outcome(lambda key: client.get_object(Bucket=name, Key=key)["Body"].read(), key)
        return [request.fault for request in proxy.requests]

    first, again, other = weather(1), weather(1), weather(2)
    assert first == again != other
    assert 10 <= sum(fault is not None for fault in first) <= 30
    proxy.calm()
    client.list_buckets()


def test_server_that_is_killed_and_paused(own_s3_server: S3Server) -> None:
    """The server comes back on its port with all it had said yes to; the proxy needs not be
    told."""
    server = own_s3_server
    server.make_bucket("kept")
    with FaultProxy(server.host, server.port) as proxy:
        client = server.client(proxy.url, read_timeout=1)
        for turn in range(3):
            client.put_object(Bucket="kept", Key=f"k{turn}", Body=b"%d" % turn * 100_000)
            server.kill()
            assert outcome(lambda: client.list_buckets()) == "ConnectionClosedError"
            server.start()
            assert [stored(client, "kept", f"k{n}") for n in range(turn + 1)] == [
                b"%d" % n * 100_000 for n in range(turn + 1)
            ]
        server.pause()
        assert outcome(lambda: client.list_buckets()) == "ReadTimeoutError"
        server.resume()
        client.list_buckets()
