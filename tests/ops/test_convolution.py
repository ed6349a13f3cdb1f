"""Convolution by our kernels agrees with direct sums in float64, whatever the sizes."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import numba
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch._subclasses import FakeTensorMode

from fullres.networks.layers import Conv2d
from fullres.ops import convolution as dispatch
from fullres.ops import narrow_cpu, pointwise_cpu, products_cpu, winograd_cpu
from fullres.ops.convolution import convolution
from fullres.ops.lanes import LANES, pointer

HALVES = pytest.mark.skipif(not winograd_cpu.PAIRS, reason="needs products of bfloat16")
LARGE = (1, 48, 80, 96)
"""A shape that the kernel serves."""


def drawn(shape, outs, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(outs, shape[1], 3, 3, generator=generator)
    return x, weight, torch.randn(outs, generator=generator)


def bound(x, weight):
    """What rounding may add: some units in the last place of the largest sum there could be."""
    return 4 * torch.finfo(x.dtype).eps * x.abs().max() * weight.abs().sum((1, 2, 3)).max()


@settings(max_examples=120, deadline=None)
@given(
    batch=st.integers(1, 3),
    channels=st.integers(16, 150),
    outs=st.integers(16, 150),
    height=st.integers(1, 30),
    width=st.integers(1, 45),
    padding=st.integers(0, 1),
    biased=st.booleans(),
    offset=st.sampled_from([0.0, 30.0]),
    scale=st.sampled_from([1e-20, 1.0, 1e20]),
    half=st.booleans(),
    slope=st.sampled_from([1.0, 0.0, 0.2]),
    plus=st.sampled_from(["nothing", "a map", "in place"]),
)
@torch.no_grad()
def test_agrees_with_float64(
    batch, channels, outs, height, width, padding, biased, offset, scale, half, slope, plus
):
    height, width = (max(side, 3 - 2 * padding) for side in (height, width))
    x, weight, bias = drawn((batch, channels, height, width), outs, seed=height * width)
    x, bias = (x + offset) * scale, bias * scale if biased else None
    if half and winograd_cpu.PAIRS and channels % 2 == 0:
        x, weight = x.bfloat16(), weight.bfloat16()
        bias = bias.bfloat16() if biased else None
    exact = F.conv2d(
        x.double(), weight.double(), None if bias is None else bias.double(), padding=padding
    )
    exact = F.leaky_relu(exact, slope)
    added = None if plus == "nothing" else exact.flip(3).to(x.dtype)
    if added is not None:
        exact = exact + added.double()
    found = winograd_cpu.convolve(
        *(x, weight, bias, padding, slope, added), in_place=plus == "in place"
    )
    assert (found.shape, found.dtype) == (exact.shape, x.dtype)
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert (found - exact).abs().max() <= bound(x, weight)
    if plus == "in place":
        assert (found.data_ptr() == added.data_ptr()) == (outs % LANES == 0)


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "derived", "mapped", "float64", "few"])
@pytest.mark.parametrize("in_place", [False, True])
def test_a_leaky_relu_and_a_sum_follow(kind, in_place):
    shape = (1, 8, 6, 5) if kind == "few" else LARGE
    x, weight, bias = drawn(shape, 48)
    if kind in ("bfloat16", "float64"):
        x, weight, bias = (t.to(getattr(torch, kind)) for t in (x, weight, bias))
    plus = F.conv2d(x, weight, bias, padding=1).flip(2)
    expected = F.leaky_relu(F.conv2d(x, weight, bias, padding=1), 0.1) + plus
    kept = plus.clone(memory_format=torch.preserve_format)

    def convolve(x, plus):
        return convolution(x, weight, bias, 1, slope=0.1, plus=plus, in_place=in_place)

    with torch.set_grad_enabled(kind == "derived"):
        if kind == "mapped":
            found = torch.vmap(convolve, (0, None))(x[None], plus)[0]
        else:
            found = convolve(x.requires_grad_(kind == "derived"), plus)
    assert found.requires_grad == (kind == "derived")
    tolerance = {"bfloat16": bound(x, weight).item(), "float64": 1e-12}.get(kind, 1e-4)
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    if not in_place or kind in ("derived", "mapped"):
        assert torch.equal(plus, kept)


@torch.no_grad()
def test_a_map_that_adds_itself_is_not_overwritten_while_it_is_read():
    x, weight, bias = drawn(LARGE, 48)
    expected = F.conv2d(x, weight, bias, padding=1) + x
    found = convolution(x, weight, bias, 1, plus=x, in_place=True)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@settings(max_examples=120, deadline=None)
@given(
    batch=st.integers(1, 3),
    channels=st.integers(1, 150),
    outs=st.integers(1, 100),
    height=st.integers(1, 30),
    width=st.integers(1, 45),
    biased=st.booleans(),
)
@torch.no_grad()
def test_one_by_one_agrees_with_float64(batch, channels, outs, height, width, biased):
    x, weight, bias = drawn((batch, channels, height, width), outs, seed=height * width)
    weight, bias = weight[:, :, 1:2, 1:2], bias if biased else None
    found = pointwise_cpu.convolve(x, weight, bias)
    exact = F.conv2d(x.double(), weight.double(), None if bias is None else bias.double())
    assert found.shape == exact.shape
    assert found.is_contiguous(memory_format=torch.channels_last)
    last = 0 if bias is None else torch.finfo(bias.dtype).eps / 2 * bias.abs().max()
    assert (found - exact).abs().max() <= bound(x, weight) + last


@settings(max_examples=120, deadline=None)
@given(
    batch=st.integers(1, 3),
    channels=st.integers(1, 100),
    outs=st.integers(1, narrow_cpu.MOST),
    height=st.integers(1, 20),
    width=st.one_of(st.integers(1, 40), st.integers(185, 200), st.integers(380, 390)),
    padding=st.integers(0, 1),
    biased=st.booleans(),
    half=st.booleans(),
)
@torch.no_grad()
def test_few_channels_agree_with_float64(
    batch, channels, outs, height, width, padding, biased, half
):
    height, width = (max(side, 3 - 2 * padding) for side in (height, width))
    x, weight, bias = drawn((batch, channels, height, width), outs, seed=height * width)
    bias = bias if biased else None
    if half and winograd_cpu.PAIRS and channels % 2 == 0:
        x, weight = x.bfloat16(), weight.bfloat16()
        bias = bias.bfloat16() if biased else None
    found = narrow_cpu.convolve(x, weight, bias, padding)
    exact = F.conv2d(
        x.double(), weight.double(), None if bias is None else bias.double(), padding=padding
    )
    assert (found.shape, found.dtype) == (exact.shape, x.dtype)
    assert found.is_contiguous(memory_format=torch.channels_last)
    last = 0 if bias is None else torch.finfo(bias.dtype).eps / 2 * bias.abs().max()
    assert (found - exact).abs().max() <= bound(x, weight) + last


@torch.no_grad()
def test_to_few_channels_what_is_not_finite_stays_where_it_is():
    x, weight, bias = drawn((1, 32, 12, 20), 3)
    x[0, 7, 5, 9] = torch.nan
    found = narrow_cpu.convolve(x, weight, bias, 1)
    reached = torch.zeros(1, 3, 12, 20, dtype=torch.bool)
    reached[..., 4:7, 8:11] = True
    assert torch.equal(found.isnan(), reached)


@torch.no_grad()
@pytest.mark.parametrize(
    ("channels", "outs", "size", "served"),
    [
        (32, 3, 96, True),
        (16, 5, 128, True),
        (32, 6, 96, False),
        (15, 3, 192, False),
        (32, 3, 60, False),
    ],
)
def test_a_pictures_channels_have_their_own_kernel(monkeypatch, channels, outs, size, served):
    x, weight, bias = drawn((1, channels, size, size), outs)
    calls = []
    kernel = narrow_cpu.convolve
    monkeypatch.setattr(
        narrow_cpu, "convolve", lambda *given: calls.append(given) or kernel(*given)
    )
    plus = torch.randn(1, outs, size, size).contiguous(memory_format=torch.channels_last)
    found = convolution(x, weight, bias, 1, slope=0.1, plus=plus)
    assert bool(calls) == served
    expected = F.leaky_relu(F.conv2d(x, weight, bias, padding=1), 0.1) + plus
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize(
    ("outs", "size", "served"),
    [(8, 1024, True), (48, 1024, True), (49, 1024, False), (8, 99, False)],
)
def test_large_maps_to_few_channels_go_through_memory_once(monkeypatch, outs, size, served):
    x = torch.randn(1, 16, size, 1024).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(outs, 16, 1, 1)
    calls = []
    kernel = pointwise_cpu.convolve
    monkeypatch.setattr(
        pointwise_cpu, "convolve", lambda *given: calls.append(given) or kernel(*given)
    )
    found = convolution(x, weight)
    assert bool(calls) == served
    torch.testing.assert_close(found, F.conv2d(x, weight), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_company_does_not_decide_which_kernel_serves(monkeypatch):
    x = torch.randn(3, 16, 50, 61).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(5, 16, 1, 1)
    for threshold in (x[0].numel(), x[0].numel() + 1):
        monkeypatch.setattr(dispatch, "UNCACHED", threshold)
        alone = torch.cat([convolution(one[None], weight) for one in x])
        assert torch.equal(convolution(x, weight), alone)


@torch.no_grad()
def test_rounding_is_near_that_of_direct_sums():
    x, weight, bias = drawn((1, 64, 96, 96), 64)
    exact = F.conv2d(x.double(), weight.double(), bias.double(), padding=1)
    direct, found = (
        (convolve(x, weight, bias, padding=1) - exact).square().mean().sqrt()
        for convolve in (F.conv2d, winograd_cpu.convolve)
    )
    assert found <= 2.5 * direct


@HALVES
@torch.no_grad()
def test_bfloat16_rounds_as_much_as_is_said():
    x, weight, bias = (t.bfloat16() for t in drawn((1, 64, 96, 96), 64))
    for values, times in ((x, 8), (F.avg_pool2d(x.float(), 5, 1).abs().bfloat16(), 4)):
        exact = F.conv2d(values.double(), weight.double(), bias.double(), padding=1)
        direct, found = (
            (convolve(values, weight, bias, padding=1) - exact).square().mean().sqrt()
            for convolve in (F.conv2d, winograd_cpu.convolve)
        )
        assert found <= times * direct


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=HALVES)])
@pytest.mark.skipif(not products_cpu.WIDE, reason="has fewer registers")
def test_sums_stay_in_registers(dtype):
    """The loops over channels write nothing, to the stack or elsewhere."""

    @numba.njit(nogil=True, error_model="numpy")
    def product(width, values, factors, sums, count, depth):
        products_cpu.matmul(
            *(width, count, depth, (pointer(values), 0, depth)),
            *((pointer(factors), 0, width * LANES), (pointer(sums), 0)),
            *((pointer(sums), 0, width * LANES), None, None),
        )

    array = numba.typeof(np.zeros(1, np.float32 if dtype == torch.float32 else np.uint32))
    sums = numba.typeof(np.zeros(1, np.float32))
    product.compile((numba.intp, array, array, sums, numba.intp, numba.intp))
    (code,) = product.inspect_asm().values()
    step = "vfmadd" if dtype == torch.float32 else "vdpbf16ps"
    loops = [loop for loop in loops_of(code) if sum(step in line for line in loop) >= 24]
    assert loops
    for loop in loops:
        assert not any(re.search(r"mov.*%zmm\d+, .*\(", line) for line in loop)


def loops_of(code):
    """Innermost loops of assembly, as lines from a label to the jump back to it."""
    lines, labels, begins = code.splitlines(), {}, {}
    for n, line in enumerate(lines):
        if label := re.match(r"(\S+):", line):
            labels[label[1]] = n
        elif (jump := re.match(r"\s+j\w+\s+(\S+)", line)) and jump[1] in labels:
            begins[n] = labels[jump[1]]
    for end, begin in begins.items():
        if not any(begin < other < n < end for n, other in begins.items()):
            yield lines[begin:end]


@torch.no_grad()
@pytest.mark.parametrize("threads", [1, 3])
def test_a_picture_is_convolved_alike_in_any_company(threads):
    x, weight, bias = drawn((3, 40, 50, 61), 33)
    together = winograd_cpu.convolve(x, weight, bias, 1)
    used = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        alone = [winograd_cpu.convolve(one[None], weight, bias, 1) for one in x]
    finally:
        torch.set_num_threads(used)
    assert torch.equal(torch.cat(alone), together)


@torch.no_grad()
def test_what_is_not_finite_reaches_its_tiles_only():
    x, weight, bias = drawn((1, 16, 40, 40), 16)
    clean = winograd_cpu.convolve(x, weight, bias, 1)
    x[0, 3, 20, 17] = torch.nan
    found = winograd_cpu.convolve(x, weight, bias, 1)
    assert found[..., 19:22, 16:19].isnan().all()
    near = torch.zeros(40, 40, dtype=torch.bool)
    near[16:24, 12:24] = True
    assert torch.equal(found[..., ~near], clean[..., ~near])


@pytest.mark.parametrize(
    ("kind", "served"),
    [
        ("large", True),
        ("few channels", False),
        ("few pixels", False),
        ("bfloat16", winograd_cpu.HALVES),
        ("bfloat16, an odd channel", False),
        ("float64", False),
        ("rows of channels", False),
        ("5 × 5", False),
        ("padded by 2", False),
        ("derived", False),
        ("meta", False),
    ],
)
def test_what_the_kernel_serves(monkeypatch, kind, served):
    x, weight, bias = drawn(LARGE, 40)
    padding = 1
    if kind == "few channels":
        x, weight = x[:, :31].contiguous(memory_format=torch.channels_last), weight[:, :31]
    elif kind == "few pixels":
        x = x[..., :12, :].contiguous(memory_format=torch.channels_last)
    elif kind in ("bfloat16", "float64"):
        x, weight, bias = (t.to(getattr(torch, kind)) for t in (x, weight, bias))
    elif kind == "bfloat16, an odd channel":
        x, weight, bias = (t.bfloat16() for t in (x[:, :47], weight[:, :47], bias))
        x = x.contiguous(memory_format=torch.channels_last)
    elif kind == "rows of channels":
        x = x.contiguous()
    elif kind == "5 × 5":
        weight = F.pad(weight, (1, 1, 1, 1))
    elif kind == "padded by 2":
        padding = 2
    elif kind == "derived":
        weight.requires_grad_()
    elif kind == "meta":
        x, weight, bias = (t.to("meta") for t in (x, weight, bias))
    calls = []
    kernel = winograd_cpu.convolve
    monkeypatch.setattr(
        winograd_cpu,
        "convolve",
        lambda *given, **rest: calls.append(given) or kernel(*given, **rest),
    )
    with torch.set_grad_enabled(kind == "derived"):
        found = convolution(x, weight, bias, padding)
        expected = F.conv2d(x, weight, bias, padding=padding)
    assert bool(calls) == served
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype
    assert found.requires_grad == (kind == "derived")
    if kind != "meta":
        tolerance = 1e-4 if expected.dtype != torch.bfloat16 else bound(x, weight).item()
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=tolerance)


@torch.no_grad()
def test_types_must_agree_as_for_torch():
    x, weight, bias = drawn(LARGE, 40)
    with pytest.raises(RuntimeError):
        convolution(x, weight.double(), bias)


@torch.no_grad()
@pytest.mark.parametrize("side", [1, 3])
def test_shapes_must_agree_as_for_torch(monkeypatch, side):
    monkeypatch.setattr(dispatch, "UNCACHED", 0)
    x, weight, bias = drawn(LARGE, 40)
    weight = weight[:, :, :side, :side]
    for wrong in (weight[:, :40], torch.cat([weight, weight], 1), weight[None], weight[0]):
        with pytest.raises(RuntimeError):
            convolution(x, wrong, bias, padding=side // 2)
    with pytest.raises(RuntimeError):
        convolution(x, weight, bias[:39], padding=side // 2)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:`torch.jit")
def test_traces():
    x, weight, bias = drawn(LARGE, 40)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        shape = convolution(torch.empty(LARGE), weight, bias, padding=1).shape
    assert shape == (1, 40, 80, 96)
    with torch.no_grad():
        traced = torch.jit.trace(lambda x: convolution(x, weight, bias, 1), torch.zeros_like(x))
        torch.testing.assert_close(traced(x), F.conv2d(x, weight, bias, padding=1))
        compiled = torch.compile(convolution, backend="eager", fullgraph=True)
        torch.testing.assert_close(
            compiled(x, weight, bias, 1), F.conv2d(x, weight, bias, padding=1)
        )


@torch.no_grad()
@pytest.mark.parametrize(
    "settings",
    [
        {"kernel_size": 3, "padding": 1},
        {"kernel_size": 3},
        {"kernel_size": 3, "padding": 1, "bias": False},
        {"kernel_size": 3, "padding": 1, "stride": 2},
        {"kernel_size": 3, "padding": 1, "dilation": 2},
        {"kernel_size": 3, "padding": 1, "groups": 8},
        {"kernel_size": 3, "padding": "same"},
        {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"},
        {"kernel_size": 3, "padding": (0, 1)},
        {"kernel_size": (1, 3), "padding": (0, 1)},
        {"kernel_size": 1},
    ],
    ids=str,
)
def test_the_layer_is_that_of_torch(settings):
    torch.manual_seed(0)
    ours = Conv2d(48, 40, **settings)
    theirs = nn.Conv2d(48, 40, **settings)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(LARGE).contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)
    assert repr(ours) == repr(theirs)


@torch.no_grad()
def test_the_layer_takes_a_picture_without_a_batch():
    layer = Conv2d(48, 40, 3, padding=1)
    assert layer(torch.randn(LARGE[1:])).shape == (40, 80, 96)


def test_narrow_registers(tmp_path):
    """The blocks of processors without AVX-512, compiled for one, on whatever runs this."""
    code = """
        import torch
        import torch.nn.functional as F
        from fullres.ops import narrow_cpu, pointwise_cpu, products_cpu, winograd_cpu
        from fullres.ops.frames import Frame
        from fullres.ops.gate import Layer, gated
        torch.set_grad_enabled(False)
        assert not products_cpu.WIDE
        x = torch.randn(1, 50, 9, 11).contiguous(memory_format=torch.channels_last)
        weight = torch.randn(70, 50, 3, 3)
        found = winograd_cpu.convolve(x, weight, None, 1)
        exact = F.conv2d(x.double(), weight.double(), padding=1)
        assert (found - exact).abs().max() < 1e-3, (found - exact).abs().max()
        found = narrow_cpu.convolve(x, weight[:3], None, 1)
        assert (found - exact[:, :3]).abs().max() < 1e-3, (found - exact[:, :3]).abs().max()
        weight = torch.randn(37, 50, 1, 1)
        found = pointwise_cpu.convolve(x, weight, None)
        exact = F.conv2d(x.double(), weight.double())
        assert (found - exact).abs().max() < 1e-4, (found - exact).abs().max()
        inner = torch.randn(1, 7, 4, 3).contiguous(memory_format=torch.channels_last)
        layers = [Layer(torch.randn(50, 7)), Layer(activation="sigmoid")]
        frame = Frame.of((9, 11), (6, 9))
        gate = F.conv2d(inner.double(), layers[0].weight.double()[:, :, None, None]).sigmoid()
        found = gated(x, inner, layers, frame, plus=x)
        exact = x + x * frame.extended(gate)
        assert (found - exact).abs().max() < 1e-5, (found - exact).abs().max()
    """
    lines = "\n".join(line.strip() for line in code.strip().splitlines())
    told = {"NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": "+sse2"}
    told["NUMBA_CACHE_DIR"] = str(tmp_path)
    done = subprocess.run([sys.executable, "-c", lines], env=os.environ | told, check=False)
    assert done.returncode == 0


def test_thresholds_leave_vectors_full():
    assert dispatch.CHANNELS >= winograd_cpu.LANES
    assert dispatch.NARROW <= narrow_cpu.MOST


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # by torch itself
@torch.no_grad()
def test_torch_func_maps_and_derives_it():
    x, weight, _ = drawn(LARGE, 48)
    several = torch.stack([x, 2 * x + 1])
    exact = torch.stack([F.conv2d(y, weight) for y in several])
    assert torch.allclose(torch.vmap(lambda y: convolution(y, weight))(several), exact, atol=1e-4)
    _, derived = torch.func.jvp(lambda y: convolution(y, weight), (x,), (several[1],))
    assert torch.allclose(derived, exact[1], atol=1e-4)


def test_a_map_narrower_than_the_weights_is_refused():
    weight = torch.randn(32, 32, 3, 3)
    for height in (1, 2):
        x = torch.randn(1, 32, height, 9000).contiguous(memory_format=torch.channels_last)
        with torch.no_grad(), pytest.raises(RuntimeError, match="Kernel size"):
            convolution(x, weight)
