"""The order of samples, as pure functions of (seed, epoch, position)."""

from __future__ import annotations

import contextlib
import hashlib
import random
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from harness.errors import UsageError


def seed_of(*parts: int | str) -> int:
    """Return a 63-bit seed that is a pure function of its parts."""
    text = "/".join(map(str, parts))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def digest_of(samples: Sequence[int]) -> bytes:
    """Return an eight-byte digest of sample numbers in their order, at some 20 ns a sample."""
    return hashlib.blake2b(array("q", samples), digest_size=8).digest()


def seed_cpu(seed: int) -> None:
    """Seed the global generators of Python, NumPy and torch's CPU, but not those of GPUs."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)


@contextlib.contextmanager
def kept_generators() -> Iterator[None]:
    """Restore the global generators of Python, NumPy and torch's CPU when the block ends."""
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])


@dataclass(frozen=True)
class Position:
    """The position of a run in its data."""

    epoch: int = 0
    sample: int = 0  # samples of this epoch that have been used, over all ranks


@dataclass(frozen=True)
class Share:
    """One rank's samples of one optimizer step: its micro-batches, and the position after it."""

    epoch: int
    start: int  # position of the step's first sample in the epoch; of a stream, `after.sample`
    micro_batches: tuple[tuple[int, ...], ...]  # sample numbers of the dataset
    weights: tuple[float, ...]  # factors of each micro-batch's mean loss
    after: Position
    last: bool  # whether the data of the run ends with this step
    digest: bytes | None = None  # of the sample numbers of all ranks in this step, in their order


@dataclass(frozen=True)
class Border:
    """The border before an epoch, also before the first one.

    None of the epoch's samples has been requested at this point. A second one for the same epoch
    says that none of them is left.
    """

    epoch: int


