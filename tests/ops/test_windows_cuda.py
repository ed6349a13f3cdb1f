"""Attention's kernels for GPUs: on a GPU where there is one, otherwise in Triton's interpreter.

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

from fullres.ops import cells
from fullres.ops.windows import transposed_attention, transposed_attention_reference

pytest.importorskip("triton")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
ON_GPU = torch.cuda.is_available() and not INTERPRETED
DEVICE = "cuda" if ON_GPU else "cpu"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


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


def borders(choose, length, most):
    return [0, *sorted(choose.sample(range(1, length), choose.randint(0, most))), length]


def draw(seed, patch):
    """Two maps of unequal numbers of channels, matrices, borders of cells, by seed."""
    choose = random.Random(seed)
    patch.setattr("fullres.ops.windows_cuda.CHUNK", choose.choice([64, 2048]))
    patch.setattr("fullres.ops.windows_cuda.BLOCK", choose.choice([16, 64]))
    batch, heads = choose.choice([(1, 1), (2, 1), (1, 2)])
    d, c = (choose.choice([1, 3, 16, 20]) for _ in range(2))
    h, w = choose.randint(3, 9), choose.randint(33, 70)
    rows, columns = borders(choose, h, 2), borders(choose, w, 1)
    generator = torch.Generator().manual_seed(seed)
    dtype = DTYPES[seed % 3]
    shape = (2, batch, heads, max(c, d), h, w)
    a, b = (0.5 + torch.randn(shape, generator=generator)).to(DEVICE, dtype).unbind()
    if choose.random() < 0.5:
        a, b = (x.movedim(2, -1).contiguous().movedim(-1, 2) for x in (a, b))
    m = torch.randn(len(rows) - 1, len(columns) - 1, batch, heads, c, d, generator=generator)
    m = m.to(DEVICE).mT if choose.random() < 0.5 else m.mT.contiguous().to(DEVICE)
    return a[:, :, :d], b[:, :, :c], m, rows, columns


def each_cell(rows, columns):
    for r in range(len(rows) - 1):
        for s in range(len(columns) - 1):
            yield r, s, (..., slice(*rows[r : r + 2]), slice(*columns[s : s + 2]))


def maps(*shape, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, *shape, generator=generator).to(DEVICE, dtype)
    return *x.unbind(), torch.tensor([0.7, 3.0], device=DEVICE, dtype=dtype)


class TestKernels:
    __test__ = ON_GPU or INTERPRETED

    @pytest.mark.parametrize("seed", range(6))
    def test_gram_matrices(self, monkeypatch, seed):
        a, b, _, rows, columns = draw(seed, monkeypatch)
        assert cells._has_kernel(columns, a, b)
        found = cells.gram(a, b, rows, columns)
        assert found.dtype == torch.float32
        for r, s, here in each_cell(rows, columns):
            x, y = (z[here].double().flatten(3) for z in (a, b))
            error = (found[r, s].double() - x @ y.mT).abs()
            assert (error <= 1e-5 * (x.abs() @ y.abs().mT)).all()

    @pytest.mark.parametrize("seed", range(20, 23))
    def test_squares(self, monkeypatch, seed):
        a, _, _, rows, columns = draw(seed, monkeypatch)
        found = cells.squares(a, rows, columns)
        for r, s, here in each_cell(rows, columns):
            expected = a[here].double().square().sum((-2, -1))
            torch.testing.assert_close(found[r, s].double(), expected, rtol=1e-6, atol=0)

    @pytest.mark.parametrize("seed", range(40, 46))
    def test_application(self, monkeypatch, seed):
        _, b, m, rows, columns = draw(seed, monkeypatch)
        found = cells.weigh(m, b, rows, columns)
        assert found.dtype == b.dtype
        assert found.stride() == cells._weigh_room(m, b, rows, columns).stride()
        # the interpreter cuts bfloat16 off where a GPU rounds
        ulp = 1 if INTERPRETED and b.dtype == torch.bfloat16 else 0.5
        eps = 1.02 * ulp * torch.finfo(b.dtype).eps
        for r, s, here in each_cell(rows, columns):
            x, weights = b[here].double().flatten(3), m[r, s].double()
            expected = weights @ x
            error = (found[here].double().flatten(3) - expected).abs()
            # float32 sums, then one rounding
            allowed = eps * expected.abs() + 2e-6 * (weights.abs() @ x.abs())
            assert (error <= allowed).all()

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_attention_equals_the_direct_form(self, dtype):
        inputs = maps(1, 8, 9, 70, dtype=dtype)
        found = transposed_attention(*inputs, (6, 41))
        expected = transposed_attention_reference(*(x.double() for x in inputs), (6, 41))
        tolerance = 1e-5 if dtype == torch.float32 else 3 * torch.finfo(dtype).eps
        assert (found.double() - expected).abs().max() <= tolerance

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_gradients_are_those_of_the_direct_form(self, dtype):
        inputs = maps(1, 6, 7, 41, dtype=dtype)
        leaves = [x.clone().requires_grad_() for x in inputs]
        wide = [x.double().requires_grad_() for x in inputs]
        found, expected = (
            torch.autograd.grad(attention(*some, (5, 25)).square().sum(), some)
            for attention, some in (
                (transposed_attention, leaves),
                (transposed_attention_reference, wide),
            )
        )
        tolerance = 1e-5 if dtype == torch.float32 else 2e-2
        for ours, theirs in zip(found, expected, strict=True):
            assert ours.dtype == dtype
            allowed = tolerance * theirs.abs().max()
            assert (ours.double() - theirs).abs().max() <= allowed

    def test_nothing_leaks_from_cell_to_cell(self):
        q, k, v, temperature = maps(1, 4, 6, 80)
        for x in (q, k):
            x[..., 40:] = 0
            x[..., :40] *= 1e6
        found = transposed_attention(q, k, v, temperature, (6, 30))
        expected = transposed_attention_reference(q, k, v, temperature, (6, 30))
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
