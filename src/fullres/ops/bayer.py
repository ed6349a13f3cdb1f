"""Mosaics of a Bayer sensor as networks take them. Patterns are RGGB: red first, blue last."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

REACH = 2
"""Samples on each side that an interpolated value depends on."""

# Malvar, He and Cutler, *High-quality linear interpolation for demosaicing of Bayer-patterned color
# images*, ICASSP 2004, figure 2, times 8: the estimate from near samples of the colour wanted,
# corrected by the gradient of the colour that is there.
_GREEN = ((0, 0, -1, 0, 0), (0, 0, 2, 0, 0), (-1, 2, 4, 2, -1), (0, 0, 2, 0, 0), (0, 0, -1, 0, 0))
_FROM_SIDES = (
    (0, 0, 0.5, 0, 0),
    (0, -1, 0, -1, 0),
    (-1, 4, 5, 4, -1),
    (0, -1, 0, -1, 0),
    (0, 0, 0.5, 0, 0),
)
_FROM_CORNERS = (
    (0, 0, -1.5, 0, 0),
    (0, 2, 0, 2, 0),
    (-1.5, 0, 6, 0, -1.5),
    (0, 2, 0, 2, 0),
    (0, 0, -1.5, 0, 0),
)


def sparse(mosaic: Tensor) -> Tensor:
    """Each sample in its colour's channel, 0 in the others: (B, 1, H, W) to (B, 3, H, W).

    >>> sparse(torch.ones(1, 1, 2, 2))[0].sum((1, 2))
    tensor([1., 2., 1.])
    """
    x = mosaic.new_zeros(len(mosaic), 3, *mosaic.shape[-2:])
    for number, channel in enumerate((0, 1, 1, 2)):
        at = (..., slice(number // 2, None, 2), slice(number % 2, None, 2))
        x[:, channel][at] = mosaic[:, 0][at]
    return x


def interpolated(mosaic: Tensor) -> Tensor:
    """Colours by gradient-corrected linear interpolation, without the outer `REACH` samples.

    Args:
        mosaic: (B, 1, H + 2 `REACH`, W + 2 `REACH`), values in [0, 1].

    Returns:
        (B, 3, H, W), in [0, 1].

    >>> interpolated(torch.full((1, 1, 6, 6), 0.5)).unique()
    tensor([0.5000])
    """
    filters = mosaic.new_tensor((_GREEN, _FROM_SIDES, _FROM_CORNERS)) / 8
    above = filters[1].T
    weight = torch.stack([*filters, above])[:, None]
    green, sides, corners, ends = F.conv2d(mosaic, weight).unbind(1)
    own = mosaic[:, 0, REACH:-REACH, REACH:-REACH]
    # red, green and blue at each of the four places of the pattern
    places = (own, green, corners), (sides, own, ends), (ends, own, sides), (corners, green, own)
    x = mosaic.new_empty(len(mosaic), 3, *own.shape[-2:])
    for number, colours in enumerate(places):
        at = (..., slice(number // 2, None, 2), slice(number % 2, None, 2))
        for channel, values in enumerate(colours):
            x[:, channel][at] = values[at]
    return x.clamp_(0, 1)
