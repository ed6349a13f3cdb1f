"""Group norm's parts agree with torch's own group norm, in every layout."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

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


def test_gradients_flow():
    x = torch.randn(1, 4, 3, 2, dtype=torch.float64, requires_grad=True)

    def normalised(x):
        mean, var = group_moments(x, 2)
        return group_normalised(x, mean, torch.rsqrt(var + 1e-3), None, None)

    assert torch.autograd.gradcheck(normalised, x)
    assert torch.autograd.gradcheck(
        normalised, x.detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    )
