"""Pyramid attention by blocks of queries and keys, on any device and in any type, in plain torch.

A block holds every pair of a tile of queries and a rectangle of keys of one scale. Both have a
margin of one position, so that the sums over the offsets of a patch find all they need: gathered
from the products of pixels into scores, scattered from weights to pixels.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

Span = tuple[int, int]

_TILE = 16
"""Side of a tile of queries where the budget allows it."""
_ALIVE = 8
"""Tensors of a block's size that are alive at once, at most."""


@dataclass(frozen=True)
class Level:
    """One scale: the size of its map, who sees what of it, and where it lies among the keys."""

    height: int
    width: int
    rows: list[Span]
    """Rows that each row of queries attends to; neither end ever decreases."""
    columns: list[Span]
    """Likewise columns."""
    first: int
    last: int


@dataclass(frozen=True)
class _Block:
    """A tile of queries and a rectangle of keys, without margins."""

    rows: Span
    columns: Span
    key_rows: Span
    key_columns: Span
    seen: Tensor | None
    """Whether a query sees a key, to broadcast to (rows, columns, key rows, key columns)."""


def attend(
    q: Tensor, k: Tensor, factor: Tensor, v: Tensor, levels: list[Level], budget: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Result, largest score and sum of exponentials; shapes as in `fullres.ops.pyramid`."""
    batch, _, height, width = q.shape
    maps = _Maps.of(q, k, factor, v, levels)
    out = q.new_zeros(batch, height + 2, width + 2, v.shape[2])
    top = q.new_full((batch, height, width), torch.finfo(q.dtype).min)
    total = torch.zeros_like(top)
    for tile, blocks in _tiles(maps, levels, budget):
        here = (slice(None), slice(*tile[0]), slice(*tile[1]))
        for level, block in blocks:
            _enter(maps.scores(level, block)[0], top[here], total[here])
        for level, block in blocks:
            scores, _ = maps.scores(level, block)
            weights = _scattered(_weights(scores, top[here], total[here]))
            pixels = _matrix(weights) @ _pixels(
                maps.values[level], block.key_rows, block.key_columns
            )
            _add(out, *tile, pixels)
    return out[:, 1:-1, 1:-1].contiguous().mul_(0.25), top, total


def gradients(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    factor: Tensor,
    v: Tensor,
    top: Tensor,
    total: Tensor,
    levels: list[Level],
    budget: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Derivatives by q, k, factor and v, given that by the result."""
    maps = _Maps.of(q, k, factor, v, levels)
    grad = _padded(grad * 0.25)
    grad_q = torch.zeros_like(maps.queries)
    grad_k, grad_v = ([torch.zeros_like(x) for x in xs] for xs in (maps.keys, maps.values))
    grad_factor = [torch.zeros_like(x) for x in maps.factors]
    for tile, blocks in _tiles(maps, levels, budget):
        here = (slice(None), slice(*tile[0]), slice(*tile[1]))
        shape = (*top[here].shape, 1, 1)
        inner = top.new_zeros(shape)
        for level, block in blocks:
            weights = _weights(maps.scores(level, block)[0], top[here], total[here])
            weights *= maps.weight_gradients(grad, level, block)
            inner += weights.sum((-2, -1), keepdim=True)
        for level, block in blocks:
            keys = (block.key_rows, block.key_columns)
            scores, products = maps.scores(level, block)
            weights = _weights(scores, top[here], total[here])
            by_weight = _matrix(_scattered(weights))
            _add(grad_v[level], *keys, by_weight.mT @ _pixels(grad, *tile))
            weights *= maps.weight_gradients(grad, level, block) - inner  # now by the scores
            rows, columns = (slice(*span) for span in keys)
            grad_factor[level][:, rows, columns] += products.mul_(weights).sum((1, 2))
            weights *= maps.factors[level][:, None, None, rows, columns]
            by_product = _matrix(_scattered(weights))
            _add(grad_q, *tile, by_product @ _pixels(maps.keys[level], *keys))
            _add(grad_k[level], *keys, by_product.mT @ _pixels(maps.queries, *tile))
    packed_k, packed_v = (
        torch.cat([x[:, 1:-1, 1:-1].flatten(1, 2) for x in xs], 1) for xs in (grad_k, grad_v)
    )
    packed_factor = torch.cat([x.flatten(1) for x in grad_factor], 1)
    return grad_q[:, 1:-1, 1:-1].permute(0, 3, 1, 2), packed_k, packed_factor, packed_v


@dataclass(frozen=True)
class _Maps:
    """Queries, and keys, factors and values of each scale, (B, h, w, channels).

    All but the factors have a margin of one pixel of zeros.
    """

    queries: Tensor
    keys: list[Tensor]
    factors: list[Tensor]
    values: list[Tensor]

    @classmethod
    def of(cls, q: Tensor, k: Tensor, factor: Tensor, v: Tensor, levels: list[Level]) -> _Maps:
        def unpacked(x: Tensor) -> list[Tensor]:
            return [
                x[:, n.first : n.last].reshape(x.shape[0], n.height, n.width, *x.shape[2:])
                for n in levels
            ]

        return cls(
            queries=_padded(q.permute(0, 2, 3, 1)),
            keys=[_padded(x) for x in unpacked(k)],
            factors=unpacked(factor),
            values=[_padded(x) for x in unpacked(v)],
        )

    def scores(self, level: int, block: _Block) -> tuple[Tensor, Tensor]:
        """Scores, and the products of patches that they are multiples of.

        Both (B, rows, columns, key rows, key columns); what is not seen has the smallest score.
        """
        queries = _pixels(self.queries, block.rows, block.columns)
        keys = _pixels(self.keys[level], block.key_rows, block.key_columns)
        products = _gathered(_paired(queries @ keys.mT, block))
        rows, columns = slice(*block.key_rows), slice(*block.key_columns)
        scores = products * self.factors[level][:, None, None, rows, columns]
        if block.seen is not None:
            scores.masked_fill_(~block.seen, torch.finfo(scores.dtype).min)
        return scores, products

    def weight_gradients(self, grad: Tensor, level: int, block: _Block) -> Tensor:
        """Derivative by the weights of a block, given that by the result."""
        values = _pixels(self.values[level], block.key_rows, block.key_columns)
        products = _pixels(grad, block.rows, block.columns) @ values.mT
        return _gathered(_paired(products, block))


def _enter(scores: Tensor, top: Tensor, total: Tensor) -> None:
    """Extend the largest score and the sum of exponentials by a block of scores."""
    highest = torch.maximum(top, scores.amax((-2, -1)))
    total *= (top - highest).exp_()
    total += scores.sub_(highest[..., None, None]).exp_().sum((-2, -1))
    top.copy_(highest)


def _weights(scores: Tensor, top: Tensor, total: Tensor) -> Tensor:
    return scores.sub_(top[..., None, None]).exp_().div_(total[..., None, None])


def _padded(x: Tensor) -> Tensor:
    return F.pad(x, (0, 0, 1, 1, 1, 1))


def _pixels(x: Tensor, rows: Span, columns: Span) -> Tensor:
    """Pixels of a rectangle and its margin: (B, pixels, channels); `x` has a margin itself."""
    return x[:, rows[0] : rows[1] + 2, columns[0] : columns[1] + 2].flatten(1, 2)


def _add(x: Tensor, rows: Span, columns: Span, pixels: Tensor) -> None:
    """Add pixels as `_pixels` gives them."""
    part = x[:, rows[0] : rows[1] + 2, columns[0] : columns[1] + 2]
    part += pixels.view(part.shape)


def _paired(matrix: Tensor, block: _Block) -> Tensor:
    """(B, queries, keys) as (B, rows, columns, key rows, key columns), margins included."""
    spans = (block.rows, block.columns, block.key_rows, block.key_columns)
    return matrix.view(matrix.shape[0], *(last - first + 2 for first, last in spans))


def _matrix(x: Tensor) -> Tensor:
    return x.flatten(3, 4).flatten(1, 2)


def _gathered(x: Tensor) -> Tensor:
    """Sums along both diagonals over the offsets of a patch; the margins go."""
    for query, key in ((1, 3), (2, 4)):
        a, b = x.shape[query] - 2, x.shape[key] - 2
        sums = x.narrow(query, 0, a).narrow(key, 0, b) + x.narrow(query, 1, a).narrow(key, 1, b)
        x = sums.add_(x.narrow(query, 2, a).narrow(key, 2, b))
    return x


def _scattered(x: Tensor) -> Tensor:
    """The transpose of `_gathered`: margins come."""
    for query, key in ((1, 3), (2, 4)):
        shape, a, b = list(x.shape), x.shape[query], x.shape[key]
        shape[query], shape[key] = a + 2, b + 2
        sums = x.new_zeros(shape)
        for d in range(3):
            sums.narrow(query, d, a).narrow(key, d, b).add_(x)
        x = sums
    return x


def _tiles(
    maps: _Maps, levels: list[Level], budget: int
) -> Iterator[tuple[tuple[Span, Span], list[tuple[int, _Block]]]]:
    """Tiles of queries, and for each the blocks of keys that it sees, with their scales."""
    batch, height, width = maps.queries.shape[:3]
    elements = budget // (_ALIVE * max(batch, 1) * maps.queries.element_size())
    side = _TILE
    while side > 1 and (side + 2) ** 4 > elements:
        side //= 2
    for rows in _cut((0, height - 2), side):
        for columns in _cut((0, width - 2), side):
            pairs = (rows[1] - rows[0] + 2) * (columns[1] - columns[0] + 2)
            blocks = [
                (number, block)
                for number, level in enumerate(levels)
                for block in _blocks(level, rows, columns, elements // pairs, maps.queries.device)
            ]
            yield (rows, columns), blocks


def _blocks(
    level: Level, rows: Span, columns: Span, keys: int, device: torch.device
) -> Iterator[_Block]:
    """The keys that a tile sees, in rectangles of at most `keys` with their margins."""
    per_row, per_column = level.rows[slice(*rows)], level.columns[slice(*columns)]
    reach = (per_row[0][0], per_row[-1][1]), (per_column[0][0], per_column[-1][1])
    least = _TILE + 2
    width = max(min(reach[1][1] - reach[1][0] + 2, keys // least), 3)
    for key_rows in _cut(reach[0], max(keys // width - 2, 1)):
        for key_columns in _cut(reach[1], width - 2):
            by_row = _seen(per_row, key_rows, device)
            by_column = _seen(per_column, key_columns, device)
            seen = None
            if by_row is not None or by_column is not None:
                one = torch.ones(1, 1, dtype=torch.bool, device=device)
                a, b = (one if x is None else x for x in (by_row, by_column))
                seen = a[:, None, :, None] & b[None, :, None, :]
            yield _Block(rows, columns, key_rows, key_columns, seen)


def _seen(spans: list[Span], keys: Span, device: torch.device) -> Tensor | None:
    """Whether each query of an axis sees each key, (queries, keys); None if all see all."""
    if spans[-1][0] <= keys[0] and keys[1] <= spans[0][1]:
        return None
    first, last = torch.tensor(spans, device=device).unsqueeze(-1).unbind(1)
    position = torch.arange(*keys, device=device)
    return (first <= position) & (position < last)


def _cut(span: Span, length: int) -> list[Span]:
    return [(a, min(a + length, span[1])) for a in range(span[0], span[1], length)]
