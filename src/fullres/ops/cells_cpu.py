"""Sums over the cells of channels-last maps on the CPU: products of channels, and their squares.

Sixteen by sixteen products gather in registers while positions pass; each run of positions, which
the fastest cache holds, passes once for every sixteen by sixteen of the channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise, product
from typing import Any

import numpy as np
import torch
from numba import njit
from torch import Tensor

from fullres.ops.arrays import as_array, spanned
from fullres.ops.lanes import (
    LANES,
    add_block,
    add_outer,
    fma,
    load,
    square,
    store,
)
from fullres.ops.threads import split, spread

_jit = njit(nogil=True, cache=True, error_model="numpy", boundscheck=False)

RUN = 32
"""Positions that pass at a time. Their sums are added to those of the cell, which keeps errors
small as well."""


def serves(*maps: Tensor) -> bool:
    """Whether maps (B, heads, c, H, W) are as the kernel takes them."""
    x = maps[0]
    return x.device.type == "cpu" and all(
        y.dtype == x.dtype in (torch.float32, torch.bfloat16)
        and y.stride(2) == 1
        and y.shape[2] % LANES == 0
        and y.numel() > 0
        for y in maps
    )


def products(
    a: Tensor, b: Tensor, rows: Sequence[int], columns: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """As `fullres.ops.cells.products`, of maps that the kernel serves."""
    batch, heads, channels = a.shape[:3]
    others = b.shape[2]
    cells = list(product(pairwise(rows), pairwise(columns), range(batch), range(heads)))
    parts = -(-2 * torch.get_num_threads() // len(cells))
    places = [
        (cell, number, head, top + first, top + last, left, right)
        for cell, ((top, bottom), (left, right), number, head) in enumerate(cells)
        for first, last in split(bottom - top, parts)
    ]
    sums = [torch.zeros(len(places), n) for n in (channels * others, channels, others)]
    jobs = [
        (_products, _from(a, n, h, y0, x0), _steps(a), _from(b, n, h, y0, x0), _steps(b),
         y1 - y0, x1 - x0, *(s[job].numpy() for s in sums))
        for job, (_, n, h, y0, y1, x0, x1) in enumerate(places)
    ]  # fmt: skip
    spread(jobs)
    index = torch.tensor([cell for cell, *_ in places])
    shape = (len(rows) - 1, len(columns) - 1, batch, heads)
    gram, a_squares, b_squares = (
        s.new_zeros(len(cells), s.shape[1]).index_add_(0, index, s) for s in sums
    )
    return (
        gram.view(*shape, channels, others),
        a_squares.view(*shape, channels),
        b_squares.view(*shape, others),
    )


def _from(x: Tensor, number: int, head: int, y: int, column: int) -> Any:
    """The memory of a map from a position of a head on."""
    return as_array(spanned(x[number, head, :, y:, column:]))


def _steps(x: Tensor) -> Any:
    """From row to row and from column to column."""
    return np.array((x.stride(3), x.stride(4)))


@_jit
def _products(a, a_steps, b, b_steps, height, width, gram, a_squares, b_squares):
    """Add to sums those of a rectangle that two maps begin with."""
    channels, others = len(a_squares), len(b_squares)
    a_run, b_run = np.empty(RUN * channels, np.float32), np.empty(RUN * others, np.float32)
    for y in range(height):
        for x in range(0, width, RUN):
            count = min(RUN, width - x)
            _take(a, y * a_steps[0] + x * a_steps[1], a_steps[1], count, a_run, a_squares)
            _take(b, y * b_steps[0] + x * b_steps[1], b_steps[1], count, b_run, b_squares)
            for i in range(0, channels, LANES):
                for j in range(0, others, LANES):
                    sums = square()
                    for n in range(count):
                        sums = add_outer(sums, a_run, n * channels + i, 1, b_run, n * others + j)
                    add_block(gram, i * others + j, others, sums)


@_jit
def _take(x, at, step, count, run, squares):
    """Take a run of positions of a map into the cache, and add their squares to a sum."""
    channels = len(squares)
    some = np.zeros(channels, np.float32)
    for n in range(count):
        for c in range(0, channels, LANES):
            values = load(x, at + n * step + c)
            store(run, n * channels + c, values)
            store(some, c, fma(values, values, load(some, c)))
    for c in range(channels):
        squares[c] += some[c]
