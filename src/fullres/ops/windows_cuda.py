"""Products over cells on CUDA, in Triton: Gram matrices, squares and the application of matrices.

A program takes a chunk of a cell, some of its rows, and reads the channels of one head a block of
columns at a time. Sums of a chunk are float32 and stay in registers; those of a cell's chunks are
added in order afterwards, so that a result never depends on the order of execution. Maps are taken
with any strides and never copied, read once and written once; half precision is multiplied
exactly.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise

import torch
import triton
import triton.language as tl
from torch import Tensor

CHUNK = 2048
"""Positions of a chunk, unless one row of the cell has more."""
BLOCK = 64
"""Columns, and channels, that are multiplied at a time."""


def gram(a: Tensor, b: Tensor, rows: Sequence[int], columns: Sequence[int], out: Tensor) -> None:
    """Write to `out`, contiguous, the products `a bᵀ` of each cell."""
    (batch, heads, d, *_), c = a.shape, b.shape[2]
    chunks, firsts = _chunks(tuple(rows), tuple(columns), a.device)
    sums = out if len(chunks) == len(firsts) - 1 else out.new_empty(len(chunks), *out.shape[2:])
    tiles = _side(d), _side(c)
    grid = len(chunks), batch * heads, triton.cdiv(d, tiles[0]) * triton.cdiv(c, tiles[1])
    with torch.cuda.device(a.get_device()):
        _gram[grid](
            *(a, b, sums, chunks, a.stride(), b.stride(), heads, d, c),
            # the interpreter would multiply the bits of bfloat16 as integers
            *(*tiles, BLOCK, _alignment(columns), _precision(a, a.dtype), not a.is_cuda),
            num_warps=_warps(a),
            enable_fp_fusion=True,
        )
    _collect(sums, firsts, out)


def squares(x: Tensor, rows: Sequence[int], columns: Sequence[int], out: Tensor) -> None:
    """Write to `out`, contiguous, the sums of squares of each channel in each cell."""
    batch, heads, c = x.shape[:3]
    chunks, firsts = _chunks(tuple(rows), tuple(columns), x.device)
    sums = out if len(chunks) == len(firsts) - 1 else out.new_empty(len(chunks), *out.shape[2:])
    tile = _side(c)
    with torch.cuda.device(x.get_device()):
        _squares[len(chunks), batch * heads, triton.cdiv(c, tile)](
            *(x, sums, chunks, x.stride(), heads, c, tile, BLOCK, _alignment(columns)),
            enable_fp_fusion=True,
        )
    _collect(sums, firsts, out)


def weigh(m: Tensor, x: Tensor, rows: Sequence[int], columns: Sequence[int], out: Tensor) -> None:
    """Write to `out`, of any strides, the map `x` multiplied by the matrix of each cell."""
    batch, heads, c = x.shape[:3]
    d = m.shape[-2]
    chunks, _ = _chunks(tuple(rows), tuple(columns), x.device)
    m = m.flatten(0, 1)  # (cells, B, heads, d, c)
    tiles = _side(d), _side(c)
    with torch.cuda.device(x.get_device()):
        _weigh[len(chunks), batch * heads, triton.cdiv(d, tiles[0])](
            *(m, x, out, chunks, m.stride(), x.stride(), out.stride(), heads, d, c),
            *(*tiles, triton.cdiv(c, tiles[1]), BLOCK),
            *(_alignment(columns), _precision(x, m.dtype)),
            num_warps=_warps(x),
            enable_fp_fusion=True,
        )


def _collect(sums: Tensor, firsts: Tensor, out: Tensor) -> None:
    """Add the sums of each cell's chunks."""
    if sums is out:
        return
    cells, size = len(firsts) - 1, sums[0].numel()
    with torch.cuda.device(out.get_device()):
        _add[cells, triton.cdiv(size, 1024)](sums, out, firsts, size, 1024)


def _side(channels: int) -> int:
    """Channels of a tile; the tensor cores take no fewer than 16."""
    side: int = triton.next_power_of_2(channels)
    return min(max(side, 16), BLOCK)


