"""MPRNet: *Multi-Stage Progressive Image Restoration* (Zamir, Arora, Khan, Hayat, Khan, Yang,
Shao; CVPR 2021).

Two U-Nets, on the quarters of the picture and on its halves, and a third stage at full resolution
without downsampling; supervised attention between stages. The pooled means of the channel
attention blocks are its global operations.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fullres.networks.layers import Conv2d, pad_to_multiple, total, weighted
from fullres.networks.spec import Architecture, Spec, State, count

MULTIPLE = 8
"""Quarters of the picture are halved twice."""

Block = Callable[[int], nn.Module]
"""Makes a channel attention block for a number of channels."""

Conv = Callable[[int, int], nn.Module]
"""Makes a convolution that keeps the size, for channels in and out."""

Features = tuple[Tensor, Tensor, Tensor]
"""Features of an encoder or decoder at full, half and quarter resolution."""


class ChannelAttention(nn.Module):
    """Squeeze and excitation: each channel times a weight that its pooled mean decides.

    And a map added to it, all in the memory of the first map where nothing is derived.
    """

    def __init__(self, channels: int, reduction: int, bias: bool) -> None:
        super().__init__()
        squeezed = channels // reduction
        self.avg_pool = nn.AdaptiveAvgPool2d(1)
        self.conv_du = nn.Sequential(
            nn.Conv2d(channels, squeezed, 1, bias=bias),
            nn.ReLU(),
            nn.Conv2d(squeezed, channels, 1, bias=bias),
            nn.Sigmoid(),
        )

    def forward(self, x: Tensor, plus: Tensor) -> Tensor:
        y: Tensor = self.conv_du(self.avg_pool(x))
        return weighted(x, y, plus)


class CAB(nn.Module):
    """Channel attention block: two convolutions, channel attention, and the input added.

    Args:
        channels: channels of the input and of the output.
        kernel_size: side of the convolutions, odd.
        reduction: channels over squeezed channels.
        bias: whether the convolutions have one.
        act: the activation, a module that the blocks of a network share.
    """

    def __init__(
        self, channels: int, kernel_size: int, reduction: int, bias: bool, act: nn.Module
    ) -> None:
        super().__init__()
        conv = partial(Conv2d, kernel_size=kernel_size, padding=kernel_size // 2, bias=bias)
        self.CA = ChannelAttention(channels, reduction, bias)
        self.body = nn.Sequential(conv(channels, channels), act, conv(channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.CA(self.body(x), plus=x)
        return y


class Down(nn.Module):
    """Bilinear halving, then a 1×1 convolution."""

    def __init__(self, channels: int, wider: int) -> None:
        super().__init__()
        # on even sides, bilinear halving is the mean of 2×2 pixels
        self.down = nn.Sequential(nn.AvgPool2d(2), nn.Conv2d(channels, wider, 1, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(x)
        return y


class Up(nn.Module):
    """Bilinear doubling and a 1×1 convolution."""

    def __init__(self, channels: int, narrower: int) -> None:
        super().__init__()
        double = nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False)
        self.up = nn.Sequential(double, nn.Conv2d(channels, narrower, 1, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        double, conv = self.up
        # the two commute, and the convolution has a quarter of the pixels this way round
        y: Tensor = double(conv(x))
        return y


class Encoder(nn.Module):
    """U-Net encoder: two blocks at each of three scales.

    Args:
        width: channels at full resolution.
        step: channels added at each halving.
        block: makes the blocks.
        fusion: name of the 1×1 convolutions through which the features of an earlier encoder and
            decoder are added at each scale; none if empty.
        bias: whether these have a bias.
    """

    def __init__(self, width: int, step: int, block: Block, fusion: str, bias: bool) -> None:
        super().__init__()
        widths = (width, width + step, width + 2 * step)
        self.encoder_level1 = nn.Sequential(block(widths[0]), block(widths[0]))
        self.encoder_level2 = nn.Sequential(block(widths[1]), block(widths[1]))
        self.encoder_level3 = nn.Sequential(block(widths[2]), block(widths[2]))
        self.down12 = Down(widths[0], widths[1])
        self.down23 = Down(widths[1], widths[2])
        self.fusion = fusion
        for part in ("enc", "dec") if fusion else ():
            for level, channels in enumerate(widths, start=1):
                conv = nn.Conv2d(channels, channels, 1, bias=bias)
                self.add_module(f"{fusion}_{part}{level}", conv)

    def forward(self, x: Tensor, earlier: tuple[Features, Features] | None = None) -> Features:
        level1 = self._fused(1, self.encoder_level1(x), earlier)
        level2 = self._fused(2, self.encoder_level2(self.down12(level1)), earlier)
        level3 = self._fused(3, self.encoder_level3(self.down23(level2)), earlier)
        return level1, level2, level3

    def _fused(self, level: int, x: Tensor, earlier: tuple[Features, Features] | None) -> Tensor:
        if earlier is not None:
            for part, features in zip(("enc", "dec"), earlier, strict=True):
                conv = self.get_submodule(f"{self.fusion}_{part}{level}")
                x = total(x, conv(features[level - 1]))
        return x


class Decoder(nn.Module):
    """U-Net decoder: two blocks at each of three scales, skips through a block each."""

    def __init__(self, width: int, step: int, block: Block) -> None:
        super().__init__()
        widths = (width, width + step, width + 2 * step)
        self.decoder_level1 = nn.Sequential(block(widths[0]), block(widths[0]))
        self.decoder_level2 = nn.Sequential(block(widths[1]), block(widths[1]))
        self.decoder_level3 = nn.Sequential(block(widths[2]), block(widths[2]))
        self.skip_attn1 = block(widths[0])
        self.skip_attn2 = block(widths[1])
        self.up21 = Up(widths[1], widths[0])
        self.up32 = Up(widths[2], widths[1])

    def forward(self, encoded: Features) -> Features:
        level3 = self.decoder_level3(encoded[2])
        level2 = self.decoder_level2(total(self.up32(level3), self.skip_attn2(encoded[1])))
        level1 = self.decoder_level1(total(self.up21(level2), self.skip_attn1(encoded[0])))
        return level1, level2, level3


class ORB(nn.Module):
    """Original resolution block: blocks, a convolution, and the input added."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.body = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return total(self.body(x), x)


