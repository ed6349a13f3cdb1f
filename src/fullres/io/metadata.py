"""Metadata carried from a picture that was read to one that is written."""

from __future__ import annotations

import logging
import re
import struct
from typing import Any

import numpy as np
import pyvips

from fullres.io import tiff, vips

_log = logging.getLogger(__name__)

_KEPT = frozenset(("icc-profile-data", "xmp-data", "iptc-data", "orientation", "resolution-unit"))
_APP13, _IIM_RESOURCE = b"Photoshop 3.0\0", 0x0404
_UNKNOWN_RESOLUTION = 72 / 25.4  # what EXIF designates where none is known, in pixels per mm


def complete(image: Any, description: tiff.Description | None) -> Any:
    """A copy of `image`, just opened, with the metadata that libvips overlooks."""
    image = image.copy()
    if description is not None and description.exif:
        orientation = vips.field(image, "orientation") or 1
        # Setting the block has libvips set a field for each tag in it.
        vips.set_blob(image, "exif-data", description.exif.to_bytes())
        image.set_type(pyvips.GValue.gint_type, "orientation", orientation)
    if description is not None and description.iptc is not None:
        vips.set_blob(image, "iptc-data", _iim_order(description.iptc))
    if image.xres == image.yres == 1:  # libvips' value for unknown
        across, down = (_exif_resolution(image, name) for name in ("XResolution", "YResolution"))
        image = image.copy(xres=across, yres=down)
    return image


def carry(source: Any, image: Any, format_name: str, profile: bytes | None, factor: int = 1) -> Any:
    """A copy of `image` with the metadata of `source`, fit for a file of the format.

    `profile` is the ICC profile of the new pixels; None leaves them without one. `image` is
    `factor` times as large, and as large in print. Thumbnails and the fields that describe how
    `source` was stored are left behind.
    """
    image = image.copy()
    _copy_exif(source, image, factor)
    for name in [*_KEPT, *_texts(source)]:
        if source.get_typeof(name):
            image.set_type(source.get_typeof(name), name, source.get(name))
    sizes = {"ImageWidth": image.width, "ImageLength": image.height}
    for name, size in sizes.items():
        if image.get_typeof(f"exif-ifd0-{name}"):
            image.set(f"exif-ifd0-{name}", str(size))
    if image.get_typeof("icc-profile-data"):
        image.remove("icc-profile-data")
    if profile is not None:
        vips.set_blob(image, "icc-profile-data", profile)
    _fit_iptc(image, format_name)
    return image.copy(xres=source.xres * factor, yres=source.yres * factor)


def fields_for_tiff(source: Any, width: int, height: int, factor: int = 1) -> tiff.Exif:
    """The EXIF and IPTC of `source` for a TIFF of the given size; libvips writes it without."""
    block = vips.field(source, "exif-data")
    try:
        exif = tiff.Exif()
        if block:
            exif = tiff.parse_exif(tiff.enlarged(block, factor)).resized(width, height)
    except ValueError as error:
        _log.warning("damaged EXIF is left out: %s", error)
        exif = tiff.Exif()
    iptc = vips.field(source, "iptc-data")
    bare = _unpack_iim(iptc) if iptc and iptc.startswith(_APP13) else iptc
    if bare:
        exif.image[tiff.IPTC] = tiff.Entry(7, len(bare), bare)
    return exif


def _texts(image: Any) -> list[str]:
    """The fields with PNG texts that are not other metadata in disguise."""
    try:
        names = [name for name in image.get_fields() if name.startswith("png-comment-")]
        for name in names:
            image.get(name)
    except UnicodeDecodeError:
        _log.warning("texts of a PNG that are not UTF-8 are left out")
        return []
    return [name for name in names if not re.search("Raw profile|XML:com.adobe", name)]


def _copy_exif(source: Any, image: Any, factor: int) -> None:
    """Copy the EXIF block, from which libvips sets a field for each tag, without thumbnail."""
    block = vips.field(source, "exif-data")
    if not block:
        return
    try:
        block = tiff.enlarged(tiff.without_thumbnail(block), factor)
        vips.set_blob(image, "exif-data", block)
    except ValueError as error:
        _log.warning("damaged EXIF is left out: %s", error)


def _exif_resolution(image: Any, name: str) -> float:
    """Pixels per mm as noted in the EXIF."""
    value = str(vips.field(image, f"exif-ifd0-{name}") or "").partition(" ")[0]
    unit = str(vips.field(image, "exif-ifd0-ResolutionUnit") or "2").partition(" ")[0]
    try:
        above, below = (float(part) for part in value.split("/"))
        resolution = above / below / (10.0 if unit == "3" else 25.4)
    except (ValueError, ZeroDivisionError):
        return _UNKNOWN_RESOLUTION
    return resolution if resolution > 0 else _UNKNOWN_RESOLUTION


def _iim_order(data: bytes) -> bytes:
    """IPTC stored as 32-bit numbers of a big-endian file comes byte-swapped: put it right."""
    if data[:1] != b"\x1c" and data[3:4] == b"\x1c" and len(data) % 4 == 0:
        return np.frombuffer(data, dtype="<u4").byteswap().tobytes()
    return data


def _fit_iptc(image: Any, format_name: str) -> None:
    """IPTC comes bare from a TIFF; a JPEG wants it packed in a Photoshop resource."""
    data = vips.field(image, "iptc-data")
    if data is None:
        return
    if format_name == "TIFF":  # libvips would cut it to a quarter
        image.remove("iptc-data")
    elif not data.startswith(_APP13):
        resource = struct.pack(">4sHHI", b"8BIM", _IIM_RESOURCE, 0, len(data))
        vips.set_blob(image, "iptc-data", _APP13 + resource + data + bytes(len(data) % 2))


def _unpack_iim(data: bytes) -> bytes:
    """The IPTC resource of a JPEG's Photoshop block, empty if there is none."""
    at = len(_APP13)
    while data[at : at + 4] == b"8BIM" and at + 7 < len(data):
        (kind,) = struct.unpack_from(">H", data, at + 4)
        name_length = data[at + 6] + 1
        at += 6 + name_length + name_length % 2
        if at + 4 > len(data):
            break
        (length,) = struct.unpack_from(">I", data, at)
        if kind == _IIM_RESOURCE:
            return data[at + 4 : at + 4 + length]
        at += 4 + length + length % 2
    return b""
