"""Restormer: *Restormer: Efficient Transformer for High-Resolution Image Restoration* (Zamir,
Arora, Khan, Hayat, Khan, Yang; CVPR 2022).

A four-level U-Net of transformer blocks. Attention is transposed: channels attend to channels,
by their correlation over all positions, which is the network's global operation.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fullres.networks.layers import (
    Conv2d,
    LayerNorm2d,
    local_already,
    pad_to_multiple,
    sharing,
    total,
)
from fullres.networks.spec import Architecture, Spec, State, count
from fullres.ops.depthwise import depthwise, depthwise_geglu
from fullres.ops.parts import in_parts
from fullres.ops.windows import projected_attention

MULTIPLE = 8
"""Three halvings."""

Norm = Literal["WithBias", "BiasFree"]


class BiasFreeNorm(nn.Module):
    """Each pixel over its standard deviation across channels, the mean kept; weight, no bias."""

    def __init__(self, channels: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        scale = torch.rsqrt(x.var(1, correction=0, keepdim=True) + self.eps)
        return x * scale * self.weight[:, None, None]


class LayerNorm(nn.Module):
    """Layer norm over the channels of each pixel, of either type."""

    def __init__(self, channels: int, kind: Norm) -> None:
        super().__init__()
        with_bias = kind == "WithBias"
        self.body = LayerNorm2d(channels, eps=1e-5) if with_bias else BiasFreeNorm(channels)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.body(x)
        return y


class TransposedAttention(nn.Module):
    """Multi-Dconv head transposed attention (section 3.1): (B, channels, H, W) to the same.

    Args:
        channels: channels of the map.
        heads: groups of channels that attend among themselves; divides `channels`.
        bias: whether the convolutions have one.
    """

    window: tuple[int, int] | None = None
    """Height and width of the window in positions; None for the whole map."""
    stride: tuple[int, int] | None = None
    """Positions between windows; None for as few windows as cover the map."""

    def __init__(self, channels: int, heads: int, bias: bool) -> None:
        super().__init__()
        wide = 3 * channels
        self.temperature = nn.Parameter(torch.ones(heads, 1, 1))
        self.qkv = nn.Conv2d(channels, wide, 1, bias=bias)
        self.qkv_dwconv = nn.Conv2d(wide, wide, 3, padding=1, groups=wide, bias=bias)
        self.project_out = nn.Conv2d(channels, channels, 1, bias=bias)

    def forward(self, x: Tensor, norm: nn.Module | None = None) -> Tensor:
        """The attended map; with a norm, position by position, `x + attended(norm(x))`.

        Which takes one map of memory, where nothing is derived, and no whole map of the norm's.
        """
        return projected_attention(
            lambda part: self._project(part if norm is None else norm(part)),
            x,
            self.temperature,
            self.project_out.weight,
            self.project_out.bias,
            self.window,
            self.stride,
            residual=None if norm is None else x,
            channels=3 * x.shape[1],
            halo=1,
        )

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        conv = self.qkv_dwconv
        q, k, v = depthwise(self.qkv(x), conv.weight, conv.bias).chunk(3, dim=1)
        return q, k, v

    def to_local(
        self, window: tuple[int, int], stride: tuple[int, int] | None = None
    ) -> LocalTransposedAttention:
        """The same attention within overlapping windows, sharing the parameters of this one.

        Args:
            window: height and width in positions of the map.
            stride: positions between windows, at most the window; down to (1, 1), every window.
                By default as few windows as cover the map.
        """
        return sharing(self, LocalTransposedAttention, window=window, stride=stride)


class LocalTransposedAttention(TransposedAttention):
    """Transposed attention within overlapping windows, averaged where they overlap.

    Without a stride as few windows as cover the map, spaced evenly
    (`fullres.ops.windows.window_starts`). Where one covers it, the same as the global form.
    """

    window: tuple[int, int]

    def to_local(
        self, window: tuple[int, int], stride: tuple[int, int] | None = None
    ) -> LocalTransposedAttention:
        """Refused: it is local.

        Raises:
            ConversionError: always.
        """
        raise local_already(self)

    def extra_repr(self) -> str:
        return f"window={self.window[0]}×{self.window[1]}"


class GatedFeedForward(nn.Module):
    """Gated-Dconv feed-forward network (section 3.2): (B, channels, H, W) to the same."""

    def __init__(self, channels: int, expansion: float, bias: bool) -> None:
        super().__init__()
        hidden = _hidden(channels, expansion)
        wide = 2 * hidden
        self.project_in = nn.Conv2d(channels, wide, 1, bias=bias)
        self.dwconv = nn.Conv2d(wide, wide, 3, padding=1, groups=wide, bias=bias)
        self.project_out = nn.Conv2d(hidden, channels, 1, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        x = depthwise_geglu(self.project_in(x), self.dwconv.weight, self.dwconv.bias)
        y: Tensor = self.project_out(x)
        return y


def _hidden(channels: int, expansion: float) -> int:
    return int(channels * expansion)


class TransformerBlock(nn.Module):
    """Attention, then feed-forward, each behind a layer norm and added to its input."""

    def __init__(self, channels: int, heads: int, expansion: float, bias: bool, norm: Norm) -> None:
        super().__init__()
        self.norm1 = LayerNorm(channels, norm)
        self.attn = TransposedAttention(channels, heads, bias)
        self.norm2 = LayerNorm(channels, norm)
        self.ffn = GatedFeedForward(channels, expansion, bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.attn(x, norm=self.norm1)
        wide = self.ffn.project_in.out_channels
        return in_parts(self._feed_forward, x, channels=wide, halo=1, in_place=True)

    def _feed_forward(self, x: Tensor) -> Tensor:
        return total(self.ffn(self.norm2(x)), x)


class PatchEmbed(nn.Module):
    """First features: a 3×3 convolution."""

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, channels, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.proj(x)
        return y


class Resample(nn.Module):
    """A 3×3 convolution, then pixels shuffled into channels or back; by 2 either way."""

    def __init__(self, channels: int, convolved: int, shuffle: nn.Module) -> None:
        super().__init__()
        conv = Conv2d(channels, convolved, 3, padding=1, bias=False)
        self.body = nn.Sequential(conv, shuffle)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.body(x)
        return y


def _down(channels: int) -> Resample:
    return Resample(channels, channels // 2, nn.PixelUnshuffle(2))


def _up(channels: int) -> Resample:
    return Resample(channels, 2 * channels, nn.PixelShuffle(2))


class Restormer(nn.Module):
    """Restormer (section 3): (B, inp_channels, H, W) to (B, out_channels, H, W), in [0, 1].

    Any H and W. Hyperparameters are named as in the published option files.

    Args:
        inp_channels: channels of the picture; both views' for a dual-pixel network.
        out_channels: channels of the result; as the input's but for a dual-pixel network.
        dim: channels at full resolution, even; doubled at every level.
        num_blocks: blocks of each of the four levels, in the encoder and in the decoder.
        num_refinement_blocks: blocks at full resolution after the decoder.
        heads: attention heads of each level.
        ffn_expansion_factor: channels within the feed-forward part over channels outside.
        bias: whether convolutions have a bias.
        LayerNorm_type: whether layer norm takes off the mean and adds a bias.
        dual_pixel_task: no global residual; the first features skip to the last.
    """

    def __init__(
        self,
        inp_channels: int = 3,
        out_channels: int = 3,
        dim: int = 48,
        num_blocks: Sequence[int] = (4, 6, 6, 8),
        num_refinement_blocks: int = 4,
        heads: Sequence[int] = (1, 2, 4, 8),
        ffn_expansion_factor: float = 2.66,
        bias: bool = False,
        LayerNorm_type: Norm = "WithBias",  # noqa: N803 - as published
        dual_pixel_task: bool = False,
    ) -> None:
        super().__init__()
        _check(dim, num_blocks, num_refinement_blocks, heads, ffn_expansion_factor)
        if min(inp_channels, out_channels) < 1:
            raise ValueError("inp_channels and out_channels must be positive")
        if inp_channels != out_channels and not dual_pixel_task:
            raise ValueError(
                "inp_channels and out_channels must be equal but for a dual-pixel task"
            )

        def level(channels: int, heads: int, blocks: int) -> nn.Sequential:
            options = (heads, ffn_expansion_factor, bias, LayerNorm_type)
            return nn.Sequential(*(TransformerBlock(channels, *options) for _ in range(blocks)))

        one, two, three, four = (dim * 2**n for n in range(4))
        self.patch_embed = PatchEmbed(inp_channels, one)
        self.encoder_level1 = level(one, heads[0], num_blocks[0])
        self.down1_2 = _down(one)
        self.encoder_level2 = level(two, heads[1], num_blocks[1])
        self.down2_3 = _down(two)
        self.encoder_level3 = level(three, heads[2], num_blocks[2])
        self.down3_4 = _down(three)
        self.latent = level(four, heads[3], num_blocks[3])
        self.up4_3 = _up(four)
        self.reduce_chan_level3 = nn.Conv2d(four, three, 1, bias=bias)
        self.decoder_level3 = level(three, heads[2], num_blocks[2])
        self.up3_2 = _up(three)
        self.reduce_chan_level2 = nn.Conv2d(three, two, 1, bias=bias)
        self.decoder_level2 = level(two, heads[1], num_blocks[1])
        self.up2_1 = _up(two)
        self.decoder_level1 = level(two, heads[0], num_blocks[0])  # both halves, not reduced
        self.refinement = level(two, heads[0], num_refinement_blocks)
        self.skip_conv = nn.Conv2d(one, two, 1, bias=bias) if dual_pixel_task else None
        self.output = Conv2d(two, out_channels, 3, padding=1, bias=bias)

    def forward(self, image: Tensor) -> Tensor:
        height, width = image.shape[-2:]
        image = pad_to_multiple(image, MULTIPLE)
        x: Tensor = self.patch_embed(image)
        first = None if self.skip_conv is None else x
        skips = []
        # block by block, for a call of a whole level would hold what went in until it ends
        for level, down in (
            (self.encoder_level1, self.down1_2),
            (self.encoder_level2, self.down2_3),
            (self.encoder_level3, self.down3_4),
        ):
            for block in level:
                x = block(x)
            skips.append(x)
            x = down(x)
        for steps in (
            (*self.latent, self.up4_3),
            (self.reduce_chan_level3, *self.decoder_level3, self.up3_2),
            (self.reduce_chan_level2, *self.decoder_level2, self.up2_1),
        ):
            for step in steps:
                x = step(x)
            x = torch.cat([x, skips.pop()], 1)
        for block in (*self.decoder_level1, *self.refinement):
            x = block(x)
        if self.skip_conv is None:
            x = self.output(x) + image
        else:
            x = self.output(total(x, self.skip_conv(first)))
        return x[..., :height, :width]


def _check(
    dim: int, blocks: Sequence[int], refinement: int, heads: Sequence[int], expansion: float
) -> None:
    if len(blocks) != 4 or len(heads) != 4:
        raise ValueError("num_blocks and heads must each have four levels")
    if min(*blocks, *heads) < 1 or refinement < 0:
        raise ValueError("num_blocks and heads must be positive, num_refinement_blocks not below 0")
    if dim < 2 or dim % 2 or any(dim * 2**n % head for n, head in enumerate(heads)):
        raise ValueError("dim must be positive, even and, doubled at each level, divide into heads")
    if not 1 <= dim * expansion < math.inf:
        raise ValueError("ffn_expansion_factor must leave the feed-forward part a channel or more")


_LEVELS = ("encoder_level1", "encoder_level2", "encoder_level3", "latent")


def _hyperparameters(state: State) -> dict[str, Any] | None:
    names = ["patch_embed.proj.weight", "output.weight"]
    for level in _LEVELS:
        names += [f"{level}.0.attn.temperature", f"{level}.0.ffn.project_out.weight"]
    ranks = [4, 4] + 4 * [3, 4]
    if any(n not in state or state[n].ndim != rank for n, rank in zip(names, ranks, strict=True)):
        return None
    first, last = (state[name].shape for name in names[:2])
    hidden = [state[f"{level}.0.ffn.project_out.weight"].shape[1] for level in _LEVELS]
    expansion = _expansion(first[0], hidden)
    if expansion is None:
        return None
    with_bias = "encoder_level1.0.norm1.body.bias" in state
    return {
        "inp_channels": first[1],
        "out_channels": last[0],
        "dim": first[0],
        "num_blocks": tuple(count(state, f"{level}.") for level in _LEVELS),
        "num_refinement_blocks": count(state, "refinement."),
        "heads": tuple(state[f"{level}.0.attn.temperature"].shape[0] for level in _LEVELS),
        "ffn_expansion_factor": expansion,
        "bias": "encoder_level1.0.attn.qkv.bias" in state,
        "LayerNorm_type": "WithBias" if with_bias else "BiasFree",
        "dual_pixel_task": "skip_conv.weight" in state,
    }


def _expansion(dim: int, hidden: Sequence[int]) -> float | None:
    """The published expansion factor if it explains the channels, else the shortest that does."""
    if dim < 1:
        return None
    lowest: float = max(h / (dim * 2**n) for n, h in enumerate(hidden))
    # one step more, since the product with a factor that is just enough may be rounded down
    rounded_up: Iterator[float] = (
        round((math.ceil(lowest * 10**d) + more) / 10**d, d) for d in range(16) for more in (0, 1)
    )
    for factor in (2.66, *rounded_up):
        if all(_hidden(dim * 2**n, factor) == h for n, h in enumerate(hidden)):
            return factor
    return None


def _views(hyperparameters: Mapping[str, Any]) -> int:
    channels = hyperparameters["inp_channels"], hyperparameters["out_channels"]
    return 2 if hyperparameters["dual_pixel_task"] and channels[0] == 2 * channels[1] else 1


def _spec(hyperparameters: Mapping[str, Any]) -> Spec:
    return Spec(
        architecture="restormer",
        hyperparameters=hyperparameters,
        in_channels=hyperparameters["inp_channels"],
        out_channels=hyperparameters["out_channels"],
        multiple=MULTIPLE,
        views=_views(hyperparameters),
        task="defocus" if hyperparameters["dual_pixel_task"] else None,
    )


ARCHITECTURE = Architecture(
    name="restormer",
    title="Restormer",
    paper="Restormer: Efficient Transformer for High-Resolution Image Restoration, CVPR 2022",
    authors="Syed Waqas Zamir, Aditya Arora, Salman Khan, Munawar Hayat, Fahad Shahbaz Khan, "
    "Ming-Hsuan Yang",
    weights="https://github.com/swz30/Restormer (release v1.0)",
    licence="non-commercial (ACADEMIC PUBLIC LICENSE)",
    tasks=("deblur", "defocus", "denoise", "derain"),
    train_size=256,  # 128 to 384, growing; 1.5 times this is the largest
    build=Restormer,
    hyperparameters=_hyperparameters,
    spec=_spec,
)
