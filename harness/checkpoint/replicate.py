"""Copy checkpoints from one of a run's stores to the other, and select those to copy."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence

from harness.checkpoint import format as fmt
from harness.checkpoint import load, retention
from harness.checkpoint.attempts import Attempt, check_fence
from harness.checkpoint.catalog import Catalog
from harness.checkpoint.format import DataFile, Manifest
from harness.checkpoint.retention import Policy
from harness.errors import DamagedError, StorageError
from harness.store import Sink, Store

FLUSH_BYTES = 64 << 20


def wanted(history: Sequence[Manifest], there: Collection[str], policy: Policy) -> list[Manifest]:
    """Return the checkpoints still to be copied: the newest, then the best, then every n-th.

    The last checkpoint of a finished run comes last. With it the run counts as finished, so that no
    later start would copy the others. A checkpoint that was overtaken while the other store was
    unreachable is not copied.

    Args:
        history: Checkpoints of the source store.
        there: Names of the checkpoints that the target store has.
        policy: Retention policy, which defines the best and the n-th checkpoints.
    """
    newest_first = sorted(history, key=lambda m: m.order, reverse=True)
    urgent = newest_first[:1] + retention.best(newest_first, policy)[: policy.best]
    urgent += [m for m in newest_first if policy.every_steps and m.step % policy.every_steps == 0]
    missing = list({m.name: m for m in urgent if m.name not in there}.values())
    final = [m.name for m in newest_first[:1] if m.final is not None]
    return sorted(missing, key=lambda m: m.name in final)


def arrived(catalog: Catalog) -> list[str]:
    """Return the names of the history's checkpoints that the last store has whole and unmarked."""
    target, marked = catalog.stores[-1], catalog.parts[-1].marked
    return [
        m.name for m in catalog.history if m.key not in marked and target in catalog.whole_copies(m)
    ]


def replicate(source: Store, manifest: Manifest, target: Store, attempt: Attempt) -> None:
    """Commit the same checkpoint, byte for byte, in another store.

    Shards that other ranks have sent from machines of their own are there already.

    Args:
        source: Store that holds the checkpoint.
        manifest: Manifest of the checkpoint.
        target: Store that receives the copy.
        attempt: Attempt that writes the copy.

    Raises:
        The same errors as `send`.
    """

    def committed() -> Manifest:
        folder = fmt.folder_key(manifest.step, manifest.attempt)
        there = {entry.key: entry.size_bytes for entry in target.entries(folder)}
        for shard in manifest.shards:
            if there.get(shard.key) != shard.size_bytes or source.exists(shard.key):
                send_shard(source, shard, target, attempt)
        return manifest

    send(source, manifest.data_key, manifest.data.size_bytes, (), committed, target, attempt)


def send_shard(
    source: Store,
    file: DataFile,
    target: Store,
    attempt: Attempt,
    sent: Callable[[], object] = lambda: None,
) -> None:
    """Copy one shard of a checkpoint to another store.

    Args:
        source: Store that holds the shard.
        file: Entry of the shard in the manifest.
        target: Store that receives the copy.
        attempt: Attempt that writes the copy.
        sent: Called whenever `target` has taken a part of the data.

    Raises:
        DamagedError: The sent data does not match the manifest.
        StorageError: A store fails.
    """
    target.make_folder(file.key.rpartition("/")[0])
    with target.writer(file.key, attempt.number) as sink:
        sink.expect(file.size_bytes)
        _write(sink, load.chunks(source, file.key), sent)
        load.compare(sink.size_bytes, sink.digest(), file, file.key)
        sink.commit()


def send(
    source: Store,
    key: str,
    size_bytes: int,
    early: Iterable[bytes],
    committed: Callable[[], Manifest | None],
    target: Store,
    attempt: Attempt,
    sent: Callable[[], object] = lambda: None,
) -> Manifest | None:
    """Commit a byte-for-byte copy of a checkpoint of `source` in another store, manifest last.

    The copy may begin before the checkpoint is committed in `source`. After an error no checkpoint
    appears in `target`. The mark of an earlier, damaged copy is lifted.

    Args:
        source: Store that holds the checkpoint, or will hold it.
        key: Key of its data file.
        size_bytes: Size of the data file.
        early: First bytes of the data file, from another place than `source`.
        committed: Waits for the manifest, and until `target` has the shards; returns None if the
            checkpoint will not be committed.
        target: Store that receives the copy.
        attempt: Attempt that writes the copy.
        sent: Called whenever `target` has taken a part of the data.

    Returns:
        The manifest, or None if `committed` has returned None; then `target` receives nothing.

    Raises:
        DamagedError: The sent data does not match the manifest.
        SupersededError: `target` shows a newer attempt.
        StorageError: A store fails.
    """
    check_fence(target, attempt)
    with target.writer(key, attempt.number) as sink:
        sink.expect(size_bytes)
        _write(sink, early, sent)
        if (manifest := committed()) is None:
            return None
        if sink.size_bytes != manifest.data.size_bytes:
            _write(sink, load.chunks(source, key, sink.size_bytes), sent)
        load.compare(sink.size_bytes, sink.digest(), manifest.data, key)
        sink.commit()
    # If this raises, the data stays: a successor may rely on the same data by now.
    check_fence(target, attempt)
    _create_manifest(manifest, target, attempt)
    # Last: until the whole copy is there, an earlier, damaged one stays marked.
    target.lift_mark(manifest.key)
    return manifest


def _write(sink: Sink, chunks: Iterable[bytes], sent: Callable[[], object]) -> None:
    """Write the chunks, and tell of each one that was taken.

    A disk takes much more than it has written. What was taken is flushed now and then, so that it
    is progress of the disk, and the flush at the end is a short one.
    """
    for chunk in chunks:
        before = sink.size_bytes
        sink.write(chunk)
        if before // FLUSH_BYTES != sink.size_bytes // FLUSH_BYTES:
            sink.make_durable()
        sent()


def _create_manifest(manifest: Manifest, target: Store, attempt: Attempt) -> None:
    """Create the manifest in a store that may have it.

    Raises DamagedError if the store has another one, StorageError if the store fails.
    """
    text = fmt.to_bytes(manifest)
    try:
        target.create(manifest.key, text, attempt.number)
    except FileExistsError:
        try:
            is_same = target.read(manifest.key) == text
        except FileNotFoundError as error:  # another process creates and deletes it
            raise StorageError(f"cannot create {target.where(manifest.key)}", str(error)) from error
        if not is_same:
            raise DamagedError(
                f"{target} has another checkpoint under the name of {manifest.name}"
            ) from None
