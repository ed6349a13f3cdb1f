"""PA-EDSR: *Pyramid Attention Networks for Image Restoration* (Mei, Fan, Zhang, Yu, Zhou, Liu, Fu,
Huang, Shi; arXiv 2020).

EDSR, a chain of residual blocks and an upsampler by sub-pixel convolution, with one block of
pyramid attention in the middle of the chain: the network's global operation.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from torch import Tensor, nn

from fullres.networks.layers import Conv2d
from fullres.networks.panet import (
    MeanShift,
    PyramidAttention,
    ResBlock,
    body_hyperparameters,
    body_of,
    check,
)
from fullres.networks.spec import Architecture, Spec, State, count


class PAEDSR(nn.Module):
    """PA-EDSR (section 4.5): (B, 3, H, W) to (B, 3, scale * H, scale * W), from 0 to `rgb_range`.

    Any H and W. Hyperparameters are named as in the published option files.

    Args:
        n_resblocks: residual blocks, an even number; attention is in the middle.
        n_feats: channels of the features, an even number.
        scale: height and width of the result over those of the picture.
        rgb_range: white.
        n_colors: channels of the picture; 3, because the network takes off a mean colour.
        res_scale: factor of what residual blocks add, and of the input of attention.
        pyramid_channel: channels of attention, `n_feats`.
        pyramid_reduction: channels of attention over those of its queries and keys.
    """

    def __init__(
        self,
        n_resblocks: int = 32,
        n_feats: int = 256,
        scale: Literal[2, 3, 4] = 2,
        rgb_range: float = 255.0,
        n_colors: int = 3,
        res_scale: float = 0.1,
        pyramid_channel: int = 256,
        pyramid_reduction: int = 8,
    ) -> None:
        super().__init__()
        check(n_resblocks, n_feats, n_colors, rgb_range)
        if n_colors != 3:
            raise ValueError(f"n_colors must be 3, the channels of the mean, not {n_colors}")
        if pyramid_channel != n_feats:
            raise ValueError(f"pyramid_channel must be n_feats, {n_feats}, not {pyramid_channel}")
        self.sub_mean = MeanShift(rgb_range, -1)
        # published checkpoints name the one block twice
        self.msa = PyramidAttention(
            res_scale=res_scale, channel=pyramid_channel, reduction=pyramid_reduction
        )
        self.add_mean = MeanShift(rgb_range, 1)
        self.head = nn.Sequential(nn.Conv2d(n_colors, n_feats, 3, padding=1))
        blocks = [ResBlock(n_feats, nn.ReLU(), res_scale) for _ in range(n_resblocks)]
        self.body = body_of(blocks, self.msa, n_feats)
        last = Conv2d(n_feats, n_colors, 3, padding=1)
        self.tail = nn.Sequential(_upsampler(n_feats, scale), last)

    def forward(self, image: Tensor) -> Tensor:
        x = self.head(self.sub_mean(image))
        y: Tensor = self.add_mean(self.tail(self.body(x) + x))
        return y


def _upsampler(channels: int, scale: int) -> nn.Sequential:
    steps: list[nn.Module] = []
    for factor in (3,) if scale == 3 else (2,) * (scale // 2):
        conv = Conv2d(channels, channels * factor**2, 3, padding=1)
        steps += [conv, nn.PixelShuffle(factor)]
    return nn.Sequential(*steps)


def _hyperparameters(state: State) -> dict[str, Any] | None:
    found, up = body_hyperparameters(state), state.get("tail.0.0.weight")
    if found is None or up is None or up.ndim != 4:
        return None
    attention = f"body.{found['n_resblocks'] // 2}"
    match = state.get(f"{attention}.conv_match.0.weight")
    if match is None or match.ndim != 4 or match.shape[0] < 1 or found["n_feats"] < 1:
        return None
    scale = {(1, 4): 2, (1, 9): 3, (3, 4): 4}.get(
        (count(state, "tail.0."), up.shape[0] // found["n_feats"])
    )
    if scale is None:
        return None
    return {
        **found,
        "scale": scale,
        "pyramid_channel": match.shape[1],
        "pyramid_reduction": match.shape[1] // match.shape[0],
    }


def _spec(hyperparameters: Mapping[str, Any]) -> Spec:
    return Spec(
        architecture="pa_edsr",
        hyperparameters=hyperparameters,
        in_channels=hyperparameters["n_colors"],
        out_channels=hyperparameters["n_colors"],
        scale=hyperparameters["scale"],
        value_range=hyperparameters["rgb_range"],
    )


ARCHITECTURE = Architecture(
    name="pa_edsr",
    title="PA-EDSR",
    paper="Pyramid Attention Networks for Image Restoration, 2020",
    authors="Yiqun Mei, Yuchen Fan, Yulun Zhang, Jiahui Yu, Yuqian Zhou, Ding Liu, Yun Fu, "
    "Thomas S. Huang, Humphrey Shi",
    weights="https://github.com/SHI-Labs/Pyramid-Attention-Networks (linked from its README)",
    licence="none stated",
    tasks=("super-resolution",),
    train_size=48,
    build=PAEDSR,
    hyperparameters=_hyperparameters,
    spec=_spec,
)
