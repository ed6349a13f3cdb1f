"""Windows bitmaps (BMP), which libvips does not read or write by itself.

Source: Microsoft, Windows GDI, "Bitmap Storage" and the structures BITMAPCOREHEADER to
BITMAPV5HEADER.
"""

from __future__ import annotations

import io
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyvips

from fullres.errors import ImageError
from fullres.io import vips

LARGEST = 2**32 - 1
"""Bytes of a file: its header counts them in 32 bits."""

_FILE, _CORE, _INFO, _V5 = 14, 12, 40, 124  # bytes of the file's header and of three of the next
_SIZES = frozenset((_CORE, _INFO, 52, 56, 64, 108, _V5))
_OS2 = 64
_RGB, _BITFIELDS, _ALPHA_BITFIELDS = 0, 3, 6
_COMPRESSIONS = {1: "run-length coding", 2: "run-length coding", 4: "JPEG", 5: "PNG"}
_MASKS = {16: (0x7C00, 0x03E0, 0x001F, 0), 32: (0xFF0000, 0x00FF00, 0x0000FF, 0)}
_EMBEDDED, _SRGB = 0x4D424544, 0x73524742  # LCS_PROFILE_EMBEDDED and LCS_sRGB
_IMAGES = 4  # LCS_GM_IMAGES, the perceptual intent
_STRIP = 2**22


@dataclass(frozen=True)
class Bitmap:
    """What the header of a BMP says."""

    height: int
    width: int
    bits: int
    """Bits of a pixel: 1, 2, 4 or 8 with a palette, 16, 24 or 32 without."""
    top_down: bool
    offset: int
    """The byte at which the pixels begin."""
    palette: bytes
    """Blue, green and red of each entry; empty where there is no palette."""
    masks: tuple[int, int, int, int]
    """The bits of red, green, blue and alpha in a pixel of 16 or 32."""
    resolution: tuple[int, int]
    """Pixels per metre across and down, 0 where unknown."""
    profile: bytes | None
    """The embedded ICC profile."""

    @property
    def stride(self) -> int:
        """Bytes of a row, a multiple of 4."""
        return _stride(self.width, self.bits)


def describe(path: Path, file: BinaryIO) -> Bitmap:
    """Read the header of the BMP `path`, opened as `file`.

    Raises:
        ImageError: the file is truncated, damaged or of a kind that is not supported.
    """
    file.seek(0)
    head = file.read(_FILE + _V5 + 16)
    length = file.seek(0, io.SEEK_END)
    if len(head) < _FILE + 4:
        raise _truncated(path, length)
    offset, size = struct.unpack_from("<II", head, 10)
    if size not in _SIZES:
        raise _damaged(path, f"a header of {size} bytes is not known")
    if len(head) < _FILE + size:
        raise _truncated(path, length)
    compression, across, down, used = _RGB, 0, 0, 0
    if size == _CORE:
        width, height, _, bits = struct.unpack_from("<HHHH", head, _FILE + 4)
    else:
        width, height, _, bits, compression, _, across, down, used = struct.unpack_from(
            "<iiHHIIiiI", head, _FILE + 4
        )
    _refuse_kind(path, size, bits, compression)
    if width < 1 or height == 0:
        raise _damaged(path, f"a size of {abs(height)} × {width} pixels is not possible")
    masks, start = _masks(path, head, size, bits, compression)
    end = offset + _stride(width, bits) * abs(height)
    entry = 3 if size == _CORE else 4
    if offset < start + (entry if bits <= 8 else 0):
        raise _damaged(path, f"its pixels would begin at byte {offset}, in the header")
    if length < end:
        raise _truncated(path, length, f"of {end} bytes for {abs(height)} × {width} pixels")
    return Bitmap(
        height=abs(height),
        width=width,
        bits=bits,
        top_down=height < 0,
        offset=offset,
        palette=_palette(file, start, offset, bits, used, entry),
        masks=masks,
        resolution=(max(across, 0), max(down, 0)),
        profile=_profile(path, file, head, length) if size == _V5 else None,
    )


