from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from fullres.ops import pyramid_blocks
from fullres.ops.pyramid import (
    EPS,
    SCALES,
    pyramid_attention,
    pyramid_attention_reference,
    window_span,
    window_spans,
)


def maps(shape, values=6, *, dtype=torch.float64, levels=5, seed=0, spread=1.0):
    """Queries, keys and values of random numbers, and the scales."""
    batch, channels, *size = shape
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    sizes = [[max(1, math.floor(side * s)) for side in size] for s in SCALES[:levels]]
    keys = [draw(batch, channels, *each) for each in sizes]
    return (
        spread * draw(batch, channels, *size),
        keys,
        [draw(batch, values, *each) for each in sizes],
        {"scales": SCALES[:levels]},
    )


def single(case):
    q, keys, values, options = case
    return q.float(), [k.float() for k in keys], [v.float() for v in values], options


LENGTHS = st.integers(1, 24), st.integers(1, 40)


# Windows --------------------------------------------------------------------------------------


@given(
    length=st.integers(1, 200),
    window=st.integers(1, 220),
    scale=st.sampled_from([*SCALES, 0.5, 1 / 3]),
)
def test_a_window_covers_what_has_its_centre_inside(length, window, scale):
    resized = max(1, math.floor(length * scale))
    exact = Fraction(scale).limit_denominator(1000)
    centres = [(j + Fraction(1, 2)) / exact for j in range(resized)]
    spans = window_spans(length, window, resized, scale)
    k = min(window, length)
    assert len(spans) == length
    for p, (first, last) in enumerate(spans):
        start = min(max(p - (k - 1) // 2, 0), length - k)
        assert 0 <= start <= p < start + k <= length
        inside = [start <= c < start + k or (start + k == length and start <= c) for c in centres]
        assert inside == [first <= j < last for j in range(resized)]


@given(length=st.integers(1, 300), scale=st.sampled_from(SCALES))
def test_a_window_that_covers_the_axis_covers_every_scale(length, scale):
    resized = max(1, math.floor(length * scale))
    assert window_spans(length, length, resized, scale) == [(0, resized)] * length


@given(first=st.integers(0, 50), window=st.integers(1, 40), tens=st.integers(1, 9))
def test_windows_move_with_the_map_by_tens_of_positions(first, window, tens):
    for tenths, scale in zip((10, 9, 8, 7, 6), SCALES, strict=True):
        here = window_span((first, first + window), 1000, tenths * 100, scale)
        there = window_span(
            (first + 10 * tens, first + 10 * tens + window), 1000, tenths * 100, scale
        )
        assert there == (here[0] + tenths * tens, here[1] + tenths * tens)


def test_at_scale_one_a_window_covers_its_own_positions():
    assert window_spans(9, 4, 9, 1.0) == [
        (0, 4),
        (0, 4),
        (1, 5),
        (2, 6),
        (3, 7),
        (4, 8),
        (5, 9),
        (5, 9),
        (5, 9),
    ]


# Equal to the direct form ---------------------------------------------------------------------


def test_the_direct_form_is_convolution_with_patches():
    q, keys, values, _ = maps((1, 3, 9, 11))
    patches = [
        torch.cat([F.unfold(x, 3, padding=1).mT.reshape(-1, x.shape[1], 3, 3) for x in each])
        for each in (keys, values)
    ]
    norms = patches[0].flatten(1).norm(dim=1).clamp_min(EPS)
    scores = F.conv2d(q, patches[0] / norms[:, None, None, None], padding=1)
    expected = F.conv_transpose2d((10 * scores).softmax(1), patches[1], padding=1) / 4
    torch.testing.assert_close(pyramid_attention_reference(q, keys, values), expected)


@settings(deadline=None, max_examples=40)
@example(size=(5, 150), channels=4, values=33, levels=5, window=(5, 140), spread=3.0, seed=0)
@example(size=(30, 33), channels=4, values=6, levels=5, window=(1, 1), spread=1.0, seed=0)
@example(size=(1, 1), channels=1, values=1, levels=5, window=None, spread=1.0, seed=0)
@given(
    size=st.tuples(*LENGTHS),
    channels=st.integers(1, 5),
    values=st.sampled_from([1, 3, 33]),
    levels=st.integers(1, 5),
    window=st.none() | st.tuples(st.integers(1, 26), st.integers(1, 44)),
    spread=st.sampled_from([0.1, 1.0, 30.0]),
    seed=st.integers(0, 99),
)
def test_equals_the_direct_form(size, channels, values, levels, window, spread, seed):
    case = maps((2, channels, *size), values, levels=levels, spread=spread, seed=seed)
    options = {"window": window, **case[3]}
    expected = pyramid_attention_reference(*case[:3], **options)
    result = pyramid_attention(*case[:3], **options)
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-10)
    result = pyramid_attention(*single(case)[:3], **options)
    torch.testing.assert_close(result.double(), expected, rtol=0, atol=1e-5 * max(1.0, spread))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_window_that_covers_the_map_is_global(dtype):
    q, keys, values, _ = maps((2, 4, 19, 26), dtype=dtype)
    everything = pyramid_attention(q, keys, values)
    assert torch.equal(pyramid_attention(q, keys, values, window=(19, 26)), everything)
    assert torch.equal(pyramid_attention(q, keys, values, window=(200, 27)), everything)
    inner = pyramid_attention(q, keys, values, window=(19, 25))
    assert not torch.allclose(inner, everything)


@pytest.mark.parametrize("window", [None, (7, 9)])
@pytest.mark.parametrize("budget", [2**17, 2**14])
def test_the_result_does_not_depend_on_the_budget(window, budget):
    q, keys, values, options = maps((1, 2, 9, 21), levels=2)
    expected = pyramid_attention(q, keys, values, window=window, **options)
    result = pyramid_attention(q, keys, values, window=window, budget=budget, **options)
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-12)


