"""Local channel attention on the CPU, in one pass along the rows of windows.

A row of pixels is squeezed when it enters the windows, not before. The means of a row of windows
then pass the layers, and weigh the row of the map that is theirs, while they are in the cache.

Jobs walk up and down as in `box_pixels_cpu`. Only the rows of the windows that they begin with are
squeezed before, and kept, since these rows leave again; none that enters later does. So the map may
be written over: the others enter their walk's windows before it weighs them, and it alone does.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numba import njit
from torch import Tensor

from fullres.ops.box_pixels_cpu import advance, begun, shared, turn, write
from fullres.ops.frames import Frame
from fullres.ops.gate import Layer
from fullres.ops.gate_cpu import program, rooms_for, values_of, weigh, weigh_alike
from fullres.ops.lanes import (
    AHEAD,
    LANES,
    add,
    load,
    multiply,
    narrow,
    pointer,
    repeat,
    store,
    subtract,
    widen,
    zeros,
)
from fullres.ops.products_cpu import factors_of, pointwise
from fullres.ops.threads import split, spread

_jit = njit(nogil=True, cache=True, error_model="numpy", boundscheck=False)

RUN = 48
"""Columns that are squeezed at a time, a multiple of `products_cpu.ROWS`."""
_SHARES = np.repeat((0.0, 1.0), LANES)
"""Sixteen from a place on: how much each of a vector's values counts, none before they all do."""


def serves(frame: Frame) -> bool:
    """Whether rows are wide enough, and windows so high that all have the rows that leave."""
    height, width = frame.size
    return width >= RUN and height < 2 * frame.window[0]


def attended(
    x: Tensor,
    squeeze: Layer,
    layers: Sequence[Layer],
    frame: Frame,
    plus: Tensor | None,
    out: Tensor,
) -> Tensor:
    """As `fullres.ops.gate` has it, of channels-last maps in float32.

    The result is written to `out`.
    """
    assert squeeze.weight is not None
    batch, channels, height, width = x.shape
    (top, left), (windows, columns), pooled = frame.before, frame.windows, len(squeeze.weight)
    walks, blocks = shared(windows, frame.window[0], batch)
    kept = blocks[0][0], blocks[-1][1]
    by, (steps, factors) = factors_of(squeeze.weight, squeeze.bias), program(layers, pooled)
    place = np.array((top, left, windows, columns, width, channels, pooled))
    above_and_below = np.array((top, left, 2, columns, width, channels, pooled))
    line = width * pooled + LANES
    lines = np.empty((batch, (kept[1] - kept[0] + len(walks)) * line), np.float32)
    sums = np.empty((batch, len(blocks), 1, width, pooled))
    ends = np.empty((batch, 2, columns * pooled), np.float32)
    source, target = values_of(x), values_of(out)
    more = [None] * batch if plus is None else values_of(plus)
    beginning, walking, ending = [], [], []
    for b in range(batch):
        squeezed, weighed = (source[b], by, place, lines[b], kept), (more[b], target[b])
        beginning += [(_begin, *squeezed, sums[b, n], *block) for n, block in enumerate(blocks)]
        for n, walk in enumerate(walks):
            mine = sums[b, walk.within(blocks, frame.window[0])]
            given = *weighed, steps, factors, frame.window, mine, ends[b], n
            walking.append((_walk, *squeezed, *given, *walk))
        alike = source[b], ends[b].reshape(-1), *weighed, steps, factors, above_and_below
        for first, last in ((0, top), (top + windows, height)):
            runs = split(last - first, 2 * torch.get_num_threads())
            ending += [(weigh, *alike, first + begin, first + end) for begin, end in runs]
    spread(beginning)
    spread(walking)
    spread(ending)
    return out


# Kernels take the values of one map, the factors that squeeze it, and what `gate_cpu` calls its
# place; lines of squeezed pixels, and the first and the last + 1 of the rows that are kept in them.
# Behind these, each walk has a line for the row that enters.