def load(path: Path, bitmap: Bitmap) -> Any:
    """The picture `bitmap` in the file at `path`: uchar, grey or sRGB, alpha last.

    Fields of fewer than 8 bits are scaled to 0 … 255 and rounded to nearest. The fourth byte of a
    pixel of 32 bits is alpha only where the header has a mask for it.
    """
    name = os.fsencode(path)
    image = pyvips.Image.rawload(name, bitmap.stride, bitmap.height, 1, offset=bitmap.offset)
    if not bitmap.top_down:
        image = image.flip("vertical")
    if bitmap.bits <= 8:
        image = _looked_up(image, bitmap)
    else:
        depth = bitmap.bits // 8
        image = image.extract_area(0, 0, depth * bitmap.width, bitmap.height).bandfold(factor=depth)
        if bitmap.bits == 24:
            image = image[2].bandjoin([image[1], image[0]])
        else:
            red, *others = [_field(image, mask) for mask in bitmap.masks if mask]
            image = red.bandjoin(others)
    across, down = (pixels / 1000 or 1.0 for pixels in bitmap.resolution)
    grey = image.bands == 1
    image = image.copy(interpretation="b-w" if grey else "srgb", xres=across, yres=down)
    if bitmap.profile is not None and _space(bitmap.profile) == (b"GRAY" if grey else b"RGB "):
        vips.set_blob(image, "icc-profile-data", bitmap.profile)
    return image


def file_size(height: int, width: int, bands: int) -> int:
    """Bytes of the file that `save` makes of such a picture, without its profile."""
    return _FILE + _V5 + 4 * 256 + _stride(width, 8 * bands) * height


