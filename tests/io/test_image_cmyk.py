from __future__ import annotations

import io
import shutil

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms

from fullres.io import vips
from fullres.io.image import open_image

PURE = [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1], [0, 1, 1, 0], [0, 0, 0, 0]]
RICH_BLACK = [[1, 1, 1, 1], [0.6, 0.4, 0.4, 1], [0, 0, 0, 0.8], [0.9, 0.9, 0.9, 0]]


def write_inks(path, inks, profile=None):
    image = vips.from_array(inks, "cmyk").copy()
    if profile:
        vips.set_blob(image, "icc-profile-data", profile)
    image.write_to_file(str(path), **({"Q": 100} if path.suffix == ".jpg" else {}))
    return path


def random_inks(height, width, depth, seed=0, bands=4):
    """Inks all over the range, with pure inks and rich blacks among them."""
    values = np.random.default_rng(seed).random((height, width, bands))
    values[0, : len(PURE), :4] = PURE
    values[-1, : len(RICH_BLACK), :4] = RICH_BLACK
    return np.rint(values * (2**depth - 1)).astype(f"u{depth // 8}")


def cmyk_picture(path, profile=None, depth=8):
    inks = np.zeros((32, 48, 4), f"u{depth // 8}")
    ramp = np.linspace(0, 0.6 * (2**depth - 1), 48).astype(inks.dtype)
    for channel, values in enumerate((ramp, ramp[::-1], ramp // 2, ramp // 4)):
        inks[..., channel] = values
    return write_inks(path, inks, profile)


@pytest.mark.parametrize("suffix", [".jpg", ".tif"])
@pytest.mark.parametrize("embedded", [False, True])
def test_cmyk_comes_back_as_cmyk_of_the_same_look(tmp_path, load, copy, suffix, embedded):
    profile = vips.builtin_profile("cmyk") if embedded else None
    path = cmyk_picture(tmp_path / f"in{suffix}", profile)
    written = load(copy(path, tmp_path / f"out{suffix}", quality=100))
    assert written.interpretation == "cmyk"
    assert written.format == "uchar"
    assert vips.field(written, "icc-profile-data") == profile
    with open_image(path) as before, open_image(tmp_path / f"out{suffix}") as after:
        assert before.channels == after.channels == 3
        difference = before.read(0, 0, 32, 48) - after.read(0, 0, 32, 48)
        assert before.read(0, 0, 32, 48).std() > 0.1
    assert difference.abs().max() < (0.03 if suffix == ".jpg" else 1e-9)


def test_inks_mean_what_another_reader_says(tmp_path, copy):
    """A JPEG with inverted inks, as Adobe and Pillow write it: cyan is not red."""
    inks = np.zeros((16, 16, 4), np.uint8)
    inks[..., 0] = 255
    Image.fromarray(inks, mode="CMYK").save(tmp_path / "in.jpg", quality=100)
    with open_image(tmp_path / "in.jpg") as source:
        red, green, blue = source.read(0, 0, 16, 16).mean(dim=(1, 2))
    assert red < 0.1 < 0.5 < green < blue
    copy(tmp_path / "in.jpg", tmp_path / "out.jpg")
    with Image.open(tmp_path / "out.jpg") as picture:
        assert picture.mode == "CMYK"
        cyan, magenta, _, _ = np.asarray(picture).mean(axis=(0, 1))
    assert cyan > 250 > 5 > magenta


def test_cmyk_to_a_format_without_it_is_srgb_with_its_profile(tmp_path, load, copy):
    path = cmyk_picture(tmp_path / "in.tif", vips.builtin_profile("cmyk"), depth=16)
    written = load(copy(path, tmp_path / "out.png"))
    assert (written.interpretation, written.format) == ("rgb16", "ushort")
    assert written.get("icc-profile-data") == vips.builtin_profile("srgb")
    assert load(copy(path, tmp_path / "out.tif")).format == "ushort"


@given(
    kind=st.sampled_from([(".jpg", 8, 4), (".tif", 8, 4), (".tif", 16, 4), (".tif", 8, 5)]),
    size=st.tuples(st.integers(2, 40), st.integers(6, 40)),
    embedded=st.booleans(),
    seed=st.integers(0, 1000),
)
@settings(max_examples=12, deadline=None)
def test_inks_that_the_network_leaves_alone_are_bit_exact(
    tmp_path_factory, pixels, copy, kind, size, embedded, seed
):
    suffix, depth, bands = kind
    folder = tmp_path_factory.mktemp("inks")
    inks = random_inks(*size, depth, seed, bands)
    profile = vips.builtin_profile("cmyk") if embedded else None
    path = write_inks(folder / f"in{suffix}", inks, profile)
    before = pixels(path)
    assert suffix == ".jpg" or np.array_equal(before, inks)
    after = pixels(copy(path, folder / "out.tif"))
    assert after.dtype == before.dtype
    assert np.array_equal(after, before)
    shutil.rmtree(folder)


@pytest.mark.parametrize("suffix", [".jpg", ".tif"])
@pytest.mark.parametrize(("kind", "length"), [("cmyk", 3000), ("srgb", None)])
def test_a_profile_that_is_damaged_or_not_for_cmyk_is_passed_over(
    tmp_path, pixels, copy, suffix, kind, length
):
    profile = vips.builtin_profile(kind)[:length]
    path = write_inks(tmp_path / f"in{suffix}", random_inks(8, 12, 8), profile)
    assert np.array_equal(pixels(copy(path, tmp_path / "out.tif")), pixels(path))


def test_float_inks_mean_the_same_as_integers(tmp_path):
    inks = random_inks(8, 12, 16)
    with open_image(write_inks(tmp_path / "16.tif", inks)) as source:
        expected = source.read(0, 0, 8, 12)
    with open_image(write_inks(tmp_path / "32.tif", np.float32(inks / 65535))) as source:
        assert torch.equal(source.read(0, 0, 8, 12), expected)


@pytest.mark.parametrize(("before", "after"), [(8, 16), (16, 8), (32, 8), (32, 16)])
def test_inks_at_another_bit_depth_are_rounded_to_nearest(tmp_path, pixels, copy, before, after):
    inks = random_inks(8, 12, 16)
    inks = {8: inks >> 8, 16: inks, 32: inks / 65535}[before].astype(
        f"{'uf'[before > 16]}{before // 8}"
    )
    path = write_inks(tmp_path / "in.tif", inks)
    written = pixels(copy(path, tmp_path / "out.tif", bits=after))
    peak = {8: 255, 16: 65535, 32: 1}
    exact = inks / np.float64(peak[before]) * peak[after]
    assert written.dtype == f"u{after // 8}"
    assert np.abs(written - exact).max() <= 0.5 + 1e-2


@pytest.mark.parametrize("depth", [8, 16])
def test_inks_follow_what_the_network_changed_and_only_there(tmp_path, pixels, depth):
    path = cmyk_picture(tmp_path / "in.tif", depth=depth)
    with open_image(path) as source, source.create(tmp_path / "out.tif") as sink:
        restored = source.read(0, 0, 32, 48)
        restored[:, :, 20:] *= 1.08
        sink.write(0, 0, restored)
    before, after = pixels(path), pixels(tmp_path / "out.tif")
    assert np.array_equal(after[:, :20], before[:, :20])
    assert (after[:, 20:] < before[:, 20:]).any(axis=2).all()
    with open_image(tmp_path / "out.tif") as written:
        assert (written.read(0, 0, 32, 48) - restored).abs().max() < 0.03


@pytest.mark.parametrize("depth", [8, 16])
def test_the_change_in_ink_is_that_of_a_blank_page_and_clamped(tmp_path, pixels, depth):
    """On a blank page the change is the ink of the restored colour itself."""

    def written(path, tensor):
        with open_image(path) as source, source.create(tmp_path / "out.tif") as sink:
            sink.write(0, 0, tensor)
        return pixels(tmp_path / "out.tif").astype(np.float64)

    page = write_inks(tmp_path / "page.tif", np.zeros((24, 30, 4), np.uint16))
    inks = random_inks(24, 30, depth)
    path = write_inks(tmp_path / "in.tif", inks)
    with open_image(path) as source:
        before = source.read(0, 0, 24, 30)
    restored = torch.rand(3, 24, 30, generator=torch.Generator().manual_seed(0))
    peak = 2**depth - 1
    change = (written(page, restored) - written(page, before)) * peak / 65535
    assert (inks + change).min() < -0.1 * peak < 1.1 * peak < (inks + change).max()
    expected = np.clip(inks + change, 0, peak)
    assert np.abs(written(path, restored) - expected).max() <= (0.51 if depth == 8 else 4)


def test_the_inks_of_a_colour_are_those_that_pillow_finds(tmp_path, noise, pixels):
    colours, profile = noise(24, 30, 3), vips.builtin_profile("cmyk")
    path = write_inks(tmp_path / "page.tif", np.zeros((24, 30, 4), np.uint8), profile)
    with open_image(path) as source, source.create(tmp_path / "out.tif") as sink:
        sink.write(0, 0, torch.from_numpy(colours).permute(2, 0, 1) / 255)
    expected = ImageCms.profileToProfile(
        Image.fromarray(colours),
        ImageCms.createProfile("sRGB"),
        io.BytesIO(profile),
        renderingIntent=ImageCms.Intent.RELATIVE_COLORIMETRIC,
        outputMode="CMYK",
        flags=ImageCms.Flags.BLACKPOINTCOMPENSATION,
    )
    difference = np.abs(pixels(tmp_path / "out.tif") - np.asarray(expected, dtype=np.float64))
    assert difference.max() <= 5  # Pillow interpolates in a table from sRGB straight to inks
    assert difference.mean() < 0.5


@pytest.mark.parametrize("depth", [8, 16])
def test_inks_grow_with_the_picture_as_alpha_does(tmp_path, load, pixels, depth):
    path = write_inks(tmp_path / "in.tif", random_inks(9, 14, depth))
    load(path).resize(3, kernel="cubic").write_to_file(str(tmp_path / "large.tif"))
    with open_image(tmp_path / "large.tif") as large:
        tensor = large.read(0, 0, 27, 42)
    with open_image(path) as source, source.create(tmp_path / "out.tif", scale=3) as sink:
        sink.write(0, 0, tensor)
    assert np.array_equal(pixels(tmp_path / "out.tif"), pixels(tmp_path / "large.tif"))
