"""GRL, plain: Li et al., CVPR 2023, section 3, with windows as in Swin Transformer V2.

The picture is padded to whole windows and stripes, shifted windows are made by rolling the map,
and what a roll brings together is kept apart by a mask. Only for stripes of fixed size.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fullres.networks.grl import (
    GRL,
    ChannelAttention,
    ChannelAttentionBlock,
    LinearOfMap,
    Mlp,
    TransformerBlock,
    TransformerStage,
)
from fullres.networks.grl_attention import (
    AffineTransform,
    AnchorLinear,
    AnchorProjection,
    MixedAttention,
    PatchMerging,
    QKVProjection,
    StripeAttention,
    WindowAttention,
    to_map,
    to_tokens,
)
from fullres.networks.layers import pad_to_multiple

Size = tuple[int, int]

FORBIDDEN = -100.0
"""Added to what must not attend."""


def parted(x: Tensor, window: Size) -> Tensor:
    """Windows of (B, H, W, C): (windows, positions, C)."""
    batch, height, width, channels = x.shape
    h, w = window
    x = x.view(batch, height // h, h, width // w, w, channels)
    return x.permute(0, 1, 3, 2, 4, 5).reshape(-1, h * w, channels)


def put_together(x: Tensor, window: Size, size: Size) -> Tensor:
    """The reverse of `parted`."""
    (h, w), (height, width) = window, size
    x = x.view(-1, height // h, width // w, h, w, x.shape[-1])
    return x.permute(0, 1, 3, 2, 4, 5).reshape(-1, height, width, x.shape[-1])


def by_head(x: Tensor, heads: int) -> Tensor:
    """(windows, positions, heads * c) to (windows, heads, positions, c)."""
    return x.view(*x.shape[:2], heads, -1).transpose(1, 2)


@lru_cache(maxsize=64)
def index(queries: Size, keys: Size) -> np.ndarray:
    """For each query and key, the element of the table of relative positions."""
    rows, columns = (
        np.arange(q)[:, None] - np.arange(k) + k - 1 for q, k in zip(queries, keys, strict=True)
    )
    wide = queries[1] + keys[1] - 1
    both = rows[:, None, :, None] * wide + columns[None, :, None, :]
    return both.reshape(math.prod(queries), math.prod(keys))


@lru_cache(maxsize=64)
def relative_positions(window: Size, keys: Size) -> np.ndarray:
    """Rows and columns, log-spaced: (rows, columns, 2), in the order that `index` counts.

    Swin Transformer V2, equation 4; the grids of both are centred on each other, and the largest
    position of the window counts as 8.
    """
    axes = []
    for length, fewer in zip(window, keys, strict=True):
        overhang = (length - fewer) // 2
        highest = length - 1 - overhang
        x = np.arange(1 - fewer - overhang, highest + 1) * 8 / max(highest, 1)
        axes.append(np.sign(x) * np.log2(np.abs(x) + 1) / np.log2(8))
    return np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1)


@lru_cache(maxsize=64)
def mask(
    sizes: tuple[Size, Size], windows: tuple[Size, Size], shifts: tuple[Size, Size]
) -> np.ndarray:
    """What keeps apart queries and keys that a roll brought into one window.

    Args:
        sizes: of the map of queries and of that of keys.
        windows: height and width of a window in each.
        shifts: of each.
    """
    labels = []
    for (height, width), (h, w), shift in zip(sizes, windows, shifts, strict=True):
        rows, columns = (
            (np.arange(length) >= length - side).astype(int) + (np.arange(length) >= length - by)
            for length, side, by in ((height, h, shift[0]), (width, w, shift[1]))
        )
        label = rows[:, None] * 3 + columns
        label = label.reshape(height // h, h, width // w, w).swapaxes(1, 2)
        labels.append(label.reshape(-1, h * w))
    apart = labels[0][:, :, None] != labels[1][:, None, :]
    return np.where(apart, np.float32(FORBIDDEN), np.float32(0))


def weights(
    transform: AffineTransform,
    q: Tensor,
    k: Tensor,
    grids: tuple[Size, Size],
    apart: np.ndarray | None,
) -> Tensor:
    """Softmax of cosines, scaled, with biases and mask: (windows, heads, queries, keys)."""
    cosines = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1)
    scale = torch.clamp(transform.logit_scale, max=math.log(100)).exp()
    positions = torch.from_numpy(relative_positions(*sorted(grids, reverse=True))).to(q)
    table = transform.cpb_mlp(positions).flatten(0, 1)
    place = torch.from_numpy(index(*grids)).to(q.device)
    bias = table[place].permute(2, 0, 1)  # (heads, queries, keys)
    x = cosines * scale + 16 * torch.sigmoid(bias)
    if apart is not None:
        added = torch.from_numpy(apart)[None, :, None].to(x)
        x = x.view(-1, len(apart), *x.shape[1:]) + added
        x = x.flatten(0, 1)
    return x.softmax(dim=-1)


def rolled(x: Tensor, shift: Size) -> Tensor:
    return x.roll((-shift[0], -shift[1]), dims=(1, 2)) if any(shift) else x


def window_attention(self: WindowAttention, qkv: Tensor) -> Tensor:
    tokens = to_tokens(qkv)
    size, heads = (tokens.shape[1], tokens.shape[2]), len(self.attn_transform.logit_scale)
    windows = parted(rolled(tokens, self.shift), self.window)
    q, k, v = (by_head(x, heads) for x in windows.chunk(3, dim=-1))
    apart = mask((size,) * 2, (self.window,) * 2, (self.shift,) * 2) if any(self.shift) else None
    y = weights(self.attn_transform, q, k, (self.window,) * 2, apart) @ v
    y = put_together(y.transpose(1, 2).flatten(2), self.window, size)
    return to_map(rolled(y, (-self.shift[0], -self.shift[1])))


def stripe_attention(self: StripeAttention, qkv: Tensor, anchors: Tensor) -> Tensor:
    tokens, few = to_tokens(qkv), to_tokens(anchors)
    heads = len(self.attn_transform1.logit_scale)
    sizes = tuple((x.shape[1], x.shape[2]) for x in (tokens, few))
    sides = [axis.at(n, self.down) for axis, n in zip(self.axes, sizes[0], strict=True)]
    stripe, shift = zip(*sides, strict=True)
    stripes, shifts = (
        (pair, tuple(side // self.down for side in pair)) for pair in (stripe, shift)
    )
    q, k, v = (by_head(x, heads) for x in parted(rolled(tokens, shift), stripe).chunk(3, dim=-1))
    a = by_head(parted(rolled(few, shifts[1]), stripes[1]), heads)
    apart = mask(sizes[::-1], stripes[::-1], shifts[::-1]) if any(shift) else None
    y = weights(self.attn_transform1, a, k, stripes[::-1], apart) @ v
    apart = mask(sizes, stripes, shifts) if any(shift) else None
    y = weights(self.attn_transform2, q, a, stripes, apart) @ y
    y = put_together(y.transpose(1, 2).flatten(2), stripe, sizes[0])
    return to_map(rolled(y, (-shift[0], -shift[1])))


def projection(self: QKVProjection, tokens: Tensor) -> Tensor:
    linear = isinstance(self.body, nn.Linear)
    return to_map(self.body(tokens)) if linear else self.body(to_map(tokens))


def anchor_linear(self: AnchorLinear, x: Tensor) -> Tensor:
    return to_map(self.reduction(to_tokens(self.pooling(x))))


def patch_merging(self: PatchMerging, x: Tensor) -> Tensor:
    corners = [x[:, :, row::2, column::2] for column in (0, 1) for row in (0, 1)]
    return to_map(self.reduction(to_tokens(torch.cat(corners, dim=1))))


def anchor_projection(self: AnchorProjection, x: Tensor) -> Tensor:
    for stage in self.body:
        x = stage(x)
    return x


def mixed_attention(self: MixedAttention, tokens: Tensor) -> Tensor:
    windows, stripes = self.qkv(tokens).chunk(2, dim=1)
    stripes = self.stripe_attn(stripes, self.anchor(to_map(tokens)))
    y = torch.cat([self.window_attn(windows), stripes], dim=1)
    return self.proj(to_tokens(y))


def channel_attention(self: ChannelAttention, x: Tensor) -> Tensor:
    return x * self.attention(x)


def channel_attention_block(self: ChannelAttentionBlock, x: Tensor) -> Tensor:
    return self.cab(x)


def mlp(self: Mlp, tokens: Tensor) -> Tensor:
    return self.fc2(F.gelu(self.fc1(tokens)))


def block(self: TransformerBlock, tokens: Tensor) -> Tensor:
    y = tokens + self.norm1(self.attn(tokens))
    if self.conv is not None:
        y = y + to_tokens(self.conv(to_map(tokens)))
    return y + self.norm2(self.mlp(y))


def stage(self: TransformerStage, tokens: Tensor) -> Tensor:
    y = tokens
    for part in self.blocks:
        y = part(y)
    return to_tokens(self.conv(to_map(y))) + tokens


def linear_of_map(self: LinearOfMap, x: Tensor) -> Tensor:
    return to_map(F.linear(to_tokens(x), self.weight, self.bias))


def multiple_of(self: GRL) -> int:
    """Side that windows and stripes of both directions divide."""
    sides = {1}
    for part in self.modules():
        if isinstance(part, WindowAttention):
            sides.update(part.window)
        elif isinstance(part, StripeAttention):
            sides.update(axis.length for axis in part.axes)
    return math.lcm(*sides)


def network(self: GRL, image: Tensor) -> Tensor:
    height, width = image.shape[-2:]
    image = pad_to_multiple(image, multiple_of(self))
    image = (image - self.mean) * self.img_range
    first = self.conv_first(image)
    tokens = self.norm_start(to_tokens(first))
    for layer in self.layers:
        tokens = layer(tokens)
    x = self.conv_after_body(to_map(self.norm_end(tokens))) + first
    x = reconstructed(self, x)
    if self.residual:
        x = image + x
    x = x / self.img_range + self.mean
    scale = x.shape[-1] // image.shape[-1]
    return x[:, :, : height * scale, : width * scale]


def reconstructed(self: GRL, x: Tensor) -> Tensor:
    if self.upsampler == "pixelshuffledirect":
        return self.upsample(x)
    if self.upsampler == "pixelshuffle":
        x = self.upsample(self.conv_before_upsample(x))
    elif self.upsampler == "nearest+conv":
        x = self.conv_before_upsample(x)
        for conv in (self.conv_up1, self.conv_up2):
            x = F.leaky_relu(conv(F.interpolate(x, scale_factor=2, mode="nearest")), 0.2)
        x = F.leaky_relu(self.conv_hr(x), 0.2)
    return self.conv_last(x)


FORMS = {
    WindowAttention: window_attention,
    StripeAttention: stripe_attention,
    QKVProjection: projection,
    AnchorLinear: anchor_linear,
    PatchMerging: patch_merging,
    AnchorProjection: anchor_projection,
    MixedAttention: mixed_attention,
    ChannelAttention: channel_attention,
    ChannelAttentionBlock: channel_attention_block,
    Mlp: mlp,
    TransformerBlock: block,
    TransformerStage: stage,
    LinearOfMap: linear_of_map,
    GRL: network,
}
