"""HINet: *HINet: Half Instance Normalization Network for Image Restoration* (CVPRW 2021).

By Liangyu Chen, Xin Lu, Jie Zhang, Xiaojie Chu and Chengpeng Chen. Two U-shaped stages, joined by
a supervised attention module and by the features of the first at every level of the second. Half
of an encoder block's channels are normalised by their instance's mean and variance, which are the
network's global operation.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fullres.networks.layers import Conv2d, pad_to_multiple, weighted
from fullres.networks.spec import Architecture, Spec, State, count
from fullres.ops.arrays import recorded


def conv3x3(in_channels: int, out_channels: int) -> Conv2d:
    """3 × 3 convolution that keeps height and width."""
    return Conv2d(in_channels, out_channels, 3, padding=1)


def downsampling(channels: int) -> nn.Conv2d:
    """4 × 4 convolution with stride 2 that halves height and width, both even."""
    return nn.Conv2d(channels, channels, 4, stride=2, padding=1, bias=False)


def normalised(norm: nn.Module, x: Tensor) -> Tensor:
    """`norm(x)`, also where the map (B, C, H, W) is a single position.

    >>> normalised(nn.InstanceNorm2d(2), torch.ones(1, 2, 1, 1)).flatten()
    tensor([0., 0.])
    """
    if x.shape[-2:] != (1, 1):
        y: Tensor = norm(x)
        return y
    # torch refuses statistics of one value; those of the value and its copy are the same
    pair: Tensor = norm(x.expand(-1, -1, 1, 2))
    return pair[..., :1]


class ConvBlock(nn.Module):
    """Two 3 × 3 convolutions beside a 1 × 1 identity (figure 3).

    Shapes: (B, in_channels, H, W) to a pair, the input of the level below and this level's
    features, (B, out_channels, H, W). The former has half the height and width with `down` and
    is the latter without. `other` are the first stage's encoder and decoder features of this
    level, added each through a convolution with `fuse`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        slope: float,
        *,
        half_norm: bool = False,
        fuse: bool = False,
        down: bool = False,
    ) -> None:
        super().__init__()
        self.slope = slope
        self.normed = out_channels // 2
        self.identity = nn.Conv2d(in_channels, out_channels, 1)
        self.conv_1 = conv3x3(in_channels, out_channels)
        self.conv_2 = conv3x3(out_channels, out_channels)
        if fuse:
            self.csff_enc = conv3x3(out_channels, out_channels)
            self.csff_dec = conv3x3(out_channels, out_channels)
        self.norm = nn.InstanceNorm2d(self.normed, affine=True) if half_norm else None
        self.downsample = downsampling(out_channels) if down else None

    def forward(self, x: Tensor, *other: Tensor) -> tuple[Tensor, Tensor]:
        y: Tensor
        if self.norm is None:
            y = self.conv_1(x, slope=self.slope)
        else:
            y = self.conv_1(x)
            half = normalised(self.norm, y[:, : self.normed])
            if recorded():
                y = F.leaky_relu(torch.cat([half, y[:, self.normed :]], dim=1), self.slope)
            else:
                y[:, : self.normed] = half
                y = F.leaky_relu(y, self.slope, inplace=True)
        y = self.conv_2(y, slope=self.slope, plus=self.identity(x), in_place=True)
        if other:
            encoded, decoded = other
            y = self.csff_enc(encoded, plus=y, in_place=True)
            y = self.csff_dec(decoded, plus=y, in_place=True)
        return (y if self.downsample is None else self.downsample(y)), y


class UpBlock(nn.Module):
    """Doubles height and width, halves the channels and takes in the encoder's features.

    Shapes: (B, 2C, H, W) and features (B, C, 2H, 2W) to (B, C, 2H, 2W).
    """

    def __init__(self, channels: int, slope: float) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(2 * channels, channels, 2, stride=2)
        self.conv_block = ConvBlock(2 * channels, channels, slope)

    def forward(self, x: Tensor, features: Tensor) -> Tensor:
        y: Tensor = self.conv_block(torch.cat([self.up(x), features], dim=1))[1]
        return y


