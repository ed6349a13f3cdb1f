"""Depthwise 3 × 3 convolution, by itself and with its gate in one step."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fullres.ops.arrays import for_kernel


def depthwise(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Depthwise 3 × 3 convolution, padded with zeros.

    Args:
        x: (B, C, H, W), floating point, any values.
        weight: (C, 1, 3, 3).
        bias: (C,), or None for zeros.

    Returns:
        Like `x`. Channels-last maps in float32 or bfloat16 on the CPU go through our kernel where
        no derivatives are recorded; its sums are in float32.

    >>> depthwise(torch.ones(1, 1, 2, 3), torch.ones(1, 1, 3, 3))
    tensor([[[[4., 6., 4.],
              [4., 6., 4.]]]])
    """
    y = _by_kernel(x, weight, bias, geglu=False)
    return F.conv2d(x, weight, bias, padding=1, groups=x.shape[1]) if y is None else y


def depthwise_geglu(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`gelu(a) * b`, a and b the two halves of what `depthwise` gives.

    The gate is that of *GLU Variants Improve Transformer* (Shazeer, 2020), after a convolution.

    Args:
        x: (B, 2 * C, H, W), floating point, any values.
        weight: (2 * C, 1, 3, 3).
        bias: (2 * C,), or None for zeros.

    Returns:
        (B, C, H, W) in the type and memory format of `x`. The kernel, where it serves, writes no
        convolved map, and is within 3e-7 * |b| * max(|a|, 1) of the exact gate.

    >>> x, weight = torch.ones(1, 2, 4, 5), torch.zeros(2, 1, 3, 3)
    >>> depthwise_geglu(x, weight, torch.tensor([100.0, 2.0])).unique()
    tensor([200.])
    """
    y = _by_kernel(x, weight, bias, geglu=True)
    if y is not None:
        return y
    a, b = depthwise(x, weight, bias).chunk(2, dim=1)
    return F.gelu(a) * b


def _by_kernel(x: Tensor, weight: Tensor, bias: Tensor | None, *, geglu: bool) -> Tensor | None:
    """What the kernel gives, or None if it does not take the map."""
    one_type = weight.dtype == x.dtype and (bias is None or bias.dtype == x.dtype)
    served = for_kernel(x, weight, bias, dtypes=(torch.float32, torch.bfloat16))
    if not served or not one_type or not x.numel():
        return None
    from fullres.ops import depthwise_cpu, lanes

    if x.shape[1] < lanes.LANES * (1 + geglu):  # no vector would be full
        return None
    return depthwise_cpu.depthwise(x, weight, bias, geglu)
