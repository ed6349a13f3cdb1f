"""UNet: baseline of *Improving Image Restoration by Revisiting Global Information Aggregation*.

By Xiaojie Chu, Liangyu Chen, Chengpeng Chen and Xin Lu (ECCV 2022, table 7). One stage of HINet
without its norm, its supervised attention and its convolutions on skips, and with one of the
usual attention modules or norms in the encoder: these are the network's global operations.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from math import gcd
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fullres.networks.hinet import UpBlock, conv3x3, decode, downsampling, encode, normalised
from fullres.networks.layers import pad_to_multiple
from fullres.networks.spec import Architecture, Spec, State, count


def squeeze(channels: int, reduction: int) -> list[nn.Module]:
    """The two layers that follow the pooling in SENet and CBAM."""
    reduced = max(channels // reduction, 1)
    return [nn.Conv2d(channels, reduced, 1), nn.ReLU(), nn.Conv2d(reduced, channels, 1)]


class SqueezeExcitation(nn.Module):
    """Channel attention of SENet (Hu et al., CVPR 2018): (B, C, H, W) to the same."""

    def __init__(self, channels: int, reduction: int) -> None:
        super().__init__()
        layers = squeeze(channels, reduction)
        self.gate = nn.Sequential(nn.AdaptiveAvgPool2d(1), *layers, nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x * self.gate(x)
        return y


class GatherExcite(nn.Module):
    """Gather-excite without parameters, of global extent (Hu et al., NeurIPS 2018).

    Shapes: (B, C, H, W) to the same.
    """

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Sigmoid())
        # nothing else would tell its checkpoints from those without attention
        self.register_buffer("mark", torch.empty(0))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x * self.gate(x)
        return y


class ConvBlockAttention(nn.Module):
    """CBAM (Woo et al., ECCV 2018), channel then spatial attention: (B, C, H, W) to the same."""

    def __init__(self, channels: int, reduction: int) -> None:
        super().__init__()
        self.average = nn.AdaptiveAvgPool2d(1)
        self.maximum = nn.AdaptiveMaxPool2d(1)
        self.mlp = nn.Sequential(*squeeze(channels, reduction))
        self.spatial = nn.Conv2d(2, 1, 7, padding=3)

    def forward(self, x: Tensor) -> Tensor:
        x = x * torch.sigmoid(self.mlp(self.average(x)) + self.mlp(self.maximum(x)))
        over_channels = torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], dim=1)
        return x * torch.sigmoid(self.spatial(over_channels))


class EncoderBlock(nn.Module):
    """Two 3 × 3 convolutions, each with what follows it, beside a 1 × 1 identity.

    Shapes: (B, in_channels, H, W) to a pair, the input of the level below and this level's
    features, (B, out_channels, H, W). The former has half the height and width with `down` and
    is the latter without.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        slope: float,
        attention: str,
        norm: str,
        down: bool,
        reduction: int,
    ) -> None:
        super().__init__()
        self.slope = slope
        self.identity = nn.Conv2d(in_channels, out_channels, 1)
        self.conv_1 = conv3x3(in_channels, out_channels)
        self.norm = _norm(norm, out_channels)
        self.conv_2 = conv3x3(out_channels, out_channels)
        self.attention = _attention(attention, out_channels, reduction)
        self.downsample = downsampling(out_channels) if down else None

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = F.leaky_relu(normalised(self.norm, self.conv_1(x)), self.slope)
        y = F.leaky_relu(self.attention(self.conv_2(y)), self.slope) + self.identity(x)
        return (y if self.downsample is None else self.downsample(y)), y


