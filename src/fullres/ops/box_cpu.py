"""Local mean and variance on the CPU: running sums in float64, one read and one write of the map.

A kernel keeps one sum a column over the rows of the window. Moving down a row adds the row that
enters and takes away the row that leaves; a second running sum along the columns then gives
every window of the row. Two memory layouts are served in place: maps whose rows are contiguous
(NCHW, and slices of it) and maps whose pixels are (channels-last, and slices of it).

Sums are carried in float64, so that the error stays near 1e-16 of the largest magnitude on the
plane, whatever the size of map and window; the variance is summed about a pixel of the plane.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numba import njit
from torch import Tensor

from fullres.ops.arrays import as_array, spanned
from fullres.ops.threads import split, spread

_jit = njit(nogil=True, cache=True, error_model="numpy", boundscheck=False)

HALF_CHANNELS = 16
"""Channels of half precision that are widened to float32 at a time."""

SUMS = 3 * 2**18
"""Bytes of column sums that a channels-last job keeps, to stay in a core's own cache."""


def local_mean(x: Tensor, kh: int, kw: int, replicate: bool, out: Tensor) -> None:
    """Write to `out` the mean of `x` (B, C, H, W) over windows kh × kw no larger than the map."""
    _run(_mean_rows, _mean_pixels, x, (out,), kh, kw, replicate)


def local_mean_var(x: Tensor, kh: int, kw: int, replicate: bool, mean: Tensor, var: Tensor) -> None:
    """Write to `mean` and `var` those of `x` (B, C, H, W) over windows kh × kw."""
    _run(_mean_var_rows, _mean_var_pixels, x, (mean, var), kh, kw, replicate)


