"""Restormer, plain: Zamir et al., CVPR 2022, section 3 and equations 1 and 2."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fullres.networks.layers import LayerNorm2d, pad_to_multiple
from fullres.networks.restormer import (
    MULTIPLE,
    BiasFreeNorm,
    GatedFeedForward,
    LayerNorm,
    PatchEmbed,
    Resample,
    Restormer,
    TransformerBlock,
    TransposedAttention,
)


def norm(self: LayerNorm, x: Tensor) -> Tensor:
    """Layer norm of tokens: the map as (B, H * W, C), and back."""
    tokens = x.flatten(2).transpose(1, 2)
    body = self.body
    var = tokens.var(-1, keepdim=True, correction=0)
    if isinstance(body, LayerNorm2d):
        mean = tokens.mean(-1, keepdim=True)
        y = (tokens - mean) / torch.sqrt(var + body.eps) * body.weight + body.bias
    else:
        assert isinstance(body, BiasFreeNorm)
        y = tokens / torch.sqrt(var + body.eps) * body.weight
    return y.transpose(1, 2).reshape(x.shape)


def attended(q: Tensor, k: Tensor, v: Tensor, temperature: Tensor) -> Tensor:
    """Equation 1 on maps (B, heads * c, H, W)."""
    batch, _, height, width = q.shape
    shape = (batch, temperature.numel(), -1, height * width)
    q, k, v = (x.reshape(shape) for x in (q, k, v))
    q = F.normalize(q, dim=-1)
    k = F.normalize(k, dim=-1)
    weights = q @ k.transpose(-2, -1) * temperature
    y = weights.softmax(dim=-1) @ v
    return y.reshape(batch, -1, height, width)


def attention(self: TransposedAttention, x: Tensor) -> Tensor:
    q, k, v = self.qkv_dwconv(self.qkv(x)).chunk(3, dim=1)
    return self.project_out(attended(q, k, v, self.temperature))


def feed_forward(self: GatedFeedForward, x: Tensor) -> Tensor:
    a, b = self.dwconv(self.project_in(x)).chunk(2, dim=1)
    return self.project_out(F.gelu(a) * b)


def block(self: TransformerBlock, x: Tensor) -> Tensor:
    x = x + self.attn(self.norm1(x))
    return x + self.ffn(self.norm2(x))


def embed(self: PatchEmbed, x: Tensor) -> Tensor:
    return self.proj(x)


def resample(self: Resample, x: Tensor) -> Tensor:
    return self.body(x)


def network(self: Restormer, image: Tensor) -> Tensor:
    height, width = image.shape[-2:]
    image = pad_to_multiple(image, MULTIPLE)
    first = self.patch_embed(image)
    skip1 = self.encoder_level1(first)
    skip2 = self.encoder_level2(self.down1_2(skip1))
    skip3 = self.encoder_level3(self.down2_3(skip2))
    latent = self.latent(self.down3_4(skip3))
    x = torch.cat([self.up4_3(latent), skip3], dim=1)
    x = self.decoder_level3(self.reduce_chan_level3(x))
    x = torch.cat([self.up3_2(x), skip2], dim=1)
    x = self.decoder_level2(self.reduce_chan_level2(x))
    x = torch.cat([self.up2_1(x), skip1], dim=1)
    x = self.refinement(self.decoder_level1(x))
    x = self.output(x if self.skip_conv is None else x + self.skip_conv(first))
    if self.skip_conv is None:
        x = x + image
    return x[:, :, :height, :width]


FORMS = {
    LayerNorm: norm,
    TransposedAttention: attention,
    GatedFeedForward: feed_forward,
    TransformerBlock: block,
    PatchEmbed: embed,
    Resample: resample,
    Restormer: network,
}
