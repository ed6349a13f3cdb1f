from __future__ import annotations

import dataclasses
import random
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fullres.errors import ImageError
from fullres.io import bmp, vips
from fullres.io import image as image_module
from fullres.io import sink as sink_module
from fullres.io.image import open_image

CLASSIC5 = Path("../shared/data/classic5")
GREYS = [(level, level, level) for level in range(256)]


@pytest.fixture(scope="module")
def build():
    """The bytes of a BMP, made without fullres; `stored` has whole pixels as numbers."""

    def make(stored, bits, *, header=40, palette=(), masks=(), top_down=False, ppm=(0, 0)):
        height, width = stored.shape
        rows = []
        for row in stored if top_down else stored[::-1]:
            text = "".join(f"{pixel:0{bits}b}" for pixel in row)
            if bits > 8:  # little-endian
                text = "".join(
                    "".join(reversed([pixel[i : i + 8] for i in range(0, bits, 8)]))
                    for pixel in (text[i : i + bits] for i in range(0, len(text), bits))
                )
            text += "0" * (-len(text) % 32)
            rows.append(int(text, 2).to_bytes(len(text) // 8, "big"))
        if header == 12:
            info = struct.pack("<IHHHH", 12, width, height, 1, bits)
        else:
            compression = {0: 0, 3: 3, 4: 3 if header >= 56 else 6}[len(masks)]
            signed = -height if top_down else height
            info = struct.pack("<IiiHHII", header, width, signed, 1, bits, compression, 0)
            info += struct.pack("<iiII", *ppm, len(palette), 0)
            info += struct.pack(f"<{len(masks)}I", *masks)
            info = info.ljust(header, b"\0")
        pad = b"" if header == 12 else b"\0"
        table = b"".join(bytes(reversed(colour)) + pad for colour in palette)
        offset = 14 + len(info) + len(table)
        pixels = b"".join(rows)
        size = offset + len(pixels)
        return struct.pack("<2sIHHI", b"BM", size, 0, 0, offset) + info + table + pixels

    return make


@pytest.fixture(scope="module")
def samples():
    """What `open_image` gives of a file, shape (height, width, bands), alpha included."""

    def read(path):
        with open_image(path) as source:
            values = source.read(0, 0, source.height, source.width) * 255
            stored = vips.fetch(source._pixels, 0, 0, source.height, source.width)
            assert np.array_equal(values.permute(1, 2, 0), stored[..., : source.channels])
            assert source.bits == 8
            return stored

    return read


sizes = st.tuples(st.integers(1, 40), st.integers(1, 40))


@given(
    size=sizes,
    bits=st.sampled_from([1, 4, 8]),
    header=st.sampled_from([12, 40, 64, 108, 124]),
    top_down=st.booleans(),
    grey=st.booleans(),
    seed=st.integers(0, 1000),
)
@settings(max_examples=60, deadline=None)
def test_palettes_as_pillow_reads_them(
    tmp_path_factory, build, samples, size, bits, header, top_down, grey, seed
):
    path = tmp_path_factory.mktemp("palette") / "in.bmp"
    generator = np.random.default_rng(seed)
    colours = generator.integers(0, 256, (2**bits, 1 if grey else 3)) * np.ones((1, 3), int)
    stored = generator.integers(0, 2**bits, size)
    top_down = top_down and header > 12
    path.write_bytes(
        build(stored, bits, header=header, palette=colours.tolist(), top_down=top_down)
    )
    with Image.open(path) as image:
        expected = np.asarray(image.convert("RGB"))
    read = samples(path)
    assert np.array_equal(expected, colours[stored])
    assert np.array_equal(read, expected[..., :1] if grey else expected)
    shutil.rmtree(path.parent)


@given(
    size=sizes,
    kind=st.sampled_from([(12, 24), (40, 24), (64, 24), (124, 24), (40, 32), (108, 32)]),
    top_down=st.booleans(),
)
@settings(max_examples=40, deadline=None)
def test_24_and_32_bits_as_pillow_reads_them(
    tmp_path_factory, build, samples, size, kind, top_down
):
    """The fourth byte of 32 bits without masks is no alpha."""
    header, bits = kind
    path = tmp_path_factory.mktemp("plain") / "in.bmp"
    stored = np.random.default_rng(size).integers(0, 2**bits, size)
    path.write_bytes(build(stored, bits, header=header, top_down=top_down and header > 12))
    with Image.open(path) as image:
        assert np.array_equal(samples(path), np.asarray(image.convert("RGB")))
    shutil.rmtree(path.parent)


FIELDS = {
    "565": (16, (0xF800, 0x7E0, 0x1F)),
    "555": (16, (0x7C00, 0x3E0, 0x1F)),
    "555 without masks": (16, ()),
    "1555": (16, (0x7C00, 0x3E0, 0x1F, 0x8000)),
    "4444": (16, (0xF00, 0xF0, 0xF, 0xF000)),
    "BGRX": (32, (0xFF0000, 0xFF00, 0xFF)),
    "XBGR": (32, (0xFF000000, 0xFF0000, 0xFF00)),
    "RGBA": (32, (0xFF, 0xFF00, 0xFF0000, 0xFF000000)),
    "BGRA": (32, (0xFF0000, 0xFF00, 0xFF, 0xFF000000)),
    "odd": (32, (0x7F << 25, 0xFF << 13, 0x3F << 3, 0x3)),
}


@pytest.mark.parametrize("header", [40, 56, 108, 124])
@pytest.mark.parametrize("name", FIELDS)
def test_fields_are_scaled_and_rounded_to_nearest(tmp_path, build, samples, name, header):
    bits, masks = FIELDS[name]
    stored = np.random.default_rng(0).integers(0, 2**bits, (13, 17))
    path = tmp_path / "in.bmp"
    path.write_bytes(build(stored, bits, header=header, masks=masks, top_down=True))
    bands = []
    for mask in masks or FIELDS["555"][1]:
        shift = (mask & -mask).bit_length() - 1
        bands.append(np.rint((stored & mask) / (mask >> shift << shift) * 255))
    read = samples(path)
    assert np.array_equal(read, np.stack(bands, axis=2))
    if len(masks) < 4 or (bits == 32 and header > 40 and name != "odd"):  # the rest Pillow cannot
        with Image.open(path) as image:  # which rounds down
            theirs = np.asarray(image)
        assert theirs.shape == read.shape
        assert np.abs(theirs.astype(int) - read).max() <= 1


def test_two_bits_and_indices_beyond_a_short_palette_are_black(tmp_path, build, samples):
    stored = np.array([[0, 1, 2, 3, 1], [3, 2, 1, 0, 2]])
    path = tmp_path / "in.bmp"
    path.write_bytes(build(stored, 2, palette=[(9, 8, 7), (50, 60, 70), (255, 254, 253)]))
    table = np.array([(9, 8, 7), (50, 60, 70), (255, 254, 253), (0, 0, 0)])
    assert np.array_equal(samples(path), table[stored])


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB"])
@pytest.mark.parametrize("huge", [False, True])
def test_what_pillow_writes(tmp_path, monkeypatch, noise, samples, copy, mode, huge):
    if huge:  # through temporary files, as a picture beyond the limit would be
        monkeypatch.setattr(image_module, "IN_MEMORY", 0)
        monkeypatch.setattr(sink_module, "IN_MEMORY", 0)
    photo = Image.fromarray(noise(19, 27, 3)).convert(mode)
    photo.save(tmp_path / "in.bmp", dpi=(300, 150))
    expected = np.asarray(photo.convert("L" if mode in "1L" else "RGB")).reshape(19, 27, -1)
    assert np.array_equal(samples(tmp_path / "in.bmp"), expected)
    with Image.open(copy(tmp_path / "in.bmp", tmp_path / "out.bmp")) as image:
        assert image.format == "BMP"
        assert image.mode == ("L" if mode in "1L" else "RGB")
        assert image.info["dpi"] == pytest.approx((300, 150), abs=0.02)
        assert np.array_equal(np.asarray(image).reshape(expected.shape), expected)


@given(size=sizes, channels=st.integers(1, 4), strip=st.integers(1, 4000))
@settings(max_examples=50, deadline=None)
def test_writing_is_exact_and_pillow_reads_it(
    tmp_path_factory, noise, save, samples, copy, size, channels, strip
):
    folder = tmp_path_factory.mktemp("exact")
    array = noise(*size, channels)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bmp, "_STRIP", strip)
        path = copy(save(folder / "in.png", array), folder / "out.bmp")
    expected = array
    if channels == 2:  # alpha asks for colour
        expected = array[..., [0, 0, 0, 1]]
    assert np.array_equal(samples(path), expected)
    with Image.open(path) as image:
        assert np.array_equal(np.asarray(image).reshape(expected.shape), expected)
    data = path.read_bytes()
    assert struct.unpack_from("<I", data, 2) == (len(data),)
    assert len(data) <= bmp.file_size(*size, expected.shape[2])
    assert np.array_equal(samples(copy(path, folder / "again.bmp")), expected)
    shutil.rmtree(folder)


@pytest.mark.parametrize(("channels", "colours"), [(1, "b-w"), (3, "srgb"), (4, "srgb")])
def test_profile_and_resolution_are_kept(tmp_path, noise, copy, channels, colours):
    profile = bytearray(vips.builtin_profile("srgb"))
    if channels == 1:
        profile[16:20] = b"GRAY"
    image = vips.from_array(noise(5, 6, channels), colours).copy(xres=4, yres=8)
    vips.set_blob(image, "icc-profile-data", bytes(profile))
    bmp.save(image, tmp_path / "in.bmp")
    with open_image(tmp_path / "in.bmp") as source:
        assert source.channels == min(channels, 3)
        assert source._pixels.get("icc-profile-data") == bytes(profile)
        assert (source._pixels.xres, source._pixels.yres) == (4, 8)
    larger = copy(tmp_path / "in.bmp", tmp_path / "out.bmp", scale=2)
    with open_image(larger) as source:
        assert source._pixels.get("icc-profile-data") == bytes(profile)
        assert (source._pixels.xres, source._pixels.yres) == (8, 16)


def test_greys_with_a_profile_of_colours_are_colours(tmp_path, noise):
    image = vips.from_array(noise(5, 6, 1), "b-w").copy()
    vips.set_blob(image, "icc-profile-data", vips.builtin_profile("srgb"))
    bmp.save(image, tmp_path / "in.bmp")
    with open_image(tmp_path / "in.bmp") as source:
        assert source.channels == 3
        assert source._pixels.get("icc-profile-data") == vips.builtin_profile("srgb")


def test_an_orientation_which_bmp_cannot_note_is_applied(tmp_path, noise, save, samples, copy):
    array = noise(5, 9, 3)
    path = save(tmp_path / "in.tif", array, [("orientation", 6)])
    assert np.array_equal(samples(copy(path, tmp_path / "o.bmp")), np.rot90(array, -1))


@pytest.mark.parametrize(("bits", "words"), [(16, "16 bits per channel"), (32, "32-bit float")])
def test_deep_pictures_are_refused_unless_8_bits_are_asked(
    tmp_path, noise, save, samples, copy, fails, bits, words
):
    path, target = save(tmp_path / "in.tif", noise(4, 4, 3, bits)), tmp_path / "out.bmp"
    with open_image(path) as source:
        fails(lambda: source.create(target), target, words, "--bits 8", ".tif")
    assert samples(copy(path, target, bits=8)).shape == (4, 4, 3)


def test_more_than_4_gib_are_refused_before_any_work(tmp_path, noise, save, fails):
    path, target = save(tmp_path / "in.png", noise(20, 20, 3)), tmp_path / "out.bmp"
    with open_image(path) as source:
        source.create(target, scale=1891)
        fails(lambda: source.create(target, scale=1893), target, "4 GiB", ".png")


@pytest.mark.skipif(not CLASSIC5.is_dir(), reason="needs the data set classic5")
def test_classic5_is_grey(samples):
    for path in sorted(CLASSIC5.glob("*.bmp")):
        with Image.open(path) as image:
            assert np.array_equal(samples(path), np.asarray(image)[..., None])


def poke(data, at, form, value):
    return data[:at] + struct.pack(form, value) + data[at + struct.calcsize(form) :]


@pytest.mark.parametrize(
    ("at", "form", "value", "words"),
    [
        (30, "<I", 1, ["run-length", "save it", "PNG"]),
        (30, "<I", 2, ["run-length", "save it"]),
        (30, "<I", 4, ["BMP with JPEG"]),
        (30, "<I", 5, ["BMP with PNG"]),
        (30, "<I", 11, ["compression 11"]),
        (30, "<I", 3, ["compression 3 at 24 bits"]),
        (28, "<H", 0, ["0 bits per pixel"]),
        (28, "<H", 48, ["48 bits per pixel"]),
        (14, "<I", 16, ["damaged", "header of 16 bytes", "fetch"]),
        (14, "<I", 0xFFFFFFFF, ["damaged", "fetch"]),
        (18, "<i", 0, ["damaged", "9 × 0 pixels"]),
        (18, "<i", -5, ["damaged", "9 × -5 pixels"]),
        (18, "<i", 2**31 - 1, ["truncated", "fetch"]),
        (22, "<i", 0, ["damaged", "0 × 7 pixels"]),
        (22, "<i", 2**31 - 1, ["truncated", "2147483647 × 7 pixels"]),
        (22, "<i", -(2**31), ["truncated", "2147483648 × 7 pixels"]),
        (10, "<I", 0, ["damaged", "byte 0"]),
        (10, "<I", 53, ["damaged", "byte 53"]),
        (10, "<I", 2**32 - 1, ["truncated"]),
        (28, "<H", 8, ["damaged", "in the header"]),  # where the palette would be
    ],
)
def test_headers_that_cannot_be_are_said(tmp_path, build, fails, at, form, value, words):
    path = tmp_path / "in.bmp"
    stored = np.zeros((9, 7), int)
    path.write_bytes(poke(build(stored, 24), at, form, value))
    fails(lambda: open_image(path), path, "BMP", *words)


@pytest.mark.parametrize(
    ("masks", "words"),
    [
        ((0x3FF00000, 0xFFC00, 0x3FF), ["10 bits per channel", "PNG"]),
        ((0xFF0000, 0, 0xFF), ["damaged", "ff0000 0 ff"]),
        ((0xF0F0F0, 0xF0F, 0xFF), ["damaged", "make no pixels"]),
    ],
)
def test_masks_that_cannot_be_are_said(tmp_path, build, fails, masks, words):
    path = tmp_path / "in.bmp"
    path.write_bytes(build(np.zeros((9, 7), int), 32, masks=masks))
    fails(lambda: open_image(path), path, "BMP", *words)


def test_no_bytes_and_other_files_named_bmp(tmp_path, noise, samples, fails):
    path = tmp_path / "in.bmp"
    path.touch()
    fails(lambda: open_image(path), path, "0 bytes", "fetch")
    path.write_text("Dear diary,\n" * 20)
    fails(lambda: open_image(path), path, "not a picture", "BMP")
    path.write_text("BMW is the maker of the car that I drive; it is a fine car.\n" * 9)
    fails(lambda: open_image(path), path, "damaged BMP")
    array = noise(4, 6, 3)
    Image.fromarray(array).save(path, "PNG")  # the content counts
    assert np.array_equal(samples(path), array)


@pytest.mark.parametrize("kind", [(1, 40), (8, 40), (24, 12), (24, 40), (32, 124)])
def test_a_file_cut_anywhere_is_truncated(tmp_path, build, fails, kind):
    bits, header = kind
    path = tmp_path / "in.bmp"
    masks = FIELDS["BGRA"][1] if header == 124 else ()
    palette = GREYS[: 2**bits] if bits <= 8 else ()
    data = build(np.zeros((3, 5), int), bits, header=header, palette=palette, masks=masks)
    for size in [*range(2, len(data), 7), len(data) - 1]:
        path.write_bytes(data[:size])
        fails(lambda: open_image(path), path, f"truncated BMP, the file ends at byte {size}")


def test_a_profile_cut_off_is_truncated(tmp_path, noise, fails):
    image = vips.from_array(noise(5, 6, 3), "srgb").copy()
    vips.set_blob(image, "icc-profile-data", vips.builtin_profile("srgb"))
    path = tmp_path / "in.bmp"
    bmp.save(image, path)
    path.write_bytes(path.read_bytes()[:-9])
    fails(lambda: open_image(path), path, "truncated BMP", "with its profile")


@given(seed=st.integers(0, 10_000), kind=st.sampled_from([(1, 40), (8, 40), (24, 12), (32, 124)]))
@settings(max_examples=80, deadline=None)
def test_damaged_files_open_or_raise_one_sentence(tmp_path_factory, build, copy, seed, kind):
    bits, header = kind
    folder = tmp_path_factory.mktemp("damaged")
    generator = random.Random(seed)
    masks = FIELDS["RGBA"][1] if header == 124 else ()
    palette = GREYS[: 2**bits] if bits <= 8 else ()
    stored = np.random.default_rng(seed).integers(0, 2**bits, (9, 7))
    data = bytearray(build(stored, bits, header=header, palette=palette, masks=masks))
    for _ in range(generator.randint(1, 4)):
        data[generator.randrange(2, 14 + header)] = generator.randrange(256)
    path = folder / "in.bmp"
    path.write_bytes(data)
    message = f"{path}: ;"
    try:
        copy(path, folder / "out.bmp")
        assert (folder / "out.bmp").stat().st_size
    except ImageError as error:
        message = str(error)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    assert ";" in message
    shutil.rmtree(folder)


def test_a_header_is_plain_data(tmp_path, build):
    path = tmp_path / "in.bmp"
    path.write_bytes(build(np.zeros((3, 5), int), 24, ppm=(2835, -1)))
    with path.open("rb") as file:
        bitmap = bmp.describe(path, file)
    assert dataclasses.astuple(bitmap) == (
        *(3, 5, 24, False, 54, b"", (0, 0, 0, 0)), (2835, 0), None
    )  # fmt: skip
    assert bitmap.stride == 16
