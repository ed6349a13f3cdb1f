"""Losses, by hand and by their laws."""

from __future__ import annotations

import math

import pytest
import torch

from fullres.training.losses import LOSSES, weighted


def test_by_hand():
    target = torch.zeros(2, 3, 8, 8, dtype=torch.float64)
    restored = target.clone()
    restored[0] += 0.1
    restored[1] += 0.01
    assert LOSSES["l1"](restored, target) == pytest.approx(0.055)
    assert LOSSES["mse"](restored, target) == pytest.approx((0.01 + 0.0001) / 2)
    # 20 and 40 dB
    assert LOSSES["psnr"](restored, target) == pytest.approx(-30, abs=1e-3)
    each = (math.sqrt(0.01 + 1e-6) + math.sqrt(0.0001 + 1e-6)) / 2
    assert LOSSES["charbonnier"](restored, target) == pytest.approx(each)
    # a constant difference has one Fourier coefficient of 8 × 5: 64 times the constant
    assert LOSSES["fft"](restored, target) == pytest.approx(64 * 0.055 / 40)


def test_edges_do_not_see_constants():
    """A constant has no Laplacian: away from the borders the loss is that of zero."""
    x = torch.rand(1, 3, 32, 32, dtype=torch.float64)
    assert LOSSES["edge"](x, x) == pytest.approx(1e-3)
    step = x.clone()
    step[..., 16:] += 0.3
    assert LOSSES["edge"](step, x) > 2e-3


@pytest.mark.parametrize("name", LOSSES)
def test_least_where_the_pictures_are_equal_and_differentiable(name):
    target = torch.rand(2, 3, 12, 9, dtype=torch.float64)
    restored = (target + 0.1 * torch.rand_like(target)).requires_grad_()
    loss = LOSSES[name](restored, target)
    assert loss > LOSSES[name](target, target)
    loss.backward()
    assert restored.grad.isfinite().all()
    assert restored.grad.abs().sum() > 0


def test_all_outputs_count():
    target = torch.rand(1, 3, 8, 8)
    outputs = [target + 0.1, target - 0.2]
    found = weighted({"l1": 2.0, "mse": 1.0}, outputs, target)
    assert float(found) == pytest.approx(2 * 0.3 + 0.01 + 0.04, rel=1e-5)
