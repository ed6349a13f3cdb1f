"""Degradations beside independent forms of them, and the statistics that they promise."""

from __future__ import annotations

import io
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage, stats

from fullres.data import degradations
from fullres.data.degradations import (
    DEGRADATIONS,
    Bicubic,
    Haze,
    Jpeg,
    Mosaic,
    Noise,
    Rain,
    check_range,
    cubic_weights,
    smooth_field,
    streak,
)
from fullres.errors import FullresError
from fullres.ops.bayer import REACH, interpolated, sparse

PATTERNS = ("RGGB", "BGGR", "GRBG", "GBRG")
EVERY = [
    *(kind() for kind in DEGRADATIONS.values()),
    Noise(varying=True, clip=True),
    Jpeg(subsampling=False),
    Bicubic(2),
    Bicubic(3, eight_bit=True),
    Mosaic("GBRG", "samples"),
    Haze(relief=1),
]

sides = st.integers(1, 23)
seeds = st.integers(0, 99)


def rng(seed=0):
    return np.random.default_rng(seed)


def picture(height=24, width=31, channels=3, seed=0):
    return torch.from_numpy(rng(seed).random((channels, height, width), np.float32))


def smooth_picture(height=96, width=80):
    """With the spectrum of a photograph more than noise has."""
    noise = ndimage.gaussian_filter(rng(1).random((3, height, width)), (0, 3, 3))
    noise = (noise - noise.min()) / (noise.max() - noise.min())
    return torch.from_numpy(noise).float()


# every degradation


@pytest.mark.parametrize("degradation", EVERY, ids=repr)
@settings(max_examples=15, deadline=None)
@given(sides, sides, seeds)
def test_shape_and_type_hold_at_every_size_and_the_generator_decides(
    degradation, height, width, seed
):
    clean = picture(height, width, seed=seed)
    kept = clean.clone()
    degraded = degradation(clean, rng(seed))
    scale = degradation.scale
    channels = 1 if degradation == Mosaic() else 3
    assert degraded.shape == (channels, math.ceil(height / scale), math.ceil(width / scale))
    assert degraded.dtype == torch.float32
    assert degraded.isfinite().all()
    assert torch.equal(clean, kept)
    assert torch.equal(degraded, degradation(clean, rng(seed)))


@pytest.mark.parametrize("degradation", [Noise(), Noise(varying=True), Jpeg(), Rain(), Haze()])
def test_another_generator_degrades_otherwise(degradation):
    clean = picture()
    assert not torch.equal(degradation(clean, rng(0)), degradation(clean, rng(1)))


@pytest.mark.parametrize("degradation", [d for d in EVERY if not isinstance(d, Mosaic)], ids=repr)
def test_grey_pictures_are_degraded_too(degradation):
    assert degradation(picture(channels=1), rng()).shape[0] == 1


def test_only_what_varies_over_the_picture_needs_the_whole_of_it():
    assert {name for name, kind in DEGRADATIONS.items() if kind().needs_whole} == {"haze"}
    assert Noise(varying=True).needs_whole


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Noise((5, 2)), "sigma=(5, 2)"),
        (lambda: Noise((-1, 2)), "from 0 to 255"),
        (lambda: Noise((0, math.nan)), "nan"),
        (lambda: Noise(25), "twice"),
        (lambda: Noise("ab"), "sigma='ab'"),
        (lambda: Jpeg((0, 50)), "from 1 to 100"),
        (lambda: Jpeg((10.5, 50)), "whole number"),
        (lambda: Bicubic(5), "scale=5"),
        (lambda: Mosaic("RGBG"), "RGGB, BGGR, GRBG, GBRG"),
        (lambda: Mosaic(form="raw"), "form='raw'"),
        (lambda: Rain(density=(0, 1.1)), "density"),
        (lambda: Rain(length=(0, 10)), "length"),
        (lambda: Rain(angle=(-91, 0)), "angle"),
        (lambda: Rain(strength=(0.5, 0.4)), "strength"),
        (lambda: Haze(beta=(-1, 1)), "beta"),
        (lambda: Haze(airlight=(0, 2)), "airlight"),
        (lambda: Haze(relief=2), "relief"),
    ],
)
def test_values_that_cannot_be_are_named(make, said):
    with pytest.raises(FullresError) as caught:
        make()
    assert said in str(caught.value)


