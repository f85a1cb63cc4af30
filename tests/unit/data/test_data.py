"""Which sample comes next, and how it is loaded: the same whatever the ranks, the workers, and the
place where a run was killed."""

from __future__ import annotations

import copy
import itertools
import random
from collections import Counter, OrderedDict, UserDict, defaultdict
from collections.abc import Callable, MutableMapping
from functools import partial
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from small_task import Noisy
from torch import nn
from torch.nn.utils.rnn import pack_sequence
from torch.utils.data import Dataset, RandomSampler, Subset, TensorDataset, random_split

from harness.data import dataset_source, loading
from harness.data.fingerprint import describe, fingerprint
from harness.data.given_order import GivenOrder
from harness.data.plan import Plan, Position, Share, accumulation, seed_of
from harness.data.source import CombinedSource
from harness.distributed.ranks import World
from harness.errors import UsageError

SIZES = st.tuples(
    st.integers(1, 70),
    st.integers(1, 4),
    st.integers(1, 3),
    st.integers(1, 3),
    st.booleans(),
    st.integers(0, 5),
)


def plans(
    size: int,
    global_batch_size: int,
    accumulate: int,
    world_size: int,
    seed: int = 1,
    **options: object,
) -> list[Plan]:
    """The plan of each rank."""
    return [
        Plan(
            size,
            global_batch_size,
            accumulate,
            rank,
            world_size,
            seed,
            **options,  # type: ignore[arg-type]
        )
        for rank in range(world_size)
    ]


def global_batches(
    ranks: list[Plan], position: Position, epochs: int
) -> list[tuple[int, int, list[int]]]:
    """(epoch, start, samples that count) of each step, put together from what the ranks hold."""
    found = []
    for shares in zip(*(plan.shares(position, epochs) for plan in ranks), strict=True):
        assert (
            len({(share.epoch, share.start, share.after, share.last) for share in shares}) == 1
        ), "ranks differ"
        used = [
            sample
            for share in shares
            for micro, weight in zip(share.micro_batches, share.weights, strict=True)
            if weight > 0
            for sample in micro
        ]
        found.append((shares[0].epoch, shares[0].start, used))
    return found


def positions(plan: Plan, epochs: int) -> list[Position]:
    """Where a run may stand: at the beginning, and after each step."""
    return [Position(), *(share.after for share in plan.shares(Position(), epochs))]


@pytest.mark.parametrize("drop_last", [True, False])
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_every_sample_is_used_exactly_once_an_epoch(world_size, accumulate, drop_last):
    size, batch = 103, 24
    steps = global_batches(
        plans(size, batch, accumulate, world_size, drop_last=drop_last), Position(), 3
    )
    left_out = []
    for epoch in range(3):
        used = Counter(sample for at, _, samples in steps if at == epoch for sample in samples)
        assert set(used.values()) == {1}
        assert len(used) == (size - size % batch if drop_last else size)
        left_out.append(frozenset(range(size)) - frozenset(used))
    if drop_last:
        assert len(set(left_out)) == 3, "another tail each epoch"
    orders = [
        [sample for at, _, samples in steps if at == epoch for sample in samples]
        for epoch in range(3)
    ]
    assert orders[0] != orders[1] != orders[2] != sorted(orders[2]), (
        "each epoch has an order of its own"
    )


@pytest.mark.parametrize("drop_last", [True, False])
def test_the_global_batches_are_the_same_for_every_number_of_ranks(drop_last):
    alone = global_batches(plans(103, 24, 1, 1, drop_last=drop_last), Position(), 2)
    for world_size, accumulate in itertools.product((1, 2, 3, 4), (1, 2, 3)):
        assert (
            global_batches(
                plans(103, 24, accumulate, world_size, drop_last=drop_last), Position(), 2
            )
            == alone
        )


