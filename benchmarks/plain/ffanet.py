"""FFA-Net, plain: Qin et al., AAAI 2020, section 3."""

from __future__ import annotations

import torch
from torch import Tensor

from fullres.networks.ffanet import Block, CALayer, FFANet, Group, PALayer


def channel_attention(self: CALayer, x: Tensor) -> Tensor:
    return x * self.ca(self.avg_pool(x))


def pixel_attention(self: PALayer, x: Tensor) -> Tensor:
    return x * self.pa(x)


def block(self: Block, x: Tensor) -> Tensor:
    y = self.act1(self.conv1(x))
    y = y + x
    y = self.conv2(y)
    y = self.calayer(y)
    y = self.palayer(y)
    return y + x


def group(self: Group, x: Tensor) -> Tensor:
    return self.gp(x) + x


def network(self: FFANet, image: Tensor) -> Tensor:
    if len(self.mean):
        image = (image - self.mean) / self.std
    x = self.pre(image)
    groups = []
    for number in range(1, self.gps + 1):
        x = getattr(self, f"g{number}")(x)
        groups.append(x)
    weights = self.ca(torch.cat(groups, dim=1))
    x = sum(w * g for w, g in zip(weights.chunk(self.gps, dim=1), groups, strict=True))
    x = self.post(self.palayer(x))
    return x + image


FORMS = {
    CALayer: channel_attention,
    PALayer: pixel_attention,
    Block: block,
    Group: group,
    FFANet: network,
}
