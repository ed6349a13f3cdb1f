"""HINet, plain: Chen et al., CVPRW 2021, section 3."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fullres.networks.hinet import SAM, ConvBlock, HINet, UpBlock
from fullres.networks.layers import pad_to_multiple


def block(self: ConvBlock, x: Tensor, *other: Tensor) -> tuple[Tensor, Tensor]:
    y = self.conv_1(x)
    if self.norm is not None:
        normed, rest = y[:, : self.normed], y[:, self.normed :]
        y = torch.cat([self.norm(normed), rest], dim=1)
    y = F.leaky_relu(y, self.slope)
    y = F.leaky_relu(self.conv_2(y), self.slope)
    y = y + self.identity(x)
    if other:
        encoded, decoded = other
        y = y + self.csff_enc(encoded) + self.csff_dec(decoded)
    return (y if self.downsample is None else self.downsample(y)), y


def up_block(self: UpBlock, x: Tensor, features: Tensor) -> Tensor:
    y = torch.cat([self.up(x), features], dim=1)
    return self.conv_block(y)[1]


def supervised_attention(self: SAM, x: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
    y = self.conv1(x)
    restored = self.conv2(x) + image
    y = y * torch.sigmoid(self.conv3(restored))
    return y + x, restored


def network(self: HINet, image: Tensor) -> Tensor:
    height, width = image.shape[-2:]
    image = pad_to_multiple(image, self.multiple)
    x, encoded = self.conv_01(image), []
    for part in self.down_path_1:
        x, features = part(x)
        encoded.append(features)
    decoded = []
    for up, bridge, skip in zip(self.up_path_1, self.skip_conv_1, encoded[-2::-1], strict=True):
        x = up(x, bridge(skip))
        decoded.append(x)
    attended, _ = self.sam12(x, image)
    x, skips = self.cat12(torch.cat([self.conv_02(image), attended], dim=1)), []
    others = [*zip(encoded, reversed(decoded), strict=False), ()]
    for part, other in zip(self.down_path_2, others, strict=True):
        x, features = part(x, *other)
        skips.append(features)
    for up, bridge, skip in zip(self.up_path_2, self.skip_conv_2, skips[-2::-1], strict=True):
        x = up(x, bridge(skip))
    x = self.last(x) + image
    return x[:, :, :height, :width]


FORMS = {ConvBlock: block, UpBlock: up_block, SAM: supervised_attention, HINet: network}
