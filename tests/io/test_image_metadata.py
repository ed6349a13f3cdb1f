from __future__ import annotations

import io

import numpy as np
import pytest
import tifffile
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from PIL.TiffImagePlugin import IFDRational

from fullres.io import vips
from fullres.io.image import open_image

XMP = b"<x:xmpmeta xmlns:x='adobe:ns:meta/'></x:xmpmeta>"
IIM = b"\x1c\x02\x78\x00\x05hello"


def camera_exif():
    exif = Image.Exif()
    exif[0x10F], exif[0x110] = "Acme", "Box 1"
    exif[0x100], exif[0x101] = 33, 21
    photo = exif.get_ifd(0x8769)
    photo[0x9003], photo[0x829A] = "2024:01:02 03:04:05", (1, 125)
    photo[0xA002], photo[0xA003], photo[0x927C] = 33, 21, b"maker note"
    photo[0x9214], photo[0xA20E] = (10, 5, 3, 2), IFDRational(2469, 2)
    gps = exif.get_ifd(0x8825)
    gps[1], gps[2] = "N", (51.0, 30.0, 12.5)
    return exif


def read_exif(path):
    with Image.open(path) as picture:
        exif = picture.getexif()
        return dict(exif), dict(exif.get_ifd(0x8769)), dict(exif.get_ifd(0x8825))


@pytest.mark.parametrize("first", [".jpg", ".png", ".tif", ".webp"])
@pytest.mark.parametrize("second", [".jpg", ".png", ".tif", ".webp", ".avif"])
def test_exif_survives_two_formats_with_sizes_put_right(tmp_path, noise, copy, first, second):
    Image.fromarray(noise(21, 33, 3)).save(tmp_path / "in.jpg", exif=camera_exif(), dpi=(300, 300))
    path = copy(tmp_path / "in.jpg", tmp_path / f"first{first}")
    image, photo, gps = read_exif(copy(path, tmp_path / f"second{second}", scale=2))
    assert (image[0x10F], image[0x110]) == ("Acme", "Box 1")
    assert (photo[0x9003], photo[0x829A]) == ("2024:01:02 03:04:05", (1, 125))
    assert photo[0x927C].rstrip(b"\0") == b"maker note"
    assert (gps[1], gps[2]) == ("N", (51.0, 30.0, 12.5))
    assert (photo[0xA002], photo[0xA003]) == (66, 42)
    assert (image.get(0x100, 66), image.get(0x101, 42)) == (66, 42)
    assert round(float(image[282])) == 600  # as large in print
    assert float(photo[0xA20E]) == 2 * 1234.5  # the sensor's pixels, twice as dense
    assert photo[0x9214] == (20, 10, 6, 4)


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".tif"])
def test_resolution_survives(tmp_path, noise, copy, suffix):
    Image.fromarray(noise(5, 7, 3)).save(tmp_path / "in.png", dpi=(240, 240))
    with Image.open(copy(tmp_path / "in.png", tmp_path / f"out{suffix}")) as picture:
        assert [round(float(value)) for value in picture.info["dpi"]] == [240, 240]


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".tif", ".webp", ".avif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_viewer_sees_the_picture_the_same_way_up(tmp_path, save, load, copy, suffix, orientation):
    array = np.zeros((24, 40, 3), np.uint8)
    array[:12, :, 0], array[:, :20, 1] = 200, 200
    path = save(tmp_path / "in.tif", array, [("orientation", orientation)])
    written = load(copy(path, tmp_path / f"out{suffix}", scale=2))
    kept = vips.field(written, "orientation") or 1
    assert kept == (1 if suffix == ".avif" else orientation)
    before = load(path).autorot().resize(2, kernel="nearest")
    after = written.autorot()
    assert (after.width, after.height) == (before.width, before.height)
    assert (before - after).abs().avg() < 3


@pytest.mark.parametrize("first", [".jpg", ".tif"])
@pytest.mark.parametrize("second", [".jpg", ".tif"])
def test_iptc_and_xmp_survive(tmp_path, noise, save, load, copy, first, second):
    packed = b"Photoshop 3.0\0" + b"8BIM\x04\x04\0\0\0\0\0\x0a" + IIM
    metadata = [("xmp-data", XMP), ("iptc-data", packed)]
    path = save(tmp_path / "in.jpg", noise(4, 4, 3), metadata)
    path = copy(copy(path, tmp_path / f"first{first}"), tmp_path / f"second{second}")
    assert load(path).get("xmp-data") == XMP
    assert IIM in path.read_bytes()
    with Image.open(path) as picture:
        if second == ".tif":
            assert bytes(picture.tag_v2[33723]).startswith(IIM)
        else:
            assert picture.info["photoshop"][0x0404].startswith(IIM)


