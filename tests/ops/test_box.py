"""Local mean and variance: against float64, SciPy, and the laws that hold for every size."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage
from torch.autograd import forward_ad, gradcheck, gradgradcheck

from fullres.ops import box_pixels_cpu
from fullres.ops.box import (
    local_max,
    local_mean,
    local_mean_reference,
    local_mean_var,
    local_mean_var_reference,
    local_normalise,
)

# rounding to the type once, with a little room for rounding through float32
EPS = {t: torch.finfo(t).eps for t in (torch.float16, torch.bfloat16, torch.float32)}
EPS[torch.float64] = 1e-13
DTYPES = list(EPS)


def exact(x, window):
    """Mean and variance over contained windows by the definition, in float64, replicated."""
    x = x.double().contiguous()
    kh, kw = min(window[0], x.shape[2]), min(window[1], x.shape[3])
    windows = x.unfold(2, kh, 1).unfold(3, kw, 1).flatten(4)
    mean, var = windows.mean(-1), windows.var(-1, correction=0)
    top, left = (kh - 1) // 2, (kw - 1) // 2
    rows = (torch.arange(x.shape[2]) - top).clamp(0, mean.shape[2] - 1)
    columns = (torch.arange(x.shape[3]) - left).clamp(0, mean.shape[3] - 1)
    return tuple(s[:, :, rows][..., columns] for s in (mean, var))


@st.composite
def maps(draw):
    """A map in one of the memory layouts that networks produce, and a window."""
    b, c = draw(st.integers(1, 3)), draw(st.sampled_from([1, 2, 3, 5, 15, 16, 17, 33, 160]))
    h, w = draw(st.integers(1, 24)), draw(st.integers(1, 24))
    layout = draw(
        st.sampled_from(["nchw", "nhwc", "channel slice", "nhwc slice", "crop", "transposed"])
    )
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    big = torch.randn(b, 2 * c, h + 3, w + 2, generator=generator, dtype=torch.float64) + 1
    x = big.to(draw(st.sampled_from(DTYPES)))
    if layout.startswith("nhwc"):
        x = x.contiguous(memory_format=torch.channels_last)
    if layout == "transposed":
        x = x.transpose(2, 3)
    x = x[:, c:, 1 : 1 + h, 1 : 1 + w]
    if layout in ("nchw", "nhwc"):
        fmt = torch.channels_last if layout == "nhwc" else torch.contiguous_format
        x = x.contiguous(memory_format=fmt)
    window = draw(st.integers(1, 30)), draw(st.integers(1, 30))
    return x, window


@settings(max_examples=150, deadline=None)
@given(maps())
def test_equals_the_definition(case):
    x, window = case
    mean, var = exact(x, window)
    scale = x.double().abs().max().item() + 1e-30
    eps = EPS[x.dtype]
    for found in (local_mean(x, window), local_mean_reference(x, window)):
        assert found.dtype == x.dtype
        assert found.shape == x.shape
        assert (found.double() - mean).abs().max() <= 0.51 * eps * scale + 1e-7 * eps
    for found_mean, found_var in (local_mean_var(x, window), local_mean_var_reference(x, window)):
        assert (found_mean.double() - mean).abs().max() <= 0.51 * eps * scale + 1e-7 * eps
        assert (found_var.double() - var).abs().max() <= 0.51 * eps * scale**2 + 2e-8 * eps
        assert found_var.min() >= 0


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_results_larger_than_caches_are_written_wherever_they_lie(data):
    """Past caches or not, as vectors lie in lines of cache or not; and nothing beside them."""
    channels = data.draw(st.sampled_from([16, 24, 32, 48, 160]))
    step = channels + data.draw(st.sampled_from([0, 8, 16]))
    width = data.draw(st.integers(20, 90))
    kh, kw = data.draw(st.integers(1, 30)), data.draw(st.integers(1, 20))
    replicate = data.draw(st.booleans())
    rows = box_pixels_cpu.CACHED // (4 * step * (width - kw + 1)) + 2
    height = rows + kh - 1
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    x = torch.randn(1, channels, height, width, generator=generator)
    x = x.contiguous(memory_format=torch.channels_last)
    exact = local_mean_reference(x, (kh, kw), replicate=replicate)
    memory = torch.full((exact[0, 0].numel() * step + 32,), torch.nan)
    offset = data.draw(st.sampled_from([0, 1, 8, 16]))
    strides = (0, 1, exact.shape[3] * step, step)
    found = memory.as_strided(exact.shape, strides, storage_offset=offset)
    box_pixels_cpu.local_mean(x, (found,), kh, kw, replicate)
    torch.testing.assert_close(found, exact, rtol=2**-23, atol=1e-12)
    found.fill_(torch.nan)
    assert memory.isnan().all()


@settings(max_examples=60, deadline=None)
@given(maps())
def test_memory_format_is_kept_and_fake_shapes_agree(case):
    x, window = case
    kh, kw = min(window[0], x.shape[2]), min(window[1], x.shape[3])
    for replicate in (True, False):
        arguments = (x, kh, kw, replicate)
        torch.library.opcheck(
            torch.ops.fullres.local_mean.default,
            arguments,
            test_utils=("test_schema", "test_faketensor"),
        )
    y = local_mean(x, window)
    if x.shape[1] > 1 and x.is_contiguous(memory_format=torch.channels_last):
        assert y.is_contiguous(memory_format=torch.channels_last)
    elif x.is_contiguous():
        assert y.is_contiguous()


@settings(max_examples=40, deadline=None)
@given(maps())
def test_a_window_over_the_map_gives_the_global_statistics(case):
    x, _ = case
    mean, var = local_mean_var(x, (99, 99))
    wide = x.double()
    eps = EPS[x.dtype] * (wide.abs().max().item() ** 2 + 1)
    assert (mean.double() - wide.mean((2, 3), keepdim=True)).abs().max() <= eps
    assert (var.double() - wide.var((2, 3), correction=0, keepdim=True)).abs().max() <= eps
    assert (mean == mean[..., :1, :1]).all()


@settings(max_examples=60, deadline=None)
@given(maps())
def test_the_maximum_equals_the_definition(case):
    x, window = case
    kh, kw = min(window[0], x.shape[2]), min(window[1], x.shape[3])
    windows = x.contiguous().unfold(2, kh, 1).unfold(3, kw, 1).flatten(4).amax(-1)
    rows = (torch.arange(x.shape[2]) - (kh - 1) // 2).clamp(0, windows.shape[2] - 1)
    columns = (torch.arange(x.shape[3]) - (kw - 1) // 2).clamp(0, windows.shape[3] - 1)
    assert torch.equal(local_max(x, window), windows[:, :, rows][..., columns])


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_the_maximum_of_any_values_on_any_threads(data):
    """NaN marks the windows that hold it; an infinity is a number."""
    b, c = data.draw(st.integers(1, 2)), data.draw(st.sampled_from([3, 16, 31, 32, 50, 97]))
    h, w = data.draw(st.integers(1, 30)), data.draw(st.integers(1, 30))
    kh, kw = data.draw(st.integers(1, h)), data.draw(st.integers(1, w))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    x = torch.randn(b, c, h, w, generator=generator)
    for value in (torch.nan, torch.inf, -torch.inf):
        x[torch.rand(x.shape, generator=generator) < data.draw(st.sampled_from([0, 0.02, 0.5]))] = (
            value
        )
    windows = x.unfold(2, kh, 1).unfold(3, kw, 1).flatten(4).amax(-1)
    layout = data.draw(st.sampled_from([torch.contiguous_format, torch.channels_last]))
    x = x.contiguous(memory_format=layout)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(data.draw(st.sampled_from([1, 2, 5])))
        maxima = local_max(x, (kh, kw), replicate=False)
    finally:
        torch.set_num_threads(before)
    assert maxima.is_contiguous(memory_format=layout)
    torch.testing.assert_close(maxima, windows, rtol=0, atol=0, equal_nan=True)


def test_the_maximum_has_derivatives():
    torch.manual_seed(0)
    x = torch.randn(1, 2, 6, 5, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda x: local_max(x, (3, 2)), x)
    assert gradgradcheck(lambda x: local_max(x, (3, 2)), x)


@settings(max_examples=40, deadline=None)
@given(maps())
def test_inside_the_border_it_is_scipys_uniform_filter(case):
    x, window = case
    x = x.double()
    kh, kw = min(window[0], x.shape[2]), min(window[1], x.shape[3])
    # SciPy centres an even window one position later
    origin = tuple(-1 if k % 2 == 0 else 0 for k in (kh, kw))
    filtered = ndimage.uniform_filter(x.numpy(), (0, 0, kh, kw), origin=(0, 0, *origin))
    rows = slice((kh - 1) // 2, (kh - 1) // 2 + x.shape[2] - kh + 1)
    columns = slice((kw - 1) // 2, (kw - 1) // 2 + x.shape[3] - kw + 1)
    ours = local_mean(x, window).numpy()[..., rows, columns]
    np.testing.assert_allclose(ours, filtered[..., rows, columns], atol=1e-12)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", DTYPES)
def test_variance_survives_a_large_mean(dtype, memory_format):
    random = np.random.default_rng(0)
    x = torch.from_numpy(100 + 0.01 * random.standard_normal((2, 20, 60, 70))).to(dtype)
    x = x.to(memory_format=memory_format)
    mean, var = local_mean_var(x, (31, 17))
    true_mean, true_var = exact(x, (31, 17))
    assert ((mean.double() - true_mean).abs() / true_mean).max() < max(1e-6, 0.51 * EPS[dtype])
    assert (var >= 0).all()
    if dtype in (torch.float32, torch.float64):
        assert ((var.double() - true_var).abs() / true_var).max() < 1e-3
    else:  # as good as rounding the exact result
        rounded = true_var.to(dtype).double()
        assert ((var.double() - rounded).abs() <= EPS[dtype] * rounded).all()


def test_mean_of_a_hundred_megapixel_map():
    side = 10_000
    ramp = torch.linspace(1, 3, side)
    x = (ramp[:, None] * ramp[None, :])[None, None]
    mean = local_mean(x, (384, 384))[0, 0]
    check = torch.linspace(0, side - 1, 97).long()
    wide = x[0, 0].double()
    for i in check.tolist():
        top = min(max(i - 191, 0), side - 384)
        left = min(max(side - 1 - i - 191, 0), side - 384)
        expected = wide[top : top + 384, left : left + 384].mean()
        assert abs(mean[i, side - 1 - i].double() - expected) / expected < 1e-6


def test_variance_of_a_hundred_megapixel_map_with_a_large_mean():
    side, k = 10_000, 384
    generator = torch.Generator().manual_seed(0)
    x = torch.empty(1, 1, side, side).normal_(100, 0.01, generator=generator)
    mean, var = local_mean_var(x, (k, k))
    assert var.min() >= 0
    for i in (0, 191, 4_999, 7_777, side - 1):
        j = i * 7_919 % side
        top, left = (min(max(at - (k - 1) // 2, 0), side - k) for at in (i, j))
        window = x[0, 0, top : top + k, left : left + k].double()
        exact_mean, exact_var = window.mean(), window.var(correction=0)
        assert abs(mean[0, 0, i, j].double() - exact_mean) / exact_mean < 1e-6
        assert abs(var[0, 0, i, j].double() - exact_var) / exact_var < 1e-3


@pytest.mark.parametrize("window", [(3, 4), (6, 2), (9, 9)])
@pytest.mark.parametrize("mean", [local_mean, local_mean_reference])
def test_autograd_and_double_backward(mean, window):
    torch.manual_seed(0)
    x = torch.randn(1, 2, 5, 4, dtype=torch.float64, requires_grad=True)
    for replicate in (True, False):
        assert gradcheck(lambda x, r=replicate: mean(x, window, replicate=r), x)
        assert gradgradcheck(lambda x, r=replicate: mean(x, window, replicate=r), x)


@pytest.mark.parametrize("statistics", [local_mean_var, local_mean_var_reference])
def test_autograd_and_double_backward_of_the_variance(statistics):
    torch.manual_seed(0)
    x = torch.randn(1, 2, 5, 4, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda x: statistics(x, (3, 2)), x)
    assert gradgradcheck(lambda x: statistics(x, (3, 2)), x)


def test_gradients_equal_those_of_the_reference():
    torch.manual_seed(1)
    x = torch.randn(2, 17, 20, 9) + 50
    weights = torch.randn(2, 17, 20, 9)
    a, b = (x.clone().requires_grad_() for _ in range(2))
    (local_mean(a, (7, 4)) * weights).sum().backward()
    (local_mean_reference(b, (7, 4)) * weights).sum().backward()
    torch.testing.assert_close(a.grad, b.grad)
    a, b = (x.clone().requires_grad_() for _ in range(2))
    for leaf, statistics in ((a, local_mean_var), (b, local_mean_var_reference)):
        mean, var = statistics(leaf, (7, 4))
        (mean * weights + var * weights.flip(0)).sum().backward()
    torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-5)


class Statistics(torch.nn.Module):
    def forward(self, x):
        mean, var = local_mean_var(x, (5, 3))
        return (x - mean) * torch.rsqrt(var + 1e-5) + local_mean(x, (2, 9))


def test_export_keeps_the_operators():
    x = torch.randn(1, 4, 12, 10)
    exported = torch.export.export(Statistics(), (x,))
    names = {str(node.target) for node in exported.graph.nodes}
    assert "fullres.local_mean.default" in names
    torch.testing.assert_close(exported.module()(x), Statistics()(x))


def test_compile_takes_the_whole_graph():
    x = torch.randn(1, 4, 12, 10, requires_grad=True)
    compiled = torch.compile(Statistics(), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), Statistics()(x))
    (gradient,) = torch.autograd.grad(compiled(x).square().sum(), x)
    (expected,) = torch.autograd.grad(Statistics()(x).square().sum(), x)
    torch.testing.assert_close(gradient, expected)


TRANSFORMED = {
    "mean": lambda x: local_mean(x, (3, 4)),
    "variance": lambda x: local_mean_var(x, (3, 4))[1],
    "normalised": lambda x: local_normalise(x, (3, 4), x[0, :, 0, 0], x[0, :, 1, 1]),
    "maximum": lambda x: local_max(x, (3, 4)),
}


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("statistic", TRANSFORMED.values(), ids=TRANSFORMED)
def test_torch_func_maps_it(statistic, last):
    x = torch.randn(3, 2, 5, 9, 11)
    x = x.movedim(2, -1).contiguous().movedim(-1, 2) if last else x
    with torch.no_grad():
        mapped = torch.vmap(statistic)(x)
    torch.testing.assert_close(mapped, torch.stack([statistic(y) for y in x]))


@pytest.mark.filterwarnings("ignore:`torch.jit")  # which torch itself calls
@pytest.mark.parametrize("statistic", TRANSFORMED.values(), ids=TRANSFORMED)
def test_forward_derivatives_are_those_of_differences(statistic):
    x, towards = torch.randn(2, 2, 3, 9, 11, dtype=torch.float64)
    _, derived = torch.func.jvp(statistic, (x,), (towards,))
    step = 1e-6 * towards
    with torch.no_grad():
        difference = (statistic(x + step) - statistic(x - step)) / 2e-6
    torch.testing.assert_close(derived, difference, rtol=1e-6, atol=1e-6)
    with forward_ad.dual_level():
        dual = forward_ad.unpack_dual(statistic(forward_ad.make_dual(x, towards)))
    torch.testing.assert_close(dual.tangent, derived)


def test_threads_do_not_meet():
    maps = [torch.randn(2, 24, 40, 50) + k for k in range(4)]
    alone = [local_mean(x, (9, 9)) for x in maps]
    wrong = []

    def work(k):
        results = [local_mean(maps[k], (9, 9)) for _ in range(20)]
        wrong.extend(r for r in results if not torch.equal(r, alone[k]))

    threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@settings(max_examples=60, deadline=None)
@given(
    st.tuples(
        st.integers(1, 2), st.sampled_from([1, 3, 18]), st.integers(1, 60), st.integers(1, 9)
    ),
    st.tuples(st.integers(1, 60), st.integers(1, 9)),
    st.sampled_from([torch.contiguous_format, torch.channels_last]),
    st.integers(1, 17),
)
def test_the_number_of_threads_changes_nothing(shape, window, layout, threads):
    x = torch.randn(shape).contiguous(memory_format=layout)
    mean, var = exact(x, window)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found_mean, found_var = local_mean_var(x, window)
        found = local_mean(x, window)
    finally:
        torch.set_num_threads(before)
    for result, wanted in ((found, mean), (found_mean, mean), (found_var, var)):
        torch.testing.assert_close(result.double(), wanted, rtol=1e-6, atol=1e-6)


def test_empty_batches_pass():
    for statistic in (local_mean, local_max):
        x = torch.empty(0, 3, 4, 4)
        assert statistic(x, (2, 2)).shape == (0, 3, 4, 4)
        assert statistic(x, (2, 2), replicate=False).shape == (0, 3, 3, 3)


@pytest.mark.parametrize(
    ("x", "window", "words"),
    [
        (torch.zeros(3, 4, 4), (2, 2), "B, C, H, W"),
        (torch.zeros(1, 3, 4, 4, dtype=torch.uint8), (2, 2), "floating-point"),
        (torch.zeros(1, 3, 4, 4), (0, 2), "at least 1 × 1"),
    ],
)
def test_wrong_arguments_are_named(x, window, words):
    with pytest.raises(ValueError, match=words):
        local_mean(x, window)
