"""Pictures in: decoded whole and checked when opened, handed to networks by region."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyvips
import torch
from torch import Tensor

from fullres.errors import ImageError
from fullres.io import bmp, colour, metadata, vips
from fullres.io.encode import Origin, plan
from fullres.io.probe import SUFFIXES, SUPPORTED, Probe, probe
from fullres.io.sink import Sink

__all__ = ["SUFFIXES", "Sink", "Source", "open_image"]

IN_MEMORY = 256 * 2**20
"""Bytes of pixels up to which a picture is held in memory, beyond in a temporary file."""

_LOADERS = {"JPEG": "jpegload", "PNG": "pngload", "TIFF": "tiffload", "WebP": "webpload"}
_LOADERS |= {"HEIF": "heifload"}
_CUT_SHORT = re.compile(
    r"premature end|end of file|read error|load error|unable to parse|read gave|no reason given"
    r"|not enough data|out of order|corrupt|invalid|no image",
    re.IGNORECASE,
)


def open_image(path: str | os.PathLike[str]) -> Source:
    """Open and decode a picture.

    JPEG, PNG, TIFF, WebP, AVIF, BMP and, where libvips was built so, HEIF; 8 or 16 bit or float;
    grey or colour, CMYK included; with or without alpha. Pixels are kept in the order in which they
    are stored, so that the orientation tag still applies to the output.

    Raises:
        ImageError: missing, unreadable, empty, damaged, truncated or unsupported, or holding more
            than one picture.
    """
    path = Path(path)
    found = probe(path)
    with _decoding(path, found):
        image = _load(path, found)
        _refuse_pages(path, image, found)
        image = metadata.complete(image, found.tiff)
        image, kind = colour.normalise(path, image)
        return Source(path, _decode(path, image), kind, found)


@dataclass(frozen=True, eq=False)
class Source:
    """An open picture; a context manager, so that its memory is given back in time."""

    path: Path
    _stored: Any
    _kind: colour.Kind
    _probe: Probe

    def __enter__(self) -> Source:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Give back the memory; the source cannot be used afterwards."""
        object.__setattr__(self, "_stored", None)

    @property
    def _pixels(self) -> Any:
        if self._stored is None:
            raise ValueError(f"{self.path} is closed")
        return self._stored

    @property
    def height(self) -> int:
        return int(self._pixels.height)

    @property
    def width(self) -> int:
        return int(self._pixels.width)

    @property
    def channels(self) -> int:
        """1 for grey, 3 for colour: what `read` gives. CMYK reads as 3."""
        return 1 if self._kind is colour.Kind.GREY else 3

    @property
    def bits(self) -> int:
        """Bits per sample: 8, 16 or 32 (float)."""
        return {"uchar": 8, "ushort": 16, "float": 32}[self._pixels.format]

    @property
    def has_alpha(self) -> bool:
        """Whether there is alpha, which the output gets without the network."""
        return bool(self._pixels.bands > self._kind.bands)

    def read(self, top: int, left: int, height: int, width: int) -> Tensor:
        """Read a rectangle as float32 of shape (channels, height, width), values in [0, 1].

        Float pictures are given as they are, outside [0, 1] too. CMYK is brought to sRGB.

        Raises:
            ValueError: the rectangle does not lie inside the picture.
            ImageError: the picture holds NaN or infinity.
        """
        inside = 0 <= top <= top + height <= self.height and 0 <= left <= left + width <= self.width
        if not inside or height < 1 or width < 1:
            raise ValueError(
                f"rectangle ({top}, {left}, {height}, {width}) is not inside "
                f"{self.path} of {self.height} × {self.width} pixels"
            )
        with _decoding(self.path, self._probe):
            image, scale = self._pixels, self._scale()
            if self._kind is colour.Kind.CMYK:
                image, scale = colour.cmyk_to_srgb(image), colour.Scale(16)
            stored = vips.fetch(image, top, left, height, width)[..., : self.channels]
        values = np.empty((self.channels, height, width), dtype=np.float32)
        np.divide(stored.transpose(2, 0, 1), np.float32(scale.peak), out=values)
        if self.bits == 32 and not np.isfinite(values).all():
            raise ImageError(f"{self.path}: holds NaN or infinity; replace those pixels first")
        return torch.from_numpy(values)

    def create(
        self,
        target: str | os.PathLike[str],
        scale: int = 1,
        bits: int | None = None,
        quality: int = 95,
        as_colour: bool = False,
    ) -> Sink:
        """Prepare the output picture at `target`, whose suffix gives the format.

        It is `scale` times as large, takes metadata and alpha from here, and keeps the bit depth
        unless `bits` (8, 16 or 32) is given. `quality` (1 to 100) is for lossy formats. `as_colour`
        makes a colour picture of a grey one.

        Where the source is CMYK, what is written is sRGB, as `read` gives it. JPEG and TIFF then
        hold the stored inks with the change to that sRGB added; other formats hold the sRGB.

        Raises:
            ImageError: the format cannot hold the picture.
        """
        origin = Origin(
            path=self.path,
            stored=self._pixels,
            kind=self._kind,
            scale=self._scale(),
            lossless=self._probe.lossless,
            compression=self._probe.compression,
            tiled=self._probe.tiff is not None and self._probe.tiff.tiled,
        )
        return Sink(origin, plan(origin, Path(target), scale, bits, quality, as_colour))

    def _scale(self) -> colour.Scale:
        significant = vips.field(self._pixels, "bits-per-sample")
        if self._probe.format == "HEIF" and self.bits == 16 and significant:
            return colour.Scale(16, significant)
        return colour.Scale(self.bits)


