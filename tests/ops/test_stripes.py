from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from fullres.ops import stripes
from fullres.ops.stripes import anchored_attention, window_attention


def grid(height, width, window, shift):
    """Window and place within it of each position: four rows of numbers."""
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    lines = []
    for position, length, start in zip((y, x), window, shift, strict=True):
        moved = position.flatten() - start
        lines += [moved.div(length, rounding_mode="floor"), moved % length]
    return torch.stack(lines)


def dense(q, k, v, scale, bias, queries, keys, window):
    """Every query against every key (B, positions, heads, c), those of other windows left out."""
    logits = torch.einsum("bqhc,bkhc->bhqk", F.normalize(q, dim=-1), F.normalize(k, dim=-1))
    logits = logits * scale.view(-1, 1, 1)
    together = (queries[0][:, None] == keys[0]) & (queries[2][:, None] == keys[2])
    rows, columns = (
        (queries[n][:, None] - keys[n] + size - 1).clamp(0, bias.shape[axis] - 1)
        for axis, n, size in ((1, 1, window[0]), (2, 3, window[1]))
    )
    logits = (logits + bias[:, rows, columns]).masked_fill(~together, float("-inf"))
    return torch.einsum("bhqk,bkhc->bqhc", logits.softmax(-1), v)


def by_head(x, heads):
    return x.flatten(2).mT.unflatten(-1, (heads, -1))


def as_map(x, height, width):
    return x.flatten(2).mT.unflatten(-1, (height, width))


def dense_windows(qkv, window, shift, scale, bias):
    height, width = qkv.shape[2:]
    here = grid(height, width, window, shift)
    q, k, v = (by_head(x, len(scale)) for x in qkv.chunk(3, 1))
    return as_map(dense(q, k, v, scale, bias, here, here, window), height, width)


