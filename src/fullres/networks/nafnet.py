"""NAFNet: *Simple Baselines for Image Restoration* (Chen, Chu, Zhang, Sun; ECCV 2022).

A U-Net without non-linear activations: layer norm, depthwise convolution, a multiplicative gate
and simplified channel attention, whose pooled mean is the network's global operation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fullres.networks.layers import Conv2d, LayerNorm2d, pad_to_multiple, product, total
from fullres.networks.spec import Architecture, Spec, State, count
from fullres.ops.parts import in_parts

_CACHED = 128
"""Channels up to which parts fit caches. With more, products take their time wherever maps lie, and
larger parts lose less to halos."""
_HELD = 4
"""Maps of its channels that a block has under way at once, about."""


class NAFBlock(nn.Module):
    """Gated depthwise convolution with channel attention, then a gated feed-forward part."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        expanded = 2 * channels
        self.norm1 = LayerNorm2d(channels)
        self.conv1 = nn.Conv2d(channels, expanded, 1)
        self.conv2 = nn.Conv2d(expanded, expanded, 3, padding=1, groups=expanded)
        self.sca = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(channels, channels, 1))
        self.conv3 = nn.Conv2d(channels, channels, 1)
        self.norm2 = LayerNorm2d(channels)
        self.conv4 = nn.Conv2d(channels, expanded, 1)
        self.conv5 = nn.Conv2d(channels, channels, 1)
        self.beta = nn.Parameter(torch.zeros(1, channels, 1, 1))
        self.gamma = nn.Parameter(torch.zeros(1, channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        channels = x.shape[1]
        under_way = _HELD * channels if channels <= _CACHED else channels
        y = in_parts(self._gated, x, channels=under_way, halo=1)
        y = product(y, self.sca(y))
        return in_parts(self._fed_forward, y, x, channels=under_way, in_place=True)

    def _gated(self, x: Tensor) -> Tensor:
        z = self.norm1(x)
        return product(*(_half(self.conv2, _half(self.conv1, z, i), i) for i in (0, 1)))

    def _fed_forward(self, y: Tensor, x: Tensor) -> Tensor:
        x = _scaled(self.conv3, y, self.beta).add_(x)
        z = self.norm2(x)
        y = product(*(_half(self.conv4, z, i) for i in (0, 1)))
        return _scaled(self.conv5, y, self.gamma).add_(x)


def _half(conv: nn.Conv2d, x: Tensor, i: int) -> Tensor:
    """The first or second half of what a convolution gives, in memory of its own.

    A depthwise convolution takes that half of its input. The gate multiplies halves: apart, they
    are read in order, and the product finds room in one of them.
    """
    channels = conv.out_channels // 2
    own = slice(i * channels, (i + 1) * channels)
    assert conv.bias is not None
    groups = 1 if conv.groups == 1 else channels
    return F.conv2d(x, conv.weight[own], conv.bias[own], padding=conv.padding, groups=groups)


def _scaled(conv: nn.Conv2d, x: Tensor, scale: Tensor) -> Tensor:
    """A convolution, with a factor a channel of what it gives."""
    assert conv.bias is not None
    return F.conv2d(x, conv.weight * scale.view(-1, 1, 1, 1), conv.bias * scale.flatten())


class NAFNet(nn.Module):
    """NAFNet (section 3): (B, img_channel, H, W) to the same shape, values in [0, 1], any H and W.

    Args:
        img_channel: channels of the picture.
        width: channels at full resolution; doubled at every level.
        middle_blk_num: blocks at the lowest resolution.
        enc_blk_nums: blocks of each encoder level, from full resolution down.
        dec_blk_nums: blocks of each decoder level, from the lowest resolution up.
    """

    def __init__(
        self,
        img_channel: int = 3,
        width: int = 32,
        middle_blk_num: int = 1,
        enc_blk_nums: Sequence[int] = (1, 1, 1, 28),
        dec_blk_nums: Sequence[int] = (1, 1, 1, 1),
    ) -> None:
        super().__init__()
        if not 1 <= len(enc_blk_nums) == len(dec_blk_nums):
            raise ValueError(
                "enc_blk_nums and dec_blk_nums must have the same number of levels, at least 1, "
                f"not {len(enc_blk_nums)} and {len(dec_blk_nums)}"
            )
        if min(img_channel, width) < 1 or min(middle_blk_num, *enc_blk_nums, *dec_blk_nums) < 0:
            raise ValueError("img_channel and width must be positive, and no number of blocks < 0")
        self.multiple = 2 ** len(enc_blk_nums)
        self.intro = nn.Conv2d(img_channel, width, 3, padding=1)
        self.ending = Conv2d(width, img_channel, 3, padding=1)
        self.encoders = nn.ModuleList()
        self.decoders = nn.ModuleList()
        self.ups = nn.ModuleList()
        self.downs = nn.ModuleList()
        channels = width
        for blocks in enc_blk_nums:
            self.encoders.append(nn.Sequential(*(NAFBlock(channels) for _ in range(blocks))))
            self.downs.append(nn.Conv2d(channels, 2 * channels, 2, stride=2))
            channels *= 2
        self.middle_blks = nn.Sequential(*(NAFBlock(channels) for _ in range(middle_blk_num)))
        for blocks in dec_blk_nums:
            up = nn.Conv2d(channels, 2 * channels, 1, bias=False)
            self.ups.append(nn.Sequential(up, nn.PixelShuffle(2)))
            channels //= 2
            self.decoders.append(nn.Sequential(*(NAFBlock(channels) for _ in range(blocks))))

    def forward(self, image: Tensor) -> Tensor:
        height, width = image.shape[-2:]
        image = pad_to_multiple(image, self.multiple)
        x: Tensor = self.intro(image)
        skips = []
        # block by block, for a call of a whole level would hold what went in until it ends
        for encoder, down in zip(self.encoders, self.downs, strict=True):
            for block in encoder.children():
                x = block(x)
            skips.append(x)
            x = down(x)
        for block in self.middle_blks:
            x = block(x)
        for up, decoder in zip(self.ups, self.decoders, strict=True):
            x = up(x)
            x = total(x, skips.pop())
            for block in decoder.children():
                x = block(x)
        x = self.ending(x) + image
        return x[..., :height, :width]


def _hyperparameters(state: State) -> dict[str, Any] | None:
    intro = state.get("intro.weight")
    if intro is None or intro.ndim != 4 or not any(".sca.1." in name for name in state):
        return None
    levels = range(count(state, "downs."))
    return {
        "img_channel": intro.shape[1],
        "width": intro.shape[0],
        "middle_blk_num": count(state, "middle_blks."),
        "enc_blk_nums": tuple(count(state, f"encoders.{level}.") for level in levels),
        "dec_blk_nums": tuple(count(state, f"decoders.{level}.") for level in levels),
    }


def _spec(hyperparameters: Mapping[str, Any]) -> Spec:
    return Spec(
        architecture="nafnet",
        hyperparameters=hyperparameters,
        in_channels=hyperparameters["img_channel"],
        out_channels=hyperparameters["img_channel"],
        multiple=2 ** len(hyperparameters["enc_blk_nums"]),
    )


ARCHITECTURE = Architecture(
    name="nafnet",
    title="NAFNet",
    paper="Simple Baselines for Image Restoration, ECCV 2022",
    authors="Liangyu Chen, Xiaojie Chu, Xiangyu Zhang, Jian Sun",
    weights="https://github.com/megvii-research/NAFNet (docs/GoPro.md, docs/SIDD.md)",
    licence="MIT",
    tasks=("deblur", "denoise"),
    train_size=256,
    build=NAFNet,
    hyperparameters=_hyperparameters,
    spec=_spec,
)