def test_a_batch_is_attended_picture_by_picture():
    q, keys, values, _ = maps((3, 4, 14, 35), dtype=torch.float32)
    together = pyramid_attention(q, keys, values, window=(9, 9))
    for n in range(3):
        one = slice(n, n + 1)
        alone = pyramid_attention(
            q[one], [k[one] for k in keys], [v[one] for v in values], window=(9, 9)
        )
        torch.testing.assert_close(together[one], alone)


def test_threads_change_nothing():
    q, keys, values, _ = maps((2, 4, 20, 50), dtype=torch.float32)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            results.append(pyramid_attention(q, keys, values, window=(9, 12)))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*results)


@pytest.mark.parametrize("channels_last", [False, True])
def test_views_of_larger_maps(channels_last):
    form = torch.channels_last if channels_last else torch.contiguous_format
    q, keys, values, _ = maps((1, 8, 13, 17), 8, dtype=torch.float32)
    views = [
        [torch.cat([x, x], 1).contiguous(memory_format=form).chunk(2, 1)[1] for x in each]
        for each in ([q], keys, values)
    ]
    result = pyramid_attention(views[0][0], *views[1:], window=(8, 9))
    assert result.is_contiguous(memory_format=torch.channels_last)
    expected = pyramid_attention(q, keys, values, window=(8, 9))
    torch.testing.assert_close(result, expected)


