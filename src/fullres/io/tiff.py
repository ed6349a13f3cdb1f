"""TIFF directories: the EXIF and IPTC of a TIFF, which libvips does not carry.

EXIF is itself a small TIFF, so one reader and one writer serve both. Classic TIFF, BigTIFF and
both byte orders are understood. Source: TIFF 6.0, section 2; EXIF 2.32, section 4.6.
"""

from __future__ import annotations

import io
import logging
import struct
from dataclasses import dataclass, field, replace
from typing import BinaryIO, NamedTuple

import numpy as np

_MARK = b"Exif\0\0"
_EXIF_IFD, _GPS_IFD, _INTEROPERABILITY_IFD = 0x8769, 0x8825, 0xA005
_PIXEL_SIZE = (0xA002, 0xA003)  # PixelXDimension, PixelYDimension
# SubjectArea and SubjectLocation, short; FocalPlaneXResolution and its sister, rational
_IN_PIXELS = frozenset(((0x9214, 3), (0xA214, 3), (0xA20E, 5), (0xA20F, 5)))
IPTC = 33723
_COMPRESSION, _TILE_WIDTH, _DESCRIPTION = 259, 322, 0x10E
# Document name, description, make, model, software, date, artist, host, rating, copyright, XP*:
# the tags of the first directory that speak of the photograph and not of how it is stored.
_DESCRIPTIVE = frozenset(
    (0x10D, _DESCRIPTION, 0x10F, 0x110, 0x131, 0x132, 0x13B, 0x13C, 0x4746, 0x4749, 0x8298)
) | frozenset(range(0x9C9B, 0x9CA0))
# Bytes of a value and of its unit in byte order (a rational is two units), by field type.
_VALUE = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4}
_VALUE |= {16: 8, 17: 8, 18: 8}
_UNIT = _VALUE | {5: 4, 10: 4}
_MOST_BYTES, _LAST_BYTE = 1 << 26, 1 << 62

_log = logging.getLogger(__name__)


class Entry(NamedTuple):
    """A field of a directory: its type, number of values, and values in little-endian order."""

    kind: int
    number: int
    data: bytes


class _Record(NamedTuple):
    tag: int
    kind: int
    number: int
    inline: bytes  # the values, or where in the file they are


class _Layout(NamedTuple):
    order: str
    big: bool

    @property
    def head(self) -> str:  # of a directory: the number of records
        return self.order + ("Q" if self.big else "H")

    @property
    def offset(self) -> str:
        return self.order + ("Q" if self.big else "I")

    @property
    def record(self) -> str:
        return self.order + ("HHQ8s" if self.big else "HHI4s")


@dataclass(frozen=True)
class Exif:
    """What a camera noted, by tag: the descriptive fields, the EXIF and the GPS directory."""

    image: dict[int, Entry] = field(default_factory=dict)
    photo: dict[int, Entry] = field(default_factory=dict)
    gps: dict[int, Entry] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.image or self.photo or self.gps)

    def resized(self, width: int, height: int) -> Exif:
        """The same, with the pixel dimensions, where noted, set to those given."""
        sizes = zip(_PIXEL_SIZE, (width, height), strict=True)
        changed = {tag: Entry(4, 1, struct.pack("<I", size)) for tag, size in sizes}
        kept = {tag: changed.get(tag, entry) for tag, entry in self.photo.items()}
        return replace(self, photo=kept)

    def to_bytes(self) -> bytes:
        """An EXIF block without a thumbnail, starting at its TIFF header."""
        file = io.BytesIO(struct.pack("<2sHIHI", b"II", 42, 8, 0, 0))
        attach_exif(file, self)
        return file.getvalue()


class Description(NamedTuple):
    """What the first directory of a TIFF says."""

    compression: int
    tiled: bool
    iptc: bytes | None
    exif: Exif


