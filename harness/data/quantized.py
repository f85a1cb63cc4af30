"""The scale of a quantized tensor, which gives its integers their values."""

from __future__ import annotations

from typing import Any

import torch


def scale_of(tensor: torch.Tensor) -> tuple[Any, ...]:
    """Return the scale and zero point of a quantized tensor; () for any other tensor.

    If they differ by channel, the axis comes first, and both are lists.
    """
    if not tensor.is_quantized:
        return ()
    if tensor.qscheme() in (torch.per_tensor_affine, torch.per_tensor_symmetric):
        return tensor.q_scale(), tensor.q_zero_point()
    return (
        tensor.q_per_channel_axis(),
        tensor.q_per_channel_scales().tolist(),
        tensor.q_per_channel_zero_points().tolist(),
    )
