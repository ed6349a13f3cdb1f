"""Products over the cells of channels-last maps on the CPU: of channels, and with matrices.

Positions of a cell pass in runs that the fastest cache holds, whichever rows they lie in, so that
narrow cells cost no more than wide ones.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise, product
from typing import Any

import numpy as np
import torch
from numba import njit
from torch import Tensor

from fullres.ops.arrays import as_array, spanned
from fullres.ops.lanes import (
    LANES,
    add,
    add_block,
    add_outer,
    fma,
    load,
    pointer,
    square,
    store,
    zeros,
)
from fullres.ops.products_cpu import matmul, next_width
from fullres.ops.threads import split, spread

_jit = njit(nogil=True, cache=True, error_model="numpy", boundscheck=False)

RUN = 32
"""Positions whose products are summed at a time. Their sums are added to those of the cell, which
keeps errors small as well."""
CONVOLVED = 48
"""Positions that are convolved at a time, a multiple of `products_cpu.ROWS`."""
_JOBS = 8
"""Jobs a thread, so that none waits long for the last."""

Rectangle = tuple[int, int, int, int]
"""Top, left, height and width, in positions."""


def serves(*maps: Tensor) -> bool:
    """Whether `products` takes maps (B, heads, c, H, W)."""
    return all(x.dtype in (torch.float32, torch.bfloat16) for x in maps) and _alike(2, *maps)


def convolves(*maps: Tensor) -> bool:
    """Whether `convolve` takes a map (B, C, H, W), and others of its size that go with it."""
    return all(x.dtype == torch.float32 for x in maps) and _alike(1, *maps)


def _alike(channels: int, *maps: Tensor) -> bool:
    """Whether channels, in that dimension, lie together, in whole vectors; types are the same."""
    x = maps[0]
    return x.device.type == "cpu" and all(
        type(y) is Tensor
        and y.dtype == x.dtype
        and y.stride(channels) == 1
        and y.shape[channels] % LANES == 0
        and y.numel() > 0
        for y in maps
    )


def products(
    a: Tensor, b: Tensor, rows: Sequence[int], columns: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """As `fullres.ops.cells.products`, of maps that the kernel serves."""
    batch, heads, channels = a.shape[:3]
    others = b.shape[2]
    shape = (len(rows) - 1, len(columns) - 1, batch, heads)
    indices = np.arange(np.prod(shape)).reshape(-1, batch, heads)
    cells, places = [], []
    for cell, place in _rectangles(rows, columns, batch * heads):
        for n, head in product(range(batch), range(heads)):
            cells.append(indices[cell, n, head])
            places.append((*(_begin(x, (n, head), place) for x in (a, b)), *place[2:]))
    table = np.array(places)
    sums = [torch.zeros(len(places), n) for n in (channels * others, channels, others)]
    maps = (as_array(spanned(a)), _steps(a), as_array(spanned(b)), _steps(b))
    spread(
        [
            (_products, table[i:j], *maps, *(s[i:j].numpy() for s in sums))
            for i, j in split(len(table), _JOBS * torch.get_num_threads())
        ]
    )
    index = torch.tensor(np.array(cells))
    gram, a_squares, b_squares = (
        s.new_zeros(indices.size, s.shape[1]).index_add_(0, index, s) for s in sums
    )
    return (
        gram.view(*shape, channels, others),
        a_squares.view(*shape, channels),
        b_squares.view(*shape, others),
    )


def convolve(
    x: Tensor,
    factors: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    out: Tensor,
    rows: Sequence[int],
    columns: Sequence[int],
) -> None:
    """Write `factorsᵀ x`, plus a bias and a map, to `out`, which may be `x`; factors by cell.

    Args:
        x: map (1, C, H, W) that the kernel serves, as are `residual` and `out`.
        factors: (rows, columns, C, C'), of float32.
        bias: (C',) or None.
        residual: (1, C', H, W) or None.
        out: (1, C', H, W).
        rows: borders of the cells, from 0 to the height.
        columns: likewise, to the width.
    """
    outs = factors.shape[-1]
    start = torch.zeros(outs) if bias is None else bias.detach().float().contiguous()
    table = np.array([(cell, *place) for cell, place in _rectangles(rows, columns, 1)])
    by = (factors.detach().contiguous().numpy().reshape(-1), start.numpy())
    maps: list[Any] = []
    for y in (x, residual, out):
        maps += (None, None) if y is None else (as_array(spanned(y)), _steps(y))
    spread(
        [
            (_convolved, table[i:j], *by, x.shape[1], *maps)
            for i, j in split(len(table), _JOBS * torch.get_num_threads())
        ]
    )


def _rectangles(
    rows: Sequence[int], columns: Sequence[int], times: int
) -> Iterator[tuple[int, Rectangle]]:
    """Cells by number, in bands of rows as large as a job where all this is done `times` over."""
    job = rows[-1] * columns[-1] * times // (_JOBS * torch.get_num_threads())
    cells = product(pairwise(rows), pairwise(columns))
    for cell, ((top, bottom), (left, right)) in enumerate(cells):
        height, width = bottom - top, right - left
        for first, last in split(height, -(-height * width // max(job, 1))):
            if first < last and width:
                yield cell, (top + first, left, last - first, width)


def _begin(x: Tensor, index: tuple[int, ...], place: Rectangle) -> int:
    """Where a rectangle of one map of several begins in memory."""
    at = (*index, 0, *place[:2])
    return sum(i * stride for i, stride in zip(at, x.stride(), strict=True))


def _steps(x: Tensor) -> tuple[int, int]:
    """From row to row and from column to column of a map (…, H, W)."""
    return x.stride(-2), x.stride(-1)


@_jit
def _products(places, a, a_steps, b, b_steps, gram, a_squares, b_squares):
    """Add to sums, a row a place, those of rectangles (begin in a, in b, height, width)."""
    channels, others = a_squares.shape[1], b_squares.shape[1]
    a_run, b_run = np.empty(RUN * channels, np.float32), np.empty(RUN * others, np.float32)
    for place in range(len(places)):
        a_at, b_at, height, width = places[place]
        for begin in range(0, height * width, RUN):
            count = min(RUN, height * width - begin)
            _gather(a, a_at, a_steps, begin, count, width, channels, a_run)
            _gather(b, b_at, b_steps, begin, count, width, others, b_run)
            _square(a_run, count, channels, a_squares[place])
            _square(b_run, count, others, b_squares[place])
            for i in range(0, channels, LANES):
                for j in range(0, others, LANES):
                    sums = square()
                    for n in range(count):
                        sums = add_outer(sums, a_run, n * channels + i, 1, b_run, n * others + j)
                    add_block(gram[place], i * others + j, others, sums)


@_jit
def _square(run, count, channels, squares):
    for c in range(0, channels, LANES):
        some = zeros()
        for n in range(count):
            values = load(run, n * channels + c)
            some = fma(values, values, some)
        store(squares, c, add(some, load(squares, c)))


@_jit
def _convolved(
    places, factors, bias, channels, x, x_steps, residual, residual_steps, out, out_steps
):
    """Convolve rectangles (cell, top, left, height, width)."""
    outs = len(bias)
    run = np.zeros(CONVOLVED * channels, np.float32)
    results = np.empty(CONVOLVED * outs, np.float32)
    taps, start, given, sums = pointer(factors), pointer(bias), pointer(run), pointer(results)
    for place in range(len(places)):
        cell, top, left, height, width = places[place]
        for begin in range(0, height * width, CONVOLVED):
            count = min(CONVOLVED, height * width - begin)
            at = top * x_steps[0] + left * x_steps[1]
            _gather(x, at, x_steps, begin, count, width, channels, run)
            vectors = outs // LANES
            while vectors:
                by = next_width(vectors)
                vectors -= by
                at = vectors * LANES
                weights = taps, cell * channels * outs + at, outs
                maps = (given, 0, channels), weights, (start, at), (sums, at, outs)
                matmul(by, count, channels, *maps, None, None)
            y = begin // width
            column = begin - y * width
            for n in range(count):
                pixel = top + y, left + column
                for c in range(0, outs, LANES):
                    values = load(results, n * outs + c)
                    if residual is not None:
                        at = pixel[0] * residual_steps[0] + pixel[1] * residual_steps[1]
                        values = add(values, load(residual, at + c))
                    store(out, pixel[0] * out_steps[0] + pixel[1] * out_steps[1] + c, values)
                column += 1
                if column == width:
                    y, column = y + 1, 0


@_jit
def _gather(x, at, steps, begin, count, width, channels, run):
    """Take so many positions of a rectangle, row by row, from one of them on, into the cache."""
    y = begin // width
    column = begin - y * width
    for n in range(count):
        here = at + y * steps[0] + column * steps[1]
        for c in range(0, channels, LANES):
            store(run, n * channels + c, load(x, here + c))
        column += 1
        if column == width:
            y, column = y + 1, 0
