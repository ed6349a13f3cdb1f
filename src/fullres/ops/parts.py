"""Maps in parts: what acts position by position, or on near neighbours, run where caches hold it.

A chain such as norm, 1×1 convolution, depthwise 3×3, gate, 1×1 makes intermediate maps several
times as wide as its input and its output. Run part by part they never reach main memory, which
saves the time to write and read them as well as their room.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from types import EllipsisType

import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.overrides import has_torch_function

from fullres.ops.arrays import recorded

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
    function: Callable[..., Tensor],
    *maps: Tensor,
    channels: int,
    halo: int = 0,
    in_place: bool = False,
) -> Tensor:
    """`function(*maps)`, computed part by part where that pays.

    Args:
        function: makes a map (B, C', h, w) of maps of that height and width, whatever they are,
            so that a position of the result depends on no input further off than `halo`; pads
            with zeros if at all.
        maps: (B, C, H, W), of any strides; those that are (B, C, 1, 1) are given as they are.
        channels: those of the widest intermediate map.
        halo: reach of the function, in positions.
        in_place: the first map is of no further use, and the result, which has its channels and
            type, takes its memory; then beside it only a few rows are held. What is not computed
            in parts takes memory of its own.

    Returns:
        (B, C', H, W), the same as `function(*maps)`, to rounding, in the same memory format or in
        place.

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
    if isinstance(first, FakeTensor):  # for shapes and memory any part will do
        parts = parts[:1]
    if in_place and halo:
        return _written_late(function, maps, parts, halo)
    out = first if in_place else None
    for number in range(len(first)):
        for part in parts:
            y = function(*(taken(x, number, part) for x in maps))
            if out is None:
                out = room(first, y)
            out[number][part.place] = y[0][part.inside]
    assert out is not None
    return out


def _written_late(
    function: Callable[..., Tensor], maps: Sequence[Tensor], parts: Sequence[Part], halo: int
) -> Tensor:
    """The first map, with what the function gives written over it.

    Parts go from the top down. A row is overwritten once no part is left that reads it: results of
    a row of parts gather beside the map, and its last rows wait for the next row of parts.
    """
    x = maps[0]
    bands = [list(band) for _, band in groupby(parts, key=lambda part: part.top)]
    gathered = room(x[:1, :, : parts[0].bottom], x)
    for number in range(len(x)):
        target = x[number : number + 1]
        late = gathered[:, :, :0]
        for band in bands:
            top, bottom = band[0].top, band[0].bottom
            for part in band:
                y = function(*(taken(z, number, part) for z in maps))
                rows = slice(0, bottom - top)
                gathered[:, :, rows, part.left : part.right] = y[part.inside]
            written = bottom if band is bands[-1] else bottom - halo
            target[:, :, top - late.shape[2] : top] = late
            target[:, :, top:written] = gathered[:, :, : written - top]
            late = gathered[:, :, written - top : bottom - top].clone()
    return x


def split(x: Tensor, channels: int, halo: int) -> Iterator[Part]:
    """Parts of a map whose intermediates of so many channels stay within the budget.

    One part, the map, where it is small, and where derivatives or a graph are being recorded.
    """
    height, width = x.shape[-2:]
    budget = BUDGET.get(x.device.type, _ELSEWHERE)
    positions = max(budget // (channels * x.element_size()), 64)
    if height * width <= 2 * positions or recorded():
        yield Part(0, 0, height, width, (..., slice(0, height), slice(0, width)))
        return
    if halo:
        # about twice as wide as high: rows are what memory holds together
        rows = math.ceil(height / max(1, round(height / math.sqrt(positions / 2))))
        rows = max(rows, halo)  # no part reads further than the next
    else:
        rows = max(positions // width, 1)  # whole rows are not copied to be dense
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


def room(x: Tensor, part: Tensor, channels: int | None = None) -> Tensor:
    """An empty map of the batch, height and width of `x`, in all else like a part of a result.

    Of other channels, if told.
    """
    shape = (len(x), channels or part.shape[1], *x.shape[-2:])
    return torch.empty(shape, dtype=part.dtype, device=part.device, memory_format=_format(part))


def _format(x: Tensor) -> torch.memory_format:
    dense_pixels = x.stride(1) == 1 and x.shape[1] > 1
    return torch.channels_last if dense_pixels else torch.contiguous_format