@pytest.mark.parametrize("suffix", [".png", ".webp", ".avif"])
def test_xmp_survives_elsewhere_too(tmp_path, noise, save, load, copy, suffix):
    path = save(tmp_path / "in.jpg", noise(4, 4, 3), [("xmp-data", XMP)])
    assert load(copy(path, tmp_path / f"out{suffix}")).get("xmp-data") == XMP


@pytest.mark.parametrize("keyword", [b"Author", "Künstler".encode("latin-1")])
def test_png_texts_survive_and_none_is_fatal(tmp_path, noise, copy, keyword):
    info = PngInfo()
    info.add(b"tEXt", keyword + b"\0Anna")
    Image.fromarray(noise(4, 4, 3)).save(tmp_path / "in.png", pnginfo=info)
    with Image.open(copy(tmp_path / "in.png", tmp_path / "out.png")) as picture:
        assert picture.info.get("Author") == ("Anna" if keyword == b"Author" else None)


def test_no_stale_thumbnail_remains(tmp_path, noise, save, load, copy):
    thumbnail = io.BytesIO()
    Image.fromarray(noise(8, 8, 3)).save(thumbnail, "JPEG")
    metadata = [("jpeg-thumbnail-data", thumbnail.getvalue()), ("exif-ifd0-Make", "Acme")]
    path = save(tmp_path / "in.jpg", noise(40, 40, 3), metadata)
    assert load(path).get_typeof("jpeg-thumbnail-data")
    for suffix in (".jpg", ".tif", ".png"):
        written = copy(path, tmp_path / f"out{suffix}")
        assert not load(written).get_typeof("jpeg-thumbnail-data")
        assert thumbnail.getvalue()[-64:] not in written.read_bytes()
        assert read_exif(written)[0][0x10F] == "Acme"


def test_bigtiff_in_and_out(tmp_path, monkeypatch, noise, pixels, copy):
    from fullres.io import encode

    Image.fromarray(noise(21, 33, 3)).save(tmp_path / "in.jpg", exif=camera_exif())
    monkeypatch.setattr(encode, "_BIGTIFF_FROM", 0)
    path = copy(copy(tmp_path / "in.jpg", tmp_path / "big.tif"), tmp_path / "again.tif")
    with tifffile.TiffFile(path) as file:
        assert file.is_bigtiff
        assert np.array_equal(file.asarray(), pixels(tmp_path / "in.jpg"))
        tags = file.pages[0].tags
        assert tags["ExifTag"].value["DateTimeOriginal"] == "2024:01:02 03:04:05"
        assert tags["GPSTag"].value["GPSLatitudeRef"] == "N"


def test_exif_of_a_big_endian_tiff(tmp_path, noise, copy):
    exif = camera_exif()
    exif.endian = ">"
    Image.fromarray(noise(21, 33, 3)).save(tmp_path / "in.jpg", exif=exif)
    with open_image(tmp_path / "in.jpg") as source:
        array = source.read(0, 0, 21, 33)
    extra = [(0x10F, 2, 5, b"Acme\0", True), (33723, 4, 3, (0x1C027800, 0x0568656C, 0x6C6F0000))]
    tifffile.imwrite(
        tmp_path / "in.tif", noise(21, 33, 3), byteorder=">", photometric="rgb", extratags=extra
    )
    assert array.shape == (3, 21, 33)
    assert read_exif(copy(tmp_path / "in.tif", tmp_path / "out.png"))[0][0x10F] == "Acme"
    assert IIM in copy(tmp_path / "in.tif", tmp_path / "out.jpg").read_bytes()


def test_a_note_on_the_array_shape_is_not_carried_to_another_shape(tmp_path, noise, load, copy):
    tifffile.imwrite(tmp_path / "in.tif", noise(6, 8, 3), photometric="rgb")
    assert load(tmp_path / "in.tif").get("image-description").startswith('{"shape"')
    assert tifffile.imread(copy(tmp_path / "in.tif", tmp_path / "o.tif", scale=2)).shape[0] == 12
