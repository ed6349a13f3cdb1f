"""Products over the cells that window borders cut a map into: sums, Gram matrices, application.

Maps are (B, heads, c, H, W), of any strides, floating-point type and device; matrices of cells are
(rows, columns, B, heads, d, c), in float32 or better. `rows` and `columns` are the borders of the
cells along each axis, from 0 to its length. The derivatives of these operators are one another,
so they have derivatives of any order; `torch.compile` and `torch.export` see each as one operator.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from types import EllipsisType
from typing import Any

import torch
from torch import Tensor

from fullres.ops.box import runs_triton

Span = tuple[int, int]
Part = tuple[EllipsisType, slice, slice]

_PIECE = 2**18
"""Elements of the part of a cell that is multiplied at once, to stay in cache."""
_NARROW = 16
"""Mean width of cells, in positions, below which columns are multiplied one by one."""


def span_sums(x: Tensor, spans: list[int], covers: list[int]) -> Tensor:
    """Sums of `x[first:last]` for each span, (spans, …).

    Args:
        x: (items, …).
        spans: first, last, first, last, …; firsts and lasts both ascend.
        covers: the spans that hold each item, likewise, for the derivative.

    >>> span_sums(torch.tensor([1.0, 2.0, 4.0]), [0, 2, 1, 3], [0, 1, 0, 2, 1, 2])
    tensor([3., 6.])
    """
    sums: Tensor = torch.ops.fullres.span_sums(x, spans, covers)
    return sums


def squares(x: Tensor, rows: list[int], columns: list[int]) -> Tensor:
    """Sum of squares of each channel of a map in each cell: (rows, columns, B, heads, c)."""
    sums: Tensor = torch.ops.fullres.cell_squares(x, rows, columns)
    return sums


def gram(a: Tensor, b: Tensor, rows: list[int], columns: list[int]) -> Tensor:
    """`a bᵀ` over the positions of each cell, a and b maps: (rows, columns, B, heads, d, c)."""
    matrices: Tensor = torch.ops.fullres.cell_gram(a, b, rows, columns)
    return matrices


def products(
    a: Tensor, b: Tensor, rows: list[int], columns: list[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """`gram(a, b)`, `squares(a)` and `squares(b)`, in one go on the CPU. Without derivatives."""
    if a.device.type == "cpu":
        from fullres.ops import cells_cpu

        if cells_cpu.serves(a, b):
            return cells_cpu.products(a, b, rows, columns)
    return gram(a, b, rows, columns), squares(a, rows, columns), squares(b, rows, columns)


def weigh(m: Tensor, x: Tensor, rows: list[int], columns: list[int]) -> Tensor:
    """`m x` at every position, m the matrix of its cell: (B, heads, d, H, W), as the map x."""
    weighed: Tensor = torch.ops.fullres.cell_weigh(m, x, rows, columns)
    return weighed


def pairs(flat: Sequence[int]) -> list[Span]:
    """Spans from their firsts and lasts in turn.

    >>> pairs([0, 2, 1, 3])
    [(0, 2), (1, 3)]
    """
    return list(zip(flat[::2], flat[1::2], strict=True))


def wide(x: Tensor) -> torch.dtype:
    """The type that matrices of a map have: its own, at least float32."""
    return torch.promote_types(x.dtype, torch.float32)


# Operators ------------------------------------------------------------------------------------


def _without_autocast(op: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Sums keep the type that they were given room in; autocast would narrow the products."""

    @functools.wraps(op)
    def run(x: Tensor, *others: Any) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return op(x, *others)

    return run


@torch.library.custom_op(
    "fullres::span_sums", mutates_args=(), schema="(Tensor x, int[] spans, int[] covers) -> Tensor"
)
def _span_sums_op(x: Tensor, spans: Sequence[int], covers: Sequence[int]) -> Tensor:
    # Spans that hold a border between two items are sums from it to either side: nothing is
    # subtracted (a difference of running sums would leave a residue where the map is zero), and
    # each item is added at most twice however much the spans overlap.
    each = pairs(spans)
    if sum(last - first for first, last in each) <= 2 * len(x):  # few overlaps
        return torch.stack([x[first:last].sum(0) for first, last in each])
    sums = x.new_empty(len(each), *x.shape[1:])
    begin = 0
    while begin < len(each):
        first, border = each[begin]
        end = next((n for n in range(begin, len(each)) if each[n][0] >= border), len(each))
        group = each[begin:end]
        before = x[first:border].flip(0).cumsum(0)
        sums[begin:end] = before[torch.tensor([border - a - 1 for a, _ in group], device=x.device)]
        reach = [b - border - 1 for _, b in group if b > border]
        if reach:
            after = x[border : group[-1][1]].cumsum(0)
            sums[end - len(reach) : end] += after[torch.tensor(reach, device=x.device)]
        begin = end
    return sums


