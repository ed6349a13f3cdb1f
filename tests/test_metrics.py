"""Metrics agree with independent libraries and with values by hand; protocols with both."""

from __future__ import annotations

import math
import sys
import urllib.error

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from scipy.ndimage import gaussian_filter
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from fullres import FullresError, metrics
from fullres.metrics import (
    METRICS,
    PROTOCOLS,
    Protocol,
    luma,
    mae,
    mean_of,
    protocol,
    psnr,
    ssim,
    ssim_uniform,
    ssim_volume,
)

GAUSSIAN = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}


def pair(*shape, seed=0, noise=0.1):
    generator = torch.Generator().manual_seed(seed)
    target = torch.rand(shape, generator=generator, dtype=torch.float64)
    error = noise * torch.randn(shape, generator=generator, dtype=torch.float64)
    return (target + error).clamp(0, 1), target


def skimage_ssim(restored, target, **options):
    x, y = restored.double().numpy(), target.double().numpy()
    return structural_similarity(x, y, data_range=1.0, channel_axis=0, **options)


def matlab_ssim(restored, target):
    """MATLAB's published algorithm of an array of two or three dimensions, by scipy."""
    x, y = restored.squeeze(0).numpy(), target.squeeze(0).numpy()

    def blur(z):
        return gaussian_filter(z, 1.5, mode="nearest", radius=5)

    mx, my = blur(x), blur(y)
    vx, vy, cov = blur(x * x) - mx * mx, blur(y * y) - my * my, blur(x * y) - mx * my
    c1, c2 = 0.01**2, 0.03**2
    values = (2 * mx * my + c1) * (2 * cov + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2))
    return values.mean()


SIZES = {"height": st.integers(11, 40), "width": st.integers(11, 40), "seed": st.integers(0, 99)}


@given(channels=st.sampled_from([1, 3]), **SIZES)
@settings(max_examples=40, deadline=None)
def test_metrics_agree_with_scikit_image_at_every_size(channels, height, width, seed):
    x, y = pair(channels, height, width, seed=seed)
    assert psnr(x, y) == pytest.approx(
        peak_signal_noise_ratio(y.numpy(), x.numpy(), data_range=1.0), abs=1e-10
    )
    assert ssim(x, y) == pytest.approx(skimage_ssim(x, y, **GAUSSIAN), abs=1e-12)
    assert ssim_uniform(x, y) == pytest.approx(skimage_ssim(x, y), abs=1e-12)
    assert mae(x, y) == pytest.approx(np.abs(x.numpy() - y.numpy()).mean(), abs=1e-15)


@given(
    channels=st.sampled_from([1, 3]),
    height=st.integers(1, 30),
    width=st.integers(1, 30),
    seed=st.integers(0, 99),
)
@settings(max_examples=40, deadline=None)
def test_ssim_of_a_volume_repeats_the_border_along_all_axes(channels, height, width, seed):
    x, y = pair(channels, height, width, seed=seed)
    assert ssim_volume(x, y) == pytest.approx(matlab_ssim(x, y), abs=1e-12)


def test_ssim_of_a_volume_takes_the_difference_of_colours_for_structure():
    x, y = pair(3, 40, 50, noise=0.3)
    colour = torch.tensor([0.1, 0.4, 0.8], dtype=torch.float64)[:, None, None]
    x, y = colour + 0.1 * x, colour + 0.1 * y
    assert ssim_volume(x, y) > ssim(x, y) + 0.1


def test_metrics_agree_with_torchmetrics():
    functional = pytest.importorskip("torchmetrics.functional.image")
    x, y = pair(2, 3, 30, 40)
    _, values = functional.structural_similarity_index_measure(
        x, y, data_range=1.0, return_full_image=True
    )
    assert ssim(x, y) == pytest.approx(values[..., 5:-5, 5:-5].mean().item(), abs=1e-12)
    expected = functional.peak_signal_noise_ratio(x, y, data_range=1.0, dim=(1, 2, 3))
    # torchmetrics takes its logarithm of 10 in float32
    assert psnr(x, y) == pytest.approx(expected.item(), abs=1e-5)


