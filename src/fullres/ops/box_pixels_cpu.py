"""Local mean and variance of channels-last maps on the CPU, as `box_cpu` has them.

Jobs share the rows of windows, and each would have to sum a whole window of rows before it begins.
So rows are summed in blocks first, each row once, and a job begins with the blocks of its window.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np
import torch
from numba import njit
from torch import Tensor

from fullres.ops.arrays import as_array, spanned
from fullres.ops.lanes import prefetch
from fullres.ops.threads import split, spread

_jit = njit(nogil=True, cache=True, error_model="numpy", boundscheck=False)

Run = tuple[int, int]
"""The first of some rows, and the one after the last."""

SUMS = 2**21
"""Bytes of column sums that a job keeps: more would leave caches, fewer would part pixels."""


def local_mean(x: Tensor, outs: Sequence[Tensor], kh: int, kw: int, replicate: bool) -> None:
    """Write the mean of `x` (B, C, H, W) to the one of `outs`."""
    _run(_sum, _mean, 1, (x, *outs), kh, kw, replicate)


def local_mean_var(x: Tensor, outs: Sequence[Tensor], kh: int, kw: int, replicate: bool) -> None:
    """Write the mean and the variance of `x` (B, C, H, W) to the two of `outs`."""
    _run(_sum_squares, _mean_var, 2, (x, *outs), kh, kw, replicate)


def _run(
    add: Callable[..., None],
    slide: Callable[..., None],
    kinds: int,
    maps: Sequence[Tensor],
    kh: int,
    kw: int,
    replicate: bool,
) -> None:
    """Sum rows by `add`, `kinds` of sums a column, and go on from them by `slide`."""
    batch, channels, height, width = maps[0].shape
    top, left = ((kh - 1) // 2, (kw - 1) // 2) if replicate else (0, 0)
    shape = np.array((width, kh, kw, top, left, int(replicate)))
    threads = torch.get_num_threads()
    lanes = _lanes(width, channels)
    groups = [(b, c) for b in range(batch) for c in range(0, channels, lanes)]
    runs = split(height - kh + 1, -(-threads // len(groups)))
    blocks = _blocks(runs, kh, 4 * threads // len(groups))
    flat = [as_array(spanned(t)) for t in maps]
    adding, sliding = [], []
    for b, c in groups:
        some = min(lanes, channels - c)
        places = [np.array((b * t.stride(0) + c, t.stride(2), t.stride(3))) for t in maps]
        sums = np.empty((len(blocks), kinds, width, some))
        adding += [(add, flat[0], places[0], *block, sums[n]) for n, block in enumerate(blocks)]
        for first, last in runs:
            mine = [n for n, (begin, _) in enumerate(blocks) if first <= begin < first + kh]
            own = sums[mine[0] : mine[-1] + 1]
            sliding.append((slide, *flat, *places, shape, first, last, own))
    spread(adding)
    spread(sliding)
    if replicate:
        for out in maps[1:]:
            out[:, :, :top] = out[:, :, top : top + 1]
            windows = height - kh + 1
            out[:, :, top + windows :] = out[:, :, top + windows - 1 : top + windows]


def _lanes(width: int, channels: int) -> int:
    """Channels that a job sums together: whole pixels where the cache allows.

    Memory is read in order only if a job takes all channels of a pixel.
    """
    parts = -(-8 * width * channels // SUMS)
    lanes: int = -(-channels // parts)
    return min(channels, -(-lanes // 16) * 16)


def _blocks(runs: Sequence[Run], kh: int, parts: int) -> list[Run]:
    """About so many blocks of rows, so that the first window of each run is made of whole ones.

    >>> _blocks([(0, 3), (3, 6)], 5, 2)
    [(0, 3), (3, 5), (5, 8)]
    """
    borders = sorted({row for first, _ in runs for row in (first, first + kh)})
    most = -(-borders[-1] // max(parts, 1))
    blocks = []
    for a, b in pairwise(borders):
        if any(first <= a < first + kh for first, _ in runs):
            blocks += [(a + first, a + last) for first, last in split(b - a, -(-(b - a) // most))]
    return blocks


# The kernels take memory as it lies, and of each map the place (of the first pixel, steps from row
# to row and from pixel to pixel) of the channels that are theirs. Offsets are unsigned, since a
# negative index would count from the end, and the test for it would keep the loops over channels
# from becoming vector code.


@_jit
def _sum(x, place, first, last, sums):
    column = sums[0]
    column[:] = 0.0
    at, down, step = _unsigned(place)
    for y in range(np.uintp(first), np.uintp(last)):
        row = at + y * down
        ahead = down if y + 1 < last else np.uintp(0)
        for j in range(np.uintp(column.shape[0])):
            pixel = row + j * step
            _prefetch(x, pixel + ahead, column.shape[1])
            for c in range(np.uintp(column.shape[1])):
                column[j, c] += x[pixel + c]


@_jit
def _mean(x, out, place, target, shape, first, last, sums):
    width, kh, kw, top, left, replicate = shape
    column = _together(sums)[0]
    total = np.empty(column.shape[1])
    for i in range(first, last):
        row = target[0] + (top + i) * target[1]
        _slide(column, total, out, row + left * target[2], target[2], kw, 1 / (kh * kw))
        if replicate:
            _replicate(out, row, target[2], left, width, kw, len(total))
        if i + 1 < last:
            old, new, ahead, step = _moving(place, i, kh, last)
            for j in range(np.uintp(width)):
                enters, leaves = new + j * step, old + j * step
                _prefetch(x, enters + ahead, column.shape[1])
                _prefetch(x, leaves + ahead, column.shape[1])
                for c in range(np.uintp(column.shape[1])):
                    column[j, c] += np.float64(x[enters + c]) - np.float64(x[leaves + c])


@_jit
def _sum_squares(x, place, first, last, sums):
    column, squares = sums[0], sums[1]
    column[:], squares[:] = 0.0, 0.0
    at, down, step = _unsigned(place)
    pivot = x[place[0] : place[0] + column.shape[1]].astype(np.float64)
    for y in range(np.uintp(first), np.uintp(last)):
        row = at + y * down
        ahead = down if y + 1 < last else np.uintp(0)
        for j in range(np.uintp(column.shape[0])):
            pixel = row + j * step
            _prefetch(x, pixel + ahead, column.shape[1])
            for c in range(np.uintp(column.shape[1])):
                value = x[pixel + c] - pivot[c]
                column[j, c] += value
                squares[j, c] += value * value


@_jit
def _mean_var(x, mean, var, place, to_mean, to_var, shape, first, last, sums):
    width, kh, kw, top, left, replicate = shape
    both = _together(sums)
    column, squares = both[0], both[1]
    total, square = np.empty(column.shape[1]), np.empty(column.shape[1])
    pivot = x[place[0] : place[0] + column.shape[1]].astype(np.float64)
    for i in range(first, last):
        mean_row, var_row = to_mean[0] + (top + i) * to_mean[1], to_var[0] + (top + i) * to_var[1]
        _slide_both(
            column, squares, total, square, pivot, mean, mean_row + left * to_mean[2], to_mean[2],
            var, var_row + left * to_var[2], to_var[2], kw, 1 / (kh * kw),
        )  # fmt: skip
        if replicate:
            _replicate(mean, mean_row, to_mean[2], left, width, kw, len(total))
            _replicate(var, var_row, to_var[2], left, width, kw, len(total))
        if i + 1 < last:
            old, new, ahead, step = _moving(place, i, kh, last)
            for j in range(np.uintp(width)):
                enters, leaves = new + j * step, old + j * step
                _prefetch(x, enters + ahead, column.shape[1])
                _prefetch(x, leaves + ahead, column.shape[1])
                for c in range(np.uintp(column.shape[1])):
                    a, b = x[enters + c] - pivot[c], x[leaves + c] - pivot[c]
                    column[j, c] += a - b
                    squares[j, c] += a * a - b * b


@_jit
def _unsigned(place):
    return np.uintp(place[0]), np.uintp(place[1]), np.uintp(place[2])


@_jit
def _moving(place, i, kh, last):
    """Where the rows that leave and enter after row `i` begin; steps to the next and to a pixel."""
    at, down, step = _unsigned(place)
    old = at + np.uintp(i) * down
    return old, old + np.uintp(kh) * down, down if i + 2 < last else np.uintp(0), step


@_jit
def _prefetch(x, at, channels):
    for c in range(0, channels, 64 // x.itemsize):
        prefetch(x, np.intp(at) + c)


@_jit
def _together(sums):
    """The sums of all blocks."""
    total = sums[0].copy()
    for n in range(1, len(sums)):
        total += sums[n]
    return total


@_jit
def _slide(column, total, out, at, step, kw, scale):
    """Means of all windows of a row, from the sums of its columns."""
    at, step, one, kw = np.uintp(at), np.uintp(step), np.uintp(1), np.uintp(kw)
    channels = np.uintp(column.shape[1])
    total[:] = 0.0
    for j in range(kw - one):
        for c in range(channels):
            total[c] += column[j, c]
    for c in range(channels):
        total[c] += column[kw - one, c]
        out[at + c] = total[c] * scale
    for j in range(np.uintp(column.shape[0]) - kw):
        for c in range(channels):
            moved = total[c] + (column[j + kw, c] - column[j, c])
            total[c] = moved
            out[at + (j + one) * step + c] = moved * scale


@_jit
def _slide_both(
    column,
    squares,
    total,
    square,
    pivot,
    mean,
    mean_at,
    mean_step,
    var,
    var_at,
    var_step,
    kw,
    scale,
):
    """Means and variances of all windows of a row, from the sums of its columns."""
    mean_at, mean_step = np.uintp(mean_at), np.uintp(mean_step)
    var_at, var_step, kw = np.uintp(var_at), np.uintp(var_step), np.uintp(kw)
    channels = np.uintp(column.shape[1])
    total[:], square[:] = 0.0, 0.0
    for j in range(kw):
        for c in range(channels):
            total[c] += column[j, c]
            square[c] += squares[j, c]
    windows = np.uintp(column.shape[0]) - kw + np.uintp(1)
    for j in range(windows):
        for c in range(channels):
            centre = total[c] * scale
            mean[mean_at + j * mean_step + c] = centre + pivot[c]
            var[var_at + j * var_step + c] = max(square[c] * scale - centre * centre, 0.0)
        if j + np.uintp(1) < windows:
            for c in range(channels):
                total[c] += column[j + kw, c] - column[j, c]
                square[c] += squares[j + kw, c] - squares[j, c]


@_jit
def _replicate(out, at, step, left, width, kw, some):
    """Extend the windows of a row to the row's ends."""
    right = left + width - kw
    for j in range(left):
        for c in range(some):
            out[at + j * step + c] = out[at + left * step + c]
    for j in range(right + 1, width):
        for c in range(some):
            out[at + j * step + c] = out[at + right * step + c]
