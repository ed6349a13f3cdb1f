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
NEAR = 2**10
"""Values that maps are fetched ahead of their use: more would push gates out of the cache."""
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
    rooms = rooms_for(x, steps, place)
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
def rooms_for(x, steps, place):
    """Memory for runs of positions between their layers, for gates that are repeated, those of the
    first window and then those of the last, and for values that fill no vector.
    """
    channels, pooled = place[5:]
    most = max(pooled, steps[:, 2].max())
    run = np.zeros(2 * (RUN * most + LANES), np.float32)
    return run, np.zeros(2 * (RUN * channels + LANES), np.float32), np.zeros(2 * LANES, x.dtype)


@_jit
def weigh_row(x, inner, begun, plus, out, steps, factors, place, rooms, y):
    """Weigh a row of the map by the gates of the windows from `begun` on."""
    _, left, _, windows, width, channels, pooled = place
    values, added, target, ends = pointer(x), pointer(plus), pointer(out), pointer(rooms[2])
    gates, same, right = pointer(rooms[0]), pointer(rooms[1]), left + windows
    late = steps[-1, 0] == _SIGMOID
    room, early = (gates, len(rooms[0]) // 2), (pointer(steps), len(steps) - late)
    by, half = pointer(factors), len(rooms[1]) // 2
    for begin in range(0, windows, RUN):
        count, at = min(RUN, windows - begin), (y * width + left + begin) * channels
        pools = pointer(inner), begun + begin * pooled, pooled
        if plus is None:
            here = _gates(room, count, pools, early, by, (at, values))
        else:
            here = _gates(room, count, pools, early, by, (at, values, added))
        _weigh(values, added, target, at, count * channels, gates, here, late, ends)
        if begin == 0:
            _repeat(gates, here, channels, same, 0, half, late)
            _weigh_same(values, added, target, y * width, left, channels, same, 0, ends)
        if begin + count == windows:
            _repeat(gates, here + (count - 1) * channels, channels, same, half, half, late)
            end = y * width + right
            _weigh_same(values, added, target, end, width - right, channels, same, half, ends)


@_jit
def _weigh_alike(x, inner, begun, plus, out, steps, factors, place, rooms, first, last):
    """Weigh rows of the map that have the gates of the same windows, those from `begun` on."""
    _, left, _, windows, width, channels, pooled = place
    values, added, target, ends = pointer(x), pointer(plus), pointer(out), pointer(rooms[2])
    gates, same, right = pointer(rooms[0]), pointer(rooms[1]), left + windows
    room, every = (gates, len(rooms[0]) // 2), (pointer(steps), len(steps))
    half, alike = len(rooms[1]) // 2, np.empty(windows * channels + LANES, np.float32)
    for begin in range(0, windows, RUN):
        count, pools = min(RUN, windows - begin), (pointer(inner), begun + begin * pooled, pooled)
        here = _gates(room, count, pools, every, pointer(factors), None)
        _copy(gates, here, alike, begin * channels, count * channels)
    _repeat(alike, 0, channels, same, 0, half, False)
    _repeat(alike, (windows - 1) * channels, channels, same, half, half, False)
    for y in range(first, last):
        _weigh_same(values, added, target, y * width, left, channels, same, 0, ends)
        begin, length = (y * width + left) * channels, windows * channels
        _weigh(values, added, target, begin, length, alike, 0, False, ends)
        end = y * width + right
        _weigh_same(values, added, target, end, width - right, channels, same, half, ends)


@_jit
def _end_of_alike(row, rows, top, first, last):
    """The end of the rows that have the gates of the first, those of a row of windows."""
    if row == rows - 1:
        return last
    return min(top + 1, last) if row == 0 else first + 1


# What follows is called a few thousand times a map, and takes pointers.


@_jit
def _gates(room, count, pools, steps, factors, soon):
    """Where in a room is what layers make of so many positions.

    The room is (pointer, half of its length), pooled values are (pointer, place of the first,
    channels), steps (pointer, number). While the first convolution computes, the positions after
    these are fetched, and while the others do, what is weighed `soon`, as `matmul` has it: memory
    is idle.
    """
    (run, other), (inner, begun, pooled), (step, number) = room, pools, steps
    further, here, before = (begun + count * pooled, inner), 0, (inner, begun)
    if count % ROWS or number == 0 or step[0] > _RECTIFIED:
        _copy(inner, begun, run, here, count * pooled)
        before = run, here
    for n in range(0, 4 * number, 4):
        what, given, channels, place = step[n], step[n + 1], step[n + 2], step[n + 3]
        if what <= _RECTIFIED:
            least = np.float32(0 if what == _RECTIFIED else -np.inf)
            by, after = (factors, place), (run, other)
            if n == 0:
                pointwise(count, before, given, by, channels, after, least, further)
            else:
                pointwise(count, before, given, by, channels, after, least, soon)
            here, other, before = other, here, after
        else:
            for at in range(here, here + count * channels, LANES):
                values = load(run, at)
                store(run, at, relu(values) if what == _RELU else sigmoid(values))
    return here


@_jit
def _copy(values, at, room, to, count):
    """Copy so many values to a place in a room."""
    whole = count - count % LANES
    for n in range(0, whole, LANES):
        store(room, to + n, load(values, at + n))
    for n in range(whole, count):
        room[to + n] = values[at + n]


@_jit
def _repeat(gates, at, channels, same, to, length, late):
    """Fill a length of `same` with the gates of a position, or sigmoids of them if `late`."""
    _copy(gates, at, same, to, channels)
    if late:
        for n in range(to, to + channels, LANES):
            store(same, n, sigmoid(load(same, n)))
    if channels >= LANES:  # sixteen that repeat are sixteen that were repeated
        for n in range(to + channels, to + length - LANES, LANES):
            store(same, n, load(same, n - channels))
    else:
        for n in range(to + channels, to + length):
            same[n] = same[n - channels]


@_jit
def _weigh_same(x, plus, out, position, count, channels, same, place, ends):
    """Weigh so many positions from one on, each by the gates that are repeated from a place on."""
    for n in range(0, count, RUN):
        begin, length = (position + n) * channels, min(RUN, count - n) * channels
        _weigh(x, plus, out, begin, length, same, place, False, ends)


@_jit
def _weigh(x, plus, out, begin, length, gates, place, late, ends):
    """Weigh so many values from one on by gates, or by sigmoids of them if these are `late`."""
    whole = length - length % LANES
    for n in range(0, whole, LANES):
        prefetch(x, begin + n + NEAR)
        if plus is not None:
            prefetch(plus, begin + n + NEAR)
        store(out, begin + n, _weighed(x, plus, begin + n, 0, gates, place + n, late))
    if whole < length:
        begin, count = begin + whole, length - whole
        for n in range(count):
            ends[n] = x[begin + n]
        if plus is None:
            store(ends, 0, _weighed(ends, None, 0, 0, gates, place + whole, late))
        else:
            for n in range(count):
                ends[LANES + n] = plus[begin + n]
            store(ends, 0, _weighed(ends, ends, 0, LANES, gates, place + whole, late))
        for n in range(count):
            out[begin + n] = ends[n]


@_jit
def _weighed(x, plus, at, further, gates, place, late):
    """Sixteen values, weighed; what is added lies `further` on than these."""
    gate = load(gates, place)
    if late:
        gate = sigmoid(gate)
    if plus is None:
        return multiply(load(x, at), gate)
    return fma(load(x, at), gate, load(plus, at + further))
