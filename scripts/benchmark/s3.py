"""How soon a checkpoint is whole in a bucket: a real S3 server on this machine, fresh for each
sample, and raw clients beside it.

A client is given a file of the same size, which is in memory; for the harness the time begins with
the step boundary.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from benchmark.bench import Bench
from benchmark.findings import HARNESS, Finding, ratios

ROW, BUCKET = "s3", "bench"
CLIENTS = ("s3fs put", "boto3 upload_file", "obstore put")


def measure(bench: Bench) -> list[Finding]:
    size_bytes = bench.sample("saves", "size", size_mb=bench.size_mb)
    taken = bench.turns(
        {
            HARNESS: partial(bench.sample, "s3", "by_harness", size_mb=bench.size_mb),
            **{
                name: partial(bench.sample, "s3", "by_client", name=name, size_bytes=size_bytes)
                for name in CLIENTS
            },
        }
    )
    took = {who: [sample["seconds"] for sample in samples] for who, samples in taken.items()}
    found = [
        Finding(ROW, "until it is whole in S3", who, "s", tuple(times))
        for who, times in took.items()
    ]
    clients = {who: times for who, times in took.items() if who != HARNESS}
    if HARNESS in took and clients:
        # one for all turns: the least of several is too lucky
        best = min(clients, key=lambda who: median(clients[who]))
        what = f"until it is whole in S3 over the fastest raw client's ({best})"
        found.append(
            Finding(ROW, what, HARNESS, "x", ratios(took[HARNESS], clients[best]), most=1.1)
        )
    return found


# From here on: what runs in a sample's own process.


@contextlib.contextmanager
def _server(folder: str) -> Iterator[Any]:
    """A fresh S3 server with a bucket; this process's environment leads to it."""
    sys.path.insert(0, str(Path(__file__).parents[2] / "tests/support"))
    from s3_server import S3Server

    server = S3Server(Path(folder, "server")).start()
    try:
        server.make_bucket(BUCKET)
        os.environ.update(server.environment)
        yield server
    finally:
        server.kill()


def by_client(folder: str, name: str, size_bytes: int) -> dict[str, float]:
    from benchmark import disk

    path = Path(folder, "checkpoint.pt")
    block = os.urandom(disk.BLOCK_BYTES)
    with path.open("wb") as file:
        for at in range(0, size_bytes, len(block)):
            file.write(block[: size_bytes - at])
    with _server(folder) as server:
        put = {"s3fs put": _s3fs, "boto3 upload_file": _boto3, "obstore put": _obstore}[name](
            server
        )
        os.sync()
        began_at = time.perf_counter()
        put(path)
        took_s = time.perf_counter() - began_at
        found = server.client().head_object(Bucket=BUCKET, Key="checkpoint.pt")["ContentLength"]
    if found != size_bytes:
        raise RuntimeError(f"{name} uploaded {found} of {size_bytes} bytes")
    return {"seconds": took_s}


def _s3fs(server: Any) -> Any:
    import s3fs

    store = s3fs.S3FileSystem()
    store.ls(BUCKET)
    return lambda path: store.put(str(path), f"{BUCKET}/checkpoint.pt")


def _boto3(server: Any) -> Any:
    import boto3

    client = boto3.client("s3")
    client.list_objects_v2(Bucket=BUCKET)
    return lambda path: client.upload_file(str(path), BUCKET, "checkpoint.pt")


def _obstore(server: Any) -> Any:
    import obstore
    from obstore.store import S3Store

    store = S3Store(
        BUCKET,
        endpoint=server.url,
        region=server.environment["AWS_DEFAULT_REGION"],
        client_options={"allow_http": True},
        access_key_id=server.access_key,
        secret_access_key=server.secret_key,
        virtual_hosted_style_request=False,
    )
    list(store.list())
    return lambda path: obstore.put(store, "checkpoint.pt", path)


def by_harness(folder: str, size_mb: int) -> dict[str, float]:
    """From the boundary until the manifest is in the bucket; the data is there before it. The
    second save counts: the first allocates, and makes the connections, as those who are measured
    beside it did before."""
    import harness
    from benchmark import workload

    with _server(folder) as server:
        work = workload.build(size_mb)
        work.settle()
        run = harness.init(
            Path(folder, "run"),
            remote=f"s3://{BUCKET}/run",
            save_every_s=None,
            save_every_steps=1,
            keep_last=1,
        )
        small = work.track(run)
        batches: Any = run.batches(work.dataset, 1, epochs=100)
        events, took_s = Path(folder, "run/events/0001.jsonl"), 0.0
        for made in range(3):
            os.sync()
            began_at = time.perf_counter()
            (tokens,) = next(batches)
            small.step()  # until the next update a checkpoint is not committed
            while made and not _is_told(events, f"step_{made:08d}-0001"):
                time.sleep(0.03)
            took_s = time.perf_counter() - began_at
            work.forward_backward(tokens)
            work.optimizer.step()
        batches.close()
        server.client().head_object(Bucket=BUCKET, Key="run/checkpoints/step_00000002-0001.json")
    return {"seconds": took_s}


def _is_told(events: Path, name: str) -> bool:
    """Whether the run has recorded that a checkpoint is there, manifest and all: to ask the server
    takes its time."""
    # the time that looking takes is taken from the upload
    last = events.read_text().splitlines()[-3:]
    return any(
        event["event"] == "uploaded" and event["checkpoint"] == name
        for event in map(json.loads, last)
    )