@dataclass(frozen=True)
class Plan:
    """The distribution of a dataset of `size` samples over all ranks and all epochs."""

    size: int
    global_batch_size: int
    accumulate: int
    rank: int
    world_size: int
    seed: int
    shuffle: bool = True
    drop_last: bool = True
    order: Callable[[int], Sequence[int]] | None = None

    def check(self) -> None:
        """Raise UsageError for a batch that cannot be dealt out.

        Raises:
            UsageError: The global batch is no multiple of ranks times micro-batches, or an epoch
                has no step.
        """
        dealt = self.world_size * self.accumulate
        if self.global_batch_size % dealt:
            near = [
                n
                for n in range(
                    max(1, self.global_batch_size - dealt), self.global_batch_size + dealt + 1
                )
                if n % dealt == 0
            ]
            raise UsageError(
                "the global batch cannot be dealt out evenly",
                f"found: global_batch_size={self.global_batch_size} on {self.world_size} rank(s)"
                f" x {self.accumulate} micro-batch(es)",
                f"Expected: a multiple of {dealt}, such as {' or '.join(map(str, near))}.",
            )
        if self.steps_per_epoch == 0:
            raise UsageError(
                "the dataset has fewer samples than one global batch",
                f"found: {self.size} samples, global_batch_size={self.global_batch_size}",
                "Take a smaller batch, or data.drop_last=false.",
            )

    @property
    def steps_per_epoch(self) -> int:
        """Return the number of steps in an epoch."""
        whole, rest = divmod(self.size, self.global_batch_size)
        return whole + (1 if rest and not self.drop_last else 0)

    def steps_after(self, position: Position, epochs: int) -> int:
        """Return the number of steps from `position` to the end of the last epoch."""
        if position.epoch >= epochs:
            return 0
        # The present epoch may have begun with another batch size.
        left = len(self._starts(position.sample, self.size))
        return left + (epochs - position.epoch - 1) * self.steps_per_epoch

    def shares(self, position: Position, epochs: int) -> Iterator[Share]:
        """Yield this rank's share of every step from `position` to the end of the last epoch."""
        while position.epoch < epochs:
            yield from self.of_epoch(position, epochs)
            position = Position(position.epoch + 1)

    def of_epoch(self, position: Position, epochs: int) -> Iterator[Share]:
        """Yield this rank's share of every step from `position` to the end of its epoch.

        The order of the epoch is computed when the first share is requested.
        """
        epoch, samples = position.epoch, self.samples(position.epoch)
        for start in self._starts(position.sample, self.size):
            end = min(start + self.global_batch_size, self.size)
            last = end + (self.global_batch_size if self.drop_last else 1) > self.size
            after = Position(epoch + 1, 0) if last else Position(epoch, end)
            batch = samples[start:end]
            micro_batches, weights = self._deal(batch)
            yield Share(
                epoch,
                start,
                micro_batches,
                weights,
                after,
                last and epoch + 1 == epochs,
                digest_of(batch),
            )

    def samples(self, epoch: int) -> Sequence[int]:
        """Return the dataset's sample numbers in the order in which this epoch uses them.

        Raises:
            UsageError: `order` gives another number of samples than `size`.
        """
        if self.order is not None:
            samples = self.ordered(epoch)
            if len(samples) != self.size:
                raise UsageError(
                    f"order({epoch}) gives another number of samples than order(0)",
                    f"found: {len(samples)}, expected: {self.size}",
                    "Every epoch must have the same length.",
                )
            return samples
        if not self.shuffle:
            return range(self.size)
        generator = torch.Generator("cpu").manual_seed(seed_of(self.seed, "order", epoch))
        return torch.randperm(self.size, generator=generator, device="cpu").tolist()

    def ordered(self, epoch: int) -> list[int]:
        """Return the order that the user's `order` gives for an epoch.

        The global generators are seeded from the epoch for this call, and restored afterwards.
        """
        assert self.order is not None
        with kept_generators():
            seed_cpu(seed_of(self.seed, "order", epoch))
            return [int(sample) for sample in self.order(epoch)]

    def _starts(self, first: int, end: int) -> range:
        """Return the positions of the steps' first samples that lie in [first, end)."""
        limit = self.size - self.global_batch_size + 1 if self.drop_last else self.size
        return range(first, min(limit, end), self.global_batch_size)

    def _deal(self, batch: Sequence[int]) -> tuple[tuple[tuple[int, ...], ...], tuple[float, ...]]:
        """Return this rank's micro-batches of a global batch, and the weight of each mean loss.

        DDP averages gradients over ranks, so a micro-batch of n samples in a batch of m over W
        ranks has the weight n * W / m. In a whole batch that is 1 / accumulate. A micro-batch for
        which the short last batch leaves no sample consists of the batch's first sample, with
        weight 0. So every rank takes part in the collectives, and the extra sample changes nothing.
        """
        size, parts = len(batch), self.world_size * self.accumulate
        own = range(self.rank * self.accumulate, (self.rank + 1) * self.accumulate)
        micro_batches = [
            tuple(batch[size * part // parts : size * (part + 1) // parts]) for part in own
        ]
        weights = [len(micro) * self.world_size / size for micro in micro_batches]
        return tuple(micro or (batch[0],) for micro in micro_batches), tuple(weights)


def check_batch(global_batch_size: int, world_size: int, micro_batch_size: int | None) -> None:
    """Check, before any rank is started, that the ranks can share a global batch evenly.

    Raises:
        UsageError: They cannot.
    """
    accumulate = accumulation(global_batch_size, world_size, micro_batch_size)
    Plan(global_batch_size, global_batch_size, accumulate, 0, world_size, seed=0).check()


def accumulation(global_batch_size: int, world_size: int, micro_batch_size: int | None) -> int:
    """Return the number of micro-batches in a rank's share of the global batch.

    It is the smallest number of equal micro-batches with at most `micro_batch_size` samples each;
    1 if `micro_batch_size` is None.
    """
    if micro_batch_size is None:
        return 1
    share = max(1, global_batch_size // world_size)
    return next(
        parts for parts in range(-(-share // micro_batch_size), share + 1) if share % parts == 0
    )


def end_step(step: int, steps_left: int | None, max_steps: int | None) -> int | None:
    """Return the number of the last step, given the steps left in the data and the limit.

    None means that neither is known.
    """
    ends = ([] if steps_left is None else [step + steps_left]) + (
        [] if max_steps is None else [max(step, max_steps)]
    )
    return min(ends, default=None)
