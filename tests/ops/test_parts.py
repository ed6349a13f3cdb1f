"""Maps in parts: the same as in one piece, whatever the parts."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch._subclasses import FakeTensorMode

import fullres as fr
from fullres.ops import parts
from fullres.ops.parts import in_parts


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setitem(parts.BUDGET, "cpu", 2**13)


def chain(channels):
    torch.manual_seed(channels)
    return nn.Sequential(
        nn.Conv2d(channels, 6, 1), nn.GELU(), nn.Conv2d(6, 6, 3, padding=1, groups=6), nn.GELU(),
        nn.Conv2d(6, 2, 3, padding=1),
    ).double()  # fmt: skip


@settings(max_examples=30, deadline=None)
@given(
    batch=st.integers(1, 3),
    channels=st.integers(1, 4),
    height=st.integers(1, 90),
    width=st.integers(1, 90),
    last=st.booleans(),
    strided=st.booleans(),
)
def test_the_same_as_in_one_piece(batch, channels, height, width, last, strided):
    function, step = chain(channels), 1 + strided
    x = torch.rand(batch, channels, height * step, width, dtype=torch.float64)
    x = x.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
    x = x[:, :, ::step]
    with torch.inference_mode():
        torch.testing.assert_close(in_parts(function, x, channels=6, halo=2), function(x))


@settings(max_examples=40, deadline=None)
@given(
    batch=st.integers(1, 2),
    halo=st.integers(0, 12),
    height=st.integers(1, 90),
    width=st.integers(1, 90),
    last=st.booleans(),
    strided=st.booleans(),
)
def test_in_place_the_same_in_the_memory_of_the_map(batch, halo, height, width, last, strided):
    torch.manual_seed(halo)
    conv = nn.Conv2d(4, 4, 2 * halo + 1, padding=halo, groups=4, dtype=torch.float64)
    form = torch.channels_last if last else torch.contiguous_format
    x, y = torch.rand(2, batch, 4, height * (1 + strided), width, dtype=torch.float64)
    x = x.contiguous(memory_format=form)[:, :, :: 1 + strided]
    y = y[:, :, :height]

    def function(x, y):
        return conv(x) * y + x

    with torch.inference_mode():
        expected, before = function(x, y), y.clone()
        found = in_parts(function, x, y, channels=6, halo=halo, in_place=True)
        torch.testing.assert_close(found, expected)
        assert (found is x) == (height * width > 2 * (2**13 // (6 * 8)))
        assert torch.equal(y, before)


def test_in_place_only_where_no_derivatives_are_recorded():
    x = torch.rand(1, 4, 64, 96, requires_grad=True)
    before = x.detach().clone()
    in_parts(lambda x: x * 2, x, channels=4, in_place=True).sum().backward()
    assert torch.equal(x.detach(), before)
    assert torch.equal(x.grad, torch.full_like(x, 2))


def test_several_maps_and_a_vector():
    x, y = torch.rand(2, 2, 3, 70, 80).unbind()
    weights = torch.rand(2, 3, 1, 1)
    with torch.inference_mode():
        z = in_parts(lambda a, b, w: a + b * w, x, y, weights, channels=3)
    torch.testing.assert_close(z, x + y * weights)


def test_it_runs_in_parts_but_while_derivatives_are_recorded():
    sizes = []

    def function(x):
        sizes.append(tuple(x.shape[2:]))
        return x * 2

    x = torch.rand(1, 4, 64, 96, requires_grad=True)
    in_parts(function, x, channels=4).sum().backward()
    assert sizes == [(64, 96)]
    assert torch.equal(x.grad, torch.full_like(x, 2))
    sizes.clear()
    with torch.no_grad():
        in_parts(function, x, channels=4)
    assert len(sizes) > 8
    assert max(h * w for h, w in sizes) * 16 <= 2 * 2**13
    sizes.clear()
    with torch.no_grad(), FakeTensorMode():
        assert in_parts(function, torch.rand(1, 4, 64, 96), channels=4).shape == (1, 4, 64, 96)
    assert len(sizes) == 1


@pytest.mark.parametrize("local", [None, fr.Local(32), fr.Local(32, (20, 28), stride=8)])
@pytest.mark.parametrize("last", [True, False])
def test_restormer_in_parts(monkeypatch, local, last):
    torch.manual_seed(1)
    options = {"dim": 4, "num_blocks": [1] * 4, "heads": [1, 2, 2, 2], "num_refinement_blocks": 1}
    module = fr.create_network("restormer", **options).module.double()
    x = torch.rand(2, 3, 75, 94, dtype=torch.float64)
    x = x.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
    if local:
        fr.convert(module, local)
    with torch.inference_mode():
        in_pieces = module(x)
        monkeypatch.setitem(parts.BUDGET, "cpu", 2**40)
        torch.testing.assert_close(in_pieces, module(x), atol=1e-12, rtol=0)