def _norm(kind: str, channels: int) -> nn.Sequential:
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    if kind == "in":
        layers["instance"] = nn.InstanceNorm2d(channels, affine=True)
    elif kind == "gn":
        # 16 channels a group (Wu and He, ECCV 2018), as near as the number of channels allows
        layers["group"] = nn.GroupNorm(channels // gcd(channels, 16), channels)
    return nn.Sequential(layers)


def _attention(kind: str, channels: int, reduction: int) -> nn.Sequential:
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    if kind == "se":
        layers["se"] = SqueezeExcitation(channels, reduction)
    elif kind == "ge":
        layers["ge"] = GatherExcite()
    elif kind == "cbam":
        layers["cbam"] = ConvBlockAttention(channels, reduction)
    return nn.Sequential(layers)


class UNet(nn.Module):
    """UNet (table 7): (B, in_chn, H, W) to the same shape, values in [0, 1], any H and W.

    Args:
        in_chn: channels of the picture.
        width: channels at full resolution; doubled at every level.
        depth: levels.
        relu_slope: slope of the leaky ReLUs below zero.
        attention: after the second convolution of the encoder's blocks: squeeze-and-excitation,
            gather-excite without parameters, or CBAM.
        norm: after the first convolution of the encoder's blocks: instance norm, or group norm
            with 16 channels a group.
        reduction: channels over those between the two layers of the attention.
    """

    def __init__(
        self,
        in_chn: int = 3,
        width: int = 32,
        depth: int = 5,
        relu_slope: float = 0.2,
        attention: Literal["none", "se", "ge", "cbam"] = "none",
        norm: Literal["none", "in", "gn"] = "none",
        reduction: int = 16,
    ) -> None:
        super().__init__()
        if min(in_chn, width, depth, reduction) < 1:
            raise ValueError("in_chn, width, depth and reduction must be positive")
        self.multiple = 2 ** (depth - 1)
        channels = [width * 2**level for level in range(depth)]
        self.first = conv3x3(in_chn, width)
        self.down_path = nn.ModuleList()
        for level, (above, here) in enumerate(zip([width, *channels], channels, strict=False)):
            down = level + 1 < depth
            block = EncoderBlock(above, here, relu_slope, attention, norm, down, reduction)
            self.down_path.append(block)
        self.up_path = nn.ModuleList(UpBlock(c, relu_slope) for c in channels[-2::-1])
        self.last = conv3x3(width, in_chn)

    def forward(self, image: Tensor) -> Tensor:
        height, width = image.shape[-2:]
        image = pad_to_multiple(image, self.multiple)
        x, skips = encode(self.down_path, self.first(image), [()] * len(self.down_path))
        x, _ = decode(self.up_path, x, reversed(skips))
        restored: Tensor = self.last(x) + image
        return restored[..., :height, :width]


_ATTENTIONS = {
    "se": "se.gate.1.weight",
    "ge": "ge.mark",
    "cbam": "cbam.spatial.weight",
}
_SQUEEZED = {"se": "se.gate.1.weight", "cbam": "cbam.mlp.0.weight"}
_NORMS = {"in": "instance.weight", "gn": "group.weight"}


def _hyperparameters(state: State) -> dict[str, Any] | None:
    first, depth = state.get("first.weight"), count(state, "down_path.")
    block = "down_path.0"
    if first is None or first.ndim != 4 or depth < 1 or f"{block}.conv_1.weight" not in state:
        return None
    attentions = [k for k, name in _ATTENTIONS.items() if f"{block}.attention.{name}" in state]
    norms = [k for k, name in _NORMS.items() if f"{block}.norm.{name}" in state]
    found: dict[str, Any] = {
        "in_chn": first.shape[1],
        "width": first.shape[0],
        "depth": depth,
        "attention": next(iter(attentions), "none"),
        "norm": next(iter(norms), "none"),
    }
    # the deepest block has the most channels, which tell the reduction best
    deepest = f"down_path.{depth - 1}.attention.{_SQUEEZED.get(found['attention'])}"
    if deepest in state:
        reduced, channels = state[deepest].shape[:2]
        usual = max(channels // 16, 1) == reduced
        found["reduction"] = 16 if usual else channels // reduced
    return found


def _spec(hyperparameters: Mapping[str, Any]) -> Spec:
    return Spec(
        architecture="unet",
        hyperparameters=hyperparameters,
        in_channels=hyperparameters["in_chn"],
        out_channels=hyperparameters["in_chn"],
        multiple=2 ** (hyperparameters["depth"] - 1),
    )


ARCHITECTURE = Architecture(
    name="unet",
    title="UNet",
    paper="Improving Image Restoration by Revisiting Global Information Aggregation, ECCV 2022",
    authors="Xiaojie Chu, Liangyu Chen, Chengpeng Chen, Xin Lu",
    weights="none published",
    licence="none",
    tasks=("deblur", "denoise"),
    train_size=256,
    build=UNet,
    hyperparameters=_hyperparameters,
    spec=_spec,
)
