"""Colour and sample formats: what pictures hold, and what networks are given."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyvips

from fullres.errors import ImageError
from fullres.io import vips

_CONVERTED = frozenset(("lab", "labs", "labq", "lch", "cmc", "xyz", "yxy", "hsv", "oklab", "oklch"))
_INTENT = {"intent": "relative", "black_point_compensation": True}


class Kind(enum.Enum):
    """How the colour of a picture is stored; the value is the number of bands without alpha."""

    GREY = 1
    RGB = 3
    CMYK = 4

    @property
    def bands(self) -> int:
        return int(self.value)


class Scale(NamedTuple):
    """How samples stand for values: `significant` bits, at the top of samples of `bits`."""

    bits: int
    significant: int = 0

    @property
    def shift(self) -> int:
        return self.bits - self.significant if self.significant else 0

    @property
    def peak(self) -> int:
        """The sample that stands for 1."""
        if self.bits == 32:
            return 1
        return ((1 << (self.bits - self.shift)) - 1) << self.shift

    @property
    def dtype(self) -> Any:
        return {8: np.uint8, 16: np.uint16, 32: np.float32}[self.bits]

    @property
    def format(self) -> str:
        """The name that libvips gives to such samples."""
        return {8: "uchar", 16: "ushort", 32: "float"}[self.bits]

    def quantise(self, values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """Samples for finite float32 `values`: clamped and rounded to nearest unless float."""
        if self.bits == 32:
            return values
        codes = np.clip(values, 0, 1) * np.float32(self.peak >> self.shift)
        samples: np.ndarray[Any, Any] = np.rint(codes, out=codes).astype(self.dtype)
        return samples << self.shift if self.shift else samples


def normalise(path: Path, image: Any) -> tuple[Any, Kind]:
    """Bring an opened picture to grey, RGB or CMYK of uchar, ushort or float, alpha kept last."""
    if image.format == "double":
        image = image.cast("float")
    name = image.interpretation
    if name in _CONVERTED:
        deep = (vips.field(image, "bits-per-sample") or 16) > 8
        image = image.colourspace("rgb16" if deep else "srgb").copy()
        vips.set_blob(image, "icc-profile-data", vips.builtin_profile("srgb"))
    if image.format not in vips.FORMATS:
        raise ImageError(
            f"{path}: samples of the type {image.format} are not supported; "
            "save it with 8 or 16 bits or as 32-bit float"
        )
    bands = image.bands
    if name == "cmyk" and bands in (4, 5):
        return image, Kind.CMYK
    if bands <= 4:
        return image, Kind.GREY if bands <= 2 else Kind.RGB
    raise ImageError(
        f"{path}: has {bands} channels; supported are grey, RGB and CMYK with at most one alpha"
    )


def cmyk_to_srgb(image: Any) -> Any:
    """16-bit sRGB of a CMYK picture by its embedded profile, or libvips' own without one."""
    inks = image.extract_band(0, n=4).copy(interpretation="cmyk")
    if inks.format == "float":  # which libvips takes to lie between 0 and 255
        inks = (inks * 65535).rint().cast("ushort")
    return inks.icc_transform("srgb", input_profile="cmyk", embedded=True, depth=16, **_INTENT)


def changed_inks(stored: Any, restored: Any, source: Scale, target: Scale, factor: int) -> Any:
    """Inks of `stored`, a CMYK picture, with the change that restoration made to its colour.

    `stored` is in samples of `source`, `restored` is 16-bit sRGB `factor` times as large, and the
    result is in samples of `target`. The sRGB of the stored inks and the restored sRGB are both
    brought to CMYK, and their difference is added to the stored inks, enlarged as alpha is. So
    inks outside the gamut of sRGB and the balance of black stay, bit for bit where nothing changed.
    """
    inks = _enlarged(stored.extract_band(0, n=4), factor)
    profile = _output_profile(stored)
    before = _srgb_to_cmyk(cmyk_to_srgb(inks), profile)
    change = _srgb_to_cmyk(restored, profile) - before
    values = _resampled(inks, source, target) + change * (target.peak / 65535)
    # the cast clamps to the range
    return values.rint().cast(target.format).copy(interpretation="cmyk")


def _srgb_to_cmyk(image: Any, profile: bytes) -> Any:
    """16-bit CMYK of a 16-bit sRGB picture, by the profile given."""
    connection = image.icc_import(input_profile="srgb", **_INTENT).copy()
    vips.set_blob(connection, "icc-profile-data", profile)
    return connection.icc_export(depth=16, **_INTENT)


def _output_profile(stored: Any) -> bytes:
    """The embedded profile if colours can be brought to CMYK by it, libvips' own otherwise."""
    builtin = vips.builtin_profile("cmyk")
    profile = vips.field(stored, "icc-profile-data")
    if profile is None:
        return builtin
    try:
        usable = _srgb_to_cmyk(pyvips.Image.black(1, 1, bands=3).cast("ushort"), profile).bands == 4
    except pyvips.Error:
        usable = False
    return profile if usable else builtin


def grey_to_srgb(image: Any, profile: bytes | None, bits: int) -> Any:
    """Bring a grey picture to sRGB, by its profile where it has one."""
    if profile is None:
        return image.colourspace("srgb" if bits == 8 else "rgb16")
    image = image.copy()
    vips.set_blob(image, "icc-profile-data", profile)
    return image.icc_transform("srgb", embedded=True, depth=bits, **_INTENT)


def alpha_band(image: Any, source: Scale, target: Scale, factor: int) -> Any:
    """The last band of `image`, `factor` times as large, in samples of `target`.

    Bit exact where neither size nor scale changes; enlarged by Catmull-Rom interpolation.
    """
    return _resampled(_enlarged(image.extract_band(image.bands - 1), factor), source, target)


def _enlarged(image: Any, factor: int) -> Any:
    return image.resize(factor, kernel="cubic") if factor > 1 else image


def _resampled(image: Any, source: Scale, target: Scale) -> Any:
    """`image`, in samples of `source`, in samples of `target`: rounded to nearest unless float."""
    if source == target:
        return image
    values = image.cast("float") / source.peak
    if target.bits == 32:
        return values.cast("float")
    steps = (values * (target.peak >> target.shift)).rint()
    return (steps * (1 << target.shift)).cast(target.format)
