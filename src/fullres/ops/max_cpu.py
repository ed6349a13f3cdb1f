"""Local maximum on the CPU: van Herk's running maxima, along one axis and then the other.

A window as long as the blocks that its axis is cut into is the end of one block and the beginning
of the next. The maxima of the ends are written first, going back along the block; those of the
beginnings join them, going on. Memory is read and written in the order that it lies in, and in
channels-last maps of float32 the maxima along a row join those of its columns while both are in the
core's own cache, without a map between them.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numba import njit
from torch import Tensor

from fullres.ops.arrays import as_rows
from fullres.ops.lanes import LANES, load, maximum, prefetch, store
from fullres.ops.threads import split, spread

_jit = njit(nogil=True, cache=True, error_model="numpy", boundscheck=False)

BLOCK = 2**14
"""Neighbouring values that a job runs along the axis together, which fit a core's own cache."""


def local_max(x: Tensor, kh: int, kw: int) -> Tensor:
    """Maxima of `x` (B, C, H, W), float32 or float64, over the windows kh × kw that it contains.

    In the memory format of `x`.
    """
    if x.stride(1) == 1 and x.shape[1] > 1 and not x.is_contiguous():
        if x.dtype == torch.float32 and x.shape[1] >= LANES and kw > 1:
            return _row_by_row(x, kh, kw)
        pixels = x.permute(0, 2, 3, 1)
        return _along(_along(pixels, 1, kh), 2, kw).permute(0, 3, 1, 2)
    return _along(_along(x, 2, kh), 3, kw)


def _row_by_row(x: Tensor, kh: int, kw: int) -> Tensor:
    """Maxima of a map in float32, of at least `LANES` channels; channels-last."""
    x = x.contiguous(memory_format=torch.channels_last)
    batch, channels, height, width = x.shape
    shape = (batch, channels, height - kh + 1, width - kw + 1)
    out = torch.empty(shape, dtype=x.dtype, memory_format=torch.channels_last)
    source, target = as_rows(x), as_rows(out)
    threads = torch.get_num_threads()
    # panels read columns twice, but groups of channels part what memory gives at a time
    groups = split(channels // LANES, max(threads // 2, 1))
    panels = split(shape[3], -(-threads // (batch * len(groups))))
    spread(
        [
            (_maxima, source[b], target[b], channels, kh, kw, *group, *panel)
            for b in range(batch)
            for group in groups
            for panel in panels
        ]
    )
    return out


@_jit
def _maxima(x, out, channels, kh, kw, first, last, left, right):
    """Of rows (H, W * C), for a run of the vectors of channels and one of columns."""
    end_channel = channels if (last + 1) * LANES > channels else last * LANES
    places = np.arange(first * LANES, end_channel, LANES)
    places = np.minimum(places, channels - LANES) + left * channels  # the last two may overlap
    ends = np.empty((right - left) * LANES, x.dtype)
    maxima = np.empty((len(places), len(ends)), x.dtype)
    for start in range(0, len(out), kh):
        end = min(start + kh, len(out))
        maxima[:] = -np.inf
        for y in range(start + kh - 1, start - 1, -1):
            top = min(y, end - 1)  # rows that begin no window write where later ones will
            rows = x[y], x[max(y - 1, 0)], out[top], out[max(top - 1, 0)]
            _row(rows, False, places, channels, kw, ends, maxima)
        maxima[:] = -np.inf
        for top in range(start + 1, end):
            y = top + kh - 1
            rows = x[y], x[min(y + 1, len(x) - 1)], out[top], out[min(top + 1, end - 1)]
            _row(rows, True, places, channels, kw, ends, maxima)


@_jit
def _row(rows, join, places, channels, k, ends, maxima):
    """Raise `maxima` by those along a row, and write or join them to a row of the result.

    The rows that follow these two are fetched meanwhile.
    """
    row, next_row, out, next_out = rows
    windows = len(ends) // LANES
    for n, place in enumerate(places):
        for start in range(0, windows, k):
            end = min(start + k, windows)
            shared = load(row, place + (start + k - 1) * channels)  # by all windows of the block
            values = shared
            for i in range(start + k - 1, start - 1, -1):
                at = place + i * channels
                prefetch(next_row, at)
                values = maximum(load(row, at), values)
                if i < end:
                    store(ends, i * LANES, values)
            values = shared
            for i in range(start, end):
                values = maximum(load(row, place + (i + k - 1) * channels), values)
                larger = maximum(values, load(ends, i * LANES))
                larger = maximum(larger, load(maxima[n], i * LANES))
                store(maxima[n], i * LANES, larger)
                at = place + i * channels
                prefetch(next_out, at)
                store(out, at, maximum(larger, load(out, at)) if join else larger)


def _along(x: Tensor, dim: int, k: int) -> Tensor:
    """Maxima over runs of `k` along a dimension; dense."""
    x = x.contiguous()
    if k == 1:
        return x
    shape = list(x.shape)
    n = shape[dim]
    shape[dim] = n - k + 1
    out = torch.empty(shape, dtype=x.dtype)
    if out.numel() == 0:
        return out
    inner = x.stride(dim)
    outer = x.numel() // (n * inner)
    source = x.detach().reshape(outer, n, inner).numpy()
    target = out.view(outer, n - k + 1, inner).numpy()
    threads = torch.get_num_threads()
    parts = min(2 * threads, max(inner // 64, 1))  # not so many that rows become slivers
    lanes = min(-(-inner // parts), BLOCK)
    blocks = -(-inner // lanes)
    jobs: list[tuple[Any, ...]] = [
        (_run, source, target, k, lanes, run) for run in split(outer * blocks, 4 * threads)
    ]
    spread(jobs)
    return out


@_jit
def _run(x, out, k, lanes, run):
    """Maxima along the middle axis, for a run of the blocks of lanes of all outer positions."""
    inner, windows = x.shape[2], out.shape[1]
    blocks = -(-inner // lanes)
    for index in range(run[0], run[1]):
        outer, first = index // blocks, index % blocks * lanes
        last = min(first + lanes, inner)
        maxima = np.empty(last - first, x.dtype)
        for start in range(0, windows, k):
            end = min(start + k, windows)
            maxima[:] = -np.inf
            for i in range(start + k - 1, start - 1, -1):
                _rise(maxima, x[outer, i, first:last])
                if i < end:
                    out[outer, i, first:last] = maxima
            maxima[:] = -np.inf
            for i in range(start + 1, end):
                _rise(maxima, x[outer, i + k - 1, first:last])
                _rise(out[outer, i, first:last], maxima)


@_jit
def _rise(maxima, values):
    """Larger values take the place of maxima; a NaN stays, and is taken."""
    for c in range(maxima.shape[0]):
        a, b = values[c], maxima[c]
        maxima[c] = a if a > b or a != a else b