def _load(path: Path, found: Probe) -> Any:
    if found.bmp is not None:
        return bmp.load(path, found.bmp)
    loader = getattr(pyvips.Image, _LOADERS[found.format])
    return loader(os.fsencode(path), access="sequential", fail_on="error")


def _decode(path: Path, image: Any) -> Any:
    """All pixels of `image`, decoded once; errors in the file come to light here."""
    size = vips.size(image)
    if size <= IN_MEMORY:
        return image.copy_memory()
    held = pyvips.Image.new_temp_file("%s.v")
    try:
        image.write(held)
    except pyvips.Error as error:
        if "No space left" not in str(error):
            raise
        raise ImageError(
            f"{path}: no room for {size / 2**30:.1f} GiB of decoded pixels in the folder for "
            "temporary files; set TMPDIR to a folder on a larger disc"
        ) from error
    return held


def _refuse_pages(path: Path, image: Any, found: Probe) -> None:
    pages = max(vips.field(image, "n-pages") or 1, found.frames)
    if pages > 1:
        raise ImageError(
            f"{path}: holds {pages} pages or frames, and only single pictures are supported; "
            "split it into one file for each"
        )


@contextmanager
def _decoding(path: Path, found: Probe) -> Iterator[None]:
    try:
        yield
    except (pyvips.Error, UnicodeDecodeError) as error:
        raise _decoding_error(path, found, vips.condense(error)) from error


def _decoding_error(path: Path, found: Probe, reason: str) -> ImageError:
    kind = found.format
    if kind == "HEIF" and re.search("unsupported|codec|plugin", reason, re.IGNORECASE):
        return ImageError(
            f"{path}: this build of libvips cannot decode this HEIF ({reason}); "
            "convert it to JPEG, PNG or AVIF"
        )
    if not _CUT_SHORT.search(reason):
        return ImageError(
            f"{path}: cannot be decoded as {kind} ({reason}); save it again as one of {SUPPORTED}"
        )
    state = "truncated" if "premature end" in reason else "truncated or damaged"
    return ImageError(
        f"{path}: {state} {kind}, the file ends at byte {path.stat().st_size} ({reason}); "
        "fetch it again from its origin"
    )
