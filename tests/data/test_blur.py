"""Blur: in linear light, by the disc and along the way that was asked for, and sharp where none."""

from __future__ import annotations

import numpy as np
import pytest
import skimage.data
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage, signal
from skimage import transform

from fullres.data.blur import (
    BLURS,
    Defocus,
    Motion,
    Shake,
    disc_blur,
    disc_kernel,
    smooth_way,
    to_linear,
    to_srgb,
    warp,
)
from fullres.errors import FullresError

CAT = torch.from_numpy(skimage.data.chelsea()[:96, 60:190].copy()).permute(2, 0, 1) / 255
STILL = Shake(shift=(0, 0), noise=0)


def random(seed=0):
    return np.random.default_rng(seed)


def test_linear_light_is_that_of_srgb():
    x = torch.linspace(0, 1, 1001, dtype=torch.float64)
    torch.testing.assert_close(to_srgb(to_linear(x)), x, atol=1e-6, rtol=0)
    # the piecewise curve of IEC 61966-2-1 at three points, by hand
    by_hand = [0.02 / 12.92, ((0.2 + 0.055) / 1.055) ** 2.4, ((0.8 + 0.055) / 1.055) ** 2.4]
    found = to_linear(torch.tensor([0.02, 0.2, 0.8], dtype=torch.float64))
    assert found.tolist() == pytest.approx(by_hand)


@pytest.mark.parametrize("radius", [2, 3.5, 8, 20])
def test_a_disc_has_the_moments_of_a_disc(radius):
    disc = disc_kernel(radius)
    y, x = np.mgrid[: len(disc), : len(disc)] - len(disc) // 2
    assert float(disc.sum()) == pytest.approx(1)
    assert torch.equal(disc, disc.T)
    assert torch.equal(disc, disc.flip(0))
    # of a disc, and of the pixel that samples it
    assert float((disc * torch.from_numpy(x**2 + y**2)).sum()) == pytest.approx(
        radius**2 / 2 + 1 / 6, rel=0.05
    )


def test_one_radius_is_a_convolution_in_linear_light():
    found = disc_blur(CAT, torch.full(CAT.shape[1:], 3.0))
    linear = to_linear(CAT).numpy()
    kernel = disc_kernel(3)
    expected = [ndimage.convolve(x, kernel.numpy(), mode="reflect") for x in linear]
    expected = to_srgb(torch.from_numpy(np.stack(expected)).clamp(0, 1))
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=0)


def test_the_blur_follows_the_field():
    """Sharp where the radius is zero, and as one radius makes it where that radius is."""
    radius = torch.zeros(CAT.shape[1:])
    radius[:, 65:] = 4
    found = disc_blur(CAT, radius)
    torch.testing.assert_close(found[..., :65], CAT[..., :65], atol=1e-5, rtol=0)
    all_over = disc_blur(CAT, torch.full(CAT.shape[1:], 4.0))
    torch.testing.assert_close(found[..., 65:], all_over[..., 65:], atol=1e-5, rtol=0)


def test_defocus_has_all_radii():
    degraded = Defocus(radius=(0, 6), noise=0)(CAT, random())
    error = ndimage.uniform_filter((degraded - CAT).square().sum(0).numpy(), 9)
    assert error.min() < error.max() / 100
    alike = Defocus(radius=(2, 2), varying=False, noise=0)(CAT, random())
    expected = disc_blur(CAT, torch.full(CAT.shape[1:], 2.0))
    torch.testing.assert_close(alike, expected)


@settings(deadline=None, max_examples=30)
@given(
    height=st.integers(1, 40),
    width=st.integers(1, 40),
    channels=st.integers(1, 3),
    name=st.sampled_from([*BLURS]),
    seed=st.integers(0, 9),
)
def test_any_size_gives_the_same_picture_for_the_same_seed(height, width, channels, name, seed):
    clean = torch.from_numpy(random(seed).random((channels, height, width), np.float32))
    degraded = BLURS[name]()(clean, random(seed))
    assert degraded.shape == clean.shape
    assert degraded.dtype == torch.float32
    assert degraded.min() >= 0
    assert degraded.max() <= 1
    assert torch.equal(degraded, BLURS[name]()(clean, random(seed)))


@pytest.mark.parametrize("degradation", [STILL, Motion(STILL, objects=(0, 0))])
def test_nothing_moves_nothing_changes(degradation):
    torch.testing.assert_close(degradation(CAT, random()), CAT, atol=1e-5, rtol=0)


