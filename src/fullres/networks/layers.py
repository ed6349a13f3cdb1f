"""Layers that several networks share."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fullres.errors import ConversionError
from fullres.ops.arrays import derives
from fullres.ops.convolution import convolution

M = TypeVar("M", bound=nn.Module)


class Conv2d(nn.Conv2d):
    """torch's convolution, faster where `fullres.ops.convolution` is; dense, padded by 0 or 1.

    Shapes: (B, in_channels, H, W) to (B, out_channels, H', W'), memory format kept. What may
    follow, `slope` and `plus`, is that function's.
    """

    def forward(self, x: Tensor, **following: Any) -> Tensor:  # type: ignore[override]
        dense = (*self.stride, *self.dilation, self.groups) == (1,) * 5
        if dense and self.padding_mode == "zeros" and self.padding in ((0, 0), (1, 1)):
            return convolution(x, self.weight, self.bias, self.padding[0], **following)
        return super().forward(x, **following)


class LayerNorm2d(nn.Module):
    """Layer norm over the channels of each pixel, with weight and bias.

    Shapes: (B, C, H, W) to the same, memory format kept.
    """

    def __init__(self, channels: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        # channels-last memory makes the permuted view contiguous, so this is one fused pass there
        y = F.layer_norm(x.permute(0, 2, 3, 1), self.weight.shape, self.weight, self.bias, self.eps)
        return y.permute(0, 3, 1, 2)


def product(x: Tensor, y: Tensor) -> Tensor:
    """`x * y`, in the memory of `x`, which is of no further use, where nothing is derived."""
    return x * y if derives() else x.mul_(y)


def total(x: Tensor, y: Tensor) -> Tensor:
    """`x + y`, in the memory of `x`, which is of no further use, where nothing is derived."""
    return x + y if derives() else x.add_(y)


def weighted(x: Tensor, y: Tensor, plus: Tensor) -> Tensor:
    """`x * y + plus`, in the memory of `x`, of no further use, where nothing is derived."""
    return torch.addcmul(plus, x, y, out=None if derives() else x)


def pad_to_multiple(x: Tensor, multiple: int) -> Tensor:
    """Extend (B, C, H, W) at the bottom and right, by reflection, to a multiple of `multiple`.

    A side too short to reflect as far as needed is reflected back and forth; a side of one
    pixel is repeated.
    """
    height, width = x.shape[-2:]
    bottom, right = -height % multiple, -width % multiple
    if bottom >= height:
        x, bottom = x.index_select(-2, _reflected(height, height + bottom, x.device)), 0
    if right >= width:
        x, right = x.index_select(-1, _reflected(width, width + right, x.device)), 0
    if bottom or right:
        x = F.pad(x, (0, right, 0, bottom), mode="reflect")
    return x


def _reflected(length: int, wanted: int, device: torch.device) -> Tensor:
    period = max(2 * (length - 1), 1)
    position = torch.arange(wanted, device=device) % period
    return torch.minimum(position, period - position)


def sharing(module: nn.Module, cls: type[M], **more: object) -> M:
    """A module of a class that has the parameters, and all else, of `module`: nothing is copied.

    And it has more attributes.
    """
    shared = cls.__new__(cls)
    vars(shared).update(vars(module), **more)
    return shared


def local_already(module: nn.Module) -> ConversionError:
    """What the local form of a global operation raises when it is asked for its local form."""
    return ConversionError(
        f"a {type(module).__name__} is local already; revert that conversion first"
    )
