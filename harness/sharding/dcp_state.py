"""The state of optimizers as the helpers of torch.distributed.checkpoint have it: by names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from harness.state import parameter_names

BUFFERS = ("running_mean", "running_var", "num_batches_tracked")
_LOADING = """\
state = {"model": model.state_dict()}
dcp.load(state, checkpoint_id="OUT")
model.load_state_dict(state["model"])"""
_LOADING_ALL = """\
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
weights, moments = get_state_dict(model, optimizer)
dcp.load({"model": weights, "NAME": moments}, checkpoint_id="OUT")
set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=moments)"""


def optimizers_by_name(
    payload: Mapping[str, Any], module: str
) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Return the states of a module's optimizers with parameters by name, and those left out.

    A checkpoint records no names that follow from the order of the module's parameters. These are
    its tensors but for buffers: those of batch norms, and those in whose shape no optimizer keeps
    anything. With other buffers the numbers do not fit, and the optimizer is left out.

    Args:
        payload: The content of a checkpoint of a run, with all tensors whole.
        module: The name of the module.
    """
    optimizers = {name: payload[f"{name}_state_dict"] for name in parameter_names.numbered(payload)}
    shapes = {
        tuple(item.shape)
        for state in optimizers.values()
        for own in state["state"].values()
        for item in (own.values() if isinstance(own, Mapping) else ())
        if isinstance(item, torch.Tensor)
    }
    parameters = {
        f"{module}.{key}"
        for key, value in payload[f"{module}_state_dict"].items()
        if not key.endswith(BUFFERS)
        and (not shapes or tuple(getattr(value, "shape", ())) in shapes)
    }
    names = parameter_names.derived(payload, {module}, parameters) | payload.get("names", {})
    found = {
        name: _by_name(state, names.get(name, []), f"{module}.")
        for name, state in optimizers.items()
    }
    return {name: value for name, value in found.items() if value}, [
        name for name, value in found.items() if not value
    ]


def _by_name(
    optimizer: Mapping[str, Any], names: Sequence[Sequence[str | None]], prefix: str
) -> dict[str, Any]:
    """Return the state of an optimizer with parameters by name, as DCP's helpers give and take it.

    Args:
        optimizer: The state, with parameters by number.
        names: The names of each group's parameters, from a checkpoint.
        prefix: The beginning of all names, which is removed.

    Returns:
        {} if a name is not known, or begins otherwise.
    """
    known = [name for group in names for name in group]
    if not known or not all(name is not None and name.startswith(prefix) for name in known):
        return {}
    called, groups = dict[Any, str](), list[dict[str, Any]]()
    for group, own in zip(optimizer["param_groups"], names, strict=True):
        bare = [str(name).removeprefix(prefix) for name in own]
        called |= dict(zip(group["params"], bare, strict=True))
        groups.append(group | {"params": bare})
    state = {called[number]: own for number, own in optimizer["state"].items()}
    return {"state": state, "param_groups": groups}


def loading_code(optimizers: Sequence[str]) -> list[str]:
    """Return the lines of code that load a folder `OUT` of `save_dcp`, as DCP means it.

    Args:
        optimizers: The names of the optimizers in the folder; of several none is loaded.
    """
    lines = ["import torch.distributed.checkpoint as dcp", "model = …  # built as for training"]
    if len(optimizers) != 1:
        return [*lines, *_LOADING.splitlines()]
    return [*lines, "optimizer = …", *_LOADING_ALL.replace("NAME", optimizers[0]).splitlines()]
