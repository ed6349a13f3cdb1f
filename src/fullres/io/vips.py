"""libvips as fullres uses it: quiet, without an operation cache, with errors in one clause."""

from __future__ import annotations

import logging
import re
from typing import Any

import numpy as np
import pyvips

_log = logging.getLogger("pyvips")
if _log.level == logging.NOTSET:
    _log.setLevel(logging.WARNING)  # libvips reports every worker thread at INFO

# A cached operation keeps its decoded picture alive, and answers for a file changed since.
pyvips.cache_set_max(0)

FORMATS: dict[str, Any] = {"uchar": np.uint8, "ushort": np.uint16, "float": np.float32}
"""libvips sample formats that fullres handles, and numpy's name for each."""

_NOISE = re.compile(r"bad seek|wbuffer_write|unable to (call|write to target)|Unknown error")
_PREFIX = re.compile(
    r"^(?:.*\.fullres-\w+\.part|[\w.]*(?:vips|Vips|webp|heif|jpeg|png|tiff)\w*|system error): "
)


def condense(error: Exception) -> str:
    """The reason in libvips' message of several lines, as one clause.

    A UnicodeDecodeError is what pyvips raises for a message with a file name that is not UTF-8.
    """
    if isinstance(error, UnicodeDecodeError):
        detail = error.object.decode(errors="replace")
    else:
        detail = str(getattr(error, "detail", error))
    clauses: list[str] = []
    for line in detail.splitlines():
        clause = line.strip()
        while _PREFIX.match(clause):
            clause = _PREFIX.sub("", clause)
        if clause and not _NOISE.search(clause) and clause not in clauses:
            clauses.append(clause)
    return "; ".join(clauses[:2]) or "no reason given by the decoder"


def from_array(array: np.ndarray[Any, Any], interpretation: str) -> Any:
    """A libvips image over `array`, shape (height, width, bands), without a copy."""
    height, width, bands = array.shape
    names = {np.dtype(dtype): name for name, dtype in FORMATS.items()}
    image = pyvips.Image.new_from_memory(array, width, height, bands, names[array.dtype])
    return image.copy(interpretation=interpretation)


def fetch(image: Any, top: int, left: int, height: int, width: int) -> np.ndarray[Any, Any]:
    """The pixels of a rectangle, shape (height, width, bands), in the image's own format."""
    data = pyvips.Region.new(image).fetch(left, top, width, height)
    array = np.frombuffer(data, dtype=FORMATS[image.format])
    return array.reshape(height, width, image.bands)


def size(image: Any) -> int:
    """Bytes of the decoded pixels."""
    sample = np.dtype(FORMATS[image.format]).itemsize
    return int(image.width * image.height * image.bands * sample)


def field(image: Any, name: str) -> Any:
    """A metadata field, None where the image has no such field."""
    return image.get(name) if image.get_typeof(name) else None


def set_blob(image: Any, name: str, data: bytes) -> None:
    """Attach binary metadata to `image`, which must be a private copy."""
    image.set_type(pyvips.GValue.blob_type, name, data)


def builtin_profile(name: str) -> bytes:
    """The bytes of an ICC profile that libvips brings: `srgb` or `cmyk`."""
    return bytes(pyvips.Operation.call("profile_load", name))
