"""Pyramid attention: every 3×3 patch of a map attends to the patches of all scales of the map.

With queries q, keys k and values v (PANet: Mei et al., *Pyramid Attention Networks for Image
Restoration*), position p attends to position j of the map resized by s with the score

    S(p, j) = softmax_scale · Σ_d q(p + d) · k_s(j + d) / max(‖patch of k_s at j‖, EPS),

d over the nine offsets of a patch and zero outside of the map. The softmax A of S, over all j of
all s, weighs patches of values, which are pasted over one another and divided by four:

    O(p) = ¼ Σ_d Σ_s Σ_j A(p - d, j) v_s(j + d).

Both sums over d run along diagonals of (p, j). So one product of pixels, q(p) · k_s(j), serves
nine patches, and so does one product of the diagonal sums of A with the values: nine times less
arithmetic than products of patches, and no patch is ever copied. Blocks of scores are computed
twice, once for the largest and the sum of each softmax and once for the weights, and kept nowhere.

The local form lets a position attend only to keys within a window: see `window_span`.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from fractions import Fraction
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fullres.ops import pyramid_blocks
from fullres.ops.arrays import refuse_forward_derivatives
from fullres.ops.pyramid_blocks import Level, Span

Size = tuple[int, int]

SCALES = (1.0, 0.9, 0.8, 0.7, 0.6)
"""Scales of the publication."""
EPS = 1e-4
"""Smallest norm that a patch of keys is divided by."""
BUDGET = {"cpu": 2**25, "cuda": 2**30}
"""Default bytes of working memory by type of device."""


def pyramid_attention(
    q: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    *,
    window: Size | None = None,
    scales: Sequence[float] = SCALES,
    softmax_scale: float = 10.0,
    budget: int | None = None,
) -> Tensor:
    """Patches attend to the patches of all scales, in memory linear in the pixels.

    The direct form needs a matrix of all pixels by all keys; this one the maps, a copy of keys and
    values, and `budget`. In float32 or better throughout. First derivatives, recomputed, in
    reverse mode.

    Args:
        q: queries (B, c, H, W) of a floating-point type, any values.
        keys: one map (B, c, h, w) a scale, the first of the size of `q`.
        values: one map (B, C, h, w) a scale, of the sizes of `keys`.
        window: height and width in positions of the queries' map, clipped to it; None for the
            whole of every scale.
        scales: size of each map of keys over that of the queries'; the first is 1.
        softmax_scale: factor of the scores.
        budget: bytes of working memory for blocks of scores, beside maps; a single position of
            each picture takes at least 1 KB or so. `BUDGET` if None.

    Returns:
        Attended values (B, C, H, W), channels-last, in the type of the first values.

    Raises:
        ValueError: shapes or types do not fit, the window is below 1, or a scale is not in (0, 1].

    >>> q, v = torch.rand(1, 4, 20, 30), torch.rand(1, 8, 20, 30)
    >>> half_q, half_v = q[..., ::2, ::2], v[..., ::2, ::2]
    >>> pyramid_attention(q, [q, half_q], [v, half_v], scales=[1, 0.5], window=(9, 9)).shape
    torch.Size([1, 8, 20, 30])
    """
    window = _checked(q, keys, values, window, scales)
    refuse_forward_derivatives("pyramid attention")
    wide = torch.promote_types(q.dtype, torch.float32)
    sizes = [side for k in keys for side in k.shape[-2:]]
    factor = torch.cat([(softmax_scale / _norms(k.to(wide))).flatten(1) for k in keys], 1)
    k, v = (torch.cat([x.flatten(2).mT.to(wide) for x in maps], 1) for maps in (keys, values))
    if budget is None:
        budget = BUDGET.get(q.device.type, BUDGET["cpu"])
    out: Tensor = torch.ops.fullres.pyramid_attention(
        q.to(wide), k, factor, v, sizes, [float(s) for s in scales], list(window), budget
    )[0]
    return out.permute(0, 3, 1, 2).to(values[0].dtype)


def pyramid_attention_reference(
    q: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    *,
    window: Size | None = None,
    scales: Sequence[float] = SCALES,
    softmax_scale: float = 10.0,
) -> Tensor:
    """The direct form of `pyramid_attention`: patches copied, one matrix of all scores.

    Arguments, result and errors as there; in the inputs' type, memory quadratic in the pixels.
    """
    window = _checked(q, keys, values, window, scales)
    height, width = q.shape[-2:]
    patches, k, v = (
        torch.cat([F.unfold(x, 3, padding=1) for x in maps], -1) for maps in ([q], keys, values)
    )  # (B, 9c, positions)
    k = k / k.norm(dim=1, keepdim=True).clamp_min(EPS)
    scores = softmax_scale * patches.mT @ k  # (B, H*W, keys of all scales)
    seen = []
    for map_, scale in zip(keys, scales, strict=True):
        rows, columns = (
            _seen(window_spans(side, k, resized, scale), resized)
            for side, k, resized in zip((height, width), window, map_.shape[-2:], strict=True)
        )
        seen.append(
            (rows[:, None, :, None] & columns[None, :, None, :]).reshape(height * width, -1)
        )
    scores = scores.masked_fill(~torch.cat(seen, 1).to(q.device), -torch.inf)
    pasted = (scores.softmax(-1) @ v.mT).mT
    return F.fold(pasted, (height, width), 3, padding=1) / 4


def window_span(span: Span, length: int, resized: int, scale: float) -> Span:
    """Positions of a resized axis that a window on the axis covers, as (first, first after it).

    Those whose centres lie in the window: the centre of position j is at (j + ½) / scale where that
    of position p of the axis itself is at p + ½, and the window from `first` to `last - 1` reaches
    from `first` up to, but not including, `last`. A window that reaches the end of the axis takes
    all that remain. It may hold none. At scale 1 these are the window's own positions.

    Args:
        span: the window on the axis, as (first, first after it).
        length: positions of the axis.
        resized: positions of the resized axis.
        scale: `resized / length`, but for rounding.

    >>> window_span((10, 20), 48, 43, 0.9)
    (9, 18)
    >>> window_span((38, 48), 48, 43, 0.9)
    (34, 43)
    """
    n, d = _ratio(scale)
    # the smallest j with (j + 1/2) / scale >= first
    first, last = (max(-((d - 2 * edge * n) // (2 * d)), 0) for edge in span)
    last = resized if span[1] >= length else min(last, resized)
    return min(first, last), last


def window_spans(length: int, window: int, resized: int, scale: float) -> list[Span]:
    """Positions of a resized axis that each position of an axis attends to.

    The window around a position lies wholly on the axis: it starts `(window - 1) // 2` before the
    position, or as near to that as the ends allow.

    >>> window_spans(5, 3, 5, 1.0)
    [(0, 3), (0, 3), (1, 4), (2, 5), (2, 5)]
    """
    window = min(window, length)
    starts = [min(max(p - (window - 1) // 2, 0), length - window) for p in range(length)]
    return [window_span((a, a + window), length, resized, scale) for a in starts]


@functools.cache
def _ratio(scale: float) -> tuple[int, int]:
    ratio = Fraction(scale).limit_denominator(1000)
    return ratio.numerator, ratio.denominator


def _seen(spans: Sequence[Span], resized: int) -> Tensor:
    first, last = torch.tensor(spans).unsqueeze(-1).unbind(1)
    position = torch.arange(resized)
    return (first <= position) & (position < last)


def _norms(k: Tensor) -> Tensor:
    """Norm of each patch (B, h, w), at least `EPS`."""
    squares = F.pad(k.square().sum(1), (1, 1, 1, 1))
    for dim in (1, 2):
        squares = squares.unfold(dim, 3, 1).sum(-1)
    return squares.clamp_min(EPS**2).sqrt()


def _checked(
    q: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    window: Size | None,
    scales: Sequence[float],
) -> Size:
    """The window, clipped to the map."""
    if q.dim() != 4 or not q.is_floating_point():
        raise ValueError(f"q must be floating-point maps (B, C, H, W), not {q.dtype} {q.dim()}-d")
    if not 1 <= len(scales) == len(keys) == len(values):
        raise ValueError(
            f"each scale needs a map of keys and one of values, not {len(scales)} scales, "
            f"{len(keys)} and {len(values)} maps"
        )
    if scales[0] != 1 or any(not 0 < s <= 1 for s in scales):
        raise ValueError(f"scales start with 1 and lie above 0 and up to 1, not {tuple(scales)}")
    if keys[0].shape != q.shape:
        raise ValueError(
            f"the first keys must be of the queries' shape, {tuple(q.shape)}, "
            f"not {tuple(keys[0].shape)}"
        )
    for k, v in zip(keys, values, strict=True):
        alike = k.dim() == v.dim() == 4 and k.shape[:2] == q.shape[:2]
        alike = alike and v.shape[:2] == values[0].shape[:2] and v.shape[0] == q.shape[0]
        if not alike or k.shape[2:] != v.shape[2:] or not k.dtype == v.dtype == q.dtype:
            raise ValueError(
                "keys and values must be maps of one type, number of pictures and of channels, "
                f"and of one size at each scale, not {tuple(k.shape)} and {tuple(v.shape)}"
            )
    height, width = q.shape[-2:]
    kh, kw = (height, width) if window is None else window
    if kh < 1 or kw < 1:
        raise ValueError(f"a window is at least 1 × 1, got {kh} × {kw}")
    return min(kh, height), min(kw, width)


# Operators ------------------------------------------------------------------------------------
# Of all scales one after the other, in pixels: keys (B, N, c), factors of their scores (B, N) and
# values (B, N, C); sizes are the heights and widths of the scales in turn. The result is (B, H, W,
# C), with the largest score and the sum of exponentials of each softmax, (B, H, W).


@torch.library.custom_op(
    "fullres::pyramid_attention",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor factor, Tensor v, int[] sizes, float[] scales, "
    "int[] window, int budget) -> (Tensor, Tensor, Tensor)",
)
def _attention(
    q: Tensor,
    k: Tensor,
    factor: Tensor,
    v: Tensor,
    sizes: Sequence[int],
    scales: Sequence[float],
    window: Sequence[int],
    budget: int,
) -> tuple[Tensor, Tensor, Tensor]:
    levels = _levels(q, sizes, scales, window)
    if q.device.type != "cpu" or q.dtype != torch.float32:
        return pyramid_blocks.attend(q, k, factor, v, levels, budget)
    from fullres.ops import pyramid_cpu

    return pyramid_cpu.attend(q, k, factor, v, levels)


@_attention.register_fake
def _attention_fake(
    q: Tensor, k: Tensor, factor: Tensor, v: Tensor, *options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    batch, _, height, width = q.shape
    out = q.new_empty(batch, height, width, v.shape[2])
    return out, q.new_empty(batch, height, width), q.new_empty(batch, height, width)


@torch.library.custom_op(
    "fullres::pyramid_attention_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor q, Tensor k, Tensor factor, Tensor v, Tensor top, Tensor total, "
    "int[] sizes, float[] scales, int[] window, int budget) -> (Tensor, Tensor, Tensor, Tensor)",
)
def _attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    factor: Tensor,
    v: Tensor,
    top: Tensor,
    total: Tensor,
    sizes: Sequence[int],
    scales: Sequence[float],
    window: Sequence[int],
    budget: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    levels = _levels(q, sizes, scales, window)
    return pyramid_blocks.gradients(grad, q, k, factor, v, top, total, levels, budget)


@_attention_backward.register_fake
def _attention_backward_fake(
    grad: Tensor, q: Tensor, k: Tensor, factor: Tensor, v: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        torch.empty_like(q, memory_format=torch.channels_last),
        k.new_empty(k.shape),
        factor.new_empty(factor.shape),
        v.new_empty(v.shape),
    )


def _levels(
    q: Tensor, sizes: Sequence[int], scales: Sequence[float], window: Sequence[int]
) -> list[Level]:
    shapes = list(zip(sizes[::2], sizes[1::2], strict=True))
    edges = [0]
    for h, w in shapes:
        edges.append(edges[-1] + h * w)
    levels = []
    for (h, w), scale, (first, last) in zip(shapes, scales, pairwise(edges), strict=True):
        rows = window_spans(q.shape[2], window[0], h, scale)
        columns = window_spans(q.shape[3], window[1], w, scale)
        levels.append(Level(h, w, rows, columns, first, last))
    return levels


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    tensors, ctx.options = inputs[:4], inputs[4:]
    _, top, total = output
    ctx.mark_non_differentiable(top, total)
    ctx.save_for_backward(*tensors, top, total)


def _backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    gradients = torch.ops.fullres.pyramid_attention_backward(
        grad.contiguous(), *ctx.saved_tensors, *ctx.options
    )
    return (*gradients, None, None, None, None)


_attention.register_autograd(_backward, setup_context=_keep)
