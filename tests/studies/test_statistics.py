"""Distributions of aggregated statistics, against statistics computed directly."""

from __future__ import annotations

import csv
import math
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import wasserstein_distance
from torch import nn

from fullres.errors import FullresError
from fullres.networks.spec import Network, Spec
from fullres.studies.aggregates import _at_positions
from fullres.studies.statistics import figure, kolmogorov_smirnov, statistics, wasserstein

SIZES = ((40, 56), (48, 36), (33, 47))


def windows_at(x, window, side):
    """Windows around side × side positions of (C, H, W), moved inside where they reach out."""
    for i in range(side):
        for j in range(side):
            place = []
            for n, k, index in zip(x.shape[1:], window, (i, j), strict=True):
                middle = int((index + 0.5) * n / side)
                place.append(min(max(middle - (min(k, n) - 1) // 2, 0), n - min(k, n)))
            yield x[:, place[0] : place[0] + window[0], place[1] : place[1] + window[1]]


def test_means_of_full_pictures_are_those_computed_directly(gated, pairs):
    folder, pictures = pairs(*SIZES)
    found = statistics(gated(nn.AdaptiveAvgPool2d(1)), folder, crops=20)
    samples = found.samples["aggregate", "mean"]
    np.testing.assert_allclose(samples.whole, [x.mean((1, 2)).numpy() for x in pictures], rtol=1e-5)
    side = math.isqrt(len(samples.local) // len(pictures))
    assert found.local.window == (24, 24)
    expected = [p.mean((1, 2)).numpy() for x in pictures for p in windows_at(x, (24, 24), side)]
    np.testing.assert_allclose(samples.local, expected, rtol=1e-5)
    assert [(row.operation, row.kind, row.statistic) for row in found.rows] == [
        ("aggregate", "average pool", "mean")
    ]
    assert not found.not_covered


def test_crops_are_of_the_training_size_and_of_the_training_pictures(gated, pairs):
    folder, _ = pairs((64, 64))
    training, (picture,) = pairs((18, 17), folder="training")
    found = statistics(gated(nn.AdaptiveAvgPool2d(1)), folder, training, crops=100)
    crops = [
        picture[:, top : top + 16, left : left + 16].mean((1, 2)).numpy()
        for top in range(3)
        for left in range(2)
    ]
    values = found.samples["aggregate", "mean"].training
    assert len(values) == 100
    distance = np.abs(values[:, None] - np.array(crops)[None]).max(2)
    assert distance.min(1).max() < 1e-6
    assert set(distance.argmin(1)) == set(range(6))  # every place is taken


def test_maxima(gated, pairs):
    folder, pictures = pairs(*SIZES)
    found = statistics(gated(nn.AdaptiveMaxPool2d(1)), folder, crops=20)
    samples = found.samples["aggregate", "maximum"]
    np.testing.assert_allclose(samples.whole, [x.amax((1, 2)).numpy() for x in pictures])
    side = math.isqrt(len(samples.local) // len(pictures))
    expected = [p.amax((1, 2)).numpy() for x in pictures for p in windows_at(x, (24, 24), side)]
    np.testing.assert_allclose(samples.local, expected)


@pytest.mark.parametrize(("norm", "groups"), [(nn.InstanceNorm2d(3), 3), (nn.GroupNorm(1, 3), 1)])
def test_norms_have_a_mean_and_a_standard_deviation_a_group(gated, pairs, norm, groups):
    folder, pictures = pairs(*SIZES)
    found = statistics(gated(norm), folder, crops=20)
    side = math.isqrt(len(found.samples["aggregate", "mean"].local) // len(pictures))
    for statistic, of in (("mean", torch.mean), ("standard deviation", None)):
        samples = found.samples["aggregate", statistic]

        def directly(x, of=of):
            x = x.reshape(groups, -1)
            return (x.mean(1) if of else x.std(1, correction=0)).numpy()

        np.testing.assert_allclose(samples.whole, [directly(x) for x in pictures], rtol=1e-4)
        parts = [directly(p) for x in pictures for p in windows_at(x, (24, 24), side)]
        np.testing.assert_allclose(samples.local, parts, rtol=1e-4)
        assert samples.training.shape == (20, groups)


def test_nothing_lies_apart_where_pictures_are_as_large_as_crops(gated, pairs):
    folder, _ = pairs((16, 16))
    found = statistics(gated(nn.AdaptiveAvgPool2d(1)), folder, crops=3, train_size=16)
    samples = found.samples["aggregate", "mean"]
    assert (
        np.ptp(np.concatenate([samples.training, samples.whole, samples.local]), axis=0).max() == 0
    )
    assert found.rows[0].channels == 0  # nothing varies, so there is nothing to measure by
    assert math.isnan(found.rows[0].whole)


def test_local_and_global_lie_equally_far_where_the_window_covers_the_pictures(gated, pairs):
    folder, _ = pairs(*SIZES)
    found = statistics(gated(nn.AdaptiveAvgPool2d(1)), folder, crops=20, window=64)
    (row,) = found.rows
    assert row.local == pytest.approx(row.whole, rel=1e-6)
    assert row.whole > 0
    assert row.channels == 3


def test_local_statistics_are_nearer_to_training_where_pictures_vary(gated, pairs):
    folder, _ = pairs((60, 200), (70, 180))  # brightness rises from left to right
    found = statistics(gated(nn.AdaptiveAvgPool2d(1)), folder, crops=200)
    (row,) = found.rows
    assert row.local < 0.4 < 0.6 < row.whole


def test_distance_is_over_the_standard_deviation_of_a_channel(gated, pairs):
    folder, _ = pairs(*SIZES)
    found = statistics(gated(nn.AdaptiveAvgPool2d(1)), folder, crops=30)
    samples = found.samples["aggregate", "mean"]
    for values, distance in (
        (samples.whole, found.rows[0].whole),
        (samples.local, found.rows[0].local),
    ):
        directly = [
            wasserstein_distance(samples.training[:, c], values[:, c])
            / samples.training[:, c].std()
            for c in range(3)
        ]
        assert distance == pytest.approx(np.mean(directly))


@given(st.integers(1, 30), st.integers(1, 30), st.integers(0, 2**32 - 1))
def test_distances_are_those_of_their_definitions(n, m, seed):
    random = np.random.default_rng(seed)
    a, b = random.standard_normal((n, 3)).round(1), random.standard_normal((m, 3)).round(1)
    expected = [wasserstein_distance(a[:, c], b[:, c]) for c in range(3)]
    np.testing.assert_allclose(wasserstein(a, b), expected, atol=1e-12)
    at = np.concatenate([a, b])[:, None]
    expected = np.abs((a <= at).mean(1) - (b <= at).mean(1)).max(0)
    np.testing.assert_allclose(kolmogorov_smirnov(a, b), expected, atol=1e-12)


@given(st.integers(1, 20), st.integers(1, 20), st.integers(2, 6))
def test_positions_have_the_window_that_edge_replication_gives_them(length, window, side):
    from fullres.ops.box import local_mean

    x = torch.rand(1, 2, length, length + 3, generator=torch.Generator().manual_seed(length))
    at = [((torch.arange(side) + 0.5) * n / side).long() for n in x.shape[2:]]
    clipped = (min(window, x.shape[2]), min(window, x.shape[3]))
    inner = local_mean(x, clipped, replicate=False)
    expected = local_mean(x, clipped)[:, :, at[0]][..., at[1]].flatten(2)
    assert torch.equal(_at_positions(inner, (x.shape[2], x.shape[3]), side), expected)


def test_the_same_seed_cuts_the_same_crops(gated, pairs):
    folder, _ = pairs(*SIZES)
    network = gated(nn.AdaptiveAvgPool2d(1))
    first, second, other = (statistics(network, folder, crops=9, seed=s) for s in (1, 1, 2))
    key = ("aggregate", "mean")
    assert np.array_equal(first.samples[key].training, second.samples[key].training)
    assert not np.array_equal(first.samples[key].training, other.samples[key].training)


def test_what_is_not_covered_is_named(pairs):
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.pool = nn.AdaptiveAvgPool2d(1)

        def forward(self, x):
            return x * self.pool(x) + x.mean((2, 3), keepdim=True)

    folder, _ = pairs((40, 40))
    found = statistics(
        Network(Both().eval(), Spec("both", {}, 3, 3, train_size=16)), folder, crops=4
    )
    assert [row.operation for row in found.rows] == ["pool"]
    ((name, reason),) = found.not_covered.items()
    assert "test_statistics.py" in name
    assert "function" in reason
    assert reason in str(found)


def test_files(gated, pairs, tmp_path, leaves):
    folder, _ = pairs(*SIZES)
    network = gated(nn.Sequential(nn.InstanceNorm2d(3), nn.AdaptiveAvgPool2d(1)))
    found = statistics(network, folder, crops=20, output=tmp_path / "out", layer="aggregate.1")
    assert leaves(tmp_path / "out", "statistics")
    with (tmp_path / "out" / "statistics.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["local"]) for row in rows] == [row.local for row in found.rows]
    assert [row["operation"] for row in rows] == ["aggregate.0", "aggregate.0", "aggregate.1"]
    assert found.rows[0].operation in (tmp_path / "out" / "statistics.md").read_text("utf-8")
    with pytest.raises(FullresError, match=r"choose one of aggregate\.0, aggregate\.1"):
        figure(found, "middle")


def test_errors(gated, pairs, monkeypatch, tmp_path):
    folder, _ = pairs((20, 30))
    pool = nn.AdaptiveAvgPool2d(1)
    with pytest.raises(FullresError, match="choose one of aggregate"):
        statistics(gated(pool), folder, layer="nowhere")
    with pytest.raises(FullresError, match="no pooling and no norm"):
        statistics(gated(nn.Conv2d(3, 3, 1)), folder)
    with pytest.raises(FullresError, match="no picture holds a crop of 64 × 64"):
        statistics(gated(pool, 64), folder)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(FullresError, match=r"pip install 'fullres\[study\]'"):
        statistics(gated(pool), folder, output=tmp_path)
    assert statistics(gated(pool), folder, crops=4).rows  # numbers need no matplotlib
