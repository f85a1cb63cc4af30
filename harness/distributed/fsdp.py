"""Shard the modules of a task over the ranks with FSDP2 (`fully_shard`)."""

from __future__ import annotations

import copy
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    apply_activation_checkpointing,
    checkpoint_wrapper,
)

from harness.errors import UsageError

if TYPE_CHECKING:
    from harness.config.schema import TrainSettings
    from harness.distributed.ranks import World

NONE, FSDP, HSDP = "none", "fsdp", "hsdp"
DTYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def prepare(
    modules: Mapping[str, nn.Module],
    blocks: Sequence[nn.Module],
    optimizers: Iterable[Any],
    settings: TrainSettings,
    world: World,
) -> dict[str, nn.Module]:
    """Shard modules in place, and have their activations computed again, as the settings say.

    Args:
        modules: the modules of a task, by name.
        blocks: the parts of them that are gathered, and computed again, one by one.
        optimizers: the optimizers of the task, which update the sharded parameters afterwards.
        settings: the settings.
        world: the ranks.

    Returns:
        A copy of each module for an average of the weights, if there is one; it is sharded as the
        module is.

    Raises:
        UsageError: The settings do not fit the ranks, or an optimizer has state already.
    """
    chosen = {name: blocks_of(module, blocks) for name, module in modules.items()}
    if settings.checkpoint_activations:
        check_recomputable([block for of_module in chosen.values() for block in of_module])
        chosen = {name: checkpointed(module, chosen[name]) for name, module in modules.items()}
    copies, of_copies = dict[str, nn.Module](), dict[str, list[nn.Module]]()
    if settings.ema_decay is not None:
        copies, of_copies = copy.deepcopy((dict(modules), chosen))
    if settings.shard != NONE and world.joined:
        check_apart(modules)
        sharder = Sharder(world, settings.shard, settings.shard_size, DTYPES[settings.precision])
        for name, module in modules.items():
            sharder.shard(module, chosen[name])
        sharder.follow(optimizers)
        for name, module in copies.items():
            sharder.shard(module.requires_grad_(False), of_copies[name])
    return copies


