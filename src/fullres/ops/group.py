"""What group norm with statistics a position consists of."""

from __future__ import annotations

import torch
from torch import Tensor

from fullres.ops.arrays import for_kernel

_DTYPES = (torch.float32, torch.float64)
"""That the kernel takes."""


def group_moments(x: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Mean and biased variance over the channels of each group at each pixel.

    Args:
        x: (B, C, H, W), float32 or float64.
        groups: divides C.

    Returns:
        Twice (B, groups, H, W).

    >>> mean, var = group_moments(torch.tensor([1.0, 3.0, 5.0, 5.0]).reshape(1, 4, 1, 1), 2)
    >>> mean.flatten(), var.flatten()
    (tensor([2., 5.]), tensor([1., 0.]))
    """
    if for_kernel(x, dtypes=_DTYPES):
        from fullres.ops import group_cpu

        return group_cpu.group_moments(x, groups)
    grouped = x.unflatten(1, (groups, -1))  # type: ignore[no-untyped-call]
    var, mean = torch.var_mean(grouped, dim=2, correction=0)
    return mean, var


def group_normalised(
    x: Tensor, mean: Tensor, scale: Tensor, weight: Tensor | None, bias: Tensor | None
) -> Tensor:
    """`(x - mean) * scale * weight + bias`, mean and scale being those of each group and pixel.

    Args:
        x: (B, C, H, W).
        mean: (B, groups, H, W).
        scale: likewise.
        weight: (C,), or None for ones.
        bias: (C,), or None for zeros.

    Returns:
        Like `x`.
    """
    if for_kernel(x, weight, bias, dtypes=_DTYPES):
        from fullres.ops import group_cpu

        mean, scale = mean.contiguous(), scale.contiguous()
        return group_cpu.group_normalised(x, mean, scale, weight, bias)
    size = x.shape[1] // mean.shape[1]
    mean, scale = (values.repeat_interleave(size, 1) for values in (mean, scale))
    if weight is not None:
        scale = scale * weight[:, None, None]
    y = (x - mean) * scale
    return y if bias is None else y + bias[:, None, None]
