"""Whole, local and patch by patch: metrics, seams, and where they are worst."""

from __future__ import annotations

import csv

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fullres.errors import FullresError
from fullres.evaluate import evaluate
from fullres.studies.methods import methods, worst_box

SIZES = ((40, 90), (48, 80), (33, 100))


def test_rows_are_evaluations(gated, pairs):
    folder, _ = pairs(*SIZES)
    network = gated(nn.AdaptiveAvgPool2d(1))
    found = methods(network, folder, (0, 4))
    modes = ("global", "local", "patches", "patches-4")
    direct = evaluate(network, folder, modes=modes)
    summary = {s.mode: s for s in direct.summary()}
    assert [row.method for row in found.rows] == list(modes)
    assert [row.overlap for row in found.rows] == [None, None, 0, 4]
    for row in found.rows:
        assert row.values == pytest.approx(summary[row.method].metrics)
        assert row.gain == pytest.approx(summary[row.method].gain or 0)
        assert row.seconds_per_megapixel > 0


def test_seams_are_those_of_patches(gated, pairs):
    folder, _ = pairs(*SIZES, noise=1)
    found = methods(gated(nn.AdaptiveAvgPool2d(1)), folder)
    seams = {row.method: row.seams for row in found.rows}
    assert list(seams) == ["global", "local", "patches", "patches-1", "patches-8"]
    assert seams["global"] == 1
    assert 0.9 < seams["local"] < 1.1 < seams["patches"]


def test_a_pointwise_network_gives_the_same_in_every_way(gated, pairs):
    folder, _ = pairs(*SIZES)
    found = methods(gated(nn.Conv2d(3, 3, 1)), folder, (0, 8))
    assert [row.seams for row in found.rows] == pytest.approx(4 * [1], rel=1e-4)
    assert [row.gain for row in found.rows] == pytest.approx(4 * [0], abs=1e-4)


def test_the_crops_are_where_the_patches_part(gated, pairs):
    folder, _ = pairs(*SIZES)
    crops = methods(gated(nn.AdaptiveAvgPool2d(1)), folder, (0,)).crops
    assert list(crops.shown) == ["input", "global", "local", "patches", "target"]
    assert {tuple(crop.shape) for crop in crops.shown.values()} == {
        tuple(crops.shown["input"].shape)
    }
    change = (crops.shown["patches"] - crops.shown["global"]).diff(dim=2).abs().mean((0, 1))
    at_borders = [change[line - 1] for line in crops.lines[1] if line]
    elsewhere = change[
        torch.tensor([line + 1 not in crops.lines[1] for line in range(len(change))])
    ]
    assert min(at_borders) > elsewhere.mean()
    assert crops.seams["patches"] == max(crops.seams.values())


@given(st.integers(1, 5), st.integers(9, 80), st.integers(9, 80), st.integers(4, 40))
def test_the_box_lies_within_the_picture(size, height, width, side):
    x = torch.rand(1, height, width, generator=torch.Generator().manual_seed(height))
    rows, columns = worst_box(x, (8 * size, 8 * size), side)
    assert 0 <= rows.start < rows.stop <= height
    assert 0 <= columns.start < columns.stop <= width
    assert rows.stop - rows.start == min(side, height)
    assert columns.stop - columns.start == min(side, width)


def test_files(gated, pairs, tmp_path, leaves):
    folder, _ = pairs(*SIZES)
    found = methods(gated(nn.AdaptiveAvgPool2d(1)), folder, output=tmp_path)
    assert leaves(tmp_path, "methods")
    with (tmp_path / "methods.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["seams"]) for row in rows] == [row.seams for row in found.rows]
    assert "patches, overlap 8" in str(found)


def test_an_overlap_is_smaller_than_a_patch(gated, pairs):
    folder, _ = pairs((20, 30))
    with pytest.raises(FullresError, match="cannot overlap by 16"):
        methods(gated(nn.AdaptiveAvgPool2d(1)), folder, (16,))
