"""3 × 3 convolution to few channels on the CPU, as networks end with: the map is read once.

Each pixel is multiplied by the weights of all nine taps at once, a product of matrices whose sums
stay in registers. What a result sums, three products of each of three rows, lies in cache then.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numba import njit
from torch import Tensor

from fullres.ops.arrays import as_array, as_rows
from fullres.ops.lanes import LANES, add, load, pointer, store
from fullres.ops.products_cpu import ROWS, matmul, next_width
from fullres.ops.threads import split, spread

_jit = njit(nogil=True, cache=True, error_model="numpy", boundscheck=False)

MOST = LANES // 3
"""Channels at most, so that those of three taps fill no more than a vector."""
PANEL = 190
"""Columns of a result that are gone down at a time, so that products of three rows stay in cache;
two fewer than a multiple of `ROWS`."""
_zero_row = np.zeros(3 * LANES, np.float32)  # that products begin with


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, padding: int) -> Tensor:
    """As `fullres.ops.convolution` has it, of channels-last maps in float32.

    To at most `MOST` channels, padded by 0 or 1. Where `winograd_cpu.HALVES`, also in bfloat16,
    from an even number of channels.
    """
    batch, channels, height, width = x.shape
    outs = len(weight)
    shape = (batch, outs, height + 2 * padding - 2, width + 2 * padding - 2)
    out = torch.empty(shape, dtype=x.dtype, memory_format=torch.channels_last)
    start = np.zeros(LANES, np.float32)
    if bias is not None:
        start[:outs] = bias.detach().float().numpy()
    factors = _factors(weight)
    source, target = as_rows(x), as_rows(out)
    spread(
        [
            (_convolved, source[b], channels, padding, factors, start, outs, target[b], *run)
            for b in range(batch)
            for run in split(shape[2], 2 * torch.get_num_threads())
        ]
    )
    return out


def _factors(weight: Tensor) -> Any:
    """Weights (K, C, 3, 3) as a row a word of channels, (tap, K) in it, filled up to vectors."""
    outs, channels = weight.shape[:2]
    words = channels * weight.element_size() // 4
    taps = weight.detach().permute(1, 2, 3, 0).reshape(words, -1, 9 * outs)
    rows = weight.new_zeros(words, -(-9 * outs // LANES) * LANES, channels // words)
    rows[:, : 9 * outs] = taps.transpose(1, 2)
    array = as_array(rows).reshape(words, -1)
    return array if words == channels else array.view(np.uint32)


@_jit
def _convolved(x, channels, padding, factors, bias, outs, out, first, last):
    """Make a run of rows of a result (H', W' * K) of rows (H, W * C)."""
    columns, lanes = out.shape[1] // outs, factors.shape[1]
    products = np.zeros((3, (PANEL + 2 + ROWS) * lanes + LANES), np.float32)
    sums = np.zeros((PANEL + 2) * LANES, np.float32)
    results = np.zeros(PANEL * outs + LANES, x.dtype)
    pixels = np.zeros((PANEL + 2 + ROWS) * channels, x.dtype)
    for left in range(0, columns, PANEL):
        count = min(PANEL, columns - left)
        for y in range(first, last + 2):
            _multiply(x, y - padding, left - padding, count + 2, factors, pixels, products[y % 3])
            if y >= first + 2:
                _sum(products, y - 2, count, lanes, bias, outs, sums, results)
                _copy(results, count * outs, out[y - 2], left * outs)


@_jit
def _multiply(x, y, left, count, factors, pixels, products):
    """Multiply so many pixels of a row by all taps; what is outside of the map is zeros."""
    (depth, lanes), row, in_word = factors.shape, x.shape[1], 4 // x.itemsize
    channels, vectors = depth * in_word, lanes // LANES
    begin, end = max(left, 0), min(left + count, row // channels)
    if not 0 <= y < len(x):
        begin = end = left
    products[: (begin - left) * lanes] = 0
    at = y * row + begin * channels
    values, place = pointer(x.view(factors.dtype)), at // in_word
    soon = place + row // in_word, values
    if at + (end - begin + ROWS) * channels > x.size:  # rows of `matmul` reach over the end
        pixels[: (end - begin) * channels] = x[y, begin * channels : end * channels]
        values, place = pointer(pixels.view(factors.dtype)), 0
    begun = 0
    while begun < vectors:
        width = next_width(vectors - begun)
        by, start = (pointer(factors), begun * LANES, lanes), (pointer(_zero_row), 0)
        to = pointer(products), (begin - left) * lanes + begun * LANES, lanes
        matmul(width, end - begin, depth, (values, place, depth), by, start, to, None, soon)
        begun += width
    products[(end - left) * lanes : count * lanes] = 0


@_jit
def _sum(products, y, count, lanes, bias, outs, sums, results):
    """Sum nine products for each of so many pixels of a row: down, then along."""
    values, added, target = pointer(products), pointer(sums), pointer(results)
    row = products.shape[1]
    above, here, below = y % 3 * row, (y + 1) % 3 * row, (y + 2) % 3 * row
    for column in range(count + 2):
        at = column * lanes
        some = add(load(values, above + at), load(values, here + at + 3 * outs))
        store(added, column * LANES, add(some, load(values, below + at + 6 * outs)))
    start = load(bias, 0)
    for column in range(count):
        at = column * LANES
        some = add(start, load(added, at))
        some = add(some, load(added, at + LANES + outs))
        store(target, column * outs, add(some, load(added, at + 2 * (LANES + outs))))


@_jit
def _copy(values, count, out, at):
    """Copy so many values."""
    for n in range(count):
        out[at + n] = values[n]
