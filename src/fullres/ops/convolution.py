"""Dense convolution: by kernels of ours where they are faster than torch's library."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fullres.ops.arrays import for_kernel

CHANNELS, PIXELS, VALUES = 32, 1536, 2**18
"""So many channels, before and after, so many pixels and so many of both make transforms pay."""
FEW, UNCACHED = 48, 2**24
"""At most so many channels after, and at least so many values of a picture's map, make it pay to
fetch values ahead."""


def convolution(x: Tensor, weight: Tensor, bias: Tensor | None = None, padding: int = 0) -> Tensor:
    """Convolution, padded with zeros: `torch.nn.functional.conv2d`, often twice as fast.

    Args:
        x: (B, C, H, W), floating point, any values.
        weight: (K, C, h, w).
        bias: (K,), or None for zeros.
        padding: rows and columns of zeros about the map.

    Returns:
        (B, K, H + 2 * padding - h + 1, W + 2 * padding - w + 1). Large channels-last maps in
        float32 on the CPU go through our kernel for 3 × 3 weights, padded by 0 or 1, where no
        derivatives are recorded; so do those in bfloat16 from an even number of channels, where
        the processor multiplies pairs of these but not matrices. Rounding adds about twice as much
        there as in direct sums, in bfloat16, whose transforms are rounded, three to seven times as
        much; and a value that is not finite reaches all outputs of the 4 × 4 tiles that it has a
        part in. 1 × 1 weights to few channels have another kernel, in float32, for maps larger
        than caches.

    >>> convolution(torch.ones(1, 1, 2, 3), torch.ones(1, 1, 3, 3), padding=1)
    tensor([[[[4., 6., 4.],
              [4., 6., 4.]]]])
    """
    if _fits(x, weight, bias):
        outs, channels = weight.shape[:2]
        pixels = x.shape[2] * x.shape[3]
        holds = min(x.shape[2:]) + 2 * padding >= 3
        filtered = weight.shape[2:] == (3, 3) and padding in (0, 1) and holds
        if filtered and _large(min(outs, channels), pixels):
            from fullres.ops import winograd_cpu

            if x.dtype == torch.float32 or (winograd_cpu.HALVES and channels % 2 == 0):
                return winograd_cpu.convolve(x, weight, bias, padding)
        if (
            x.dtype == torch.float32
            and weight.shape[2:] == (1, 1)
            and padding == 0
            and outs <= FEW
            and channels * pixels >= UNCACHED
        ):
            from fullres.ops import pointwise_cpu

            return pointwise_cpu.convolve(x, weight, bias)
    return F.conv2d(x, weight, bias, padding=padding)


def _fits(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether our kernels may take these."""
    if x.ndim != 4 or weight.ndim != 4 or weight.shape[1] != x.shape[1]:
        return False
    others = (weight,) if bias is None else (weight, bias)
    alike = all(t.dtype == x.dtype and len(t) == len(weight) for t in others)
    return alike and for_kernel(x, *others, dtypes=(torch.float32, torch.bfloat16))


def _large(channels: int, pixels: int) -> bool:
    """Whether transforms pay."""
    return channels >= CHANNELS and pixels >= PIXELS and channels * pixels >= VALUES
