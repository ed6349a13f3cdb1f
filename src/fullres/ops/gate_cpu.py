"""Gates on the CPU: layers and product in one read and one write of the map.

A job goes down rows of the map, and makes the gates that rows share once. Runs of positions pass
the layers in the fastest cache, and a sigmoid at the end waits until the map is weighed, where the
processor waits for memory anyway.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numba import njit
from torch import Tensor

from fullres.ops.arrays import as_rows
from fullres.ops.frames import Frame
from fullres.ops.gate import Layer
from fullres.ops.lanes import (
    LANES,
    fma,
    load,
    multiply,
    pointer,
    prefetch,
    relu,
    sigmoid,
    store,
)
from fullres.ops.products_cpu import ROWS, factors_of, pointwise
from fullres.ops.threads import split, spread

_jit = njit(nogil=True, cache=True, error_model="numpy", boundscheck=False)

RUN = 2 * ROWS
"""Positions that pass the layers at a time."""
NEAR = 2**12
"""Bytes that maps are fetched ahead of their use: more would push gates out of the cache."""
_CONVOLUTION, _RECTIFIED, _RELU, _SIGMOID = range(4)
_STEPS = {None: _CONVOLUTION, "relu": _RELU, "sigmoid": _SIGMOID}


def gated(
    x: Tensor,
    inner: Tensor,
    layers: Sequence[Layer],
    frame: Frame,
    plus: Tensor | None,
    out: Tensor,
) -> Tensor:
    """As `fullres.ops.gate` has it, of channels-last maps in float32 or bfloat16.

    The result is written to `out`.
    """
    source, target = values_of(x), values_of(out)
    more = [None] * len(x) if plus is None else values_of(plus)
    values = values_of(inner.float().contiguous(memory_format=torch.channels_last))
    steps, factors = program(layers, inner.shape[1])
    place = np.array((*frame.before, *frame.windows, x.shape[3], x.shape[1], inner.shape[1]))
    spread(
        [
            (weigh, source[b], values[b], more[b], target[b], steps, factors, place, *run)
            for b in range(len(x))
            for run in split(x.shape[2], 4 * torch.get_num_threads())
        ]
    )
    return out


def values_of(x: Tensor) -> Any:
    """(B, H * W * C)."""
    return as_rows(x).reshape(len(x), -1)


def program(layers: Sequence[Layer], channels: int) -> tuple[Any, Any]:
    """Steps (what, channels before, channels after, place of factors), and all factors.

    A ReLU rides along with the convolution before it.
    """
    steps: list[tuple[int, int, int, int]] = []
    factors, place = [], 0
    for layer in layers:
        given, what = channels, _STEPS[layer.activation]
        if layer.weight is not None:
            factors.append(factors_of(layer.weight, layer.bias))
            channels = len(layer.weight)
        if what == _RELU and steps and steps[-1][0] == _CONVOLUTION:
            steps[-1] = _RECTIFIED, *steps[-1][1:]
        else:
            steps.append((what, given, channels, place))
        place = sum(map(len, factors))
    every = np.concatenate(factors) if factors else np.zeros(0, np.float32)
    return np.array(steps, np.intp).reshape(-1, 4), every


# Kernels take the values of one map, its pooled values, what is added, or None, and the result; the
# steps and their factors; and (rows above, columns left, rows of windows, windows in a row, columns
# of the map, channels, pooled channels). Positions lie without gaps.


@_jit
def weigh(x, inner, plus, out, steps, factors, place, first, last):
    """Weigh a run of the map's rows."""
    top, _, rows, windows, _, _, pooled = place
    rooms = rooms_for(steps, place)
    while first < last:
        row = min(max(first - top, 0), rows - 1)
        end = _end_of_alike(row, rows, top, first, last)
        at = row * windows * pooled
        if end - first == 1:
            weigh_row(x, inner, at, plus, out, steps, factors, place, rooms, first)
        else:
            _weigh_alike(x, inner, at, plus, out, steps, factors, place, rooms, first, end)
        first = end


@_jit
def rooms_for(steps, place):
    """Memory for runs of positions between their layers, and for gates repeated at either end."""
    channels, pooled = place[5:]
    most = max(pooled, steps[:, 2].max())
    run = np.zeros(2 * (RUN * most + LANES), np.float32)
    return run, np.zeros((2, RUN * channels + LANES), np.float32)


@_jit
def weigh_row(x, inner, begun, plus, out, steps, factors, place, rooms, y):
    """Weigh a row of the map by the gates of the windows from `begun` on."""
    _, left, _, windows, width, channels, pooled = place
    (run, same), right = rooms, left + windows
    late = steps[-1, 0] == _SIGMOID
    for begin in range(0, windows, RUN):
        count, at = min(RUN, windows - begin), (y * width + left + begin) * channels
        early, pools = steps[: len(steps) - late], (inner, begun + begin * pooled, pooled)
        if plus is None:
            gates = _gates(run, count, pools, early, factors, (at, pointer(x)))
        else:
            gates = _gates(run, count, pools, early, factors, (at, pointer(x), pointer(plus)))
        _weigh(x, plus, out, at, count * channels, gates, late)
        if begin == 0:
            _repeat(gates, 0, channels, same[0], late)
            _weigh_same(x, plus, out, y * width, left, channels, same[0])
        if begin + count == windows:
            _repeat(gates, (count - 1) * channels, channels, same[1], late)
            _weigh_same(x, plus, out, y * width + right, width - right, channels, same[1])