class ORSNet(nn.Module):
    """Original resolution subnetwork: three blocks, features of a U-Net added after each.

    Takes the features out of the lists that it is given, so that they need no room once added.

    Args:
        width: channels of the U-Net at full resolution.
        step: channels that the U-Net adds at each halving.
        extra: channels that this network has beyond `width`.
        blocks: channel attention blocks in each original resolution block.
        block: makes them.
        conv: makes the convolution that ends each original resolution block.
        bias: whether the 1×1 convolutions have one.
    """

    def __init__(
        self, width: int, step: int, extra: int, blocks: int, block: Block, conv: Conv, bias: bool
    ) -> None:
        super().__init__()
        own, half, quarter = width + extra, width + step, width + 2 * step
        self.orb1 = ORB(*(block(own) for _ in range(blocks)), conv(own, own))
        self.orb2 = ORB(*(block(own) for _ in range(blocks)), conv(own, own))
        self.orb3 = ORB(*(block(own) for _ in range(blocks)), conv(own, own))
        self.up_enc1 = Up(half, width)
        self.up_dec1 = Up(half, width)
        self.up_enc2 = nn.Sequential(Up(quarter, half), Up(half, width))
        self.up_dec2 = nn.Sequential(Up(quarter, half), Up(half, width))
        self.conv_enc1 = nn.Conv2d(width, own, 1, bias=bias)
        self.conv_enc2 = nn.Conv2d(width, own, 1, bias=bias)
        self.conv_enc3 = nn.Conv2d(width, own, 1, bias=bias)
        self.conv_dec1 = nn.Conv2d(width, own, 1, bias=bias)
        self.conv_dec2 = nn.Conv2d(width, own, 1, bias=bias)
        self.conv_dec3 = nn.Conv2d(width, own, 1, bias=bias)

    def forward(self, x: Tensor, encoded: list[Tensor], decoded: list[Tensor]) -> Tensor:
        x = self.orb1(x)
        x = total(x, self.conv_enc1(encoded.pop(0)))
        x = total(x, self.conv_dec1(decoded.pop(0)))
        x = self.orb2(x)
        x = total(x, self.conv_enc2(self.up_enc1(encoded.pop(0))))
        x = total(x, self.conv_dec2(self.up_dec1(decoded.pop(0))))
        x = self.orb3(x)
        x = total(x, self.conv_enc3(self.up_enc2(encoded.pop(0))))
        return total(x, self.conv_dec3(self.up_dec2(decoded.pop(0))))


