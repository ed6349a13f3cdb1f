from __future__ import annotations

from itertools import pairwise, product

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from fullres.ops import cells, cells_cpu, parts, windows
from fullres.ops.cells import span_sums
from fullres.ops.windows import (
    projected_attention,
    transposed_attention,
    transposed_attention_reference,
    window_starts,
)


def maps(*shape, dtype=torch.float64, seed=0):
    """Queries, keys and values, and a temperature for each of two heads."""
    generator = torch.Generator().manual_seed(seed)
    q, k, v = torch.randn(3, *shape, generator=generator, dtype=torch.float64).to(dtype).unbind()
    return q, k, v, torch.tensor([0.7, 3.0], dtype=dtype).view(2, 1, 1)


@st.composite
def cases(draw):
    """Maps, temperature, window and stride, of any sizes that the direct form has time for."""
    heads, channels = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    height, width = draw(st.integers(1, 40)), draw(st.integers(1, 70))
    window = (draw(st.integers(1, 45)), draw(st.integers(1, 75)))
    each = [st.none() | st.integers(1, k) for k in window]
    stride = draw(st.none() | st.integers(1, min(window)) | st.tuples(*each))
    strides = stride if isinstance(stride, tuple) else (stride, stride)
    sides = zip((height, width), window, strides, strict=True)
    rows, columns = (len(window_starts(*side)) for side in sides)
    assume(rows * columns <= 150)
    shape = (3, draw(st.integers(1, 2)), heads * channels, height, width)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    if draw(st.booleans()):
        x = x.movedim(2, -1).contiguous().movedim(-1, 2)
    temperature = 4 * torch.rand(heads, generator=generator, dtype=torch.float64)
    return *x.unbind(), temperature, window, stride


# Windows --------------------------------------------------------------------------------------