@pytest.mark.parametrize(("difference", "decibels"), [(0.1, 20.0), (0.01, 40.0), (1.0, 0.0)])
def test_psnr_and_mae_of_a_constant_difference(difference, decibels):
    black = torch.zeros(3, 5, 7, dtype=torch.float64)
    assert psnr(black + difference, black) == pytest.approx(decibels, abs=1e-12)
    assert mae(black + difference, black) == pytest.approx(difference, abs=1e-15)


def test_ssim_of_constant_pictures_by_hand():
    low = torch.full((1, 11, 11), 0.25, dtype=torch.float64)
    expected = (2 * 0.25 * 0.75 + 1e-4) / (0.25**2 + 0.75**2 + 1e-4)
    for metric in (ssim, ssim_volume, ssim_uniform):
        assert metric(low, 3 * low) == pytest.approx(expected, abs=1e-12)


def test_equal_pictures():
    picture = pair(3, 20, 20)[0]
    assert psnr(picture, picture) == math.inf
    assert mae(picture, picture) == 0
    for metric in (ssim, ssim_volume, ssim_uniform):
        assert metric(picture, picture) == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("metric", [psnr, ssim, ssim_volume, ssim_uniform, mae])
def test_of_a_batch_the_mean_over_its_pictures(metric):
    x, y = pair(3, 3, 16, 16)
    x[1] = (x[1] + y[1]) / 2
    assert metric(x, y) == pytest.approx(sum(map(metric, x, y)) / 3, abs=1e-12)


def test_float32_and_half_precision_pictures_are_measured_in_float64():
    x, y = pair(3, 16, 16)
    for dtype in (torch.float32, torch.bfloat16):
        a, b = x.to(dtype), y.to(dtype)
        assert psnr(a, b) == psnr(a.double(), b.double())
        assert ssim(a, b) == ssim(a.double(), b.double())


ERRORS = [
    (torch.rand(3, 12, 13), torch.rand(3, 12, 12), "is 3 × 12 × 13 and its target 3 × 12 × 12"),
    (torch.rand(12, 12), torch.rand(12, 12), "not 12 × 12"),
    (torch.tensor(0.5), torch.tensor(0.5), "not a number"),
    (torch.rand(3, 0, 12), torch.rand(3, 0, 12), "not empty"),
    (torch.full((3, 12, 12), math.nan), torch.rand(3, 12, 12), "restored picture has .* NaN"),
    (torch.rand(3, 12, 12), torch.full((3, 12, 12), math.inf), "target has .* infinite"),
    (torch.rand(3, 12, 12), torch.full((3, 12, 12), 255.0), r"from 255 to 255: .* \[0, 1\]"),
    (torch.rand(3, 12, 12) - 2, torch.rand(3, 12, 12), "restored picture has values from -"),
    (torch.ones(3, 12, 12, dtype=torch.uint8), torch.ones(3, 12, 12), "is torch.uint8: scale"),
]


@pytest.mark.parametrize("metric", METRICS.values(), ids=METRICS)
@pytest.mark.parametrize(("restored", "target", "message"), ERRORS)
def test_what_cannot_be_measured_is_a_sentence(metric, restored, target, message):
    if restored.dim() == 3 and restored.numel():  # larger than any window, by repeating pixels
        restored = restored.repeat_interleave(4, 1).repeat_interleave(4, 2)
        target = target.repeat_interleave(4, 1).repeat_interleave(4, 2)
        message = message.replace("12", "48").replace("13", "52")
    with pytest.raises(FullresError, match=message):
        metric(restored, target)


@pytest.mark.parametrize(("name", "side"), [("ssim", 11), ("ssim_uniform", 7), ("lpips", 31)])
def test_a_picture_smaller_than_the_window_is_a_sentence(name, side):
    x, y = pair(3, side + 9, side - 1)
    with pytest.raises(FullresError, match=f"at least {side} × {side} .* {side - 1} × {side + 9} "):
        METRICS[name](x, y)


def alexnet_with(monkeypatch, load):
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", load)
    metrics._alexnet.cache_clear()


