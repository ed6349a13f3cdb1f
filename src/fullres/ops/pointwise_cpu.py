"""1 × 1 convolution to few channels on the CPU: one read of the map, fetched ahead of its use.

There are too few products in it to wait for memory in between.
"""

from __future__ import annotations

import numpy as np
import torch
from numba import njit
from torch import Tensor

from fullres.ops.arrays import as_rows
from fullres.ops.lanes import AHEAD, LANES, pointer
from fullres.ops.products_cpu import factors_of, pointwise
from fullres.ops.threads import split, spread

_jit = njit(nogil=True, cache=True, error_model="numpy", boundscheck=False)

RUN = 48
"""Positions that are convolved at a time, a multiple of `products_cpu.ROWS`, at least `LANES`."""


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """As `fullres.ops.convolution` has it, of a channels-last map in float32."""
    batch, channels, height, width = x.shape
    outs = len(weight)
    shape = (batch, outs, height, width)
    out = torch.empty(shape, dtype=x.dtype, memory_format=torch.channels_last)
    factors = factors_of(weight[:, :, 0, 0], bias)
    source, target = as_rows(x).reshape(-1), as_rows(out).reshape(-1)
    positions = batch * height * width
    runs = split(-(-positions // RUN), 4 * torch.get_num_threads())
    spread(
        [
            (_convolved, source, channels, factors, outs, target, a * RUN, min(b * RUN, positions))
            for a, b in runs
        ]
    )
    return out


@_jit
def _convolved(x, channels, factors, outs, out, first, last):
    """Convolve the positions from `first` to `last`."""
    ahead = AHEAD // x.itemsize
    source, by, target = pointer(x), (pointer(factors), 0), pointer(out)
    pixels = np.zeros(RUN * channels, np.float32)
    results = np.zeros(RUN * outs + LANES, np.float32)
    for begin in range(first, last, RUN):
        at, to = begin * channels, begin * outs
        if last - begin >= RUN + LANES:  # what vectors reach over is this job's, and still to come
            soon = at + ahead, source
            pointwise(RUN, (source, at), channels, by, outs, (target, to), None, soon)
            continue
        end = min(begin + RUN, last)
        pixels[: (end - begin) * channels] = x[begin * channels : end * channels]
        whole, given = (pointer(results), 0), (pointer(pixels), 0)
        pointwise(RUN, given, channels, by, outs, whole, None, None)
        out[begin * outs : end * outs] = results[: (end - begin) * outs]
