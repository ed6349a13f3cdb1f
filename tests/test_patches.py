"""Patch-wise inference and the measure of its seams."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from fullres.errors import FullresError
from fullres.patches import restore_patches, seams

sides = st.integers(1, 40)


def by_hand(network, x, size, overlap):
    """Patches one by one, each placed in a picture of its own."""
    rows, columns = (
        sorted({min(k, max(n - side, 0)) for k in range(0, n, side - overlap)})
        for n, side in zip(x.shape[-2:], size, strict=True)
    )
    placed = []
    for top in rows:
        for left in columns:
            y = network(x[..., top : top + size[0], left : left + size[1]])
            scale = y.shape[-1] // min(size[1], x.shape[-1])
            whole = y.new_full((*y.shape[:2], *(scale * n for n in x.shape[-2:])), torch.nan)
            top_, left_ = top * scale, left * scale
            whole[..., top_ : top_ + y.shape[-2], left_ : left_ + y.shape[-1]] = y
            placed.append(whole)
    return torch.stack(placed).nanmean(0)


def mean_free(x):
    return x - x.mean((2, 3), keepdim=True)


@settings(deadline=None, max_examples=60)
@given(sides, sides, sides, sides, st.integers(0, 20), st.integers(1, 9), st.integers(1, 2))
def test_it_is_the_mean_of_the_patches_that_cover_a_pixel(h, w, rows, columns, overlap, batch, b):
    overlap = min(overlap, rows - 1, columns - 1)
    x = torch.rand(b, 2, h, w, dtype=torch.float64)
    y = restore_patches(mean_free, x, (rows, columns), overlap, batch)
    torch.testing.assert_close(y, by_hand(mean_free, x, (rows, columns), overlap))


@pytest.mark.parametrize("size", [(20, 31), 31, (64, 64)])
def test_a_patch_that_covers_the_picture_gives_the_networks_own_output(size):
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 3, 3, padding=1), torch.nn.InstanceNorm2d(3))
    x = torch.rand(2, 3, 20, 31)
    assert torch.equal(restore_patches(network, x, size), network(x))


def test_patches_that_do_not_overlap_are_the_networks_own():
    x = torch.rand(1, 3, 32, 48)
    y = restore_patches(mean_free, x, 16, batch=1)
    for top in range(0, 32, 16):
        for left in range(0, 48, 16):
            at = (..., slice(top, top + 16), slice(left, left + 16))
            torch.testing.assert_close(y[at], mean_free(x[at]))


def test_the_scale_is_the_networks():
    def doubled(x):
        return mean_free(F.interpolate(x, scale_factor=2))

    x = torch.rand(1, 3, 20, 30, dtype=torch.float64)
    y = restore_patches(doubled, x, (8, 12), 3)
    assert y.shape == (1, 3, 40, 60)
    torch.testing.assert_close(y, by_hand(doubled, x, (8, 12), 3))


def test_runs_hold_no_more_patches_than_asked_for():
    seen = []

    def network(x):
        seen.append(len(x))
        return x

    restore_patches(network, torch.rand(2, 1, 30, 50), 10, batch=4)
    assert seen == [8, 8, 8, 6]


@pytest.mark.parametrize(("size", "overlap"), [(8, 8), (8, -1), ((8, 4), 4), (0, 0)])
def test_overlaps_that_cannot_be(size, overlap):
    with pytest.raises(FullresError, match="give an overlap from 0"):
        restore_patches(mean_free, torch.rand(1, 1, 20, 20), size, overlap)
    with pytest.raises(FullresError, match="give an overlap from 0"):
        seams(torch.rand(20, 20), torch.rand(20, 20), size, overlap)


def test_a_batch_of_none():
    with pytest.raises(FullresError, match="1 or more"):
        restore_patches(mean_free, torch.rand(1, 1, 20, 20), 8, batch=0)


@settings(deadline=None, max_examples=40)
@given(st.integers(2, 30), st.integers(2, 30), st.integers(2, 12), st.integers(0, 11))
def test_seams_by_counting(h, w, size, overlap):
    overlap = min(overlap, size - 1)
    restored, target = torch.rand(2, 3, h, w, dtype=torch.float64)
    error = (restored - target).numpy()
    lines = []
    for n in (h, w):
        starts = {min(k, max(n - size, 0)) for k in range(0, n, size - overlap)}
        lines.append({e for s in starts for e in (s, s + size) if 0 < e < n})
    across, elsewhere = [], []
    for i in range(1, h):
        (across if i in lines[0] else elsewhere).extend(abs(error[:, i] - error[:, i - 1]).ravel())
    for j in range(1, w):
        jump = abs(error[:, :, j] - error[:, :, j - 1]).ravel()
        (across if j in lines[1] else elsewhere).extend(jump)
    if not across:
        expected = 1.0
    elif not elsewhere:
        expected = float("inf")
    else:
        expected = (sum(across) / len(across)) / (sum(elsewhere) / len(elsewhere))
    assert seams(restored, target, size, overlap) == pytest.approx(expected)


def test_seams_show_what_patches_do():
    torch.manual_seed(0)
    target = torch.rand(1, 3, 64, 96) * torch.linspace(0.1, 1, 96)
    patched = restore_patches(mean_free, target, 16)
    assert 0.9 < seams(torch.rand_like(target), target, 16) < 1.1
    assert seams(patched, target, 16) > 100  # within a patch the error is one constant
    overlapping = restore_patches(mean_free, target, 16, 8)
    assert 1 < seams(overlapping, target, 16, 8) < seams(patched, target, 16)


def test_seams_of_different_pictures():
    with pytest.raises(FullresError, match="one shape"):
        seams(torch.rand(3, 8, 8), torch.rand(3, 8, 9), 4)
