"""List the values in an object of a library that a program may carry from step to step.

A setting that the loop changes may lie in a config of OmegaConf, a count in an environment. Of a
library's object only plain values and arrays in public attributes are listed, and of a mapping its
plain items and the mappings in it. What displays, logs or measures is left out: it changes
in each step, and training does not depend on it.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import re
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import Dataset

from harness.state.kinds import PLAIN
from harness.untracked.object_walk import MOST_ITEMS, spelled
from harness.untracked.unkept_values import is_programs

# Classes that display, log or measure, by their names and by their methods.
SHOWS = re.compile(
    r"tqdm|progress|rich\.|log(ger|ging|uru)|writer|wandb|mlflow|tensorboard|profil|timer|watch"
    r"|meter|metric|plot",
    re.IGNORECASE,
)
SHOWING = ("flush", "refresh", "info", "log", "print", "add_scalar", "add_task")
# Numbers that an object without attributes of its own counts up with each draw from it.
COUNTS = {"numpy": "n_children_spawned", "torch": "num_generated"}


def is_library_object(value: Any) -> bool:
    """Return whether a value is an object of a library whose values are listed."""
    kind: Any = type(value)
    return _is_library_class(kind)


@functools.lru_cache(1000)
def _is_library_class(kind: type) -> bool:
    module = str(kind.__module__)
    top = module.partition(".")[0]
    return (
        top not in ("torch", "numpy", "harness", "__main__")
        and top not in sys.stdlib_module_names
        and not issubclass(kind, nn.Module | torch.Tensor | np.ndarray | type)
        and not is_programs(kind)
        and not SHOWS.search(f"{module}.{kind.__name__}")
        and not any(callable(getattr(kind, name, None)) for name in SHOWING)
    )


def is_searched(holder: Any, value: Any) -> bool:
    """Return whether to list the values in an object of a library that `holder` holds.

    Objects inside other objects of libraries are left out, except for mappings inside mappings, and
    so are objects inside datasets.
    """
    if not is_library_object(value) or isinstance(holder, Dataset):
        return False
    return not is_library_object(holder) or (items(holder) is not None and items(value) is not None)


def items(value: Any) -> dict[Any, Any] | list[Any] | None:
    """Return the dict or list in which a mapping or sequence of a library keeps its items.

    No item is asked of the library: that might load it, or draw from a generator. The result is
    None for other objects.
    """
    if isinstance(value, dict | list):
        return value
    has_keys, is_list = hasattr(type(value), "keys"), hasattr(type(value), "append")
    if not (has_keys or is_list):
        return None
    with contextlib.suppress(Exception):  # a class may raise at any question
        for inner in list(getattr(value, "__dict__", {}).values()):
            if has_keys and isinstance(inner, dict) and inner and [*inner] == [*value.keys()]:
                return inner
            if is_list and isinstance(inner, list) and inner and len(inner) == len(value):
                return inner
    return None


def parts(value: Any) -> Iterator[tuple[str, Any]]:
    """Yield the values in an object of a library, each after its path."""
    held = items(value)
    if isinstance(held, list):
        yield from ((f"[{at}]", _plain(item)) for at, item in enumerate(held[:MOST_ITEMS]))
        return
    if held is not None:
        some: Any = itertools.islice(dict.items(held), MOST_ITEMS)
        yield from ((f"[{spelled(key, at)}]", _plain(item)) for at, (key, item) in enumerate(some))
        return
    yield from (
        (f".{name}", item)
        for name, item in list(getattr(value, "__dict__", {}).items())
        if not str(name).startswith("_")
        and (item is None or type(item) in PLAIN or isinstance(item, np.ndarray | torch.Tensor))
    )


def _plain(item: Any) -> Any:
    """Return an item of a mapping as it is used: OmegaConf keeps each plain value in a node."""
    inner = getattr(item, "__dict__", {}).get("_val", item)
    is_kept = type(inner) in (*PLAIN, list, dict, tuple) or items(inner) is not None
    return inner if is_kept else None


def count_of(value: Any) -> Any:
    """Return how many children a NumPy SeedSequence has, or how many numbers a SobolEngine gave.

    None for other objects.
    """
    kind = type(value)
    name = COUNTS.get(str(kind.__module__).partition(".")[0])
    if name is None or isinstance(value, nn.Module | torch.Tensor | np.ndarray):
        return None
    return getattr(value, name, None)