def _run(
    by_rows: Callable[..., None],
    by_pixels: Callable[..., None],
    x: Tensor,
    outs: tuple[Tensor, ...],
    kh: int,
    kw: int,
    replicate: bool,
) -> None:
    if x.dtype in (torch.float16, torch.bfloat16):
        # a few channels at a time in float32, so that no full copy of the map is held
        for first in range(0, x.shape[1], HALF_CHANNELS):
            part = x[:, first : first + HALF_CHANNELS].float()
            parts = tuple(o[:, first : first + HALF_CHANNELS].float() for o in outs)
            _run(by_rows, by_pixels, part, parts, kh, kw, replicate)
            for o, computed in zip(outs, parts, strict=True):
                o[:, first : first + HALF_CHANNELS] = computed
        return
    pixels_contiguous = x.shape[1] > 1 and x.stride(1) == 1 and x.stride(3) != 1
    kernel = by_pixels if pixels_contiguous else by_rows
    unit = 1 if pixels_contiguous else 3
    if x.stride(unit) != 1 and x.shape[unit] > 1:
        x = x.contiguous()
    targets = [o if o.stride(unit) == 1 or o.shape[unit] == 1 else o.contiguous() for o in outs]
    flat = [as_array(spanned(t)) for t in (x, *targets)]
    # strides of a side of length one are arbitrary: such a side is never stepped along
    strides = [np.array(t.stride()) for t in (x, *targets)]
    shape = np.array(x.shape)
    window = np.array([kh, kw, int(replicate)])
    threads = torch.get_num_threads()
    lanes = _lanes(x.shape[3], x.shape[1]) if pixels_contiguous else 1
    groups = x.shape[0] * -(-x.shape[1] // lanes)
    jobs = [
        (kernel, *flat, *strides, shape, window, lanes, group, first, last)
        for group in split(groups, 4 * threads)
        for first, last in split(x.shape[2] - kh + 1, -(-threads // groups))
    ]
    spread(jobs)
    for o, target in zip(outs, targets, strict=True):
        if replicate and pixels_contiguous:
            _replicate_rows(target, (kh - 1) // 2, x.shape[2] - kh + 1)
        if o is not target:
            o.copy_(target)


def _lanes(width: int, channels: int) -> int:
    """Channels that a channels-last job sums together: whole pixels where the cache allows.

    Memory is read in order only if a job takes all channels of a pixel, which gains more than jobs
    of other rows lose by first summing a whole window of rows each.
    """
    parts = -(-8 * width * channels // SUMS)
    lanes: int = -(-channels // parts)
    return min(channels, -(-lanes // 16) * 16)


def _replicate_rows(out: Tensor, top: int, windows: int) -> None:
    """Copy the first row of windows to the rows above, the last one to the rows below."""
    out[:, :, :top] = out[:, :, top : top + 1]
    out[:, :, top + windows :] = out[:, :, top + windows - 1 : top + windows]


# The kernels. All take: the map and the results as flat memory, their strides (B, C, H, W), the
# shape, (kh, kw, replicate), the run of planes or channel groups, and the run of window rows.
# Each job owns its rows of windows; where rows are contiguous, the first and the last job also own
# the border above and below.


@_jit
def _mean_rows(x, out, xs, os_, shape, window, lanes, group, first, last):
    width, kh, kw = shape[3], window[0], window[1]
    top, left = _margins(window)
    scale = 1.0 / (kh * kw)
    for plane in range(group[0], group[1]):
        start = plane // shape[1] * xs[0] + plane % shape[1] * xs[1]
        target = plane // shape[1] * os_[0] + plane % shape[1] * os_[1]
        column = np.zeros(width)
        for r in range(first, first + kh):
            row = x[start + r * xs[2] : start + r * xs[2] + width]
            for j in range(width):
                column[j] += row[j]
        for i in range(first, last):
            at = target + (top + i) * os_[2]
            total = 0.0
            for j in range(kw):
                total += column[j]
            result = out[at + left : at + left + width - kw + 1]
            result[0] = total * scale
            for j in range(width - kw):
                total += column[j + kw] - column[j]
                result[j + 1] = total * scale
            if window[2]:
                _replicate_row(out, at, left, width, kw)
                _replicate_edge(out, target, os_[2], width, shape[2], window, i)
            if i + 1 < last:
                leaving = x[start + i * xs[2] : start + i * xs[2] + width]
                entering = x[start + (i + kh) * xs[2] : start + (i + kh) * xs[2] + width]
                for j in range(width):
                    column[j] += np.float64(entering[j]) - np.float64(leaving[j])


@_jit
def _mean_var_rows(x, mean, var, xs, ms, vs, shape, window, lanes, group, first, last):
    width, kh, kw = shape[3], window[0], window[1]
    top, left = _margins(window)
    scale = 1.0 / (kh * kw)
    for plane in range(group[0], group[1]):
        start = plane // shape[1] * xs[0] + plane % shape[1] * xs[1]
        mean_target = plane // shape[1] * ms[0] + plane % shape[1] * ms[1]
        var_target = plane // shape[1] * vs[0] + plane % shape[1] * vs[1]
        pivot = np.float64(x[start])
        column, squares = np.zeros(width), np.zeros(width)
        for r in range(first, first + kh):
            row = x[start + r * xs[2] : start + r * xs[2] + width]
            for j in range(width):
                value = row[j] - pivot
                column[j] += value
                squares[j] += value * value
        for i in range(first, last):
            mean_at = mean_target + (top + i) * ms[2]
            var_at = var_target + (top + i) * vs[2]
            total = square = 0.0
            for j in range(kw):
                total += column[j]
                square += squares[j]
            m = mean[mean_at + left : mean_at + left + width - kw + 1]
            v = var[var_at + left : var_at + left + width - kw + 1]
            for j in range(width - kw + 1):
                if j > 0:
                    total += column[j + kw - 1] - column[j - 1]
                    square += squares[j + kw - 1] - squares[j - 1]
                centre = total * scale
                m[j] = centre + pivot
                v[j] = max(square * scale - centre * centre, 0.0)
            if window[2]:
                _replicate_row(mean, mean_at, left, width, kw)
                _replicate_row(var, var_at, left, width, kw)
                _replicate_edge(mean, mean_target, ms[2], width, shape[2], window, i)
                _replicate_edge(var, var_target, vs[2], width, shape[2], window, i)
            if i + 1 < last:
                leaving = x[start + i * xs[2] : start + i * xs[2] + width]
                entering = x[start + (i + kh) * xs[2] : start + (i + kh) * xs[2] + width]
                for j in range(width):
                    new = entering[j] - pivot
                    old = leaving[j] - pivot
                    column[j] += new - old
                    squares[j] += new * new - old * old


@_jit
def _margins(window):
    """Rows above and columns left of the contained windows."""
    if window[2]:
        return (window[0] - 1) // 2, (window[1] - 1) // 2
    return 0, 0


@_jit
def _replicate_row(out, at, left, width, kw):
    """Extend the windows of a row to the row's ends."""
    right = at + left + width - kw
    out[at : at + left] = out[at + left]
    out[right + 1 : at + width] = out[right]


@_jit
def _replicate_edge(out, target, stride, width, height, window, i):
    """Copy the first row of windows to the rows above, the last one to the rows below."""
    top, windows = (window[0] - 1) // 2, height - window[0] + 1
    row = out[target + (top + i) * stride : target + (top + i) * stride + width]
    if i == 0:
        for r in range(top):
            out[target + r * stride : target + r * stride + width] = row
    if i == windows - 1:
        for r in range(top + windows, height):
            out[target + r * stride : target + r * stride + width] = row


@_jit
def _mean_pixels(x, out, xs, os_, shape, window, lanes, group, first, last):
    top, left = _margins(window)
    kh, kw = window[0], window[1]
    blocks = (shape[1] + lanes - 1) // lanes
    for index in range(group[0], group[1]):
        channel = index % blocks * lanes
        some = min(lanes, shape[1] - channel)
        start = index // blocks * xs[0] + channel
        target = index // blocks * os_[0] + channel
        column, total = np.zeros((shape[3], some)), np.empty(some)
        for r in range(first, first + kh):
            _add_row(column, x, start + r * xs[2], xs[3])
        for i in range(first, last):
            at = target + (top + i) * os_[2]
            _slide(column, total, out, at + left * os_[3], os_[3], kw, 1 / (kh * kw))
            if window[2]:
                _replicate_columns(out, at, os_[3], left, shape[3], kw, some)
            if i + 1 < last:
                above = start + i * xs[2]
                _exchange_row(column, x, above + kh * xs[2], above, xs[3])


@_jit
def _mean_var_pixels(x, mean, var, xs, ms, vs, shape, window, lanes, group, first, last):
    width, kh, kw = shape[3], window[0], window[1]
    top, left = _margins(window)
    blocks = (shape[1] + lanes - 1) // lanes
    for index in range(group[0], group[1]):
        channel = index % blocks * lanes
        some = min(lanes, shape[1] - channel)
        start = index // blocks * xs[0] + channel
        mean_target = index // blocks * ms[0] + channel
        var_target = index // blocks * vs[0] + channel
        pivot = x[start : start + some].astype(np.float64)
        column, squares = np.zeros(width * some), np.zeros(width * some)
        total, square = np.empty(some), np.empty(some)
        for r in range(first, first + kh):
            _add_row_squares(column, squares, x[start + r * xs[2] :], pivot, xs[3], width, some)
        for i in range(first, last):
            mean_at = mean_target + (top + i) * ms[2]
            var_at = var_target + (top + i) * vs[2]
            m, v = mean[mean_at + left * ms[3] :], var[var_at + left * vs[3] :]
            total[:] = 0.0
            square[:] = 0.0
            for j in range(width):
                _enter(total, square, column, squares, j, kw, some)
                if j >= kw - 1:
                    at = j - kw + 1
                    _write_pixel(
                        m[at * ms[3] : at * ms[3] + some],
                        v[at * vs[3] : at * vs[3] + some],
                        total,
                        square,
                        pivot,
                        1 / (kh * kw),
                        some,
                    )
            if window[2]:
                _replicate_columns(mean, mean_at, ms[3], left, width, kw, some)
                _replicate_columns(var, var_at, vs[3], left, width, kw, some)
            if i + 1 < last:
                entering, leaving = x[start + (i + kh) * xs[2] :], x[start + i * xs[2] :]
                _exchange_row_squares(column, squares, entering, leaving, pivot, xs[3], width, some)


# Offsets into flat memory are unsigned, since a negative index would count from the end, and the
# test for it would keep the loops over channels from becoming vector code.


@_jit
def _add_row(column, x, at, step):
    at, step = np.uintp(at), np.uintp(step)
    for j in range(np.uintp(column.shape[0])):
        for c in range(np.uintp(column.shape[1])):
            column[j, c] += x[at + j * step + c]


@_jit
def _exchange_row(column, x, entering, leaving, step):
    entering, leaving, step = np.uintp(entering), np.uintp(leaving), np.uintp(step)
    for j in range(np.uintp(column.shape[0])):
        for c in range(np.uintp(column.shape[1])):
            new, old = x[entering + j * step + c], x[leaving + j * step + c]
            column[j, c] += np.float64(new) - np.float64(old)


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


# Slices of one pixel each, so that the inner loops over its channels become vector code.


@_jit
def _add_row_squares(column, squares, row, pivot, step, width, some):
    for j in range(width):
        new = row[j * step : j * step + some]
        sums, into = column[j * some : (j + 1) * some], squares[j * some : (j + 1) * some]
        for c in range(some):
            value = new[c] - pivot[c]
            sums[c] += value
            into[c] += value * value


@_jit
def _exchange_row_squares(column, squares, entering, leaving, pivot, step, width, some):
    for j in range(width):
        new, old = entering[j * step : j * step + some], leaving[j * step : j * step + some]
        sums, into = column[j * some : (j + 1) * some], squares[j * some : (j + 1) * some]
        for c in range(some):
            enters, leaves = new[c] - pivot[c], old[c] - pivot[c]
            sums[c] += enters - leaves
            into[c] += enters * enters - leaves * leaves


@_jit
def _enter(total, square, column, squares, j, kw, some):
    """Let column `j` enter the running sums, and column `j - kw` leave them."""
    new, new_squares = column[j * some : (j + 1) * some], squares[j * some : (j + 1) * some]
    for c in range(some):
        total[c] += new[c]
        square[c] += new_squares[c]
    if j >= kw:
        k = j - kw
        old, old_squares = column[k * some : (k + 1) * some], squares[k * some : (k + 1) * some]
        for c in range(some):
            total[c] -= old[c]
            square[c] -= old_squares[c]


@_jit
def _write_pixel(mean, var, total, square, pivot, scale, some):
    for c in range(some):
        centre = total[c] * scale
        mean[c] = centre + pivot[c]
        var[c] = max(square[c] * scale - centre * centre, 0.0)


@_jit
def _replicate_columns(out, at, step, left, width, kw, some):
    """Extend the windows of a row to the row's ends."""
    right = left + width - kw
    first = out[at + left * step : at + left * step + some]
    last = out[at + right * step : at + right * step + some]
    for j in range(left):
        pixel = out[at + j * step : at + j * step + some]
        for c in range(some):
            pixel[c] = first[c]
    for j in range(right + 1, width):
        pixel = out[at + j * step : at + j * step + some]
        for c in range(some):
            pixel[c] = last[c]
