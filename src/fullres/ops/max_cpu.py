"""Local maximum on the CPU: van Herk's running maxima, along one axis and then the other.

A window as long as the blocks that its axis is cut into is the end of one block and the beginning
of the next. The maxima of the ends are written first, going back along the block; those of the
beginnings join them, going on. Memory is read and written in the order that it lies in.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numba import njit
from torch import Tensor

from fullres.ops.threads import split, spread

_jit = njit(nogil=True, cache=True, error_model="numpy", boundscheck=False)

LANES = 2**14
"""Neighbouring values that a job runs along the axis together, which fit a core's own cache."""


def local_max(x: Tensor, kh: int, kw: int) -> Tensor:
    """Maxima of `x` (B, C, H, W), float32 or float64, over the windows kh × kw that it contains.

    In the memory format of `x`.
    """
    if x.stride(1) == 1 and x.shape[1] > 1 and not x.is_contiguous():
        pixels = x.permute(0, 2, 3, 1)
        return _along(_along(pixels, 1, kh), 2, kw).permute(0, 3, 1, 2)
    return _along(_along(x, 2, kh), 3, kw)


def _along(x: Tensor, dim: int, k: int) -> Tensor:
    """Maxima over runs of `k` along a dimension; dense."""
    x = x.contiguous()
    if k == 1 or x.numel() == 0:
        return x
    shape = list(x.shape)
    n = shape[dim]
    shape[dim] = n - k + 1
    out = torch.empty(shape, dtype=x.dtype)
    inner = x.stride(dim)
    outer = x.numel() // (n * inner)
    source = x.detach().reshape(outer, n, inner).numpy()
    target = out.view(outer, n - k + 1, inner).numpy()
    threads = torch.get_num_threads()
    parts = min(2 * threads, max(inner // 64, 1))  # not so many that rows become slivers
    lanes = min(-(-inner // parts), LANES)
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
