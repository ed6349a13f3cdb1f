"""PANet: *Pyramid Attention Networks for Image Restoration* (Mei, Fan, Zhang, Yu, Zhou, Liu, Fu,
Huang, Shi; arXiv 2020).

A chain of residual blocks with one block of pyramid attention in the middle: every 3×3 patch of
the features attends to the patches of the features at five scales, which is the network's global
operation.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fullres.networks.layers import Conv2d, local_already, sharing
from fullres.networks.spec import Architecture, Spec, State, count
from fullres.ops.pyramid import EPS, SCALES, pyramid_attention

MEAN = (0.4488, 0.4371, 0.4040)
"""Mean colour of the training pictures (DIV2K)."""


class PyramidAttention(nn.Module):
    """Pyramid attention (section 3.2): (B, channel, H, W) to the same.

    Args:
        level: scales: 1, 0.9, …, of which five were published.
        res_scale: factor of the input, which is added to what attention gives.
        channel: channels of the map.
        reduction: channels of the map over those of queries and keys.
        softmax_scale: factor of the scores.
    """

    window: tuple[int, int] | None = None
    """Height and width of the window in positions; None for the whole map."""

    def __init__(
        self,
        level: int = 5,
        res_scale: float = 1.0,
        channel: int = 64,
        reduction: int = 2,
        softmax_scale: float = 10.0,
    ) -> None:
        super().__init__()
        if not 1 <= level <= len(SCALES):
            raise ValueError(f"level must be from 1 to {len(SCALES)}, not {level}")
        if reduction < 1 or channel < reduction:
            raise ValueError("reduction must be from 1 to the number of channels")
        self.level, self.res_scale, self.softmax_scale = level, res_scale, softmax_scale
        self.register_buffer("escape_NaN", torch.full((1,), EPS))  # in published checkpoints
        self.conv_match_L_base = _embedding(channel, channel // reduction)
        self.conv_match = _embedding(channel, channel // reduction)
        self.conv_assembly = _embedding(channel, channel)

    def forward(self, x: Tensor) -> Tensor:
        scales = SCALES[: self.level]
        keys, values = [], []
        for scale in scales:
            y = _resized(x, scale)
            keys.append(self.conv_match(y))
            values.append(self.conv_assembly(y))
        attended = pyramid_attention(
            self.conv_match_L_base(x),
            keys,
            values,
            window=self.window,
            scales=scales,
            softmax_scale=self.softmax_scale,
        )
        return attended + x * self.res_scale

    def to_local(self, window: tuple[int, int]) -> LocalPyramidAttention:
        """The same attention within windows, sharing the parameters of this one.

        Args:
            window: height and width in positions of the map.
        """
        return sharing(self, LocalPyramidAttention, window=window)


class LocalPyramidAttention(PyramidAttention):
    """Pyramid attention of each position to what a window around it covers of every scale.

    The windows are those of `fullres.ops.pyramid.window_spans`. Where they cover the map, the same
    as the global form.
    """

    window: tuple[int, int]

    def to_local(self, window: tuple[int, int]) -> LocalPyramidAttention:
        """Refused: it is local.

        Raises:
            ConversionError: always.
        """
        raise local_already(self)

    def extra_repr(self) -> str:
        return f"window={self.window[0]}×{self.window[1]}"


def _embedding(channels: int, embedded: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(channels, embedded, 1), nn.PReLU())


def _resized(x: Tensor, scale: float) -> Tensor:
    """Bicubic, aligned as if the map went on: position 10 n of the map stays 10 n · scale."""
    if scale == 1:
        return x
    least = math.ceil(1 / scale)  # a shorter side would vanish
    bottom, right = (max(least - side, 0) for side in x.shape[-2:])
    if bottom or right:
        x = F.pad(x, (0, right, 0, bottom), mode="replicate")
    return F.interpolate(x, scale_factor=scale, mode="bicubic")


class ResBlock(nn.Module):
    """Two 3×3 convolutions, times `res_scale`, plus the input.

    Args:
        channels: channels of the map.
        activation: between the convolutions; may be shared with other blocks.
        res_scale: factor of what the convolutions give.
    """

    def __init__(self, channels: int, activation: nn.Module, res_scale: float) -> None:
        super().__init__()
        self.body = nn.Sequential(_conv(channels, channels), activation, _conv(channels, channels))
        self.res_scale = res_scale

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.body(x) * self.res_scale
        return y + x


class MeanShift(nn.Conv2d):
    """Adds `sign` times the mean colour; fixed weights, as published.

    Args:
        rgb_range: white.
        sign: 1 or -1.
    """

    def __init__(self, rgb_range: float, sign: int) -> None:
        super().__init__(3, 3, 1)
        with torch.no_grad():
            self.weight.copy_(torch.eye(3)[:, :, None, None])
            assert self.bias is not None
            self.bias.copy_(sign * rgb_range * torch.tensor(MEAN))
        self.requires_grad_(False)


def _conv(channels: int, out: int) -> Conv2d:
    return Conv2d(channels, out, 3, padding=1)


class PANet(nn.Module):
    """PANet (section 3.3): (B, n_colors, H, W) to the same shape, values from 0 to `rgb_range`.

    Any H and W. Hyperparameters are named as in the published option files.

    Args:
        n_resblocks: residual blocks, an even number; attention is in the middle.
        n_feats: channels of the features, an even number.
        n_colors: channels of the picture.
        rgb_range: white.
        res_scale: factor of what residual blocks add.
    """

    def __init__(
        self,
        n_resblocks: int = 80,
        n_feats: int = 64,
        n_colors: int = 3,
        rgb_range: float = 1.0,
        res_scale: float = 1.0,
    ) -> None:
        super().__init__()
        check(n_resblocks, n_feats, n_colors, rgb_range)
        # published checkpoints hold the mean colour, which the network does not use
        self.sub_mean, self.add_mean = MeanShift(rgb_range, -1), MeanShift(rgb_range, 1)
        self.head = nn.Sequential(_conv(n_colors, n_feats))
        activation = nn.PReLU()  # one for all blocks
        blocks = [ResBlock(n_feats, activation, res_scale) for _ in range(n_resblocks)]
        attention = PyramidAttention(channel=n_feats)
        self.body = body_of(blocks, attention, n_feats)
        self.tail = nn.Sequential(_conv(n_feats, n_colors))

    def forward(self, image: Tensor) -> Tensor:
        x = self.head(image)
        y: Tensor = self.tail(self.body(x) + x)
        return y


def check(n_resblocks: int, n_feats: int, n_colors: int, rgb_range: float) -> None:
    """Refuse hyperparameters that cannot be.

    Raises:
        ValueError: a hyperparameter cannot be.
    """
    if n_resblocks < 2 or n_resblocks % 2:
        raise ValueError("n_resblocks must be even and positive")
    if n_feats < 2 or n_feats % 2:
        raise ValueError("n_feats must be even and positive")
    if n_colors < 1:
        raise ValueError("n_colors must be positive")
    if not 0 < rgb_range < math.inf:
        raise ValueError("rgb_range must be positive")


def body_of(blocks: list[ResBlock], attention: PyramidAttention, channels: int) -> nn.Sequential:
    """Residual blocks with attention in their middle, then a convolution."""
    middle = len(blocks) // 2
    return nn.Sequential(*blocks[:middle], attention, *blocks[middle:], _conv(channels, channels))


def body_hyperparameters(state: State) -> dict[str, Any] | None:
    """Hyperparameters that PANet and PA-EDSR share; None if the state dict is of neither."""
    blocks = count(state, "body.") - 2
    names = ["head.0.weight", f"body.{blocks // 2}.conv_assembly.0.weight", "body.0.body.0.weight"]
    if any(name not in state or state[name].ndim != 4 for name in names):
        return None
    head = state[names[0]].shape
    found: dict[str, Any] = {"n_resblocks": blocks, "n_feats": head[0], "n_colors": head[1]}
    mean = state.get("add_mean.bias")
    if mean is not None and mean.shape == (3,) and not mean.is_meta:
        white = float(mean[0]) / MEAN[0]
        found["rgb_range"] = float(round(white)) if abs(white - round(white)) < 1e-3 else white
    return found


def _hyperparameters(state: State) -> dict[str, Any] | None:
    if "tail.0.weight" not in state or "body.0.body.1.weight" not in state:
        return None
    return body_hyperparameters(state)


def _spec(hyperparameters: Mapping[str, Any]) -> Spec:
    return Spec(
        architecture="panet",
        hyperparameters=hyperparameters,
        in_channels=hyperparameters["n_colors"],
        out_channels=hyperparameters["n_colors"],
        value_range=hyperparameters["rgb_range"],
    )


ARCHITECTURE = Architecture(
    name="panet",
    title="PANet",
    paper="Pyramid Attention Networks for Image Restoration, 2020",
    authors="Yiqun Mei, Yuchen Fan, Yulun Zhang, Jiahui Yu, Yuqian Zhou, Ding Liu, Yun Fu, "
    "Thomas S. Huang, Humphrey Shi",
    weights="https://github.com/SHI-Labs/Pyramid-Attention-Networks (linked from its README)",
    licence="none stated",
    tasks=("demosaic", "denoise", "jpeg"),
    train_size=48,
    build=PANet,
    hyperparameters=_hyperparameters,
    spec=_spec,
)