# Numbers --------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [None, (9, 9)])
def test_scores_far_apart_neither_overflow_nor_vanish(window):
    q, keys, values, _ = maps((1, 4, 15, 20))
    q[..., 7:, :] *= 1e4
    q[..., :4, :] *= -1e4  # every score of a query far below zero is as good as any other
    keys = [k.abs() for k in keys]
    expected = pyramid_attention_reference(q, keys, values, window=window)
    q, keys, values = q.float(), [k.float() for k in keys], [v.float() for v in values]
    result = pyramid_attention(q, keys, values, window=window)
    near = pyramid_attention_reference(q, keys, values, window=window)
    assert result.isfinite().all()
    difference = (result.double() - expected).abs().max()
    assert difference < 0.1 * expected.abs().max()
    assert difference < 5 * (near.double() - expected).abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_where_keys_are_zero_all_weigh_the_same(dtype):
    q, keys, values, options = maps((1, 4, 8, 20), dtype=dtype, levels=1)
    result = pyramid_attention(q, [0 * k for k in keys], values, **options)
    ones = F.conv2d(torch.ones(1, 1, 8, 20, dtype=dtype), torch.ones(1, 1, 3, 3, dtype=dtype))
    inner = values[0].mean((2, 3), keepdim=True) * 9 / 4
    assert ones.eq(9).all()
    # a patch reaches out of the map at the border of the keys: less than the mean arrives
    shifted = F.unfold(values[0], 3, padding=1).view(1, 6, 9, -1).mean(-1).sum(-1) / 4
    torch.testing.assert_close(
        result[..., 1:-1, 1:-1], shifted[..., None, None].expand(1, 6, 6, 18)
    )
    assert (shifted.abs() <= 1.5 * inner.abs().max()).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nan_is_not_hidden(dtype):
    q, keys, values, _ = maps((1, 4, 12, 20), dtype=dtype)
    q[0, 0, 5, 6] = torch.nan
    assert pyramid_attention(q, keys, values)[0, :, 5, 6].isnan().all()
    q, keys, values, _ = maps((1, 4, 12, 20), dtype=dtype)
    keys[0][0, 0, 5, 6] = torch.nan
    assert pyramid_attention(q, keys, values).isnan().all()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 1e-2), (torch.float16, 1e-3)])
def test_half_precision_is_computed_in_single(dtype, tolerance):
    q, keys, values, _ = maps((1, 4, 16, 18), dtype=dtype)
    result = pyramid_attention(q, keys, values, window=(9, 9))
    assert result.dtype == dtype
    wide = [x.double() for x in keys], [x.double() for x in values]
    expected = pyramid_attention_reference(q.double(), *wide, window=(9, 9))
    assert (result.double() - expected).abs().max() < tolerance * expected.abs().max()


# Derivatives ----------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [None, (5, 7)])
@pytest.mark.parametrize("budget", [None, 2**16])
def test_derivatives_are_those_of_the_direct_form(window, budget):
    q, keys, values, options = maps((2, 3, 7, 11), 4, levels=3)
    inputs = [x.requires_grad_() for x in (q, *keys, *values)]
    options |= {"window": window}
    results = (
        pyramid_attention(q, keys, values, budget=budget, **options),
        pyramid_attention_reference(q, keys, values, **options),
    )
    gradients = [torch.autograd.grad(result.pow(3).sum(), inputs) for result in results]
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_derivatives_in_single_precision():
    case = maps((1, 4, 20, 19))
    gradients = []
    for q, keys, values, _ in (case, single(case)):
        inputs = [x.detach().requires_grad_() for x in (q, *keys, *values)]
        q, keys, values = inputs[0], inputs[1:6], inputs[6:]
        result = pyramid_attention(q, keys, values, window=(9, 9))
        gradients.append(torch.autograd.grad(result.square().sum(), inputs))
    for exact, ours in zip(*gradients, strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours.double(), exact, rtol=0, atol=1e-5 * exact.abs().max())


def test_derivatives_are_finite_where_keys_are_zero():
    q, keys, values, _ = single(maps((1, 4, 8, 9)))
    inputs = [x.requires_grad_() for x in (q, *(0 * k for k in keys), *values)]
    pyramid_attention(inputs[0], inputs[1:6], inputs[6:]).square().sum().backward()
    assert all(x.grad.isfinite().all() for x in inputs)