@given(length=st.integers(1, 300), window=st.integers(1, 320))
def test_windows_by_default_are_as_few_as_cover_the_axis(length, window):
    starts = window_starts(length, window)
    k = min(window, length)
    assert starts[0] == 0
    assert starts[-1] == length - k
    assert len(starts) <= -(-length // k)
    gaps = [b - a for a, b in pairwise(starts)]
    assert all(1 <= gap <= k for gap in gaps)
    assert len(set(gaps[:-1])) <= 1


@given(length=st.integers(1, 100), window=st.integers(1, 120), data=st.data())
def test_windows_at_any_stride_cover_the_axis(length, window, data):
    stride = data.draw(st.integers(1, window))
    starts = window_starts(length, window, stride)
    k = min(window, length)
    assert {p for s in starts for p in range(s, s + k)} == set(range(length))
    assert list(starts[:-1]) == [n * stride for n in range(len(starts) - 1)]


@pytest.mark.parametrize(
    ("length", "window", "starts"),
    [
        (96, 48, (0, 48)),
        (160, 48, (0, 38, 76, 112)),
        (360, 192, (0, 168)),
        (640, 192, (0, 150, 300, 448)),
        (7, 9, (0,)),
        (9, 1, tuple(range(9))),
    ],
)
def test_windows_of_the_publication(length, window, starts):
    assert window_starts(length, window) == starts


@settings(deadline=None)
@given(st.data())
def test_sums_over_spans(data):
    length = data.draw(st.integers(1, 30))
    number = data.draw(st.integers(1, 12))
    ends = st.lists(st.integers(0, length), min_size=number, max_size=number).map(sorted)
    spans = [(a, b) for a, b in zip(data.draw(ends), data.draw(ends), strict=True) if a < b]
    assume(spans)
    x = torch.arange(2.0 * length).reshape(length, 2) ** 2
    expected = torch.stack([x[a:b].sum(0) for a, b in spans])
    flat = [n for span in spans for n in span]
    assert torch.equal(span_sums(x, flat, []), expected)


# Equal to the direct form ---------------------------------------------------------------------


@settings(deadline=None, max_examples=60)
@given(cases())
def test_equals_the_direct_form(case):
    q, k, v, temperature, window, stride = case
    expected = transposed_attention_reference(q, k, v, temperature, window, stride)
    result = transposed_attention(q, k, v, temperature, window, stride)
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-10)
    single = (x.float() for x in (q, k, v, temperature))
    result = transposed_attention(*single, window, stride)
    torch.testing.assert_close(result.double(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("window", [None, (9, 13), (50, 14)])
@pytest.mark.parametrize("attention", [transposed_attention, transposed_attention_reference])
def test_a_window_that_covers_the_map_is_global(attention, window):
    q, k, v, temperature = maps(2, 6, 9, 13)
    by_head = [x.view(2, 2, 3, 9 * 13) for x in (q, k, v)]
    a, b = (x / x.square().sum(-1, keepdim=True).sqrt() for x in by_head[:2])
    expected = F.scaled_dot_product_attention(a * temperature, b, by_head[2], scale=1.0)
    result = attention(q, k, v, temperature, window)
    torch.testing.assert_close(result, expected.view(2, 6, 9, 13), rtol=0, atol=1e-12)


def test_dense_windows_by_hand():
    q, k, v, temperature = maps(1, 4, 5, 6)
    total, count = torch.zeros_like(v), torch.zeros(5, 6)
    for top in range(3):
        for left in range(3):
            where = (..., slice(top, top + 3), slice(left, left + 4))
            total[where] += transposed_attention(q[where], k[where], v[where], temperature)
            count[where] += 1
    result = transposed_attention(q, k, v, temperature, (3, 4), stride=1)
    torch.testing.assert_close(result, total / count)


@pytest.mark.parametrize("stride", [None, 3, 1])
def test_the_result_does_not_depend_on_how_work_is_split(monkeypatch, stride):
    inputs = maps(2, 8, 21, 40)
    results = []
    for narrow in (0, 1000):
        for budget, piece in ((windows._BUDGET, cells._PIECE), (1, 1), (9000, 500)):
            monkeypatch.setattr(windows, "_BUDGET", budget)
            monkeypatch.setattr(cells, "_PIECE", piece)
            monkeypatch.setattr(cells, "_NARROW", narrow)
            results.append(transposed_attention(*inputs, (8, 11), stride))
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=0, atol=1e-12)


# Numbers --------------------------------------------------------------------------------------


@pytest.mark.parametrize("stride", [None, 1])
def test_where_the_map_is_zero_nothing_leaks_in_from_afar(stride):
    q, k, v, temperature = maps(1, 4, 12, 40, dtype=torch.float32)
    for x in (q, k):
        x[..., 16:] = 0
        x[..., :16] *= 1e6
    result = transposed_attention(q, k, v, temperature, (5, 6), stride)
    expected = transposed_attention_reference(q, k, v, temperature, (5, 6), stride)
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("stride", [None, 4])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 2e-2), (torch.float16, 2e-3)])
def test_half_precision_is_summed_in_single(dtype, tolerance, stride):
    q, k, v, temperature = maps(1, 4, 64, 80, dtype=dtype)
    k = k + q  # so that long sums do not cancel
    result = transposed_attention(q, k, v, temperature, (48, 48), stride)
    wide = (x.double() for x in (q, k, v, temperature))
    expected = transposed_attention_reference(*wide, (48, 48), stride)
    assert result.dtype == dtype
    assert (result.double() - expected).abs().max() < tolerance * expected.abs().max()


@pytest.mark.parametrize("stride", [None, 1])
@pytest.mark.parametrize("channels_last", [False, True])
def test_views_of_a_larger_map(channels_last, stride):
    q, k, v, temperature = maps(2, 6, 12, 18)
    form = torch.channels_last if channels_last else torch.contiguous_format
    qkv = torch.cat([q, k, v], 1).contiguous(memory_format=form)
    result = transposed_attention(*qkv.chunk(3, 1), temperature, (5, 7), stride)
    assert result.is_contiguous(memory_format=form)
    expected = transposed_attention_reference(q, k, v, temperature, (5, 7), stride)
    torch.testing.assert_close(result, expected)


# Derivatives ----------------------------------------------------------------------------------


@pytest.mark.parametrize("narrow", [0, 1000])
@pytest.mark.parametrize("stride", [None, 1])
def test_derivatives_are_those_of_the_direct_form(monkeypatch, stride, narrow):
    monkeypatch.setattr(cells, "_NARROW", narrow)
    monkeypatch.setattr(windows, "_BUDGET", 1)
    inputs = [x.requires_grad_() for x in maps(2, 6, 9, 11)]
    gradients = []
    for attention in (transposed_attention, transposed_attention_reference):
        loss = attention(*inputs, (4, 5), stride).pow(3).sum()
        gradients.append(torch.autograd.grad(loss, inputs))
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_second_derivatives():
    inputs = [x.requires_grad_() for x in maps(1, 4, 3, 4)]
    assert torch.autograd.gradgradcheck(
        lambda *inputs: transposed_attention(*inputs, (2, 3)), inputs, fast_mode=True
    )


