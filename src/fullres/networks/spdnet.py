"""SPDNet: *Structure-Preserving Deraining with Residue Channel Prior Guidance* (Yi, Li, Dai, Fang,
Zhang, Zeng; ICCV 2021).

The residue channel of a rainy picture, the largest minus the smallest of its colours at each pixel,
shows structure and next to no rain. It guides three networks of three wavelet levels each; the
second and third are guided by the residue of the estimate before. The pooled means of the
squeeze-and-excitation blocks are the global operations.

Names, shapes and the number of parameters are those of the reference case. Its outputs are not
verified: they were computed with wavelet layers of weights that it does not list. `down2`, `down3`
and `IDWT_*` are in checkpoints and take no part in the forward, nor do the norms of layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import sqrt
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fullres.networks.layers import Conv2d, local_already, product, sharing, total, weighted
from fullres.networks.spec import Architecture, Spec, State, count
from fullres.ops.arrays import derives
from fullres.ops.box import local_mean
from fullres.ops.frames import Frame
from fullres.ops.gate import Layer, gated

PRIOR_CHANNELS = 32
"""Channels of features and prior, which the prior block fixes."""


def residue(picture: Tensor) -> Tensor:
    """Residue channel: (B, 3, H, W) to the largest minus the smallest colour, in three copies."""
    channel = picture.amax(1, keepdim=True) - picture.amin(1, keepdim=True)
    return channel.expand(-1, 3, -1, -1)


def _reflected(x: Tensor) -> Tensor:
    """One pixel more on each side, reflected; repeated where the side has a single pixel."""
    height, width = x.shape[-2:]
    if height == 1 or width == 1:
        return F.pad(x, (1, 1, 1, 1), mode="replicate")
    return F.pad(x, (1, 1, 1, 1), mode="reflect")


class ConvLayer(nn.Module):
    """Reflection padding, 3 × 3 convolution, ReLU."""

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1) -> None:
        super().__init__()
        self.conv = Conv2d(in_channels, out_channels, 3, stride)
        self.ins = nn.InstanceNorm2d(out_channels, affine=True)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(_reflected(x))
        return F.relu_(y)


class UpsampleLayer(nn.Module):
    """Reflection padding, transposed 3 × 3 convolution of stride 2, nearest resizing to a size."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv2d = nn.ConvTranspose2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        enlarged: Tensor = self.conv2d(_reflected(x))
        return F.interpolate(enlarged, size=size)


class SqueezeExcitation(nn.Module):
    """Channel attention with linear layers on the pooled vector: (B, C, H, W) to the same.

    `plus` is added. The result takes the map's own memory where nothing is derived.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.fc = nn.Sequential(
            nn.Linear(channels, channels, bias=False),
            nn.ReLU(),
            nn.Linear(channels, channels, bias=False),
            nn.Sigmoid(),
        )

    def forward(self, x: Tensor, plus: Tensor) -> Tensor:
        batch, channels = x.shape[:2]
        gate: Tensor = self.fc(x.mean((2, 3)))
        return weighted(x, gate.view(batch, channels, 1, 1), plus)

    def to_local(self, window: tuple[int, int]) -> LocalSqueezeExcitation:
        """The same attention by local means, sharing the parameters of this one.

        Args:
            window: height and width in positions of the map.
        """
        return sharing(self, LocalSqueezeExcitation, window=window)


class LocalSqueezeExcitation(SqueezeExcitation):
    """Channel attention by the means of a window around each position.

    The same as with a converted pooling, in fewer steps, which there are many of on small maps.
    """

    window: tuple[int, int]

    def forward(self, x: Tensor, plus: Tensor) -> Tensor:
        frame = Frame.of((x.shape[2], x.shape[3]), self.window)
        if frame.windows == (1, 1):
            return super().forward(x, plus)
        first, second = (layer.weight for layer in self.fc if isinstance(layer, nn.Linear))
        relu, sigmoid = Layer(activation="relu"), Layer(activation="sigmoid")
        layers = (Layer(first), relu, Layer(second), sigmoid)
        means = local_mean(x, self.window, replicate=False)
        in_place = not derives()
        return gated(x, means, layers, frame, plus=plus, in_place=in_place)

    def to_local(self, window: tuple[int, int]) -> LocalSqueezeExcitation:
        """Refused: it is local.

        Raises:
            ConversionError: always.
        """
        raise local_already(self)

    def extra_repr(self) -> str:
        return f"window={self.window[0]}×{self.window[1]}"


class ResidualBlock(nn.Module):
    """Two 3 × 3 convolutions and channel attention, added to the input."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.module_body = nn.Sequential(
            Conv2d(channels, channels, 3, padding=1),
            nn.ReLU(inplace=True),
            Conv2d(channels, channels, 3, padding=1),
        )
        self.se = SqueezeExcitation(channels)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.se(self.module_body(x), plus=x)
        return y