def test_operators_are_well_formed():
    q, keys, values, options = maps((1, 3, 6, 7), 4, dtype=torch.float32, levels=2)

    def attention(q, *rest):
        return pyramid_attention(q, rest[:2], rest[2:], window=(4, 5), **options)

    inputs = [x.requires_grad_() for x in (q, *keys, *values)]
    compiled = torch.compile(attention, backend="aot_eager", fullgraph=True)
    result, expected = compiled(*inputs), attention(*inputs)
    torch.testing.assert_close(result, expected)
    for ours, theirs in zip(
        torch.autograd.grad(result.square().sum(), inputs),
        torch.autograd.grad(expected.square().sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)


# Work and memory ------------------------------------------------------------------------------


class Made(TorchDispatchMode):
    """Elements of the tensors that operations make, views left out."""

    def __init__(self):
        super().__init__()
        self.total = self.largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and not function.is_view:
            self.total += result.numel()
            self.largest = max(self.largest, result.numel())
        return result


def made(side, window, budget, attend):
    """What the attention of one scale makes; its maps have 2 channels."""
    q, k, v = torch.rand(3, 1, 2, side, side, dtype=torch.float64).unbind()
    spans = window_spans(side, window, side, 1.0)
    levels = [pyramid_blocks.Level(side, side, spans, spans, 0, side * side)]
    packed = (x.flatten(2).mT.contiguous() for x in (k, v))
    arguments = q, next(packed), torch.ones(1, side * side, dtype=torch.float64), next(packed)
    with Made() as mode:
        attend(*arguments, levels, budget)
    return mode


def backward(q, k, factor, v, levels, budget):
    result, top, total = pyramid_blocks.attend(q, k, factor, v, levels, budget)
    return pyramid_blocks.gradients(result, q, k, factor, v, top, total, levels, budget)


@pytest.mark.parametrize("attend", [pyramid_blocks.attend, backward])
def test_work_of_a_window_grows_with_the_pixels_only(attend):
    small, large = (made(side, 12, 2**24, attend) for side in (32, 64))
    assert large.total < 5.5 * small.total  # tiles at the border have less to see
    assert made(64, 64, 2**24, attend).total > 12 * made(32, 32, 2**24, attend).total


@pytest.mark.parametrize("attend", [pyramid_blocks.attend, backward])
def test_blocks_stay_within_the_budget(attend):
    budget, image = 2**20, 2 * 34 * 34
    assert made(32, 32, budget, attend).largest <= max(budget // 8 // 8, image)
    assert made(32, 32, 2**24, attend).largest > budget // 8 // 8


def test_single_precision_on_the_cpu_makes_maps_only():
    from fullres.ops import pyramid_cpu

    def attend(q, k, factor, v, levels, budget):
        return pyramid_cpu.attend(*(x.float() for x in (q, k, factor, v)), levels)

    # values are filled up to 32 channels, and strips of the result overlap
    assert made(64, 64, 0, attend).largest <= 32 * 64 * 64 * 18 / 16


def test_an_empty_batch():
    for dtype in (torch.float32, torch.float64):
        q, keys, values, _ = maps((0, 4, 8, 8), dtype=dtype)
        assert pyramid_attention(q, keys, values).shape == (0, 6, 8, 8)


# Refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", [pyramid_attention, pyramid_attention_reference])
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"window": (0, 3)}, "a window is at least 1 × 1, got 0 × 3"),
        ({"scales": (1.0,)}, "1 scales, 2 and 2 maps"),
        ({"scales": (0.9, 1.0)}, "scales start with 1"),
        ({"scales": (1.0, 1.1)}, "scales start with 1"),
        ({"q": torch.ones(4, 6, 7)}, "q must be floating-point maps"),
        ({"q": torch.ones(1, 4, 6, 7, dtype=torch.int64)}, "q must be floating-point maps"),
        ({"q": torch.ones(1, 4, 6, 8)}, "of the queries' shape"),
        ({"keys": [torch.ones(1, 4, 6, 7), torch.ones(1, 3, 5, 6)]}, "keys and values must be"),
        ({"values": [torch.ones(1, 4, 6, 7), torch.ones(1, 4, 4, 6)]}, "keys and values must be"),
        ({"values": [torch.ones(1, 4, 6, 7), torch.ones(1, 5, 5, 6)]}, "keys and values must be"),
        ({"values": 2 * [torch.ones(1, 4, 6, 7).double()]}, "keys and values must be"),
    ],
)
def test_what_does_not_fit_is_refused(attention, change, words):
    each = [torch.ones(1, 4, 6, 7), torch.ones(1, 4, 5, 6)]
    given = {"q": each[0], "keys": each, "values": each, "scales": (1.0, 0.9)}
    with pytest.raises(ValueError, match=words):
        attention(**(given | change))
