"""What a file is, judged by its first bytes before any pixel is decoded."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from fullres.errors import ImageError
from fullres.io import bmp, tiff

# fmt: off
SUFFIXES = frozenset((
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".tif", ".tiff", ".webp", ".avif", ".heic", ".heif",
    ".bmp",
))
# fmt: on
"""Suffixes of the pictures that `open_image` reads, in lower case."""

SUPPORTED = "JPEG, PNG, TIFF, WebP, AVIF, HEIF and BMP"
_LOSSLESS_TIFF = {1: "none", 5: "lzw", 8: "deflate", 32773: "packbits", 32946: "deflate"}
_LOSSLESS_TIFF |= {50000: "zstd"}
_OTHERS = {b"GIF8": "a GIF", b"8BPS": "a Photoshop file", b"%PDF": "a PDF"}
_OTHERS |= {b"\0\0\0\x0cjP": "a JPEG 2000", b"\0\0\0\x0cJXL": "a JPEG XL", b"\xff\x0a": "a JPEG XL"}


@dataclass(frozen=True)
class Probe:
    """The format of a file and what libvips would not tell about it."""

    format: str
    """JPEG, PNG, TIFF, WebP, HEIF (AVIF included) or BMP."""
    lossless: bool
    """Whether the pixels are stored without loss."""
    frames: int
    """Frames of an animated PNG, 1 otherwise."""
    compression: str | None
    """libvips' name of a TIFF's compression, None if lossy or not a TIFF."""
    tiff: tiff.Description | None
    bmp: bmp.Bitmap | None = None


def probe(path: Path) -> Probe:
    """Look at the file at `path`; raises ImageError if it is not a picture fullres can read."""
    try:
        if path.is_dir():
            raise ImageError(f"{path}: is a folder, not a picture; name a file in it")
        with path.open("rb") as file:
            return _probe(path, file)
    except FileNotFoundError:
        raise ImageError(f"{path}: there is no such file; check the path") from None
    except PermissionError:
        raise ImageError(f"{path}: may not be read; change its permissions") from None
    except OSError as error:
        reason = error.strerror or str(error)
        raise ImageError(f"{path}: cannot be opened ({reason}); check the path") from error


def _probe(path: Path, file: BinaryIO) -> Probe:
    head = file.read(32)
    if not head:
        raise ImageError(f"{path}: is empty (0 bytes); fetch the file again from its origin")
    if path.suffix and path.suffix.lower() not in SUFFIXES:
        known = " ".join(sorted(SUFFIXES))
        raise ImageError(
            f"{path}: files ending in {path.suffix} are not supported; convert it to one of {known}"
        )
    name = _format(head)
    if name is None:
        kind = next((kind for mark, kind in _OTHERS.items() if head.startswith(mark)), None)
        reason = f"is {kind}" if kind else "is not a picture, whatever its name says"
        raise ImageError(f"{path}: {reason}; fullres reads {SUPPORTED}, convert it to one of these")
    if name == "TIFF":
        return _probe_tiff(path, file)
    if name == "BMP":
        return Probe(name, True, 1, None, None, bmp.describe(path, file))
    try:
        frames = _png_frames(file) if name == "PNG" else 1
        lossless = name == "PNG" or (name == "WebP" and _webp_is_lossless(file))
    except struct.error:  # the decoder says where a file ends too soon
        frames, lossless = 1, False
    return Probe(name, lossless, frames, None, None)


def _format(head: bytes) -> str | None:
    if head.startswith(b"\xff\xd8\xff"):
        return "JPEG"
    if head.startswith(b"\x89PNG\r\n\x1a\n"):
        return "PNG"
    if head.startswith((b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")):
        return "TIFF"
    if head.startswith(b"RIFF") and head[8:12] == b"WEBP":
        return "WebP"
    brands = {head[i : i + 4] for i in range(8, len(head), 4)}
    if head[4:8] == b"ftyp" and brands & {b"avif", b"heic", b"heix", b"mif1", b"msf1", b"avis"}:
        return "HEIF"
    return "BMP" if head.startswith(b"BM") else None


def _probe_tiff(path: Path, file: BinaryIO) -> Probe:
    try:
        description = tiff.describe(file)
    except ValueError as error:
        raise ImageError(
            f"{path}: truncated or damaged TIFF: {error}; fetch the file again from its origin"
        ) from error
    compression = _LOSSLESS_TIFF.get(description.compression)
    return Probe("TIFF", compression is not None, 1, compression, description)


def _chunks(file: BinaryIO, start: int, form: str, extra: int) -> Iterator[tuple[bytes, int]]:
    """Name and start of the body of each chunk of a PNG or RIFF file."""
    while True:
        file.seek(start)
        first, second = struct.unpack(form, file.read(8))
        name, length = (first, second) if isinstance(first, bytes) else (second, first)
        yield name, start + 8
        start += 8 + length + (extra or length % 2)


def _png_frames(file: BinaryIO) -> int:
    for name, body in _chunks(file, 8, ">I4s", 4):
        if name == b"acTL":
            file.seek(body)
            return int(struct.unpack(">I", file.read(4))[0])
        if name in (b"IDAT", b"IEND"):
            break
    return 1


def _webp_is_lossless(file: BinaryIO) -> bool:
    kinds = (name for name, _ in _chunks(file, 12, "<4sI", 0) if name in (b"VP8 ", b"VP8L"))
    return next(kinds) == b"VP8L"
