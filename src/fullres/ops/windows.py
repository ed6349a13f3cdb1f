"""Transposed attention over overlapping windows: Restormer's, made local.

Transposed attention weighs channels with channels: for one head with queries, keys and values of
c channels, `softmax(temperature * q̂ k̂ᵀ) v`, where q̂ and k̂ have norm 1 over the positions
(Restormer: Zamir et al., CVPR 2022, equation 1). The local form attends within every window and
averages the results where windows overlap (TLC: Chu et al., ECCV 2022).

Two parts of it are linear, so neither reads a position twice nor copies a window. The borders of
the windows cut the map into cells; a window's Gram matrix q kᵀ and squared norms are sums over its
cells, and the average of `A_w v` over the windows w that cover a cell is `(average of A_w) v`.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise, product

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses import FakeTensor

from fullres.ops.arrays import recorded, refuse_forward_derivatives
from fullres.ops.cells import gram, pairs, products, span_sums, squares, weigh, wide
from fullres.ops.parts import Part, Place, room, split, taken

Size = tuple[int, int]

EPS = 1e-12
"""Smallest norm that a query or key is divided by."""
_BUDGET = 2**22
"""Elements of the matrices of all cells held at once, unless one row of each is more."""


def transposed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    temperature: Tensor,
    window: Size | None = None,
    stride: int | Size | None = None,
) -> Tensor:
    """Channels attend to channels within overlapping windows; results are averaged.

    Memory beside the result stays below a few maps, however many windows there are. Derivatives
    of any order, in reverse mode.

    Args:
        q: queries (B, heads * c, H, W) of a floating-point type, any values, any strides.
        k: keys of the same shape and type.
        v: values of the same shape and type.
        temperature: factor of each head, as many elements as heads.
        window: height and width in positions, clipped to the map; None for the whole map.
        stride: positions between windows, at most the window; as `window_starts` if not given.

    Returns:
        Attended values, (B, heads * c, H, W), in the type and memory layout of `v`; sums and
        matrices in float32 or better.

    Raises:
        ValueError: shapes do not fit, or the window or stride is out of range.

    >>> q, k, v = torch.rand(3, 1, 8, 20, 30).unbind()
    >>> transposed_attention(q, k, v, torch.ones(2), window=(12, 12)).shape
    torch.Size([1, 8, 20, 30])
    """
    heads = _checked_heads(q, k, v, temperature)
    refuse_forward_derivatives("attention among channels")
    rows, columns = _axes(v, window, stride)
    q, k, v = (_by_head(x, heads) for x in (q, k, v))  # (B, heads, c, H, W)
    cells = _Cells(_Axis.of(*rows), _Axis.of(*columns))
    factor = temperature.to(wide(v)).view(heads, 1, 1)
    batch, _, channels = v.shape[:3]
    block = _BUDGET // (cells.number * max(batch, 1) * heads * channels)
    block = min(max(block, 1), channels)
    norms = [cells.windows(cells.squares(x)).clamp_min(EPS**2).sqrt() for x in (q, k)]
    blocks = []
    # a query channel's row of the matrix does not depend on the other rows
    for part, norm in zip(torch.split(q, block, 2), torch.split(norms[0], block, -1), strict=True):
        x = cells.windows(cells.gram(part, k))  # (windows, windows, B, heads, block, c)
        x = x / norm.unsqueeze(-1) / norms[1].unsqueeze(-2)
        x = cells.averages((factor * x).softmax(-1))
        blocks.append(cells.weigh(x, v))
    return (blocks[0] if len(blocks) == 1 else torch.cat(blocks, 2)).flatten(1, 2)


def projected_attention(
    project: Callable[[Tensor], tuple[Tensor, Tensor, Tensor]],
    x: Tensor,
    temperature: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    window: Size | None = None,
    stride: int | Size | None = None,
    *,
    residual: Tensor | None = None,
    channels: int,
    halo: int,
) -> Tensor:
    """A 1 × 1 convolution of `transposed_attention(*project(x), …)`, and a map added to it.

    Without whole maps of queries and keys, and with one product for attention and convolution,
    whose matrices are multiplied first, where that pays and no derivatives or graph are recorded.
    The result then takes the memory of the values: the only whole map beside those given.

    Args:
        project: queries, keys and values (B, heads * c, h, w) of a part (B, C, h, w) of the map;
            a position depends on no input further off than `halo`, and pads with zeros if at all.
        x: map (B, C, H, W).
        temperature: as there.
        weight: of the convolution, (C', heads * c, 1, 1).
        bias: of the convolution, (C',), or None.
        window: as there.
        stride: as there.
        residual: map (B, C', H, W) to add, `x` for instance; it is left as it is.
        channels: those of the widest intermediate map of `project`.
        halo: reach of `project`, in positions.

    Returns:
        (B, C', H, W), in the memory format of the values. Errors as there.
    """
    rows, columns = _axes(x, window, stride)
    cells = _Cells(_Axis.of(*rows), _Axis.of(*columns))
    too_many = cells.number * len(weight) > x[:1, :1].numel()  # matrices larger than the map
    if recorded() or too_many:
        y = transposed_attention(*project(x), temperature, window, stride)
        y = F.conv2d(y, weight, bias)
        return y if residual is None else y + residual
    parts = list(split(x, channels, halo))
    if isinstance(x, FakeTensor):  # shapes and memory are those of any part
        parts = parts[:1]
    results = []
    for number in range(len(x)):
        sums, values = _summed(project, x, number, parts, temperature.numel(), cells)
        m = _matrices(cells, *sums, temperature).squeeze(2)  # (rows, columns, heads, c, c)
        added = None if residual is None else residual[number : number + 1]
        results.append(cells.convolved(values, _factors(m, weight), bias, added))
    return results[0] if len(results) == 1 else torch.cat(results)


def _summed(
    project: Callable[[Tensor], tuple[Tensor, Tensor, Tensor]],
    x: Tensor,
    number: int,
    parts: Sequence[Part],
    heads: int,
    cells: _Cells,
) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
    """Gram matrices and squares of queries and keys by cell, and the values, of one map."""
    totals: list[Tensor] = []
    values: Tensor | None = None
    for part in parts:
        q, k, v = (z[part.inside] for z in project(taken(x, number, part)))
        here, top, left = cells.within(part)
        _checked_heads(q, k, v, x.new_empty(heads))
        q, k = _by_head(q, heads), _by_head(k, heads)
        sums = here.products(q, k)
        if values is None:
            values = room(x[:1], v)
            totals = [s.new_zeros(*cells.shape, *s.shape[2:]) for s in sums]
        for total, some in zip(totals, sums, strict=True):
            here.cut(total, top, left).add_(some)
        values[part.place] = v
    assert values is not None
    return (totals[0], totals[1], totals[2]), values


def _matrices(
    cells: _Cells, gram: Tensor, q_squares: Tensor, k_squares: Tensor, temperature: Tensor
) -> Tensor:
    """The averaged attention matrices of each cell, from sums by cell."""
    q, k = (cells.windows(s).clamp_min(EPS**2).sqrt() for s in (q_squares, k_squares))
    x = cells.windows(gram).div_(q.unsqueeze(-1)).div_(k.unsqueeze(-2))
    return cells.averages((temperature.to(x.dtype).view(-1, 1, 1) * x).softmax(-1))


def _factors(m: Tensor, weight: Tensor) -> Tensor:
    """What a convolution by `weight` makes of the heads' matrices (rows, columns, heads, c, c).

    Transposed: (rows, columns, heads * c, C').
    """
    rows, columns, heads, channels, _ = m.shape
    by_head = weight.detach().to(m.dtype).view(-1, heads, channels).permute(1, 2, 0).contiguous()
    factors = m.new_empty(rows, columns, heads, channels, len(weight))
    with torch.autocast(m.device.type, enabled=False):
        for r, s in product(range(rows), range(columns)):  # all in one would copy the weight
            torch.matmul(m[r, s].mT, by_head, out=factors[r, s])
    return factors.flatten(2, 3)


def transposed_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    temperature: Tensor,
    window: Size | None = None,
    stride: int | Size | None = None,
) -> Tensor:
    """The direct form of `transposed_attention`: window after window, in the inputs' type.

    Arguments, result and errors as there.
    """
    heads = _checked_heads(q, k, v, temperature)
    (tops, kh, _), (lefts, kw, _) = _axes(v, window, stride)
    total, count = torch.zeros_like(v), v.new_zeros(v.shape[-2:])
    for top in tops:
        for left in lefts:
            here = (..., slice(top, top + kh), slice(left, left + kw))
            # (B, heads, c, kh * kw)
            a, b, c = (_by_head(x[here], heads).flatten(3) for x in (q, k, v))
            a, b = F.normalize(a, dim=-1, eps=EPS), F.normalize(b, dim=-1, eps=EPS)
            weights = (a @ b.mT * temperature.view(heads, 1, 1)).softmax(-1)
            total[here] += (weights @ c).reshape(total[here].shape)
            count[here] += 1
    return total / count


def window_starts(length: int, window: int, stride: int | None = None) -> tuple[int, ...]:
    """First positions of the windows along an axis; the last window is flush with the end.

    Args:
        length: positions of the axis.
        window: positions of a window; one longer than the axis is clipped to it.
        stride: positions from one window to the next. By default as few windows as cover the
            axis, spaced evenly: `ceil((length - window) / (ceil(length / window) - 1))`.

    Raises:
        ValueError: the window is below 1, or the stride is not from 1 to the window.

    >>> window_starts(10, 4)
    (0, 3, 6)
    >>> window_starts(10, 4, stride=4)
    (0, 4, 6)
    """
    if window < 1:
        raise ValueError(f"the window must be at least 1 position, not {window}")
    if stride is not None and not 1 <= stride <= window:
        raise ValueError(f"the stride must be from 1 to the window of {window}, not {stride}")
    last = length - min(window, length)
    if stride is None:
        gaps = max(-(-length // window) - 1, 1)
        stride = max(-(-last // gaps), 1)
    return (*range(0, last, stride), last)


def _checked_heads(q: Tensor, k: Tensor, v: Tensor, temperature: Tensor) -> int:
    if q.dim() != 4 or not q.is_floating_point():
        raise ValueError(f"q must be floating-point maps (B, C, H, W), not {q.dtype} {q.dim()}-d")
    if not q.shape == k.shape == v.shape or not q.dtype == k.dtype == v.dtype:
        raise ValueError(
            "q, k and v must have the same shape and type, not "
            + ", ".join(f"{tuple(x.shape)} {x.dtype}" for x in (q, k, v))
        )
    heads = temperature.numel()
    if heads == 0 or q.shape[1] % heads:
        raise ValueError(f"{q.shape[1]} channels do not divide into {heads} heads")
    return heads


def _by_head(x: Tensor, heads: int) -> Tensor:
    return x.reshape(x.shape[0], heads, x.shape[1] // heads, *x.shape[2:])


def _axes(
    x: Tensor, window: Size | None, stride: int | Size | None
) -> tuple[tuple[tuple[int, ...], int, int], ...]:
    """Starts of the windows, their length and the length of the map, for rows and for columns."""
    sides = (int(x.shape[-2]), int(x.shape[-1]))  # a tracer has tensors there
    windows = sides if window is None else window
    strides = stride if isinstance(stride, tuple) else (stride, stride)
    return tuple(
        (window_starts(side, k, step), min(k, side), side)
        for side, k, step in zip(sides, windows, strides, strict=True)
    )


def _area(place: tuple[int, int, Place]) -> int:
    _, rows, columns = place[2]
    return int((rows.stop - rows.start) * (columns.stop - columns.start))


@dataclass(frozen=True)
class _Axis:
    """How the borders of the windows cut one axis. Pairs are (first, first after the last)."""

    cuts: list[int]
    """Borders of the cells, from 0 to the length of the axis."""
    spans: list[int]
    """Cells of each window, as pairs one after the other."""
    covers: list[int]
    """Windows that cover each cell, likewise."""

    @classmethod
    def of(cls, starts: Sequence[int], window: int, length: int) -> _Axis:
        ends = [start + window for start in starts]
        cuts = sorted({0, length, *starts, *ends})
        number = {cut: n for n, cut in enumerate(cuts)}
        covers = ((sum(e <= c for e in ends), sum(s <= c for s in starts)) for c in cuts[:-1])
        return cls(
            cuts=cuts,
            spans=[number[p] for pair in zip(starts, ends, strict=True) for p in pair],
            covers=[n for pair in covers for n in pair],
        )

    def within(self, first: int, last: int) -> tuple[_Axis, int]:
        """The cells between two positions, from the first of these, and which one that is in."""
        inner = [cut for cut in self.cuts if first < cut < last]
        axis = _Axis([cut - first for cut in (first, *inner, last)], [], [])
        return axis, bisect_right(self.cuts, first) - 1


@dataclass(frozen=True)
class _Cells:
    """The cells of a map. Values of cells are (rows, columns, …), those of windows too."""

    rows: _Axis
    columns: _Axis

    @property
    def shape(self) -> Size:
        return len(self.rows.cuts) - 1, len(self.columns.cuts) - 1

    @property
    def number(self) -> int:
        return self.shape[0] * self.shape[1]

    def within(self, part: Part) -> tuple[_Cells, int, int]:
        """The cells that a part of the map meets, clipped to it, and the first of them."""
        rows, top = self.rows.within(part.top, part.bottom)
        columns, left = self.columns.within(part.left, part.right)
        return _Cells(rows, columns), top, left

    def cut(self, x: Tensor, top: int, left: int) -> Tensor:
        """Values of these cells among those of all, (rows, columns, …)."""
        return x[top : top + self.shape[0], left : left + self.shape[1]]

    def windows(self, x: Tensor) -> Tensor:
        """Sums over the cells of each window."""
        x = span_sums(x, self.rows.spans, self.rows.covers).transpose(0, 1)
        return span_sums(x, self.columns.spans, self.columns.covers).transpose(0, 1)

    def averages(self, x: Tensor) -> Tensor:
        """Means over the windows that cover each cell."""
        axes = (self.rows, self.columns)
        rows, columns = (
            x.new_tensor([b - a for a, b in pairs(axis.covers)]).view(-1, *(1,) * (x.dim() - 1))
            for axis in axes
        )
        x = span_sums(x, self.rows.covers, self.rows.spans).transpose(0, 1)
        x = span_sums(x, self.columns.covers, self.columns.spans).transpose(0, 1)
        return x / (rows * columns.transpose(0, 1))

    def squares(self, x: Tensor) -> Tensor:
        return squares(x, self.rows.cuts, self.columns.cuts)

    def gram(self, a: Tensor, b: Tensor) -> Tensor:
        return gram(a, b, self.rows.cuts, self.columns.cuts)

    def products(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return products(a, b, self.rows.cuts, self.columns.cuts)

    def weigh(self, m: Tensor, x: Tensor) -> Tensor:
        return weigh(m, x, self.rows.cuts, self.columns.cuts)

    def convolved(
        self, x: Tensor, factors: Tensor, bias: Tensor | None, residual: Tensor | None
    ) -> Tensor:
        """A map (1, C, H, W) convolved, in each cell by its own factors of (rows, columns, C, C').

        In the memory of the map where the result has as many channels.
        """
        channels = factors.shape[3]
        fake = isinstance(x, FakeTensor)  # for memory one part of the largest cell will do
        out = x if channels == x.shape[1] else room(x, x, channels)
        maps = [y for y in (x, residual, out) if y is not None]
        if x.device.type == "cpu" and not fake:
            from fullres.ops import cells_cpu

            if cells_cpu.convolves(*maps):
                borders = self.rows.cuts, self.columns.cuts
                cells_cpu.convolve(x, factors, bias, residual, out, *borders)
                return out
        weights = factors.mT.to(x.dtype)[..., None, None]
        places = list(self.places())
        for r, s, here in [max(places, key=_area)] if fake else places:
            cell = x[here]
            parts = list(split(cell, max(channels, x.shape[1]), 0))
            for part in parts[:1] if fake else parts:
                y = F.conv2d(taken(cell, 0, part), weights[r, s], bias)
                if residual is not None:
                    y += residual[here][part.place]
                out[here][part.place] = y
        return out

    def places(self) -> Iterator[tuple[int, int, Place]]:
        """Row, column and place of each cell."""
        for r, (top, bottom) in enumerate(pairwise(self.rows.cuts)):
            for s, (left, right) in enumerate(pairwise(self.columns.cuts)):
                yield r, s, (..., slice(top, bottom), slice(left, right))