@pytest.mark.parametrize("value", [(1, 2, 3), (1,), None, (1, "x")])
def test_a_range_is_a_pair_of_numbers(value):
    with pytest.raises(FullresError, match="level="):
        check_range("level", value, 0, 9)


def test_ends_of_the_limits_are_within_them():
    check_range("level", (0, 9), 0, 9)
    check_range("level", [4, 4], 0, 9)


@pytest.mark.parametrize(
    ("degradation", "channels"),
    [(Jpeg(), 2), (Jpeg(), 4), (Mosaic(), 1), (Mosaic(), 4)],
)
def test_numbers_of_channels_that_cannot_be_are_named(degradation, channels):
    with pytest.raises(FullresError, match=f"not {channels}"):
        degradation(picture(channels=channels), rng())


# smooth_field


@settings(max_examples=40, deadline=None)
@given(sides, sides, st.integers(1, 30), seeds)
def test_a_field_has_evenly_spread_values(height, width, cells, seed):
    field = smooth_field(rng(seed), height, width, cells)
    count = height * width
    assert field.shape == (height, width)
    assert field.dtype == torch.float32
    even = (torch.arange(count) + 0.5) / count
    torch.testing.assert_close(field.flatten().sort().values, even)


@pytest.mark.parametrize("cells", [2, 4, 8])
def test_a_field_is_smooth_and_the_more_cells_the_less(cells):
    def steepest(cells):
        fields = [smooth_field(rng(seed), 120, 160, cells) for seed in range(5)]
        return max(float(field.diff(dim=axis).abs().max()) for field in fields for axis in (0, 1))

    assert steepest(cells) < 6 * cells / 160
    assert steepest(2 * cells) > steepest(cells)


def test_cells_of_a_field_are_nearly_square():
    fields = [smooth_field(rng(seed), 40, 160, 8) for seed in range(20)]
    down, across = (sum(float(f.diff(dim=axis).square().mean()) for f in fields) for axis in (0, 1))
    assert 0.5 < down / across < 2


# noise


@pytest.mark.parametrize("sigma", [0, 15, 50])
def test_noise_has_the_deviation_asked_for_and_is_normal(sigma):
    clean = torch.full((3, 200, 200), 0.5)
    noise = (Noise((sigma, sigma))(clean, rng()) - clean) * 255
    assert abs(float(noise.std()) - sigma) <= 0.01 * sigma
    assert abs(float(noise.mean())) <= 0.01 * sigma
    if sigma:
        assert stats.kstest(noise.flatten().numpy() / sigma, "norm").pvalue > 0.01
        assert np.abs(np.corrcoef(noise.flatten(1).numpy()) - np.eye(3)).max() < 0.02


def test_noise_is_drawn_from_its_range_once_a_picture():
    clean, random = torch.full((1, 40, 40), 0.5), rng()
    found = [255 * float(Noise((10, 30))(clean, random).std()) for _ in range(100)]
    assert 9 < min(found) < 13
    assert 27 < max(found) < 32
    assert 18 < np.mean(found) < 22


def test_noise_is_cut_only_where_asked():
    clean = torch.ones(1, 30, 30)
    free, cut = (Noise((50, 50), clip=clip)(clean, rng()) for clip in (False, True))
    assert free.max() > 1.2
    assert torch.equal(cut, free.clamp(0, 1))


