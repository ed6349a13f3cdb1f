"""Statistics of contained windows stand for a statistic at every position."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fullres.ops.box import local_max, local_mean, local_mean_var
from fullres.ops.frames import Frame

sides = st.integers(1, 12)
windows = st.integers(1, 14)


@given(st.tuples(sides, sides), st.tuples(windows, windows))
def test_contained_windows_extended_are_the_statistic(size, window):
    x = torch.rand(2, 3, *size)
    frame = Frame.of(size, window)
    for statistic in (local_mean, local_max, lambda *a, **o: local_mean_var(*a, **o)[1]):
        inner = statistic(x, window, replicate=False)
        assert tuple(inner.shape[2:]) == frame.windows
        assert torch.equal(frame.extended(inner), statistic(x, window))


@torch.no_grad()
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@given(st.tuples(sides, sides), st.tuples(windows, windows))
def test_products_need_no_extended_copy(dtype, memory_format, size, window):
    frame = Frame.of(size, window)
    x = torch.rand(2, 3, *size, dtype=dtype).contiguous(memory_format=memory_format)
    inner = torch.rand(2, 3, *frame.windows, dtype=dtype)
    product = frame.scaled(x, inner)
    assert torch.equal(product, x * frame.extended(inner))
    assert product.stride() == x.stride()
    plus = torch.rand(x.shape, dtype=dtype)
    wanted = torch.addcmul(plus, x, frame.extended(inner))
    torch.testing.assert_close(frame.scaled(x, inner, plus=plus), wanted)
    torch.testing.assert_close(frame.scaled(x, inner, plus=plus, in_place=True), wanted)
    torch.testing.assert_close(x, wanted)


def test_other_types_are_extended_too():
    frame = Frame.of((5, 4), (3, 3))
    inner = torch.rand(1, 2, 3, 2)
    assert torch.equal(frame.extended(inner > 0.5), frame.extended(inner) > 0.5)


def test_gradients_flow_through_products():
    frame = Frame.of((6, 5), (3, 2))
    x = torch.rand(1, 2, 6, 5, dtype=torch.float64, requires_grad=True)
    inner = torch.rand(1, 2, *frame.windows, dtype=torch.float64, requires_grad=True)
    plus = torch.rand(1, 2, 6, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(frame.scaled, (x, inner))
    assert torch.autograd.gradcheck(lambda x, i, p: frame.scaled(x, i, plus=p), (x, inner, plus))