@pytest.fixture
def random_alexnet(monkeypatch):
    """LPIPS on AlexNet of random weights: what the published ones would be put into."""
    models = pytest.importorskip("torchvision.models")
    pytest.importorskip("torchmetrics")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        weights = models.alexnet(weights=None).state_dict()
    alexnet_with(monkeypatch, lambda *_, **__: weights)
    yield
    metrics._alexnet.cache_clear()


@pytest.mark.usefixtures("random_alexnet")
def test_lpips_agrees_with_torchmetrics_function():
    from torchmetrics.functional.image import learned_perceptual_image_patch_similarity

    x, y = pair(2, 3, 40, 50)
    expected = learned_perceptual_image_patch_similarity(
        x.float(), y.float(), net_type="alex", normalize=True
    ).item()
    assert expected > 0
    assert metrics.lpips(x, y) == pytest.approx(expected, rel=1e-5)
    assert metrics.lpips(x, y) == pytest.approx(expected, rel=1e-5), "nothing accumulates"
    assert metrics.lpips(x, x) == 0
    each = [metrics.lpips(a, b) for a, b in zip(x, y, strict=True)]
    assert sum(each) / 2 == pytest.approx(expected, rel=1e-5)


@pytest.mark.usefixtures("random_alexnet")
def test_lpips_at_its_least_side_and_of_grey_pictures():
    x, y = pair(1, 31, 31)
    value = metrics.lpips(x, y)
    assert math.isfinite(value)
    assert value == metrics.lpips(x.expand(3, -1, -1), y.expand(3, -1, -1))
    with pytest.raises(FullresError, match="1 or 3 channels, not 4"):
        metrics.lpips(*pair(4, 40, 40))


@pytest.mark.usefixtures("random_alexnet")
def test_dpdd_has_the_five_values_of_its_table():
    row = PROTOCOLS["dpdd"].measure(*pair(3, 40, 40))
    assert list(row) == ["psnr", "ssim", "ssim_uniform", "mae", "lpips"]
    assert all(math.isfinite(value) for value in row.values())


@pytest.mark.parametrize("error", [urllib.error.URLError("no route"), RuntimeError("bad hash")])
def test_lpips_without_weights_says_what_to_do(monkeypatch, error):
    pytest.importorskip("torchvision")
    pytest.importorskip("torchmetrics")

    def load(*_, **__):
        raise error

    alexnet_with(monkeypatch, load)
    with pytest.raises(FullresError, match=r"(no route|bad hash).*alexnet-owt-7be5be79.pth to .*"):
        metrics.lpips(*pair(3, 40, 40))


def test_lpips_without_torchmetrics_says_what_to_install(monkeypatch):
    metrics._alexnet.cache_clear()
    monkeypatch.setitem(sys.modules, "torchmetrics.image", None)
    with pytest.raises(FullresError, match=r"pip install 'fullres\[evaluate\]'"):
        metrics.lpips(*pair(3, 40, 40))


# MATLAB: rgb2ycbcr(uint8(cat(3, 255, 0, 0))) has Y 81, and so on
COLOURS = [
    ((0, 0, 0), 16),
    ((255, 255, 255), 235),
    ((255, 0, 0), 81.481),
    ((0, 255, 0), 144.553),
    ((0, 0, 255), 40.966),
    ((128, 64, 32), 16 + (65.481 * 128 + 128.553 * 64 + 24.966 * 32) / 255),
]


@pytest.mark.parametrize(("colour", "expected"), COLOURS)
def test_luma_by_hand(colour, expected):
    rgb = torch.tensor(colour, dtype=torch.float64)[:, None, None] / 255
    assert 255 * luma(rgb).item() == pytest.approx(expected, abs=1e-10)
    assert luma(rgb.expand(2, 3, 4, 5)).shape == (2, 1, 4, 5)


def test_luma_agrees_with_scikit_image():
    from skimage.color import rgb2ycbcr

    rgb = pair(3, 9, 8)[0]
    expected = rgb2ycbcr(rgb.numpy(), channel_axis=0)[0]
    np.testing.assert_allclose(255 * luma(rgb)[0].numpy(), expected, atol=1e-10)


@pytest.mark.parametrize("shape", [(1, 4, 4), (4, 4, 4), (3, 4)])
def test_luma_of_other_than_three_channels_is_a_sentence(shape):
    with pytest.raises(FullresError, match="luma is of three channels"):
        luma(torch.rand(shape))


