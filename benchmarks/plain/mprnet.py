"""MPRNet, plain: Zamir et al., CVPR 2021, section 3.

The patches of a stage go through it one after the other; bilinear resampling comes before its
convolution.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fullres.networks.layers import pad_to_multiple
from fullres.networks.mprnet import (
    CAB,
    MULTIPLE,
    ORB,
    SAM,
    ChannelAttention,
    Decoder,
    Down,
    Encoder,
    Features,
    MPRNet,
    ORSNet,
    Up,
)


def channel_attention(self: ChannelAttention, x: Tensor) -> Tensor:
    return x * self.conv_du(self.avg_pool(x))


def attention_block(self: CAB, x: Tensor) -> Tensor:
    y = self.CA(self.body(x))
    return y + x


def down(self: Down, x: Tensor) -> Tensor:
    x = F.interpolate(x, scale_factor=0.5, mode="bilinear", align_corners=False)
    return self.down[1](x)


def up(self: Up, x: Tensor) -> Tensor:
    x = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
    return self.up[1](x)


def encoder(self: Encoder, x: Tensor, earlier: tuple[Features, Features] | None = None) -> Features:
    downs, levels = (self.down12, self.down23, None), []
    for number, halve in enumerate(downs, start=1):
        x = getattr(self, f"encoder_level{number}")(x)
        if earlier is not None:
            for part, features in zip(("enc", "dec"), earlier, strict=True):
                x = x + getattr(self, f"{self.fusion}_{part}{number}")(features[number - 1])
        levels.append(x)
        x = x if halve is None else halve(x)
    return tuple(levels)


def decoder(self: Decoder, encoded: Features) -> Features:
    level1, level2, level3 = encoded
    level3 = self.decoder_level3(level3)
    level2 = self.up32(level3) + self.skip_attn2(level2)
    level2 = self.decoder_level2(level2)
    level1 = self.up21(level2) + self.skip_attn1(level1)
    return self.decoder_level1(level1), level2, level3


def original_resolution_block(self: ORB, x: Tensor) -> Tensor:
    return self.body(x) + x


def original_resolution_network(
    self: ORSNet, x: Tensor, encoded: Features, decoded: Features
) -> Tensor:
    x = self.orb1(x)
    x = x + self.conv_enc1(encoded[0]) + self.conv_dec1(decoded[0])
    x = self.orb2(x)
    x = x + self.conv_enc2(self.up_enc1(encoded[1])) + self.conv_dec2(self.up_dec1(decoded[1]))
    x = self.orb3(x)
    return x + self.conv_enc3(self.up_enc2(encoded[2])) + self.conv_dec3(self.up_dec2(decoded[2]))


def supervised_attention(self: SAM, x: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
    y = self.conv1(x)
    restored = self.conv2(x) + image
    y = y * torch.sigmoid(self.conv3(restored))
    return y + x, restored


def joined(a: Features, b: Features, dim: int) -> Features:
    return tuple(torch.cat(pair, dim=dim) for pair in zip(a, b, strict=True))


def network(self: MPRNet, image: Tensor) -> Tensor:
    height, width = image.shape[-2:]
    image = pad_to_multiple(image, MULTIPLE)
    halves = image.chunk(2, dim=2)

    first, decoded, attended = [], [], []
    for half in halves:
        left, right = (
            self.stage1_encoder(self.shallow_feat1(quarter)) for quarter in half.chunk(2, dim=3)
        )
        first.append(joined(left, right, dim=3))
        decoded.append(self.stage1_decoder(first[-1]))
        attended.append(self.sam12(decoded[-1][0], half)[0])

    second = []
    for half, features, *earlier in zip(halves, attended, first, decoded, strict=True):
        x = self.concat12(torch.cat([self.shallow_feat2(half), features], dim=1))
        second.append(self.stage2_encoder(x, tuple(earlier)))
    encoded = joined(*second, dim=2)
    decoded = self.stage2_decoder(encoded)
    features, _ = self.sam23(decoded[0], image)

    x = self.concat23(torch.cat([self.shallow_feat3(image), features], dim=1))
    x = self.tail(self.stage3_orsnet(x, encoded, decoded)) + image
    return x[:, :, :height, :width]


PARTS = {
    ChannelAttention: channel_attention,
    CAB: attention_block,
    Down: down,
    Up: up,
    Encoder: encoder,
    Decoder: decoder,
    ORB: original_resolution_block,
    ORSNet: original_resolution_network,
    SAM: supervised_attention,
}
FORMS = {**PARTS, MPRNet: network}
