"""Output formats: what each can hold, and how a finished picture is encoded."""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyvips

from fullres.errors import ImageError
from fullres.io import bmp, colour, metadata, tiff, vips

_BIGTIFF_FROM = 2**32 - 2**26  # bytes of pixels; deflate may add a little to what it cannot shrink


@dataclass(frozen=True)
class Format:
    """What a file format can hold."""

    name: str
    suffixes: tuple[str, ...]
    bits: tuple[int, ...]
    longest: int
    """Pixels of the longest side."""
    alpha: bool = True
    grey: bool = True
    grey_with_alpha: bool = True
    cmyk: bool = False
    orientation: bool = True

    def holds_grey(self, with_alpha: bool) -> bool:
        return self.grey and (self.grey_with_alpha or not with_alpha)


FORMATS = (
    Format("JPEG", (".jpg", ".jpeg", ".jpe", ".jfif"), (8,), 65500, alpha=False, cmyk=True),
    Format("PNG", (".png",), (8, 16), 2**31 - 1),
    Format("TIFF", (".tif", ".tiff"), (8, 16, 32), 2**31 - 1, cmyk=True),
    Format("WebP", (".webp",), (8,), 16383, grey=False),
    Format("AVIF", (".avif",), (8,), 16384, grey=False, orientation=False),
    Format("HEIF", (".heic", ".heif"), (8,), 16384, grey=False, orientation=False),
    Format("BMP", (".bmp",), (8,), 2**31 - 1, grey_with_alpha=False, orientation=False),
)
_CODECS = {"AVIF": "av1", "HEIF": "hevc"}


@dataclass(frozen=True, eq=False)
class Origin:
    """What an output takes from the picture that was read."""

    path: Path
    stored: Any
    kind: colour.Kind
    scale: colour.Scale
    lossless: bool
    compression: str | None
    tiled: bool

    @property
    def has_alpha(self) -> bool:
        return bool(self.stored.bands > self.kind.bands)


@dataclass(frozen=True)
class Plan:
    """An output that its format can hold."""

    target: Path
    format: Format
    factor: int
    height: int
    width: int
    channels: int
    scale: colour.Scale
    quality: int
    cmyk: bool

    @property
    def canvas(self) -> colour.Scale:
        """Samples in which pixels are gathered: deeper than the file's where CMYK follows."""
        return colour.Scale(16) if self.cmyk else self.scale


def plan(
    origin: Origin,
    target: Path,
    factor: int,
    bits: int | None,
    quality: int,
    coloured: bool = False,
) -> Plan:
    """Decide on format and samples; raises ImageError where the format cannot hold them."""
    if factor < 1 or not 1 <= quality <= 100:
        raise ValueError(f"scale {factor} must be at least 1 and quality {quality} in 1 to 100")
    chosen = _format(target)
    scale = _scale(origin, target, chosen, bits)
    if origin.has_alpha and not chosen.alpha:
        raise ImageError(
            f"{target}: {chosen.name} cannot hold the alpha channel of {origin.path.name}; "
            "write a .png, .tif or .webp"
        )
    height, width = factor * origin.stored.height, factor * origin.stored.width
    if max(height, width) > chosen.longest:
        raise ImageError(
            f"{target}: {chosen.name} holds at most {chosen.longest} pixels a side and this "
            f"picture has {height} × {width}; write a .png or .tif"
        )
    channels = 1 if origin.kind is colour.Kind.GREY and not coloured else 3
    bands = (channels if chosen.holds_grey(origin.has_alpha) else 3) + origin.has_alpha
    if chosen.name == "BMP" and bmp.file_size(height, width, bands) > bmp.LARGEST:
        raise ImageError(
            f"{target}: BMP holds at most 4 GiB and this picture has {height} × {width} pixels; "
            "write a .png or .tif"
        )
    if chosen.name in _CODECS and not _can_encode(_CODECS[chosen.name]):
        raise ImageError(
            f"{target}: this build of libvips cannot write {chosen.name}; write a .png or .tif"
        )
    cmyk = origin.kind is colour.Kind.CMYK and chosen.cmyk and scale.bits != 32
    return Plan(target, chosen, factor, height, width, channels, scale, quality, cmyk)