def test_the_order_follows_from_the_seed():
    assert plans(50, 10, 1, 1, seed=3)[0].samples(1) == plans(50, 10, 1, 1, seed=3)[0].samples(1)
    assert plans(50, 10, 1, 1, seed=3)[0].samples(1) != plans(50, 10, 1, 1, seed=4)[0].samples(1)
    assert list(plans(50, 10, 1, 1, shuffle=False)[0].samples(7)) == list(range(50))
    before = torch.get_rng_state()
    plans(50, 10, 1, 1)[0].samples(0)
    assert torch.equal(before, torch.get_rng_state())


@settings(max_examples=60, deadline=None)
@given(SIZES)
def test_from_any_position_the_rest_is_that_of_the_uninterrupted_sequence(drawn):
    size, share, accumulate, world_size, drop_last, seed = drawn
    batch = share * accumulate * world_size
    ranks = plans(size, batch, accumulate, world_size, seed, drop_last=drop_last)
    if ranks[0].steps_per_epoch == 0:
        with pytest.raises(UsageError):
            ranks[0].check()
        return
    ranks[0].check()
    for plan in ranks:
        whole = list(plan.shares(Position(), 3))
        assert len(whole) == 3 * plan.steps_per_epoch
        assert [share.last for share in whole] == [False] * (len(whole) - 1) + [True]
        assert [share.after.epoch for share in whole] == [
            at // plan.steps_per_epoch for at in range(1, len(whole) + 1)
        ]
        assert whole[-1].after == Position(3, 0)
        for done, position in enumerate(positions(plan, 3)):
            assert list(plan.shares(position, 3)) == whole[done:]
            assert plan.steps_after(position, 3) == len(whole) - done


@pytest.mark.parametrize("drop_last", [True, False])
def test_the_steps_left_with_another_batch_size_in_the_middle_of_an_epoch_are_those_made(drop_last):
    plan = Plan(1000, 128, 1, 0, 1, seed=1, drop_last=drop_last)
    for used in range(0, 1000, 64):
        position = Position(1, used)
        assert plan.steps_after(position, 3) == len(list(plan.shares(position, 3))), used
    assert plan.steps_after(Position(3), 3) == 0


@settings(max_examples=40, deadline=None)
@given(SIZES, st.integers(1, 4), st.data())
def test_going_on_with_other_ranks_uses_the_same_rest(drawn, other_world_size, data):
    size, share, accumulate, world_size, drop_last, seed = drawn
    batch = share * accumulate * world_size * other_world_size
    before = plans(size, batch, accumulate, world_size, seed, drop_last=drop_last)
    after = plans(size, batch, 1, other_world_size, seed, drop_last=drop_last)
    if before[0].steps_per_epoch == 0:
        return
    at = data.draw(st.sampled_from(positions(before[0], 2)))
    assert global_batches(after, at, 2) == global_batches(before, at, 2)


@settings(max_examples=60, deadline=None)
@given(SIZES)
def test_weighted_means_over_micro_batches_and_ranks_are_the_mean_over_the_global_batch(drawn):
    size, share, accumulate, world_size, _, seed = drawn
    losses = torch.rand(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    ranks = plans(
        size, share * accumulate * world_size, accumulate, world_size, seed, drop_last=False
    )
    for shares in zip(*(plan.shares(Position(), 1) for plan in ranks), strict=True):
        pairs = [
            pair
            for share in shares
            for pair in zip(share.micro_batches, share.weights, strict=True)
        ]
        assert all(len(micro) > 0 for micro, _ in pairs), "no rank may be without a sample"
        assert len(pairs) == world_size * accumulate
        averaged = sum(losses[list(micro)].mean() * weight for micro, weight in pairs) / world_size
        used = [sample for micro, weight in pairs if weight > 0 for sample in micro]
        assert averaged.item() == pytest.approx(losses[used].mean().item(), abs=1e-12)


@pytest.mark.parametrize("size", [24, 17, 2])
def test_the_gradient_is_that_of_the_global_batch(size):
    """With real losses, real gradients, averaged over ranks as DDP does."""
    torch.manual_seed(0)
    x, y = torch.randn(size, 5, dtype=torch.float64), torch.randn(size, 1, dtype=torch.float64)
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 1)).double()
    world_size, accumulate = 3, 2
    sums = [torch.zeros_like(parameter) for parameter in model.parameters()]
    for plan in plans(size, 24, accumulate, world_size, drop_last=False):
        (share,) = plan.shares(Position(), 1)
        for micro, weight in zip(share.micro_batches, share.weights, strict=True):
            loss = F.mse_loss(model(x[list(micro)]), y[list(micro)]) * weight
            for total, gradient in zip(
                sums, torch.autograd.grad(loss, list(model.parameters())), strict=True
            ):
                total += gradient / world_size
    expected = torch.autograd.grad(F.mse_loss(model(x), y), list(model.parameters()))
    for total, gradient in zip(sums, expected, strict=True):
        torch.testing.assert_close(total, gradient, rtol=1e-12, atol=1e-14)


