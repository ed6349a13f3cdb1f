from __future__ import annotations

import shutil

import numpy as np
import pytest
import tifffile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fullres.io import sink as sink_module
from fullres.io.image import open_image


@given(
    suffix=st.sampled_from([".png", ".tif", ".webp"]),
    size=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    channels=st.integers(1, 4),
    bits=st.sampled_from([8, 16, 32]),
    seed=st.integers(0, 1000),
)
@settings(max_examples=60, deadline=None)
def test_identity_is_bit_exact(
    tmp_path_factory, noise, save, pixels, copy, suffix, size, channels, bits, seed
):
    bits = min(bits, {".png": 16, ".webp": 8}.get(suffix, bits))
    folder = tmp_path_factory.mktemp("identity")
    array = noise(*size, channels, bits, seed)
    path = save(folder / f"in{suffix}", array, **({"lossless": True} if suffix == ".webp" else {}))
    before = pixels(path)
    assert before.shape[2] == (channels if suffix != ".webp" else 3 + (channels % 2 == 0))
    assert np.array_equal(before[..., 0], array[..., 0]) or channels % 2 == 0
    copy(path, folder / f"out{suffix}")
    after = pixels(folder / f"out{suffix}")
    assert after.dtype == before.dtype
    assert np.array_equal(after, before)
    shutil.rmtree(folder)


@pytest.mark.parametrize("bits", [8, 16, 32])
def test_output_is_clamped_and_rounded_to_nearest_unless_float(tmp_path, noise, save, pixels, bits):
    path = save(tmp_path / "in.tif", noise(1, 6, 1))
    peak = 2**bits - 1
    values = torch.tensor([[[-0.5, 0.0, 1.4 / peak, 1.6 / peak, 1.0, 1.7]]])
    with open_image(path) as source, source.create(tmp_path / "out.tif", bits=bits) as sink:
        sink.write(0, 0, values.double())
    written = pixels(tmp_path / "out.tif").ravel().tolist()
    assert written == (values.ravel().tolist() if bits == 32 else [0, 0, 1, 2, peak, peak])


@pytest.mark.parametrize(("before", "after"), [(8, 16), (8, 32), (16, 8), (16, 32), (32, 8)])
def test_changed_bit_depth_reaches_colour_and_alpha_alike(
    tmp_path, noise, save, pixels, copy, before, after
):
    grey = noise(5, 7, 1, before)
    path = save(tmp_path / "in.tif", np.concatenate([grey, grey], axis=2))
    written = pixels(copy(path, tmp_path / "out.tif", bits=after)).astype(np.float64)
    peak = {8: 255, 16: 65535, 32: 1}
    exact = grey[..., 0] / np.float64(peak[before]) * peak[after]
    tolerance = 1e-6 if after == 32 else 0.5 + 1e-3
    assert np.abs(written - exact[..., None]).max() <= tolerance


@pytest.mark.parametrize("suffix", [".png", ".webp", ".tif"])
@pytest.mark.parametrize("channels", [2, 4])
def test_alpha_passes_untouched_also_where_colour_is_lossy(
    tmp_path, noise, save, pixels, suffix, channels
):
    array = noise(11, 6, channels)
    array[:4, :, -1] = 0  # colour under full transparency stays too where nothing is lossy
    path = save(tmp_path / "in.png", array)
    with open_image(path) as source, source.create(tmp_path / f"out{suffix}") as sink:
        assert source.has_alpha
        assert source.channels == channels - 1
        sink.write(0, 0, 1 - source.read(0, 0, 11, 6))
    written = pixels(tmp_path / f"out{suffix}")
    assert np.array_equal(written[..., -1], array[..., -1])
    assert np.array_equal(written[..., 0], 255 - array[..., 0])


