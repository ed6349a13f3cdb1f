"""Depthwise convolution and its gate agree with torch's in float64, whatever the sizes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses import FakeTensorMode

from fullres.ops.depthwise import depthwise, depthwise_geglu

EPS = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 1e-2}


def exact(x, weight, bias, gated):
    x, weight, bias = (None if t is None else t.double() for t in (x, weight, bias))
    y = F.conv2d(x, weight, bias, padding=1, groups=x.shape[1])
    if not gated:
        return y
    a, b = y.chunk(2, 1)
    return F.gelu(a) * b


def drawn(channels, *size, dtype, last=True, scale=1.0):
    generator = torch.Generator().manual_seed(channels)
    x = scale * torch.randn(*size, generator=generator)
    weight, bias = torch.randn(channels, 10, generator=generator).split([9, 1], 1)
    form = torch.channels_last if last else torch.contiguous_format
    x = x.to(dtype).contiguous(memory_format=form)
    return x, weight.reshape(-1, 1, 3, 3).to(dtype), bias.flatten().to(dtype)


@settings(max_examples=60, deadline=None)
@given(
    batch=st.integers(1, 3),
    half=st.integers(1, 70),
    height=st.integers(1, 12),
    width=st.integers(1, 75),
    dtype=st.sampled_from(list(EPS)),
    last=st.booleans(),
    biased=st.booleans(),
    gated=st.booleans(),
)
@torch.no_grad()
def test_agrees_with_float64(batch, half, height, width, dtype, last, biased, gated):
    channels = 2 * half
    x, weight, bias = drawn(
        channels, batch, channels, height, width, dtype=dtype, last=last, scale=3
    )
    bias = bias if biased else None
    found = (depthwise_geglu if gated else depthwise)(x, weight, bias)
    expected = exact(x, weight, bias, gated)
    assert found.dtype == dtype
    error = (found.double() - expected).abs().max()
    assert error <= EPS[dtype] * max(expected.abs().max(), 1)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gate_over_all_numbers(dtype):
    values = torch.tensor([0.0, -0.0, 1e-30, 5.2999, 5.3, -5.3, 40, -40, 1e4, -1e4, 1e30, -1e30])
    a = torch.cat([values, torch.linspace(-7, 7, 500)]).to(dtype)
    x = torch.cat([a, torch.full_like(a, 2)]).reshape(1, -1, 1, 1)
    weight = torch.zeros(x.shape[1], 1, 3, 3, dtype=dtype)
    weight[:, :, 1, 1] = 1
    found = depthwise_geglu(x, weight).flatten().double()
    expected = 2 * F.gelu(a.double())
    bound = 8e-7 if dtype == torch.float32 else 2**-8
    assert torch.all((found - expected).abs() <= bound * expected.abs().clamp_min(1))


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nan_stays_where_it_reaches(dtype):
    x, weight, bias = drawn(64, 1, 64, 9, 11, dtype=dtype)
    x[0, 5, 4, 6] = torch.nan
    reached = torch.zeros(9, 11, dtype=torch.bool)
    reached[3:6, 5:8] = True
    for found in (depthwise(x, weight, bias), depthwise_geglu(x, weight, bias)):
        assert torch.equal(found[0, 5].isnan(), reached)
        assert not found[0, [*range(5), *range(6, 32)]].isnan().any()


@torch.no_grad()
def test_bfloat16_is_rounded_to_nearest_even():
    bits = torch.randint(-(2**31), 2**31 - 1, (4096,), generator=torch.Generator().manual_seed(0))
    exactly = torch.cat([bits.to(torch.int32), torch.tensor([0x3F808000, 0x3F818000])])
    wide = exactly.view(torch.float32)
    wide = wide[wide.isfinite() & (wide.abs() < 1e38)].view(1, -1, 1, 1)
    # a bias in float32 is what the sum is before it is rounded
    from fullres.ops import depthwise_cpu

    x = torch.zeros(wide.shape, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
    weight = torch.zeros(wide.shape[1], 1, 3, 3)
    found = depthwise_cpu.depthwise(x, weight, wide.flatten(), geglu=False)
    assert torch.equal(found, wide.to(torch.bfloat16))


def test_derivatives_are_recorded():
    x, weight, bias = (
        t.requires_grad_() for t in drawn(4, 1, 4, 3, 5, dtype=torch.float64, last=False)
    )
    assert torch.autograd.gradcheck(depthwise, (x, weight, bias))
    assert torch.autograd.gradcheck(depthwise_geglu, (x, weight, bias))
    wide, factors, _ = drawn(64, 1, 64, 3, 5, dtype=torch.float32)
    factors.requires_grad_()
    depthwise_geglu(wide, factors).sum().backward()
    assert factors.grad is not None


@torch.no_grad()
def test_compiled_and_faked():
    x, weight, bias = drawn(64, 1, 64, 6, 7, dtype=torch.float32)
    compiled = torch.compile(depthwise_geglu, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, weight, bias), depthwise_geglu(x, weight, bias))
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        found = depthwise_geglu(mode.from_tensor(x), weight, bias)
    assert found.shape == (1, 32, 6, 7)
    assert found.is_contiguous(memory_format=torch.channels_last)
