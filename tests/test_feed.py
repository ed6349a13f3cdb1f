"""What networks are fed: two views, mosaics, a number beside the picture; enlarged results."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import pyvips
import torch
from torch import nn

import fullres as fr
from fullres.feed import Given
from fullres.io.image import open_image


class Computed(nn.Module):
    """A network that is a function."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def network(function, in_channels=3, out_channels=3, **facts):
    spec = fr.Spec("example", {}, in_channels, out_channels, train_size=32, **facts)
    return fr.Network(Computed(function).eval(), spec)


def save(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    names = {np.uint8: ("b-w", "srgb"), np.uint16: ("grey16", "rgb16")}[array.dtype.type]
    image = pyvips.Image.new_from_array(array)
    image.copy(interpretation=names[image.bands > 2]).write_to_file(str(path))
    return path


def random(*shape, dtype=np.uint8, seed=0):
    peak = np.iinfo(dtype).max
    return np.random.default_rng(seed).integers(0, peak, shape, dtype, endpoint=True)


def stored(path):
    return pyvips.Image.new_from_file(str(path)).numpy()


@pytest.mark.parametrize("pattern", ["RGGB", "BGGR", "GRBG", "GBRG"])
@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_every_sample_of_a_mosaic_reaches_the_channel_of_its_colour(tmp_path, pattern, suffix):
    samples = random(71, 93, dtype=np.uint16)
    seen = []

    def function(x):
        seen.append(x)
        return x

    path = save(tmp_path / f"raw{suffix}", samples)
    fr.restore(path, tmp_path / "out.png", network(function), bayer=pattern, tile=16, local=False)
    want = np.zeros((71, 93, 3), np.uint16)
    for number, letter in enumerate(pattern):
        rows, columns = slice(number // 2, None, 2), slice(number % 2, None, 2)
        want[rows, columns, "RGB".index(letter)] = samples[rows, columns]
    assert np.array_equal(stored(tmp_path / "out.png"), want)
    assert len(seen) > 1
    for x in seen:  # whatever the pattern, the network sees RGGB
        assert not x[:, 0, 1::2].any()
        assert not x[:, 0, :, 1::2].any()
        assert not x[:, 2, ::2].any()
        assert not x[:, 2, :, ::2].any()
        assert (x.amax(1) > 0).float().mean() > 0.99


def test_a_mosaic_is_enlarged_from_its_own_first_sample(tmp_path):
    path = save(tmp_path / "raw.png", random(20, 30))
    twice = network(lambda x: nn.functional.interpolate(x, scale_factor=2), scale=2)
    fr.restore(path, tmp_path / "out.png", twice, bayer="BGGR", local=False)
    fr.restore(path, tmp_path / "once.png", network(lambda x: x), bayer="BGGR", local=False)
    once = stored(tmp_path / "once.png").repeat(2, 0).repeat(2, 1)
    assert np.array_equal(stored(tmp_path / "out.png"), once)


def test_what_is_no_mosaic_is_refused(tmp_path):
    path = save(tmp_path / "photo.png", random(20, 30, 3))
    with pytest.raises(fr.ImageError, match=r"photo\.png: is a colour picture"):
        fr.restore(path, tmp_path / "out.png", network(lambda x: x), bayer="RGGB", local=False)
    with pytest.raises(fr.FullresError, match="known are RGGB, BGGR, GRBG, GBRG"):
        fr.restore(path, tmp_path / "out.png", network(lambda x: x), bayer="RGBG")
    assert not (tmp_path / "out.png").exists()


@pytest.fixture(scope="module")
def dual_pixel():
    torch.manual_seed(0)
    options = {"dim": 4, "num_blocks": [1] * 4, "heads": [1] * 4, "num_refinement_blocks": 1}
    opened = fr.create_network(
        "restormer", inp_channels=6, out_channels=3, dual_pixel_task=True, **options
    )
    return fr.Network(opened.module, replace(opened.spec, train_size=32))


def test_two_views_of_16_bits_reach_a_dual_pixel_network(tmp_path, dual_pixel):
    left, right = (random(40, 56, 3, dtype=np.uint16, seed=seed) for seed in (1, 2))
    save(tmp_path / "left" / "day" / "a.png", left)
    save(tmp_path / "right" / "day" / "a.png", right)
    report = fr.restore(
        tmp_path / "left", tmp_path / "out", dual_pixel, right=tmp_path / "right", local=False
    )
    assert len(report.restored) == 1
    x = torch.from_numpy(np.concatenate([left, right], 2).astype(np.float32) / 65535)
    with torch.inference_mode():
        want = dual_pixel.module(x.permute(2, 0, 1)[None])[0].permute(1, 2, 0).clamp(0, 1)
    got = stored(tmp_path / "out" / "day" / "a.png")
    assert got.dtype == np.uint16
    assert np.abs(got / 65535 - want.numpy()).max() < 1e-4
    again = fr.restore(tmp_path / "left", tmp_path / "out", dual_pixel, right=tmp_path / "right")
    assert again.already_done == 1


def test_views_that_do_not_belong_together_are_refused(tmp_path, dual_pixel):
    left = save(tmp_path / "left.png", random(40, 56, 3))
    other = save(tmp_path / "right.png", random(40, 58, 3))
    with pytest.raises(fr.ImageError, match=r"right\.png: is 40 × 58 .*left\.png, is 40 × 56"):
        fr.restore(left, tmp_path / "out.png", dual_pixel, right=other)
    with pytest.raises(fr.ImageError, match=r"none\.png: no such file, the right view of"):
        fr.restore(left, tmp_path / "out.png", dual_pixel, right=tmp_path / "none.png")
    with pytest.raises(fr.FullresError, match="give the right one with --right"):
        fr.restore(left, tmp_path / "out.png", dual_pixel)
    with pytest.raises(fr.FullresError, match="leave out --right"):
        fr.restore(left, tmp_path / "out.png", network(lambda x: x), right=left)
    with pytest.raises(fr.ImageError, match=r"would replace this picture"):
        fr.restore(left, other, dual_pixel, right=other, overwrite=True)


@pytest.mark.parametrize("bands", [1, 3])
def test_the_noise_level_is_a_map_beside_the_picture(tmp_path, bands):
    path = save(tmp_path / "photo.png", random(20, 30, bands))
    takes = network(lambda x: x[:, :3] * 0 + x[:, 3:], 4, condition="noise level")
    fr.restore(path, tmp_path / "out.png", takes, noise_level=51, local=False)
    assert (stored(tmp_path / "out.png") == 51).all()
    with pytest.raises(fr.FullresError, match="needs the noise level; give it with --noise-level"):
        fr.restore(path, tmp_path / "no.png", takes, local=False)
    with pytest.raises(fr.FullresError, match="leave out --noise-level"):
        fr.restore(path, tmp_path / "no.png", network(lambda x: x), noise_level=5, local=False)
    with pytest.raises(fr.FullresError, match="leave out --jpeg-quality"):
        fr.restore(path, tmp_path / "no.png", takes, noise_level=5, jpeg_quality=5, local=False)


@pytest.mark.parametrize(
    "given", [{"noise_level": -1}, {"noise_level": 256}, {"jpeg_quality": 0}, {"bayer": "rggb"}]
)
def test_what_cannot_be_is_refused(given):
    with pytest.raises(fr.FullresError):
        Given(**given)


def test_alpha_is_enlarged_with_the_picture(tmp_path):
    path = save(tmp_path / "photo.png", random(20, 30, 4))
    twice = network(lambda x: nn.functional.interpolate(x, scale_factor=2), scale=2)
    fr.restore(path, tmp_path / "out.png", twice, tile=16, local=False)
    with open_image(tmp_path / "out.png") as source:
        assert (source.height, source.width, source.has_alpha) == (40, 60, True)
    before, after = stored(path), stored(tmp_path / "out.png")
    assert np.array_equal(after[..., :3], before[..., :3].repeat(2, 0).repeat(2, 1))
    assert np.abs(after[..., 3].astype(int).mean() - before[..., 3].mean()) < 3


@pytest.mark.parametrize("pattern", ["RGGB", "BGGR", "GRBG", "GBRG"])
def test_interpolated_mosaics_do_not_depend_on_tiles(tmp_path, pattern):
    path = save(tmp_path / "raw.tif", random(41, 53, dtype=np.uint16))
    asks = network(lambda x: x, mosaic="interpolated")
    results = []
    for tile in (16, 512):
        target = tmp_path / f"{tile}.tif"
        fr.restore(path, target, asks, bayer=pattern, tile=tile, local=False)
        results.append(stored(target))
    assert np.array_equal(*results)
    # every sample is still where it was, the other colours are near
    sparse = tmp_path / "sparse.tif"
    fr.restore(path, sparse, network(lambda x: x), bayer=pattern, local=False)
    there = stored(sparse)
    assert np.array_equal(results[0][there > 0], there[there > 0])
    assert (results[0] > 0).mean() > 0.6
