"""Kernels of local mean, variance and normalisation, in Triton: one read and one write of the map.

A program owns a band of rows of a few maps. It sums the band's columns and publishes the sums,
then walks down the band with one sum a column over the rows of the window: a row enters, the
windows that end in it follow from a running sum along the columns, a row leaves. The sums that it
starts from are those of the bands above. It never waits for them without end: what is not
published after a few looks is read and summed again, to the same bit, so that no order of
execution can stall a program or change a result.

Sums are float64 whatever the type of the map, as on the CPU, and start anew in every band.

A tile has maps along its first axis and columns along its second. The sums of the windows of a row
follow from that of its first window, whose columns are the head, by the steps from a window to the
next, in which a column on the right enters and one on the left leaves. For a variance there are the
same of squares. `KIND` is known when a kernel is compiled, so that a mean does not pay for them.
"""

from __future__ import annotations

import triton
import triton.language as tl

MEAN, MEAN_VAR, NORMALISE = (tl.constexpr(kind) for kind in range(3))
WORD = tl.constexpr(16)
"""Bands whose flags share a word."""

# those that say nothing about the alignment of a row
_SIZES = [
    "height", "out_height", "out_width", "kh", "top", "left", "bands", "tiles", "polls",
    "windows", "border", "runs",
]  # fmt: skip


