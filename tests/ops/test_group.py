"""Group norm's parts agree with torch's own group norm, in every layout."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from fullres.ops.group import group_moments, group_normalised


@torch.no_grad()
@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(("channels", "groups"), [(6, 2), (8, 8), (5, 1), (1, 1)])
def test_at_one_pixel_it_is_torchs(channels, groups, memory_format, dtype, affine):
    x = torch.randn(2, channels, 7, 9, dtype=dtype) * 3 + 100
    weight, bias = torch.randn(2, channels, dtype=dtype) if affine else (None, None)
    mean, var = group_moments(x.contiguous(memory_format=memory_format), groups)
    scale = torch.rsqrt(var + 1e-3)
    found = group_normalised(x.contiguous(memory_format=memory_format), mean, scale, weight, bias)
    pixels = x.permute(0, 2, 3, 1).reshape(-1, channels, 1).double()
    wide = [None if t is None else t.double() for t in (weight, bias)]
    exact = F.group_norm(pixels, groups, *wide, eps=1e-3)
    exact = exact.reshape(2, 7, 9, channels).permute(0, 3, 1, 2)
    torch.testing.assert_close(
        found.double(), exact, rtol=0, atol=1e-3 if dtype == torch.float32 else 1e-9
    )


@torch.no_grad()
@settings(max_examples=40)
@given(data=st.data())
def test_any_size_is_near_float64(data):
    groups, size = data.draw(st.sampled_from([(4, 16), (1, 48), (3, 32), (2, 8), (7, 5), (16, 1)]))
    batch, height, width = (data.draw(st.integers(1, most)) for most in (2, 9, 40))
    offset = data.draw(st.sampled_from([0.0, 100.0, -1e4]))
    shape = (batch, groups * size, height, width)
    x = torch.randn(shape).add(offset).contiguous(memory_format=torch.channels_last)
    weight, bias = torch.randn(2, groups * size)
    mean, var = group_moments(x, groups)
    exact = torch.var_mean(x.double().unflatten(1, (groups, size)), dim=2, correction=0)
    near = {"rtol": 1e-6, "atol": 1e-6 * max(1, abs(offset)) ** 0.5}
    torch.testing.assert_close(mean.double(), exact[1], **near)
    torch.testing.assert_close(var.double(), exact[0], **near)
    found = group_normalised(x, mean, var, weight, bias)
    wide = [t.double().repeat_interleave(size, 1) for t in (mean, var)]
    affine = [t.double()[:, None, None] for t in (weight, bias)]
    expected = (x.double() - wide[0]) * wide[1] * affine[0] + affine[1]
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    assert found.is_contiguous(memory_format=torch.channels_last)


def test_values_that_do_not_vary_have_no_variance():
    x = torch.full((1, 48, 5, 7), 123456.7).contiguous(memory_format=torch.channels_last)
    mean, var = group_moments(x, 3)
    assert (mean == x[:, :3]).all()
    assert (var == 0).all()


def test_gradients_flow():
    x = torch.randn(1, 4, 3, 2, dtype=torch.float64, requires_grad=True)

    def normalised(x):
        mean, var = group_moments(x, 2)
        return group_normalised(x, mean, torch.rsqrt(var + 1e-3), None, None)

    assert torch.autograd.gradcheck(normalised, x)
    assert torch.autograd.gradcheck(
        normalised, x.detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    )
