from __future__ import annotations

import re

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fullres import Local, convert, plan
from fullres.errors import ConversionError, NetworkError
from fullres.memory import peak_memory
from fullres.networks.catalog import create_network
from fullres.networks.restormer import (
    ARCHITECTURE,
    LayerNorm,
    Restormer,
    TransformerBlock,
    TransposedAttention,
)
from fullres.ops import parts

SMALL = {"dim": 4, "num_blocks": (1, 1, 1, 1), "num_refinement_blocks": 1, "heads": (1, 2, 2, 4)}


@pytest.fixture
def small() -> Restormer:
    torch.manual_seed(0)
    return Restormer(**SMALL).eval()


def test_parameter_count_of_the_published_configuration():
    with torch.device("meta"):
        network = Restormer()
    assert round(sum(p.numel() for p in network.parameters()) / 1e6, 2) == 26.13


# Hyperparameters --------------------------------------------------------------------------------


@st.composite
def hyperparameters(draw):
    dim = 2 * draw(st.integers(7, 40))
    dual = draw(st.booleans())
    channels = draw(st.integers(1, 6))
    divisors = [[h for h in range(1, 9) if dim * 2**n % h == 0] for n in range(4)]
    return {
        "inp_channels": channels,
        "out_channels": draw(st.integers(1, 6)) if dual else channels,
        "dim": dim,
        "num_blocks": tuple(draw(st.integers(1, 3)) for _ in range(4)),
        "num_refinement_blocks": draw(st.integers(0, 11)),
        "heads": tuple(draw(st.sampled_from(d)) for d in divisors),
        "ffn_expansion_factor": draw(st.integers(50, 500)) / 100,
        "bias": draw(st.booleans()),
        "LayerNorm_type": draw(st.sampled_from(["WithBias", "BiasFree"])),
        "dual_pixel_task": dual,
    }


@settings(deadline=None, max_examples=15)
@given(hyperparameters())
def test_hyperparameters_are_read_back_from_names_and_shapes(wanted):
    with torch.device("meta"):
        state = Restormer(**wanted).state_dict()
    assert ARCHITECTURE.hyperparameters(state) == wanted


@settings(deadline=None, max_examples=15)
@given(dim=st.integers(1, 30).map(lambda n: 2 * n), factor=st.floats(0.5, 8))
@example(dim=50, factor=1.015625)  # 200 × 1.015 is rounded down, below 203
def test_any_expansion_factor_is_read_back_as_one_of_the_same_channels(dim, factor):
    options = {**SMALL, "heads": (1, 1, 1, 1), "dim": dim, "ffn_expansion_factor": factor}
    with torch.device("meta"):
        state = Restormer(**options).state_dict()
        again = Restormer(**ARCHITECTURE.hyperparameters(state)).state_dict()
    assert {n: v.shape for n, v in again.items()} == {n: v.shape for n, v in state.items()}


def test_the_published_expansion_factor_is_preferred():
    with torch.device("meta"):
        state = Restormer(**SMALL).state_dict()
    assert ARCHITECTURE.hyperparameters(state)["ffn_expansion_factor"] == 2.66


def test_feed_forward_channels_that_no_factor_explains():
    state = Restormer(**SMALL).state_dict()
    state["latent.0.ffn.project_out.weight"] = torch.ones(32, 99, 1, 1)
    assert ARCHITECTURE.hyperparameters(state) is None


@pytest.mark.parametrize(
    "hyperparameters",
    [
        {"dim": 0},
        {"dim": 7},
        {"heads": (1, 2, 4)},
        {"heads": (5, 1, 1, 1)},
        {"heads": (0, 1, 1, 1)},
        {"num_blocks": (1, 1, 1)},
        {"num_blocks": (0, 1, 1, 1)},
        {"num_refinement_blocks": -1},
        {"inp_channels": 0, "out_channels": 0},
        {"inp_channels": 6},
        {"ffn_expansion_factor": 0.0},
        {"ffn_expansion_factor": float("nan")},
    ],
)
def test_impossible_hyperparameters(hyperparameters):
    with pytest.raises(NetworkError, match=next(iter(hyperparameters))):
        create_network("restormer", **hyperparameters)


def test_spec():
    spec = create_network("restormer", **SMALL).spec
    assert (spec.multiple, spec.scale, spec.train_size, spec.task) == (8, 1, 256, None)
    assert (spec.in_channels, spec.out_channels) == (3, 3)


# What it computes -------------------------------------------------------------------------------


def test_padding_is_reflection_at_the_bottom_and_right(small):
    picture = torch.rand(1, 3, 13, 18)
    rows = torch.tensor([*range(13), 11, 10, 9])
    columns = torch.tensor([*range(18), 16, 15, 14, 13, 12, 11])
    padded = picture[:, :, rows][:, :, :, columns]
    with torch.no_grad():
        torch.testing.assert_close(small(picture), small(padded)[..., :13, :18])


