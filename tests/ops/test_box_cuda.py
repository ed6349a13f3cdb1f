"""The kernels for GPUs: on a GPU where there is one, otherwise in Triton's interpreter.

The interpreter is chosen when Triton is imported, so these tests then run in a process of their
own.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from fullres.ops import box
from fullres.ops.box import (
    local_mean,
    local_mean_reference,
    local_mean_var,
    local_mean_var_reference,
    local_normalise,
)

pytest.importorskip("triton")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
ON_GPU = torch.cuda.is_available() and not INTERPRETED
DEVICE = "cuda" if ON_GPU else "cpu"

# rounding to the type once, with a little room for rounding through float32
EPS = {t: torch.finfo(t).eps for t in (torch.float16, torch.bfloat16, torch.float32)}
EPS[torch.float64] = 1e-13


@pytest.mark.skipif(ON_GPU or INTERPRETED, reason="the kernels are tested in this process")
def test_in_the_interpreter():
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__],
        cwd=Path(__file__).parents[2],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout


def exact(x, window):
    """Mean and variance over contained windows by the definition, in float64, replicated."""
    x = x.double().contiguous()
    kh, kw = min(window[0], x.shape[2]), min(window[1], x.shape[3])
    windows = x.unfold(2, kh, 1).unfold(3, kw, 1).flatten(4)
    mean, var = windows.mean(-1), windows.var(-1, correction=0)
    rows = (torch.arange(x.shape[2]) - (kh - 1) // 2).clamp(0, mean.shape[2] - 1)
    columns = (torch.arange(x.shape[3]) - (kw - 1) // 2).clamp(0, mean.shape[3] - 1)
    return tuple(s[:, :, rows.to(x.device)][..., columns.to(x.device)] for s in (mean, var))


def draw(seed, patch):
    """A map in one of the layouts that networks produce, a window, and how the work is cut."""
    choose = random.Random(seed)
    patch.setattr("fullres.ops.box_cuda.BAND", choose.choice([4, 8]))
    patch.setattr("fullres.ops.box_cuda.POLLS", choose.choice([0, 64]))
    patch.setattr("fullres.ops.box_cuda.INSIDE", choose.choice([0, 2**15]))
    patch.setattr("fullres.ops.box_cuda.ELEMENTS", choose.choice([8, 1024]))
    patch.setattr("fullres.ops.box_cuda.MOST_ELEMENTS", choose.choice([256, 4096]))
    c, h, w = choose.choice([1, 2, 3]), choose.randint(1, 12), choose.randint(1, 12)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(choose.choice([1, 2]), 2 * c, h + 3, w + 2, generator=generator) + 1
    x = x.to(DEVICE, list(EPS)[seed % 4])
    layout = choose.choice(["nchw", "nhwc", "slice", "nhwc slice", "transposed"])
    if layout.startswith("nhwc"):
        x = x.contiguous(memory_format=torch.channels_last)
    if layout == "transposed":
        x = x.transpose(2, 3)
    x = x[:, c:, 1 : 1 + h, 1 : 1 + w]
    if layout in ("nchw", "nhwc"):
        fmt = torch.channels_last if layout == "nhwc" else torch.contiguous_format
        x = x.contiguous(memory_format=fmt)
    return x, (choose.randint(1, 14), choose.randint(1, 14))


def vectors(x):
    """Weights and biases for the channels of a map."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    values = torch.linspace(-1, 2, 2 * x.shape[1], dtype=dtype, device=x.device)
    return values.unflatten(0, (2, -1)).unbind()


def normalised(x, window, weight, bias, eps=1e-5):
    """Local normalisation by its definition, in float64, from the reference's statistics."""
    mean, var = local_mean_var_reference(x.double(), window)
    scale, shift = (v.double()[:, None, None] for v in (weight, bias))
    return (x.double() - mean) / (var + eps).sqrt() * scale + shift


