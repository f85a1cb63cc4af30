"""Check the directory, the bucket, their speed and the agreement of all ranks before a long run.

The arguments are those of `launch`, or the directory and the URL of a run. Under torchrun the ranks
are compared, too. All files that the checks create are deleted.

Exit code, that of the first failure: 0 no failure (warnings do not count) · 78 something must be
fixed · 74 a store cannot be reached or fails.

example: harness doctor --config configs/digits.yaml run.dir=runs/a run.remote=s3://bucket/a
example: harness doctor s3://bucket/a --size-mb 2000
example: torchrun --nproc-per-node 2 -m harness doctor runs/a s3://bucket/a
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import math
import os
import platform
import secrets
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from harness import config
from harness.checkpoint.catalog import read_catalog
from harness.cli import locate
from harness.config import Config
from harness.distributed import join
from harness.errors import EXIT_USAGE, HarnessError, StorageError, UsageError
from harness.store import CHUNK_BYTES, LocalStore, Store, is_url, open_store, probe
from harness.store.remote import RemoteStore
from harness.text import duration, say, size

SAMPLE_MB = 64  # size of the sample, and of a checkpoint if nothing better is known
# S3 refuses requests whose time is more than 15 minutes off.
SKEW_WARN_S, SKEW_FAIL_S = 60.0, 900.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `harness doctor`."""
    parser.add_argument("--config", help="YAML file, relative to the working directory")
    parser.add_argument(
        "--size-mb",
        type=float,
        help="how large a checkpoint will be; else as in the run so far, else a guess",
    )
    parser.add_argument(
        "given",
        nargs="*",
        metavar="RUN | key=value",
        help="the run's directory and URL, and settings",
    )


@dataclass(frozen=True)
class Finding:
    """One line of the report, and the exit code of the command that it causes."""

    text: str
    code: int = 0
    warning: bool = False

    def __str__(self) -> str:
        return f"{'FAIL' if self.code else 'WARN' if self.warning else 'ok  '}  {self.text}"


def run(given: argparse.Namespace) -> int:
    """Print the findings of all checks; return the exit code of the first failure, else 0.

    Under torchrun the command is collective: every rank must run it.
    """
    settings = _settings(given)
    stores: list[Store] = [LocalStore(settings.run.dir)] if settings.run.dir else []
    stores += [open_store(settings.run.remote, locate.WAIT_S)] if settings.run.remote else []
    world = join.join(120.0) if "RANK" in os.environ else None
    worst = 0

    def report(findings: Iterator[Finding]) -> int:
        nonlocal worst
        for finding in findings:
            say(str(finding))
            worst = worst or finding.code
        return worst

    def examine() -> int:
        size_bytes = _size(stores, given.size_mb)
        report(iter([_software(), Finding(f"a checkpoint is taken to have {size(size_bytes)}")]))
        for store in stores:
            report(_examine(store, settings, size_bytes))
        return worst

    if world is None:
        return examine()
    world.on_writer(examine)
    mark = world.on_writer(lambda: _mark(stores))
    shared = (
        {
            "the run directory, what rank 0 wrote there": "seen"
            if Path(mark).exists()
            else "not seen"
        }
        if mark
        else {}
    )
    facts = world.gather(_facts(settings, stores) | shared)
    code = world.on_writer(lambda: report(_compare(facts)))
    if world.is_writer and mark:
        Path(mark).unlink()
    world.leave()
    return code


def _settings(given: argparse.Namespace) -> Config:
    """Return the settings; a RUN argument sets `run.dir`, or `run.remote` if it is a URL.

    If only a URL is given, `run.dir` is null. Raises UsageError.
    """
    places = [text for text in given.given if "=" not in text]
    named = {"run.remote" if is_url(text) else "run.dir": text for text in places}
    if places and "run.dir" not in named:
        named["run.dir"] = "null"
    lines = [f"{name}={text}" for name, text in named.items()] + [
        text for text in given.given if "=" in text
    ]
    return config.load(given.config, lines)[0]


def _size(stores: list[Store], size_mb: float | None) -> int:
    """Return the expected size of a checkpoint in bytes.

    The size comes from the command line, else from the run's newest checkpoint; else it is a guess.
    """
    if size_mb is not None:
        if not 0 < size_mb < math.inf:
            raise UsageError("--size-mb is no size", f"found: {size_mb}", "Such as 500.")
        return int(size_mb * 1e6)
    for store in stores:
        try:
            if head := read_catalog(store).head:
                return head.size_bytes
        except StorageError:  # the checks of this store will report it
            continue
    return SAMPLE_MB * 1_000_000


def _software() -> Finding:
    return Finding(
        f"Python {platform.python_version()}, torch {torch.__version__}, "
        f"{torch.cuda.device_count()} GPU(s) visible"
    )


def _examine(store: Store, settings: Config, size_bytes: int) -> Iterator[Finding]:
    """Check one store, in the order in which a run uses it, and yield the findings.

    The first error that a check raises is the last finding.
    """
    place, made = _scratch(store)
    key = probe.new_key()
    try:
        for name, check in probe.checks(place, key):
            check()
            yield Finding(f"{store}: {name}")
        if isinstance(place, RemoteStore):
            yield _clock(place)
        yield from _speed(store, place, settings, size_bytes)
        if isinstance(store, LocalStore):
            yield _room(store, settings, size_bytes)
    except HarnessError as error:
        with contextlib.suppress(StorageError):
            place.with_retry_limit(0).delete(key)
        yield Finding("\n      ".join(str(error).split("\n")), error.exit_code)
    except OSError as error:
        yield Finding(f"{store}: {error}", EXIT_USAGE)
    finally:
        if made is not None:
            shutil.rmtree(made, ignore_errors=True)


