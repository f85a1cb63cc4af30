"""What a DataLoader is taken for: what is not taken over is refused, never dropped silently."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset, default_collate

from harness.data.dataloader import adopt
from harness.errors import UsageError

DATA = TensorDataset(torch.arange(40.0))


class Scaling(DataLoader):
    def __iter__(self):
        for (x,) in super().__iter__():
            yield (x * 100,)


class Filtering(DataLoader):
    def _get_iterator(self):
        return map(torch.neg, super()._get_iterator())


class Ordering(DataLoader):
    @property
    def _index_sampler(self):
        return [[3, 2], [1, 0]]


class Scaled(Scaling):
    pass


@pytest.mark.parametrize("kind", [Scaling, Filtering, Ordering, Scaled])
def test_a_loader_with_an_iteration_of_its_own_is_refused(kind):
    with pytest.raises(UsageError, match=f"{kind.__name__} iterates in a way of its own"):
        adopt(kind(DATA, 4))


def test_a_loader_whose_iterator_is_replaced_is_refused():
    loader = DataLoader(DATA, 4)
    loader._get_iterator = lambda: iter([])  # type: ignore[method-assign]
    with pytest.raises(UsageError, match="iterates in a way of its own"):
        adopt(loader)


def test_a_loader_that_only_sets_arguments_is_taken_over():
    class Collating(DataLoader):
        def __init__(self, data, size):
            super().__init__(data, size, collate_fn=self.put_together)

        def put_together(self, samples):
            return default_collate(samples)

        def __len__(self):
            return 3

    adopted = adopt(Collating(DATA, 4))
    assert adopted is not None and adopted.batch_size == 4
    assert adopted.batching.collate is not None


def test_a_loader_of_torchdata_is_taken_over():
    own = {"__module__": "torchdata.stateful_dataloader", "__iter__": lambda self: iter([])}
    assert adopt(type("StatefulDataLoader", (DataLoader,), own)(DATA, 4)) is not None
