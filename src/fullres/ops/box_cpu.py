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

from fullres.ops import box_pixels_cpu
from fullres.ops.arrays import as_array, spanned
from fullres.ops.threads import split, spread

_jit = njit(nogil=True, cache=True, error_model="numpy", boundscheck=False)

HALF_CHANNELS = 16
"""Channels of half precision that are widened to float32 at a time."""


def local_mean(x: Tensor, kh: int, kw: int, replicate: bool, out: Tensor) -> None:
    """Write to `out` the mean of `x` (B, C, H, W) over windows kh × kw no larger than the map."""
    _run(_mean_rows, box_pixels_cpu.local_mean, x, (out,), kh, kw, replicate)


def local_mean_var(x: Tensor, kh: int, kw: int, replicate: bool, mean: Tensor, var: Tensor) -> None:
    """Write to `mean` and `var` those of `x` (B, C, H, W) over windows kh × kw."""
    _run(_mean_var_rows, box_pixels_cpu.local_mean_var, x, (mean, var), kh, kw, replicate)


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
    unit = 1 if pixels_contiguous else 3
    if x.stride(unit) != 1 and x.shape[unit] > 1:
        x = x.contiguous()
    targets = tuple(
        o if o.stride(unit) == 1 or o.shape[unit] == 1 else o.contiguous() for o in outs
    )
    if pixels_contiguous:
        by_pixels(x, targets, kh, kw, replicate)
    else:
        _spread_planes(by_rows, x, targets, kh, kw, replicate)
    for o, target in zip(outs, targets, strict=True):
        if o is not target:
            o.copy_(target)


def _spread_planes(
    kernel: Callable[..., None],
    x: Tensor,
    outs: tuple[Tensor, ...],
    kh: int,
    kw: int,
    replicate: bool,
) -> None:
    flat = [as_array(spanned(t)) for t in (x, *outs)]
    # strides of a side of length one are arbitrary: such a side is never stepped along
    strides = [np.array(t.stride()) for t in (x, *outs)]
    shape = np.array(x.shape)
    window = np.array([kh, kw, int(replicate)])
    threads = torch.get_num_threads()
    planes = x.shape[0] * x.shape[1]
    spread(
        [
            (kernel, *flat, *strides, shape, window, some, *rows)
            for some in split(planes, 4 * threads)
            for rows in split(x.shape[2] - kh + 1, -(-threads // planes))
        ]
    )


# The kernels take: the map and the results as flat memory, their strides (B, C, H, W), the shape,
# (kh, kw, replicate), the run of planes, and the run of window rows. Each job owns its rows of
# windows; the first and the last also own the border above and below.


@_jit
def _mean_rows(x, out, xs, os_, shape, window, planes, first, last):
    width, kh, kw = shape[3], window[0], window[1]
    top, left = _margins(window)
    scale = 1.0 / (kh * kw)
    for plane in range(planes[0], planes[1]):
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
def _mean_var_rows(x, mean, var, xs, ms, vs, shape, window, planes, first, last):
    width, kh, kw = shape[3], window[0], window[1]
    top, left = _margins(window)
    scale = 1.0 / (kh * kw)
    for plane in range(planes[0], planes[1]):
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
