"""Local mean, variance and normalisation on CUDA: how maps are cut for the kernels.

Traffic, for maps that the L2 cache does not hold: an element is read once from memory and written
once. The rows that leave were read kh rows ago, by programs just before this one, and come from L2
as far as it reaches; published sums add a twentieth. The rows above the first window and below the
last are written by a second launch, or by the band itself where they are few.

Maps are taken with any strides and never copied. Where channels are contiguous, a program takes 64
bytes of them and scans along the shorter side.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fullres.ops.box_triton import MEAN, MEAN_VAR, NORMALISE, WORD, extend, walk

BAND = 32
"""Rows that a program owns."""
POLLS = 64
"""Looks at the bands above before their sums are computed anew."""
ELEMENTS = 1024
"""Columns times maps of a program."""
MOST_ELEMENTS = 4096
"""The same where channels are contiguous."""
INSIDE = 2**15
"""Elements that a program writes above its first or below its last window by itself."""


def local_mean(x: Tensor, kh: int, kw: int, replicate: bool, out: Tensor) -> None:
    """Write to `out` the mean of `x` (B, C, H, W) over windows kh × kw no larger than the map."""
    _run(MEAN, x, kh, kw, replicate, out)


def local_mean_var(x: Tensor, kh: int, kw: int, replicate: bool, mean: Tensor, var: Tensor) -> None:
    """Write to `mean` and `var`, which have the same strides, those of `x` (B, C, H, W)."""
    _run(MEAN_VAR, x, kh, kw, replicate, mean, var)


def local_normalise(
    x: Tensor,
    kh: int,
    kw: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    out: Tensor,
) -> None:
    """Write to `out` the values of `x` (B, C, H, W) normalised by the windows around them.

    `(x - mean) / sqrt(var + eps) * weight + bias`, weight and bias contiguous, one a channel.
    """
    _run(NORMALISE, x, kh, kw, True, out, None, weight, bias, eps)


class _Tiling(NamedTuple):
    """How maps are cut: maps of a program, its windows of a row, columns of a window at a time."""

    lanes: int
    width: int
    head: int


def _run(
    kind: tl.constexpr,
    x: Tensor,
    kh: int,
    kw: int,
    replicate: bool,
    out: Tensor,
    var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 0.0,
) -> None:
    if _scans_height(x):
        x, out, var, kh, kw = x.mT, out.mT, None if var is None else var.mT, kw, kh
    batch, channels, height, width = x.shape
    windows = height - kh + 1, width - kw + 1
    top, left = ((kh - 1) // 2, (kw - 1) // 2) if replicate else (0, 0)
    border = out.shape[2] - windows[0]
    lanes, columns, head = tiling = _tiling(kind, x, windows[1], kw)
    bands, tiles = triton.cdiv(height, BAND), triton.cdiv(windows[1], columns)
    groups = batch * triton.cdiv(channels, lanes)
    inside = max(top, border - top) * lanes * width <= INSIDE
    room = flags = edges = None
    if bands > 1 and kh > BAND:
        sums = (1 if kind == MEAN else 2) * lanes * (columns + head)
        room = x.new_empty(groups * tiles * bands * sums, dtype=torch.float64)
        flags = x.new_zeros(groups * tiles * triton.cdiv(bands, WORD.value), dtype=torch.int32)
    if kind == NORMALISE and not inside:
        edges = x.new_empty(batch, channels, 2, 2, width, dtype=torch.float64)
    warps = min(max(lanes * columns // 128, 1), 16)
    with torch.cuda.device(x.get_device()):
        walk[(groups * tiles * bands,)](
            *(x, out, var, weight, bias, edges, room, flags, x.stride(), out.stride()),
            *(channels, height, width, out.shape[2], out.shape[3]),
            *(kh, kw, top, left, bands, tiles, POLLS),
            *(eps, kind, inside, BAND, *tiling, triton.cdiv(kw, head)),
            num_warps=warps,
            enable_fp_fusion=True,
        )
        if inside:
            return
        tiles, runs = triton.cdiv(width, columns), triton.cdiv(border, BAND)
        for result in (out,) if var is None else (out, var):
            extend[(groups * tiles * runs,)](
                *(x, result, weight, bias, edges, x.stride(), out.stride()),
                *(channels, width, top, windows[0], border, runs, tiles),
                *(kind, BAND, lanes, columns),
                num_warps=warps,
                enable_fp_fusion=True,
            )


def _scans_height(x: Tensor) -> bool:
    """Whether to scan along the height: it is contiguous, or pixels are and it is shorter."""
    if 1 in (x.stride(2), x.stride(3)):
        return x.stride(3) != 1
    return x.shape[2] < x.shape[3]


def _tiling(kind: tl.constexpr, x: Tensor, windows: int, kw: int) -> _Tiling:
    pixels_contiguous = x.stride(1) == 1 != x.stride(3)
    most = ELEMENTS
    if pixels_contiguous:
        most = MOST_ELEMENTS if kind == MEAN else MOST_ELEMENTS // 2  # registers for squares
    lanes = min(64 // x.element_size(), triton.next_power_of_2(x.shape[1]))
    lanes = lanes if pixels_contiguous else 1
    width = min(triton.next_power_of_2(windows), most // lanes)
    head = min(max(triton.next_power_of_2(kw) // 4, 1), most // lanes)
    if not pixels_contiguous:
        lanes = min(most // max(width, head), triton.next_power_of_2(x.shape[1]))
    return _Tiling(lanes, width, head)