class Sharder:
    """Shards modules in place, and has optimizers update the sharded parameters.

    Args:
        world: the ranks.
        kind: FSDP (each parameter over all ranks) or HSDP (over the ranks of one replica).
        size: the ranks of one replica; None: those of a node. Only for HSDP.
        dtype: the dtype of the forward and backward pass; None: that of the parameters.

    Raises:
        UsageError: the ranks do not divide into replicas of that size.
    """

    def __init__(
        self, world: World, kind: str, size: int | None, dtype: torch.dtype | None
    ) -> None:
        from torch.distributed.device_mesh import init_device_mesh

        self._dtype = dtype
        self._sharded = dict[int, nn.Parameter]()  # by the id of the parameter as built
        self._built = list[nn.Parameter]()  # keeps their ids from being used again
        if kind == FSDP:
            self._mesh = init_device_mesh(world.device.type, (world.size,))
            return
        size = size or int(os.environ.get("LOCAL_WORLD_SIZE", world.size))
        sizes = world.gather(size)
        if len(set(sizes)) > 1:
            raise UsageError(
                "train.shard=hsdp: the nodes have unlike numbers of ranks",
                f"found: {sizes}, by rank",
                "Set train.shard_size.",
            )
        if world.size % size:
            fitting = [number for number in range(1, world.size + 1) if world.size % number == 0]
            raise UsageError(
                f"train.shard_size={size} does not divide the {world.size} ranks",
                f"expected: one of {', '.join(map(str, fitting))}",
                "It is the number of ranks that hold one replica of the model.",
            )
        self._mesh = init_device_mesh(
            world.device.type, (world.size // size, size), mesh_dim_names=("replica", "shard")
        )

    def shard(self, module: nn.Module, blocks: Sequence[nn.Module]) -> None:
        """Shard a module in place.

        The parameters of each block are gathered when that is used, the others with the module's.
        """
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        before = dict(module.named_parameters())
        # Gradients are summed in full precision; what leaves the module has it, too.
        of_block = MixedPrecisionPolicy(self._dtype, self._dtype and torch.float32)
        of_root = MixedPrecisionPolicy(
            self._dtype, self._dtype and torch.float32, self._dtype and torch.float32
        )
        order = {id(part): number for number, part in enumerate(module.modules())}
        try:
            for block in sorted(blocks, key=lambda block: -order[id(block)]):  # inner ones first
                fully_shard(block, mesh=self._mesh, mp_policy=of_block)
            fully_shard(module, mesh=self._mesh, mp_policy=of_root)
        except (ValueError, TypeError, NotImplementedError, AssertionError) as error:
            raise UsageError(
                f"train.shard: torch cannot shard {type(module).__name__}",
                f"found: {str(error).splitlines()[0]}",
                "Name other blocks (Task.blocks), or train without train.shard.",
            ) from error
        after = dict(module.named_parameters())
        for name, parameter in before.items():
            self._built.append(parameter)
            self._sharded[id(parameter)] = after[name]
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(_refuse)  # type: ignore[no-untyped-call]

    def follow(self, optimizers: Iterable[Any]) -> None:
        """Have optimizers that were made of the parameters as built update the sharded ones.

        Raises:
            UsageError: An optimizer has state for the parameters already, or none that is found
                updates a parameter that is trained.
        """
        followed = set[int]()
        for optimizer in optimizers:
            for part in (optimizer, *vars(optimizer).values()):
                if not isinstance(part, torch.optim.Optimizer):
                    continue
                if part.state:
                    raise UsageError(
                        "an optimizer of the task has state before the first step",
                        f"found: {type(part).__name__} with state of {len(part.state)} parameters",
                        "Take one that makes its state in the first step (AdamW, SGD), or train "
                        "without train.shard.",
                    )
                for group in part.param_groups:
                    followed |= set(map(id, group["params"]))
                    group["params"][:] = [
                        self._sharded.get(id(parameter), parameter) for parameter in group["params"]
                    ]

        lost = [one for one in self._built if one.requires_grad and id(one) not in followed]
        if lost:
            raise UsageError(
                f"train.shard: no optimizer of the task updates {len(lost)} parameter(s)",
                f"found: shapes {', '.join(str(tuple(one.shape)) for one in lost[:5])}",
                "Name each optimizer: Task(optimizers={NAME: …}); freeze what is not trained.",
            )


def _refuse(parameter: torch.Tensor) -> None:
    """Refuse a gradient of a parameter as built: the model has a sharded one in its place."""
    raise UsageError(
        "train.shard: the task computes with a parameter that it has kept from before",
        f"found: a gradient of shape {tuple(parameter.shape)}",
        "Ask the module for it in each step: module.weight, module.parameters().",
    )


def check_apart(modules: Mapping[str, nn.Module]) -> None:
    """Check that no parameter is in two modules, and no module in another one.

    Raises:
        UsageError: One is, and sharding each module would part them.
    """
    owner: dict[int, str] = {}
    for name, module in modules.items():
        for key, parameter in module.named_parameters():
            if owner.setdefault(id(parameter), name) != name:
                raise UsageError(
                    f"train.shard: {owner[id(parameter)]} and {name} share parameters",
                    f"found: {key}",
                    "Put them into one module: Task(modules=…).",
                )


def check_recomputable(blocks: Sequence[nn.Module]) -> None:
    """Check that there are blocks, and that a second forward pass changes nothing in them.

    Raises:
        UsageError: There are none, or one counts its forward passes.
    """
    counting = [
        type(part).__name__
        for block in blocks
        for part in block.modules()
        if getattr(part, "num_batches_tracked", None) is not None
    ]
    if counting or not blocks:
        raise UsageError(
            "train.checkpoint_activations: "
            + ("a block counts its forward passes" if counting else "the task has no blocks"),
            f"found: {counting[0]}" if counting else "found: no repeated modules",
            "Name others: Task(blocks=[…]).",
        )


def blocks_of(module: nn.Module, given: Sequence[nn.Module]) -> list[nn.Module]:
    """Return the blocks of a module: those given that are in it, else those that are repeated.

    Repeated are modules of one class that stand side by side in a ModuleList or a Sequential. A
    block that shares a parameter with the rest of the module is left out.
    """
    within = {id(part) for part in module.modules()} - {id(module)}
    chosen = [block for block in given if id(block) in within] if given else list(_repeated(module))
    holders = _holders(module)
    return [
        block
        for block in chosen
        if all(holders[number] == count for number, count in _holders(block).items())
    ]


def _holders(module: nn.Module) -> Counter[int]:
    """Count the places in a module that hold each parameter, by the parameter's id."""
    return Counter(
        id(parameter)
        for part in module.modules()
        for parameter in part._parameters.values()
        if parameter is not None
    )


def _repeated(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the outermost modules of one class that stand side by side and have parameters."""
    if isinstance(module, nn.ModuleList | nn.Sequential):
        with_parameters = [child for child in module if next(child.parameters(), None) is not None]
        counts = Counter(map(type, with_parameters))
        chosen = {
            id(child)
            for child in with_parameters
            if counts[type(child)] > 1 and not isinstance(child, nn.ModuleList | nn.ModuleDict)
        }
    else:
        chosen = set()
    for child in module.children():
        if id(child) in chosen:
            yield child
        else:
            yield from _repeated(child)


def checkpointed(module: nn.Module, blocks: Sequence[nn.Module]) -> list[nn.Module]:
    """Have the blocks of a module compute their activations again in the backward pass.

    Returns:
        The wrappers that stand in the module in place of the blocks.
    """
    chosen, wrapped = {id(block) for block in blocks}, list[nn.Module]()

    def wrap(block: nn.Module) -> nn.Module:
        wrapped.append(checkpoint_wrapper(block))
        return wrapped[-1]

    apply_activation_checkpointing(
        module, checkpoint_wrapper_fn=wrap, check_fn=lambda part: id(part) in chosen
    )
    return wrapped