@lru_cache(maxsize=256)
def _chunks(
    rows: tuple[int, ...], columns: tuple[int, ...], device: torch.device
) -> tuple[Tensor, Tensor]:
    """Chunks, cell after cell, as (cell, top, bottom, left, right); the first chunk of each."""
    chunks: list[tuple[int, ...]] = []
    firsts = [0]
    for top, bottom in pairwise(rows):
        for left, right in pairwise(columns):
            step = max(CHUNK // (right - left), 1)
            cell = len(firsts) - 1
            starts = range(top, bottom, step)
            chunks += [(cell, y, min(y + step, bottom), left, right) for y in starts]
            firsts.append(len(chunks))
    with torch.inference_mode(False):
        return (
            torch.tensor(chunks, dtype=torch.int32, device=device),
            torch.tensor(firsts, dtype=torch.int32, device=device),
        )


def _alignment(columns: Sequence[int]) -> int:
    """A power of two that all borders between columns are multiples of."""
    return math.gcd(16, *columns)


def _warps(x: Tensor) -> int:
    # ordinary arithmetic holds both factors in registers
    return 8 if x.dtype == torch.float32 else 4


def _precision(x: Tensor, dtype: torch.dtype) -> str:
    """How factors of a type are multiplied: by the tensor cores where that loses nothing.

    A value of half precision is one of TF32, a float32 the sum of two nearly. Where both factors
    are float32 the products are those of ordinary arithmetic.
    """
    if x.dtype == torch.float32 or torch.version.hip is not None:
        return "ieee"
    if dtype == x.dtype or (x.is_cuda and torch.cuda.get_device_capability(x.device) < (8, 0)):
        return "ieee"
    return "tf32x3"


# The kernels. Axes of programs: chunks; maps and heads; tiles of channels.


@triton.jit
def _gram(
    a, b, sums, chunks, sa, sb, heads, d, c,
    D: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr, ALIGN: tl.constexpr,
    PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    chunk, number = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    across = tl.cdiv(c, C)
    i = tl.program_id(2) // across * D + tl.arange(0, D)
    j = tl.program_id(2) % across * C + tl.arange(0, C)
    _, top, bottom, left, right = _place(chunks, chunk, ALIGN)
    a += number // heads * sa[0] + number % heads * sa[1]
    b += number // heads * sb[0] + number % heads * sb[1]
    from_a, from_b = a + i.to(tl.int64)[:, None] * sa[2], b + j.to(tl.int64)[None, :] * sb[2]
    some_a, some_b = i[:, None] < d, j[None, :] < c
    total = tl.zeros((D, C), tl.float32)
    blocks = tl.cdiv(right - left, BLOCK)
    for n in tl.range(0, (bottom - top) * blocks):
        y = (top + n // blocks).to(tl.int64)
        x = left + n % blocks * BLOCK + tl.arange(0, BLOCK)
        at = x.to(tl.int64)
        p = tl.load(from_a + y * sa[3] + at[None, :] * sa[4], some_a & (x[None, :] < right), 0.0)
        q = tl.load(from_b + y * sb[3] + at[:, None] * sb[4], some_b & (x[:, None] < right), 0.0)
        if WIDEN:
            p, q = p.to(tl.float32), q.to(tl.float32)
        total = tl.dot(p, q, total, input_precision=PRECISION)
    into = sums + (chunk * tl.num_programs(1) + number) * d * c
    tl.store(into + i[:, None] * c + j[None, :], total, some_a & some_b)


@triton.jit
def _squares(
    x, sums, chunks, sx, heads, c, C: tl.constexpr, BLOCK: tl.constexpr, ALIGN: tl.constexpr
):
    chunk, number = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    j = tl.program_id(2) * C + tl.arange(0, C)
    _, top, bottom, left, right = _place(chunks, chunk, ALIGN)
    x += number // heads * sx[0] + number % heads * sx[1]
    source = x + j.to(tl.int64)[:, None] * sx[2]
    some = j[:, None] < c
    total = tl.zeros((C, BLOCK), tl.float32)
    blocks = tl.cdiv(right - left, BLOCK)
    for n in tl.range(0, (bottom - top) * blocks):
        y = (top + n // blocks).to(tl.int64)
        column = (left + n % blocks * BLOCK + tl.arange(0, BLOCK))[None, :]
        at = source + y * sx[3] + column.to(tl.int64) * sx[4]
        value = tl.load(at, some & (column < right), 0.0).to(tl.float32)
        total += value * value
    into = sums + (chunk * tl.num_programs(1) + number) * c + j
    tl.store(into, tl.sum(total, 1), j < c)


@triton.jit
def _weigh(
    m, x, out, chunks, sm, sx, so, heads, d, c,
    D: tl.constexpr, C: tl.constexpr, TILES: tl.constexpr, BLOCK: tl.constexpr,
    ALIGN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    chunk, number = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    i, j = tl.program_id(2) * D + tl.arange(0, D), tl.arange(0, C)
    cell, top, bottom, left, right = _place(chunks, chunk, ALIGN)
    batch, head = number // heads, number % heads
    matrix = m + cell.to(tl.int64) * sm[0] + batch * sm[1] + head * sm[2]
    matrix += i.to(tl.int64)[:, None] * sm[3] + j.to(tl.int64)[None, :] * sm[4]
    source = x + batch * sx[0] + head * sx[1] + j.to(tl.int64)[:, None] * sx[2]
    target = out + batch * so[0] + head * so[1] + i.to(tl.int64)[:, None] * so[2]
    blocks = tl.cdiv(right - left, BLOCK)
    for n in tl.range(0, (bottom - top) * blocks):
        y = (top + n // blocks).to(tl.int64)
        column = (left + n % blocks * BLOCK + tl.arange(0, BLOCK))[None, :]
        here, at = column < right, column.to(tl.int64)
        total = tl.zeros((D, BLOCK), tl.float32)
        for tile in tl.static_range(TILES):
            some = j + tile * C < c
            factors = tl.load(matrix + tile * C * sm[4], (i[:, None] < d) & some[None, :], 0.0)
            place = source + tile * C * sx[2] + y * sx[3] + at * sx[4]
            values = tl.load(place, some[:, None] & here, 0.0).to(tl.float32)
            total = tl.dot(factors, values, total, input_precision=PRECISION)
        into = target + y * so[3] + at * so[4]
        tl.store(into, total.to(out.dtype.element_ty), (i[:, None] < d) & here)


@triton.jit
def _add(sums, out, firsts, size, BLOCK: tl.constexpr):
    cell = tl.program_id(0)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    here = at < size
    total = tl.zeros((BLOCK,), tl.float32)
    for n in tl.range(tl.load(firsts + cell), tl.load(firsts + cell + 1)):
        total += tl.load(sums + tl.cast(n, tl.int64) * size + at, here, 0.0)
    tl.store(out + cell.to(tl.int64) * size + at, total, here)


@triton.jit
def _place(chunks, chunk, ALIGN: tl.constexpr):
    at = chunks + chunk * 5
    left, right = tl.load(at + 3), tl.load(at + 4)
    left, right = tl.multiple_of(left, ALIGN), tl.multiple_of(right, ALIGN)
    return tl.load(at), tl.load(at + 1), tl.load(at + 2), left, right
