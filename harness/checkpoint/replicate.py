"""Copy checkpoints from one of a run's stores to the other, and say which of them."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from harness.checkpoint import format as fmt
from harness.checkpoint import retention
from harness.checkpoint.attempts import Attempt, check_fence
from harness.checkpoint.format import Manifest
from harness.checkpoint.load import verified_chunks
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
    """Commit the same checkpoint, byte for byte, in another store: the data first, the manifest last.

    Raises DamagedError if the source does not verify, SupersededError if `target` shows a newer attempt, StorageError. In each case
    no checkpoint appears there.
    """
    text, key = fmt.to_bytes(manifest), manifest.data_key
    check_fence(target, attempt)
    with target.writer(key, attempt.number) as sink:
        for chunk in verified_chunks(source, manifest):
            sink.write(chunk)
        sink.commit()
    check_fence(target, attempt)  # the data stays: a successor may have copied it by now, and count on it
    try:
        target.create(manifest.key, text, attempt.number)
    except FileExistsError:
        if target.read(manifest.key) != text:
            raise DamagedError(f"{target} has another checkpoint under the name of {manifest.name}") from None