def flat(value, *shape):
    return torch.full(shape or (3, 16, 16), value, dtype=torch.float64)


def test_the_restored_picture_is_rounded_to_bits():
    bits8, bits16, none = (Protocol("p", ("mae",), bits=bits) for bits in (8, 16, None))
    # 25.755 of 255 and 6619.04 of 65535
    assert bits8.measure(flat(0.101), flat(0.0))["mae"] == pytest.approx(26 / 255, abs=1e-12)
    assert bits16.measure(flat(0.101), flat(0.0))["mae"] == pytest.approx(6619 / 65535, abs=1e-12)
    assert none.measure(flat(0.101), flat(0.0))["mae"] == pytest.approx(0.101, abs=1e-12)


@pytest.mark.parametrize("bits", [8, None])
def test_the_restored_picture_is_clamped(bits):
    plain = Protocol("p", ("mae",), bits=bits)
    assert plain.measure(flat(1.5), flat(1.0))["mae"] == 0
    assert plain.measure(flat(-0.5), flat(0.25))["mae"] == 0.25


@pytest.mark.parametrize("bits", [8, 16])
def test_a_restored_picture_that_rounds_to_its_target_equals_it(bits):
    peak = 2**bits - 1
    target = torch.randint(0, peak + 1, (3, 20, 20)).float() / peak
    restored = target + 0.3 / peak
    row = Protocol("p", ("psnr", "ssim"), bits=bits).measure(restored, target)
    assert row == {"psnr": math.inf, "ssim": pytest.approx(1, abs=1e-12)}


def test_a_target_between_levels_stays():
    row = Protocol("p", ("mae",)).measure(flat(0.0), flat(0.1017))
    assert row["mae"] == pytest.approx(0.1017, abs=1e-12)


def test_luma_protocols_take_grey_pictures_as_they_are():
    x, y = pair(1, 30, 30)
    for name in ("derain", "jpeg"):
        assert PROTOCOLS[name].measure(x, y) == PROTOCOLS["grey-denoising"].measure(x, y)


def test_derain_rounds_luma_and_sr_does_not():
    red, black = flat(0.0), flat(0.0)
    red[0] = 1
    rounded = PROTOCOLS["derain"].measure(red, black)["psnr"]
    assert rounded == pytest.approx(-20 * math.log10((81 - 16) / 255), abs=1e-10)
    exact = PROTOCOLS["sr"].measure(red, black)["psnr"]
    assert exact == pytest.approx(-20 * math.log10(65.481 / 255), abs=1e-10)


@pytest.mark.parametrize(("name", "scale", "border"), [("sr", 4, 4), ("sr", 2, 2)])
def test_a_border_as_wide_as_the_factor_is_not_measured(name, scale, border):
    check_border(PROTOCOLS[name], scale, border)


def test_a_border_of_ten_pixels_is_not_measured():
    check_border(PROTOCOLS["demosaic"], 4, 10)
    check_border(PROTOCOLS["gopro"], 4, 0)


def check_border(measured, scale, border):
    y = pair(3, 40, 50)[1]
    x = 1 - y
    middle = (slice(None), slice(border, 40 - border), slice(border, 50 - border))
    x[middle] = y[middle]
    row = measured.measure(x, (255 * y).round() / 255, scale)
    assert row["psnr"] == math.inf
    x[0, border, border] = 1 - x[0, border, border].round()
    assert measured.measure(x, (255 * y).round() / 255, scale)["psnr"] < 60