def _span_sums_fake(x: Tensor, spans: Sequence[int], covers: Sequence[int]) -> Tensor:
    return x.new_empty(len(spans) // 2, *x.shape[1:])


_span_sums_op.register_fake(_span_sums_fake)


@torch.library.custom_op(
    "fullres::cell_gram",
    mutates_args=(),
    schema="(Tensor a, Tensor b, int[] rows, int[] columns) -> Tensor",
)
@_without_autocast
def _gram_op(a: Tensor, b: Tensor, rows: Sequence[int], columns: Sequence[int]) -> Tensor:
    matrices = _gram_room(a, b, rows, columns)
    if _has_kernel(columns, a, b):
        from fullres.ops import windows_cuda

        windows_cuda.gram(a, b, rows, columns, matrices)
        return matrices
    matrices.zero_()
    channels = b.shape[:3].numel()
    if _narrow(columns):
        index = _column_index(columns, a.device)
        for r, strip, part in _sections(rows, columns, channels):
            x, y = (z[..., strip, part].movedim(-1, 0).to(matrices.dtype) for z in (a, b))
            matrices[r].index_add_(0, index[part], x @ y.mT)
        return matrices
    for r, s, here in _pieces(rows, columns, channels):
        matrices[r, s] += _matrix(a[here]) @ _matrix(b[here]).mT
    return matrices


def _gram_room(a: Tensor, b: Tensor, rows: Sequence[int], columns: Sequence[int]) -> Tensor:
    shape = (len(rows) - 1, len(columns) - 1, *a.shape[:3], b.shape[2])
    return a.new_empty(shape, dtype=wide(a))


_gram_op.register_fake(_gram_room)


@torch.library.custom_op(
    "fullres::cell_squares",
    mutates_args=(),
    schema="(Tensor x, int[] rows, int[] columns) -> Tensor",
)
@_without_autocast
def _squares_op(x: Tensor, rows: Sequence[int], columns: Sequence[int]) -> Tensor:
    sums = _squares_room(x, rows, columns)
    if _has_kernel(columns, x):
        from fullres.ops import windows_cuda

        windows_cuda.squares(x, rows, columns, sums)
        return sums
    sums.zero_()
    channels = x.shape[:3].numel()
    if _narrow(columns):
        index = _column_index(columns, x.device)
        for r, strip, part in _sections(rows, columns, channels):
            each = x[..., strip, part].to(sums.dtype).square().sum(-2)
            sums[r].index_add_(0, index[part], each.movedim(-1, 0))
        return sums
    for r, s, here in _pieces(rows, columns, channels):
        sums[r, s] += _matrix(x[here]).square().sum(-1)
    return sums


def _squares_room(x: Tensor, rows: Sequence[int], columns: Sequence[int]) -> Tensor:
    return x.new_empty(len(rows) - 1, len(columns) - 1, *x.shape[:3], dtype=wide(x))


_squares_op.register_fake(_squares_room)


@torch.library.custom_op(
    "fullres::cell_weigh",
    mutates_args=(),
    schema="(Tensor m, Tensor x, int[] rows, int[] columns) -> Tensor",
)
@_without_autocast
def _weigh_op(m: Tensor, x: Tensor, rows: Sequence[int], columns: Sequence[int]) -> Tensor:
    out = _weigh_room(m, x, rows, columns)
    if _has_kernel(columns, x) and m.dtype == torch.float32:
        from fullres.ops import windows_cuda

        windows_cuda.weigh(m, x, rows, columns, out)
        return out
    channels = x.shape[:3].numel()
    if _narrow(columns):
        index = _column_index(columns, x.device)
        for r, strip, part in _sections(rows, columns, channels):
            y = m[r, index[part]] @ x[..., strip, part].movedim(-1, 0).to(m.dtype)
            out[..., strip, part] = y.movedim(0, -1)
        return out
    for r, s, here in _pieces(rows, columns, channels):
        out[here] = (m[r, s] @ _matrix(x[here])).reshape(out[here].shape)
    return out


def _weigh_room(m: Tensor, x: Tensor, rows: Sequence[int], columns: Sequence[int]) -> Tensor:
    batch, heads, _, height, width = x.shape
    d = m.shape[-2]
    if x.stride(2) == 1 != x.stride(4):
        return x.new_empty(batch, height, width, heads, d).permute(0, 3, 4, 1, 2)
    return x.new_empty(batch, heads, d, height, width)


_weigh_op.register_fake(_weigh_room)


def _matrix(x: Tensor) -> Tensor:
    """Positions of a part of a map in one row: (B, heads, c, h, w) to (B, heads, c, h * w)."""
    x = x.to(wide(x))
    # in channels-last memory, whole pixels are copied
    return x.movedim(2, -1).flatten(2, 3).mT if x.stride(2) == 1 else x.flatten(3)


def _has_kernel(columns: Sequence[int], *maps: Tensor) -> bool:
    """Whether a kernel on a GPU serves maps: of one type below float64, in cells that are wide."""
    x = maps[0]
    if not runs_triton(x) or _narrow(columns) or not x.numel():
        return False
    return x.dtype != torch.float64 and all(y.dtype == x.dtype for y in maps)


def _narrow(columns: Sequence[int]) -> bool:
    """Whether cells are so narrow that a product a cell would be a product of slivers."""
    return columns[-1] < _NARROW * (len(columns) - 1)


def _column_index(columns: Sequence[int], device: torch.device) -> Tensor:
    """Cell of each column of the map."""
    return torch.tensor(
        [n for n, (a, b) in enumerate(pairwise(columns)) for _ in range(a, b)], device=device
    )


def _pieces(
    rows: Sequence[int], columns: Sequence[int], channels: int
) -> Iterator[tuple[int, int, Part]]:
    """Row, column and place of each part of a cell that is multiplied at once."""
    positions = max(_PIECE // max(channels, 1), 2048)
    for r, (top, bottom) in enumerate(pairwise(rows)):
        for s, (left, right) in enumerate(pairwise(columns)):
            height = max(positions // (right - left), 1)
            for y in range(top, bottom, height):
                yield r, s, (..., slice(y, min(y + height, bottom)), slice(left, right))


def _sections(
    rows: Sequence[int], columns: Sequence[int], channels: int
) -> Iterator[tuple[int, slice, slice]]:
    """Row of cells and place of what is multiplied at once where cells are narrow."""
    positions = max(_PIECE // max(channels, 1), 2048)
    for r, (top, bottom) in enumerate(pairwise(rows)):
        width = max(positions // (bottom - top), 1)
        for x in range(0, columns[-1], width):
            yield r, slice(top, bottom), slice(x, min(x + width, columns[-1]))


# Derivatives ----------------------------------------------------------------------------------


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*(x for x in inputs if isinstance(x, Tensor)))
    ctx.borders = inputs[-2:]


def _keep_spans(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.borders = inputs[-2:]


def _span_sums_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    spans, covers = ctx.borders
    return span_sums(grad, covers, spans), None, None


def _gram_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    a, b = ctx.saved_tensors
    wanted = ctx.needs_input_grad
    grad_a = weigh(grad, b, *ctx.borders) if wanted[0] else None
    grad_b = weigh(grad.mT, a, *ctx.borders) if wanted[1] else None
    return grad_a, grad_b, None, None


def _squares_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    (x,) = ctx.saved_tensors
    return weigh((2 * grad).diag_embed(), x, *ctx.borders), None, None


def _weigh_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    m, x = ctx.saved_tensors
    wanted = ctx.needs_input_grad
    grad_m = gram(grad, x, *ctx.borders) if wanted[0] else None
    grad_x = weigh(m.mT, grad, *ctx.borders) if wanted[1] else None
    return grad_m, grad_x, None, None


_span_sums_op.register_autograd(_span_sums_backward, setup_context=_keep_spans)
_gram_op.register_autograd(_gram_backward, setup_context=_keep)
_squares_op.register_autograd(_squares_backward, setup_context=_keep)
_weigh_op.register_autograd(_weigh_backward, setup_context=_keep)
