"""PANet, plain: Mei et al., *Pyramid Attention Networks*, section 3.

Patches of keys are the filters of one convolution and those of values the filters of another,
transposed: a matrix of all positions by all patches of all scales.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fullres.networks.panet import PANet, PyramidAttention, ResBlock
from fullres.ops.pyramid import EPS, SCALES


def filters(x: Tensor) -> Tensor:
    """3 × 3 patches of one map (1, C, H, W), zeros beyond the border: (positions, C, 3, 3)."""
    patches = F.unfold(x, 3, padding=1)
    return patches[0].T.reshape(-1, x.shape[1], 3, 3)


def attention(self: PyramidAttention, x: Tensor) -> Tensor:
    keys, values = [], []
    for scale in SCALES[: self.level]:
        y = x if scale == 1 else F.interpolate(x, scale_factor=scale, mode="bicubic")
        keys.append(self.conv_match(y))
        values.append(self.conv_assembly(y))
    attended = []
    for number, query in enumerate(self.conv_match_L_base(x).split(1)):
        k, v = (
            torch.cat([filters(y[number : number + 1]) for y in maps]) for maps in (keys, values)
        )
        k = k / k.flatten(1).norm(dim=1).clamp_min(EPS).view(-1, 1, 1, 1)
        scores = F.conv2d(query, k, padding=1) * self.softmax_scale
        y = F.conv_transpose2d(scores.softmax(dim=1), v, padding=1)
        attended.append(y / 4)
    return torch.cat(attended) + x * self.res_scale


def block(self: ResBlock, x: Tensor) -> Tensor:
    return self.body(x) * self.res_scale + x


def network(self: PANet, image: Tensor) -> Tensor:
    x = self.head(image)
    return self.tail(self.body(x) + x)


PARTS = {PyramidAttention: attention, ResBlock: block}
FORMS = {**PARTS, PANet: network}