class TestKernels:
    __test__ = ON_GPU or INTERPRETED

    def test_maps_are_served_by_the_kernels(self):
        from fullres.ops import box_cuda

        assert box._kernels(torch.ones(1, device=DEVICE)) is box_cuda

    @pytest.mark.parametrize("seed", range(10))
    def test_mean(self, monkeypatch, seed):
        x, window = draw(seed, monkeypatch)
        replicate = seed % 3 > 0
        found = local_mean(x, window, replicate=replicate)
        expected = exact(x, window)[0]
        if not replicate:
            kh, kw = box._clipped(x, window)
            expected = box._contained(expected, kh, kw)
        assert found.dtype == x.dtype
        assert found.shape == expected.shape
        scale = x.double().abs().max()
        eps = EPS[x.dtype]
        assert (found.double() - expected).abs().max() <= 0.51 * eps * scale + 1e-7 * eps

    @pytest.mark.parametrize("seed", range(100, 106))
    def test_mean_and_variance(self, monkeypatch, seed):
        x, window = draw(seed, monkeypatch)
        mean, var = local_mean_var(x, window)
        exact_mean, exact_var = exact(x, window)
        scale, eps = x.double().abs().max(), EPS[x.dtype]
        assert mean.stride() == var.stride() == box._result(x, 1, 1, True).stride()
        assert (mean.double() - exact_mean).abs().max() <= 0.51 * eps * scale + 1e-7 * eps
        assert (var.double() - exact_var).abs().max() <= 0.51 * eps * scale**2 + 2e-8 * eps
        assert var.min() >= 0

    @pytest.mark.parametrize("seed", range(200, 206))
    def test_normalisation(self, monkeypatch, seed):
        x, window = draw(seed, monkeypatch)
        weight, bias = vectors(x)
        expected = normalised(x, window, weight, bias, eps=1e-2)
        found = local_normalise(x, window, weight, bias, eps=1e-2)
        assert found.dtype == x.dtype
        error = (found.double() - expected).abs()
        # float32 in the kernel, then one rounding
        allowed = EPS[x.dtype] * expected.abs() + (3e-6 if x.dtype != torch.float64 else 1e-12)
        assert (error <= allowed).all()

    def test_normalisation_without_weights(self):
        x, window = torch.randn(1, 2, 5, 6, device=DEVICE), (3, 4)
        one, zero = torch.ones(2, device=DEVICE), torch.zeros(2, device=DEVICE)
        expected = normalised(x, window, one, zero).float()
        torch.testing.assert_close(local_normalise(x, window), expected, rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("statistics", [local_mean, lambda x, k: local_mean_var(x, k)[1]])
    def test_sums_of_other_bands_change_no_bit(self, monkeypatch, statistics):
        monkeypatch.setattr("fullres.ops.box_cuda.BAND", 4)
        x = torch.randn(1, 2, 13, 8, device=DEVICE) * 1e3
        results = []
        for polls in (0, 64):
            monkeypatch.setattr("fullres.ops.box_cuda.POLLS", polls)
            results.append(statistics(x, (9, 3)))
        assert torch.equal(*results)

    def test_variance_survives_a_large_mean(self):
        x = 100 + 0.01 * torch.randn(1, 2, 12, 15, generator=torch.Generator().manual_seed(0))
        x = x.to(DEVICE)
        var, true_var = local_mean_var(x, (7, 9))[1], exact(x, (7, 9))[1]
        assert ((var.double() - true_var).abs() / true_var).max() < 1e-3

    def test_more_bands_than_a_word_of_flags_holds(self, monkeypatch):
        monkeypatch.setattr("fullres.ops.box_cuda.BAND", 1)
        x = torch.randn(1, 1, 22, 2, device=DEVICE)
        expected = exact(x, (20, 2))[0].float()
        torch.testing.assert_close(local_mean(x, (20, 2)), expected)

    # of columns that no window starts at, which are not written
    @pytest.mark.filterwarnings("ignore:overflow encountered in cast")
    def test_constant_half_precision_has_no_nan(self):
        x = torch.full((1, 2, 9, 10), 6e4, dtype=torch.float16, device=DEVICE)
        assert torch.equal(local_mean(x, (4, 3)), x)
        assert torch.equal(local_mean_var(x, (4, 3))[1], 0 * x)
        assert torch.equal(local_normalise(x, (4, 3)), 0 * x)

    @pytest.mark.parametrize("replicate", [True, False])
    @pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
    def test_gradient_of_the_mean(self, dtype, replicate):
        x = torch.randn(1, 2, 7, 6, device=DEVICE).to(dtype).requires_grad_()
        wide = x.detach().double().requires_grad_()
        y = local_mean(x, (3, 4), replicate=replicate)
        weights = torch.randn(y.shape, device=DEVICE).to(dtype)
        (grad,) = torch.autograd.grad(y, x, weights)
        reference = local_mean_reference(wide, (3, 4), replicate=replicate)
        (expected,) = torch.autograd.grad(reference, wide, weights.double())
        # sums of folded edges round once, the mean once more
        tolerance = 2 * EPS[dtype] * weights.double().abs().sum() / 12
        assert grad.dtype == dtype
        assert (grad.double() - expected).abs().max() <= tolerance

    def test_gradient_of_mean_and_variance(self):
        x = (torch.randn(1, 2, 7, 6, device=DEVICE) + 50).requires_grad_()
        wide = x.detach().double().requires_grad_()
        weights = torch.randn(2, 1, 2, 7, 6, device=DEVICE)
        grad, expected = (
            torch.autograd.grad(statistics(z, (4, 3)), z, tuple(weights.to(z.dtype)))[0]
            for statistics, z in ((local_mean_var, x), (local_mean_var_reference, wide))
        )
        torch.testing.assert_close(grad.double(), expected, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
    def test_gradient_of_the_normalisation(self, dtype):
        x = torch.randn(1, 2, 7, 6, device=DEVICE).to(dtype)
        weight, bias = vectors(x)
        leaves = [z.clone().requires_grad_() for z in (x, weight, bias)]
        wide = [z.double().requires_grad_() for z in (x, weight, bias)]
        weights = torch.randn(x.shape, device=DEVICE).to(dtype)
        y = local_normalise(leaves[0], (4, 3), *leaves[1:], eps=1e-2)
        found = torch.autograd.grad(y, leaves, weights)
        y = normalised(wide[0], (4, 3), *wide[1:], eps=1e-2)
        expected = torch.autograd.grad(y, wide, weights.double())
        for a, b in zip(found, expected, strict=True):
            tolerance = 1e-9 if dtype == torch.float64 else 2e-3 * b.abs().max().item()
            torch.testing.assert_close(a.double(), b, rtol=0, atol=tolerance)

    def test_an_empty_batch(self):
        x = torch.empty(0, 3, 4, 4, device=DEVICE)
        assert local_mean(x, (2, 2)).shape == local_normalise(x, (2, 2)).shape == x.shape


@pytest.mark.skipif(INTERPRETED, reason="says nothing about the kernels")
class TestNormalisationOnTheCPU:
    """What the kernels are to reproduce."""

    def test_definition_and_type(self):
        torch.manual_seed(0)
        for dtype in EPS:
            x = torch.randn(2, 5, 17, 14).to(dtype)
            weight, bias = vectors(x)
            found = local_normalise(x, (5, 4), weight, bias)
            expected = normalised(x, (5, 4), weight, bias).to(dtype)
            torch.testing.assert_close(found, expected, rtol=2 * EPS[dtype], atol=1e-5)

    def test_derivatives(self):
        torch.manual_seed(0)
        x = torch.randn(1, 2, 5, 4, dtype=torch.float64, requires_grad=True)
        weight, bias = torch.randn(2, 2, dtype=torch.float64).requires_grad_().unbind()

        def call(x, weight, bias):
            return local_normalise(x, (3, 2), weight, bias, 1e-2)

        assert gradcheck(call, (x, weight, bias))
        assert gradgradcheck(call, (x, weight, bias))

    def test_operator(self):
        x = torch.randn(1, 3, 8, 9).contiguous(memory_format=torch.channels_last)
        for weight in (None, torch.randn(3)):
            arguments = (x, weight, None, 3, 5, 1e-5)
            torch.library.opcheck(
                torch.ops.fullres.local_normalise.default,
                arguments,
                test_utils=("test_schema", "test_faketensor"),
            )
