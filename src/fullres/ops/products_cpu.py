"""Products of matrices on the CPU whose sums stay in registers, of what kernels have in cache."""

from __future__ import annotations

import numpy as np
from llvmlite.binding import get_host_cpu_features
from numba import config, njit

from fullres.ops.lanes import add_outer, blocks, store_block

_jit = njit(nogil=True, cache=True, error_model="numpy", boundscheck=False)

_features = config.CPU_FEATURES  # what numba was told, where it was told
WIDE = "+avx512f" in _features if _features else get_host_cpu_features().get("avx512f", False)
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
def matmul(width, count, depth, a, b, start, out):
    """Write the product of `a` (count, depth) and `b` (depth, width * LANES), plus a row, to `out`.

    A matrix is (array, place of its first value, from row to row), and the row that is added to
    every row (array, place of its first value); arrays are one-dimensional and hold float32. Rows
    are computed, and written, up to the next multiple of `ROWS`.
    """
    if width == 3:
        _fill(_three(), ROWS // 3, count, depth, a, b, start, out)
    elif width == 2:
        _fill(_two(), ROWS // 2, count, depth, a, b, start, out)
    else:
        _fill(_one(), ROWS, count, depth, a, b, start, out)


@_jit
def _fill(nothing, rows, count, depth, a, b, start, out):
    values, a_at, a_row = a
    factors, b_at, b_row = b
    sums, out_at, out_row = out
    for n in range(0, count, rows):
        block = add_outer(nothing, _once, 0, 0, start[0], start[1])
        for k in range(depth):
            at = a_at + n * a_row + k
            block = add_outer(block, values, at, a_row, factors, b_at + k * b_row)
        store_block(sums, out_at + n * out_row, out_row, block)
