from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

from fullres.errors import ImageError
from fullres.io import image as image_module
from fullres.io import sink as sink_module
from fullres.io import vips
from fullres.io.image import SUFFIXES, open_image


@pytest.mark.parametrize("bits", [8, 16, 32])
@pytest.mark.parametrize("channels", [1, 3])
def test_values_are_those_of_an_independent_reader(tmp_path, noise, copy, bits, channels):
    array = noise(9, 14, channels, bits)
    path = tmp_path / "in.tif"
    tifffile.imwrite(path, array.squeeze(), photometric="rgb" if channels == 3 else "minisblack")
    with open_image(path) as source:
        assert (source.height, source.width, source.channels) == (9, 14, channels)
        assert (source.bits, source.has_alpha, source.path) == (bits, False, path)
        tensor = source.read(0, 0, 9, 14)
    expected = array.astype(np.float64) / {8: 255, 16: 65535, 32: 1}[bits]
    assert tensor.dtype == torch.float32
    assert tensor.is_contiguous()
    np.testing.assert_allclose(tensor.permute(1, 2, 0), expected, rtol=1e-7, atol=0)
    copy(path, tmp_path / "out.tif")
    assert np.array_equal(tifffile.imread(tmp_path / "out.tif"), array.squeeze())


@pytest.mark.parametrize("huge", [False, True])
@pytest.mark.parametrize("suffix", [".png", ".tif", ".jpg"])
def test_regions_and_tiles_in_any_order(
    tmp_path, monkeypatch, noise, save, pixels, names, huge, suffix
):
    if huge:  # through temporary files, as a picture beyond the limit would be
        monkeypatch.setattr(image_module, "IN_MEMORY", 0)
        monkeypatch.setattr(sink_module, "IN_MEMORY", 0)
    path = save(tmp_path / f"in{suffix}", noise(37, 53, 3))
    with open_image(path) as source:
        whole = source.read(0, 0, 37, 53)
        tiles = [(top, left) for top in range(0, 37, 8) for left in range(0, 53, 16)]
        random.Random(0).shuffle(tiles)
        with source.create(tmp_path / "out.png") as sink:
            for top, left in tiles:
                height, width = min(12, 37 - top), min(20, 53 - left)  # they overlap
                tile = source.read(top, left, height, width)
                assert torch.equal(tile, whole[:, top : top + height, left : left + width])
                sink.write(top, left, tile)
    assert np.array_equal(pixels(tmp_path / "out.png"), pixels(path))
    assert names(tmp_path) == sorted([f"in{suffix}", "out.png"])


def test_odd_pngs_and_tiffs_become_8_bit(tmp_path, noise, pixels, copy):
    photo = Image.fromarray(noise(6, 10, 3))
    for mode, suffix in [("1", ".png"), ("P", ".png"), ("1", ".tif"), ("P", ".tif")]:
        picture = photo.convert(mode)
        picture.save(tmp_path / f"in{suffix}")
        expected = np.asarray(picture.convert("L" if mode == "1" else "RGB")).reshape(6, 10, -1)
        assert np.array_equal(pixels(copy(tmp_path / f"in{suffix}", tmp_path / "o.png")), expected)


@pytest.mark.parametrize("bits", [10, 12])
def test_white_of_a_10_or_12_bit_avif_is_1(tmp_path, load, pixels, copy, bits):
    white = vips.from_array(np.full((16, 16, 3), 65535, np.uint16), "rgb16")
    path = tmp_path / "in.avif"
    white.heifsave(str(path), compression="av1", bitdepth=bits, Q=100)
    with open_image(path) as source:
        assert source.bits == 16
        assert source.read(0, 0, 16, 16).min() > 1 - 2 / 2**bits
    copy(path, tmp_path / "out.png")
    assert pixels(tmp_path / "out.png").min() > 65535 * (1 - 2 / 2**bits)
    assert load(copy(path, tmp_path / "out.avif")).get("bits-per-sample") == bits


def test_suffixes_are_all_spellings_and_part_files_are_not(tmp_path, noise, save, copy):
    array = noise(8, 8, 3)
    for suffix in SUFFIXES - {".heic", ".heif"}:
        with open_image(copy(save(tmp_path / "in.png", array), tmp_path / f"o{suffix}")) as source:
            assert source.width == 8
    with pytest.raises(ImageError), open_image(copy(tmp_path / "in.png", tmp_path / "x.part")):
        pass


@pytest.mark.parametrize("name", ["a [b]=c.jpg", "ünï – 图.jpg", os.fsdecode(b"\xff\xfe.jpg")])
def test_awkward_names(tmp_path, noise, save, copy, fails, name):
    path = tmp_path / name
    try:
        shutil.copy(save(tmp_path / "in.jpg", noise(8, 8, 3)), path)
    except (OSError, UnicodeError):
        pytest.skip("not a file name on this system")
    copy(path, tmp_path / f"out {name}")
    assert (tmp_path / f"out {name}").stat().st_size
    path.write_bytes(path.read_bytes()[:-20])
    fails(lambda: open_image(path), path, "truncated")


def test_a_file_changed_since_is_read_anew(tmp_path, save):
    for value in (10, 200):
        save(tmp_path / "in.png", np.full((4, 4, 1), value, np.uint8))
        with open_image(tmp_path / "in.png") as source:
            assert torch.all(source.read(0, 0, 4, 4) == value / 255)


def test_misuse_raises_value_error(tmp_path, noise, save):
    path = save(tmp_path / "in.png", noise(6, 8, 3))
    with open_image(path) as source:
        for rectangle in [(0, 0, 7, 8), (-1, 0, 2, 2), (0, 0, 0, 4), (5, 7, 2, 1)]:
            with pytest.raises(ValueError, match="not inside"):
                source.read(*rectangle)
        sink = source.create(tmp_path / "out.png")
        with pytest.raises(ValueError, match="not open"):
            sink.write(0, 0, torch.zeros(3, 6, 8))
        for options in ({"scale": 0}, {"quality": 0}, {"quality": 101}):
            with pytest.raises(ValueError, match="must be"):
                source.create(tmp_path / "out.png", **options)
        with pytest.raises(ValueError, match="does not fit"), sink:
            sink.write(0, 0, torch.zeros(1, 6, 8))
    with pytest.raises(ValueError, match="closed"):
        source.read(0, 0, 1, 1)
    assert not (tmp_path / "out.png").exists()


def test_nothing_is_printed_and_importing_fullres_does_not_load_libvips(tmp_path, noise, save):
    save(tmp_path / "in.jpg", noise(64, 64, 3))
    data = (tmp_path / "in.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(data[: len(data) // 2])
    save(tmp_path / "odd.png", noise(8, 8, 1), [("icc-profile-data", b"not a profile")])
    script = f"""
import sys, fullres
assert "pyvips" not in sys.modules
from fullres.io.image import open_image
from fullres.errors import ImageError
import os
os.chdir({str(tmp_path)!r})
for name in ("in.jpg", "cut.jpg", "odd.png"):
    try:
        with open_image(name) as source, source.create("out.png") as sink:
            sink.write(0, 0, source.read(0, 0, source.height, source.width))
    except ImageError as error:
        assert name == "cut.jpg", error
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")
