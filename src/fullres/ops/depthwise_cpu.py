"""Depthwise 3 × 3 convolution on the CPU, with its gate: one read of the map, one write.

Sixteen channels at a time go along a row with their nine factors in registers, so that each value
is loaded once for every row that it serves. Maps are channels-last, sums in float32.
"""

from __future__ import annotations

import numpy as np
import torch
from numba import njit
from torch import Tensor

from fullres.ops.arrays import as_rows
from fullres.ops.lanes import LANES, fma, gelu, load, multiply, prefetch, store, zeros
from fullres.ops.threads import split, spread

_jit = njit(nogil=True, cache=True, error_model="numpy", boundscheck=False)

PANEL = 32
"""Columns that are gone down at a time, so that the rows above are still in cache."""


def depthwise(x: Tensor, weight: Tensor, bias: Tensor | None, geglu: bool) -> Tensor:
    """As `fullres.ops.depthwise` has it, of a channels-last map in float32 or bfloat16.

    Of at least `LANES` channels, with the gate twice as many.
    """
    batch, channels, height, width = x.shape
    shape = (batch, channels // 2 if geglu else channels, height, width)
    out = torch.empty(shape, dtype=x.dtype, memory_format=torch.channels_last)
    taps = weight.detach().float().reshape(channels, 9).T.contiguous().flatten().numpy()
    start = torch.zeros(channels) if bias is None else bias.detach().float().contiguous()
    source, target = as_rows(x), as_rows(out)
    kernel = _gated if geglu else _convolved
    spread(
        [
            (kernel, source[b], taps, start.numpy(), target[b], *run)
            for b in range(batch)
            for run in split(height, 2 * torch.get_num_threads())
        ]
    )
    return out


# The kernels take rows (H, W * C) and the run of rows that is theirs.


@_jit
def _convolved(x, taps, start, out, first, last):
    width = x.shape[1] // len(start)
    outside = np.zeros(x.shape[1], x.dtype)
    for left in range(0, width, PANEL):
        right = min(left + PANEL, width)
        for y in range(first, last):
            rows = _rows_around(x, y, outside)
            _along(rows, left, right, taps, start, out[y], left * len(start))


@_jit
def _gated(x, taps, start, out, first, last):
    channels = len(start)
    half, width = channels // 2, x.shape[1] // channels
    outside = np.zeros(x.shape[1], x.dtype)
    panel = np.empty(PANEL * channels, np.float32)
    for left in range(0, width, PANEL):
        right = min(left + PANEL, width)
        for y in range(first, last):
            rows = _rows_around(x, y, outside)
            for at in range(left * half, right * half, 64 // out.itemsize):
                prefetch(out[y], at)  # so that it is here by the time that it is written
            _along(rows, left, right, taps, start, panel, 0)
            for column in range(left, right):
                at = (column - left) * channels
                for c in range(0, half, LANES):
                    c = min(c, half - LANES)
                    gate = gelu(load(panel, at + c))
                    store(out[y], column * half + c, multiply(gate, load(panel, at + half + c)))


@_jit
def _rows_around(x, y, outside):
    """The rows above, at and below a row, and the one after them."""
    above = x[y - 1] if y > 0 else outside
    below = x[y + 1] if y + 1 < len(x) else outside
    return above, x[y], below, x[min(y + 2, len(x) - 1)]


@_jit
def _along(rows, left, right, taps, start, out, at):
    """Columns `left` to `right` of a row, convolved, to `out` from `at` on."""
    above, here, below, following = rows
    channels = len(start)
    width = len(here) // channels
    line = 64 // here.itemsize
    soon, end = max(left - 1, 0) * channels, min((right + 1) * channels, len(here))
    share = (end - soon) * LANES // channels + line
    for c in range(0, channels, LANES):
        for _ in range(soon, min(soon + share, end), line):
            prefetch(following, soon)  # in the order that it lies in, which the vectors are not
            soon += line
        c = min(c, channels - LANES)  # the last vector overlaps the one before it
        p0, p1, p2 = _three(taps, c, channels)
        q0, q1, q2 = _three(taps, 3 * channels + c, channels)
        r0, r1, r2 = _three(taps, 6 * channels + c, channels)
        bias = load(start, c)
        i0, j0, k0 = zeros(), zeros(), zeros()
        if left > 0:
            i0, j0, k0 = _column(above, here, below, (left - 1) * channels + c)
        i1, j1, k1 = _column(above, here, below, left * channels + c)
        for column in range(left, right):
            i2, j2, k2 = zeros(), zeros(), zeros()
            if column + 1 < width:
                i2, j2, k2 = _column(above, here, below, (column + 1) * channels + c)
            total = fma(i0, p0, fma(i1, p1, fma(i2, p2, bias)))
            total = fma(j0, q0, fma(j1, q1, fma(j2, q2, total)))
            total = fma(k0, r0, fma(k1, r1, fma(k2, r2, total)))
            store(out, at + (column - left) * channels + c, total)
            i0, j0, k0, i1, j1, k1 = i1, j1, k1, i2, j2, k2


@_jit
def _three(taps, at, channels):
    return load(taps, at), load(taps, at + channels), load(taps, at + 2 * channels)


@_jit
def _column(above, here, below, at):
    return load(above, at), load(here, at), load(below, at)
