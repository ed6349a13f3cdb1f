"""Local maximum on the CPU: van Herk's running maxima, along one axis and then the other.

A window as long as the blocks that its axis is cut into is the end of one block and the beginning
of the next. The maxima of all ends of a block are kept; those of the beginnings run along. That is
two reads and one write of the map an axis, whatever the window.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numba import njit
from torch import Tensor

from fullres.ops.threads import split, spread

_jit = njit(nogil=True, cache=True, error_model="numpy", boundscheck=False)

LANES = 256
"""Neighbouring values that a job runs along the axis together."""


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
    blocks = -(-inner // LANES)
    jobs: list[tuple[Any, ...]] = [
        (_run, source, target, k, blocks, run)
        for run in split(outer * blocks, 4 * torch.get_num_threads())
    ]
    spread(jobs)
    return out


@_jit
def _run(x, out, k, blocks, run):
    """Maxima along the middle axis, for a run of the blocks of lanes of all outer positions."""
    inner, windows = x.shape[2], out.shape[1]
    for index in range(run[0], run[1]):
        outer, first = index // blocks, index % blocks * LANES
        lanes = min(LANES, inner - first)
        ends, beginning = np.empty((k, lanes), x.dtype), np.empty(lanes, x.dtype)
        for start in range(0, windows, k):
            _ends(x[outer, start : start + k, first : first + lanes], ends)
            beginning[:] = -np.inf
            for i in range(start, min(start + k, windows)):
                if i > start:
                    _rise(beginning, x[outer, i + k - 1, first : first + lanes])
                result = out[outer, i, first : first + lanes]
                end = ends[i - start]
                for c in range(lanes):
                    a, b = end[c], beginning[c]
                    result[c] = a if a > b or a != a else b  # a NaN stays


@_jit
def _ends(x, ends):
    """Maxima from each position to the end."""
    k = x.shape[0]
    ends[k - 1] = x[k - 1]
    for i in range(k - 2, -1, -1):
        here, after, value = ends[i], ends[i + 1], x[i]
        for c in range(x.shape[1]):
            a, b = value[c], after[c]
            here[c] = a if a > b or a != a else b


@_jit
def _rise(maxima, values):
    for c in range(maxima.shape[0]):
        a, b = values[c], maxima[c]
        maxima[c] = a if a > b or a != a else b
