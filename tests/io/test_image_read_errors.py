from __future__ import annotations

import functools
import os
import random
import shutil

import numpy as np
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fullres.errors import ImageError
from fullres.io import image as image_module
from fullres.io.image import open_image

XMP = b"<x:xmpmeta xmlns:x='adobe:ns:meta/'></x:xmpmeta>"


def test_missing_folder_empty_and_text(tmp_path, fails):
    fails(lambda: open_image(tmp_path / "no.jpg"), tmp_path / "no.jpg", "no such file")
    fails(lambda: open_image(tmp_path), tmp_path, "folder")
    (tmp_path / "empty.png").touch()
    fails(lambda: open_image(tmp_path / "empty.png"), tmp_path / "empty.png", "0 bytes")
    (tmp_path / "text.jpg").write_text("Dear diary,\n" * 20)
    fails(lambda: open_image(tmp_path / "text.jpg"), tmp_path / "text.jpg", "not a picture")
    (tmp_path / "notes.txt").write_text("Dear diary")
    fails(lambda: open_image(tmp_path / "notes.txt"), tmp_path / "notes.txt", ".txt", ".png")
    fails(
        lambda: open_image(tmp_path / "text.jpg" / "in.jpg"),
        tmp_path / "text.jpg" / "in.jpg",
        "Not a directory",
    )


@pytest.mark.parametrize("name", ["x.gif", "x.jpg"])
def test_a_gif_is_named_as_such_or_by_suffix(tmp_path, noise, fails, name):
    Image.fromarray(noise(4, 4, 3)).save(tmp_path / name, "GIF")
    fails(lambda: open_image(tmp_path / name), tmp_path / name, "gif" if "gif" in name else "GIF")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root reads all")
def test_unreadable(tmp_path, noise, save, fails):
    path = save(tmp_path / "in.png", noise(4, 4, 3))
    path.chmod(0)
    fails(lambda: open_image(path), path, "permissions")


@pytest.fixture(scope="module")
def encoded(tmp_path_factory, noise, save):
    """The bytes of a picture of 200 × 300 pixels in a file of the given name."""
    folder = tmp_path_factory.mktemp("encoded")
    smooth = np.add.outer(np.arange(200), np.arange(300))[..., None] % 256 * np.ones(3)
    array = (smooth * 0.9 + noise(200, 300, 3) * 0.1).astype(np.uint8)

    @functools.cache
    def encode(name):
        options = {"interlace": True} if name[0] in "pi" else {}
        return save(folder / name, array, **options).read_bytes()

    return encode


@pytest.mark.parametrize("huge", [False, True])
@pytest.mark.parametrize("share", [0.002, 0.1, 0.6, 0.99])
@pytest.mark.parametrize(
    "name", ["x.jpg", "progressive.jpg", "x.png", "interlaced.png", "x.tif", "x.webp", "x.avif"]
)
def test_truncated_files_fail_when_opened(tmp_path, monkeypatch, encoded, fails, name, share, huge):
    if huge:
        monkeypatch.setattr(image_module, "IN_MEMORY", 0)
    path = tmp_path / name
    data = encoded(name)
    size = max(20, int(len(data) * share))
    path.write_bytes(data[:size])
    message = fails(lambda: open_image(path), path, "truncated", "fetch")
    if path.suffix == ".jpg":
        assert f"truncated JPEG, the file ends at byte {size}" in message


def test_a_tiff_whose_pixels_are_cut_off(tmp_path, noise, fails):
    """Its directory comes first, so only decoding shows that data is missing."""
    path = tmp_path / "in.tif"
    Image.fromarray(noise(200, 300, 3)).save(path)
    data = path.read_bytes()
    directory = int.from_bytes(data[4:8], "little")
    assert directory < 1000
    path.write_bytes(data[: len(data) // 2])
    fails(lambda: open_image(path), path, "TIFF")


@given(seed=st.integers(0, 10_000), suffix=st.sampled_from([".jpg", ".png", ".tif", ".webp"]))
@settings(max_examples=60, deadline=None)
def test_damaged_files_open_or_raise_one_sentence(
    tmp_path_factory, noise, save, copy, seed, suffix
):
    folder = tmp_path_factory.mktemp("damaged")
    generator = random.Random(seed)
    metadata = [("exif-ifd0-Make", "Acme"), ("xmp-data", XMP)]
    path = copy(save(folder / "in.jpg", noise(20, 20, 3), metadata), folder / f"x{suffix}")
    data = bytearray(path.read_bytes())
    for _ in range(generator.randint(1, 12)):
        data[generator.randrange(len(data))] = generator.randrange(256)
    path.write_bytes(data)
    message = f"{path}: "
    try:
        with open_image(path) as source:
            assert source.read(0, 0, 1, 1).shape[1:] == (1, 1)
            copy(path, folder / "out.tif")
    except ImageError as error:
        message = str(error)
    assert message.startswith(f"{folder}")
    assert "\n" not in message
    shutil.rmtree(folder)


def test_several_pages_or_frames_are_refused_with_their_number(tmp_path, noise, fails):
    first, second = Image.fromarray(noise(8, 8, 3)), Image.fromarray(noise(8, 8, 3, seed=1))
    for suffix in (".tif", ".webp", ".png"):
        path = tmp_path / f"in{suffix}"
        first.save(path, save_all=True, append_images=[second, first])
        fails(lambda path=path: open_image(path), path, "3 pages or frames", "single pictures")


@pytest.mark.parametrize("dtype", ["int16", "int32", "uint32", "float64", "complex64"])
def test_unsupported_samples(tmp_path, noise, fails, dtype):
    path = tmp_path / "in.tif"
    tifffile.imwrite(path, noise(6, 6, 3).astype(dtype), photometric="rgb")
    fails(lambda: open_image(path), path)


def test_too_many_channels(tmp_path, noise, fails):
    tifffile.imwrite(tmp_path / "in.tif", noise(6, 6, 7), photometric="minisblack", planarconfig=1)
    fails(lambda: open_image(tmp_path / "in.tif"), tmp_path / "in.tif", "7 channels")


def test_nan_in_a_float_picture_is_reported_as_the_pictures(tmp_path, noise, save, fails):
    array = noise(6, 6, 3, 32)
    array[3, 3, 1] = np.nan
    path = save(tmp_path / "in.tif", array)
    with open_image(path) as source:
        assert source.read(0, 0, 3, 6).isfinite().all()
        fails(lambda: source.read(0, 0, 6, 6), path, "NaN")
