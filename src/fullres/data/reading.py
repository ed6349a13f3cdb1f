"""Pictures of a data set as tensors."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from fullres.data.datasets import Block, read_block
from fullres.io.image import open_image

LUMA = (0.299, 0.587, 0.114)
"""Weights of red, green and blue in the brightness of a picture (ITU-R BT.601)."""


def read_picture(path: Path, key: Block | None = None) -> Tensor:
    """A picture, (C, H, W) float32 in [0, 1]; with a key, one of the many that a file holds.

    Raises:
        FullresError: it cannot be read.
    """
    if key is not None:
        return torch.from_numpy(read_block(path, key)).permute(2, 0, 1).float() / 255
    with open_image(path) as source:
        return source.read(0, 0, source.height, source.width)


def with_channels(x: Tensor, channels: int) -> Tensor:
    """A colour picture in grey or a grey one in colour, (C, H, W), where `channels` asks for it.

    >>> with_channels(torch.ones(3, 2, 2), 1).shape
    torch.Size([1, 2, 2])
    """
    if len(x) == 3 and channels == 1:
        return (x * x.new_tensor(LUMA).view(3, 1, 1)).sum(0, keepdim=True)
    if len(x) == 1 and channels == 3:
        return x.expand(3, -1, -1)
    return x
