"""SPDNet, plain: Yi et al., ICCV 2021, section 3.3."""

from __future__ import annotations

from torch import Tensor

from fullres.networks.spdnet import ResidualBlock, SqueezeExcitation


def attention(self: SqueezeExcitation, x: Tensor) -> Tensor:
    return gated(self, x, x.mean((2, 3), keepdim=True))


def gated(self: SqueezeExcitation, x: Tensor, pooled: Tensor) -> Tensor:
    return x * self.fc(pooled.movedim(1, -1)).movedim(-1, 1)


def block(self: ResidualBlock, x: Tensor) -> Tensor:
    return self.se(self.module_body(x)) + x


FORMS = {SqueezeExcitation: attention, ResidualBlock: block}
