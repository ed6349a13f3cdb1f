"""Maps in parts: what acts position by position, or on near neighbours, run where caches hold it.

A chain such as norm, 1×1 convolution, depthwise 3×3, gate, 1×1 makes intermediate maps several
times as wide as its input and its output. Run part by part they never reach main memory, which
saves the time to write and read them as well as their room.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import EllipsisType

import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.overrides import has_torch_function

Place = tuple[EllipsisType, slice, slice]

BUDGET = {"cpu": 2**24}
"""Bytes of the widest intermediate of one part, by device type."""
_ELSEWHERE = 2**27
"""The same on other devices: enough to keep them busy, and a bound of memory all the same."""


@dataclass(frozen=True)
class Part:
    """A rectangle of a map, and the larger one, by the halo, that is read for it."""

    top: int
    left: int
    bottom: int
    right: int
    read: Place
    """What is read of the map."""

    @property
    def place(self) -> Place:
        """The rectangle in the map."""
        return ..., slice(self.top, self.bottom), slice(self.left, self.right)

    @property
    def inside(self) -> Place:
        """The rectangle in what is read."""
        y, x = self.top - self.read[1].start, self.left - self.read[2].start
        return ..., slice(y, y + self.bottom - self.top), slice(x, x + self.right - self.left)


def in_parts(
    function: Callable[..., Tensor], *maps: Tensor, channels: int, halo: int = 0
) -> Tensor:
    """`function(*maps)`, computed part by part where that pays.

    Args:
        function: makes a map (B, C', h, w) of maps of that height and width, whatever they are,
            so that a position of the result depends on no input further off than `halo`; pads
            with zeros if at all.
        maps: (B, C, H, W), of any strides; those that are (B, C, 1, 1) are given as they are.
        channels: those of the widest intermediate map.
        halo: reach of the function, in positions.

    Returns:
        (B, C', H, W), in the memory format of the first map; the same as `function(*maps)`, to
        rounding.

    >>> blur = torch.nn.Conv2d(3, 8, 3, padding=1)
    >>> with torch.no_grad():
    ...     y = in_parts(blur, torch.rand(1, 3, 300, 400), channels=8, halo=1)
    >>> y.shape
    torch.Size([1, 8, 300, 400])
    """
    first = maps[0]
    parts = list(split(first, channels, halo))
    if len(parts) <= 1 or has_torch_function(maps):  # what stands for a map has its own ways
        return function(*maps)
    out: Tensor | None = None
    for number in range(len(first)):
        # for shapes and memory any part will do
        for part in parts[:1] if isinstance(first, FakeTensor) else parts:
            y = function(*(taken(x, number, part) for x in maps))
            if out is None:
                out = room(first, y.shape[1], y.dtype)
            out[number][part.place] = y[0][part.inside]
    assert out is not None
    return out


def split(x: Tensor, channels: int, halo: int) -> Iterator[Part]:
    """Parts of a map whose intermediates of so many channels stay within the budget.

    One part, the map, where it is small, and where derivatives or a graph are being recorded.
    """
    height, width = x.shape[-2:]
    budget = BUDGET.get(x.device.type, _ELSEWHERE)
    positions = max(budget // (channels * x.element_size()), 64)
    whole = height * width <= 2 * positions or torch.is_grad_enabled()
    if whole or torch.compiler.is_compiling():
        yield Part(0, 0, height, width, (..., slice(0, height), slice(0, width)))
        return
    # about twice as wide as high: rows are what memory holds together
    rows = math.ceil(height / max(1, round(height / math.sqrt(positions / 2))))
    columns = math.ceil(width / max(1, round(width * rows / positions)))
    for top in range(0, height, rows):
        for left in range(0, width, columns):
            bottom, right = min(top + rows, height), min(left + columns, width)
            read = (
                ...,
                slice(max(top - halo, 0), min(bottom + halo, height)),
                slice(max(left - halo, 0), min(right + halo, width)),
            )
            yield Part(top, left, bottom, right, read)


def taken(x: Tensor, number: int, part: Part) -> Tensor:
    """What is read for a part of one map of a batch, (1, C, h, w), dense in memory."""
    piece = x[number : number + 1]
    if x.shape[-2:] == (1, 1):
        return piece
    return piece[part.read].contiguous(memory_format=_format(x))


def room(like: Tensor, channels: int, dtype: torch.dtype) -> Tensor:
    """An empty map (B, channels, H, W) in the memory format of another of the same size."""
    shape = (len(like), channels, *like.shape[-2:])
    return torch.empty(shape, dtype=dtype, device=like.device, memory_format=_format(like))


def _format(x: Tensor) -> torch.memory_format:
    dense_pixels = x.stride(1) == 1 and x.shape[1] > 1
    return torch.channels_last if dense_pixels else torch.contiguous_format