def test_derivatives_are_finite_where_the_map_is_zero():
    q, k, v, temperature = maps(1, 4, 8, 8, dtype=torch.float32)
    inputs = [(0 * q).requires_grad_(), (0 * k).requires_grad_(), v.requires_grad_()]
    transposed_attention(*inputs, temperature, (5, 5)).square().sum().backward()
    assert all(x.grad.isfinite().all() for x in inputs)


def test_half_precision_derivatives_keep_their_type():
    inputs = [x.requires_grad_() for x in maps(1, 4, 8, 8, dtype=torch.bfloat16)]
    transposed_attention(*inputs, (5, 5)).sum().backward()
    assert all(x.grad.dtype == torch.bfloat16 and x.grad.isfinite().all() for x in inputs)


def test_compiles_as_one_graph():
    inputs = [x.requires_grad_() for x in maps(1, 4, 8, 9)]
    compiled = torch.compile(transposed_attention, backend="aot_eager", fullgraph=True)
    result = compiled(*inputs, (5, 6))
    torch.testing.assert_close(result, transposed_attention(*inputs, (5, 6)))


# Work and memory ------------------------------------------------------------------------------


KERNELS = {
    operator._opoverload: operator._init_fn
    for operator in (cells._gram_op, cells._squares_op, cells._weigh_op, cells._span_sums_op)
}


class Made(TorchDispatchMode):
    """Elements of the tensors that operations make, views left out."""

    def __init__(self):
        super().__init__()
        self.total = self.largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kernel = KERNELS.get(function)
        if kernel is not None:
            with self:  # look into the package's own operators
                return kernel(*args, **(kwargs or {}))
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and not function.is_view:
            self.total += result.numel()
            self.largest = max(self.largest, result.numel())
        return result


def made(size, window, stride):
    inputs = maps(1, 16, *size)
    with Made() as mode:
        transposed_attention(*inputs, (window, window), stride)
    return mode


def test_no_position_is_copied_once_a_window():
    overlapping, apart = made((96, 96), 32, 8), made((96, 96), 32, 32)
    windows_each = len(window_starts(96, 32, 8)) ** 2 * 32 * 32 / (96 * 96)
    assert windows_each > 8
    assert overlapping.total < 3 * apart.total


def test_memory_is_bounded_however_many_windows(monkeypatch):
    monkeypatch.setattr(windows, "_BUDGET", 2**16)
    image = 16 * 64 * 64
    assert made((64, 64), 24, None).largest == image
    assert made((64, 64), 24, 1).largest <= 2 * image


def test_an_empty_batch():
    assert transposed_attention(*maps(0, 4, 8, 8), (5, 5)).shape == (0, 4, 8, 8)


# Refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", [transposed_attention, transposed_attention_reference])
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"window": (0, 3)}, "window must be at least 1"),
        ({"window": (3, 3), "stride": 0}, "stride must be from 1 to the window of 3, not 0"),
        ({"window": (3, 4), "stride": 4}, "stride must be from 1 to the window of 3, not 4"),
        ({"temperature": torch.ones(3)}, "4 channels do not divide into 3 heads"),
        ({"temperature": torch.ones(0)}, "heads"),
        ({"q": torch.ones(4, 6, 7)}, "q must be floating-point maps"),
        ({"q": torch.ones(1, 4, 6, 7, dtype=torch.int64)}, "q must be floating-point maps"),
        ({"v": torch.ones(1, 4, 6, 8)}, "same shape"),
        ({"k": torch.ones(1, 4, 6, 7, dtype=torch.float64)}, "same shape and type"),
    ],
)
def test_what_does_not_fit_is_refused(attention, change, words):
    inputs = {name: torch.ones(1, 4, 6, 7) for name in "qkv"} | {"temperature": torch.ones(2)}
    with pytest.raises(ValueError, match=words):
        attention(**(inputs | change))


