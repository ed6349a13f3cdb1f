"""Pyramid attention on the CPU, in float32: what lies between maps and result stays in cache.

The map is cut into strips of columns of queries. Within one, row y of queries meets row y + r of
the keys of a scale: a product of matrices gives the products of their pixels. Sweeping down the
rows with r fixed, the last three, summed along the diagonals, are a row of scores. The first pass
finds the shift and the sum of exponentials of each softmax, the second the weights, of which again
the last three rows, summed along the diagonals, multiply a row of the values. Several r sweep side
by side, so that a row of keys and values is used that often before it leaves the cache.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numba import njit
from torch import Tensor

from fullres.ops.pyramid_blocks import Level
from fullres.ops.pyramid_vectors import (
    LANES,
    TILE,
    add_product,
    exponentials,
    follow_mixed,
    follow_product,
)
from fullres.ops.threads import spread

_jit = njit(nogil=True, cache=True, error_model="numpy")
_f = np.float32

QUERIES = 16
"""Columns of queries in a strip; with a margin on either side, three tiles of six."""
_ROWS = QUERIES + 2
KEYS = 128
"""Columns of keys that are taken at once, margins included."""
SIDE_BY_SIDE = 4
"""Sweeps at a time."""
_CHANNELS = 32
"""Channels of the values are filled up to a multiple of this."""
_LIMIT = _f(2**12)
"""Sum of exponentials of a row of keys above which the shift of a softmax moves."""


def attend(
    q: Tensor, k: Tensor, factor: Tensor, v: Tensor, levels: list[Level]
) -> tuple[Tensor, Tensor, Tensor]:
    """As `fullres.ops.pyramid_blocks.attend`, of float32."""
    batch, channels, height, width = q.shape
    strips = -(-width // QUERIES)
    depth = -(-v.shape[2] // _CHANNELS) * _CHANNELS
    queries = F.pad(q.permute(0, 2, 3, 1), (0, 0, 1, strips * QUERIES - width + 1, 1, 1))
    values = F.pad(v, (0, depth - v.shape[2]))
    factors = F.pad(factor, (0, LANES))  # vectors reach beyond the last
    parts = q.new_empty(batch, strips, height, _ROWS, depth)
    top, total = q.new_empty(batch, height, width), q.new_empty(batch, height, width)
    levels_, rows, columns = _arrays(levels, channels)
    jobs = []
    for n in range(batch):
        keys = _laid_out(k[n], levels)
        maps = _flat(queries[n]), _flat(keys), _flat(factors[n]), _flat(values[n])
        statistics = top[n].numpy(), total[n].numpy()
        for strip in range(strips):
            work = _Work(*maps, _flat(parts[n, strip]))
            size = _Size(strip * QUERIES, height, width, channels, depth)
            jobs.append((_strip, work, size, *statistics, levels_, rows, columns))
    spread(jobs)
    return _joined(parts[..., : v.shape[2]], width), top, total


class _Work(NamedTuple):
    """What a strip reads and writes, each as one row of memory."""

    queries: Any
    """(rows, columns, channels), with a margin of zeros; as many columns as strips need."""
    keys: Any
    """(rows, channels, columns) of each scale, with a margin of zeros."""
    factors: Any
    values: Any
    """(pixels, depth)"""
    out: Any
    """(rows, columns of the strip and its margins, depth)"""


class _Size(NamedTuple):
    """A strip of a map."""

    first: int
    height: int
    width: int
    channels: int
    depth: int


class _Keys(NamedTuple):
    """Columns `start: start + number` of the keys of one scale."""

    start: int
    number: int
    height: int
    width: int
    pixel: int
    """Of all scales' pixels, the first of this scale."""
    element: int
    """Where in `_Work.keys` the scale begins."""
    step: int
    """Length of a row of scores."""


def _arrays(levels: list[Level], channels: int) -> tuple[Any, Any, Any]:
    """Height, width, first pixel and first element of each scale; spans of rows and columns."""
    lengths = [(x.height + 2) * (x.width + 2) * channels for x in levels]
    elements = np.cumsum([0, *lengths[:-1]])
    sizes = [(x.height, x.width, x.first, e) for x, e in zip(levels, elements, strict=True)]
    return (
        np.array(sizes),
        np.array([x.rows for x in levels]),
        np.array([x.columns for x in levels]),
    )


