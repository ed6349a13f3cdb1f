"""Local mean and variance of channels-last maps on the CPU, as `box_cpu` has them.

A job keeps the sums of the columns of a row of windows. Going on to a neighbouring row of windows,
the row of pixels that enters is added to them and the one that leaves taken away, and sums over
windows slide along them: a window costs the same whatever its size, and memory is read in order.
Variances, and means of few channels, are kept as sums over the windows themselves, to which the
sliding differences are added.

Jobs share the rows of windows, and each would have to sum a whole window of rows before it begins.
So two jobs begin with the same one, and go up and down from it; its rows are summed in blocks
before, which jobs share too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from numba import njit
from torch import Tensor

from fullres.ops.arrays import as_array, spanned
from fullres.ops.lanes import (
    AHEAD,
    LANES,
    add,
    drain,
    load,
    multiply,
    pointer,
    prefetch,
    repeat,
    store,
    stream,
    subtract,
    widen,
)
from fullres.ops.threads import split, spread

_jit = njit(nogil=True, cache=True, error_model="numpy", boundscheck=False)

Run = tuple[int, int]
"""The first of some rows, and the one after the last."""

SUMS = 2**21
"""Bytes of sums that a job keeps: more would leave caches, fewer would part pixels."""
CHUNK = 8
"""Columns that all channels slide along before the next: more would not read memory in order."""
SOON = 2**12
"""Bytes that rows of pixels are fetched ahead of their use there."""
CACHED = 2**21
"""Bytes of a result that may be in cache when it is read: larger ones are written past caches."""
_SHARES = np.repeat((0.0, 1.0), LANES)
"""Sixteen from a place on: how much each of a vector's values counts, none before they all do."""


class Walk(NamedTuple):
    """Rows of windows that a job goes through one after the other."""

    start: int
    """The row whose sums it begins with. A walk down gives this row and those after it, a walk up
    those before it."""
    rows: int
    """How many it gives."""
    down: bool

    def within(self, blocks: Sequence[Run], kh: int) -> slice:
        """Which of the blocks of rows its first windows are made of."""
        mine = [n for n, (begin, _) in enumerate(blocks) if 0 <= begin - self.start < kh]
        return slice(mine[0], mine[-1] + 1)