def _format(target: Path) -> Format:
    for candidate in FORMATS:
        if target.suffix.lower() in candidate.suffixes:
            return candidate
    known = " ".join(suffix for candidate in FORMATS for suffix in candidate.suffixes)
    ending = f"files ending in {target.suffix}" if target.suffix else "files without a suffix"
    raise ImageError(f"{target}: {ending} cannot be written; use one of {known}")


def _scale(origin: Origin, target: Path, chosen: Format, bits: int | None) -> colour.Scale:
    if bits not in (None, 8, 16, 32):
        raise ImageError(f"{target}: {bits} bits cannot be written; give 8, 16 or 32")
    wanted = bits or origin.scale.bits
    if chosen.name in _CODECS and wanted == 16 and origin.scale.shift:
        return origin.scale  # 10 or 12 bits, as in the source
    if wanted in chosen.bits:
        return colour.Scale(wanted)
    most = chosen.bits[-1]
    other = ".tif" if wanted == 32 else ".png or .tif"
    name = "32-bit float" if wanted == 32 else f"{wanted} bits per channel"
    raise ImageError(
        f"{target}: {chosen.name} cannot hold the {name} of {origin.path.name}; "
        f"give --bits {most} or write a {other}"
    )


@functools.cache
def _can_encode(codec: str) -> bool:
    try:
        pyvips.Image.black(64, 64, bands=3).heifsave_buffer(compression=codec)
    except pyvips.Error:
        return False
    return True


def compose(origin: Origin, plan: Plan, pixels: np.ndarray[Any, Any]) -> Any:
    """The finished picture, of `pixels` (height, width, channels), with alpha and metadata."""
    profile = vips.field(origin.stored, "icc-profile-data")
    deep = plan.canvas.bits == 16
    if plan.channels == 1:
        image = vips.from_array(pixels, "grey16" if deep else "b-w")
        if not plan.format.holds_grey(origin.has_alpha):
            image = colour.grey_to_srgb(image, profile, plan.scale.bits)
            profile = profile and vips.builtin_profile("srgb")
    else:
        image = vips.from_array(pixels, "rgb16" if deep else "srgb")
        if origin.kind is colour.Kind.GREY:
            profile = None  # it is of the grey picture
    if plan.cmyk:
        image = colour.changed_inks(origin.stored, image, origin.scale, plan.scale, plan.factor)
    elif origin.kind is colour.Kind.CMYK:
        profile = vips.builtin_profile("srgb")
    if origin.has_alpha:
        name = image.interpretation
        alpha = colour.alpha_band(origin.stored, origin.scale, plan.scale, plan.factor)
        image = image.bandjoin(alpha).copy(interpretation=name)
    image = metadata.carry(origin.stored, image, plan.format.name, profile, plan.factor)
    return image if plan.format.orientation else image.autorot()


def save(origin: Origin, plan: Plan, image: Any, path: Path) -> None:
    """Encode `image` into the file at `path`, whatever its name."""
    name = os.fsencode(path)
    if plan.format.name == "JPEG":
        image.jpegsave(name, Q=plan.quality, subsample_mode="off", optimize_coding=True)
    elif plan.format.name == "PNG":
        image.pngsave(name, compression=6, filter="all", bitdepth=plan.scale.bits)
    elif plan.format.name == "TIFF":
        _save_tiff(origin, image, path, plan.factor)
    elif plan.format.name == "BMP":
        bmp.save(image, path)
    elif plan.format.name == "WebP":
        lossy = {"Q": plan.quality, "smart_subsample": True}
        image.webpsave(name, **({"lossless": True, "exact": True} if origin.lossless else lossy))
    else:
        image.heifsave(
            name,
            Q=plan.quality,
            compression=_CODECS[plan.format.name],
            bitdepth=plan.scale.bits - plan.scale.shift,
            subsample_mode="off",
        )


def _save_tiff(origin: Origin, image: Any, path: Path, factor: int) -> None:
    compression = origin.compression or "deflate"
    if compression == "zstd":  # not in every build of libvips
        compression = "deflate"
    image.tiffsave(
        os.fsencode(path),
        compression=compression,
        predictor="float" if image.format == "float" else "horizontal",
        tile=origin.tiled,
        tile_width=256,
        tile_height=256,
        bigtiff=vips.size(image) > _BIGTIFF_FROM,
    )
    exif = metadata.fields_for_tiff(origin.stored, image.width, image.height, factor)
    if exif:
        with path.open("r+b") as file:
            tiff.attach_exif(file, exif)
