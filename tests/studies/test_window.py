"""Sizes of windows: gains against evaluations of each, and the choice on half of the pictures."""

from __future__ import annotations

import csv

import numpy as np
import pytest
from torch import nn

from fullres.errors import FullresError
from fullres.evaluate import evaluate
from fullres.local import NothingToConvert
from fullres.studies.window import window

SIZES = ((40, 80), (48, 90), (33, 70), (36, 100), (32, 64))


def test_every_window_is_an_evaluation(gated, pairs):
    folder, _ = pairs(*SIZES)
    network = gated(nn.AdaptiveAvgPool2d(1))
    found = window(network, folder, (3, 1))
    assert [row.factor for row in found.rows] == [1, 3, None]
    assert [row.window for row in found.rows] == [(16, 16), (48, 48), None]
    assert found.metric == "psnr"
    for index, side in enumerate((16, 48)):
        direct = evaluate(network, folder, modes=("global", "local"), window=side)
        gains = direct.gains("local")
        assert {name: each[index] for name, each in found.gains.items()} == pytest.approx(gains)
        row, each = found.rows[index], list(gains.values())
        assert (row.least, row.most) == pytest.approx((min(each), max(each)))
        assert (row.gain, row.spread) == pytest.approx((np.mean(each), np.std(each)))
        values = [r.metrics["psnr"] for r in direct.of("local").values()]
        assert row.value == pytest.approx(np.mean(values))


def test_the_best_window_is_chosen_on_every_other_picture(gated, pairs):
    folder, _ = pairs(*SIZES)
    found = window(gated(nn.AdaptiveAvgPool2d(1)), folder, (0.5, 1, 2))
    gains = np.array(list(found.gains.values()))  # (pictures, windows)
    choosing, others = gains[::2].mean(0), gains[1::2].mean(0)
    best = int(choosing.argmax())
    assert found.best is found.rows[best]
    assert found.chosen_gain == pytest.approx(choosing[best])
    assert found.held_out_gain == pytest.approx(others[best])


def test_a_window_that_covers_the_pictures_gains_nothing(gated, pairs):
    folder, _ = pairs((20, 30))
    found = window(gated(nn.AdaptiveAvgPool2d(1)), folder, (1, 2))
    assert [row.gain for row in found.rows[1:]] == [0, 0]
    assert found.rows[0].gain != 0
    assert found.held_out_gain is None  # the only picture chose


def test_files(gated, pairs, tmp_path, leaves):
    folder, _ = pairs(*SIZES)
    found = window(gated(nn.AdaptiveAvgPool2d(1)), folder, (1, 2), output=tmp_path)
    assert leaves(tmp_path, "window")
    with (tmp_path / "window.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["gain"]) for row in rows] == [row.gain for row in found.rows]
    assert [row["window"] for row in rows] == ["16 × 16", "32 × 32", ""]
    assert "5 pictures in all" in str(found)


def test_a_factor_is_positive(gated, pairs):
    folder, _ = pairs((20, 30))
    for factors in ((), (1, 0), (-1,)):
        with pytest.raises(FullresError, match="above 0"):
            window(gated(nn.AdaptiveAvgPool2d(1)), folder, factors)


def test_a_network_without_global_operations_has_no_windows(gated, pairs, tmp_path):
    folder, _ = pairs((20, 30))
    with pytest.raises(NothingToConvert, match="nothing to convert in Gated"):
        window(gated(nn.Conv2d(3, 3, 1)), folder, output=tmp_path / "study")
    assert not (tmp_path / "study").exists()
