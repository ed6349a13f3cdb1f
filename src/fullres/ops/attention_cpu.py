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

from fullres.ops.box_pixels_cpu import (
    add_four,
    add_row,
    advance,
    begun,
    shared,
    slide,
    together,
    turn,
    write,
)
from fullres.ops.frames import Frame
from fullres.ops.gate import Layer
from fullres.ops.gate_cpu import program, rooms_for, values_of, weigh, weigh_row
from fullres.ops.lanes import AHEAD, LANES, pointer
from fullres.ops.products_cpu import factors_of, pointwise
from fullres.ops.threads import split, spread

_jit = njit(nogil=True, cache=True, error_model="numpy", boundscheck=False)

RUN = 48
"""Columns that are squeezed at a time, a multiple of `products_cpu.ROWS`."""


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
    column = sums.reshape((1, sums.size))
    column[:] = 0.0
    within = np.array((0, sums.size + LANES, 0))
    for y in range(first, last, 4):
        end = min(y + 4, last)
        for row in range(y, end):
            _squeeze(x, row, by, place, lines, row - kept[0])
        if end == y + 4:
            add_four(lines, within, y - kept[0], column)
        else:
            for row in range(y, end):
                add_row(lines, within, row - kept[0], column)


@_jit
def _walk(x, by, place, lines, kept, plus, out, steps, factors, window, sums, ends, spare, *walk):
    """Weigh the map's rows that have the windows of a walk, whose first have these sums."""
    start, rows, down = walk
    top, _, windows, columns, width, _, pooled = place
    kh, kw = window
    within, to = np.array((0, width * pooled + LANES, pooled)), np.array((0, 0, pooled))
    shape = np.array((kh, kw, 0, 0, columns))
    means, rooms = np.empty(columns * pooled, np.float32), rooms_for(x, steps, place)
    summed = together(sums)[0]
    total, moving = begun(summed, kw)
    for n in range(rows):
        i, leaves, enters = turn(start, n, down, kh)
        moves, leaving, entering = n > 0 or not down, leaves - kept[0], enters - kept[0]
        if moves and not kept[0] <= enters < kept[1]:
            entering = kept[1] - kept[0] + spare
            _squeeze(x, enters, by, place, lines, entering)
        if pooled >= LANES:
            slide(lines, within, leaving, entering, moves, summed, means, (0, pooled, False), shape)
        else:
            if moves:
                advance(lines, within, leaving, entering, total, moving)
            write(total, means, to, 0, shape)
        weigh_row(x, means, 0, plus, out, steps, factors, place, rooms, top + i)
        if i == 0:
            ends[0] = means
        if i == windows - 1:
            ends[1] = means


@_jit
def _squeeze(x, y, by, place, lines, to):
    """Squeeze a row of pixels to a line."""
    _, _, _, _, width, channels, pooled = place
    values, results, ahead = pointer(x), pointer(lines), AHEAD // x.itemsize
    taps, line = (pointer(by), 0), to * (width * pooled + LANES)
    for begin in range(0, width, RUN):
        column = min(begin, width - RUN)
        at = (y * width + column) * channels
        end = results, line + column * pooled
        pointwise(RUN, (values, at), channels, taps, pooled, end, None, (at + ahead, values))