@_jit
def _weigh_alike(x, inner, begun, plus, out, steps, factors, place, rooms, first, last):
    """Weigh rows of the map that have the gates of the same windows, those from `begun` on."""
    _, left, _, windows, width, channels, pooled = place
    (run, same), right = rooms, left + windows
    alike = np.empty(windows * channels + LANES, np.float32)
    for begin in range(0, windows, RUN):
        count, pools = min(RUN, windows - begin), (inner, begun + begin * pooled, pooled)
        gates = _gates(run, count, pools, steps, factors, None)
        _copy(gates, 0, alike[begin * channels :], count * channels)
    _repeat(alike, 0, channels, same[0], False)
    _repeat(alike, (windows - 1) * channels, channels, same[1], False)
    for y in range(first, last):
        _weigh_same(x, plus, out, y * width, left, channels, same[0])
        _weigh(x, plus, out, (y * width + left) * channels, windows * channels, alike, False)
        _weigh_same(x, plus, out, y * width + right, width - right, channels, same[1])


@_jit
def _end_of_alike(row, rows, top, first, last):
    """The end of the rows that have the gates of the first, those of a row of windows."""
    if row == rows - 1:
        return last
    return min(top + 1, last) if row == 0 else first + 1


@_jit
def _gates(room, count, pools, steps, factors, soon):
    """What layers make of so many positions of (pooled values, place of the first, channels).

    In a part of the room. While the first convolution computes, the positions after these are
    fetched, and while the others do, what is weighed `soon`, as `matmul` has it: memory is idle.
    """
    inner, begun, pooled = pools
    further = begun + count * pooled, pointer(inner)
    here, other, before = 0, len(room) // 2, (pointer(inner), begun)
    if count % ROWS or len(steps) == 0 or steps[0, 0] > _RECTIFIED:
        _copy(inner, begun, room, count * pooled)
        before = pointer(room), here
    for n in range(len(steps)):  # a row taken as an array would have its references counted
        what, channels = steps[n, 0], steps[n, 2]
        if what <= _RECTIFIED:
            least = np.float32(0 if what == _RECTIFIED else -np.inf)
            given, by, after = steps[n, 1], factors[steps[n, 3] :], (pointer(room), other)
            if n == 0:
                pointwise(count, before, given, by, channels, after, least, further)
            else:
                pointwise(count, before, given, by, channels, after, least, soon)
            here, other, before = other, here, after
        else:
            for at in range(here, here + count * channels, LANES):
                values = load(room, at)
                store(room, at, relu(values) if what == _RELU else sigmoid(values))
    return room[here:]


@_jit
def _copy(values, at, room, count):
    """Copy so many values to the beginning of a room."""
    whole = count - count % LANES
    for n in range(0, whole, LANES):
        store(room, n, load(values, at + n))
    for n in range(whole, count):
        room[n] = values[at + n]


@_jit
def _repeat(gates, at, channels, same, late):
    """Repeat the gates of one position, sigmoids of them if they are `late`."""
    _copy(gates, at, same, channels)
    if late:
        for n in range(0, channels, LANES):
            store(same, n, sigmoid(load(same, n)))
    if channels >= LANES:  # sixteen that repeat are sixteen that were repeated
        for n in range(channels, len(same) - LANES, LANES):
            store(same, n, load(same, n - channels))
    else:
        for n in range(channels, len(same)):
            same[n] = same[n - channels]


@_jit
def _weigh_same(x, plus, out, position, count, channels, same):
    """Weigh so many positions from one on, each by the gates that are repeated."""
    for n in range(0, count, RUN):
        some = min(RUN, count - n)
        _weigh(x, plus, out, (position + n) * channels, some * channels, same, False)


@_jit
def _weigh(x, plus, out, begin, length, gates, late):
    """Weigh so many values from one on by gates, or by sigmoids of them if these are `late`."""
    whole, ahead = length - length % LANES, NEAR // x.itemsize
    for at in range(0, whole, LANES):
        prefetch(x, begin + at + ahead)
        if plus is not None:
            prefetch(plus, begin + at + ahead)
        store(out, begin + at, _weighed(x, plus, begin + at, gates, at, late))
    if whole < length:
        begin, end = begin + whole, begin + length
        ends = _ends(x, begin, end)
        if plus is None:
            store(ends, 0, _weighed(ends, None, 0, gates, whole, late))
        else:
            store(ends, 0, _weighed(ends, _ends(plus, begin, end), 0, gates, whole, late))
        out[begin:end] = ends[: end - begin]


@_jit
def _ends(x, begin, end):
    """Values that fill no vector, with room for one."""
    values = np.zeros(LANES, x.dtype)
    values[: end - begin] = x[begin:end]
    return values


@_jit
def _weighed(x, plus, at, gates, place, late):
    gate = load(gates, place)
    if late:
        gate = sigmoid(gate)
    if plus is None:
        return multiply(load(x, at), gate)
    return fma(load(x, at), gate, load(plus, at))
