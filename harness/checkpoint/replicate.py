"""Copy checkpoints from one of a run's stores to the other, and say which of them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence

from harness.checkpoint import format as fmt
from harness.checkpoint import load, retention
from harness.checkpoint.attempts import Attempt, check_fence
from harness.checkpoint.format import Manifest
from harness.checkpoint.retention import Policy
from harness.errors import DamagedError
from harness.store import Store


def wanted(history: Sequence[Manifest], there: Collection[str], policy: Policy) -> list[Manifest]:
    """What still has to be copied, the most urgent first: the newest, then the best, then every n-th.

    What was overtaken while the other store could not be reached is not worth its way. `there` names what that store has.
    """
    newest_first = sorted(history, key=lambda m: m.order, reverse=True)
    urgent = newest_first[:1] + retention.best(newest_first, policy)[: policy.best]
    urgent += [m for m in newest_first if policy.every_steps and m.step % policy.every_steps == 0]
    return list({m.name: m for m in urgent if m.name not in there}.values())


def replicate(source: Store, manifest: Manifest, target: Store, attempt: Attempt) -> None:
    """Commit the same checkpoint, byte for byte, in another store. Raises what `send` does."""
    send(source, manifest.data_key, (), lambda: manifest, target, attempt)


def send(
    source: Store, key: str, early: Iterable[bytes], committed: Callable[[], Manifest | None], target: Store, attempt: Attempt
) -> Manifest | None:
    """Commit a checkpoint, byte for byte as in `source`, in another store: the data first, the manifest last.

    It may begin before the checkpoint is committed in `source`, with the first bytes of its file from elsewhere, `early`. `committed`
    waits for its manifest, and returns None if there will be none: then nothing appears. Raises DamagedError if what was sent is not what
    the manifest says, SupersededError if `target` shows a newer attempt, StorageError. In each case no checkpoint appears there.
    """
    check_fence(target, attempt)
    with target.writer(key, attempt.number) as sink:
        for chunk in early:
            sink.write(chunk)
        if (manifest := committed()) is None:
            return None
        for chunk in load.chunks(source, key, sink.size_bytes) if sink.size_bytes != manifest.size_bytes else ():
            sink.write(chunk)
        load.compare(sink.size_bytes, sink.digest(), manifest.data, key)
        sink.commit()
    check_fence(target, attempt)  # the data stays: a successor may have copied it by now, and count on it
    text = fmt.to_bytes(manifest)
    try:
        target.create(manifest.key, text, attempt.number)
    except FileExistsError:
        if target.read(manifest.key) != text:
            raise DamagedError(f"{target} has another checkpoint under the name of {manifest.name}") from None
    return manifest