def _laid_out(k: Tensor, levels: list[Level]) -> Tensor:
    """Keys (N, c) as rows, channels and columns of each scale in turn, with margins of zeros."""
    parts = []
    for level in levels:
        part = k[level.first : level.last].view(level.height, level.width, -1)
        parts.append(F.pad(part.transpose(1, 2), (1, 1, 0, 0, 1, 1)).flatten())
    return torch.cat([*parts, k.new_zeros(KEYS)])  # products reach beyond the last row


def _joined(parts: Tensor, width: int) -> Tensor:
    """The strips (B, strips, H, columns with margins, C) as one map, (B, H, W, C)."""
    parts = parts.transpose(1, 2).mul_(0.25)
    out = parts[:, :, :, 1:-1].flatten(2, 3)
    out[:, :, QUERIES - 1 : -1 : QUERIES] += parts[:, :, 1:, 0]
    out[:, :, QUERIES::QUERIES] += parts[:, :, :-1, -1]
    return out[:, :, :width].contiguous()


def _flat(x: Tensor) -> Any:
    return x.detach().contiguous().view(-1).numpy()


# Sweeps ---------------------------------------------------------------------------------------


@_jit
def _strip(work, size, top, total, levels, rows, columns):
    """All of one strip: shifts and sums into `top` and `total`, values into the strip's `out`."""
    first, number = size.first, min(QUERIES, size.width - size.first)
    shift = np.full((size.height, QUERIES), _f(-3e38))
    sums = np.zeros((size.height, QUERIES), np.float32)
    work.out[:] = 0
    room = np.zeros(6 * SIDE_BY_SIDE * _ROWS * KEYS, np.float32)
    weights = np.zeros((_ROWS + 3) * KEYS, np.float32)
    reach = np.empty((number, 2), np.int64)
    for final in (False, True):
        for n in range(levels.shape[0]):
            height, width, pixel, element = levels[n]
            last = columns[n, first + number - 1, 1]
            for start in range(columns[n, first, 0], last, KEYS - 2):
                taken = min(KEYS - 2, last - start)
                step = -(-(taken + 2) // (2 * LANES)) * (2 * LANES)
                keys = _Keys(start, taken, height, width, pixel, element, step)
                for i in range(number):
                    for side in range(2):
                        reach[i, side] = min(max(columns[n, first + i, side] - start, 0), taken)
                weights[:] = 0
                _sweeps(final, work, size, keys, rows[n], reach, shift, sums, room, weights)
        if not final:
            top[:, first : first + number] = shift[:, :number]
            total[:, first : first + number] = sums[:, :number]
            sums[:] = _f(1) / sums


@_jit
def _sweeps(final, work, size, keys, rows, reach, shift, sums, room, weights):
    """One pass of a strip over some columns of the keys of a scale."""
    lowest, highest = keys.height, -size.height
    for y in range(size.height):
        lowest, highest = min(lowest, rows[y, 0] - y), max(highest, rows[y, 1] - y)
    part = _ROWS * keys.step
    seen, going = np.zeros(SIDE_BY_SIDE, np.bool_), np.zeros(SIDE_BY_SIDE, np.bool_)
    for r in range(lowest, highest, SIDE_BY_SIDE):
        going[:] = False
        # all sweeps meet the same row of keys at a time
        for row in range(max(r, 0), min(keys.height, size.height + r + SIDE_BY_SIDE - 1) + 1):
            for n in range(SIDE_BY_SIDE):
                y = row - r - n
                seen[n] = 0 <= y < size.height and rows[y, 0] <= row < rows[y, 1]
                products = room[6 * n * part : (6 * n + 3) * part]
                if seen[n] and not going[n]:
                    room[6 * n * part : 6 * (n + 1) * part] = 0
                    _pixels(work, size, keys, y - 1, row - 1, products)
                    _pixels(work, size, keys, y, row, products)
                if seen[n]:
                    _pixels(work, size, keys, y + 1, row + 1, products)
            for n in range(SIDE_BY_SIDE):
                y = row - r - n
                if seen[n]:
                    summed = room[(6 * n + 2) * part : (6 * n + 3) * part]
                    if final:
                        _weigh(work.factors, keys, row, reach, summed, shift[y], sums[y], weights)
                        _mix(weights, keys, room[(6 * n + 3) * part : 6 * (n + 1) * part])
                    else:
                        _enter(work.factors, keys, row, reach, summed, shift[y], sums[y])
            for n in range(SIDE_BY_SIDE):
                y = row - r - n
                mixed = room[(6 * n + 3) * part : 6 * (n + 1) * part]
                if final and seen[n]:
                    _paste(work, size, keys, reach, y - 1, row - 1, mixed)
                elif final and going[n]:
                    _end(mixed, part)
                    _paste(work, size, keys, reach, y - 1, row - 1, mixed)
                    _end(mixed, part)
                    _paste(work, size, keys, reach, y, row, mixed)
                going[n] = seen[n]


@_jit
def _pixels(work, size, keys, y, row, products):
    """Products of the pixels of row y of the queries and a row of the keys, with margins."""
    length = -(-size.width // QUERIES) * QUERIES + 2
    a = ((y + 1) * length + size.first) * size.channels
    width = keys.width + 2
    b = keys.element + (row + 1) * size.channels * width + keys.start
    for i in range(0, _ROWS, TILE):
        for n in range(0, keys.step, 2 * LANES):
            follow_product(
                *(work.queries, a + i * size.channels, size.channels),
                *(work.keys, b + n, width),
                *(products, i * keys.step + n, keys.step),
                *(size.channels, _ROWS * keys.step),
            )


@_jit
def _mix(weights, keys, mixed):
    """Sums of the weights of a row along the diagonals."""
    part = _ROWS * keys.step
    follow_mixed(weights, 0, keys.step + 1, mixed, 0, part, part)


@_jit
def _end(mixed, part):
    """A row of weights that are all zero."""
    mixed[2 * part :] = mixed[part : 2 * part]
    mixed[part : 2 * part] = mixed[:part]
    mixed[:part] = 0


@_jit
def _enter(factors, keys, row, reach, summed, shift, sums):
    """Extend each softmax of a row of queries by a row of keys."""
    along, one = keys.step + 1, _f(1)
    for i in range(reach.shape[0]):
        a, n = reach[i, 0], reach[i, 1] - reach[i, 0]
        t, f = i * keys.step + a, keys.pixel + row * keys.width + keys.start + a
        more = exponentials(summed, t, along, factors, f, n, shift[i], one, summed, 0, False)
        if more > _LIMIT:
            higher = max(_highest(summed, t, along, factors, f, n), shift[i])
            sums[i] *= np.exp(shift[i] - higher)
            shift[i] = higher
            more = exponentials(summed, t, along, factors, f, n, higher, one, summed, 0, False)
        sums[i] += more


@_jit
def _weigh(factors, keys, row, reach, summed, shift, scale, weights):
    """Weights of a row of queries for a row of keys, two rows and columns into `weights`."""
    along = keys.step + 1
    for i in range(reach.shape[0]):
        a, n = reach[i, 0], reach[i, 1] - reach[i, 0]
        t, f = i * keys.step + a, keys.pixel + row * keys.width + keys.start + a
        o = t + 2 * along
        exponentials(summed, t, along, factors, f, n, shift[i], scale[i], weights, o, True)


@_jit
def _paste(work, size, keys, reach, y, row, mixed):
    """Add to row y of the result what it gets from a row of the values."""
    if not (0 <= y < size.height and 0 <= row < keys.height):
        return
    a, out = 2 * _ROWS * keys.step, y * _ROWS * size.depth
    pixel = keys.pixel + row * keys.width + keys.start - 1
    least, most = max(1 - keys.start, 0), keys.width + 1 - keys.start
    for i in range(0, _ROWS, TILE):
        first, last = keys.step, 0
        for query in range(max(i - 2, 0), min(i + TILE, reach.shape[0])):
            if reach[query, 0] < reach[query, 1]:
                first, last = min(first, reach[query, 0]), max(last, reach[query, 1] + 2)
        first, last = max(first, least), min(last, most)
        for n in range(0, size.depth if first < last else 0, 2 * LANES):
            add_product(
                *(mixed, a + i * keys.step + first, keys.step),
                *(work.values, (pixel + first) * size.depth + n, size.depth),
                *(work.out, out + i * size.depth + n, size.depth),
                last - first,
            )


@_jit
def _highest(t, t0, step, factors, f, n):
    """Largest score of a row, laid out as for `exponentials`."""
    top = _f(-np.inf)
    for x in range(n):
        at = t0 + x
        top = max(top, factors[f + x] * (t[at] + t[at + step] + t[at + 2 * step]))
    return top