def _nearest(store: LocalStore) -> Path:
    """Return the run's directory or, if it does not exist yet, its nearest existing parent."""
    return next(path for path in (store.root, *store.root.parents) if path.is_dir())


def _scratch(store: Store) -> tuple[Store, Path | None]:
    """Return a store to test, and the directory to delete afterwards, or None.

    A remote store is tested itself. For a local one, a temporary directory is created in the run's
    directory, or in its nearest existing parent.
    """
    if not isinstance(store, LocalStore):
        return store, None
    parent = _nearest(store)
    place = LocalStore(parent / f".harness-doctor-{secrets.token_hex(4)}")
    try:
        place.prepare((probe.FOLDER,))
    except StorageError:  # the first check will report it
        return place, None
    return place, place.root


def _mark(stores: list[Store]) -> str:
    """Create an empty file if the ranks must share the run directory; return its path, or "".

    They must share it if the run has no remote store.
    """
    if len(stores) > 1 or not isinstance(stores[0], LocalStore):
        return ""
    parent = _nearest(stores[0])
    mark = parent / f".harness-doctor-{secrets.token_hex(4)}"
    try:
        mark.touch()
    except OSError:  # a check has reported it
        return ""
    return str(mark)


def _clock(store: RemoteStore) -> Finding:
    """Compare this machine's clock with the server's; S3 refuses requests with a wrong time."""
    offset_s = (datetime.datetime.now(datetime.timezone.utc) - store.now()).total_seconds()
    text = (
        f"{store}: this machine's clock is {abs(offset_s):.0f} s "
        f"{'ahead of' if offset_s > 0 else 'behind'} the server's"
    )
    return Finding(
        text, EXIT_USAGE if abs(offset_s) > SKEW_FAIL_S else 0, warning=abs(offset_s) > SKEW_WARN_S
    )


def _speed(store: Store, place: Store, settings: Config, size_bytes: int) -> Iterator[Finding]:
    """Write, read and delete a sample in the same way as a checkpoint, and yield the speeds.

    A sample is uploaded to a bucket in parts, and written durably to a disk.
    """
    key, sample = probe.new_key(), os.urandom(CHUNK_BYTES)
    # At least 5 chunks, so that an upload has more than one part.
    count = max(5, min(size_bytes, SAMPLE_MB * 1_000_000) // CHUNK_BYTES)
    began = time.monotonic()
    try:
        with place.writer(key, 0) as sink:
            sink.expect(count * CHUNK_BYTES)
            for _ in range(count):
                sink.write(sample)
            sink.commit()
        rate = count * CHUNK_BYTES / (time.monotonic() - began)
        began = time.monotonic()
        read = sum(len(chunk) for chunk in place.chunks(key))
        back = read / (time.monotonic() - began)
    finally:
        place.delete(key)
    verb = "write" if store.is_local else "upload in parts"
    takes_s = size_bytes / rate
    yield Finding(
        f"{store}: {verb}: {size(rate)}/s, read: {size(back)}/s; "
        f"a checkpoint takes about {max(takes_s, 0.1):.1f} s"
    )
    every_s = settings.checkpoint.every_s
    if every_s not in (None, "auto") and takes_s > every_s:
        text = (
            f"{store}: a checkpoint every {duration(every_s)} is more than it can take; "
            "some will be left out"
        )
        yield Finding(text, warning=True)


def _room(store: LocalStore, settings: Config, size_bytes: int) -> Finding:
    """Compare the free disk space with the size of the checkpoints that retention keeps."""
    parent = _nearest(store)
    # The 1 is for the checkpoint that is being written.
    kept = max(settings.checkpoint.keep_last, 2) + settings.checkpoint.keep_best + 1
    free = shutil.disk_usage(parent).free
    text = f"{store}: {size(free)} free, {kept} checkpoints take {size(kept * size_bytes)}"
    if settings.checkpoint.keep_every_steps:
        text += ", and those of checkpoint.keep_every_steps come on top"
    if free < kept * size_bytes:
        return Finding(
            f"{text}: keep fewer (checkpoint.keep_last), or take another run.dir", EXIT_USAGE
        )
    return Finding(text, warning=free < 2 * kept * size_bytes)


def _facts(settings: Config, stores: list[Store]) -> dict[str, str]:
    """Describe in text what must be equal on all ranks."""
    comparable = replace(settings, run=replace(settings.run, dir=None))
    facts = {
        "Python": platform.python_version(),
        "torch": torch.__version__,
        "settings": repr(comparable),
    }
    facts["GPU"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    for store in stores:
        try:
            catalog = read_catalog(store)
            facts[f"what is in {store}"] = (
                f"attempt {catalog.greatest}, "
                f"{catalog.head.name if catalog.head else 'no checkpoint'}"
            )
        except StorageError as error:
            facts[f"what is in {store}"] = error.what
    return facts


def _compare(facts: list[dict[str, str]]) -> Iterator[Finding]:
    """Yield for each fact whether all ranks agree on it."""
    for name in facts[0]:
        values = [own.get(name, "nothing") for own in facts]
        if len(set(values)) == 1:
            yield Finding(f"{len(facts)} ranks agree on {name}")
        else:
            other = next(rank for rank, value in enumerate(values) if value != values[0])
            yield Finding(
                f"the ranks differ in {name}: rank 0 has {values[0][:200]}, "
                f"rank {other} has {values[other][:200]}",
                EXIT_USAGE,
            )