class SAM(nn.Module):
    """Supervised attention module: the first stage's picture weighs its features.

    Shapes: features (B, channels, H, W) and image (B, image_channels, H, W) to attended features
    and restored picture of the same shapes.
    """

    def __init__(self, channels: int, image_channels: int) -> None:
        super().__init__()
        self.conv1 = conv3x3(channels, channels)
        self.conv2 = conv3x3(channels, image_channels)
        self.conv3 = conv3x3(image_channels, channels)

    def forward(self, x: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
        restored: Tensor = self.conv2(x) + image
        attention = torch.sigmoid(self.conv3(restored))
        return weighted(self.conv1(x), attention, x), restored


def encode(
    blocks: Iterable[nn.Module], x: Tensor, others: Iterable[Sequence[Tensor]]
) -> tuple[Tensor, list[Tensor]]:
    """Encoder of one stage: the lowest level's features, and those of the levels above it.

    `others` holds for each block what else it takes beside the level above.
    """
    skips = []
    for block, other in zip(blocks, others, strict=True):
        x, features = block(x, *other)
        skips.append(features)
    return x, skips[:-1]


def decode(
    blocks: Iterable[nn.Module], x: Tensor, skips: Iterable[Tensor]
) -> tuple[Tensor, list[Tensor]]:
    """Decoder of one stage: its output, and the features of every level.

    `skips`, the encoder's features, and the result go from low to full resolution.
    """
    decoded = []
    for block, skip in zip(blocks, skips, strict=True):
        x = block(x, skip)
        decoded.append(x)
    return x, decoded


def bridged(bridges: nn.ModuleList, skips: Sequence[Tensor]) -> Iterator[Tensor]:
    """Encoder features from low to full resolution, each through its convolution."""
    return (bridge(skip) for bridge, skip in zip(bridges, reversed(skips), strict=True))


class HINet(nn.Module):
    """HINet (section 3): (B, in_chn, H, W) to the same shape, values in [0, 1], any H and W.

    Args:
        in_chn: channels of the picture.
        wf: channels at full resolution; doubled at every level.
        depth: levels.
        relu_slope: slope of the leaky ReLUs below zero.
        hin_position_left: first level with half instance norm, counted from 0 at full resolution.
        hin_position_right: last level with half instance norm.
    """

    def __init__(
        self,
        in_chn: int = 3,
        wf: int = 64,
        depth: int = 5,
        relu_slope: float = 0.2,
        hin_position_left: int = 0,
        hin_position_right: int = 4,
    ) -> None:
        super().__init__()
        if min(in_chn, depth) < 1 or wf < 2:
            raise ValueError("in_chn and depth must be positive, and wf at least 2")
        self.multiple = 2 ** (depth - 1)
        self.down_path_1 = nn.ModuleList()
        self.down_path_2 = nn.ModuleList()
        channels = [wf * 2**level for level in range(depth)]
        for level, (above, here) in enumerate(zip([wf, *channels], channels, strict=False)):
            hin = hin_position_left <= level <= hin_position_right
            down = level + 1 < depth
            first = ConvBlock(above, here, relu_slope, half_norm=hin, down=down)
            second = ConvBlock(above, here, relu_slope, half_norm=hin, fuse=down, down=down)
            self.down_path_1.append(first)
            self.down_path_2.append(second)
        self.conv_01 = conv3x3(in_chn, wf)
        self.conv_02 = conv3x3(in_chn, wf)
        upwards = channels[-2::-1]
        self.up_path_1 = nn.ModuleList(UpBlock(c, relu_slope) for c in upwards)
        self.up_path_2 = nn.ModuleList(UpBlock(c, relu_slope) for c in upwards)
        self.skip_conv_1 = nn.ModuleList(conv3x3(c, c) for c in upwards)
        self.skip_conv_2 = nn.ModuleList(conv3x3(c, c) for c in upwards)
        self.sam12 = SAM(wf, in_chn)
        self.cat12 = nn.Conv2d(2 * wf, wf, 1)
        self.last = conv3x3(wf, in_chn)

    def forward(self, image: Tensor) -> Tensor:
        return self.outputs(image)[1]

    def outputs(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Pictures that the two stages restore; the second is the network's output.

        Shapes and values as the network's. The published training compares both with the truth.
        """
        height, width = image.shape[-2:]
        image = pad_to_multiple(image, self.multiple)
        x, encoded = encode(self.down_path_1, self.conv_01(image), [()] * len(self.down_path_1))
        x, decoded = decode(self.up_path_1, x, bridged(self.skip_conv_1, encoded))
        attended, first = self.sam12(x, image)
        x = self.cat12(torch.cat([self.conv_02(image), attended], dim=1))
        others = [*zip(encoded, reversed(decoded), strict=True), ()]
        x, skips = encode(self.down_path_2, x, others)
        x, _ = decode(self.up_path_2, x, bridged(self.skip_conv_2, skips))
        second: Tensor = self.last(x) + image
        return first[..., :height, :width], second[..., :height, :width]


def _hyperparameters(state: State) -> dict[str, Any] | None:
    conv, depth = state.get("conv_01.weight"), count(state, "down_path_1.")
    if conv is None or conv.ndim != 4 or depth < 1 or "sam12.conv1.weight" not in state:
        return None
    normed = [i for i in range(depth) if f"down_path_1.{i}.norm.weight" in state]
    return {
        "in_chn": conv.shape[1],
        "wf": conv.shape[0],
        "depth": depth,
        "hin_position_left": min(normed, default=0),
        "hin_position_right": max(normed, default=-1),
    }


def _spec(hyperparameters: Mapping[str, Any]) -> Spec:
    return Spec(
        architecture="hinet",
        hyperparameters=hyperparameters,
        in_channels=hyperparameters["in_chn"],
        out_channels=hyperparameters["in_chn"],
        multiple=2 ** (hyperparameters["depth"] - 1),
    )


ARCHITECTURE = Architecture(
    name="hinet",
    title="HINet",
    paper="HINet: Half Instance Normalization Network for Image Restoration, CVPRW 2021",
    authors="Liangyu Chen, Xin Lu, Jie Zhang, Xiaojie Chu, Chengpeng Chen",
    weights="https://github.com/megvii-model/HINet (linked from its README)",
    licence="MIT",
    tasks=("deblur", "denoise", "derain"),
    train_size=256,
    build=HINet,
    hyperparameters=_hyperparameters,
    spec=_spec,
)
