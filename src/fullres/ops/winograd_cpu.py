"""3 × 3 convolution of many channels on the CPU by minimal filtering: a quarter of the products.

Sixteen outputs, 4 × 4, take 36 products for each pair of channels where direct sums take 144 (Lavin
and Gray, *Fast Algorithms for Convolutional Neural Networks*, CVPR 2016). Tiles of 6 × 6 pixels,
which overlap, and the weights are transformed; their products, summed over channels, are
transformed back. How much rounding adds depends on the points at which the transforms evaluate
polynomials; with those here it stays near that of direct sums.

Of bfloat16, transforms are computed in float32 and rounded, and products are summed in float32.

A run of tiles passes at a time, so that all between the map and the result stays in cache.
"""

from __future__ import annotations

from math import ceil
from typing import Any

import numpy as np
import torch
from numba import njit
from torch import Tensor

from fullres.ops.arrays import as_array, as_rows, written
from fullres.ops.lanes import (
    LANES,
    PAIRS,
    add_rows,
    claim,
    combining,
    drain,
    leaky,
    load,
    load_square,
    pointer,
    prefetch,
    processor_has,
    store_block,
    stream_words,
    transposed,
)
from fullres.ops.products_cpu import matmul, next_width
from fullres.ops.threads import split, spread

_jit = njit(nogil=True, cache=True, error_model="numpy", boundscheck=False)

SIDE, TILE = 4, 6
"""Outputs and pixels of a tile, along either axis."""
PLANES = TILE**2
RUN = 24
"""Tiles that pass at a time, a multiple of `ROWS`; twice as many where weights are `MANY`."""
MANY = 512
"""Words of 32 bits of a pixel's channels and sums, above which the time goes into fetching weights,
not pixels."""
POINTS = (0, 0.625, -0.625, 1.5, -1.5)
"""Where polynomials are evaluated, beside infinity. Those of most libraries, up to 2, round off
twice as much."""
HALVES = PAIRS and not processor_has("amx-bf16")
"""Whether bfloat16 pays: instructions for matrices, which the library has, are faster."""


def _transforms() -> tuple[Any, Any, Any]:
    """Matrices (6, 6) for tiles, (6, 3) for weights and (4, 6) for products, along either axis."""
    others = [[p for p in POINTS if p != point] for point in POINTS]
    scales = [np.prod(np.subtract(p, rest)) for p, rest in zip(POINTS, others, strict=True)]
    tiles = [[*np.poly(rest)[::-1], 0] for rest in others] + [np.poly(POINTS)[::-1]]
    weights = np.vander(POINTS, 3, increasing=True) / np.array(scales)[:, None]
    outputs = np.vander(POINTS, SIDE, increasing=True)
    return (
        np.array(tiles),
        np.vstack([weights, np.eye(3)[-1]]),
        np.vstack([outputs, np.eye(SIDE)[-1]]).T,
    )


_zero_row = np.zeros(3 * LANES, np.float32)  # that products begin with
_tile, _weigh, _output = (combining(matrix) for matrix in _transforms())


