"""UNet, plain: the baseline of Chu et al., ECCV 2022, table 7."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fullres.networks.hinet import ConvBlock, UpBlock
from fullres.networks.layers import pad_to_multiple
from fullres.networks.unet import (
    ConvBlockAttention,
    EncoderBlock,
    GatherExcite,
    SqueezeExcitation,
    UNet,
)
from plain import hinet


def gated(self: SqueezeExcitation | GatherExcite, x: Tensor) -> Tensor:
    return x * self.gate(x)


def conv_block_attention(self: ConvBlockAttention, x: Tensor) -> Tensor:
    weights = torch.sigmoid(self.mlp(self.average(x)) + self.mlp(self.maximum(x)))
    x = x * weights
    mean = torch.mean(x, dim=1, keepdim=True)
    most, _ = torch.max(x, dim=1, keepdim=True)
    return x * torch.sigmoid(self.spatial(torch.cat([mean, most], dim=1)))


def block(self: EncoderBlock, x: Tensor) -> tuple[Tensor, Tensor]:
    y = F.leaky_relu(self.norm(self.conv_1(x)), self.slope)
    y = F.leaky_relu(self.attention(self.conv_2(y)), self.slope)
    y = y + self.identity(x)
    return (y if self.downsample is None else self.downsample(y)), y


def network(self: UNet, image: Tensor) -> Tensor:
    height, width = image.shape[-2:]
    image = pad_to_multiple(image, self.multiple)
    x, skips = self.first(image), []
    for part in self.down_path:
        x, features = part(x)
        skips.append(features)
    for up, skip in zip(self.up_path, skips[-2::-1], strict=True):
        x = up(x, skip)
    x = self.last(x) + image
    return x[:, :, :height, :width]


FORMS = {
    SqueezeExcitation: gated,
    GatherExcite: gated,
    ConvBlockAttention: conv_block_attention,
    EncoderBlock: block,
    ConvBlock: hinet.block,
    UpBlock: hinet.up_block,
    UNet: network,
}
