"""Whether two pieces of plain data are the same, bit for bit, as far as a checkpoint keeps them."""

from __future__ import annotations

from typing import Any

import torch


def is_same(a: Any, b: Any) -> bool:
    """Same kinds, same order of keys, same values; of tensors on the CPU the same dtype, shape and numbers."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict) and isinstance(b, dict):
        return list(a) == list(b) and all(is_same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(is_same, a, b))
    return a is b or (type(a) is type(b) and bool(a == b))