def test_attention_is_that_of_the_paper():
    torch.manual_seed(0)
    attention = TransposedAttention(12, 3, bias=True).double()
    torch.nn.init.uniform_(attention.temperature)
    x = torch.randn(2, 12, 5, 7, dtype=torch.float64)
    q, k, v = attention.qkv_dwconv(attention.qkv(x)).view(2, 3, 3, 4, 35).unbind(1)
    q, k = (y / y.norm(dim=-1, keepdim=True) for y in (q, k))
    weights = (attention.temperature * torch.einsum("bhcn,bhdn->bhcd", q, k)).softmax(-1)
    expected = attention.project_out((weights @ v).view(2, 12, 5, 7))
    torch.testing.assert_close(attention(x), expected)


def test_with_a_norm_attention_adds_what_it_is_given():
    torch.manual_seed(0)
    attention, norm = TransposedAttention(12, 3, bias=True), LayerNorm(12, "WithBias")
    x = torch.randn(2, 12, 40, 50)
    before = x.clone()
    expected = x + attention(norm(x))
    torch.testing.assert_close(attention(x, norm), expected)
    with torch.no_grad():
        torch.testing.assert_close(attention(x, norm), expected)
    assert torch.equal(x, before)


def test_blocks_leave_their_input_as_it_is(monkeypatch):
    monkeypatch.setitem(parts.BUDGET, "cpu", 2**13)
    torch.manual_seed(0)
    block, x = TransformerBlock(4, 2, 2.66, False, "BiasFree"), torch.randn(1, 4, 40, 50)
    before = x.clone()
    expected = block(x)
    with torch.no_grad():
        torch.testing.assert_close(block(x), expected)
    assert torch.equal(x, before)


@pytest.mark.parametrize("local", [False, True])
@pytest.mark.parametrize("dual", [False, True])
def test_a_pass_takes_two_of_the_largest_maps(monkeypatch, small, local, dual):
    """And a few rows, beside the picture; the result and the first features where they are kept."""
    monkeypatch.setitem(parts.BUDGET, "cpu", 2**15)
    network = Restormer(**SMALL, inp_channels=6, dual_pixel_task=True) if dual else small
    if local:
        convert(network, Local(train_size=64, window=96), torch.rand(1, 6 if dual else 3, 64, 64))
    channels, height, width = 6 if dual else 3, 512, 640
    plane = 4 * height * width
    largest = 2 * SMALL["dim"] * plane
    need = peak_memory(network, (1, channels, height, width), torch.float32, "cpu")
    kept = largest if dual else 0
    assert 2 * largest < need < 2.25 * largest + channels * plane + kept


def test_dual_pixel_network():
    torch.manual_seed(0)
    options = {**SMALL, "inp_channels": 6, "dual_pixel_task": True}
    network = create_network("restormer", **options)
    spec, module = network.spec, network.module
    assert (spec.in_channels, spec.out_channels, spec.task) == (6, 3, "defocus")
    assert module.state_dict()["skip_conv.weight"].shape == (8, 4, 1, 1)
    views = torch.rand(1, 6, 10, 9)
    with torch.no_grad():
        assert module(views).shape == (1, 3, 10, 9)
        for name, parameter in module.named_parameters():
            if not re.match(r"patch_embed|skip_conv|output", name):
                parameter.zero_()
        # blocks only pass on what they get, and nothing comes from the levels below
        views = torch.rand(1, 6, 16, 8)
        first = module.patch_embed(views)
        refined = torch.cat([torch.zeros_like(first), first], 1)
        expected = module.output(refined + module.skip_conv(first))
        torch.testing.assert_close(module(views), expected)


def test_global_attention_exports():
    attention, x = TransposedAttention(4, 2, bias=False), torch.rand(1, 4, 9, 7)
    exported = torch.export.export(attention, (x,)).module()
    with torch.no_grad():
        torch.testing.assert_close(exported(x), attention(x))


def test_gradients_reach_every_parameter(small):
    convert(small, Local(train_size=16, window=16))
    small(torch.rand(1, 3, 24, 32)).square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in small.parameters())


# Local ------------------------------------------------------------------------------------------


def test_every_attention_becomes_local(small):
    planned = plan(small, Local(train_size=64, window=96))
    assert {op.name: op.windows[0] for op in planned.converted} == {
        "encoder_level1.0.attn": (96, 96),
        "encoder_level2.0.attn": (48, 48),
        "encoder_level3.0.attn": (24, 24),
        "latent.0.attn": (12, 12),
        "decoder_level3.0.attn": (24, 24),
        "decoder_level2.0.attn": (48, 48),
        "decoder_level1.0.attn": (96, 96),
        "refinement.0.attn": (96, 96),
    }
    assert not planned.kept


def test_the_local_form_shows_its_window_and_is_not_converted_again():
    attention, example = TransposedAttention(4, 2, bias=False), torch.rand(1, 4, 16, 16)
    with convert(attention, Local(train_size=16, window=12), example):
        assert "window=12×12" in repr(attention)
        with pytest.raises(ConversionError, match="local already"):
            convert(attention, Local(train_size=16), example)


def test_the_local_form_shares_parameters():
    attention = TransposedAttention(4, 2, bias=False)
    local = attention.to_local((5, 6))
    assert local.window == (5, 6)
    assert attention.window is None
    assert list(local.state_dict()) == list(attention.state_dict())
    assert all(a is b for a, b in zip(local.parameters(), attention.parameters(), strict=True))