def test_varying_noise_follows_the_field():
    clean, size = torch.full((3, 256, 256), 0.5), 256
    noise = (Noise((10, 50), varying=True)(clean, rng(4)) - clean) * 255
    field = 10 + 40 * smooth_field(rng(4), size, size, degradations.CELLS)
    local = F.avg_pool2d((noise / field).square().mean(0, keepdim=True), 32)
    # the variance of 3 × 32 × 32 samples is off by 2.6 % of itself
    assert (local - 1).abs().max() < 0.13
    deviation = F.avg_pool2d(noise.square().mean(0, keepdim=True), 16).sqrt()
    assert deviation.min() < 15
    assert deviation.max() > 43


# JPEG


@pytest.mark.parametrize("quality", [5, 30, 75, 95])
@pytest.mark.parametrize(("channels", "subsampling"), [(1, True), (3, True), (3, False)])
def test_jpeg_is_what_pillow_makes_of_the_picture(quality, channels, subsampling):
    from PIL import Image

    clean = smooth_picture()[:channels]
    stored = (clean * 255).round().byte().permute(1, 2, 0).numpy()
    with io.BytesIO() as file:
        image = Image.fromarray(stored[..., 0] if channels == 1 else stored)
        image.save(file, "JPEG", quality=quality, subsampling=2 if subsampling else 0)
        with Image.open(file) as opened:
            other = torch.from_numpy(np.array(opened, copy=True)).float()
    other = other[None] if channels == 1 else other.permute(2, 0, 1)
    found = 255 * Jpeg((quality, quality), subsampling)(clean, rng())
    difference = (found - other).abs()
    assert difference.max() < 2.5  # libraries round the inverse transform in their own ways
    assert difference.mean() < 0.1
    assert (found - 255 * clean).abs().mean() > 2 * difference.mean()


def test_jpeg_gets_worse_with_lower_quality():
    clean = smooth_picture()
    errors = [float((Jpeg((q, q))(clean, rng()) - clean).square().mean()) for q in (90, 50, 20, 5)]
    assert errors == sorted(errors)
    assert errors[0] < errors[-1] / 5


def test_jpeg_draws_every_quality_of_its_range():
    clean, random = smooth_picture(), rng()
    alone = {q: Jpeg((q, q))(clean, rng()) for q in (20, 21, 22)}
    drawn = [Jpeg((20, 22))(clean, random) for _ in range(40)]
    found = [q for one in drawn for q, other in alone.items() if torch.equal(one, other)]
    assert len(found) == 40
    assert set(found) == {20, 21, 22}


def test_jpeg_blocks_may_begin_anywhere():
    clean, random = smooth_picture()[:, 5:45, 11:60], rng()
    alone = {}
    for y in range(16):
        for x in range(16):
            around = F.pad(clean, (x, 0, y, 0), mode="replicate")
            alone[y, x] = Jpeg((50, 50))(around, rng())[:, y:, x:]
    degrade = Jpeg((50, 50), anywhere=True)
    drawn = [degrade(clean, random) for _ in range(40)]
    found = [place for one in drawn for place, other in alone.items() if torch.equal(one, other)]
    assert len(found) == 40
    assert len({y for y, _ in found}) > 8
    assert len({x for _, x in found}) > 8


def test_jpeg_cuts_what_lies_outside_the_range():
    clean = smooth_picture() * 3 - 1
    assert torch.equal(Jpeg()(clean, rng()), Jpeg()(clean.clamp(0, 1), rng()))


# bicubic


def keys(x):
    x = np.abs(x)
    near = 1.5 * x**3 - 2.5 * x**2 + 1
    far = -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    return np.where(x <= 1, near, np.where(x < 2, far, 0.0))


