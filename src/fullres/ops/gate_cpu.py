"""Gates on the CPU: layers and product in one read and one write of the map.

A job goes down rows of the map and makes the gates of a row from the pooled values once. Runs of
positions pass the layers in the fastest cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numba import njit
from torch import Tensor

from fullres.ops.arrays import as_array
from fullres.ops.frames import Frame
from fullres.ops.gate import Layer
from fullres.ops.lanes import (
    AHEAD,
    LANES,
    load,
    multiply,
    prefetch,
    relu,
    sigmoid,
    store,
)
from fullres.ops.products_cpu import ROWS, matmul, next_width
from fullres.ops.threads import split, spread

_jit = njit(nogil=True, cache=True, error_model="numpy", boundscheck=False)

RUN = 2 * ROWS
"""Positions that pass the layers at a time."""
_CONVOLUTION, _RELU, _SIGMOID = 0, 1, 2


def gated(x: Tensor, inner: Tensor, layers: Sequence[Layer], frame: Frame, out: Tensor) -> Tensor:
    """As `fullres.ops.gate` has it, of channels-last maps in float32 or bfloat16.

    The result is written to `out`.
    """
    source, target = _rows(x), _rows(out)
    values = _rows(inner.float().contiguous(memory_format=torch.channels_last))
    steps, factors = _program(layers, inner.shape[1])
    place = np.array((*frame.before, x.shape[1], inner.shape[1]))
    spread(
        [
            (_gated, source[b], values[b], target[b], steps, factors, place, *run)
            for b in range(len(x))
            for run in split(x.shape[2], 4 * torch.get_num_threads())
        ]
    )
    return out


def _rows(x: Tensor) -> Any:
    """(B, H, W * C)."""
    return as_array(x.permute(0, 2, 3, 1).flatten(2))


def _program(layers: Sequence[Layer], channels: int) -> tuple[Any, Any]:
    """Steps (what, channels, room for them, room after, place of factors), and all factors.

    Those of a convolution are the bias, then a row of weights a channel before; the channels after
    are filled up with zeros to whole vectors.
    """
    steps, factors = [], [torch.zeros(0)]
    place, before = 0, _whole(channels)
    for layer in layers:
        what = {"relu": _RELU, "sigmoid": _SIGMOID}.get(layer.activation or "", _CONVOLUTION)
        after, given = before, channels
        if layer.weight is not None:
            channels = len(layer.weight)
            after = _whole(channels)
            filled = torch.zeros(1 + given, after)
            filled[1:, :channels] = layer.weight.mT
            if layer.bias is not None:
                filled[0, :channels] = layer.bias
            factors.append(filled.flatten())
        steps.append((what, given, before, after, place))
        place, before = place + factors[-1].numel() * (what == _CONVOLUTION), after
    return np.array(steps), torch.cat(factors).numpy()


def _whole(channels: int) -> int:
    return -(-channels // LANES) * LANES


# The kernel takes the rows of one map, those of its pooled values, those of the result; the steps
# and their factors; (rows above, columns left, channels, pooled channels); and its run of rows.
# Vectors of one position may reach over its channels into those of the next, which come after.


@_jit
def _gated(x, inner, out, steps, factors, place, first, last):
    top, left, channels, pooled = place
    windows = inner.shape[1] // pooled
    gates = np.zeros(x.shape[1] + LANES, np.float32)
    taken = np.zeros(RUN * steps[0, 2], np.float32)
    rooms = np.zeros((2, RUN * steps[:, 3].max()), np.float32)
    made = -1
    for y in range(first, last):
        row = min(max(y - top, 0), len(inner) - 1)
        if row != made:
            made = row
            for begin in range(0, windows, RUN):
                count = min(RUN, windows - begin)
                _take(inner[row], begin, count, pooled, steps[0, 2], taken)
                result = _layers(taken, rooms, steps, factors)
                for n in range(count):
                    _copy(result, n * steps[-1, 3], gates, (left + begin + n) * channels, channels)
            _replicate(gates, left, windows, channels, x.shape[1])
        _product(x[y], out[y], gates)


@_jit
def _take(inner, begin, count, pooled, whole, taken):
    """A run of pooled values, each in a place of whole vectors, whose ends stay zero."""
    for n in range(count):
        values = inner[(begin + n) * pooled : (begin + n + 1) * pooled]
        place = taken[n * whole : n * whole + pooled]
        for c in range(len(values)):
            place[c] = values[c]


@_jit
def _layers(taken, rooms, steps, factors):
    """What the layers make of a run of positions, in one of the rooms."""
    source = taken
    for n in range(len(steps)):
        what, given, before, after, place = steps[n]
        target = rooms[n % 2]
        if what == _CONVOLUTION:
            _convolve(source, given, before, after, factors[place:], target)
        else:
            for at in range(0, RUN * before, LANES):
                values = load(source, at)
                store(target, at, relu(values) if what == _RELU else sigmoid(values))
        source = target
    return source


@_jit
def _convolve(run, given, before, after, factors, out):
    begin = 0
    while begin < after:
        width = next_width((after - begin) // LANES)
        weights, bias = (factors, after + begin, after), (factors, begin)
        matmul(width, RUN, given, (run, 0, before), weights, bias, (out, begin, after))
        begin += width * LANES


@_jit
def _copy(source, at, target, to, length):
    for c in range(0, length, LANES):
        store(target, to + c, load(source, at + c))


@_jit
def _replicate(gates, left, windows, channels, length):
    """Extend the gates of a row to the row's ends."""
    begin, end = left * channels, (left + windows) * channels
    for at in range(end, length, channels):
        _copy(gates, end - channels, gates, at, channels)
    for at in range(begin - channels, -1, -channels):
        for c in range(channels):  # a vector would reach into gates that are there already
            gates[at + c] = gates[begin + c]


@_jit
def _product(row, target, gates):
    whole = len(row) - len(row) % LANES
    for at in range(0, whole, LANES):
        prefetch(row, at + AHEAD // row.itemsize)
        store(target, at, multiply(load(row, at), load(gates, at)))
    ends = np.zeros(LANES, row.dtype)
    ends[: len(row) - whole] = row[whole:]
    store(ends, 0, multiply(load(ends, 0), load(gates, whole)))
    target[whole:] = ends[: len(row) - whole]