@pytest.mark.parametrize("degradation", [Shake(noise=0), Motion(), Defocus(noise=0)])
def test_an_even_picture_stays_even(degradation):
    even = torch.full((3, 50, 60), 0.4)
    degraded = degradation(even, random(1))
    noise = 2 / 255 if isinstance(degradation, Motion) else 0
    assert float((degraded - even).std()) == pytest.approx(noise, abs=2e-4)
    assert float((degraded - even).mean()) == pytest.approx(0, abs=4e-4)


@pytest.mark.parametrize("blur", ["shift", "rotation", "zoom"])
def test_the_camera_moves_as_far_as_it_may(blur):
    """The largest displacement of any pixel, against the way's length by hand."""
    reach = {"shift": (5, 5), "rotation": (2, 2), "zoom": (3, 3)}[blur]
    moments = Shake(**{"shift": (0, 0), blur: reach}, samples=51).moments((90, 120), random(2))
    corners = torch.tensor([[0.0, 0, 1], [119, 0, 1], [0, 89, 1], [119, 89, 1], [60, 45, 1]])
    moved = torch.stack([corners @ m.T - corners[:, :2] for m in moments])
    if blur == "shift":
        assert torch.allclose(moved[:, :1].expand_as(moved), moved, atol=1e-4)  # alike everywhere
        assert float(moved.norm(dim=-1).max()) == pytest.approx(5, rel=1e-3)
        return
    angle, scale = (np.deg2rad(2), 1) if blur == "rotation" else (0, 1.03)
    linear = torch.stack([m[:, :2] for m in moments])
    found = (
        linear[:, 1, 0].abs().max() if blur == "rotation" else linear[:, 0, 0].sub(1).abs().max()
    )
    expected = np.sin(angle) if blur == "rotation" else scale - 1
    assert float(found) == pytest.approx(expected, rel=1e-3)
    # one point of the picture stays where it is
    fixed = torch.linalg.solve(torch.eye(2) - linear[0].double(), moments[0][:, 2].double())
    for moment in moments:
        m = moment.double()
        torch.testing.assert_close(m[:, :2] @ fixed + m[:, 2], fixed, atol=2e-3, rtol=0)


def test_warping_agrees_with_scikit_image():
    source = torch.tensor([[0.98, -0.05, 3.2], [0.04, 1.01, -2.1]])
    found = warp(CAT, source).numpy()
    matrix = np.vstack([source.numpy(), [0, 0, 1]])
    expected = np.stack([transform.warp(x, matrix, order=3) for x in CAT.double().numpy()])
    # both cubic, scikit-image by splines
    inside = (slice(None), slice(10, -10), slice(10, -10))
    assert np.abs(found - expected)[inside].mean() < 4e-3


def test_a_straight_way_blurs_along_it_alone():
    """A vertical edge stays sharp under a vertical shake, as convolution says."""
    edge = torch.zeros(1, 40, 40)
    edge[..., 20:] = 1
    light = to_linear(edge)
    total = sum(
        warp(light, torch.tensor([[1.0, 0, 0], [0, 1, float(shift)]])) for shift in range(-4, 5)
    )
    torch.testing.assert_close(total / 9, light)
    across = sum(
        warp(light, torch.tensor([[1.0, 0, float(shift)], [0, 1, 0]])) for shift in range(-4, 5)
    )
    kernel = np.ones((1, 9)) / 9
    expected = signal.convolve2d(light[0].numpy(), kernel, mode="same", boundary="symm")
    assert np.allclose((across / 9)[0].numpy(), expected, atol=1e-5)


def test_things_move_alone():
    """With a still camera only what lies near a thing changes."""
    motion = Motion(STILL, objects=(1, 1), size=(0.3, 0.3), speed=(6, 6))
    changed = (motion(CAT, random(5)) - CAT).abs().sum(0) > 1e-3
    assert 0.01 < float(changed.float().mean()) < 0.4


def test_ways_are_smooth_and_reach_one():
    for seed in range(20):
        way = smooth_way(random(seed), 101, 2)
        assert np.abs(way.mean(0)).max() < 1e-9
        assert np.hypot(*way.T).max() == pytest.approx(1)
        assert np.hypot(*np.diff(way, axis=0).T).max() < 0.25


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Defocus(radius=(4, 2)), "radius=.*lowest, highest"),
        (lambda: Shake(rotation=(0, 90)), "rotation=.*from 0 to 45"),
        (lambda: Motion(size=(0.1, 2)), "size="),
        (lambda: Motion(objects=(1,)), "objects="),
        (lambda: Defocus(cells=0), "cells=0"),
        (lambda: Shake(samples=0), "samples=0"),
        (lambda: Defocus(noise=-1), "noise=.-1, -1"),
    ],
)
def test_what_cannot_be_is_said(make, words):
    with pytest.raises(FullresError, match=words):
        make()
