"""NAFNet, plain: Chen et al., ECCV 2022, section 3."""

from __future__ import annotations

import torch
from torch import Tensor

from fullres.networks.layers import LayerNorm2d, pad_to_multiple
from fullres.networks.nafnet import NAFBlock, NAFNet


def norm(self: LayerNorm2d, x: Tensor) -> Tensor:
    mean = x.mean(1, keepdim=True)
    var = (x - mean).pow(2).mean(1, keepdim=True)
    y = (x - mean) / torch.sqrt(var + self.eps)
    return self.weight.view(1, -1, 1, 1) * y + self.bias.view(1, -1, 1, 1)


def gate(x: Tensor) -> Tensor:
    a, b = torch.chunk(x, 2, dim=1)
    return a * b


def block(self: NAFBlock, x: Tensor) -> Tensor:
    y = self.norm1(x)
    y = self.conv1(y)
    y = self.conv2(y)
    y = gate(y)
    y = y * self.sca(y)
    y = self.conv3(y)
    x = x + y * self.beta
    y = self.norm2(x)
    y = self.conv4(y)
    y = gate(y)
    y = self.conv5(y)
    return x + y * self.gamma


def network(self: NAFNet, image: Tensor) -> Tensor:
    height, width = image.shape[-2:]
    image = pad_to_multiple(image, self.multiple)
    x = self.intro(image)
    skips = []
    for encoder, down in zip(self.encoders, self.downs, strict=True):
        x = encoder(x)
        skips.append(x)
        x = down(x)
    x = self.middle_blks(x)
    for up, decoder in zip(self.ups, self.decoders, strict=True):
        x = up(x)
        x = x + skips.pop()
        x = decoder(x)
    x = self.ending(x)
    x = x + image
    return x[:, :, :height, :width]


FORMS = {LayerNorm2d: norm, NAFBlock: block, NAFNet: network}