def convolve(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    padding: int,
    slope: float = 1,
    plus: Tensor | None = None,
    in_place: bool = False,
) -> Tensor:
    """As `fullres.ops.convolution` has it, of channels-last maps in float32.

    From at least `LANES` channels to at least as many. Where `PAIRS`, also in bfloat16, from an
    even number of channels.
    """
    batch, channels, height, width = x.shape
    outs = len(weight)
    shape = (batch, outs, height + 2 * padding - 2, width + 2 * padding - 2)
    if in_place and plus is not None and outs % LANES == 0:
        out = written(plus)
    else:
        out = torch.empty(shape, dtype=x.dtype, memory_format=torch.channels_last)
    start = torch.zeros(outs) if bias is None else bias.detach().float().contiguous()
    vectors = -(-outs // LANES)
    threads = torch.get_num_threads()

    taps = as_array(weight.permute(0, 2, 3, 1).flatten())
    words = channels // _in_word(taps)
    factors = torch.empty(PLANES, _apart(words * vectors * LANES)).numpy()
    factors = factors if words == channels else factors.view(np.uint32)
    chunks = split(-(-channels // LANES), threads)
    spread([(_transformed, taps, channels, outs, factors, *chunk) for chunk in chunks])
    across, down = -(-shape[3] // SIDE), -(-shape[2] // SIDE)
    run = _run(words + outs, -(-across * down // threads))
    runs = split(-(-across * down // run), 4 * threads)
    source, target = as_rows(x), as_rows(out)
    added = [None] * batch if plus is None else as_rows(plus)
    spread(
        [
            (
                _convolved,
                *(source[b], channels, padding, target[b], start.numpy(), np.float32(slope)),
                *(added[b], factors, run),
                *(first * run, min(last * run, across * down)),
            )
            for b in range(batch)
            for first, last in runs
        ]
    )
    return out


def _run(words: int, tiles: int) -> int:
    """How many tiles pass at a time, where a thread has so many of them, of so many `words`.

    >>> _run(128, 1000), _run(2048, 120), _run(2048, 20)
    (24, 48, 24)
    """
    most = 2 * RUN if words > MANY else RUN
    even = tiles / -(-tiles // most)
    return max(1, ceil(even / RUN)) * RUN


@_jit
def _in_word(array):
    """Values of an array that a word of 32 bits holds, as products take them: two of bfloat16."""
    return 4 // array.itemsize


@_jit
def _apart(length):
    """From plane to plane of so many words: an odd number of vectors, lest a value's places in all
    planes be places in cache of the same few lines.
    """
    vectors = -(-length // LANES)
    return (vectors + 1 - vectors % 2) * LANES


@_jit
def _room(length):
    """Room for values, that begins with a line of cache: vectors lie in one line, not in two."""
    room = np.empty(length + LANES, np.float32)
    skipped = -(room.ctypes.data // room.itemsize) % LANES
    return room[skipped : skipped + length]


# Where channels are no multiple of a vector, the last vector holds some of the one before again.


@_jit
def _transformed(taps, channels, outs, factors, first, last):
    """Transform the weights (K, 3, 3, C) of some runs of `LANES` channels, to be read by products.

    Factors begin with a line of cache. Those of a plane lie together, in them those of a block of
    outputs, in them those of a word of channels.
    """
    some, room, turned = _in_word(taps), _room(3 * TILE * LANES), _room(9 * LANES**2)
    planes = _room(some * PLANES * LANES)
    vectors, plane, target = -(-outs // LANES), factors.shape[1], pointer(factors)
    begin = 0
    while begin < vectors:
        width = next_width(vectors - begin)
        for run in range(first, last):
            top = min(run * LANES, channels - LANES)
            for n in range(width):
                _turn(taps, min((begin + n) * LANES, outs - LANES), top, channels, turned)
                for c in range(LANES):
                    for r in range(3):
                        block = _weigh(turned, (3 * r * LANES + c) * LANES, LANES**2)
                        store_block(room, r * TILE * LANES, LANES, block)
                    for j in range(TILE):
                        block = _weigh(room, j * LANES, TILE * LANES)
                        to = (c % some * PLANES + j) * LANES
                        store_block(planes, to, TILE * LANES, block)
                    if c % some == some - 1:
                        to = begin * (channels // some) + (top + c) // some * width + n
                        for p in range(PLANES):
                            values = load(planes, p * LANES)
                            others = load(planes, ((some - 1) * PLANES + p) * LANES)
                            stream_words(target, to * LANES + p * plane, values, others)
        begin += width
    drain()


@_jit
def _turn(taps, k, c, channels, turned):
    """Take the weights (`LANES`, 3, 3, `LANES`) from an output and a channel on as (3, 3, `LANES`,
    `LANES`), channels before outputs; those of the next channels are fetched.
    """
    source = pointer(taps)
    for tap in range(9):
        at = (9 * k + tap) * channels + c
        store_block(turned, tap * LANES**2, LANES, transposed(load_square(taps, at, 9 * channels)))
        for n in range(LANES):
            prefetch(source, at + 9 * n * channels + LANES)


# What works on a tile takes pointers: arrays would be counted for as long as it takes.


@_jit
def _convolved(x, channels, padding, out, bias, slope, plus, factors, run, first, last):
    """Make a run of tiles, counted along the rows, of a result (H', W' * K) of rows (H, W * C).

    What is added to it is None or like the result.
    """
    outs, some = len(bias), _in_word(x)
    across = -(-(out.shape[1] // outs) // SIDE)
    words = _room(PLANES * _apart(run * channels // some)).reshape(PLANES, -1).view(factors.dtype)
    sums = _room(PLANES * _apart(run * -(-outs // LANES) * LANES)).reshape(PLANES, -1)
    tiles, room = words.view(x.dtype), _room(PLANES * LANES)
    pixels = np.zeros((TILE, TILE * channels), x.dtype)
    results, others = np.zeros((2, SIDE, SIDE * outs), x.dtype)
    for begin in range(first, last, run):
        count = min(run, last - begin)
        _take_run(x, channels, padding, across, begin, count, tiles, room, pixels)
        soon = x, padding, out, across, begin, run
        _multiply(words, channels // some, factors, outs, sums, count, soon)
        _give_run(sums, across, begin, count, bias, slope, plus, out, room, results, others)


@_jit
def _take_run(x, channels, padding, across, begin, count, tiles, room, pixels):
    """Transform so many tiles from one on to the first values of every plane."""
    (height, row), plane, cut_row = x.shape, tiles.shape[1], pixels.shape[1]
    source, cut, target, room = pointer(x), pointer(pixels), pointer(tiles), pointer(room)
    for n in range(count):
        top, left = divmod(begin + n, across)
        top, left = top * SIDE - padding, left * SIDE - padding
        bottom, right = top + TILE, (left + TILE) * channels
        if min(top, left) >= 0 and bottom <= height and right <= row:
            _take(source, top * row + left * channels, row, channels, target, n, plane, room)
        else:
            _cut(x, top, left, channels, pixels)
            _take(cut, 0, cut_row, channels, target, n, plane, room)


@_jit
def _cut(x, top, left, channels, pixels):
    """Take the pixels of a tile, zeros where it is outside of the map."""
    pixels[:] = 0
    corner = left * channels
    begin, end = max(corner, 0), min(corner + TILE * channels, x.shape[1])
    for r in range(max(top, 0), min(top + TILE, len(x))):
        pixels[r - top, begin - corner : end - corner] = x[r, begin:end]


@_jit
def _take(x, corner, row, channels, tiles, n, plane, room):
    """Transform the tile that begins there to the n-th values of every plane.

    It goes on from row to row, and values from plane to plane.
    """
    for begin in range(0, channels, LANES):
        c = min(begin, channels - LANES)
        for r in range(TILE):
            block = _tile(x, corner + r * row + c, channels)
            store_block(room, r * TILE * LANES, LANES, block)
        for j in range(TILE):
            block = _tile(room, j * LANES, TILE * LANES)
            store_block(tiles, j * plane + n * channels + c, TILE * plane, block)


@_jit
def _multiply(tiles, channels, factors, outs, sums, count, soon):
    """In every plane, multiply values (tiles, channels) by factors (channels, outputs).

    Meanwhile the processor fetches where the results of a run of tiles go, of (map, padding,
    result, tiles in a row, the first, how many), and the pixels of the run after it; or, where they
    are `MANY`, the factors after these.
    """
    x, padding, to, across, begun, run = soon
    vectors, start = -(-outs // LANES), (pointer(_zero_row), 0)
    values, taps, results = pointer(tiles), pointer(factors), pointer(sums)
    pixels, target, in_word = pointer(x.view(tiles.dtype)), pointer(to), _in_word(to)
    x_row, to_row, end, many = x.shape[1] // in_word, to.shape[1], to.size, channels + outs > MANY
    for plane in range(PLANES):
        if plane < SIDE * TILE:
            y, left = _part(plane, begun, run, across)
            at = y * to_row + left * outs
            for n in range(at, min(at + run // TILE * SIDE * outs, end), LANES * in_word):
                claim(target, n)
        y, left = _part(plane, begun + run, run, across)
        fetched = max(0, y - padding) * x_row + max(0, left - padding) * channels, pixels
        a = values, plane * tiles.shape[1], channels
        begin = 0
        while begin < vectors:
            width = next_width(vectors - begin)
            b = taps, plane * factors.shape[1] + begin * channels * LANES, width * LANES
            out = results, plane * sums.shape[1] + begin * LANES, vectors * LANES
            if many:
                fetched = b[1] + width * channels * LANES, taps
            if many or begin == 0:
                matmul(width, count, channels, a, b, start, out, None, fetched)
            else:
                matmul(width, count, channels, a, b, start, out, None, None)
            begin += width


@_jit
def _part(plane, begin, run, across):
    """Row and first column of the part of a run of tiles that is fetched beside a plane.

    Each of the tiles' `TILE` rows has as many parts.
    """
    row, part = divmod(plane, TILE)
    down, right = divmod(begin + part * run // TILE, across)
    return down * SIDE + row, right * SIDE


@_jit
def _give_run(sums, across, begin, count, bias, slope, plus, out, room, results, others):
    """Transform the first sums of every plane to the outputs of so many tiles from one on."""
    outs, (height, row), plane, cut_row = len(bias), out.shape, sums.shape[1], results.shape[1]
    source, target, start, room = pointer(sums), pointer(out), pointer(bias), pointer(room)
    cut = pointer(results)
    for n in range(count):
        top, left = divmod(begin + n, across)
        top, corner = top * SIDE, left * SIDE * outs
        rows, values = min(SIDE, height - top), min(SIDE * outs, row - corner)
        if rows == SIDE and values == SIDE * outs:
            at = top * row + corner
            if plus is None:
                _give(source, n, plane, start, slope, None, target, at, row, outs, room)
            else:
                _give(source, n, plane, start, slope, pointer(plus), target, at, row, outs, room)
        else:
            if plus is None:
                _give(source, n, plane, start, slope, None, cut, 0, cut_row, outs, room)
            else:
                others[:rows, :values] = plus[top : top + rows, corner : corner + values]
                more = pointer(others)
                _give(source, n, plane, start, slope, more, cut, 0, cut_row, outs, room)
            out[top : top + rows, corner : corner + values] = results[:rows, :values]


@_jit
def _give(sums, n, plane, bias, slope, plus, out, corner, row, outs, room):
    """Transform the n-th sums of every plane to the outputs of the tile that begins there."""
    whole = -(-outs // LANES) * LANES
    for begin in range(0, whole, LANES):
        k = min(begin, outs - LANES)
        for i in range(TILE):
            block = _output(sums, n * whole + begin + i * TILE * plane, plane)
            store_block(room, i * SIDE * LANES, LANES, block)
        start = load(bias, k)
        for j in range(SIDE):
            block = leaky(_output(room, j * LANES, SIDE * LANES), start, slope)
            at = corner + j * outs + k
            if plus is not None:
                block = add_rows(block, plus, at, row)
            store_block(out, at, row, block)