@triton.jit(do_not_specialize=_SIZES)
def walk(
    x, out, var, weight, bias, edges, room, flags, xs, outs,
    channels, height, width, out_height, out_width, kh, kw, top, left, bands, tiles, polls,
    EPS: tl.constexpr, KIND: tl.constexpr, INSIDE: tl.constexpr, BAND: tl.constexpr,
    LANES: tl.constexpr, WIDTH: tl.constexpr, HEAD: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """Everything about the windows whose last row is in this program's band."""
    program = tl.program_id(0).to(tl.int64)
    chain = program // bands
    band, tile = (program % bands).to(tl.int32), (chain % tiles).to(tl.int32)
    batch, channel = _maps(chain // tiles, channels, LANES)
    some = channel < channels
    plane = x + batch * xs[0] + channel * xs[1]
    # a value of each map, about which its variance is summed
    pivot = tl.zeros((LANES, 1), tl.float64)
    if KIND != MEAN:
        pivot += tl.load(plane, some, 0.0).to(tl.float64)

    window, column = tl.arange(0, WIDTH)[None, :], tl.arange(0, HEAD)[None, :]
    begin = tile * WIDTH
    windows = tl.minimum(WIDTH, width - kw + 1 - begin)
    # steps beyond the tile's last window are taken too where there are columns: no window uses them
    stepping, heading = some & (window < width - kw - begin), some & (column < kw)
    source = plane + (begin + window).to(tl.int64) * xs[3]
    start = plane + (begin + column).to(tl.int64) * xs[3]
    read = (source, start, stepping, some, column, pivot, kw, xs[2], xs[3])
    SIZE: tl.constexpr = LANES * (WIDTH + HEAD) if KIND == MEAN else 2 * LANES * (WIDTH + HEAD)
    slot = tl.arange(0, LANES)[:, None] * (WIDTH + HEAD)
    desk = (slot + window, slot + WIDTH + column, stepping, heading)

    first, end = band * BAND, tl.minimum(band * BAND + BAND, height)
    start_row, last = tl.maximum(first - kh + 1, 0), height - kh
    sums = _none(KIND, LANES, WIDTH, HEAD)
    words = flags
    if flags is not None:
        words += chain * tl.cdiv(bands, WORD)
        if band + 1 < bands:
            own = _with_rows(sums, read, first, end, KIND, HEAD, HEADS)
            _publish(own, desk, room + program * SIZE, KIND, SIZE)
            tl.atomic_or(words + band // WORD, 1 << (band % WORD), sem="release")

    if start_row + kh <= end:
        above = (room, words, program - band, polls)
        sums = _start(
            sums, read, start_row, start_row + kh, above, desk, KIND, BAND, SIZE, HEAD, HEADS
        )
        target, edge = batch * outs[0] + channel * outs[1], (batch * channels + channel) * 4
        factor, summand = _affine(weight, bias, channel, some)
        write = (out, var, edges, plane, target, edge, factor, summand, xs, outs)
        for i in tl.range(start_row, end - kh + 1):
            rows = (i == 0, i == last, i + top, i + top + 1)
            if INSIDE:
                from_row = tl.where(i == 0, 0, i + top)
                to_row = tl.where(i == last, out_height, i + top + 1)
                rows = (i == 0, i == last, from_row, to_row)
            mean, spread = _statistics(sums, kh, kw, pivot, x, EPS, KIND)
            here = some & (window < windows)
            _write(mean, spread, write, rows, begin + left + window, here, width, KIND)
            if tile == 0:
                _write_edge(
                    mean, spread, window == 0, write, rows, 0, left, some, width,
                    KIND, HEAD, HEADS,
                )  # fmt: skip
            if tile + 1 == tiles:
                _write_edge(
                    mean, spread, window == windows - 1, write, rows, begin + left + windows,
                    out_width, some, width, KIND, HEAD, HEADS,
                )  # fmt: skip
            sums = _moved(sums, read, i, -1, KIND, HEAD, HEADS)
            sums = _moved(sums, read, tl.minimum(i + kh, end - 1), 1, KIND, HEAD, HEADS)


@triton.jit(do_not_specialize=_SIZES)
def extend(
    x, out, weight, bias, edges, xs, outs, channels, width, top, windows, border, runs, tiles,
    KIND: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """The rows above the first row of windows and below the last, with the statistics of those."""
    program = tl.program_id(0).to(tl.int64)
    run = (program % runs).to(tl.int32)
    batch, channel = _maps(program // runs // tiles, channels, LANES)
    column = (program // runs % tiles).to(tl.int32) * WIDTH + tl.arange(0, WIDTH)[None, :]
    some = channel < channels
    here = some & (column < width)
    source = x + batch * xs[0] + channel * xs[1] + column.to(tl.int64) * xs[3]
    target = out + batch * outs[0] + channel * outs[1] + column.to(tl.int64) * outs[3]
    factor, summand = _affine(weight, bias, channel, some)
    for n in tl.range(run * ROWS, tl.minimum(run * ROWS + ROWS, border)):
        below = tl.where(n < top, 0, 1)
        row = n + below * windows
        if KIND == NORMALISE:
            at = edges + ((batch * channels + channel) * 4 + 2 * below) * width + column
            mean, spread = tl.load(at, here, 0.0), tl.load(at + width, here, 0.0)
            y = _normalised(_row(source, row, xs[2], here), mean, spread, factor, summand)
        else:
            y = _row(target, top + below * (windows - 1), outs[2], here)
        tl.store(target + tl.cast(row, tl.int64) * outs[2], _narrow(y, out), here)


@triton.jit
def _maps(group, channels, LANES: tl.constexpr):
    """Picture and channels of a group of maps."""
    groups = tl.cdiv(channels, LANES)
    return group // groups, group % groups * LANES + tl.arange(0, LANES)[:, None]


@triton.jit
def _row(source, row, stride, here):
    return tl.load(source + tl.cast(row, tl.int64) * stride, here, 0.0)


@triton.jit
def _none(KIND: tl.constexpr, LANES: tl.constexpr, WIDTH: tl.constexpr, HEAD: tl.constexpr):
    """Sums of no rows: steps and head, and those of squares."""
    squares: tl.constexpr = KIND != MEAN
    return (
        tl.zeros((LANES, WIDTH), tl.float64),
        tl.zeros((LANES, HEAD), tl.float64),
        tl.zeros((LANES, WIDTH if squares else 1), tl.float64),
        tl.zeros((LANES, HEAD if squares else 1), tl.float64),
    )


@triton.jit
def _total(a, b):
    return a[0] + b[0], a[1] + b[1], a[2] + b[2], a[3] + b[3]


@triton.jit
def _moved(
    sums, read, row, SIGN: tl.constexpr, KIND: tl.constexpr,
    HEAD: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """The sums after a row has entered (sign 1) or left (-1)."""
    steps, head, square_steps, square_head = sums
    source, start, stepping, some, column, pivot, kw, xh, xw = read
    left = _row(source, row, xh, stepping).to(tl.float64)
    right = _row(source + tl.cast(kw, tl.int64) * xw, row, xh, stepping).to(tl.float64)
    if KIND != MEAN:
        left, right = left - pivot, right - pivot
        square_steps += SIGN * (right * right - left * left)
    steps += SIGN * (right - left)
    for n in tl.static_range(HEADS):
        here = some & (column + n * HEAD < kw)
        value = _row(start + tl.cast(n * HEAD, tl.int64) * xw, row, xh, here).to(tl.float64)
        if KIND != MEAN:
            value = tl.where(here, value - pivot, 0.0)
            square_head += SIGN * value * value
        head += SIGN * value
    return steps, head, square_steps, square_head


@triton.jit
def _with_rows(
    sums, read, first, end, KIND: tl.constexpr, HEAD: tl.constexpr, HEADS: tl.constexpr
):  # fmt: skip
    for row in tl.range(first, end, loop_unroll_factor=2):
        sums = _moved(sums, read, row, 1, KIND, HEAD, HEADS)
    return sums


@triton.jit
def _start(
    sums, read, first, end, bands, desk, KIND: tl.constexpr, BAND: tl.constexpr,
    SIZE: tl.constexpr, HEAD: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """Sums of the rows from `first` to `end`: of whole bands, and of the rows before and after."""
    room, words, chain, polls = bands
    none, middle = sums, first
    if words is not None:
        first_band, end_band = tl.cdiv(first, BAND), end // BAND
        middle = first_band * BAND
        sums = _with_rows(sums, read, first, middle, KIND, HEAD, HEADS)
        published = _published(words, first_band, end_band, polls)
        for band in tl.range(first_band, end_band):
            if published:
                more = _published_sums(desk, room + (chain + band) * SIZE, KIND, SIZE)
            else:
                middle = band * BAND
                more = _with_rows(none, read, middle, middle + BAND, KIND, HEAD, HEADS)
            sums = _total(sums, more)
        middle = end_band * BAND
    return _with_rows(sums, read, middle, end, KIND, HEAD, HEADS)


@triton.jit
def _publish(sums, desk, at, KIND: tl.constexpr, SIZE: tl.constexpr):
    """Write the sums of a band for the bands below; the flag that follows releases them."""
    window, column, stepping, heading = desk
    tl.store(at + window, sums[0], stepping)
    tl.store(at + column, sums[1], heading)
    if KIND != MEAN:
        tl.store(at + SIZE // 2 + window, sums[2], stepping)
        tl.store(at + SIZE // 2 + column, sums[3], heading)
    tl.debug_barrier()


@triton.jit
def _published_sums(desk, at, KIND: tl.constexpr, SIZE: tl.constexpr):
    window, column, stepping, heading = desk
    steps, head = tl.load(at + window, stepping, 0.0), tl.load(at + column, heading, 0.0)
    square_steps = tl.zeros((window.shape[0], 1), tl.float64)
    square_head = square_steps
    if KIND != MEAN:
        at += SIZE // 2
        square_steps = tl.load(at + window, stepping, 0.0)
        square_head = tl.load(at + column, heading, 0.0)
    return steps, head, square_steps, square_head


@triton.jit
def _published(words, first, end, polls):
    """Whether bands have published their sums, after at most so many looks."""
    word = first // WORD
    while (word * WORD < end) & (polls > 0):
        low = tl.maximum(first - word * WORD, 0)
        high = tl.minimum(end - word * WORD, WORD)
        wanted = (1 << high) - (1 << low)
        seen = tl.atomic_or(words + word, 0, sem="acquire")
        word = tl.where((seen & wanted) == wanted, word + 1, word)
        polls -= 1
    tl.debug_barrier()
    return word * WORD >= end


@triton.jit
def _statistics(sums, kh, kw, pivot, x, EPS: tl.constexpr, KIND: tl.constexpr):
    """Mean of each window, and its variance, or the inverse of its deviation to normalise by."""
    scale = 1.0 / (tl.cast(kh, tl.float64) * tl.cast(kw, tl.float64))
    mean = _window_sums(sums[0], sums[1]) * scale
    spread = mean
    if KIND != MEAN:
        spread = _window_sums(sums[2], sums[3]) * scale - mean * mean
        spread = tl.where(spread < 0, 0.0, spread)
        mean += pivot
    if KIND == NORMALISE:
        wide: tl.constexpr = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
        spread = tl.rsqrt((spread + EPS).to(wide)).to(tl.float64)
    return mean, spread


@triton.jit
def _window_sums(steps, head):
    return tl.sum(head, 1, keep_dims=True) + (tl.cumsum(steps, 1) - steps)


@triton.jit
def _write(mean, spread, write, rows, column, here, width, KIND: tl.constexpr):
    """Write some columns of a row of windows, to more than one row at the border of the map."""
    out, var, edges, plane, target, edge, factor, summand, xs, outs = write
    is_first, is_last, from_row, to_row = rows
    column = column.to(tl.int64)
    if edges is not None:
        at = edges + edge * width + column
        if is_first:
            tl.store(at, mean, here)
            tl.store(at + width, spread, here)
        if is_last:
            tl.store(at + 2 * width, mean, here)
            tl.store(at + 3 * width, spread, here)
    for row in tl.range(from_row, to_row):
        to = target + tl.cast(row, tl.int64) * outs[2] + column * outs[3]
        if KIND == NORMALISE:
            value = _row(plane + column * xs[3], row, xs[2], here)
            y = _normalised(value, mean, spread, factor, summand)
        else:
            y = mean
        tl.store(out + to, _narrow(y, out), here)
        if KIND == MEAN_VAR:
            tl.store(var + to, _narrow(spread, var), here)


@triton.jit
def _write_edge(
    mean, spread, which, write, rows, begin, end, some, width,
    KIND: tl.constexpr, HEAD: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """Write one window's statistics to all columns from `begin` to `end`, less than a window."""
    mean = tl.sum(tl.where(which, mean, 0.0), 1, keep_dims=True)
    spread = tl.sum(tl.where(which, spread, 0.0), 1, keep_dims=True)
    for n in tl.range(0, HEADS):
        column = begin + n * HEAD + tl.arange(0, HEAD)[None, :]
        here = some & (column < end)
        _write(mean, spread, write, rows, column, here, width, KIND)


@triton.jit
def _affine(weight, bias, channel, some):
    factor = tl.full(channel.shape, 1, tl.float32)
    if weight is not None:
        factor = tl.load(weight + channel, some, 0.0)
    summand = tl.full(channel.shape, 0, tl.float32)
    if bias is not None:
        summand = tl.load(bias + channel, some, 0.0)
    return factor, summand


@triton.jit
def _normalised(value, mean, per_deviation, factor, summand):
    # once the mean is gone the digits of float32 suffice for all but float64
    wide: tl.constexpr = tl.float64 if value.dtype == tl.float64 else tl.float32
    shifted = (value.to(tl.float64) - mean).to(wide)
    return shifted * (per_deviation.to(wide) * factor) + summand


@triton.jit
def _narrow(value, out):
    """In the type of `out`; float64 has no direct way to the half types."""
    wide: tl.constexpr = tl.float64 if out.dtype.element_ty == tl.float64 else tl.float32
    return value.to(wide).to(out.dtype.element_ty)