def test_whole_batches_weigh_one_over_the_micro_batches():
    for plan in plans(24, 24, 2, 3):
        assert [share.weights for share in plan.shares(Position(), 1)] == [(0.5, 0.5)]


@pytest.mark.parametrize(
    ("batch", "world_size", "micro", "expected"),
    [(48, 2, None, 1), (48, 2, 24, 1), (48, 2, 23, 2), (48, 2, 5, 6), (7, 1, 3, 7), (2, 4, 1, 1)],
)
def test_the_share_is_split_into_the_fewest_equal_micro_batches(batch, world_size, micro, expected):
    assert accumulation(batch, world_size, micro) == expected


def test_a_batch_that_cannot_be_dealt_out_is_refused_with_the_nearest_that_can():
    with pytest.raises(UsageError) as caught:
        plans(100, 7, 1, 2)[0].check()
    assert (
        "global_batch_size=7 on 2 rank(s)" in caught.value.found and "6 or 8" in caught.value.remedy
    )
    with pytest.raises(UsageError) as caught:
        plans(5, 8, 1, 2)[0].check()
    assert "5 samples" in caught.value.found
    plans(5, 8, 1, 2, drop_last=False)[0].check()


def batches_of(
    dataset,
    plan,
    num_workers=0,
    position=Position(),  # noqa: B008
    epochs=2,
    collate=None,
):
    return list(
        loading.load(
            dataset, plan.shares(position, epochs), plan.seed, collate, loading.Workers(num_workers)
        )
    )


def assert_same(one, other):
    assert len(one) == len(other) > 0
    for (share, batches), (other_share, other_batches) in zip(one, other, strict=True):
        assert share == other_share
        for batch, other_batch in zip(batches, other_batches, strict=True):
            for tensor, other_tensor in zip(batch, other_batch, strict=True):
                assert torch.equal(tensor, other_tensor)


def noisy_collate(samples):
    x, y = torch.utils.data.default_collate(samples)
    return x + torch.randn(()) + float(np.random.rand()) + random.random(), y


@pytest.mark.parametrize("num_workers", [1, 2])
def test_the_number_of_workers_changes_no_bit(num_workers):
    (plan,) = plans(40, 6, 2, 1, drop_last=False)
    expected = batches_of(Noisy(40), plan, 0, collate=noisy_collate)
    torch.manual_seed(num_workers)
    assert_same(batches_of(Noisy(40), plan, num_workers, collate=noisy_collate), expected)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_from_any_position_the_same_batches_are_loaded(num_workers):
    (plan,) = plans(20, 6, 1, 1, drop_last=False)
    whole = batches_of(Noisy(20), plan)
    for done in range(0, len(whole), 3 if num_workers else 1):
        position = positions(plan, 2)[done]
        random.seed(done)
        assert_same(batches_of(Noisy(20), plan, num_workers, position), whole[done:])