def shared(windows: int, kh: int, maps: int) -> tuple[list[Walk], list[Run]]:
    """How torch's threads share so many rows of windows, each of so many maps.

    Walks over the windows, and blocks of the rows that their first windows are made of.
    """
    threads = torch.get_num_threads()
    walks = _walks(split(windows, -(-threads // maps)))
    return walks, _blocks([w.start for w in walks], kh, 4 * threads // maps)


def local_mean(x: Tensor, outs: Sequence[Tensor], kh: int, kw: int, replicate: bool) -> None:
    """Write the mean of `x` (B, C, H, W) to the one of `outs`."""
    _run(_sum, _mean, 1, (x, *outs), kh, kw, replicate)


def local_mean_var(x: Tensor, outs: Sequence[Tensor], kh: int, kw: int, replicate: bool) -> None:
    """Write the mean and the variance of `x` (B, C, H, W) to the two of `outs`."""
    _run(_sum_squares, _mean_var, 2, (x, *outs), kh, kw, replicate)


def _run(
    add: Callable[..., None],
    walk: Callable[..., None],
    kinds: int,
    maps: Sequence[Tensor],
    kh: int,
    kw: int,
    replicate: bool,
) -> None:
    """Sum rows by `add`, `kinds` of sums a column, and go on from them by `walk`."""
    batch, channels, height, width = maps[0].shape
    windows = height - kh + 1
    top, left = ((kh - 1) // 2, (kw - 1) // 2) if replicate else (0, 0)
    shape = np.array((kh, kw, top, left, maps[1].shape[3]))
    lanes = _lanes(width, channels)
    groups = [(b, c) for b in range(batch) for c in range(0, channels, lanes)]
    walks, blocks = shared(windows, kh, len(groups))
    flat = [as_array(spanned(t)) for t in maps]
    adding, walking = [], []
    for b, c in groups:
        some = min(lanes, channels - c)
        places = [np.array((b * t.stride(0) + c, t.stride(2), t.stride(3))) for t in maps]
        sums = np.empty((len(blocks), kinds, width, some))
        adding += [(add, flat[0], places[0], *block, sums[n]) for n, block in enumerate(blocks)]
        walking += [(walk, *flat, *places, shape, *w, sums[w.within(blocks, kh)]) for w in walks]
    spread(adding)
    spread(walking)
    if replicate:
        for out in maps[1:]:
            out[:, :, :top] = out[:, :, top : top + 1]
            out[:, :, top + windows :] = out[:, :, top + windows - 1 : top + windows]


def _lanes(width: int, channels: int) -> int:
    """Channels that a job sums together: whole pixels where the cache allows.

    Memory is read in order only if a job takes all channels of a pixel.
    """
    parts = -(-8 * width * channels // SUMS)
    lanes: int = -(-channels // parts)
    return min(channels, -(-lanes // 16) * 16)


def _walks(runs: Sequence[Run]) -> list[Walk]:
    """Walks over the runs, two from the border of each two.

    >>> _walks([(0, 3), (3, 7)])
    [Walk(start=3, rows=3, down=False), Walk(start=3, rows=4, down=True)]
    """
    walks = []
    for n, (first, last) in enumerate(runs):
        up = n % 2 == 0 and n + 1 < len(runs)
        walks.append(Walk(last if up else first, last - first, down=not up))
    return walks


def _blocks(starts: Sequence[int], kh: int, parts: int) -> list[Run]:
    """About so many blocks of rows, of which the windows at all starts are made.

    >>> _blocks([0, 3], 5, 2)
    [(0, 3), (3, 5), (5, 8)]
    """
    borders = sorted({row for first in starts for row in (first, first + kh)})
    most = -(-borders[-1] // max(parts, 1))
    blocks = []
    for a, b in pairwise(borders):
        if any(first <= a < first + kh for first in starts):
            blocks += [(a + first, a + last) for first, last in split(b - a, -(-(b - a) // most))]
    return blocks


# The kernels take memory as it lies, and of each map the place (of the first pixel, steps from row
# to row and from pixel to pixel) of the channels that are theirs; the shape is (kh, kw, rows above
# and columns left of the first window's position, columns of the result). Offsets are unsigned,
# since a negative index would count from the end, and the test for it would keep the loops over
# channels from becoming vector code.


@_jit
def _sum(x, place, first, last, sums):
    column = sums[0].reshape(_lines(sums.shape[1:], place[2]))
    column[:] = 0.0
    for y in range(first, last, 4):
        if y + 4 <= last:
            add_four(x, place, y, column)
        else:
            for row in range(y, last):
                add_row(x, place, row, column)


@_jit
def add_row(x, place, y, column):
    """Add a row of pixels to sums of columns."""
    row, step = _row(place, y)
    channels = np.uintp(column.shape[1])
    for j in range(np.uintp(column.shape[0])):
        pixel = row + j * step
        for c in range(channels):
            column[j, c] += x[pixel + c]


@_jit
def add_four(x, place, y, column):
    """Add four rows of pixels to sums of columns, which are then read and written once."""
    row, step = _row(place, y)
    channels, line = np.uintp(column.shape[1]), np.uintp(place[1])
    for j in range(np.uintp(column.shape[0])):
        one = row + j * step
        two, three, four = one + line, one + line + line, one + line + line + line
        for c in range(channels):
            some = np.float64(x[one + c]) + np.float64(x[two + c])
            others = np.float64(x[three + c]) + np.float64(x[four + c])
            column[j, c] += some + others


@_jit
def _sum_squares(x, place, first, last, sums):
    column, squares = sums[0], sums[1]
    column[:], squares[:] = 0.0, 0.0
    channels = np.uintp(column.shape[1])
    pivot = _pivot(x, place, column.shape[1])
    for y in range(first, last):
        row, step = _row(place, y)
        for j in range(np.uintp(column.shape[0])):
            pixel = row + j * step
            _prefetch(x, pixel, channels)
            for c in range(channels):
                value = x[pixel + c] - pivot[c]
                column[j, c] += value
                squares[j, c] += value * value


@_jit
def _mean(x, out, place, target, shape, start, rows, down, sums):
    kh, kw, top, left = shape[:4]
    columns = together(sums)[0]
    if columns.shape[1] < LANES:
        total, rooms = begun(columns, kw)
        for n in range(rows):
            i, leaves, enters = turn(start, n, down, kh)
            if n > 0 or not down:
                advance(x, place, leaves, enters, total, rooms)
            write(total, out, target, i, shape)
        return
    for n in range(rows):
        i, leaves, enters = turn(start, n, down, kh)
        to, further = target[0] + (top + i) * target[1] + left * target[2], target[2]
        streams = out.nbytes > CACHED and _in_lines(out, to, further, columns.shape[1])
        where = to, further, streams
        slide(x, place, leaves, enters, n > 0 or not down, columns, out, where, shape)
        _extend(out, target, i, shape, (len(columns) - kw + 1, columns.shape[1]))
    drain()


@_jit
def _in_lines(out, to, further, channels):
    """Whether vectors of so many channels, from a place on, lie in one line of cache each."""
    first = out.ctypes.data // out.itemsize + to
    return first % LANES == 0 and further % LANES == 0 and channels % LANES == 0


@_jit
def _mean_var(x, mean, var, place, to_mean, to_var, shape, start, rows, down, sums):
    kh, kw = shape[:2]
    both = together(sums)
    total, square = _slid(both[0], kw), _slid(both[1], kw)
    moved, squares_moved = np.empty(total.shape[1]), np.empty(total.shape[1])
    pivot = _pivot(x, place, total.shape[1])
    for n in range(rows):
        i, leaves, enters = turn(start, n, down, kh)
        if n > 0 or not down:
            _next_both(
                x, place, leaves, enters, pivot, total, square, moved, squares_moved, np.uintp(kw)
            )
        _write_both(total, square, pivot, mean, var, to_mean, to_var, i, shape)


@_jit
def begun(columns, kw):
    """The sums over a row of windows from those of its columns, and memory for `advance`."""
    total = _slid(columns, kw)
    return total, (np.empty(columns.shape), np.empty(total.shape))


@_jit
def turn(start, n, down, kh):
    """Which row of windows a walk gives as its `n`-th, and the rows that leave and enter for it."""
    if down:
        return start + n, start + n - 1, start + n - 1 + kh
    return start - 1 - n, start - 1 - n + kh, start - 1 - n


@_jit
def together(sums):
    """The sums of all blocks."""
    total = sums[0].copy()
    for n in range(1, len(sums)):
        total += sums[n]
    return total


@_jit
def _slid(column, kw):
    """Sums over all windows of a row, from those of its columns."""
    total = np.zeros((column.shape[0] - kw + 1, column.shape[1]))
    for j in range(kw):
        total[0] += column[j]
    for j in range(len(total) - 1):
        for c in range(column.shape[1]):
            total[j + 1, c] = total[j, c] + (column[j + kw, c] - column[j, c])
    return total


@_jit
def slide(x, place, leaves, enters, moves, columns, out, to, shape):
    """Write the means of a row of windows, from the sums of its columns, (columns, channels).

    Where it `moves`, these are of the neighbouring row, and first take in the row of pixels that
    enters and let go of the one that leaves. There are sixteen channels or more. Means are written
    to (place of the first, step to the next, whether past caches).
    """
    (count, channels), step = columns.shape, place[2]
    old, new = place[0] + leaves * place[1], place[0] + enters * place[1]
    values, sums, results = pointer(x), pointer(columns), pointer(out)
    ahead, totals = SOON // x.itemsize, np.zeros(channels + LANES)
    for begin in range(0, count, CHUNK):
        end = min(begin + CHUNK, count)
        for v in range(0, channels, LANES):
            c = min(v, channels - LANES)
            share = load(_SHARES, LANES - (v - c))  # nothing to those that had theirs before
            rows, target = (values, old + c, new + c, step, ahead), (results, to[0] + c, *to[1:])
            some = sums, c, channels, begin, end
            _slide_sixteen(rows, moves, some, share, totals, v, target, shape)


@_jit
def _slide_sixteen(rows, moves, columns, share, totals, v, target, shape):
    """The same for sixteen channels of a run of columns, from sums over windows so far."""
    x, old, new, step, ahead = rows
    sums, c, channels, begin, end = columns
    out, to, further, streams = target
    others, scale = shape[1] - 1, repeat(1 / (shape[0] * shape[1]))
    total = load(totals, v)
    for j in range(begin, end):
        here = load(sums, j * channels + c)
        if moves:
            leaves, enters = old + j * step, new + j * step
            prefetch(x, leaves + ahead)
            prefetch(x, enters + ahead)
            change = subtract(widen(load(x, enters)), widen(load(x, leaves)))
            here = add(here, multiply(change, share))
            store(sums, j * channels + c, here)
        first = j - others
        if first > 0:
            here = subtract(here, load(sums, (first - 1) * channels + c))
        total = add(total, here)
        if first >= 0:
            if streams:
                stream(out, to + first * further, multiply(total, scale))
            else:
                store(out, to + first * further, multiply(total, scale))
    store(totals, v, total)


@_jit
def advance(x, place, leaves, enters, total, rooms):
    """From the sums of a row of windows to those of the next, for fewer than sixteen channels."""
    changes, moving = rooms
    (old, step), (new, _) = _row(place, leaves), _row(place, enters)
    channels, others = changes.shape[1], len(changes) - len(total)  # others of a window's columns
    lines, length = _lines(changes.shape, step)
    flat, sums, slid = changes.reshape(-1), total.reshape(-1), moving.reshape(-1)
    for line in range(lines):
        for c in range(length):
            at = np.uintp(line) * step + np.uintp(c)
            flat[line * length + c] = np.float64(x[new + at]) - np.float64(x[old + at])
    slid[:channels] = 0.0
    for j in range(others + 1):
        for c in range(channels):
            slid[c] += changes[j, c]
    for i in range(channels, len(slid)):
        slid[i] = slid[i - channels] + (flat[i + others * channels] - flat[i - channels])
    for i in range(len(slid)):
        sums[i] += slid[i]


@_jit
def _lines(shape, step):
    """Pixels and channels of a row, as the fewest lines that lie without gaps and their length."""
    return (1, shape[0] * shape[1]) if step == shape[1] else shape


@_jit
def _next_both(x, place, leaves, enters, pivot, total, square, moved, squares_moved, kw):
    """The same for sums of values and of their squares."""
    (old, step), (new, _) = _row(place, leaves), _row(place, enters)
    channels, others = np.uintp(len(moved)), kw - np.uintp(1)
    moved[:], squares_moved[:] = 0.0, 0.0
    for j in range(others):
        old_at, new_at = old + j * step, new + j * step
        _prefetch(x, old_at, channels)
        _prefetch(x, new_at, channels)
        for c in range(channels):
            a, b = x[old_at + c] - pivot[c], x[new_at + c] - pivot[c]
            moved[c] += b - a
            squares_moved[c] += b * b - a * a
    for j in range(np.uintp(len(total))):
        first_old, first_new = old + j * step, new + j * step
        last_old, last_new = first_old + others * step, first_new + others * step
        _prefetch(x, last_old, channels)
        _prefetch(x, last_new, channels)
        for c in range(channels):
            a, b = x[last_old + c] - pivot[c], x[last_new + c] - pivot[c]
            here, squares_here = moved[c] + (b - a), squares_moved[c] + (b * b - a * a)
            total[j, c] += here
            square[j, c] += squares_here
            a, b = x[first_old + c] - pivot[c], x[first_new + c] - pivot[c]
            moved[c], squares_moved[c] = here - (b - a), squares_here - (b * b - a * a)


@_jit
def write(total, out, target, i, shape):
    """Means of a row of windows from their sums."""
    kh, kw, top, left = shape[:4]
    scale = 1 / (kh * kw)
    at, step = _row(target, top + i, left)
    lines, length = _lines(total.shape, step)
    sums = total.reshape((lines, length))
    for j in range(np.uintp(lines)):
        for c in range(np.uintp(length)):
            out[at + j * step + c] = sums[j, c] * scale
    _extend(out, target, i, shape, total.shape)


@_jit
def _write_both(total, square, pivot, mean, var, to_mean, to_var, i, shape):
    """Means and variances of a row of windows from their sums."""
    kh, kw, top, left = shape[:4]
    scale = 1 / (kh * kw)
    (at, step), (var_at, var_step) = _row(to_mean, top + i, left), _row(to_var, top + i, left)
    for j in range(np.uintp(total.shape[0])):
        for c in range(np.uintp(total.shape[1])):
            centre = total[j, c] * scale
            mean[at + j * step + c] = centre + pivot[c]
            var[var_at + j * var_step + c] = max(square[j, c] * scale - centre * centre, 0.0)
    _extend(mean, to_mean, i, shape, total.shape)
    _extend(var, to_var, i, shape, total.shape)


@_jit
def _extend(out, target, i, shape, windows):
    """Extend a row of windows to the ends of the result's row."""
    _, _, top, left, width = shape
    last = left + windows[0] - 1
    for j in range(width):
        if j < left or j > last:
            at, _ = _row(target, top + i, j)
            nearest, _ = _row(target, top + i, min(max(j, left), last))
            for c in range(np.uintp(windows[1])):
                out[at + c] = out[nearest + c]


@_jit
def _row(place, y, x=0):
    """Where a row lies from its `x`-th pixel on, and the step to the next pixel."""
    return np.uintp(place[0] + y * place[1] + x * place[2]), np.uintp(place[2])


@_jit
def _pivot(x, place, channels):
    """A value of each channel, which sums of squares are taken about."""
    return x[place[0] : place[0] + channels].astype(np.float64)


@_jit
def _prefetch(x, at, channels):
    for c in range(0, channels, 64 // x.itemsize):
        prefetch(x, np.intp(at) + AHEAD // x.itemsize + c)
