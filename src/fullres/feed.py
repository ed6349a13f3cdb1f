"""What a network is fed from the files of one picture, and what becomes of its answer.

Most networks take the picture as it is. Some take two views of it, some a mosaic of a sensor's
samples, some a number beside it, the noise level say, as one more channel of constant value.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from fullres.errors import FullresError, ImageError
from fullres.io.image import Sink, Source, open_image
from fullres.networks.spec import Spec
from fullres.ops.bayer import REACH, interpolated, sparse

Bayer = Literal["RGGB", "BGGR", "GRBG", "GBRG"]
"""Colours of the sensor's top left 2 × 2 samples, row by row."""


@dataclass(frozen=True)
class Given:
    """What is known of the pictures beside their pixels.

    Raises:
        FullresError: a value is out of range.
    """

    bayer: str | None = None
    """Pattern of the mosaics that the pictures are."""
    noise_level: float | None = None
    """Standard deviation of the noise, in 1/255 of white."""
    jpeg_quality: int | None = None
    """Quality that the pictures were compressed with, 1 to 100."""
    views: bool = False
    """Whether every picture has a right view beside its left."""

    def __post_init__(self) -> None:
        if self.bayer is not None and self.bayer not in get_args(Bayer):
            known = ", ".join(get_args(Bayer))
            raise FullresError(f"{self.bayer!r} is no Bayer pattern; known are {known}")
        if self.noise_level is not None and not 0 <= self.noise_level <= 255:
            raise FullresError(f"a noise level lies between 0 and 255, not at {self.noise_level}")
        if self.jpeg_quality is not None and not 1 <= self.jpeg_quality <= 100:
            raise FullresError(f"a JPEG quality lies between 1 and 100, not at {self.jpeg_quality}")

    def condition(self, spec: Spec) -> float | None:
        """Value of the channel that the network takes beside the picture, if it takes one.

        Raises:
            FullresError: the network needs what is not given, or has no use for what is.
        """
        self._check(spec)
        if spec.condition == "noise level":
            return None if self.noise_level is None else self.noise_level / 255
        if spec.condition == "JPEG quality":
            return None if self.jpeg_quality is None else self.jpeg_quality / 100
        return None

    def _check(self, spec: Spec) -> None:
        name = spec.architecture
        if self.views != (spec.views == 2):
            if self.views:
                raise FullresError(f"{name}: takes one picture, not two views; leave out --right")
            raise FullresError(
                f"{name}: takes the left and right view of a dual-pixel camera; give the right one "
                "with --right, a picture or a folder of pictures of the same names"
            )
        for value, option, condition in (
            (self.noise_level, "--noise-level", "noise level"),
            (self.jpeg_quality, "--jpeg-quality", "JPEG quality"),
        ):
            if value is not None and spec.condition != condition:
                raise FullresError(
                    f"{name}: does not ask for the {condition}, it was trained for a certain one "
                    f"or for any; leave out {option}"
                )
            if value is None and spec.condition == condition and not spec.blind:
                raise FullresError(f"{name}: needs the {condition}; give it with {option}")
        if self.bayer and (spec.task not in (None, "demosaic") or spec.in_channels != 3):
            raise FullresError(f"{name}: does not restore mosaics; leave out --bayer")
        if spec.task == "demosaic" and not self.bayer:
            raise FullresError(
                f"{name}: restores mosaics; give their pattern with --bayer, RGGB for instance"
            )