def test_alpha_grows_with_the_picture(tmp_path, noise, save, pixels, copy):
    array = noise(10, 8, 4)
    array[..., 3] = np.where(np.arange(8) < 4, 0, 255)
    path = save(tmp_path / "in.png", array)
    written = pixels(copy(path, tmp_path / "out.png", scale=3))
    assert written.shape == (30, 24, 4)
    assert not written[:, :6, 3].any()
    assert (written[:, 18:, 3] == 255).all()
    assert np.abs(np.diff(written[15, :, 3].astype(int))).max() < 200, "the edge is not a step"


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (9, 1), (3, 5)])
@pytest.mark.parametrize("suffix", [".jpg", ".png", ".tif", ".webp", ".avif"])
def test_tiny_pictures(tmp_path, save, pixels, copy, size, suffix):
    path = save(tmp_path / "in.png", np.full((*size, 3), 90, np.uint8))
    written = pixels(copy(path, tmp_path / f"out{suffix}", scale=2))
    assert written.shape == (2 * size[0], 2 * size[1], 3)
    assert np.abs(written.astype(int) - 90).max() <= 3


@pytest.mark.parametrize(
    ("compression", "tag"), [("none", 1), ("lzw", 5), ("packbits", 32773), ("jpeg", 8)]
)
@pytest.mark.parametrize("tile", [False, True])
def test_tiff_keeps_a_lossless_compression_and_tiles(
    tmp_path, noise, save, pixels, copy, compression, tag, tile
):
    path = save(tmp_path / "in.tif", noise(300, 280, 3), compression=compression, tile=tile)
    with tifffile.TiffFile(copy(path, tmp_path / "out.tif")) as file:
        page = file.pages[0]
        assert page.compression == tag
        assert page.is_tiled == tile
    assert np.array_equal(pixels(tmp_path / "out.tif"), pixels(path))


def test_jpeg_is_444_and_quality_counts(tmp_path, noise, save, load, copy):
    path = save(tmp_path / "in.png", noise(64, 64, 3))
    high = copy(path, tmp_path / "high.jpg")
    low = copy(path, tmp_path / "low.jpg", quality=30)
    assert load(high).get("jpeg-chroma-subsample") == "4:4:4"
    assert low.stat().st_size < high.stat().st_size / 2


def test_webp_is_lossless_where_the_source_is(tmp_path, noise, save, pixels, copy):
    array = noise(32, 32, 3)
    exact = copy(save(tmp_path / "a.png", array), tmp_path / "exact.webp")
    lossy = copy(save(tmp_path / "b.webp", array), tmp_path / "lossy.webp")
    assert np.array_equal(pixels(exact), array)
    assert b"VP8L" in exact.read_bytes()[:40]
    assert b"VP8L" not in lossy.read_bytes()


@given(data=st.data(), height=st.integers(1, 12), width=st.integers(1, 12))
@settings(max_examples=80, deadline=None)
def test_unwritten_pixels_are_counted(data, height, width):
    mask = np.zeros((height, width), bool)
    rectangles = set()
    for _ in range(data.draw(st.integers(0, 6))):
        top = data.draw(st.integers(0, height - 1))
        left = data.draw(st.integers(0, width - 1))
        bottom = data.draw(st.integers(top + 1, height))
        right = data.draw(st.integers(left + 1, width))
        rectangles.add((top, left, bottom, right))
        mask[top:bottom, left:right] = True
    assert sink_module._missing(rectangles, height, width) == (~mask).sum()


def test_parents_are_made_links_kept_and_the_input_may_be_the_output(
    tmp_path, noise, save, pixels, copy
):
    path = save(tmp_path / "in.png", noise(6, 8, 3))
    array = pixels(path)
    copy(path, tmp_path / "a" / "b" / "out.png")
    (tmp_path / "link.png").symlink_to(tmp_path / "a" / "b" / "out.png")
    copy(path, tmp_path / "link.png", scale=2)
    assert (tmp_path / "link.png").is_symlink()
    assert pixels(tmp_path / "a" / "b" / "out.png").shape == (12, 16, 3)
    copy(path, path)
    assert np.array_equal(pixels(path), array)