# Sums on the CPU ------------------------------------------------------------------------------


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_products_are_those_of_float64(data):
    batch, heads = data.draw(st.integers(1, 2)), data.draw(st.integers(1, 3))
    height, width = data.draw(st.integers(1, 30)), data.draw(st.integers(1, 150))
    a, b = (data.draw(st.sampled_from([8, 16, 48])) for _ in range(2))
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16]))
    axes = [
        sorted({0, n, *data.draw(st.lists(st.integers(0, n), max_size=3))}) for n in (height, width)
    ]
    x = torch.randn(batch, height + 1, width + 2, heads * (a + b)).to(dtype).permute(0, 3, 1, 2)
    x = x[..., 1:, 1:-1]
    q, k = (t.unflatten(1, (heads, -1)) for t in x.split([heads * a, heads * b], 1))
    assert cells_cpu.serves(q, k) == (a > 8 and b > 8)
    found = cells.products(q, k, *axes)
    wide = q.double(), k.double()
    expected = cells.gram(*wide, *axes), *(cells.squares(t, *axes) for t in wide)
    kernel = cells_cpu.serves(q, k)  # torch's own float32 rounds with what a sum adds
    added = expected if kernel else (cells.gram(q.abs(), k.abs(), *axes), *expected[1:])
    for ours, exact, sums in zip(found, expected, added, strict=True):
        assert ours.dtype == torch.float32
        error = (ours.double() - exact).abs().max()
        assert error <= 2e-6 * sums.abs().max()


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_convolutions_by_cell_are_those_of_float64(data):
    height, width = data.draw(st.integers(1, 30)), data.draw(st.integers(1, 150))
    axes = [
        sorted({0, n, *data.draw(st.lists(st.integers(0, n), max_size=3))}) for n in (height, width)
    ]
    channels, outs = (data.draw(st.sampled_from([16, 48, 80, 128])) for _ in range(2))
    biased, added, in_place = (data.draw(st.booleans()) for _ in range(3))

    def drawn(c):  # a part of a larger map
        x = torch.randn(1, height + 1, width + 2, c).permute(0, 3, 1, 2)
        return x, x[..., 1:, 1:-1]

    (_, x), (_, residual), (around, out) = drawn(channels), drawn(outs), drawn(outs)
    factors = torch.randn(len(axes[0]) - 1, len(axes[1]) - 1, channels, outs)
    bias = torch.randn(outs) if biased else None
    expected = torch.zeros(1, outs, height, width).double()
    for (r, rows), (s, columns) in product(*(enumerate(pairwise(axis)) for axis in axes)):
        here = (..., slice(*rows), slice(*columns))
        expected[here] = torch.einsum("co,bchw->bohw", factors[r, s].double(), x[here].double())
    if biased:
        expected += bias.double()[:, None, None]
    if added:
        expected += residual.double()
    if in_place and channels == outs:
        around, out = None, x
    border = None if around is None else (around[:, :, 0].clone(), around[..., [0, -1]].clone())
    assert cells_cpu.convolves(x, residual, out)
    cells_cpu.convolve(x, factors, bias, residual if added else None, out, *axes)
    assert (out.double() - expected).abs().max() <= 4e-6 * max(expected.abs().max(), 1)
    if around is not None:
        assert torch.equal(around[:, :, 0], border[0])
        assert torch.equal(around[..., [0, -1]], border[1])


@pytest.mark.parametrize("window", [None, (9, 12)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("outputs", "added"), [(20, False), (20, True), (32, True)])
def test_attention_and_convolution_in_one_product(monkeypatch, window, dtype, outputs, added):
    """What the fast path takes together is what one after the other gives."""
    monkeypatch.setitem(parts.BUDGET, "cpu", 2**15)
    channels = 32
    torch.manual_seed(0)
    x = torch.randn(2, channels, 48, 56).to(dtype).contiguous(memory_format=torch.channels_last)
    narrow, mix = (
        torch.randn(3 * channels, channels, 1, 1) / 6,
        torch.randn(outputs, channels, 1, 1),
    )
    temperature, bias = torch.tensor([0.7, 3.0]), torch.randn(outputs)
    residual = torch.randn(2, outputs, 48, 56).to(dtype) if added else None

    def project(x):
        return F.conv2d(x, narrow.to(x.dtype)).chunk(3, 1)

    wide = transposed_attention_reference(*project(x.double()), temperature.double(), window)
    expected = F.conv2d(wide, mix.to(dtype).double(), bias.to(dtype).double())
    expected = expected if residual is None else expected + residual.double()
    mix, bias = mix.to(dtype), bias.to(dtype)
    options = {"residual": residual, "channels": 96, "halo": 0}
    before = None if residual is None else residual.clone()
    with torch.inference_mode():
        found = projected_attention(project, x, temperature, mix, bias, window, **options)
    assert residual is None or torch.equal(residual, before)
    assert found.dtype == dtype
    error = (found.double() - expected).abs().max() / expected.abs().max()
    assert error < (1e-5 if dtype == torch.float32 else 3e-2)