@dataclass(frozen=True)
class Feed:
    """One open picture, as a network takes it."""

    source: Source
    spec: Spec
    value: float | None = None
    """Of the channel beside the picture."""

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the picture."""
        return self.source.height, self.source.width

    @property
    def multiple(self) -> int:
        """Multiple of pixels that tiles start on."""
        return self.spec.multiple

    def read(self, top: int, left: int, height: int, width: int) -> Tensor:
        """Input for a rectangle: (B, in_channels, height, width), float32 in [0, 1].

        Raises:
            FullresError: the picture's channels do not fit the network.
        """
        picture = self.source.read(top, left, height, width)
        return as_input(picture, self.spec, self.value, self.source.path)

    def result(self, y: Tensor) -> Tensor:
        """What the network makes of an input, as (C, scale * height, scale * width)."""
        return as_picture(y, self.source.channels == 1)

    def create(self, target: Path, bits: int | None, quality: int) -> Sink:
        """The output picture, as `Source.create` makes it."""
        return self.source.create(target, self.spec.scale, bits, quality)


@dataclass(frozen=True)
class Views(Feed):
    """The left and right view of a dual-pixel camera, stacked in this order."""

    right: Source = field(kw_only=True)

    def __post_init__(self) -> None:
        left, right = self.source, self.right
        if (left.height, left.width, left.channels) != (right.height, right.width, right.channels):
            raise ImageError(
                f"{right.path}: is {right.height} × {right.width} with {right.channels} channels "
                f"where its left view, {left.path}, is {left.height} × {left.width} with "
                f"{left.channels}; give the views of one shot"
            )

    def read(self, top: int, left: int, height: int, width: int) -> Tensor:
        at = (top, left, height, width)
        return stacked(self.source.read(*at), self.right.read(*at), self.spec)


@dataclass(frozen=True)
class Mosaic(Feed):
    """A mosaic of a Bayer sensor's samples, one of three colours each.

    The network gets each sample in its colour's channel with 0 in the others, or colours
    interpolated between the samples, whichever it was trained on (`Spec.mosaic`).

    Networks are trained on RGGB. A mosaic of another pattern gets the row and column before it
    that make it RGGB, by reflection, which keeps every sample's colour.
    """

    pattern: Bayer = field(kw_only=True)

    def __post_init__(self) -> None:
        if self.source.channels != 1:
            raise ImageError(
                f"{self.source.path}: is a colour picture, and a mosaic has one value a pixel; "
                "leave out --bayer"
            )
        least = REACH + 1 if self.spec.mosaic == "interpolated" else 2
        if min(self.size) < least:
            raise ImageError(
                f"{self.source.path}: is smaller than {least} × {least} pixels, which the network "
                "needs of a mosaic"
            )

    @property
    def multiple(self) -> int:
        return self.spec.multiple * (1 + self.spec.multiple % 2)

    @property
    def _before(self) -> tuple[int, int]:
        """Rows and columns that precede the mosaic where it begins as RGGB does."""
        rows, columns = divmod(self.pattern.index("R"), 2)
        return rows, columns

    def read(self, top: int, left: int, height: int, width: int) -> Tensor:
        reach = REACH if self.spec.mosaic == "interpolated" else 0
        # what lies outside is reflected, which keeps every sample's colour
        rows, over, under = _within(top - reach, top + height + reach, self.source.height)
        columns, before, after = _within(left - reach, left + width + reach, self.source.width)
        samples = self.source.read(
            rows.start, columns.start, rows.stop - rows.start, columns.stop - columns.start
        )
        first_row, first_column = self._before
        margins = (before + first_column, after, over + first_row, under)
        samples = F.pad(samples[None], margins, mode="reflect")
        return interpolated(samples) if reach else sparse(samples)

    def result(self, y: Tensor) -> Tensor:
        rows, columns = (self.spec.scale * n for n in self._before)
        return y[0, :, rows:, columns:]

    def create(self, target: Path, bits: int | None, quality: int) -> Sink:
        return self.source.create(target, self.spec.scale, bits, quality, as_colour=True)


def as_input(picture: Tensor, spec: Spec, value: float | None, path: Path) -> Tensor:
    """A picture (C, H, W) as a network takes it: (B, in_channels, H, W).

    Args:
        picture: a colour picture becomes one of each channel for a network of grey ones, a grey
            one three equal channels for a network of colour.
        spec: the network's.
        value: of the channel beside the picture, if the network takes one.
        path: of the picture, for the error.

    Raises:
        FullresError: the picture's channels do not fit the network.
    """
    channels = picture.shape[0]
    wanted = spec.in_channels - (value is not None and not spec.blind)
    if channels == wanted:
        x = picture[None]
    elif channels == 1:
        x = picture.expand(1, wanted, -1, -1)
    elif wanted == 1:
        x = picture[:, None]  # every channel is a picture of its own
    else:
        raise FullresError(f"{path}: has {channels} channels, but the network takes {wanted}")
    if value is None:
        return x
    return torch.cat([x, x.new_full((len(x), 1, *x.shape[2:]), value)], 1)


def as_picture(y: Tensor, grey: bool) -> Tensor:
    """What a network made of `as_input`, as (C, H, W); one channel for a grey picture."""
    if grey:
        y = y.mean(1, keepdim=True)
    return y.flatten(0, 1)  # whether the channels were channels or pictures


def stacked(left: Tensor, right: Tensor, spec: Spec) -> Tensor:
    """Two views, (C, H, W) each, as a network takes them: (1, in_channels, H, W)."""
    each = spec.in_channels // 2
    return torch.cat([view.expand(each, -1, -1) for view in (left, right)])[None]


def _within(start: int, stop: int, length: int) -> tuple[slice, int, int]:
    """The part of a range that lies within `length`, and how far it reaches out on either side."""
    inner = slice(max(start, 0), min(stop, length))
    return inner, inner.start - start, stop - inner.stop


@contextmanager
def open_feed(picture: Path, right: Path | None, spec: Spec, given: Given) -> Iterator[Feed]:
    """Open a picture, and its right view if it has one.

    Raises:
        ImageError: a file cannot be read, or the files do not belong together.
    """
    with open_image(picture) as source:
        if right is not None:
            with open_image(right) as other:
                yield Views(source, spec, right=other)
        elif given.bayer is not None:
            yield Mosaic(source, spec, pattern=given.bayer)  # type: ignore[arg-type]
        else:
            yield Feed(source, spec, given.condition(spec))