def describe(file: BinaryIO) -> Description:
    """Read the first directory of a TIFF; a file cut short or damaged raises ValueError."""
    layout, first = _header(file)
    records, _ = _directory(file, layout, first)
    by_tag = {record.tag: record for record in records}
    if not by_tag:
        raise ValueError("its directory is empty")
    compression = 1
    if _COMPRESSION in by_tag:
        compression = int.from_bytes(_entry(file, layout, by_tag[_COMPRESSION]).data, "little")
    iptc = _entry(file, layout, by_tag[IPTC]).data if IPTC in by_tag else None
    try:
        exif = _exif(file, layout, by_tag)
    except ValueError as error:
        _log.warning("the EXIF of this TIFF is damaged and left out: %s", error)
        exif = Exif()
    return Description(compression, _TILE_WIDTH in by_tag, iptc, exif)


def parse_exif(block: bytes) -> Exif:
    """Read an EXIF block, with or without its leading `Exif` mark; ValueError if damaged."""
    file = io.BytesIO(block.removeprefix(_MARK))
    layout, first = _header(file)
    records, _ = _directory(file, layout, first)
    return _exif(file, layout, {record.tag: record for record in records})


def without_thumbnail(block: bytes) -> bytes:
    """The same EXIF block with its second directory, the thumbnail, unlinked; ValueError."""
    mark = len(block) - len(block.removeprefix(_MARK))
    file = io.BytesIO(block[mark:])
    layout, first = _header(file)
    records, _ = _directory(file, layout, first)
    skip = struct.calcsize(layout.head) + len(records) * struct.calcsize(layout.record)
    link = mark + first + skip
    width = struct.calcsize(layout.offset)
    return block[:link] + bytes(width) + block[link + width :]


def enlarged(block: bytes, factor: int) -> bytes:
    """The same EXIF block with what it measures in pixels times `factor`; ValueError if damaged.

    Places of the subject, and the sensor's pixels per length.
    """
    mark = len(block) - len(block.removeprefix(_MARK))
    file = io.BytesIO(block[mark:])
    layout, first = _header(file)
    records, _ = _directory(file, layout, first)
    pointer = next((record for record in records if record.tag == _EXIF_IFD), None)
    if pointer is None:
        return block
    start = int.from_bytes(_entry(file, layout, pointer).data, "little")
    data, changed = bytearray(block), _directory(file, layout, start)[0]
    for number, record in enumerate(changed):
        if (record.tag, record.kind) not in _IN_PIXELS:
            continue
        at = start + struct.calcsize(layout.head) + (number + 1) * struct.calcsize(layout.record)
        at -= len(record.inline)
        if _VALUE[record.kind] * record.number > len(record.inline):
            (at,) = struct.unpack(layout.offset, record.inline)
        unit = f"{layout.order}u{_UNIT[record.kind]}"
        step = _VALUE[record.kind] // _UNIT[record.kind]  # of a rational only the numerator
        values = np.frombuffer(data, unit, step * record.number, mark + at)[::step]
        values[:] = np.minimum(values.astype(np.uint64) * factor, np.iinfo(unit[1:]).max)
    return bytes(data)


def attach_exif(file: BinaryIO, exif: Exif) -> None:
    """Add `exif` to the first directory of the TIFF in `file`, opened for reading and writing.

    The directory is written anew at the end; a field that it already has is kept.
    """
    layout, first = _header(file)
    records, following = _directory(file, layout, first)
    present = {record.tag for record in records}
    added = {tag: entry for tag, entry in exif.image.items() if tag not in present}
    for tag, entries in ((_EXIF_IFD, exif.photo), (_GPS_IFD, exif.gps)):
        if entries and tag not in present:
            start = _append(file, layout, entries, [], 0)
            added[tag] = Entry(*((16, 1, struct.pack("<Q", start)) if layout.big else
                                 (4, 1, struct.pack("<I", start))))  # fmt: skip
    start = _append(file, layout, added, records, following)
    file.seek(8 if layout.big else 4)
    file.write(struct.pack(layout.offset, start))


def _header(file: BinaryIO) -> tuple[_Layout, int]:
    file.seek(0)
    head = file.read(16)
    order = {b"II": "<", b"MM": ">"}.get(head[:2])
    if order is None or len(head) < 8:
        raise ValueError("it has no TIFF header")
    (version,) = struct.unpack_from(order + "H", head, 2)
    layout = _Layout(order, big=version == 43)
    if layout.big and len(head) < 16:
        raise ValueError("its header is cut short")
    (first,) = struct.unpack_from(layout.offset, head, 8 if layout.big else 4)
    return layout, first