def test_a_sample_is_made_under_randomness_of_its_own():
    """Whoever else is in the batch, on whichever rank: the same noise; but another one in the next
    epoch."""

    def by_sample(world_size, accumulate, epochs=2):
        found: dict[tuple[int, int], torch.Tensor] = {}
        for plan in plans(24, 12, accumulate, world_size):
            for share, batches in batches_of(Noisy(24), plan, epochs=epochs):
                for micro, (x, _) in zip(share.micro_batches, batches, strict=True):
                    found |= {
                        (share.epoch, sample): row for sample, row in zip(micro, x, strict=True)
                    }
        return found

    alone, others = by_sample(1, 1), by_sample(3, 2)
    assert alone.keys() == others.keys() and len(alone) == 48
    assert all(torch.equal(alone[key], others[key]) for key in alone)
    assert not any(torch.equal(alone[0, sample], alone[1, sample]) for sample in range(24))
    noise = torch.stack([alone[0, sample] - Noisy(24).x[sample] for sample in range(24)])
    assert len(torch.unique(noise, dim=0)) == 24


def generators():
    python, numpy_state = random.getstate(), np.random.get_state()
    assert isinstance(numpy_state, tuple)
    return (
        python,
        numpy_state[1].tobytes(),
        numpy_state[2:],
        torch.get_rng_state().numpy().tobytes(),
    )


@pytest.mark.parametrize("num_workers", [0, 2])
def test_loading_disturbs_no_global_generator(num_workers):
    (plan,) = plans(24, 6, 1, 1)
    torch.manual_seed(5), np.random.seed(5), random.seed(5)
    before = generators()
    loader = loading.load(
        Noisy(24), plan.shares(Position(), 1), 1, noisy_collate, loading.Workers(num_workers)
    )
    assert generators() == before
    for _ in loader:
        assert generators() == before
    describe(Noisy(24), 8, True, True, 0)
    assert generators() == before


def test_generators_are_given_back_also_when_a_sample_fails():
    class Broken(Noisy):
        def __getitem__(self, index):
            torch.rand(3), np.random.rand(3), random.random()
            raise ValueError("broken sample")

    before = generators()
    with pytest.raises(ValueError, match="broken sample"):
        batches_of(Broken(12), plans(12, 6, 1, 1)[0])
    assert generators() == before


def test_going_on_in_mid_epoch_reads_nothing_that_is_thrown_away():
    class Counting(Noisy):
        def __getitem__(self, index):
            read.append(index)
            return super().__getitem__(index)

    read: list[int] = []
    (plan,) = plans(1000, 10, 1, 1)
    loader = loading.load(Counting(1000), plan.shares(Position(0, 900), 1), 1, None)
    next(loader)
    assert read == list(plan.samples(0)[900:910])
    assert sum(1 for _ in loader) == 9 and len(read) == 100


@pytest.mark.parametrize("size", [1, 2, 5, pytest.param(63, marks=pytest.mark.slow), 64])
def test_the_fingerprint_tells_when_one_of_few_samples_changes(size):
    class Plain(list):
        pass

    samples = Plain(
        {"x": torch.full((3,), float(at)), "y": np.array([at]), "name": f"sample {at}", "n": at}
        for at in range(size)
    )
    before = fingerprint(samples)
    assert fingerprint(copy.deepcopy(samples)) == before
    for at in range(size):
        for key, value in (
            ("x", torch.full((3,), -1.0)),
            ("y", np.array([-1])),
            ("name", "other"),
            ("n", -1),
        ):
            changed = copy.deepcopy(samples)
            changed[at][key] = value
            assert fingerprint(changed) != before, (at, key)
    assert fingerprint(Plain(samples[:-1])) != before
    assert (
        fingerprint(Plain([{**samples[0], "x": samples[0]["x"].double()}, *samples[1:]])) != before
    ), "another dtype"


def test_the_fingerprint_of_noisy_data_is_the_same_each_time():
    torch.manual_seed(1)
    one = fingerprint(Noisy(200))
    torch.manual_seed(2)
    assert fingerprint(Noisy(200)) == one != fingerprint(Noisy(201))


def test_the_fingerprint_tells_where_one_value_ends_and_the_next_begins():
    assert fingerprint([(1, 23)]) != fingerprint([(12, 3)])