def dense_stripes(qkv, anchors, down, stripe, shift, scales, biases):
    height, width = qkv.shape[2:]
    few = tuple(n // down for n in stripe)
    here = grid(height, width, stripe, shift)
    there = grid(*anchors.shape[2:], few, tuple(n // down for n in shift))
    heads = len(scales[0])
    q, k, v = (by_head(x, heads) for x in qkv.chunk(3, 1))
    a = by_head(anchors, heads)
    v = dense(a, k, v, scales[0], biases[0], there, here, stripe)
    return as_map(dense(q, a, v, scales[1], biases[1], here, there, few), height, width)


@st.composite
def windows(draw):
    window = (draw(st.integers(1, 6)), draw(st.integers(1, 6)))
    return {
        "size": (draw(st.integers(1, 14)), draw(st.integers(1, 14))),
        "batch": draw(st.integers(1, 2)),
        "heads": draw(st.integers(1, 3)),
        "window": window,
        "shift": tuple(draw(st.integers(0, n - 1)) for n in window),
    }


@st.composite
def striped(draw):
    down = draw(st.integers(1, 3))
    stripe = tuple(down * draw(st.integers(1, 3)) for _ in range(2))
    return {
        "size": (draw(st.integers(1, 14)), draw(st.integers(1, 14))),
        "batch": draw(st.integers(1, 2)),
        "heads": draw(st.integers(1, 2)),
        "down": down,
        "stripe": stripe,
        "shift": tuple(down * draw(st.integers(0, n // down - 1)) for n in stripe),
    }


def of_windows(size, batch, heads, window, shift, dtype=torch.float64):
    """Arguments of `window_attention`."""
    torch.manual_seed(0)
    bias = torch.randn(heads, 2 * window[0] - 1, 2 * window[1] - 1, dtype=dtype)
    qkv = torch.randn(batch, 9 * heads, *size, dtype=dtype)
    return qkv, window, shift, 3 * torch.rand(heads, dtype=dtype), bias


def of_stripes(size, batch, heads, down, stripe, shift, dtype=torch.float64):
    """Arguments of `anchored_attention`."""
    torch.manual_seed(0)
    table = (n + n // down - 1 for n in stripe)
    biases = torch.randn(2, heads, *table, dtype=dtype)
    qkv = torch.randn(batch, 9 * heads, *size, dtype=dtype)
    anchors = torch.randn(batch, 3 * heads, *(-(-n // down) for n in size), dtype=dtype)
    scales = 3 * torch.rand(2, heads, dtype=dtype)
    return qkv, anchors, down, stripe, shift, tuple(scales), tuple(biases)


WINDOWS = {"size": (9, 13), "batch": 2, "heads": 2, "window": (4, 6), "shift": (2, 3)}
STRIPES = {
    "size": (11, 21),
    "batch": 2,
    "heads": 2,
    "down": 2,
    "stripe": (4, 12),
    "shift": (2, 6),
}
BOTH = pytest.mark.parametrize(
    ("attention", "reference", "arguments"),
    [
        pytest.param(window_attention, dense_windows, of_windows(**WINDOWS), id="windows"),
        pytest.param(anchored_attention, dense_stripes, of_stripes(**STRIPES), id="stripes"),
    ],
)


@settings(deadline=None, max_examples=40)
@given(windows())
def test_windows_equal_attention_over_all_positions_with_a_mask(case):
    arguments = of_windows(**case)
    torch.testing.assert_close(window_attention(*arguments), dense_windows(*arguments))


@settings(deadline=None, max_examples=40)
@given(striped())
def test_stripes_equal_attention_over_all_positions_with_a_mask(case):
    arguments = of_stripes(**case)
    torch.testing.assert_close(anchored_attention(*arguments), dense_stripes(*arguments))


def test_anchors_are_shifted_by_whole_cells():
    case = {**STRIPES, "stripe": (4, 12), "shift": (2, 5)}  # 5 positions, 2 cells of 2
    arguments = of_stripes(**case)
    torch.testing.assert_close(anchored_attention(*arguments), dense_stripes(*arguments))


def test_a_shift_below_an_anchors_cell_is_none():
    shifted = of_stripes(**{**STRIPES, "shift": (1, 6)})
    straight = of_stripes(**{**STRIPES, "shift": (0, 6)})
    assert torch.equal(anchored_attention(*shifted), anchored_attention(*straight))


@pytest.mark.parametrize("budget", [1, 500, 3000])
@BOTH
def test_parts_equal_the_whole(monkeypatch, attention, reference, arguments, budget):
    expected = attention(*arguments)
    monkeypatch.setattr(stripes, "_BUDGET", {"cpu": budget})
    torch.testing.assert_close(attention(*arguments), expected)


@BOTH
def test_weights_stay_within_the_budget(monkeypatch, attention, reference, arguments):
    held = []
    plain = F.scaled_dot_product_attention

    def watched(q, k, v, attn_mask, scale):
        held.append(q.shape[:3].numel() * k.shape[2])
        return plain(q, k, v, attn_mask=attn_mask, scale=scale)

    monkeypatch.setattr(F, "scaled_dot_product_attention", watched)
    monkeypatch.setattr(stripes, "_BUDGET", {"cpu": 1500})
    attention(*arguments)
    assert 0 < max(held) <= 1500


@pytest.mark.parametrize("budget", [300, 2**22])
@BOTH
def test_gradients_equal_those_of_the_reference(
    monkeypatch, attention, reference, arguments, budget
):
    monkeypatch.setattr(stripes, "_BUDGET", {"cpu": budget})
    found = []
    for function in (attention, reference):
        leaves = copy.deepcopy(arguments)
        tensors = [x for x in torch.utils._pytree.tree_leaves(leaves) if torch.is_tensor(x)]
        for x in tensors:
            x.requires_grad_()
        function(*leaves).square().sum().backward()
        found.append([x.grad for x in tensors])
    torch.testing.assert_close(*found)


def test_there_are_no_second_derivatives():
    qkv, *rest = of_windows(**WINDOWS)
    qkv.requires_grad_()
    with pytest.raises(NotImplementedError, match="second"):
        torch.autograd.grad(window_attention(qkv, *rest).sum(), qkv, create_graph=True)


def test_the_operator_is_registered_in_full():
    qkv, window, shift, scale, bias = of_windows(**WINDOWS)
    arguments = (qkv.requires_grad_(), None, scale[None], bias[None], 1, window, shift)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    operator = torch.ops.fullres.stripe_attention.default
    found = torch.library.opcheck(operator, arguments, test_utils=checks)
    assert found == dict.fromkeys(checks, "SUCCESS")


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.05), (torch.float16, 0.01)])
@BOTH
def test_half_precision_is_as_good_as_its_rounding(
    attention, reference, arguments, dtype, tolerance
):
    half = torch.utils._pytree.tree_map_only(torch.Tensor, lambda x: x.to(dtype), arguments)
    exact = reference(*torch.utils._pytree.tree_map_only(torch.Tensor, torch.Tensor.double, half))
    output = attention(*half)
    assert output.dtype == dtype
    assert (output.double() - exact).abs().max() < tolerance * exact.abs().max()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_vectors_of_zeros_attend_by_position(dtype):
    qkv, window, shift, scale, bias = of_windows(**WINDOWS, dtype=dtype)
    qkv[:, : 2 * 6] = 0
    assert window_attention(qkv, window, shift, scale, bias).isfinite().all()


@BOTH
def test_any_strides(attention, reference, arguments):
    qkv, *rest = arguments
    expected = attention(qkv, *rest)
    last = qkv.contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(attention(last, *rest), expected)
    assert expected.is_contiguous(memory_format=torch.channels_last)


def test_stripes_that_no_anchors_fit():
    qkv, anchors, down, stripe, *rest = of_stripes(**STRIPES)
    with pytest.raises(ValueError, match="6 × 11"):
        anchored_attention(qkv, anchors[..., 1:], down, stripe, *rest)
    with pytest.raises(ValueError, match="cells of 2"):
        anchored_attention(qkv, anchors, down, (3, 4), *rest)
