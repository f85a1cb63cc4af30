"""How sharded tensors are cut: each element is in one part, and the parts are those that torch's
own functions leave on each rank."""

from __future__ import annotations

import json
import math
from pathlib import Path

import programs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.distributed.layout import COPIES, SHARD, STRIDED, Box, Layout, uncovered

SHAPES = st.lists(st.integers(0, 9), max_size=3).map(tuple)


@st.composite
def layouts(draw: st.DrawFn) -> tuple[Layout, tuple[int, ...]]:
    """A layout, and the shape of a tensor that has it."""
    shape = draw(SHAPES)
    mesh = tuple(draw(st.lists(st.integers(1, 4), min_size=1, max_size=3)))
    placements: list[tuple] = []
    for number in reversed(range(len(mesh))):
        kind = draw(st.sampled_from([COPIES, SHARD, STRIDED] if shape else [COPIES]))
        if kind == COPIES:
            placements.insert(0, (COPIES,))
            continue
        dimension = draw(st.integers(0, len(shape) - 1))
        cut = zip(mesh[number + 1 :], placements, strict=True)
        parts = math.prod(n for n, it in cut if it[0] != COPIES and it[1] == dimension)
        placements.insert(0, (kind, dimension, *([parts] if kind == STRIDED else [])))
    ranks = draw(st.permutations(range(math.prod(mesh))))
    return Layout(mesh, tuple(ranks), tuple(placements)), shape


@given(layouts())
def test_each_element_is_in_one_part(of: tuple[Layout, tuple[int, ...]]):
    layout, shape = of
    boxes = layout.boxes(shape)
    assert uncovered(boxes.values(), shape) == ""
    for rank in layout.ranks:
        first = layout.holders(rank)[0]
        assert rank in layout.holders(rank)
        assert layout.box(rank, shape) == layout.box(first, shape)


@given(layouts(), st.data())
def test_a_part_that_is_missing_moved_or_there_twice_is_seen(of, data):
    layout, shape = of
    boxes = [box for box in layout.boxes(shape).values() if box.numel]
    if not boxes:
        return
    box = data.draw(st.sampled_from(boxes))
    others = [other for other in boxes if other != box]
    assert uncovered(others, shape)
    assert uncovered([*boxes, box], shape)
    if shape:
        at = data.draw(st.integers(0, len(shape) - 1))
        begin = (*box.begin[:at], box.begin[at] + 1, *box.begin[at + 1 :])
        assert uncovered([*others, Box(begin, box.size)], shape)


@given(layouts(), layouts())
def test_the_overlaps_with_the_parts_of_another_layout_make_up_each_part(one, other):
    (layout, shape), (wanted, _) = one, other
    try:
        parts = wanted.boxes(shape)
    except IndexError:  # it cuts a dimension that this tensor has not
        return
    for part in parts.values():
        overlaps = [part.overlap(box) for box in layout.boxes(shape).values()]
        inside = [
            Box(tuple(index.start for index in overlap.within(part)), overlap.size)
            for overlap in overlaps
            if overlap is not None
        ]
        assert uncovered(inside, part.size) == ""


WRAPS = {
    "fsdp": (2, "fully_shard(model.body[0]); fully_shard(model)"),
    "fsdp of three": (3, "fully_shard(model)"),
    "hsdp": (4, "fully_shard(model, mesh=mesh('copies', 'shards', 2, 2))"),
    "tensor parallel": (2, "parallelize_module(model, mesh('tp', None, 2), plan)"),
    "both": (
        4,
        "m = mesh('dp', 'tp', 2, 2); parallelize_module(model, m['tp'], plan); "
        "fully_shard(model, mesh=m['dp'])",
    ),
    "both, uneven": (
        6,
        "m = mesh('dp', 'tp', 3, 2); parallelize_module(model, m['tp'], plan); "
        "fully_shard(model, mesh=m['dp'])",
    ),
}
MARKED = """
import json
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel, RowwiseParallel, parallelize_module
)
from harness.distributed.dtensors import is_sharded, layout_of
from harness.errors import UsageError
from harness.distributed.layout import uncovered

def mesh(one, other, *sizes):
    names = (one,) if other is None else (one, other)
    return init_device_mesh("cpu", sizes, mesh_dim_names=names)

torch.distributed.init_process_group("gloo")
model = nn.Module()
model.body = nn.ModuleList([nn.Linear(7, 31), nn.Linear(31, 12), nn.LayerNorm(1), nn.Linear(3, 1)])
model.scale = nn.Parameter(torch.zeros(1, 1, 2))
whole = {}
for name, parameter in model.named_parameters():
    numbers = torch.arange(float(parameter.numel())).view(parameter.shape)
    parameter.data.copy_(numbers)
    whole[name] = numbers
plan = {"body.0": ColwiseParallel(), "body.1": RowwiseParallel()}
WRAP
rank, seen = torch.distributed.get_rank(), {}
for name, parameter in model.named_parameters():
    if not is_sharded(parameter):
        continue
    if parameter.device_mesh.size() < torch.distributed.get_world_size():
        try:  # tensor parallel has left it alone
            layout_of(name, parameter)
        except UsageError as error:
            assert "without all ranks" in str(error)
            continue
    layout = layout_of(name, parameter)
    box = layout.box(rank, parameter.shape)
    expected = whole[name][tuple(slice(a, b) for a, b in zip(box.begin, box.end))]
    assert torch.equal(parameter.to_local(), expected), (name, box)
    assert uncovered(layout.boxes(parameter.shape).values(), parameter.shape) == ""
    seen[name] = [str(layout.placements), list(box.size)]
print(json.dumps(seen), flush=True)
torch.distributed.destroy_process_group()
"""


@pytest.mark.parametrize("way", list(WRAPS))
def test_the_parts_are_those_that_torch_leaves_on_each_rank(tmp_path: Path, way: str):
    ranks, wrap = WRAPS[way]
    lived = programs.live(tmp_path, MARKED.replace("WRAP", wrap), "whole", ranks=ranks)
    assert set(lived.codes) == {0}, "\n".join(lived.texts)
    seen = json.loads(lived.text.splitlines()[-1])
    assert seen["body.0.weight"][1] != [31, 7]
