"""The attention of GRL: within windows and, through anchors, within stripes.

Tokens are (B, H, W, C), maps (B, C, H, W) of the same memory.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fullres.networks.layers import local_already, sharing
from fullres.ops.arrays import traced
from fullres.ops.stripes import anchored_attention, window_attention

Size = tuple[int, int]
Qkv = Literal["linear", "separable_conv"]
Anchor = Literal["avgpool", "maxpool", "conv2d", "separable_conv", "patchmerging"]

TABLES = 64
"""Tables of relative positions that are kept, the last ones used."""


def to_map(tokens: Tensor) -> Tensor:
    """(B, H, W, C) to (B, C, H, W), the same memory."""
    return tokens.permute(0, 3, 1, 2)


def to_tokens(x: Tensor) -> Tensor:
    """(B, C, H, W) to (B, H, W, C), the same memory."""
    return x.permute(0, 2, 3, 1)


def relative_positions(window: Size, keys: Size, like: Tensor) -> Tensor:
    """Relative positions within a window, log-spaced as in Swin Transformer V2 (equation 4).

    Every query of a window of `window` against every key of one of `keys`, or the other way
    round, each counted in its own grid, the grids centred on each other. The largest is mapped to
    `log2(9) / 3`. The same window gives the same tensor, which is not to be written to.

    Args:
        window: height and width of the larger window.
        keys: those of the smaller one, or the same.
        like: a tensor of the type and device wanted.

    Returns:
        Rows and columns, (window height + keys height - 1, window width + keys width - 1, 2).

    >>> relative_positions((3, 1), (3, 1), torch.empty(0))[:, 0, 0]
    tensor([-1.0566, -0.7740,  0.0000,  0.7740,  1.0566])
    """
    # a tensor made while tracing, or a fake one, must not outlast the trace
    passing = type(like) is not Tensor or traced()
    positions = _relative_positions if passing else _kept_relative_positions
    return positions(window, keys, like.dtype, like.device)


def _relative_positions(
    window: Size, keys: Size, dtype: torch.dtype, device: torch.device
) -> Tensor:
    axes = []
    for length, fewer in zip(window, keys, strict=True):
        overhang = (length - fewer) // 2
        highest = length - 1 - overhang
        x = np.arange(1 - fewer - overhang, highest + 1) * (8 / max(highest, 1))
        axes.append(np.sign(x) * np.log2(np.abs(x) + 1) / 3)
    table = np.stack(np.meshgrid(*axes, indexing="ij"), -1)
    return torch.as_tensor(table, dtype=dtype, device=device)


@lru_cache(maxsize=TABLES)
def _kept_relative_positions(
    window: Size, keys: Size, dtype: torch.dtype, device: torch.device
) -> Tensor:
    with torch.inference_mode(False):  # so that it serves later passes with gradients as well
        return _relative_positions(window, keys, dtype, device)


class AffineTransform(nn.Module):
    """What becomes of cosines before the softmax: a factor for each head and a bias.

    The bias is a small network's function of log-spaced relative positions, from 0 to 16.
    """

    def __init__(self, heads: int, hidden: int = 512) -> None:
        super().__init__()
        self.logit_scale = nn.Parameter(torch.full((heads, 1, 1), math.log(10)))
        self.cpb_mlp = nn.Sequential(
            nn.Linear(2, hidden), nn.ReLU(inplace=True), nn.Linear(hidden, heads, bias=False)
        )

    def forward(self, window: Size, keys: Size, like: Tensor) -> tuple[Tensor, Tensor]:
        """The factors, (heads, 1, 1), and the table of biases, (heads, rows, columns)."""
        bias = self.cpb_mlp(relative_positions(window, keys, like))
        return self.logit_scale.clamp(max=math.log(100)).exp(), 16 * bias.sigmoid().permute(2, 0, 1)


class WindowAttention(nn.Module):
    """Attention within windows: queries, keys and values (B, 3C, H, W) to (B, C, H, W)."""

    def __init__(self, heads: int, window: int, shifted: bool) -> None:
        super().__init__()
        self.window = (window, window)
        self.shift = (window // 2, window // 2) if shifted else (0, 0)
        self.attn_transform = AffineTransform(heads)

    def forward(self, qkv: Tensor) -> Tensor:
        scale, bias = self.attn_transform(self.window, self.window, qkv)
        return window_attention(qkv, self.window, self.shift, scale, bias)


@dataclass(frozen=True)
class StripeAxis:
    """How stripes tile one axis of a map."""

    length: int | None
    """Positions of a stripe; None where it takes a fraction of the map."""
    groups: int
    """Stripes that a map of any length is cut into, where they have no fixed length."""
    shifted: bool
    """Whether borders lie half a stripe further on."""

    def at(self, positions: int, down: int) -> tuple[int, int]:
        """Length of a stripe, whole cells of `down`, and shift on a map of so many positions."""
        length = self.length
        if length is None:
            length = down * -(-positions // (down * self.groups))
        return length, length // 2 if self.shifted else 0


def stripe_axes(
    block: int, sizes: Sequence[int | None], groups: Sequence[int | None], shift: bool
) -> tuple[StripeAxis, StripeAxis]:
    """How the stripes of a stage's block tile the map: those of every other block lie across."""
    shifted = shift and block % 4 >= 2
    rows, columns = (
        StripeAxis(size, 1, shifted)
        if group is None
        else StripeAxis(None, group, shifted and group > 1)
        for size, group in zip(sizes, groups, strict=True)
    )
    return (rows, columns) if block % 2 == 0 else (columns, rows)