def test_a_dataset_may_name_itself():
    class Named(Noisy):
        fingerprint: str

    dataset = Named(30)
    dataset.fingerprint = "version 7"
    dealt = {"global_batch_size": 10, "shuffle": True, "drop_last": False, "seed": 5}
    assert describe(dataset, 10, True, False, 5) == {"fingerprint": "version 7", "size": 30} | dealt


def test_another_order_takes_the_place_of_the_shuffle():
    world = World(0, 1, torch.device("cpu"), 10)

    def order(epoch: int) -> list[int]:
        return [9, 7, 5, 3, 1] if epoch % 2 == 0 else [0, 2, 4, 6, 8]

    batching = loading.Batching(
        shuffle=True, drop_last=False, order=order, collate=None, workers=loading.Workers()
    )
    source = dataset_source.source(Noisy(10), world, 1, 2, 1, batching)

    def from_there(position: Position) -> list[tuple[int, ...]]:
        shares = [share for share, _ in source.shares(position, 2)]
        assert all(isinstance(share, Share) for share in shares)
        return [share.micro_batches[0] for share in shares if isinstance(share, Share)]

    dealt = from_there(Position())
    assert dealt == [(9, 7), (5, 3), (1,), (0, 2), (4, 6), (8,)]
    assert source.steps_after(Position(1, 2), 2) == 2
    assert from_there(Position(0, 4)) == dealt[2:]


def _drawn(sampler: RandomSampler, epoch: int) -> list[int]:
    return list(sampler)


def test_an_order_is_kept_by_a_resumed_run_that_makes_no_step():
    """Of the main source, and of one beside it."""

    def both() -> CombinedSource:
        sources = []
        for size in (12, 20):
            data = Noisy(size)
            sampler = RandomSampler(data, generator=torch.Generator().manual_seed(size))
            order = GivenOrder(partial(_drawn, sampler), sampler, data)
            batching = loading.Batching(
                shuffle=True, drop_last=True, order=order, collate=None, workers=loading.Workers()
            )
            world = World(0, 1, torch.device("cpu"), 10)
            sources.append(dataset_source.source(data, world, 1, 4, 1, batching))
        return CombinedSource(sources[0], {"more": sources[1]})

    def again(record: dict[str, Any]) -> CombinedSource:
        source = both()
        epoch, sample = record["beside_at"]["more"]
        source.positions["more"] = Position(epoch, sample)
        source.begin(Position(1, 4), 3, record, print, by_epoch=False)
        return source

    whole = both()
    whole.begin(Position(), 3, None, print, by_epoch=False)
    shares = whole.shares(Position(), 3)
    for _ in range(4):
        next(shares)
    record = whole.kept(Position(1, 4))
    idle = again(record).kept(Position(1, 4))
    assert idle["order"]["left"].tolist() == record["order"]["left"].tolist() != []
    assert len(idle["beside_orders"]["more"]["order"]["left"]) == 4
    rest = again(idle).shares(Position(1, 4), 3)
    for share, [(_, more)] in shares:
        other, [(_, others)] = next(rest)
        assert share == other and torch.equal(more["more"][0], others["more"][0])


def test_an_order_whose_length_changes_is_refused():
    plan = Plan(3, 1, 1, 0, 1, 1, order=lambda epoch: range(3 + epoch))
    with pytest.raises(UsageError, match="another number of samples"):
        list(plan.shares(Position(), 2))


class Stream(torch.utils.data.IterableDataset):
    """Numbers from 0 to size - 1, pass after pass; its state is how far it is, and how many were
    ever read."""

    def __init__(self, size: int) -> None:
        self.size, self.state = size, {"at": 0, "read": 0}

    def __iter__(self):
        while self.state["at"] < self.size:
            self.state["at"] += 1
            self.state["read"] += 1
            yield torch.tensor([self.state["at"] - 1.0, float(self.state["read"])])
        self.state["at"] = 0

    def state_dict(self):
        return self.state  # the live one: whoever keeps it has to copy it

    def load_state_dict(self, state):
        self.state = dict(state)