def _read(file: BinaryIO, start: int, length: int) -> bytes:
    if length > _MOST_BYTES or start > _LAST_BYTE:
        raise ValueError(f"a field of {length} bytes at {start} is not plausible")
    file.seek(start)
    data = file.read(length)
    if len(data) < length:
        raise ValueError("its directory lies beyond the end of the file")
    return data


def _directory(file: BinaryIO, layout: _Layout, start: int) -> tuple[list[_Record], int]:
    skip = struct.calcsize(layout.head)
    (number,) = struct.unpack(layout.head, _read(file, start, skip))
    size = struct.calcsize(layout.record)
    body = _read(file, start + skip, number * size + struct.calcsize(layout.offset))
    records = [_Record(*struct.unpack_from(layout.record, body, i * size)) for i in range(number)]
    (following,) = struct.unpack_from(layout.offset, body, number * size)
    return records, following


def _entry(file: BinaryIO, layout: _Layout, record: _Record) -> Entry:
    if record.kind not in _VALUE:
        raise ValueError(f"field {record.tag} is of the unknown type {record.kind}")
    length = _VALUE[record.kind] * record.number
    data = record.inline[:length]
    if length > len(record.inline):
        data = _read(file, struct.unpack(layout.offset, record.inline)[0], length)
    return Entry(record.kind, record.number, _ordered(data, record.kind, layout))


def _ordered(data: bytes, kind: int, layout: _Layout) -> bytes:
    if layout.order == "<" or _UNIT[kind] == 1:
        return data
    return np.frombuffer(data, dtype=f"<u{_UNIT[kind]}").byteswap().tobytes()


def _entries(file: BinaryIO, layout: _Layout, pointer: _Record | None) -> dict[int, Entry]:
    if pointer is None:
        return {}
    start = int.from_bytes(_entry(file, layout, pointer).data, "little")
    records, _ = _directory(file, layout, start)
    return {r.tag: _entry(file, layout, r) for r in records if r.tag != _INTEROPERABILITY_IFD}


def _exif(file: BinaryIO, layout: _Layout, by_tag: dict[int, _Record]) -> Exif:
    image = {tag: _entry(file, layout, by_tag[tag]) for tag in _DESCRIPTIVE & by_tag.keys()}
    if _DESCRIPTION in image and _describes_storage(image[_DESCRIPTION].data):
        del image[_DESCRIPTION]
    photo = _entries(file, layout, by_tag.get(_EXIF_IFD))
    return Exif(image, photo, _entries(file, layout, by_tag.get(_GPS_IFD)))


def _describes_storage(description: bytes) -> bool:
    """Whether a description is a program's note on the array's shape, wrong for a new file."""
    return description.startswith((b'{"shape"', b"ImageJ=")) or b"<OME" in description[:1024]


def _append(
    file: BinaryIO,
    layout: _Layout,
    entries: dict[int, Entry],
    records: list[_Record],
    following: int,
) -> int:
    """Write a directory of new `entries` and old `records` at the end; return where it starts."""
    room = struct.calcsize(layout.offset)
    written = list(records)
    for tag, entry in entries.items():
        inline = _ordered(entry.data, entry.kind, layout)
        if len(inline) > room:
            start = _seek_end(file)
            file.write(inline)
            inline = struct.pack(layout.offset, start)
        written.append(_Record(tag, entry.kind, entry.number, inline.ljust(room, b"\0")))
    start = _seek_end(file)
    file.write(struct.pack(layout.head, len(written)))
    for record in sorted(written):
        file.write(struct.pack(layout.record, *record))
    file.write(struct.pack(layout.offset, following))
    return start


def _seek_end(file: BinaryIO) -> int:
    end = file.seek(0, io.SEEK_END)
    file.write(bytes(-end % 8))
    return end + -end % 8
