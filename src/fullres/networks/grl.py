"""GRL: *Efficient and Explicit Modelling of Image Hierarchies for Image Restoration* (Li, Fan,
Xiang, Demandolx, Ranjan, Timofte, Van Gool; CVPR 2023).

Transformer blocks at the picture's own resolution, with attention within windows (regional),
anchored attention within stripes (global), and, in the base size, convolutions with channel
attention (local). Global operations are the mean of channel attention, and stripes whose length
is a fraction of the map.

Attention never looks beyond the border: a picture of any size is restored as it is. Where windows
and stripes tile it, results are those of the published code; elsewhere that pads the picture. Where
half a stripe is shorter than an anchor's cell, stripes are not shifted (the published code then
lets opposite borders meet).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fullres.networks.grl_attention import (
    Anchor,
    AnchorProjection,
    MixedAttention,
    Qkv,
    QKVProjection,
    WindowAttention,
    stripe_attention,
    stripe_axes,
    to_map,
    to_tokens,
)
from fullres.networks.grl_checkpoint import (
    TASKS,
    hyperparameters_of,
    published_as,
    spec_of,
    without_tables,
)
from fullres.networks.grl_checks import check_sizes, check_stages, check_windows
from fullres.networks.layers import Conv2d
from fullres.networks.spec import Architecture

Conv = Literal["1conv", "3conv", "1conv1x1", "linear"]
Upsampler = Literal["", "pixelshuffle", "pixelshuffledirect", "nearest+conv"]

RGB_MEAN = (0.4488, 0.4371, 0.4040)
"""Taken off colour pictures first and added back last."""
RECONSTRUCTION = 64
"""Channels from which an upsampled picture is made."""


class ChannelAttention(nn.Module):
    """A factor for each channel from the channels' means: (B, channels, H, W) to the same."""

    def __init__(self, channels: int, reduction: int) -> None:
        super().__init__()
        self.attention = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(channels, channels // reduction, 1),
            nn.ReLU(inplace=True),
            nn.Conv2d(channels // reduction, channels, 1),
            nn.Sigmoid(),
        )

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.attention(x)
        return x * y


class ChannelAttentionBlock(nn.Module):
    """Two convolutions through a quarter of the channels, then channel attention."""

    def __init__(self, channels: int, compress: int = 4, reduction: int = 18) -> None:
        super().__init__()
        self.cab = nn.Sequential(
            Conv2d(channels, channels // compress, 3, padding=1),
            nn.GELU(),
            Conv2d(channels // compress, channels, 3, padding=1),
            ChannelAttention(channels, reduction),
        )

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.cab(x)
        return y


class Mlp(nn.Module):
    """The feed-forward part, at each position."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(channels, hidden)
        self.fc2 = nn.Linear(hidden, channels)

    def forward(self, tokens: Tensor) -> Tensor:
        y: Tensor = self.fc2(F.gelu(self.fc1(tokens)))
        return y


class TransformerBlock(nn.Module):
    """Attention beside convolutions, then feed-forward: tokens (B, H, W, C) to the same.

    Each part is normalised behind, not before, and added to its input.
    """

    def __init__(self, channels: int, attn: MixedAttention, local: bool, hidden: int) -> None:
        super().__init__()
        self.attn = attn
        self.norm1 = nn.LayerNorm(channels)
        self.conv = ChannelAttentionBlock(channels) if local else None
        self.mlp = Mlp(channels, hidden)
        self.norm2 = nn.LayerNorm(channels)

    def forward(self, tokens: Tensor) -> Tensor:
        y: Tensor = tokens + self.norm1(self.attn(tokens))
        if self.conv is not None:
            y = y + to_tokens(self.conv(to_map(tokens)))
        y = y + self.norm2(self.mlp(y))
        return y


class TransformerStage(nn.Module):
    """Blocks and a convolution, added to their input: tokens (B, H, W, C) to the same."""

    def __init__(self, blocks: Sequence[TransformerBlock], conv: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.conv = conv

    def forward(self, tokens: Tensor) -> Tensor:
        y = tokens
        for block in self.blocks:
            y = block(y)
        return to_tokens(self.conv(to_map(y))) + tokens


class LinearOfMap(nn.Linear):
    """A linear layer at each position: (B, C, H, W) to the same."""

    def forward(self, x: Tensor) -> Tensor:
        return to_map(super().forward(to_tokens(x)))


class Upsample(nn.Module):
    """Convolutions, each followed by pixels shuffled out of channels."""

    def __init__(self, channels: int, out: int, factors: Sequence[int]) -> None:
        super().__init__()
        steps: list[nn.Module] = []
        for factor in factors:
            steps += [Conv2d(channels, factor**2 * out, 3, padding=1), nn.PixelShuffle(factor)]
        self.up = nn.Sequential(*steps)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.up(x)
        return y


class GRL(nn.Module):
    """GRL (section 4): (B, in_channels, H, W) to (B, out_channels, upscale * H, upscale * W).

    Values in [0, 1], any H and W. Hyperparameters are named as in the published option files,
    and by default those of the base size for denoising.

    Args:
        upscale: height and width of the result over those of the picture.
        in_channels: channels of the picture; both views' for a dual-pixel network.
        out_channels: channels of the result; the picture's if not given.
        embed_dim: channels of the features.
        img_range: what pictures are multiplied by before the network, and divided by after.
        img_size: side of the training crops; it changes nothing in the network.
        upsampler: how the result is made larger; "" for not at all.
        depths: blocks of each stage.
        num_heads_window: heads of each stage's window attention.
        num_heads_stripe: heads of each stage's stripe attention.
        window_size: side of a window in positions.
        stripe_size: height and width of a stripe in positions, a multiple of
            `anchor_window_down_factor`; for every other block the other way round.
        stripe_groups: number of stripes along the height and width of the picture; where it is
            given, stripes are a fraction of the picture and have no size.
        stripe_shift: whether every other two blocks have their stripes shifted by a half.
        mlp_ratio: channels within the feed-forward part over channels outside.
        qkv_bias: whether the projection to queries, keys and values has a bias.
        qkv_proj_type: what it is.
        anchor_proj_type: how anchors are made.
        anchor_one_stage: at once, or by repeated halving.
        anchor_window_down_factor: positions along the side of an anchor's cell.
        out_proj_type: the output projection of attention; both types are linear layers.
        conv_type: what stages end with.
        local_connection: whether blocks have convolutions with channel attention.
    """

    mean: Tensor
    conv_before_upsample: nn.Module
    upsample: nn.Module
    conv_up1: nn.Module
    conv_up2: nn.Module
    conv_hr: nn.Module
    conv_last: nn.Module

    def __init__(
        self,
        upscale: int = 1,
        in_channels: int = 3,
        out_channels: int | None = None,
        embed_dim: int = 180,
        img_range: float = 1.0,
        img_size: int = 256,
        upsampler: Upsampler = "",
        depths: Sequence[int] = (4, 4, 8, 8, 8, 4, 4),
        num_heads_window: Sequence[int] = (3, 3, 3, 3, 3, 3, 3),
        num_heads_stripe: Sequence[int] = (3, 3, 3, 3, 3, 3, 3),
        window_size: int = 32,
        stripe_size: Sequence[int | None] = (64, 128),
        stripe_groups: Sequence[int | None] = (None, None),
        stripe_shift: bool = True,
        mlp_ratio: float = 2.0,
        qkv_bias: bool = True,
        qkv_proj_type: Qkv = "linear",
        anchor_proj_type: Anchor = "avgpool",
        anchor_one_stage: bool = True,
        anchor_window_down_factor: int = 2,
        out_proj_type: Literal["linear", "conv2d"] = "linear",
        conv_type: Conv = "1conv",
        local_connection: bool = True,
    ) -> None:
        super().__init__()
        out = in_channels if out_channels is None else out_channels
        down, hidden = anchor_window_down_factor, int(embed_dim * mlp_ratio)
        check_sizes(in_channels, out, embed_dim, img_range, img_size, hidden)
        check_stages(embed_dim, depths, num_heads_window, num_heads_stripe)
        check_windows(window_size, stripe_size, stripe_groups, down)
        if local_connection and embed_dim < 18:
            raise ValueError("embed_dim must be at least 18 for channel attention")

        def block(number: int, window_heads: int, stripe_heads: int) -> TransformerBlock:
            axes = stripe_axes(number, stripe_size, stripe_groups, stripe_shift)
            attention = MixedAttention(
                embed_dim,
                QKVProjection(embed_dim, qkv_bias, qkv_proj_type),
                AnchorProjection(embed_dim, anchor_proj_type, anchor_one_stage, down),
                WindowAttention(window_heads, window_size, shifted=number % 2 == 0),
                stripe_attention(stripe_heads, axes, down),
            )
            return TransformerBlock(embed_dim, attention, local_connection, hidden)

        mean = RGB_MEAN if in_channels == out == 3 else (0.0,)
        self.register_buffer("mean", torch.tensor(mean)[:, None, None], persistent=False)
        self.img_range = img_range
        self.conv_first = Conv2d(in_channels, embed_dim, 3, padding=1)
        self.norm_start = nn.LayerNorm(embed_dim)
        self.layers = nn.ModuleList(
            TransformerStage(
                [block(n, *heads) for n in range(depth)], _last_conv(embed_dim, conv_type)
            )
            for depth, *heads in zip(depths, num_heads_window, num_heads_stripe, strict=True)
        )
        self.norm_end = nn.LayerNorm(embed_dim)
        self.conv_after_body = _last_conv(embed_dim, conv_type)
        self.residual = upsampler == "" and in_channels == out
        self.upsampler = upsampler
        for name, part in _tail(upsampler, upscale, embed_dim, out).items():
            self.add_module(name, part)

    def forward(self, image: Tensor) -> Tensor:
        image = (image - self.mean) * self.img_range
        first: Tensor = self.conv_first(image)
        tokens = self.norm_start(to_tokens(first))
        for layer in self.layers:
            tokens = layer(tokens)
        result = self._reconstructed(self.conv_after_body(to_map(self.norm_end(tokens))) + first)
        if self.residual:
            result = image + result
        return result / self.img_range + self.mean

    def _reconstructed(self, x: Tensor) -> Tensor:
        if self.upsampler == "pixelshuffledirect":
            x = self.upsample(x)
            return x
        if self.upsampler == "pixelshuffle":
            x = self.upsample(self.conv_before_upsample(x))
        elif self.upsampler == "nearest+conv":
            x = self.conv_before_upsample(x)
            for conv in (self.conv_up1, self.conv_up2):
                x = F.leaky_relu(conv(F.interpolate(x, scale_factor=2.0, mode="nearest")), 0.2)
            x = F.leaky_relu(self.conv_hr(x), 0.2)
        x = self.conv_last(x)
        return x


def _last_conv(channels: int, kind: Conv) -> nn.Module:
    if kind == "1conv":
        return Conv2d(channels, channels, 3, padding=1)
    if kind == "1conv1x1":
        return nn.Conv2d(channels, channels, 1)
    if kind == "linear":
        return LinearOfMap(channels, channels)
    quarter = channels // 4
    return nn.Sequential(
        Conv2d(channels, quarter, 3, padding=1),
        nn.LeakyReLU(0.2, inplace=True),
        nn.Conv2d(quarter, quarter, 1),
        nn.LeakyReLU(0.2, inplace=True),
        Conv2d(quarter, channels, 3, padding=1),
    )


def _tail(upsampler: Upsampler, upscale: int, dim: int, out: int) -> dict[str, nn.Module]:
    """What makes the result of the last features."""
    factors, wide = _factors(upsampler, upscale), RECONSTRUCTION
    if upsampler == "pixelshuffledirect":
        return {"upsample": Upsample(dim, out, factors)}
    if upsampler == "":
        return {"conv_last": Conv2d(dim, out, 3, padding=1)}
    before = nn.Sequential(Conv2d(dim, wide, 3, padding=1), nn.LeakyReLU(inplace=True))
    tail: dict[str, nn.Module] = {"conv_before_upsample": before}
    if upsampler == "pixelshuffle":
        tail["upsample"] = Upsample(wide, wide, factors)
    else:
        tail |= {n: Conv2d(wide, wide, 3, padding=1) for n in ("conv_up1", "conv_up2", "conv_hr")}
    return {**tail, "conv_last": Conv2d(wide, out, 3, padding=1)}


def _factors(upsampler: Upsampler, upscale: int) -> tuple[int, ...]:
    """Factors of the steps in which the picture becomes larger."""
    halvings = upscale.bit_length() - 1
    power = upscale > 1 and upscale == 2**halvings
    fits = {
        "": upscale == 1,
        "pixelshuffle": power or upscale == 3,
        "pixelshuffledirect": upscale > 1,
        "nearest+conv": upscale == 4,
    }
    if not fits[upsampler]:
        raise ValueError(f"upscale cannot be {upscale} with the upsampler {upsampler!r}")
    return (2,) * halvings if upsampler == "pixelshuffle" and power else (upscale,)


ARCHITECTURE = Architecture(
    name="grl",
    title="GRL",
    paper="Efficient and Explicit Modelling of Image Hierarchies for Image Restoration, CVPR 2023",
    authors="Yawei Li, Yuchen Fan, Xiaoyu Xiang, Denis Demandolx, Rakesh Ranjan, Radu Timofte, "
    "Luc Van Gool",
    weights="https://github.com/ofsoundof/GRL-Image-Restoration (release v1.0.0)",
    licence="MIT",
    tasks=TASKS,
    train_size=256,
    build=GRL,
    hyperparameters=hyperparameters_of,
    spec=spec_of,
    published=published_as,
    adapt=without_tables,
)