class StripeAttention(nn.Module):
    """Anchored stripe attention (section 3.2) in stripes of fixed size.

    Queries, keys and values (B, 3C, H, W) and anchors (B, C, ceil(H / down), ceil(W / down)) to
    (B, C, H, W).
    """

    def __init__(self, heads: int, axes: tuple[StripeAxis, StripeAxis], down: int) -> None:
        super().__init__()
        self.axes = axes
        self.down = down
        self.attn_transform1 = AffineTransform(heads)
        self.attn_transform2 = AffineTransform(heads)

    def forward(self, qkv: Tensor, anchors: Tensor) -> Tensor:
        rows, columns = self.axes
        height, down_by = rows.at(qkv.shape[2], self.down)
        width, right_by = columns.at(qkv.shape[3], self.down)
        stripe, few = (height, width), (height // self.down, width // self.down)
        gather, gather_bias = self.attn_transform1(stripe, few, qkv)
        spread, spread_bias = self.attn_transform2(stripe, few, qkv)
        return anchored_attention(
            qkv,
            anchors,
            self.down,
            stripe,
            (down_by, right_by),
            (gather, spread),
            (gather_bias, spread_bias),
        )

    def extra_repr(self) -> str:
        sides = (
            f"1/{axis.groups}" if axis.length is None else f"{axis.length}" for axis in self.axes
        )
        return f"stripe={'×'.join(sides)}"


class GlobalStripeAttention(StripeAttention):
    """Anchored stripe attention in stripes that take a fraction of the map: a global operation."""

    def to_local(self, window: Size, feature_size: Size) -> LocalStripeAttention:
        """The same attention in stripes of a fixed size, sharing the parameters of this one.

        Args:
            window: not used, since how far a stripe reaches is part of what was trained.
            feature_size: height and width of the map at the training size: stripes keep the
                length that they have there.
        """
        rows, columns = (
            replace(axis, length=axis.at(positions, self.down)[0])
            for axis, positions in zip(self.axes, feature_size, strict=True)
        )
        return sharing(self, LocalStripeAttention, axes=(rows, columns))


class LocalStripeAttention(StripeAttention):
    """Anchored stripe attention in stripes that were a fraction of the map."""

    def to_local(self, window: Size, feature_size: Size) -> LocalStripeAttention:
        """Refused: it is local.

        Raises:
            ConversionError: always.
        """
        raise local_already(self)


def stripe_attention(heads: int, axes: tuple[StripeAxis, StripeAxis], down: int) -> StripeAttention:
    """Anchored stripe attention, of the class that has a local form if the stripes are global."""
    fixed = all(axis.length is not None for axis in axes)
    return (StripeAttention if fixed else GlobalStripeAttention)(heads, axes, down)


class SeparableConv(nn.Sequential):
    """A depthwise and a 1×1 convolution: map to map."""

    def __init__(
        self, channels: int, out: int, kernel: int = 3, stride: int = 1, bias: bool = True
    ) -> None:
        super().__init__(
            nn.Conv2d(channels, channels, kernel, stride, kernel // 2, groups=channels, bias=bias),
            nn.Conv2d(channels, out, 1, bias=bias),
        )


class QKVProjection(nn.Module):
    """Queries, keys and values of both attentions: tokens of C channels to maps of 3C."""

    def __init__(self, dim: int, bias: bool, kind: Qkv) -> None:
        super().__init__()
        self.body: nn.Module
        if kind == "linear":
            self.body = nn.Linear(dim, 3 * dim, bias=bias)
        else:
            self.body = SeparableConv(dim, 3 * dim, bias=bias)

    def forward(self, tokens: Tensor) -> Tensor:
        linear = isinstance(self.body, nn.Linear)
        return to_map(self.body(tokens)) if linear else self.body(to_map(tokens))


class AnchorLinear(nn.Module):
    """Anchors by pooling, each over what its cell has of the map, then a linear layer."""

    def __init__(self, dim: int, down: int, pooling: Literal["avgpool", "maxpool"]) -> None:
        super().__init__()
        self.pooling = (nn.AvgPool2d if pooling == "avgpool" else nn.MaxPool2d)(
            down, ceil_mode=True
        )
        self.reduction = nn.Linear(dim, dim // 2)

    def forward(self, x: Tensor) -> Tensor:
        return to_map(self.reduction(to_tokens(self.pooling(x))))


class PatchMerging(nn.Module):
    """Anchors from the channels of 2 × 2 positions: map to map, zeros beyond the border."""

    def __init__(self, dim: int, out: int) -> None:
        super().__init__()
        self.reduction = nn.Linear(4 * dim, out, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(x, (0, x.shape[3] % 2, 0, x.shape[2] % 2))
        corners = [x[:, :, row::2, column::2] for column in (0, 1) for row in (0, 1)]
        return to_map(self.reduction(to_tokens(torch.cat(corners, 1))))


class AnchorProjection(nn.Module):
    """Anchors: maps of C channels to maps of C / 2 with a cell of `down` × `down` an anchor.

    Raises:
        ValueError: that kind does not reduce by that factor in that many stages.
    """

    def __init__(self, dim: int, kind: Anchor, one_stage: bool, down: int) -> None:
        super().__init__()
        half, stages = dim // 2, 1 if one_stage else down.bit_length() - 1
        if kind in ("avgpool", "maxpool"):
            if not one_stage:
                raise ValueError(f"anchor_one_stage must be true for {kind} anchors")
            self.body = nn.ModuleList([AnchorLinear(dim, down, kind)])
            return
        by = down if one_stage else 2
        if by % 2 or (kind == "patchmerging" and by != 2) or by**stages != down:
            raise ValueError(
                f"anchor_window_down_factor of {down} is not for {kind} anchors in "
                f"{'one stage' if one_stage else 'stages of 2'}"
            )
        self.body = nn.ModuleList()
        for channels in (dim, *[half] * (stages - 1)):
            if kind == "patchmerging":
                self.body.append(PatchMerging(channels, half))
            elif kind == "conv2d":
                self.body.append(nn.Conv2d(channels, half, by + 1, by, (by + 1) // 2))
            else:
                self.body.append(SeparableConv(channels, half, by + 1, by))

    def forward(self, x: Tensor) -> Tensor:
        for stage in self.body:
            x = stage(x)
        return x


class MixedAttention(nn.Module):
    """Attention within windows for half of the channels, within stripes for the others.

    Tokens (B, H, W, dim) to the same.
    """

    def __init__(
        self,
        dim: int,
        qkv: QKVProjection,
        anchor: AnchorProjection,
        window_attn: WindowAttention,
        stripe_attn: StripeAttention,
    ) -> None:
        super().__init__()
        self.qkv = qkv
        self.anchor = anchor
        self.window_attn = window_attn
        self.stripe_attn = stripe_attn
        self.proj = nn.Linear(dim, dim)

    def forward(self, tokens: Tensor) -> Tensor:
        windows, stripes = self.qkv(tokens).chunk(2, 1)
        stripes = self.stripe_attn(stripes, self.anchor(to_map(tokens)))
        y: Tensor = self.proj(to_tokens(torch.cat([self.window_attn(windows), stripes], 1)))
        return y