def contributions(length, scale):
    """The (result, length) matrix of imresize, entry by entry as its documentation has it."""
    result = -(-length // scale)
    matrix = np.zeros((result, length))
    mirrored = [*range(length), *reversed(range(length))]
    for row in range(result):
        centre = (row + 1) * scale + 0.5 * (1 - scale)  # counted from 1
        left = math.floor(centre - 2 * scale)
        indices = np.arange(left, left + 4 * scale + 2)
        weights = keys((centre - indices) / scale) / scale
        weights /= weights.sum()
        for index, weight in zip(indices, weights, strict=True):
            matrix[row, mirrored[(index - 1) % len(mirrored)]] += weight
    return matrix


@settings(deadline=None)
@given(st.sampled_from([2, 3, 4]), sides, sides, seeds)
def test_bicubic_is_imresize_entry_by_entry(scale, height, width, seed):
    clean = picture(height, width, seed=seed)
    exact = contributions(height, scale) @ clean.double().numpy() @ contributions(width, scale).T
    found = Bicubic(scale)(clean, rng()).numpy()
    assert found.shape == exact.shape
    np.testing.assert_allclose(found, exact, rtol=0, atol=1e-6)


def test_weights_of_scale_2_are_those_computed_by_hand():
    # at 1/4: 1.5/64 - 2.5/16 + 1; at 3/4: 1.5 * 27/64 - 2.5 * 9/16 + 1;
    # at 5/4: -0.5 * 125/64 + 2.5 * 25/16 - 5 + 2; at 7/4: -0.5 * 343/64 + 2.5 * 49/16 - 7 + 2
    quarter = [0.8671875, 0.2265625, -0.0703125, -0.0234375]
    half = [value / 2 for value in quarter]
    assert cubic_weights(2) == [*reversed(half), *half]


@pytest.mark.parametrize(("scale", "count"), [(2, 8), (3, 11), (4, 16)])
def test_weights_are_symmetric_and_sum_to_one(scale, count):
    weights = cubic_weights(scale)
    assert len(weights) == count
    assert weights == weights[::-1]
    assert abs(math.fsum(weights) - 1) < 1e-15


def test_the_border_is_mirrored_with_its_outermost_pixel():
    clean = torch.zeros(1, 1, 8)
    clean[0, 0, 0] = 1
    found = Bicubic(2)(clean.expand(1, 8, 8), rng())[0, 1]
    # the pixel and its mirror image: at distances 1/2 and 3/2, then 5/2 and 7/2
    assert found.tolist() == [0.43359375 + 0.11328125, -0.03515625 - 0.01171875, 0, 0]


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_bicubic_is_torchs_antialiased_one_away_from_the_borders(scale):
    clean = picture(60, 48)
    size = (60 // scale, 48 // scale)
    other = F.interpolate(clean[None], size=size, mode="bicubic", antialias=True)[0]
    inner = (..., slice(2, -2), slice(2, -2))
    torch.testing.assert_close(Bicubic(scale)(clean, rng())[inner], other[inner])


def test_bicubic_overshoots_unless_it_is_stored():
    clean = torch.zeros(1, 16, 16)
    clean[..., 8:] = 1
    free, stored = Bicubic(2)(clean, rng()), Bicubic(2, eight_bit=True)(clean, rng())
    assert free.min() < 0
    assert free.max() > 1
    assert torch.equal(stored, (free.clamp(0, 1) * 255).round() / 255)


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_stored_bicubic_is_rounded_after_each_axis(scale):
    codes = rng(3).integers(0, 256, (3, 21, 26)).astype(float)
    down = np.clip(np.floor(contributions(21, scale) @ codes + 0.5), 0, 255)
    both = np.clip(np.floor(down @ contributions(26, scale).T + 0.5), 0, 255)
    clean = torch.from_numpy(codes / 255).float()
    found = Bicubic(scale, eight_bit=True)(clean, rng()).double().numpy() * 255
    # only a sum that lies halfway between two codes may be rounded otherwise
    assert np.mean(np.abs(found - both) > 0.01) < 0.01
    assert np.abs(found - both).max() < 1.01


# mosaic


@pytest.mark.parametrize("pattern", PATTERNS)
@settings(max_examples=20, deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), seeds)
def test_a_mosaic_has_the_patterns_colour_at_every_pixel(pattern, height, width, seed):
    clean = picture(height, width, seed=seed)
    mosaic = Mosaic(pattern)(clean, rng())[0]
    samples = Mosaic(pattern, "samples")(clean, rng())
    for i in range(height):
        for j in range(width):
            channel = "RGB".index(pattern[2 * (i % 2) + j % 2])
            assert mosaic[i, j] == clean[channel, i, j] == samples[channel, i, j]
            assert samples[:, i, j].count_nonzero() <= 1


@settings(max_examples=20, deadline=None)
@given(sides, sides)
def test_samples_are_what_a_network_is_fed(height, width):
    mosaic = Mosaic()(picture(height, width), rng())
    found = Mosaic(form="samples")(picture(height, width), rng())
    assert torch.equal(found, sparse(mosaic[None])[0])


@pytest.mark.parametrize("pattern", PATTERNS)
@settings(max_examples=20, deadline=None)
@given(st.integers(2, 12), st.integers(2, 12))
def test_interpolated_colours_are_what_a_network_is_fed(pattern, height, width):
    clean = picture(height, width)
    rows, columns = divmod(pattern.index("R"), 2)
    margins = ((0, 0), (REACH + rows, REACH), (REACH + columns, REACH))
    mosaic = np.pad(Mosaic(pattern)(clean, rng()).numpy(), margins, mode="reflect")
    exact = interpolated(torch.from_numpy(mosaic)[None])[0, :, rows:, columns:]
    torch.testing.assert_close(Mosaic(pattern, "interpolated")(clean, rng()), exact)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_grey_ramps_come_back_interpolated(pattern):
    i, j = torch.meshgrid(torch.arange(14.0), torch.arange(11.0), indexing="ij")
    ramp = (0.2 + 0.03 * i + 0.02 * j).expand(3, -1, -1)
    found = Mosaic(pattern, "interpolated")(ramp, rng())
    inner = (..., slice(REACH, -REACH), slice(REACH, -REACH))
    torch.testing.assert_close(found[inner], ramp[inner])


def test_the_smallest_interpolated_mosaic_is_2_by_2():
    clean = torch.full((3, 2, 2), 0.25)
    for pattern in PATTERNS:
        assert Mosaic(pattern, "interpolated")(clean, rng()).unique().tolist() == [0.25]
    with pytest.raises(FullresError, match="1 × 5"):
        Mosaic(form="interpolated")(picture(1, 5), rng())


# rain


def test_rain_only_brightens_and_stays_in_range():
    clean = smooth_picture()
    rainy = Rain()(clean, rng())
    assert (rainy >= clean).all()
    assert rainy.max() <= 1
    assert (rainy - clean).max() > 0.1


def test_rain_is_blended_by_screen_in_every_channel_alike():
    clean, rain = smooth_picture(), Rain((0.2, 0.2), (20, 20), (10, 10), (0.6, 0.6))
    streaks = rain.streaks(rng(), *clean.shape[-2:])
    torch.testing.assert_close(1 - rain(clean, rng()), (1 - clean) * (1 - streaks))


@pytest.mark.parametrize("density", [0.0, 0.1, 0.3])
def test_rain_is_as_dense_and_strong_as_asked(density):
    rain = Rain((density, density), (12, 12), (0, 0), (0.1, 0.1))
    streaks = rain.streaks(rng(), 300, 300)
    # brightness is uniform between half the strength and all of it: 0.075 on average
    assert abs(float(streaks.mean()) - 0.075 * density) <= 0.075 * density * 0.15
    assert (streaks > 0.04).any() == (density > 0)


@pytest.mark.parametrize("angle", [-60, -20, 0, 35, 90])
def test_streaks_run_at_the_angle_asked(angle):
    rain = Rain((0.02, 0.02), (30, 30), (angle, angle), (0.5, 0.5))
    soft = ndimage.gaussian_filter(rain.streaks(rng(), 256, 256).double().numpy(), 2)
    y, x = np.gradient(soft)
    # the gradient runs across the streaks: the axis on which it is least runs along them
    tensor = np.array([[(x * x).sum(), (x * y).sum()], [(x * y).sum(), (y * y).sum()]])
    along = np.linalg.eigh(tensor)[1][:, 0]
    found = math.degrees(math.atan2(along[0], along[1]))
    assert abs((found - angle + 90) % 180 - 90) < 4


def test_streaks_are_their_shape_at_each_drop():
    shape = streak(9, 25)
    reach = len(shape) // 2
    random = rng(7)
    for value in (0.02, 9, 25, 0.5):
        assert random.uniform(value, value) == value
    size = (40 + 2 * reach, 50 + 2 * reach)
    drops = (random.random(size, np.float32) < 0.02 / float(shape.sum())).astype(float)
    drops *= random.uniform(0.25, 0.5, size)
    exact = ndimage.convolve(drops, shape.numpy().astype(float), mode="constant")
    exact = exact[reach:-reach, reach:-reach].clip(0, 1)
    found = Rain((0.02, 0.02), (9, 9), (25, 25), (0.5, 0.5)).streaks(rng(7), 40, 50)
    assert exact.max() > 0.2
    np.testing.assert_allclose(found.numpy(), exact, atol=1e-6)


@settings(deadline=None)
@given(st.floats(1, 200), st.floats(-90, 90))
def test_a_streak_lies_within_its_square(length, angle):
    shape = streak(length, angle)
    assert shape.shape[0] == shape.shape[1]
    assert len(shape) % 2 == 1
    assert shape[len(shape) // 2, len(shape) // 2] == 1
    assert shape[[0, -1]].max() < 1e-4
    assert shape[:, [0, -1]].max() < 1e-4
    torch.testing.assert_close(shape, shape.flip(0, 1), rtol=0, atol=1e-4)
    assert abs(float(shape.sum()) - length) < 0.15 * length + 0.4


# haze


def test_haze_is_the_scattering_model():
    clean, haze = smooth_picture(), Haze((1.2, 1.2), (0.9, 0.9))
    random = rng(5)
    beta, airlight = random.uniform(1.2, 1.2), random.uniform(0.9, 0.9)
    t = torch.exp(-beta * haze.depth(random, *clean.shape[-2:]))
    torch.testing.assert_close(haze(clean, rng(5)), clean * t + airlight * (1 - t))


def test_haze_draws_what_it_is_asked():
    haze = Haze((0.5, 2.0), (0.7, 1.0), relief=0)
    black, white = torch.zeros(1, 50, 1), torch.ones(1, 50, 1)
    for seed in range(20):
        # J = 1 against J = 0 gives t, and J = 0 gives A (1 - t)
        dark = haze(black, rng(seed))
        t = haze(white, rng(seed)) - dark
        airlight = dark / (1 - t)
        assert 0.7 <= airlight.mean() <= 1
        torch.testing.assert_close(airlight, airlight.mean().expand_as(airlight))
        depth = 1 - (torch.arange(50) + 0.5) / 50
        beta = -t[0, :, 0].log() / depth
        assert 0.5 - 1e-4 <= beta.mean() <= 2 + 1e-4
        torch.testing.assert_close(beta, beta.mean().expand_as(beta), rtol=1e-3, atol=0)


@settings(max_examples=40, deadline=None)
@given(sides, sides, st.floats(0, 1), seeds)
def test_depth_stays_in_range(height, width, relief, seed):
    depth = Haze(relief=relief).depth(rng(seed), height, width)
    assert depth.shape == (height, width)
    assert depth.min() >= 0
    assert depth.max() <= 1


def test_depth_grows_towards_the_top_and_is_smooth():
    depths = torch.stack([Haze().depth(rng(seed), 90, 120) for seed in range(30)])
    assert (depths.mean((0, 2)).diff() < 0).all()
    assert (depths[:, :30].mean((1, 2)) > depths[:, -30:].mean((1, 2))).all()
    assert depths.diff(dim=1).abs().max() < 0.1
    assert depths.diff(dim=2).abs().max() < 0.1


def test_no_haze_is_left_where_nothing_scatters():
    clean = smooth_picture()
    torch.testing.assert_close(Haze((0, 0))(clean, rng()), clean)