@_jit
def _begin(x, by, place, lines, kept, sums, first, last):
    """Squeeze and keep a block of rows, and sum its columns."""
    column = sums[0].reshape(-1)
    column[:] = 0.0
    line = np.uintp(len(column) + LANES)
    for y in range(first, last, 4):
        end = min(y + 4, last)
        for row in range(y, end):
            _squeeze(x, row, by, place, lines, row - kept[0])
        at = np.uintp(y - kept[0]) * line
        if end == y + 4:
            _add_four(lines, at, line, column)
        else:
            for row in range(end - y):
                _add(lines, at + np.uintp(row) * line, column)


@_jit
def _walk(x, by, place, lines, kept, plus, out, steps, factors, window, sums, ends, spare, *walk):
    """Weigh the map's rows that have the windows of a walk, whose first have these sums."""
    start, rows, down = walk
    top, _, windows, columns, width, _, pooled = place
    kh, kw = window
    total, moving = begun(sums, kw)
    line = width * pooled + LANES
    within, to = np.array((0, line, pooled)), np.array((0, 0, pooled))
    shape = np.array((kh, kw, 0, 0, columns))
    means, rooms = np.empty(columns * pooled, np.float32), rooms_for(steps, place)
    if down:
        write(total, means, to, 0, shape)
    for n in range(rows):
        i, leaves, enters = turn(start, n, down, kh)
        if n > 0 or not down:
            entering = enters - kept[0]
            if not kept[0] <= enters < kept[1]:
                entering = kept[1] - kept[0] + spare
                _squeeze(x, enters, by, place, lines, entering)
            if pooled < LANES:
                advance(lines, within, leaves - kept[0], entering, total, kw, moving)
                write(total, means, to, 0, shape)
            else:
                _advance(lines, (leaves - kept[0]) * line, entering * line, total, window, means)
        row = top + i
        weigh_alike(x, means, 0, plus, out, steps, factors, place, rooms, row, row + 1)
        if i == 0:
            ends[0] = means
        if i == windows - 1:
            ends[1] = means


@_jit
def _advance(lines, old, new, total, window, means):
    """From the sums of a row of windows, and their means, to those of the next.

    As `advance` does, for sixteen channels and more; of two lines by where they begin.
    """
    (kh, kw), pooled = window, total.shape[1]
    values, sums, results = pointer(lines), pointer(total), pointer(means)
    scale, others = repeat(1 / (kh * kw)), (kw - 1) * pooled
    for begin in range(0, pooled, LANES):
        c = min(begin, pooled - LANES)
        share = load(_SHARES, LANES - (begin - c))  # nothing to those that had theirs before
        moved = widen(zeros())
        for at in range(c, c + others, pooled):
            moved = add(moved, _change(values, old + at, new + at))
        for at in range(c, len(total) * pooled, pooled):
            last = at + others
            moved = add(moved, _change(values, old + last, new + last))
            here = add(load(sums, at), multiply(moved, share))
            store(sums, at, here)
            store(results, at, narrow(multiply(here, scale)))
            moved = subtract(moved, _change(values, old + at, new + at))


@_jit
def _change(values, old, new):
    return subtract(widen(load(values, new)), widen(load(values, old)))


@_jit
def _squeeze(x, y, by, place, lines, to):
    """Squeeze a row of pixels to a line."""
    _, _, _, _, width, channels, pooled = place
    values, results, ahead = pointer(x), pointer(lines), AHEAD // x.itemsize
    line = to * (width * pooled + LANES)
    for begin in range(0, width, RUN):
        column = min(begin, width - RUN)
        at = (y * width + column) * channels
        end = results, line + column * pooled
        pointwise(RUN, (values, at), channels, by, pooled, end, (values, at + ahead))


@_jit
def _add(lines, at, column):
    for i in range(np.uintp(len(column))):
        column[i] += lines[at + i]


@_jit
def _add_four(lines, at, line, column):
    second, third, fourth = at + line, at + line + line, at + line + line + line
    for i in range(np.uintp(len(column))):
        two = np.float64(lines[at + i]) + np.float64(lines[second + i])
        others = np.float64(lines[third + i]) + np.float64(lines[fourth + i])
        column[i] += two + others