class ResidualGroup(nn.Module):
    """Residual blocks and a 3 × 3 convolution, added to the input, ReLU."""

    def __init__(self, channels: int, blocks: int) -> None:
        super().__init__()
        self.module_body = nn.Sequential(
            *(ResidualBlock(channels) for _ in range(blocks)),
            Conv2d(channels, channels, 3, padding=1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return F.relu_(total(self.module_body(x), x))


class PriorBlock(nn.Module):
    """Features and prior attend to where they agree: two maps (B, 32, H, W) to the same."""

    def __init__(self) -> None:
        super().__init__()
        channels = PRIOR_CHANNELS
        self.query_conv = Conv2d(channels, channels, 3, padding=1)
        self.key_conv = Conv2d(channels, channels, 3, padding=1)
        self.gamma1 = Conv2d(2 * channels, 2, 3, padding=1)
        self.gamma2 = Conv2d(2 * channels, 2, 3, padding=1)

    def forward(self, x: Tensor, prior: Tensor) -> tuple[Tensor, Tensor]:
        attention = torch.sigmoid(self.query_conv(x) * self.key_conv(prior))
        return _gated(x, attention, self.gamma1), _gated(prior, attention, self.gamma2)


def _gated(x: Tensor, attention: Tensor, gamma: nn.Module) -> Tensor:
    attended = x * attention
    own, shared = gamma(torch.cat([x, attended], 1)).chunk(2, 1)
    return total(product(attended, shared), x * own)


class Haar(nn.Module):
    """Haar transform, (B, C, H, W) to (B, 4C, ⌈H/2⌉, ⌈W/2⌉): averages, then three differences."""

    def __init__(self) -> None:
        super().__init__()
        half = 1 / sqrt(2)
        for name, pair in (("h0", (half, half)), ("h1", (half, -half))):
            self.register_buffer(f"{name}_col", torch.tensor(pair).reshape(1, 1, 2, 1))
            self.register_buffer(f"{name}_row", torch.tensor(pair).reshape(1, 1, 1, 2))

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        x = F.pad(x, (0, width % 2, 0, height % 2), mode="replicate")
        a, b, c, d = (x[..., i::2, j::2] for i in (0, 1) for j in (0, 1))
        bands = (a + b + c + d, a + b - c - d, a - b + c - d, a - b - c + d)
        return torch.cat(bands, 1) / 2


class InverseHaar(nn.Module):
    """Filters of the inverse Haar transform, which checkpoints hold; takes no part."""

    def __init__(self) -> None:
        super().__init__()
        half = 1 / sqrt(2)
        for name, pair in (("g0", (half, half)), ("g1", (half, -half))):
            self.register_buffer(f"{name}_col", torch.tensor(pair).reshape(1, 1, 2, 1))
            self.register_buffer(f"{name}_row", torch.tensor(pair).reshape(1, 1, 1, 2))


class Fuse(nn.Module):
    """A coarser level's features, refined, upsampled and added to a finer level's."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.up = UpsampleLayer(channels)
        self.conv = ConvLayer(channels, channels)
        self.rb = ResidualBlock(channels)

    def forward(self, fine: Tensor, coarse: Tensor) -> Tensor:
        return total(self.up(self.rb(self.conv(coarse)), _size(fine)), fine)


def _size(x: Tensor) -> tuple[int, int]:
    return x.shape[2], x.shape[3]


class WaveletNetwork(nn.Module):
    """Features and prior fused, then three wavelet levels in three turns that exchange features.

    Shapes: features and prior (B, C, H, W) to features (B, C, H, W).
    """

    def __init__(self, channels: int, blocks: int) -> None:
        super().__init__()
        self.prior = PriorBlock()
        self.fuse_res = ConvLayer(2 * channels, channels)
        self.DWT, self.IDWT = Haar(), InverseHaar()
        for level in (1, 2, 3):
            for turn in (1, 2, 3):
                self.add_module(f"branch{level}_{turn}", ResidualGroup(channels, blocks))
                if turn < 3 and level > 1:
                    self.add_module(f"branch{level}_{turn}_u", UpsampleLayer(channels))
                if turn < 3 and level < 3:
                    self.add_module(f"branch{level}_{turn}_d", ConvLayer(channels, channels, 2))
            if level < 3:
                self.add_module(f"down{level + 1}", ConvLayer(channels, channels, 2))
        self.fuse12, self.fuse23 = Fuse(channels), Fuse(channels)
        self.DWT_2, self.DWT_3 = (ConvLayer(4 * channels, channels) for _ in range(2))
        self.IDWT_2, self.IDWT_3 = (ConvLayer(channels, 4 * channels) for _ in range(2))

    def forward(self, x: Tensor, prior: Tensor) -> Tensor:
        fused = self.fuse_res(torch.cat(self.prior(x, prior), 1))
        half = self.DWT_2(self.DWT(fused))
        levels = [fused, half, self.DWT_3(self.DWT(half))]
        for turn in (1, 2, 3):
            levels = [
                self.get_submodule(f"branch{level}_{turn}")(y) for level, y in enumerate(levels, 1)
            ]
            if turn < 3:
                levels = self._exchanged(levels, turn)
        fine, middle, coarse = levels
        y: Tensor = self.fuse12(fine, self.fuse23(middle, coarse))
        return y

    def _exchanged(self, levels: list[Tensor], turn: int) -> list[Tensor]:
        """Each level with what its neighbours give it."""
        exchanged = list(levels)
        for i, y in enumerate(levels):
            if i > 0:
                up = self.get_submodule(f"branch{i + 1}_{turn}_u")
                exchanged[i - 1] = total(up(y, _size(levels[i - 1])), exchanged[i - 1])
            if i < 2:
                down = self.get_submodule(f"branch{i + 1}_{turn}_d")
                exchanged[i + 1] = total(down(y), exchanged[i + 1])
        return exchanged


class PriorFeatures(nn.Module):
    """Features of a residue channel: (B, 3, H, W) to (B, C, H, W)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv_init1 = ConvLayer(3, channels // 2)
        self.conv_init2 = ConvLayer(channels // 2, channels)
        self.extra = ResidualGroup(channels, 1)

    def forward(self, picture: Tensor) -> Tensor:
        y: Tensor = self.extra(self.conv_init2(self.conv_init1(residue(picture))))
        return y


class SPDNet(nn.Module):
    """SPDNet (section 3): (B, 3, H, W) to the same shape, values in [0, 1], any H and W.

    Args:
        n_feats: channels; the prior block takes 32 only.
        n_resblocks: residual blocks of a group.
    """

    def __init__(self, n_feats: int = PRIOR_CHANNELS, n_resblocks: int = 3) -> None:
        super().__init__()
        if n_feats != PRIOR_CHANNELS or n_resblocks < 1:
            raise ValueError(f"n_feats must be {PRIOR_CHANNELS}, and n_resblocks at least 1")
        c = n_feats
        self.conv_init1, self.conv_init2 = ConvLayer(3, c // 2), ConvLayer(c // 2, c)
        self.res_extra1 = PriorFeatures(c)
        self.sub1, self.sub2, self.sub3 = (WaveletNetwork(c, n_resblocks) for _ in range(3))
        self.res_extra2, self.res_extra3 = PriorFeatures(c), PriorFeatures(c)
        self.ag1, self.ag2 = ConvLayer(2 * c, c), ConvLayer(3 * c, c)
        self.ag2_en, self.ag_en = ConvLayer(2 * c, c), ConvLayer(3 * c, c)
        self.output1, self.output2, self.output3 = (Conv2d(c, 3, 3, padding=1) for _ in range(3))

    def forward(self, image: Tensor) -> Tensor:
        return self.outputs(image)[0]

    def outputs(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The estimates of the third, the second and the first network."""
        x = self.conv_init2(self.conv_init1(image))
        first = self.sub1(x, self.res_extra1(image))
        estimate1 = self.output1(first)
        x2 = self.ag1(torch.cat([x, first], 1))
        second = self.sub2(x2, self.res_extra2(estimate1))
        second = self.ag2_en(torch.cat([first, second], 1))
        estimate2 = self.output2(second)
        x3 = self.ag2(torch.cat([x, first, second], 1))
        third = self.sub3(x3, self.res_extra3(estimate2))
        third = self.ag_en(torch.cat([first, second, third], 1))
        return self.output3(third), estimate2, estimate1


def _hyperparameters(state: State) -> dict[str, Any] | None:
    if "sub1.prior.query_conv.weight" not in state or "ag_en.conv.weight" not in state:
        return None
    return {
        "n_feats": state["ag_en.conv.weight"].shape[0],
        "n_resblocks": count(state, "sub1.branch1_1.module_body.") - 1,
    }


def _spec(hyperparameters: Mapping[str, Any]) -> Spec:
    return Spec(
        architecture="spdnet",
        hyperparameters=hyperparameters,
        in_channels=3,
        out_channels=3,
        multiple=4,
    )


ARCHITECTURE = Architecture(
    name="spdnet",
    title="SPDNet",
    paper="Structure-Preserving Deraining with Residue Channel Prior Guidance, ICCV 2021",
    authors="Qiaosi Yi, Juncheng Li, Qinyan Dai, Faming Fang, Guixu Zhang, Tieyong Zeng",
    weights="https://github.com/Joyies/SPDNet",
    licence="none stated",
    tasks=("derain",),
    train_size=128,
    build=SPDNet,
    hyperparameters=_hyperparameters,
    spec=_spec,
)
