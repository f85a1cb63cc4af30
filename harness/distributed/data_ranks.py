"""Find which ranks train on the same samples.

Ranks that average their gradients train on different samples: all ranks of DistributedDataParallel,
or those of the mesh that was given to `fully_shard`. Ranks that tensor parallelism makes compute
the same step together, each with a part of every layer, need the same samples and the same random
numbers. The number of a rank among those it averages gradients with is its *data rank*.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from harness.distributed import dtensors
from harness.distributed.ranks import World
from harness.distributed.wrappers import ddp_wrappers, unwrap
from harness.errors import UsageError

# Key in a rank's own entry of a checkpoint: its data rank, kept if that is another number.
DATA_RANK = "data_rank"
# Key in the main file of a checkpoint with shards: what it says of the ranks (`put_entries`).
RANKS = "ranks"
ELSEWHERE = "in another shard"  # stands for the state of another rank's data iterator
Group = tuple[int, ...]  # ranks that average their gradients, in the order of their mesh


def deal(world: World, tracked: Mapping[str, Any]) -> str:
    """Set the data rank of each rank as the tracked modules need it; return a notice, or "".

    Collective: every rank must call it.

    Args:
        world: the ranks of this attempt, which are changed in place.
        tracked: the tracked objects, by name.

    Raises:
        UsageError: The modules or the ranks do not agree, it cannot be told which ranks need the
            same samples, or the data was dealt out already.
    """
    modules = {name: part for own, obj in tracked.items() for name, part in modules_in(own, obj)}
    dtensors.reshard(map(unwrap, modules.values()))
    mine = _averaged_over(modules, world.rank, world.size)
    groups = _checked(world.gather(("track", sorted(tracked), mine)))
    before, ranks = world.data_ranks, tuple(group.index(at) for at, group in enumerate(groups))
    dtensors.note_groups(groups)
    world.deal_to(ranks, dtensors.summary(map(unwrap, modules.values())))
    if ranks == before or (size := max(ranks) + 1) == world.size:
        return ""
    together = [rank for rank, number in enumerate(ranks) if number == 0]
    return (
        f"tensor parallelism: {len(together)} ranks compute each step together (ranks "
        f"{', '.join(map(str, together[:4]))}{' …' if len(together) > 4 else ''} the same) and are "
        f"given the same samples, which are dealt out as to {size} rank(s)"
    ) + "; on GPUs it was never measured" * (world.device.type == "cuda")


def modules_in(name: str, obj: Any) -> Iterator[tuple[str, nn.Module]]:
    """Yield a tracked module, or the modules in the attributes of another object, with a name."""
    if isinstance(unwrap(obj), nn.Module):
        yield name, obj
    else:
        for key, value in getattr(obj, "__dict__", {}).items():
            if isinstance(value, nn.Module):
                yield f"{name}.{key}", value


def _checked(everyones: list[tuple[str, list[str], Group]]) -> list[Group]:
    """Return the group of each rank.

    Raises:
        UsageError: The ranks do not track the same names, or do not agree on the groups.
    """
    for rank, found in enumerate(everyones):
        is_here = isinstance(found, tuple) and found[:1] == ("track",)
        if not is_here or found[1] != everyones[0][1]:
            raise UsageError(
                "the ranks do not track the same objects",
                f"found: {', '.join(everyones[0][1])} on rank 0, "
                f"{', '.join(found[1]) if is_here else 'no run.track(…)'} on rank {rank}",
                "Call run.track(…) with the same names on every rank, and not on the writer alone.",
            )
    groups = [group for _, _, group in everyones]
    for rank, group in enumerate(groups):
        other = next((each for each in group if groups[each] != group), None)
        if other is not None or len(group) != len(groups[0]):
            raise UsageError(
                "the ranks do not agree on which of them train on the same samples",
                f"found: rank {rank} averages gradients over ranks {list(group)}, "
                f"rank {other or 0} over {list(groups[other or 0])}",
                "Shard on the same mesh on every rank, with as many ranks along each dimension.",
            )
    return groups


def _averaged_over(modules: Mapping[str, nn.Module], rank: int, size: int) -> Group:
    """Return the ranks with which a rank averages its gradients, itself among them.

    Raises:
        UsageError: They are not the same for all parameters, or cannot be told.
    """
    found, everyone = dict[Group, str](), tuple(range(size))
    by_fsdp = dtensors.fsdp_groups(map(unwrap, modules.values()))
    is_spanned = False
    for name, module in modules.items():
        plain = unwrap(module)
        tensors = dict((*plain.named_parameters(), *plain.named_buffers()))
        sharded = {key: of for key, of in tensors.items() if dtensors.is_sharded(of)}
        others = {key: of for key, of in sharded.items() if id(of) not in by_fsdp}
        if others and len(others) == len(tensors) and not dtensors.are_cut_unlike(others.values()):
            raise _not_told(name)
        for key, tensor in sharded.items():
            is_spanned |= dtensors.ranks_of(tensor) >= set(everyone)
            group = by_fsdp.get(id(tensor), (rank,))
            found.setdefault(everyone if len(group) == size else group, f"{name}.{key}")
        for shell in ddp_wrappers(module):
            ranks = tuple(torch.distributed.get_process_group_ranks(shell.process_group))
            found.setdefault(everyone if len(ranks) == size else ranks, name)
    if len(found) > 1:
        (one, first), (other, second), *_ = found.items()
        raise UsageError(
            "the gradients of some parameters are averaged over other ranks than those of others",
            f"found: on rank {rank}, {first} over ranks {list(one)}, {second} over {list(other)}",
            "Which ranks need the same samples must be the same for all of them: put a model with "
            "tensor parallelism under fully_shard(…, mesh=…) as a whole, or not at all. Expert "
            "parallelism is not supported.",
        )
    group = next(iter(found), everyone)
    if group != everyone and not is_spanned:
        raise UsageError(
            f"{found[group]} is trained on some of the ranks only",
            f"found: its gradients are averaged over ranks {list(group)} of {size}, and no tensor "
            "of it is cut over all of them, as tensor parallelism does",
            "Models of their own on each group of ranks (pipelines, local SGD, ensembles, DDP on a "
            "part of the ranks) are not supported.",
        )
    return group


def _not_told(name: str) -> UsageError:
    return UsageError(
        f"{name}: it cannot be told which ranks need the same samples",
        "found: sharded parameters that are all cut alike, and no module under fully_shard that "
        "holds them",
        "Track the whole module that was given to fully_shard, and not its parts. Data parallelism "
        "by DTensors alone is not supported.",
    )


def says_of_ranks(said: Any, count: int) -> bool:
    """Return whether this is what a main file says of so many ranks."""
    return (
        isinstance(said, dict)
        and isinstance(numbers := said.get("data_ranks"), list)
        and len(numbers) == count
        and all(type(number) is int and 0 <= number < count for number in numbers)
        and isinstance(names := said.get("own"), list)
        and all(isinstance(name, str) for name in names)
        and type(said.get("has_iterators")) is bool
    )


def put_entries(payload: dict[str, Any], entries: Mapping[int, Mapping[str, Any]]) -> None:
    """Give the content of a main file, in place, what each rank has for itself, as if it held that.

    In the main file of a checkpoint with shards, `ranks` holds

        data_ranks      the data rank of each rank that has made it
        own             the names of what any rank has for itself
        has_iterators   whether the data iterator of any rank has a state
        attributes      those of rank 0, if they differ by rank

    The entries of ranks that are not given are there without content.

    Args:
        payload: the content of the main file.
        entries: by rank: the entry `own` of its shard.
    """
    ranks = payload.pop(RANKS)
    numbers, away = ranks["data_ranks"], ELSEWHERE if ranks["has_iterators"] else None
    empty, is_dealt = dict.fromkeys(ranks["own"]), numbers != [*range(len(numbers))]
    of_ranks = [entries.get(rank, empty) for rank in range(len(numbers))]
    own = [
        {name: part for name, part in entry.items() if name not in ("rng", "iterator")}
        | ({DATA_RANK: number} if is_dealt else {})
        for number, entry in zip(numbers, of_ranks, strict=True)
    ]
    payload["rng"] = [entry.get("rng") for entry in of_ranks]
    iterators = [entry.get("iterator", away) for entry in of_ranks]
    payload["data"] = payload["data"] | {"iterators": iterators}
    if any(own):
        payload["own"] = own


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
