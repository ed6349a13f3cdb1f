"""Networks before and after conversion: gains, multiply-adds, names."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import fullres as fr
from fullres.errors import FullresError
from fullres.evaluate import evaluate
from fullres.networks.spec import Network, Spec
from fullres.studies.modules import _named, modules, multiply_adds

SIZES = ((40, 80), (48, 90), (33, 70))


class Squeezed(nn.Module):
    """Squeeze-and-excitation, with its squeeze told apart."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.weigh = nn.Conv2d(3, 3, 1)

    def forward(self, x):
        return x * self.weigh(self.pool(x)).sigmoid()


def test_multiply_adds_of_a_pointwise_head_grow_with_the_windows_it_sees():
    module = nn.Sequential(
        nn.Conv2d(3, 5, 3, padding=1), nn.AdaptiveAvgPool2d(1), nn.Conv2d(5, 7, 1)
    )
    body = 40 * 50 * 3 * 5 * 9
    assert multiply_adds(module, (1, 3, 40, 50)) == body + 5 * 7
    net = Squeezed().eval()
    assert multiply_adds(net, (2, 3, 40, 50)) == 2 * 3 * 3
    with fr.convert(net, fr.Local(16, 20)):
        # one head for each window that the map holds; before the mean it would be one a position
        assert 21 * 31 * 9 <= multiply_adds(net, (1, 3, 40, 50)) <= 40 * 50 * 9


def test_multiply_adds_of_a_network_that_looks_at_values():
    class Looks(nn.Module):
        def forward(self, x):
            return x @ x.mT if float(x.sum()) >= 0 else x

    assert multiply_adds(Looks(), (1, 1, 4, 6)) == 4 * 4 * 6


def test_rows_are_evaluations(pairs):
    folder, _ = pairs(*SIZES)
    torch.manual_seed(0)
    squeezed = Network(Squeezed().eval(), Spec("squeezed", {}, 3, 3, train_size=16))
    plain = Network(nn.Conv2d(3, 3, 1).eval(), Spec("plain", {}, 3, 3, train_size=16))
    found = modules([squeezed, plain], folder, size=32)
    first, second = found.rows
    direct = evaluate(squeezed, folder, modes=("global", "local"))
    gains = direct.gains("local")
    assert found.gains["squeezed"] == pytest.approx(gains)
    each = list(gains.values())
    assert (first.gain, first.spread) == pytest.approx((np.mean(each), np.std(each)))
    assert (first.least, first.most) == pytest.approx((min(each), max(each)))
    summary = {s.mode: s.metrics for s in direct.summary()}
    assert first.values == pytest.approx(summary["global"])
    assert first.values_local == pytest.approx(summary["local"])
    assert (first.parameters, first.converted, first.multiply_adds) == (12, 1, 9)
    assert first.multiply_adds_local == 9 * 9 * 9  # windows of 24 × 24 in 32 × 32
    assert (second.converted, second.gain, second.spread) == (0, 0, 0)
    assert second.multiply_adds == second.multiply_adds_local == 32 * 32 * 9
    assert not any("local" in type(part).__module__ for part in squeezed.module.modules())


def test_files(pairs, tmp_path, leaves):
    folder, _ = pairs(*SIZES)
    net = Network(Squeezed().eval(), Spec("squeezed", {}, 3, 3, train_size=16))
    found = modules({"SE": net, "again": net}, folder, size=(32, 48), output=tmp_path)
    assert leaves(tmp_path, "modules")
    with (tmp_path / "modules.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["network"] for row in rows] == ["SE", "again"]
    assert float(rows[0]["values psnr"]) == found.rows[0].values["psnr"]
    assert "32 × 48" in str(found)


def test_networks_get_names_that_tell_them_apart():
    net = Network(nn.Identity(), Spec("unet", {}, 3, 3))
    assert list(_named(["a/se.pth", "b/se.pth", "cbam.pth", net, net])) == [
        "se",
        (Path("b") / "se").as_posix(),
        "cbam",
        "unet",
        "unet 2",
    ]


def test_some_network_is_needed(pairs):
    folder, _ = pairs((20, 30))
    with pytest.raises(FullresError, match="no networks"):
        modules([], folder)