@pytest.mark.parametrize("name", sorted(set(PROTOCOLS) - {"dpdd"}))
@given(height=st.integers(31, 60), width=st.integers(31, 60), seed=st.integers(0, 99))
@settings(max_examples=5, deadline=None)
def test_protocols_agree_with_scikit_image_step_by_step(name, height, width, seed):
    x, y = pair(3, height, width, seed=seed)
    y = (255 * y).round() / 255
    restored, target = x.numpy().transpose(1, 2, 0), y.numpy().transpose(1, 2, 0)
    if name not in ("rgb", "dehaze"):
        restored = np.round(255 * restored) / 255
    if name in ("sr", "jpeg"):
        weights = np.array([65.481, 128.553, 24.966])
        restored, target = (16 + restored @ weights) / 255, (16 + target @ weights) / 255
        restored, target = restored[..., None], target[..., None]
    elif name == "derain":
        restored, target = rounded_luma(restored), rounded_luma(target)
    border = {"sr": 3, "demosaic": 10}.get(name, 0)
    if border:
        restored = restored[border:-border, border:-border]
        target = target[border:-border, border:-border]
    row = PROTOCOLS[name].measure(x, y, scale=3)
    expected = peak_signal_noise_ratio(target, restored, data_range=1)
    assert row["psnr"] == pytest.approx(expected, abs=1e-9)
    expected = structural_similarity(restored, target, data_range=1, channel_axis=2, **GAUSSIAN)
    assert row["ssim"] == pytest.approx(expected, abs=1e-9)
    assert ("ssim_volume" in row) == (name in ("gopro", "hide", "reds", "sidd"))


def rounded_luma(picture):
    """Luma in 8 bits as MATLAB rounds, half up, of a picture (H, W, 3) in 8 bits: in integers."""
    levels = np.round(255 * picture.astype(float)).astype(int)
    thousandths = levels @ np.array([65481, 128553, 24966])
    return (16 + (2 * thousandths + 255_000) // 510_000)[..., None] / 255


def test_a_protocol_measures_a_batch_as_its_pictures():
    x, y = pair(3, 3, 24, 24)
    derain = PROTOCOLS["derain"]
    rows = [derain.measure(a, b) for a, b in zip(x, y, strict=True)]
    assert derain.measure(x, y) == pytest.approx(mean_of(rows), abs=1e-12)


def test_what_a_protocol_cannot_measure_is_a_sentence():
    gopro, sr = PROTOCOLS["gopro"], PROTOCOLS["sr"]
    with pytest.raises(FullresError, match="measure pictures of one shape"):
        gopro.measure(flat(0.5), flat(0.5, 3, 16, 17))
    with pytest.raises(FullresError, match="NaN"):
        gopro.measure(flat(math.nan), flat(0.5))
    with pytest.raises(FullresError, match="NaN or infinite"):
        gopro.measure(flat(math.inf), flat(0.5))
    with pytest.raises(FullresError, match="target has values from 128 to 128"):
        gopro.measure(flat(0.5), flat(128.0))
    with pytest.raises(FullresError, match=r"nothing left after 8 pixels .* 'sr'"):
        sr.measure(flat(0.5), flat(0.5), scale=8)
    with pytest.raises(FullresError, match="8 × 8 are left"):
        sr.measure(flat(0.5), flat(0.5), scale=4)
    with pytest.raises(FullresError, match="luma is of three channels"):
        sr.measure(flat(0.5, 2, 16, 16), flat(0.5, 2, 16, 16))


def test_every_protocol_is_found_by_its_name_and_says_whose_it_is():
    for name, each in PROTOCOLS.items():
        assert protocol(name) is each
        assert each.name == name
        assert each.source
        assert set(each.metrics) <= set(METRICS)


def test_an_unknown_protocol_lists_the_known_ones():
    with pytest.raises(FullresError, match=r"no protocol 'gorpo': .*dpdd.*gopro.*sr"):
        protocol("gorpo")


def test_mean_of_rows():
    rows = [{"psnr": 30.0, "ssim": 0.8}, {"psnr": 33.0, "ssim": 0.9}]
    assert mean_of(rows) == pytest.approx({"psnr": 31.5, "ssim": 0.85})
    assert mean_of([*rows, {"psnr": math.inf, "ssim": 1.0}])["psnr"] == math.inf


def test_rows_without_a_mean_are_a_sentence():
    with pytest.raises(FullresError, match="no picture"):
        mean_of([])
    with pytest.raises(FullresError, match="not measured alike"):
        mean_of([{"psnr": 30.0}, {"psnr": 30.0, "ssim": 0.5}])


def test_import_loads_no_torchmetrics():
    import subprocess

    code = "import sys, fullres.metrics; assert 'torchmetrics' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
