"""Dense convolution: by kernels of ours where they are faster than torch's library."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fullres.ops.arrays import derives, for_kernel, share_memory

CHANNELS, PIXELS, VALUES = 32, 1536, 2**18
"""So many channels, before and after, so many pixels and so many of both make transforms pay."""
NARROW, BEFORE = 5, 16
"""At most so many channels after, and at least so many before, make it pay to multiply by all taps
at once; of `VALUES` of both pixels and channels before."""
FEW, UNCACHED = 48, 2**24
"""At most so many channels after, and at least so many values of a picture's map, make it pay to
fetch values ahead."""


def convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    padding: int = 0,
    *,
    slope: float = 1,
    plus: Tensor | None = None,
    in_place: bool = False,
) -> Tensor:
    """Convolution, padded with zeros: `torch.nn.functional.conv2d`, often twice as fast.

    A leaky ReLU and a sum may follow: values below zero are multiplied by `slope`, then `plus` is
    added. Both cost next to nothing there.

    Args:
        x: (B, C, H, W), floating point, any values.
        weight: (K, C, h, w).
        bias: (K,), or None for zeros.
        padding: rows and columns of zeros about the map.
        slope: of the leaky ReLU below zero: 0 is ReLU, and 1 leaves the result as it is.
        plus: like the result, or None for zeros.
        in_place: whether the result may take the memory of `plus`, which is of no further use,
            where nothing is derived.

    Returns:
        (B, K, H + 2 * padding - h + 1, W + 2 * padding - w + 1). Large channels-last maps in
        float32 on the CPU go through our kernel for 3 × 3 weights, padded by 0 or 1, where no
        derivatives are recorded; so do those in bfloat16 from an even number of channels, where
        the processor multiplies pairs of these but not matrices. Rounding adds about twice as much
        there as in direct sums, in bfloat16, whose transforms are rounded, three to seven times as
        much; and a value that is not finite reaches all outputs of the 4 × 4 tiles that it has a
        part in. 3 × 3 weights to a picture's channels have a kernel of direct sums, and 1 × 1
        weights to few channels one in float32, for maps larger than caches.

    >>> convolution(torch.ones(1, 1, 2, 3), torch.ones(1, 1, 3, 3), padding=1)
    tensor([[[[4., 6., 4.],
              [4., 6., 4.]]]])
    >>> convolution(torch.ones(1, 1, 1, 1), -torch.ones(1, 1, 1, 1), slope=0.25)
    tensor([[[[-0.2500]]]])
    """
    kept = derives()
    if _minimal(x, weight, bias, padding) and _like_result(plus, x, len(weight), padding):
        from fullres.ops import winograd_cpu

        over = in_place and not (kept or plus is None or share_memory(x, plus))
        return winograd_cpu.convolve(x, weight, bias, padding, slope, plus, in_place=over)
    y = _direct(x, weight, bias, padding)
    if slope != 1:
        y = F.leaky_relu(y, slope, inplace=not kept)
    if plus is not None:
        y = y + plus if kept else y.add_(plus)
    return y


def _minimal(x: Tensor, weight: Tensor, bias: Tensor | None, padding: int) -> bool:
    """Whether minimal filtering serves these, and is faster."""
    channels = min(weight.shape[:2])
    return _threes(x, weight, bias, padding) and _large(channels, x.shape[2] * x.shape[3])


def _threes(x: Tensor, weight: Tensor, bias: Tensor | None, padding: int) -> bool:
    """Whether our kernels for 3 × 3 weights may take these, and their type pays."""
    if not _fits(x, weight, bias) or weight.shape[2:] != (3, 3) or padding not in (0, 1):
        return False
    if min(x.shape[2:]) + 2 * padding < 3:
        return False
    from fullres.ops import winograd_cpu

    return x.dtype == torch.float32 or (winograd_cpu.HALVES and x.shape[1] % 2 == 0)


def _direct(x: Tensor, weight: Tensor, bias: Tensor | None, padding: int) -> Tensor:
    """Convolution by direct sums."""
    if _threes(x, weight, bias, padding) and _narrow(len(weight), x.shape[1:]):
        from fullres.ops import narrow_cpu

        return narrow_cpu.convolve(x, weight, bias, padding)
    if (
        _fits(x, weight, bias)
        and x.dtype == torch.float32
        and weight.shape[2:] == (1, 1)
        and padding == 0
        and len(weight) <= FEW
        and x.shape[1:].numel() >= UNCACHED
    ):
        from fullres.ops import pointwise_cpu

        return pointwise_cpu.convolve(x, weight, bias)
    return F.conv2d(x, weight, bias, padding=padding)


def _like_result(plus: Tensor | None, x: Tensor, outs: int, padding: int) -> bool:
    """Whether the kernel may add this to the result of 3 × 3 weights."""
    if plus is None:
        return True
    batch, _, height, width = x.shape
    shape = (batch, outs, height + 2 * padding - 2, width + 2 * padding - 2)
    return plus.shape == shape and for_kernel(plus, dtypes=(x.dtype,))


def _fits(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether our kernels may take these."""
    if x.ndim != 4 or weight.ndim != 4 or weight.shape[1] != x.shape[1]:
        return False
    others = (weight,) if bias is None else (weight, bias)
    alike = all(t.dtype == x.dtype and len(t) == len(weight) for t in others)
    return alike and for_kernel(x, *others, dtypes=(torch.float32, torch.bfloat16))


def _narrow(outs: int, shape: torch.Size) -> bool:
    """Whether products with all taps at once pay, of a picture's map (C, H, W)."""
    return outs <= NARROW and shape[0] >= BEFORE and shape.numel() >= VALUES


def _large(channels: int, pixels: int) -> bool:
    """Whether transforms pay."""
    return channels >= CHANNELS and pixels >= PIXELS and channels * pixels >= VALUES