def save(image: Any, path: Path) -> None:
    """Write `image`, uchar of 1 (grey), 3 (sRGB) or 4 (with alpha) bands, without loss.

    The resolution and the ICC profile are kept, the rest of the metadata is not: a BMP has no room
    for it.
    """
    stride = _stride(image.width, 8 * image.bands)
    order = [0] if image.bands == 1 else [2, 1, 0, 3][: image.bands]
    rows = max(1, _STRIP // stride)
    profile = vips.field(image, "icc-profile-data")
    with path.open("wb") as file:
        file.write(_header(image, stride, profile))
        for bottom in range(image.height, 0, -rows):
            top = max(0, bottom - rows)
            pixels = vips.fetch(image, top, 0, bottom - top, image.width)[::-1, :, order]
            strip = np.zeros((bottom - top, stride), np.uint8)
            strip[:, : image.width * image.bands] = pixels.reshape(bottom - top, -1)
            file.write(strip.tobytes())
        file.write(profile or b"")


def _stride(width: int, bits: int) -> int:
    return (width * bits + 31) // 32 * 4


def _damaged(path: Path, reason: str) -> ImageError:
    return ImageError(
        f"{path}: truncated or damaged BMP: {reason}; fetch the file again from its origin"
    )


def _truncated(path: Path, size: int, wanted: str = "in its header") -> ImageError:
    return ImageError(
        f"{path}: truncated BMP, the file ends at byte {size} {wanted}; "
        "fetch it again from its origin"
    )


def _refuse_kind(path: Path, size: int, bits: int, compression: int) -> None:
    kind = None
    if compression in (_BITFIELDS, _ALPHA_BITFIELDS):
        if size == _OS2 or bits not in _MASKS:
            kind = f"compression {compression} at {bits} bits per pixel"
    elif compression != _RGB:
        kind = _COMPRESSIONS.get(compression, f"compression {compression}")
    elif bits not in (1, 2, 4, 8, 16, 24, 32):
        kind = f"{bits} bits per pixel"
    if kind is not None:
        raise ImageError(
            f"{path}: is a BMP with {kind}, which is not supported; save it as a BMP without "
            "compression or as PNG"
        )


def _masks(
    path: Path, head: bytes, size: int, bits: int, compression: int
) -> tuple[tuple[int, int, int, int], int]:
    """The masks of red, green, blue and alpha, and the byte after them and the header."""
    start = _FILE + size
    if compression == _RGB:
        return _MASKS.get(bits, (0, 0, 0, 0)), start
    number = 4 if compression == _ALPHA_BITFIELDS or size >= 56 else 3
    if size == _INFO:  # they follow the header, in later ones they are part of it
        start += 4 * number
    if len(head) < start:
        raise _truncated(path, len(head))
    red, green, blue, *alpha = struct.unpack_from(f"<{number}I", head, _FILE + _INFO)
    masks = (red, green, blue, alpha[0] if alpha else 0)
    for mask in masks:
        field = mask >> _shift(mask)
        if field & (field + 1) or mask >> bits or 0 in (red, green, blue):
            raise _damaged(path, f"its masks {_hexadecimal(masks)} make no pixels")
        if field > 255:
            raise ImageError(
                f"{path}: is a BMP with {field.bit_length()} bits per channel, which is not "
                "supported; save it as PNG"
            )
    return masks, start


def _hexadecimal(masks: tuple[int, ...]) -> str:
    return " ".join(f"{mask:x}" for mask in masks)


def _shift(mask: int) -> int:
    return (mask & -mask).bit_length() - 1 if mask else 0


def _palette(file: BinaryIO, start: int, offset: int, bits: int, used: int, entry: int) -> bytes:
    if bits > 8:
        return b""
    number = min(used or 2**bits, 2**bits, (offset - start) // entry)
    file.seek(start)
    entries = np.frombuffer(file.read(number * entry), np.uint8).reshape(number, entry)
    return entries[:, :3].tobytes()


def _profile(path: Path, file: BinaryIO, head: bytes, length: int) -> bytes | None:
    (space,) = struct.unpack_from("<I", head, _FILE + 56)
    start, size = struct.unpack_from("<II", head, _FILE + 112)
    if space != _EMBEDDED or size == 0:
        return None
    if _FILE + start + size > length:
        raise _truncated(path, length, f"of {_FILE + start + size} bytes with its profile")
    file.seek(_FILE + start)
    return file.read(size)


def _space(profile: bytes) -> bytes:
    return profile[16:20]


def _looked_up(packed: Any, bitmap: Bitmap) -> Any:
    """The colours of indices packed into bytes, the first in the highest bits."""
    bits = bitmap.bits
    first, *others = [packed >> shift & 2**bits - 1 for shift in range(8 - bits, -1, -bits)]
    indices = first.bandjoin(others).bandunfold() if others else packed
    colours = np.frombuffer(bitmap.palette, np.uint8).reshape(-1, 3)[:, ::-1]
    of_colour = bitmap.profile is not None and _space(bitmap.profile) == b"RGB "
    if not of_colour and (colours == colours[:, :1]).all():
        colours = colours[:, :1]
    table = np.zeros((1, 2**bits, colours.shape[1]), np.uint8)  # what has no entry is black
    table[0, : len(colours)] = colours
    indices = indices.extract_area(0, 0, bitmap.width, bitmap.height)
    return indices.maplut(vips.from_array(table, "b-w" if table.shape[2] == 1 else "srgb"))


def _field(image: Any, mask: int) -> Any:
    """The samples of 8 bits that `mask` takes from the bytes of each pixel, lowest first."""
    shift = _shift(mask)
    peak = mask >> shift
    if peak == 255 and shift % 8 == 0:
        return image[shift // 8]
    pixel = image[0].cast("uint")
    for number in range(1, image.bands):
        pixel = pixel | image[number].cast("uint") << 8 * number
    values = np.rint(np.arange(peak + 1) * (255 / peak)).astype(np.uint8).reshape(1, -1, 1)
    return (pixel >> shift & peak).cast("uchar").maplut(vips.from_array(values, "b-w"))


def _header(image: Any, stride: int, profile: bytes | None) -> bytes:
    """All that comes before the pixels; the profile comes after them."""
    pixels, bits = stride * image.height, 8 * image.bands
    grey, alpha = bits == 8, bits == 32
    size = _V5 if alpha or profile else _INFO
    palette = np.repeat(np.arange(256, dtype="<u4") * 0x010101, 1 if grey else 0).tobytes()
    offset = _FILE + size + len(palette)
    total = offset + pixels + len(profile or b"")
    resolution = (min(round(1000 * value), 2**31 - 1) for value in (image.xres, image.yres))
    # fmt: off
    head = struct.pack("<2sIHHI", b"BM", total, 0, 0, offset)
    head += struct.pack(
        "<IiiHHIIiiII", size, image.width, image.height, 1, bits,
        _BITFIELDS if alpha else _RGB, pixels, *resolution, 256 if grey else 0, 0,
    )
    if size == _V5:
        masks = (*_MASKS[32][:3], 0xFF000000) if alpha else (0, 0, 0, 0)
        head += struct.pack(
            "<IIIII48xIIII", *masks, _EMBEDDED if profile else _SRGB, _IMAGES,
            offset - _FILE + pixels if profile else 0, len(profile or b""), 0,
        )
    # fmt: on
    return head + palette
