"""Attention within windows and, by way of anchors, within stripes of a map: GRL's.

GRL: Li et al., *Efficient and Explicit Modelling of Image Hierarchies for Image Restoration*, CVPR
2023. Positions attend by the cosine between them, times a factor for each head, plus a bias that
depends on their relative position alone.

Windows tile the map from its first position, or from a shift further on. The border of the map
cuts windows short, and what would lie outside of it takes no part, so there is nothing to pad and
nothing to mask: neighbouring windows that are cut alike are attended to together.

The custom operator `fullres::stripe_attention` has shapes for `torch.compile` and `torch.export`,
and first derivatives, for which it computes anew.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fullres.ops.arrays import refuse_forward_derivatives

Size = tuple[int, int]
Part = tuple[slice, slice, slice]

_BUDGET = {"cpu": 2**22, "gpu": 2**25}
"""Elements of attention weights, and of copies, held at once, unless a row of queries has more."""


def window_attention(qkv: Tensor, window: Size, shift: Size, scale: Tensor, bias: Tensor) -> Tensor:
    """Positions attend to the positions of their window.

    Memory beside the result stays within a budget, whatever the size of the map.

    Args:
        qkv: queries, keys and values, (B, 3 * heads * c, H, W), any H and W, any strides.
        window: height and width of a window in positions.
        shift: where the windows' borders lie, from 0 to below the window.
        scale: factor of the cosines, one a head.
        bias: (heads, 2 * height - 1, 2 * width - 1), for the relative positions of a query and
            a key from the lowest.

    Returns:
        Attended values, (B, heads * c, H, W), channels-last, in the type of `qkv`.

    >>> qkv, bias = torch.rand(1, 24, 5, 9), torch.zeros(2, 7, 7)
    >>> window_attention(qkv, (4, 4), (2, 2), torch.ones(2), bias).shape
    torch.Size([1, 8, 5, 9])
    """
    refuse_forward_derivatives("attention within windows")
    y: Tensor = torch.ops.fullres.stripe_attention(
        qkv, None, scale.view(1, -1), bias[None], 1, window, shift
    )
    return y


def anchored_attention(
    qkv: Tensor,
    anchors: Tensor,
    down: int,
    stripe: Size,
    shift: Size,
    scales: tuple[Tensor, Tensor],
    biases: tuple[Tensor, Tensor],
) -> Tensor:
    """Anchors attend to the positions of their stripe, then the positions to the anchors.

    Each anchor stands for a cell of `down` × `down` positions. Costs are linear in the positions
    of a stripe, times its anchors; memory as in `window_attention`.

    Args:
        qkv: queries, keys and values, (B, 3 * heads * c, H, W), any H and W, any strides.
        anchors: (B, heads * c, ceil(H / down), ceil(W / down)) of the same type.
        down: positions along the side of an anchor's cell.
        stripe: height and width of a stripe in positions, multiples of `down`.
        shift: where the stripes' borders lie, from 0 to below the stripe; those of the anchors at
            `shift // down`. Below `down` it counts as 0.
        scales: factors of the cosines, one a head: of the anchors' attention, the positions'.
        biases: likewise, each (heads, height + height / down - 1, width + width / down - 1), for
            the relative positions of a query and a key, each counted in its own grid, from the
            lowest.

    Returns:
        Attended values, (B, heads * c, H, W), channels-last, in the type of `qkv`.

    Raises:
        ValueError: the stripe is no multiple of `down`, or the anchors do not fit.

    >>> qkv, anchors, bias = torch.rand(1, 24, 9, 20), torch.rand(1, 8, 3, 5), torch.zeros(2, 4, 9)
    >>> scales, biases = (torch.ones(2),) * 2, (bias,) * 2
    >>> anchored_attention(qkv, anchors, 4, (4, 8), (0, 4), scales, biases).shape
    torch.Size([1, 8, 9, 20])
    """
    if any(side % down for side in stripe):
        raise ValueError(f"a stripe of {stripe[0]} × {stripe[1]} has no whole cells of {down}")
    fitting = tuple(-(-side // down) for side in qkv.shape[-2:])
    if tuple(anchors.shape[-2:]) != fitting:
        given, wanted = ("{} × {}".format(*n) for n in (anchors.shape[-2:], fitting))
        raise ValueError(f"{wanted} anchors fit the map, not {given}")
    refuse_forward_derivatives("attention by anchors")
    shift = (shift[0] if shift[0] >= down else 0, shift[1] if shift[1] >= down else 0)
    y: Tensor = torch.ops.fullres.stripe_attention(
        qkv,
        anchors,
        torch.stack([scale.flatten() for scale in scales]),
        torch.stack(biases),
        down,
        stripe,
        shift,
    )
    return y


# Operator -------------------------------------------------------------------------------------


@torch.library.custom_op(
    "fullres::stripe_attention",
    mutates_args=(),
    schema="(Tensor qkv, Tensor? anchors, Tensor scales, Tensor biases, int down, int[] window, "
    "int[] shift) -> Tensor",
)
def _attention_op(
    qkv: Tensor,
    anchors: Tensor | None,
    scales: Tensor,
    biases: Tensor,
    down: int,
    window: Sequence[int],
    shift: Sequence[int],
) -> Tensor:
    """Without anchors one attention, with them two: `scales` and `biases` have one for each."""
    out = _room(qkv)
    maps, y = _maps(qkv, anchors), _tokens(out)
    for group in _groups(maps, down, window, shift):
        tables = group.tables(biases, qkv.dtype)
        for places in group.places(qkv.shape[0], qkv.shape[1], scales.shape[1], qkv.device):
            parts = [x[place] for x, place in zip(maps, places, strict=True)]
            y[places[0]] = group.attended(parts, scales, tables)
    return out


def _room(qkv: Tensor, *_: Any) -> Tensor:
    batch, channels, height, width = qkv.shape
    return qkv.new_empty(batch, height, width, channels // 3).permute(0, 3, 1, 2)


def _tokens(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1)


def _maps(qkv: Tensor, anchors: Tensor | None) -> list[Tensor]:
    """The map, and its anchors if there are any, (B, H, W, C)."""
    return [_tokens(x) for x in (qkv, anchors) if x is not None]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:4])
    ctx.grid = inputs[4:]


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    if torch.is_grad_enabled():
        raise NotImplementedError("attention within windows has no second derivatives")
    qkv, anchors, scales, biases = ctx.saved_tensors
    maps = _maps(qkv, anchors)
    found = [torch.zeros_like(x) for x in maps]
    of_scales, of_biases = torch.zeros_like(scales), torch.zeros_like(biases)
    for group in _groups(maps, *ctx.grid):
        for places in group.places(qkv.shape[0], qkv.shape[1], scales.shape[1], qkv.device):
            parts = [x[place] for x, place in zip(maps, places, strict=True)]
            leaves = [x.detach().requires_grad_() for x in (*parts, scales, biases)]
            with torch.enable_grad():
                tables = group.tables(leaves[-1], qkv.dtype)
                y = group.attended(leaves[:-2], leaves[-2], tables)
            *here, of_scale, of_bias = torch.autograd.grad(y, leaves, _tokens(grad)[places[0]])
            for x, place, part in zip(found, places, here, strict=True):
                x[place] = part
            of_scales += of_scale
            of_biases += of_bias
    of_maps = [x.permute(0, 3, 1, 2) for x in found]
    return of_maps[0], None if anchors is None else of_maps[1], of_scales, of_biases, *(None,) * 3


_attention_op.register_fake(_room)
_attention_op.register_autograd(_backward, setup_context=_keep)


# Windows --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Run:
    """Neighbouring windows along an axis that the border cuts alike."""

    window: int
    """Positions of a window that is not cut."""
    start: int
    """First position of the first window."""
    length: int
    """Positions of each window within the map."""
    lost: int
    """Positions of each window before the map."""
    count: int
    """Windows."""

    def part(self, first: int, count: int) -> slice:
        """Positions of `count` windows from window `first`, or of those that there are."""
        start, last = (min(n, self.count) * self.length for n in (first, first + count))
        return slice(self.start + start, self.start + last)


def _runs(*grids: tuple[int, int, int]) -> list[tuple[_Run, ...]]:
    """Runs of windows that are cut alike in every grid: (positions, window, shift) of an axis."""

    def cut(spans: tuple[tuple[int, int, int], ...]) -> tuple[tuple[int, int], ...]:
        return tuple((last - first, lost) for first, last, lost in spans)

    runs = []
    for cuts, group in groupby(zip(*(_spans(*grid) for grid in grids), strict=False), cut):
        alike = list(group)
        runs.append(
            tuple(
                _Run(window, first, length, lost, len(alike))
                for (_, window, _), (first, _, _), (length, lost) in zip(
                    grids, alike[0], cuts, strict=True
                )
            )
        )
    return runs


def _spans(positions: int, window: int, shift: int) -> Iterator[tuple[int, int, int]]:
    """First position of each window, the one after its last, and how many it loses before."""
    for start in range(-(-shift % window), positions, window):
        yield max(start, 0), min(start + window, positions), max(-start, 0)


@dataclass(frozen=True)
class _Group:
    """Windows that the border cuts alike, in the map and, if there are any, in its anchors."""

    rows: tuple[_Run, ...]
    columns: tuple[_Run, ...]

    @property
    def sizes(self) -> list[Size]:
        """Height and width of a window, of the map and of its anchors."""
        return [(r.length, c.length) for r, c in zip(self.rows, self.columns, strict=True)]

    def tables(self, biases: Tensor, dtype: torch.dtype) -> list[_Table]:
        """Biases of the attention of each stage, from those by relative position."""
        # of queries and keys: the map's own, or anchors and map, then map and anchors
        stages = [(0, 0)] if len(self.rows) == 1 else [(1, 0), (0, 1)]
        tables = []
        for bias, (q, k) in zip(biases, stages, strict=True):
            for dim, runs in ((1, self.rows), (2, self.columns)):
                first = runs[q].lost - runs[k].lost - runs[k].length + runs[k].window
                bias = bias.narrow(dim, first, runs[q].length + runs[k].length - 1)
            tables.append(_Table(bias.to(dtype), self.sizes[q], self.sizes[k]))
        return tables

    def places(
        self, batch: int, channels: int, heads: int, device: torch.device
    ) -> Iterator[list[Part]]:
        """Where as many windows lie as the budget allows, in the map and in its anchors."""
        positions = math.prod(self.sizes[0])
        weights = heads * positions * math.prod(self.sizes[-1])
        most = max(_budget(device) // max(weights, channels * positions), 1)
        pictures = min(most, batch)
        across = min(max(most // pictures, 1), self.columns[0].count)
        down = min(max(most // (pictures * across), 1), self.rows[0].count)
        for b in range(0, batch, pictures):
            for r in range(0, self.rows[0].count, down):
                for c in range(0, self.columns[0].count, across):
                    yield [
                        (slice(b, b + pictures), row.part(r, down), column.part(c, across))
                        for row, column in zip(self.rows, self.columns, strict=True)
                    ]

    def attended(self, parts: list[Tensor], scales: Tensor, tables: list[_Table]) -> Tensor:
        """Attended values (B, h, w, heads * c) of a part (B, h, w, 3 * heads * c) of the map.

        `parts` are that of the map and, if there are any, that of the anchors.
        """
        heads = scales.shape[1]
        q, k, v = (_cut(x, self.sizes[0], heads) for x in parts[0].chunk(3, -1))
        if len(parts) == 2:
            anchors = _cut(parts[1], self.sizes[1], heads)
            v = _attend(_unit(anchors, scales[0]), _unit(k), v, tables[0])
            k = anchors
        y = _attend(_unit(q, scales[-1]), _unit(k), v, tables[-1])
        return _joined(y, self.sizes[0], parts[0].shape)


def _groups(
    maps: list[Tensor], down: int, window: Sequence[int], shift: Sequence[int]
) -> list[_Group]:
    rows, columns = (
        _runs(
            *(
                (x.shape[dim], length // cell, start // cell)
                for x, cell in zip(maps, (1, down), strict=False)
            )
        )
        for dim, length, start in zip((1, 2), window, shift, strict=True)
    )
    return [_Group(row, column) for row in rows for column in columns]


def _cut(x: Tensor, size: Size, heads: int) -> Tensor:
    """Windows of (B, H, W, heads * c) as (windows, heads, positions, c)."""
    batch, height, width, channels = x.shape
    h, w = size
    x = x.reshape(batch, height // h, h, width // w, w, heads, channels // heads)
    return x.permute(0, 1, 3, 5, 2, 4, 6).reshape(-1, heads, h * w, channels // heads)


def _joined(y: Tensor, size: Size, shape: torch.Size) -> Tensor:
    """The reverse of `_cut`, (B, H, W, heads * c) with B, H and W of `shape`."""
    (batch, height, width, _), (h, w) = shape, size
    _, heads, _, channels = y.shape
    y = y.reshape(batch, height // h, width // w, heads, h, w, channels)
    return y.permute(0, 1, 4, 2, 5, 3, 6).reshape(batch, height, width, heads * channels)


def _budget(device: torch.device) -> int:
    return _BUDGET["cpu" if device.type == "cpu" else "gpu"]


# Attention ------------------------------------------------------------------------------------


def _unit(x: Tensor, scale: Tensor | None = None) -> Tensor:
    """Vectors of norm 1, times a factor for each head of (windows, heads, positions, c)."""
    wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    wide = F.normalize(wide, dim=-1)
    if scale is not None:
        wide = wide * scale.to(wide.dtype).view(-1, 1, 1)
    return wide.to(x.dtype)


class _Table:
    """The bias of each query and key of a window, by rows of queries within the budget.

    Args:
        table: (heads, rows, columns) by relative position, from the lowest.
        queries: height and width of the queries of a window.
        keys: those of its keys.
    """

    def __init__(self, table: Tensor, queries: Size, keys: Size) -> None:
        self.table, self.queries, self.keys = table, queries, keys
        a_row = table.shape[0] * queries[1] * math.prod(keys)
        self.block = min(max(_budget(table.device) // a_row, 1), queries[0])
        self.whole = self._made(0, queries[0]) if self.block == queries[0] else None

    def blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """Queries, and their biases (1, heads, queries, keys)."""
        height, width = self.queries
        for first in range(0, height, self.block):
            last = min(first + self.block, height)
            bias = self._made(first, last) if self.whole is None else self.whole
            yield slice(first * width, last * width), bias

    def _made(self, first: int, last: int) -> Tensor:
        # the element of (q, k) is that of q - k: read backwards, the table slid along a query's
        # row and column is the biases of its keys
        table = self.table.narrow(1, first, last - first + self.keys[0] - 1)
        slid = table.flip(1, 2).unfold(1, self.keys[0], 1).unfold(2, self.keys[1], 1)
        queries = (last - first) * self.queries[1]
        return slid.flip(1, 2).reshape(1, -1, queries, math.prod(self.keys))


def _attend(q: Tensor, k: Tensor, v: Tensor, table: _Table) -> Tensor:
    """Softmax attention of (windows, heads, positions, c)."""
    lines = [
        F.scaled_dot_product_attention(q[:, :, queries], k, v, attn_mask=bias, scale=1.0)
        for queries, bias in table.blocks()
    ]
    return lines[0] if len(lines) == 1 else torch.cat(lines, 2)
