"""FFA-Net: *Feature Fusion Attention Network for Single Image Dehazing*.

Qin, Wang, Bai, Xie, Jia; AAAI 2020. Groups of residual blocks at full resolution, each block with
channel and then pixel attention; one more channel attention weighs the outputs of the groups
against each other. The pooled means of the channel attentions are its global operations.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fullres.networks.layers import Conv2d, product, total, weighted
from fullres.networks.spec import Architecture, Spec, State, count

REDUCTION = 8
GROUP_REDUCTION = 16


class CALayer(nn.Module):
    """Channel attention: (B, C, H, W) to the same, weighted by channel.

    The map is multiplied in its own memory where nothing is derived.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.avg_pool = nn.AdaptiveAvgPool2d(1)
        self.ca = _attention(channels, channels // REDUCTION, channels)

    def forward(self, x: Tensor) -> Tensor:
        weights: Tensor = self.ca(self.avg_pool(x))
        return product(x, weights)


class PALayer(nn.Module):
    """Pixel attention: (B, C, H, W) to the same, weighted by position, in the same way.

    With a map added, where one is given.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.pa = _attention(channels, channels // REDUCTION, 1)

    def forward(self, x: Tensor, plus: Tensor | None = None) -> Tensor:
        weights: Tensor = self.pa(x)
        return product(x, weights) if plus is None else weighted(x, weights, plus)


class Block(nn.Module):
    """Two convolutions, channel attention and pixel attention, within a residual."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = Conv2d(channels, channels, 3, padding=1)
        self.act1 = nn.ReLU(inplace=True)
        self.conv2 = Conv2d(channels, channels, 3, padding=1)
        self.calayer = CALayer(channels)
        self.palayer = PALayer(channels)

    def forward(self, x: Tensor) -> Tensor:
        y = total(self.act1(self.conv1(x)), x)
        z: Tensor = self.palayer(self.calayer(self.conv2(y)), plus=x)
        return z


class Group(nn.Module):
    """Blocks and a convolution, within a residual."""

    def __init__(self, channels: int, blocks: int) -> None:
        super().__init__()
        last = Conv2d(channels, channels, 3, padding=1)
        self.gp = nn.Sequential(*(Block(channels) for _ in range(blocks)), last)

    def forward(self, x: Tensor) -> Tensor:
        return total(self.gp(x), x)


class FFANet(nn.Module):
    """FFA-Net (section 3): (B, img_channel, H, W) to the same shape, any H and W.

    Pictures are in [0, 1]; with `mean` and `std` the network restores (picture - mean) / std to
    a picture in [0, 1].

    Args:
        gps: groups.
        blocks: blocks of each group.
        dim: channels of the features, at least 16.
        img_channel: channels of the picture.
        mean: what is subtracted from each channel of the picture; empty for nothing.
        std: what each channel is divided by after that; given together with `mean`.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        gps: int = 3,
        blocks: int = 19,
        dim: int = 64,
        img_channel: int = 3,
        mean: Sequence[float] = (),
        std: Sequence[float] = (),
    ) -> None:
        super().__init__()
        if min(gps, img_channel) < 1 or blocks < 0 or dim < GROUP_REDUCTION:
            raise ValueError(
                "gps and img_channel must be at least 1, blocks at least 0 and dim at least "
                f"{GROUP_REDUCTION}, not {gps}, {img_channel}, {blocks} and {dim}"
            )
        if not len(mean) == len(std) in (0, img_channel) or min(std, default=1) <= 0:
            raise ValueError(
                "mean and std must both be empty or have one value for each channel of the "
                f"picture, positive in std, not {mean} and {std}"
            )
        self.gps = gps
        self.register_buffer("mean", torch.tensor(mean).reshape(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).reshape(-1, 1, 1), persistent=False)
        for number in range(1, gps + 1):
            self.add_module(f"g{number}", Group(dim, blocks))
        squeeze = _attention(gps * dim, dim // GROUP_REDUCTION, gps * dim)
        self.ca = nn.Sequential(nn.AdaptiveAvgPool2d(1), *squeeze)
        self.palayer = PALayer(dim)
        self.pre = nn.Sequential(nn.Conv2d(img_channel, dim, 3, padding=1))
        self.post = nn.Sequential(
            Conv2d(dim, dim, 3, padding=1), Conv2d(dim, img_channel, 3, padding=1)
        )

    def forward(self, image: Tensor) -> Tensor:
        if len(self.mean):
            image = (image - self.mean) / self.std
        x: Tensor = self.pre(image)
        groups = []
        for number in range(1, self.gps + 1):
            x = self.get_submodule(f"g{number}")(x)
            groups.append(x)
        # (B, gps * dim, 1, 1), or maps (B, gps * dim, H, W) where the pool is local
        weights: Tensor = self.ca(torch.cat(groups, 1))
        first, *others = weights.chunk(self.gps, 1)
        x = product(groups[0], first)
        for group, weight in zip(groups[1:], others, strict=True):
            x = weighted(group, weight, plus=x)
        y: Tensor = self.post(self.palayer(x))
        return image + y


def _attention(channels: int, squeezed: int, weights: int) -> nn.Sequential:
    return nn.Sequential(
        Conv2d(channels, squeezed, 1),
        nn.ReLU(inplace=True),
        nn.Conv2d(squeezed, weights, 1),
        nn.Sigmoid(),
    )


def _hyperparameters(state: State) -> dict[str, Any] | None:
    pre = state.get("pre.0.weight")
    if pre is None or pre.ndim != 4 or not {"ca.1.weight", "palayer.pa.0.weight"} <= state.keys():
        return None
    names = {name[1:]: tensor for name, tensor in state.items() if ".gp." in name}
    return {
        "gps": max(count(names, "") - 1, 0),
        "blocks": max(count(state, "g1.gp.") - 1, 0),  # the last is the group's convolution
        "dim": pre.shape[0],
        "img_channel": pre.shape[1],
    }


_MEAN, _STD = (0.64, 0.6, 0.58), (0.14, 0.15, 0.152)
_NOTES = frozenset(("max_psnr", "max_ssim", "psnrs", "ssims"))


def _published(stem: str, content: Mapping[Any, Any]) -> dict[str, Any]:
    """The authors' training states are of networks whose input is normalised."""
    return {"mean": _MEAN, "std": _STD} if content.keys() >= _NOTES else {}


def _spec(hyperparameters: Mapping[str, Any]) -> Spec:
    return Spec(
        architecture="ffanet",
        hyperparameters=hyperparameters,
        in_channels=hyperparameters["img_channel"],
        out_channels=hyperparameters["img_channel"],
    )


ARCHITECTURE = Architecture(
    name="ffanet",
    title="FFA-Net",
    paper="FFA-Net: Feature Fusion Attention Network for Single Image Dehazing, AAAI 2020",
    authors="Xu Qin, Zhilin Wang, Yuanchao Bai, Xiaodong Xie, Huizhu Jia",
    weights="https://github.com/zhilin007/FFA-Net (linked from the authors' page)",
    licence="none stated",
    tasks=("dehaze",),
    train_size=240,
    build=FFANet,
    hyperparameters=_hyperparameters,
    spec=_spec,
    published=_published,
)
