"""Group norm with statistics a position, on the CPU, for maps whose pixels are contiguous.

The moments of each group at each pixel are found in one read of the map, averaged over windows as
maps of a plane a group, and applied in a second read.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numba import njit
from torch import Tensor

from fullres.ops.arrays import as_array
from fullres.ops.lanes import (
    AHEAD,
    LANES,
    add,
    fma,
    load,
    load_square,
    maximum,
    multiply,
    pointer,
    prefetch,
    repeat,
    store,
    store_block,
    subtract,
    transposed,
    zeros,
)
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
    pixels = x[0, 0].numel()
    by_lanes = x.dtype == torch.float32 and min(x.shape[1], pixels) >= LANES
    _over_pixels(_moments_of_sixteen if by_lanes else _moments, x, _planes(mean), _planes(var))
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
    weight = x.new_ones(channels) if weight is None else weight.to(x.dtype)
    bias = x.new_zeros(channels) if bias is None else bias.to(x.dtype)
    out = torch.empty_like(x)
    affine = as_array(weight.contiguous()), as_array(bias.contiguous())
    by_lanes = x.dtype == torch.float32 and channels // mean.shape[1] % LANES == 0
    kernel = _normalise_by_lanes if by_lanes else _normalise
    _over_pixels(kernel, x, _planes(mean), _planes(scale), *affine, _pixels(out))
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
def _moments_of_sixteen(x, mean, var, b, first, last):
    """The same for sixteen pixels at a time, as lanes, in float32.

    Means have a second sum, of what is left of the values without the first.
    """
    _, pixels, channels = x.shape
    groups = mean.shape[1]
    size, values = channels // groups, pointer(x)
    room = np.empty(channels * LANES, x.dtype)
    to_mean, to_var = pointer(mean), pointer(var)
    share = repeat(np.float32(1 / size))
    for run in range(first, last, LANES):
        p = min(run, pixels - LANES)  # the last two of a map may overlap
        for v in range(0, channels, LANES):
            c = min(v, channels - LANES)
            at = (b * pixels + p) * channels + c
            for pixel in range(LANES):
                prefetch(values, at + pixel * channels + AHEAD // x.itemsize)
            square = transposed(load_square(values, at, channels))
            store_block(room, c * LANES, LANES, square)
        for g in range(groups):
            begin, end = g * size * LANES, (g + 1) * size * LANES
            total = zeros()
            for at in range(begin, end, LANES):
                total = add(total, load(room, at))
            centre, rest, squares = multiply(total, share), zeros(), zeros()
            for at in range(begin, end, LANES):
                away = subtract(load(room, at), centre)
                rest, squares = add(rest, away), fma(away, away, squares)
            rest = multiply(rest, share)
            place = (b * groups + g) * pixels + p
            store(to_mean, place, add(centre, rest))
            squares = subtract(multiply(squares, share), multiply(rest, rest))
            store(to_var, place, maximum(squares, zeros()))


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


@_jit
def _normalise_by_lanes(x, mean, scale, weight, bias, out, b, first, last):
    """The same in float32, of groups that fill vectors."""
    _, pixels, channels = x.shape
    groups = mean.shape[1]
    size, values, target = channels // groups, pointer(x), pointer(out)
    weights, shifts = pointer(weight), pointer(bias)
    for p in range(first, last):
        at = (b * pixels + p) * channels
        for g in range(groups):
            m, s = repeat(mean[b, g, p]), repeat(scale[b, g, p])
            for c in range(g * size, (g + 1) * size, LANES):
                prefetch(values, at + c + AHEAD // x.itemsize)
                y = multiply(subtract(load(values, at + c), m), s)
                store(target, at + c, fma(y, load(weights, c), load(shifts, c)))