def stream_source(
    size: int,
    share: int,
    accumulate: int = 1,
    position: Position = Position(),  # noqa: B008
    state=None,
    epochs=3,
):
    world = World(0, 1, torch.device("cpu"), 10)
    batching = loading.Batching(
        shuffle=True, drop_last=True, order=None, collate=None, workers=loading.Workers()
    )
    source = dataset_source.source(Stream(size), world, 1, share, accumulate, batching)
    source.restore(state)
    for share_, batches in source.shares(position, epochs):
        yield share_, batches, copy.deepcopy(source.state())


@pytest.mark.parametrize(
    ("size", "share", "accumulate"), [(10, 4, 1), (12, 4, 2), (4, 4, 4), (7, 1, 1)]
)
def test_a_stream_goes_on_exactly_from_any_step(size, share, accumulate):
    whole = list(stream_source(size, share, accumulate))
    assert len(whole) == 3 * (size // share)
    assert [share_.last for share_, _, _ in whole] == [False] * (len(whole) - 1) + [True]
    assert [share_.epoch for share_, _, _ in whole] == [
        epoch for epoch in range(3) for _ in range(size // share)
    ]
    for epoch in range(3):
        values = [
            x
            for share_, batches, _ in whole
            if share_.epoch == epoch
            for batch in batches
            for x in batch[:, 0].tolist()
        ]
        assert values == [float(at) for at in range(size - size % share)]
    for done, (share_, _, state) in enumerate(whole[:-1], start=1):
        rest = list(stream_source(size, share, accumulate, share_.after, state))
        assert [s for s, _, _ in rest] == [s for s, _, _ in whole[done:]]
        for (_, batches, after), (_, expected, expected_after) in zip(
            rest, whole[done:], strict=True
        ):
            assert all(
                torch.equal(batch, other) for batch, other in zip(batches, expected, strict=True)
            )
            assert after == expected_after


def test_a_stream_is_dealt_into_micro_batches_of_equal_weight():
    share, batches, _ = next(stream_source(12, 6, accumulate=3))
    assert share.weights == (1 / 3, 1 / 3, 1 / 3) and [len(batch) for batch in batches] == [2, 2, 2]


def test_a_stream_that_gets_more_passes_goes_on_after_its_last_one():
    whole = list(stream_source(10, 4, epochs=3))
    share, _, state = list(stream_source(10, 4, epochs=2))[-1]
    assert share.last and share.after == Position(2, 0)
    rest = list(stream_source(10, 4, position=share.after, state=state, epochs=3))
    assert [batches[0].tolist() for _, batches, _ in rest] == [
        batches[0].tolist() for _, batches, _ in whole[4:]
    ]


def test_a_stream_that_cannot_tell_where_it_stands_is_refused():
    class Forgetful(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(range(3))

    world = World(0, 1, torch.device("cpu"), 10)
    batching = loading.Batching(
        shuffle=True, drop_last=True, order=None, collate=None, workers=loading.Workers()
    )
    with pytest.raises(UsageError, match="state_dict"):
        dataset_source.source(Forgetful(), world, 1, 2, 1, batching)
    with pytest.raises(UsageError, match="dealt out evenly"):
        dataset_source.source(Stream(9), World(0, 2, torch.device("cpu"), 10), 1, 3, 1, batching)


def test_batches_of_any_shape_are_moved_whole():
    from collections import namedtuple

    pair = namedtuple("pair", "x y")
    batch = {"a": [torch.ones(2), "text"], "b": pair(torch.zeros(1), 3)}
    moved = loading.to_device(batch, torch.device("meta"))
    assert moved["a"][0].device.type == "meta" and moved["a"][1] == "text"
    assert isinstance(moved["b"], pair) and moved["b"].x.device.type == "meta" and moved["b"].y == 3
    packed = pack_sequence([torch.ones(2), torch.ones(3)], enforce_sorted=False)
    (there,) = loading.to_device([packed], torch.device("meta"))
    places = [part.device.type for part in there]
    assert places == ["meta", "cpu", "meta", "meta"], "PyTorch wants batch_sizes on the CPU"


class Encoding(UserDict):
    """As a tokenizer's: a mapping with attributes and methods of its own."""

    def __init__(self, data, encodings):
        super().__init__(data)
        self.encodings = encodings


class Dense(MutableMapping):
    """As a TensorDict: a mapping that has one device."""

    def __init__(self, data, device="cpu"):
        self.data, self.device = data, device

    def __getitem__(self, key):
        return self.data[key]

    def __setitem__(self, key, value):
        self.data[key] = value.to(self.device)

    def __delitem__(self, key):
        del self.data[key]

    def __iter__(self):
        return iter(self.data)

    def __len__(self):
        return len(self.data)

    def to(self, device, non_blocking=False):
        there = {key: value.to(device, non_blocking=non_blocking) for key, value in self.items()}
        return Dense(there, device)


class Graphs:
    """As a batch of graphs, which is no container of torch's."""

    def __init__(self, x):
        self.x = x

    def to(self, device):
        return Graphs(self.x.to(device))


class Fixed(OrderedDict):
    """As a model's output, which cannot be updated."""

    def update(self, *args, **kwargs):
        raise RuntimeError("no update")


class Quantity:
    def to(self, unit):
        raise TypeError("not a unit")


@pytest.mark.parametrize(
    "batch",
    [
        Encoding({"x": torch.ones(2)}, "words"),
        Dense({"x": torch.ones(2)}),
        defaultdict(lambda: torch.zeros(1), x=torch.ones(2)),
        MappingProxyType({"x": torch.ones(2)}),
    ],
    ids=lambda batch: type(batch).__name__,
)
def test_a_batch_that_is_a_mapping_of_its_own_is_moved_as_what_it_is(batch):
    moved = loading.to_device([batch], torch.device("meta"))[0]
    assert type(moved) is type(batch) and moved["x"].device.type == "meta"
    assert getattr(moved, "encodings", "words") == "words"
    assert batch["x"].device.type == "cpu", "the dataset may hold it"


def test_a_batch_that_can_be_moved_is():
    moved = loading.to_device({"graphs": Graphs(torch.ones(2))}, torch.device("meta"))
    assert isinstance(moved["graphs"], Graphs) and moved["graphs"].x.device.type == "meta"


def test_what_cannot_be_moved_is_left_as_it_is():
    quantity = Quantity()
    batch = [Fixed(x=torch.ones(2)), quantity, Graphs, "text", None]
    moved = loading.to_device(batch, torch.device("meta"))
    assert moved[0]["x"].device.type == "meta", "at least what it holds"
    assert moved[1:] == [quantity, Graphs, "text", None]


@pytest.mark.filterwarnings("ignore:.*pin_memory")
def test_options_for_workers_are_left_out_where_a_drill_takes_the_workers_away():
    options = {"prefetch_factor": 4, "timeout": 60, "multiprocessing_context": "fork"}
    shares = [Share(0, 0, ((0, 1),), (1.0,), Position(), last=True)]
    loader = loading.Loader(Noisy(8), 1, None, loading.Workers(0, others=options), pin=True)
    assert [share for share, _ in loader.over(shares)] == shares


def test_seeds_depend_on_each_part():
    seeds = {
        seed_of(1, "sample", 2, 3),
        seed_of(1, "sample", 3, 2),
        seed_of(2, "sample", 2, 3),
        seed_of(1, "collate", 2, 3),
        seed_of(1),
    }
    assert len(seeds) == 5 and all(0 <= seed < 2**63 for seed in seeds)


class AsItIs(Dataset):
    """Hides what the dataset is."""

    def __init__(self, dataset) -> None:
        self.dataset = dataset

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, index):
        return self.dataset[index]


def tensors(size: int = 30) -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    shapes = [(3,), (), (1,), (2, 3, 3), (1, 4, 4), (3, 1, 1), (0,), (2, 1, 3, 2)]
    floats = [torch.randn(size, *shape, generator=generator) for shape in shapes]
    others = [
        torch.arange(size),
        floats[0].half(),
        floats[0].bfloat16(),
        floats[0].to(torch.complex64),
        floats[1] > 0,
    ]
    return TensorDataset(*floats, *others)


PLAIN: dict[str, Callable[[], Any]] = {
    "whole": tensors,
    "a part": lambda: Subset(tensors(), [3, 1, 1, -2, 7, 29, 0, 4]),
    "a part of a part": lambda: Subset(
        Subset(tensors(), range(20, 30)),
        np.array([9, 0, 3, 3, 5, 1]),  # type: ignore[arg-type]
    ),
    "a part by a tensor": lambda: Subset(tensors(), torch.randperm(30)),  # type: ignore[arg-type]
    "a split": lambda: random_split(tensors(), [20, 10], torch.Generator().manual_seed(1))[0],
}
OTHERS: dict[str, Callable[[], Any]] = {
    "a transposed tensor": lambda: TensorDataset(torch.randn(5, 30).T),
    "channels last": lambda: TensorDataset(
        torch.randn(30, 3, 4, 4).to(memory_format=torch.channels_last)
    ),
    "a parameter": lambda: TensorDataset(torch.nn.Parameter(torch.randn(30, 2))),
    "a sparse tensor": lambda: TensorDataset(torch.eye(30).to_sparse()),
}


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("name", [*PLAIN, "a transposed tensor", "channels last"])
def test_tensors_that_are_taken_all_at_once_are_those_of_one_after_another(name, num_workers):
    torch.manual_seed(2)
    dataset = (PLAIN | OTHERS)[name]()
    assert (loading.plain_tensors(dataset) is not None) == (name in PLAIN)
    (plan,) = plans(len(dataset), 6, 2, 1, drop_last=False)
    before = generators()
    found, expected = batches_of(dataset, plan, num_workers), batches_of(AsItIs(dataset), plan)
    assert generators() == before
    assert_same(found, expected)
    for (_, batches), (_, other_batches) in zip(found, expected, strict=True):
        for batch, other in zip(batches, other_batches, strict=True):
            assert type(batch) is type(other) is list
            assert [(x.dtype, x.shape, x.stride()) for x in batch] == [
                (x.dtype, x.shape, x.stride()) for x in other
            ]


def test_what_is_more_than_tensors_is_asked_for_each_sample():
    class Augmented(TensorDataset):
        def __getitem__(self, index):
            (x,) = super().__getitem__(index)
            return (x + torch.rand(()) + random.random() + float(np.random.rand()),)

    class Part(Subset):
        def __getitem__(self, index):
            return (super().__getitem__(index)[0] + random.random(),)

        def __getitems__(self, indices):
            return [self[index] for index in indices]

    x = torch.randn(24, 2)
    for dataset in (
        Augmented(x),
        Subset(Augmented(x), range(24)),
        Part(TensorDataset(x), range(24)),
    ):
        assert loading.plain_tensors(dataset) is None
        rows: dict[int, dict] = {}
        for world_size in (1, 3):
            shares = [
                pair
                for plan in plans(24, 12, 1, world_size)
                for pair in batches_of(dataset, plan, epochs=1)
            ]
            rows[world_size] = {
                n: row
                for share, (batch,) in shares
                for n, row in zip(share.micro_batches[0], batch[0], strict=True)
            }
        assert rows[1].keys() == rows[3].keys() and all(
            torch.equal(rows[1][number], rows[3][number]) for number in range(24)
        )
    random.seed(seed_of(1, "sample", 0, 5))
    assert torch.equal(rows[1][5], x[5] + random.random())


@pytest.mark.parametrize("name", OTHERS)
def test_other_tensors_are_left_to_the_usual_way(name):
    assert loading.plain_tensors(OTHERS[name]()) is None


def test_another_collate_function_gets_the_samples():
    (plan,) = plans(30, 6, 2, 1)
    for share, batches in batches_of(
        tensors(), plan, collate=lambda samples: [sample[0] for sample in samples]
    ):
        for micro, batch in zip(share.micro_batches, batches, strict=True):
            assert all(
                torch.equal(row, tensors().tensors[0][number])
                for number, row in zip(micro, batch, strict=True)
            )