class SAM(nn.Module):
    """Supervised attention module: a stage's picture, and its features as the picture weighs them.

    Features (B, C, H, W) and input picture (B, c, H, W) to features and restored picture.
    """

    def __init__(self, channels: int, img_channels: int, bias: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 1, bias=bias)
        self.conv2 = nn.Conv2d(channels, img_channels, 1, bias=bias)
        self.conv3 = nn.Conv2d(img_channels, channels, 1, bias=bias)

    def forward(self, x: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
        restored: Tensor = self.conv2(x) + image
        gate = torch.sigmoid(self.conv3(restored))
        return weighted(self.conv1(x), gate, x), restored


class MPRNet(nn.Module):
    """MPRNet (section 3): (B, in_c, H, W) to the same shape, values in [0, 1], any H and W.

    The defaults are those of the published deblurring network; denoising has 80, 48 and 32
    features, deraining 40, 20 and 16.

    Args:
        in_c: channels of the picture.
        out_c: channels of the restored picture, the same.
        n_feat: channels at full resolution.
        scale_unetfeats: channels that the U-Nets add at each halving.
        scale_orsnetfeats: channels that the third stage has beyond `n_feat`.
        num_cab: channel attention blocks in each of the third stage's three blocks.
        kernel_size: side of the convolutions, odd.
        reduction: channels over squeezed channels in channel attention.
        bias: whether the convolutions have one; those beside up- and downsampling never do.
    """

    def __init__(
        self,
        in_c: int = 3,
        out_c: int = 3,
        n_feat: int = 96,
        scale_unetfeats: int = 48,
        scale_orsnetfeats: int = 32,
        num_cab: int = 8,
        kernel_size: int = 3,
        reduction: int = 4,
        bias: bool = False,
    ) -> None:
        super().__init__()
        if not 1 <= in_c == out_c:
            raise ValueError(
                "in_c and out_c must be equal, as the network adds to its input, and positive, "
                f"not {in_c} and {out_c}"
            )
        if not 1 <= reduction <= n_feat:
            raise ValueError(f"reduction must lie in 1 to n_feat ({n_feat}), not {reduction}")
        if (
            min(scale_unetfeats, scale_orsnetfeats, num_cab, kernel_size) < 0
            or kernel_size % 2 == 0
        ):
            raise ValueError(
                "scale_unetfeats, scale_orsnetfeats and num_cab must not be negative, and "
                "kernel_size odd"
            )
        act = nn.PReLU()  # one for the whole network, as published: it stands under many names
        conv = partial(Conv2d, kernel_size=kernel_size, padding=kernel_size // 2, bias=bias)

        def block(channels: int) -> CAB:
            return CAB(channels, kernel_size, reduction, bias, act)

        width, step, extra = n_feat, scale_unetfeats, scale_orsnetfeats
        self.shallow_feat1 = nn.Sequential(conv(in_c, width), block(width))
        self.shallow_feat2 = nn.Sequential(conv(in_c, width), block(width))
        self.shallow_feat3 = nn.Sequential(conv(in_c, width), block(width))
        self.stage1_encoder = Encoder(width, step, block, "", bias)
        self.stage1_decoder = Decoder(width, step, block)
        self.stage2_encoder = Encoder(width, step, block, "csff", bias)
        self.stage2_decoder = Decoder(width, step, block)
        self.stage3_orsnet = ORSNet(width, step, extra, num_cab, block, conv, bias)
        self.sam12 = SAM(width, out_c, bias)
        self.sam23 = SAM(width, out_c, bias)
        self.concat12 = conv(2 * width, width)
        self.concat23 = conv(2 * width, width + extra)
        self.tail = conv(width + extra, out_c)

    def forward(self, image: Tensor) -> Tensor:
        return self.outputs(image)[0]

    def outputs(self, image: Tensor) -> tuple[Tensor, ...]:
        """What stages 3, 2 and 1 restore, the best first; the loss of the paper sums over all."""
        height, width = image.shape[-2:]
        image = pad_to_multiple(image, MULTIPLE)
        # both halves, then all quarters, as one batch
        halves = torch.cat(image.chunk(2, dim=-2))
        quarters = torch.cat(halves.chunk(2, dim=-1))

        encoded = self.stage1_encoder(self.shallow_feat1(quarters))
        encoded = tuple(_joined(x, dim=-1) for x in encoded)
        decoded = self.stage1_decoder(encoded)
        features, restored1 = self.sam12(decoded[0], halves)

        x = self.concat12(torch.cat((self.shallow_feat2(halves), features), dim=1))
        encoded = self.stage2_encoder(x, (encoded, decoded))
        encoded = [_joined(x, dim=-2) for x in encoded]
        decoded = [*self.stage2_decoder(encoded)]
        features, restored2 = self.sam23(decoded[0], image)
        del x  # what follows is the widest

        x = self.concat23(torch.cat((self.shallow_feat3(image), features), dim=1))
        del features
        restored3 = self.tail(self.stage3_orsnet(x, encoded, decoded)) + image
        restored = (restored3, restored2, _joined(restored1, dim=-2))
        return tuple(x[..., :height, :width] for x in restored)


def _joined(x: Tensor, dim: int) -> Tensor:
    """The two halves of a batch, side by side along `dim`."""
    return torch.cat(x.chunk(2), dim=dim)


def _hyperparameters(state: State) -> dict[str, Any] | None:
    intro, down, tail = (
        state.get(f"{name}.weight")
        for name in ("shallow_feat1.0", "stage1_encoder.down12.down.1", "tail")
    )
    reductions = [
        weight.shape[1] // weight.shape[0]
        for name, weight in state.items()
        if name.endswith(".CA.conv_du.0.weight") and weight.ndim == 4 and weight.shape[0] > 0
    ]
    if intro is None or down is None or tail is None or not reductions:
        return None
    if not intro.ndim == down.ndim == tail.ndim == 4:
        return None
    return {
        "in_c": intro.shape[1],
        "out_c": tail.shape[0],
        "n_feat": intro.shape[0],
        "scale_unetfeats": down.shape[0] - down.shape[1],
        "scale_orsnetfeats": tail.shape[1] - intro.shape[0],
        "num_cab": count(state, "stage3_orsnet.orb1.body.") - 1,
        "kernel_size": intro.shape[-1],
        # squeezed channels are rounded down, so each level sets an upper limit
        "reduction": min(reductions),
        "bias": "shallow_feat1.0.bias" in state,
    }


def _spec(hyperparameters: Mapping[str, Any]) -> Spec:
    return Spec(
        architecture="mprnet",
        hyperparameters=hyperparameters,
        in_channels=hyperparameters["in_c"],
        out_channels=hyperparameters["out_c"],
        multiple=MULTIPLE,
    )


ARCHITECTURE = Architecture(
    name="mprnet",
    title="MPRNet",
    paper="Multi-Stage Progressive Image Restoration, CVPR 2021",
    authors="Syed Waqas Zamir, Aditya Arora, Salman Khan, Munawar Hayat, Fahad Shahbaz Khan, "
    "Ming-Hsuan Yang, Ling Shao",
    weights="https://github.com/swz30/MPRNet (cloud drives linked there)",
    licence="non-commercial (ACADEMIC PUBLIC LICENSE)",
    tasks=("deblur", "denoise", "derain"),
    train_size=256,
    build=MPRNet,
    hyperparameters=_hyperparameters,
    spec=_spec,
)
