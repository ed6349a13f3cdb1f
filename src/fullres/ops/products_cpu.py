"""Products of matrices on the CPU whose sums stay in registers, of what kernels have in cache."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit
from torch import Tensor

from fullres.ops.lanes import (
    LANES,
    add_outer,
    at_least,
    blocks,
    prefetch,
    processor_has,
    store_block,
)

_jit = njit(nogil=True, cache=True, error_model="numpy", boundscheck=False)

WIDE = processor_has("avx512f")
"""Whether 24 vectors of sums stay in registers beside their factors; else six do, in parts."""
ROWS = 24 if WIDE else 6
"""What the number of rows is rounded up to."""

_one, _two, _three = (blocks(ROWS // width, width) for width in (1, 2, 3))
_once = np.ones(1, np.float32)


@_jit
def next_width(vectors):
    """Width of the next block of columns in vectors, where so many vectors of columns are left."""
    if not WIDE:
        return 1
    return vectors if vectors <= 3 else 2


@_jit
def matmul(width, count, depth, a, b, start, out, least, soon):
    """Write the product of `a` (count, depth) and `b` (depth, width * LANES), plus a row, to `out`.

    A matrix is (pointer, place of its first value, from row to row), and the row that is added to
    every row (pointer, place of its first value), all of float32; or, of `a` and `b`, pairs of
    bfloat16 as `add_outer` has them. Rows are computed, and written, up to the next multiple of
    `ROWS`, and none is less than `least`, where that is not None. As many values as `a` has are
    fetched for `soon`, of (place of the first, one pointer or two), where that is not None.
    """
    if width == 3:
        _fill(_three(), ROWS // 3, count, depth, a, b, start, out, least, soon)
    elif width == 2:
        _fill(_two(), ROWS // 2, count, depth, a, b, start, out, least, soon)
    else:
        _fill(_one(), ROWS, count, depth, a, b, start, out, least, soon)


@_jit
def _fill(nothing, rows, count, depth, a, b, start, out, least, soon):
    values, a_at, a_row = a
    factors, b_at, b_row = b
    sums, out_at, out_row = out
    for n in range(0, count, rows):
        block = add_outer(nothing, _once, 0, 0, start[0], start[1])
        further = 0 if soon is None else soon[0] + n * depth
        for k in range(depth):
            at = a_at + n * a_row + k
            if soon is not None:
                _fetch(soon, further)
                if rows > LANES:
                    _fetch(soon, further + LANES)
                further += rows
            block = add_outer(block, values, at, a_row, factors, b_at + k * b_row)
        if least is not None:
            block = at_least(block, least)
        store_block(sums, out_at + n * out_row, out_row, block)


@_jit
def _fetch(soon, at):
    prefetch(soon[1], at)
    if len(soon) > 2:
        prefetch(soon[2], at)


def factors_of(weight: Tensor, bias: Tensor | None) -> Any:
    """What `pointwise` takes for a weight (C', C) and bias (C',).

    The bias, then a row a channel before, filled up with zeros to whole vectors.
    """
    outs, channels = weight.shape
    factors = np.zeros((1 + channels, -(-outs // LANES) * LANES), np.float32)
    factors[1:, :outs] = weight.detach().float().numpy().T
    if bias is not None:
        factors[0, :outs] = bias.detach().float().numpy()
    return factors.reshape(-1)


@_jit
def pointwise(count, x, channels, factors, outs, out, least, soon):
    """Convolve so many positions by 1 × 1, rounded up to a multiple of `ROWS`.

    Positions lie without gaps in (pointer, place of the first value), those before as those after,
    and so do factors. A vector of the last is written whole. `least` and `soon` are as `matmul` has
    them.
    """
    (values, at), (taps, begin), (results, to) = x, factors, out
    vectors = -(-outs // LANES)
    left = vectors
    while left:
        width = next_width(left)
        left -= width
        # from the last vectors to the first, which are written over what those reach over
        bias = taps, begin + left * LANES
        by = taps, begin + (vectors + left) * LANES, vectors * LANES
        after = results, to + left * LANES, outs
        matmul(width, count, channels, (values, at, channels), by, bias, after, least, soon)
