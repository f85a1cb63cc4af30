"""Compare two pieces of plain data for equality."""

from __future__ import annotations

from typing import Any

import torch


def is_same(a: Any, b: Any) -> bool:
    """Return whether two pieces of plain data have the same types, order of keys and values.

    Tensors must be on the CPU; they are the same if dtype, shape and numbers are equal. Numbers are
    compared by value: -0.0 equals 0.0, and two separate tensors with NaNs differ.
    """
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict) and isinstance(b, dict):
        return list(a) == list(b) and all(is_same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(is_same, a, b))
    return a is b or (type(a) is type(b) and bool(a == b))
