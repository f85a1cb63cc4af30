"""Find which ranks train on the same samples.

Ranks that average their gradients train on different samples: all ranks of DistributedDataParallel,
or those of the mesh that was given to `fully_shard`. Ranks that tensor parallelism makes compute
the same step together, each with a part of every layer, need the same samples and the same random
numbers. The number of a rank among those it averages gradients with is its *data rank*.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from harness.distributed import dtensors
from harness.distributed.ranks import World
from harness.distributed.wrappers import ddp_wrappers, unwrap
from harness.errors import UsageError

# Key in a rank's own entry of a checkpoint: its data rank, kept if that is another number.
DATA_RANK = "data_rank"


def deal(world: World, tracked: Mapping[str, Any]) -> str:
    """Set the data rank of each rank as the tracked modules need it; return a notice, or "".

    Collective: every rank must call it.

    Args:
        world: the ranks of this attempt, which are changed in place.
        tracked: the tracked objects, by name.

    Raises:
        UsageError: The modules or the ranks do not agree, or the data was dealt out already.
    """
    groups = world.gather(_averaged_over(tracked, world.rank, world.size))
    for rank, group in enumerate(groups):
        if len(group) != len(groups[0]) or any(groups[other] != group for other in group):
            raise UsageError(
                "the ranks do not agree on which of them train on the same samples",
                f"found: rank {rank} averages gradients over ranks {list(group)}, "
                f"rank {group[-1]} over {list(groups[group[-1]])}",
                "Shard on the same mesh on every rank, with as many ranks along each dimension.",
            )
    before, ranks = world.data_ranks, tuple(group.index(at) for at, group in enumerate(groups))
    world.deal_to(ranks)
    if ranks == before or (size := max(ranks) + 1) == world.size:
        return ""
    together = [rank for rank, number in enumerate(ranks) if number == 0]
    return (
        f"tensor parallelism: {len(together)} ranks compute each step together (ranks "
        f"{', '.join(map(str, together[:4]))}{' …' if len(together) > 4 else ''} the same) and are "
        f"given the same samples, which are dealt out as to {size} rank(s)"
    )


def dealt_to(payload: Mapping[str, Any]) -> list[int]:
    """Return the data rank of each rank that has made a checkpoint; [] for no checkpoint."""
    own = payload.get("own") or [{}] * len(payload.get("rng", ()))
    return [entry.get(DATA_RANK, rank) for rank, entry in enumerate(own)]


def changed_ranks(payload: Mapping[str, Any], world: World) -> str:
    """Return in words how the ranks differ from those of a checkpoint."""
    before = dealt_to(payload)
    if len(before) != world.size:
        return f"{len(before)} rank(s) before, {world.size} now"
    return f"samples were dealt out to {max(before) + 1} rank(s) before, to {world.data_size} now"


def _averaged_over(tracked: Mapping[str, Any], rank: int, size: int) -> tuple[int, ...]:
    """Return the ranks with which a rank averages its gradients, itself among them, in order.

    Raises:
        UsageError: They are not the same for all parameters.
    """
    found = dict[tuple[int, ...], str]()  # by ranks: what is averaged over them
    for name, obj in tracked.items():
        module = unwrap(obj)
        if not isinstance(module, nn.Module):
            continue
        for key, group in dtensors.averaged_over(module, rank):
            found.setdefault(tuple(range(size)) if len(group) == size else group, f"{name}.{key}")
        if ddp_wrappers(obj):
            found.setdefault(tuple(range(size)), name)
    if len(found) > 1:
        (one, first), (other, second), *_ = found.items()
        raise UsageError(
            "the gradients of some parameters are averaged over other ranks than those of others",
            f"found: on rank {rank}, {first} over ranks {list(one)}, {second} over {list(other)}",
            "Which ranks need the same samples must be the same for all of them: put a model with "
            "tensor parallelism under fully_shard(…, mesh=…) as a whole, or not at all.",
        )
    return next(iter(found), tuple(range(size)))
