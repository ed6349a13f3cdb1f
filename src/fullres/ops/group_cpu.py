"""Group norm with statistics a position, on the CPU, for maps whose pixels are contiguous.

The moments of each group at each pixel are found in one read of the map, averaged over windows as
maps of a plane a group, and applied in a second read.
"""

from __future__ import annotations

from typing import Any

import torch
from numba import njit
from torch import Tensor

from fullres.ops.threads import split, spread

_jit = njit(nogil=True, cache=True, error_model="numpy", boundscheck=False)


def group_moments(x: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Mean and biased variance over the channels of each group at each pixel.

    Args:
        x: (B, C, H, W) in channels-last memory, float32 or float64.
        groups: divides C.

    Returns:
        Twice (B, groups, H, W), contiguous.
    """
    shape = (x.shape[0], groups, *x.shape[2:])
    mean, var = (torch.empty(shape, dtype=x.dtype) for _ in range(2))
    _over_pixels(_moments, x, _planes(mean), _planes(var))
    return mean, var


def group_normalised(
    x: Tensor, mean: Tensor, scale: Tensor, weight: Tensor | None, bias: Tensor | None
) -> Tensor:
    """`(x - mean) * scale * weight + bias`, mean and scale being those of each group and pixel.

    Args:
        x: as for `group_moments`.
        mean: (B, groups, H, W), contiguous.
        scale: likewise.
        weight: (C,), of ones if None.
        bias: (C,), of zeros if None.

    Returns:
        Like `x`.
    """
    channels = x.shape[1]
    weight = torch.ones(channels, dtype=x.dtype) if weight is None else weight.to(x.dtype)
    bias = torch.zeros(channels, dtype=x.dtype) if bias is None else bias.to(x.dtype)
    out = torch.empty_like(x)
    affine = (weight.detach().numpy(), bias.detach().numpy())
    _over_pixels(_normalise, x, _planes(mean), _planes(scale), *affine, _pixels(out))
    return out


def _pixels(x: Tensor) -> Any:
    """(B, pixels, C)."""
    return x.detach().permute(0, 2, 3, 1).flatten(1, 2).numpy()


def _planes(x: Tensor) -> Any:
    """(B, groups, pixels)."""
    return x.detach().flatten(2).numpy()


def _over_pixels(kernel: Any, x: Tensor, *arguments: Any) -> None:
    pixels = _pixels(x)
    runs = split(pixels.shape[1], 4 * torch.get_num_threads())
    spread([(kernel, pixels, *arguments, b, *run) for b in range(len(pixels)) for run in runs])


@_jit
def _moments(x, mean, var, b, first, last):
    groups = mean.shape[1]
    size = x.shape[2] // groups
    for p in range(first, last):
        for g in range(groups):
            values = x[b, p, g * size : (g + 1) * size]
            total = 0.0
            for c in range(size):
                total += values[c]
            centre = total / size
            square = 0.0
            for c in range(size):
                square += (values[c] - centre) ** 2
            mean[b, g, p] = centre
            var[b, g, p] = square / size


@_jit
def _normalise(x, mean, scale, weight, bias, out, b, first, last):
    groups = mean.shape[1]
    size = x.shape[2] // groups
    for p in range(first, last):
        for g in range(groups):
            run = slice(g * size, (g + 1) * size)
            values, result, w, shift = x[b, p, run], out[b, p, run], weight[run], bias[run]
            m, s = mean[b, g, p], scale[b, g, p]
            for c in range(size):
                result[c] = (values[c] - m) * s * w[c] + shift[c]
