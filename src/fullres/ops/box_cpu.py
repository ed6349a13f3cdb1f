"""Local mean and variance on the CPU: running sums in float64, one read and one write of the map.

A kernel keeps one sum a column over the rows of the window. Moving down a row adds the row that
enters and takes away the row that leaves; a second running sum along the columns then gives
every window of the row. Two memory layouts are served in place: maps whose rows are contiguous
(NCHW, and slices of it) and maps whose pixels are (channels-last, and slices of it).

Sums are carried in float64, so that the error stays near 1e-16 of the largest magnitude on the
plane, whatever the size of map and window; the variance is summed about a pixel of the plane.
The threads are our own: Numba's default pool must not be entered by two threads at once.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numba import njit
from torch import Tensor

_jit = njit(nogil=True, cache=True, error_model="numpy", boundscheck=False)

LANES = 16
"""Channels that the channels-last kernels sum together: two vectors of eight float64."""


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
        for first in range(0, x.shape[1], LANES):
            part = x[:, first : first + LANES].float()
            parts = tuple(o[:, first : first + LANES].float() for o in outs)
            _run(by_rows, by_pixels, part, parts, kh, kw, replicate)
            for o, computed in zip(outs, parts, strict=True):
                o[:, first : first + LANES] = computed
        return
    pixels_contiguous = x.shape[1] > 1 and x.stride(1) == 1 and x.stride(3) != 1
    kernel = by_pixels if pixels_contiguous else by_rows
    unit = 1 if pixels_contiguous else 3
    if x.stride(unit) != 1 and x.shape[unit] > 1:
        x = x.contiguous()
    targets = [o if o.stride(unit) == 1 or o.shape[unit] == 1 else o.contiguous() for o in outs]
    flat = [_flat(t) for t in (x, *targets)]
    # strides of a side of length one are arbitrary: such a side is never stepped along
    strides = [np.array(t.stride()) for t in (x, *targets)]
    shape = np.array(x.shape)
    window = np.array([kh, kw, int(replicate)])
    groups = x.shape[0] * (-(-x.shape[1] // LANES) if pixels_contiguous else x.shape[1])
    jobs = [
        (kernel, *flat, *strides, shape, window, group, first, last)
        for group in _split(groups, 4 * torch.get_num_threads())
        for first, last in _split(x.shape[2] - kh + 1, -(-torch.get_num_threads() // groups))
    ]
    _spread(jobs)
    for o, target in zip(outs, targets, strict=True):
        if o is not target:
            o.copy_(target)


def _flat(x: Tensor) -> Any:
    """The memory that `x` spans, as a one-dimensional array that shares it."""
    span = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return x.detach().as_strided((span,), (1,)).numpy()


def _split(count: int, parts: int) -> list[tuple[int, int]]:
    """`count` things in at most `parts` runs of nearly equal length, as (first, last + 1)."""
    parts = max(1, min(parts, count))
    edges = [count * part // parts for part in range(parts + 1)]
    return list(pairwise(edges))


_pool: ThreadPoolExecutor | None = None


def _spread(jobs: list[tuple[Any, ...]]) -> None:
    global _pool
    if len(jobs) == 1 or torch.get_num_threads() == 1:
        for kernel, *arguments in jobs:
            kernel(*arguments)
        return
    if _pool is None:
        _pool = ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="fullres-box")
    for future in [_pool.submit(*job) for job in jobs]:
        future.result()


def _forget_pool() -> None:
    global _pool
    _pool = None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_pool)  # a forked child has none of the threads


# The kernels. All take: the map and the results as flat memory, their strides (B, C, H, W), the
# shape, (kh, kw, replicate), the run of planes or channel groups, and the run of window rows.
# Each job owns its rows of windows, and the first and the last job the border above and below.


@_jit
def _mean_rows(x, out, xs, os_, shape, window, group, first, last):
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
def _mean_var_rows(x, mean, var, xs, ms, vs, shape, window, group, first, last):
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
def _mean_pixels(x, out, xs, os_, shape, window, group, first, last):
    width, kh, kw = shape[3], window[0], window[1]
    top, left = _margins(window)
    scale = 1.0 / (kh * kw)
    blocks = (shape[1] + LANES - 1) // LANES
    column = np.empty(width * LANES)
    total = np.empty(LANES)
    for index in range(group[0], group[1]):
        channel = index % blocks * LANES
        lanes = min(LANES, shape[1] - channel)
        start = index // blocks * xs[0] + channel
        target = index // blocks * os_[0] + channel
        column[:] = 0.0
        for r in range(first, first + kh):
            _add_row(column, x[start + r * xs[2] :], xs[3], width, lanes)
        for i in range(first, last):
            at = target + (top + i) * os_[2]
            _slide(column, total, out[at + left * os_[3] :], os_[3], width, kw, lanes, scale)
            if window[2]:
                _replicate_pixels(out, target, os_, shape, window, i, lanes)
            if i + 1 < last:
                entering, leaving = x[start + (i + kh) * xs[2] :], x[start + i * xs[2] :]
                _exchange_row(column, entering, leaving, xs[3], width, lanes)


@_jit
def _mean_var_pixels(x, mean, var, xs, ms, vs, shape, window, group, first, last):
    width, kh, kw = shape[3], window[0], window[1]
    top, left = _margins(window)
    blocks = (shape[1] + LANES - 1) // LANES
    column, squares = np.empty(width * LANES), np.empty(width * LANES)
    pivot, total, square = np.zeros(LANES), np.empty(LANES), np.empty(LANES)
    for index in range(group[0], group[1]):
        channel = index % blocks * LANES
        lanes = min(LANES, shape[1] - channel)
        start = index // blocks * xs[0] + channel
        mean_target = index // blocks * ms[0] + channel
        var_target = index // blocks * vs[0] + channel
        pivot[:lanes] = x[start : start + lanes]
        column[:] = 0.0
        squares[:] = 0.0
        for r in range(first, first + kh):
            _add_row_squares(column, squares, x[start + r * xs[2] :], pivot, xs[3], width, lanes)
        for i in range(first, last):
            m = mean[mean_target + (top + i) * ms[2] + left * ms[3] :]
            v = var[var_target + (top + i) * vs[2] + left * vs[3] :]
            total[:] = 0.0
            square[:] = 0.0
            for j in range(width):
                _accumulate(total, square, column, squares, j, kw, lanes)
                if j >= kw - 1:
                    at = j - kw + 1
                    for c in range(lanes):
                        centre = total[c] / (kh * kw)
                        m[at * ms[3] + c] = centre + pivot[c]
                        v[at * vs[3] + c] = max(square[c] / (kh * kw) - centre * centre, 0.0)
            if window[2]:
                _replicate_pixels(mean, mean_target, ms, shape, window, i, lanes)
                _replicate_pixels(var, var_target, vs, shape, window, i, lanes)
            if i + 1 < last:
                entering, leaving = x[start + (i + kh) * xs[2] :], x[start + i * xs[2] :]
                _exchange_row_squares(
                    column, squares, entering, leaving, pivot, xs[3], width, lanes
                )


# The inner loops over channels come twice: with a constant trip count they become vector code.


@_jit
def _add_row(column, row, step, width, lanes):
    for j in range(width):
        into, pixel = column[j * LANES : j * LANES + LANES], row[j * step : j * step + lanes]
        if lanes == LANES:
            for c in range(LANES):
                into[c] += pixel[c]
        else:
            for c in range(lanes):
                into[c] += pixel[c]


@_jit
def _exchange_row(column, entering, leaving, step, width, lanes):
    for j in range(width):
        into = column[j * LANES : j * LANES + LANES]
        new, old = entering[j * step : j * step + lanes], leaving[j * step : j * step + lanes]
        if lanes == LANES:
            for c in range(LANES):
                into[c] += np.float64(new[c]) - np.float64(old[c])
        else:
            for c in range(lanes):
                into[c] += np.float64(new[c]) - np.float64(old[c])


@_jit
def _slide(column, total, out, step, width, kw, lanes, scale):
    """Means of all windows of a row, from the sums of its columns."""
    total[:] = 0.0
    for j in range(kw):
        for c in range(LANES):
            total[c] += column[j * LANES + c]
    for c in range(lanes):
        out[c] = total[c] * scale
    if lanes == LANES:
        for j in range(width - kw):
            for c in range(LANES):
                total[c] += column[(j + kw) * LANES + c] - column[j * LANES + c]
                out[(j + 1) * step + c] = total[c] * scale
    else:
        for j in range(width - kw):
            for c in range(lanes):
                total[c] += column[(j + kw) * LANES + c] - column[j * LANES + c]
                out[(j + 1) * step + c] = total[c] * scale


@_jit
def _add_row_squares(column, squares, row, pivot, step, width, lanes):
    for j in range(width):
        pixel = row[j * step : j * step + lanes]
        for c in range(lanes):
            value = pixel[c] - pivot[c]
            column[j * LANES + c] += value
            squares[j * LANES + c] += value * value


@_jit
def _exchange_row_squares(column, squares, entering, leaving, pivot, step, width, lanes):
    for j in range(width):
        new, old = entering[j * step : j * step + lanes], leaving[j * step : j * step + lanes]
        for c in range(lanes):
            enters, leaves = new[c] - pivot[c], old[c] - pivot[c]
            column[j * LANES + c] += enters - leaves
            squares[j * LANES + c] += enters * enters - leaves * leaves


@_jit
def _accumulate(total, square, column, squares, j, kw, lanes):
    """Let column `j` enter the running sums, and column `j - kw` leave them."""
    for c in range(lanes):
        total[c] += column[j * LANES + c]
        square[c] += squares[j * LANES + c]
    if j >= kw:
        for c in range(lanes):
            total[c] -= column[(j - kw) * LANES + c]
            square[c] -= squares[(j - kw) * LANES + c]


@_jit
def _replicate_pixels(out, target, strides, shape, window, i, lanes):
    """Extend row `i` of the windows to the row's ends, the first and last row to the border."""
    height, width = shape[2], shape[3]
    top, left = _margins(window)
    windows, right = height - window[0] + 1, left + width - window[1]
    row, step = strides[2], strides[3]
    at = target + (top + i) * row
    for j in range(left):
        for c in range(lanes):
            out[at + j * step + c] = out[at + left * step + c]
    for j in range(right + 1, width):
        for c in range(lanes):
            out[at + j * step + c] = out[at + right * step + c]
    above = top if i == 0 else 0
    below = height - top - windows if i == windows - 1 else 0
    for k in range(above + below):
        to = target + (k if k < above else top + windows + k - above) * row
        for j in range(width):
            for c in range(lanes):
                out[to + j * step + c] = out[at + j * step + c]
