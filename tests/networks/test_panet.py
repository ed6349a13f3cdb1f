from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fullres import Local, convert, plan
from fullres.errors import ConversionError, NetworkError
from fullres.networks.catalog import create_network, open_network
from fullres.networks.panet import ARCHITECTURE, PANet, PyramidAttention

SMALL = {"n_resblocks": 2, "n_feats": 8}


@pytest.fixture
def small() -> PANet:
    torch.manual_seed(0)
    return PANet(**SMALL).eval()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.float32, 1e-4)])
def test_reference_output_of_the_attention(golden, dtype, tolerance):
    case = golden("pyramid_attention")
    config = {"level": 5, "res_scale": 1.0, "channel": 16, "reduction": 2, "softmax_scale": 10.0}
    assert {name: case.config[name] for name in config} == config
    attention = PyramidAttention(**config)
    missing, _ = attention.to(dtype).load_state_dict(case.state, strict=False)
    assert missing == ["escape_NaN"]
    with torch.no_grad():
        output = attention(case.input.to(dtype))
        local = attention.to_local((20, 26))(case.input.to(dtype))
    assert (output - case.outputs[0]).abs().max() < tolerance
    assert torch.equal(local, output)


def test_parameter_count_of_the_published_configuration():
    with torch.device("meta"):
        network = PANet()
    assert round(sum(p.numel() for p in network.parameters() if p.requires_grad) / 1e6, 3) == 5.957


# Hyperparameters --------------------------------------------------------------------------------


@settings(deadline=None, max_examples=20)
@given(
    n_resblocks=st.integers(1, 50).map(lambda n: 2 * n),
    n_feats=st.integers(1, 40).map(lambda n: 2 * n),
    n_colors=st.integers(1, 4),
)
def test_hyperparameters_are_read_back_from_names_and_shapes(**wanted):
    with torch.device("meta"):
        state = PANet(**wanted).state_dict()
    assert ARCHITECTURE.hyperparameters(state) == wanted


@pytest.mark.parametrize("white", [1.0, 255.0, 2.5])
def test_the_range_of_values_is_read_from_the_mean_colour(white):
    found = ARCHITECTURE.hyperparameters(PANet(**SMALL, rgb_range=white).state_dict())
    assert found == {**SMALL, "n_colors": 3, "rgb_range": pytest.approx(white, rel=1e-6)}


@pytest.mark.parametrize(
    "hyperparameters",
    [
        {"n_resblocks": 0},
        {"n_resblocks": 3},
        {"n_feats": 0},
        {"n_feats": 9},
        {"n_colors": 0},
        {"rgb_range": 0.0},
        {"rgb_range": float("inf")},
    ],
)
def test_impossible_hyperparameters(hyperparameters):
    with pytest.raises(NetworkError, match=next(iter(hyperparameters))):
        create_network("panet", **hyperparameters)


@pytest.mark.parametrize("options", [{"level": 0}, {"level": 6}, {"reduction": 0}, {"channel": 1}])
def test_impossible_attention(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        PyramidAttention(**options)


@pytest.mark.parametrize("nested", [{}, {"params": None}, {"state_dict": None}, {"model": None}])
def test_a_published_checkpoint_opens(tmp_path, small, nested):
    state = small.state_dict()
    torch.save(dict.fromkeys(nested, state) or state, tmp_path / "model_N50.pt")
    network = open_network(tmp_path / "model_N50.pt")
    assert isinstance(network.module, PANet)
    assert network.spec.hyperparameters["n_resblocks"] == 2
    picture = torch.rand(1, 3, 16, 24)
    with torch.no_grad():
        assert torch.equal(network.module(picture), small(picture))


def test_spec():
    spec = create_network("panet", **SMALL, n_colors=1, rgb_range=255.0).spec
    assert (spec.multiple, spec.scale, spec.train_size, spec.task) == (1, 1, 48, None)
    assert (spec.in_channels, spec.out_channels, spec.value_range) == (1, 1, 255.0)


# What it computes -------------------------------------------------------------------------------


@settings(deadline=None, max_examples=15)
@given(height=st.integers(1, 20), width=st.integers(1, 20))
def test_any_size_is_restored_at_its_own_size(height, width):
    torch.manual_seed(0)
    network = PANet(**SMALL)
    with torch.no_grad():
        restored = network(torch.rand(1, 3, height, width))
    assert restored.shape == (1, 3, height, width)
    assert restored.isfinite().all()


def test_blocks_share_their_activation(small):
    assert small.body[0].body[1] is small.body[2].body[1]
    state = small.state_dict()
    state["body.2.body.1.weight"] += 1
    small.load_state_dict(state)
    assert small.body[0].body[1].weight == state["body.2.body.1.weight"]


@pytest.mark.parametrize("local", [False, True])
def test_exports(small, local):
    picture = torch.rand(1, 3, 21, 16)
    if local:
        convert(small, Local(train_size=8, window=12))
    exported = torch.export.export(small, (picture,)).module()
    with torch.no_grad():
        torch.testing.assert_close(exported(picture), small(picture))


def test_gradients_reach_every_parameter(small):
    convert(small, Local(train_size=8, window=12))
    small(torch.rand(1, 3, 16, 20)).square().mean().backward()
    trained = [p for p in small.parameters() if p.requires_grad]
    assert len(trained) == 2 * 4 + 1 + 9 + 2 * 3
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in trained)


# Local ------------------------------------------------------------------------------------------


def test_attention_becomes_local(small):
    planned = plan(small, Local(train_size=48))
    assert {op.name: op.windows for op in planned.converted} == {"body.1": ((72, 72),)}
    assert not planned.kept


@torch.no_grad()
def test_local_attends_within_the_window(small):
    picture = torch.rand(1, 3, 24, 40)
    expected = small(picture)
    with convert(small, Local(train_size=8, window=12)):
        assert "window=12×12" in repr(small)
        local = small(picture)
        assert not torch.allclose(local, expected)
        far = picture.clone()
        far[..., 30:] = torch.rand(1, 3, 24, 10)
        # convolutions reach 6 positions, the window 6, a patch and the resizing a few
        near = torch.allclose(small(far)[..., :10], local[..., :10], rtol=0, atol=1e-6)
        assert near
        with pytest.raises(ConversionError, match="local already"):
            convert(small, Local(train_size=8))
    assert not torch.allclose(small(far)[..., :10], expected[..., :10], rtol=0, atol=1e-6)
    with convert(small, Local(train_size=8, window=40)):
        assert torch.equal(small(picture), expected)
    assert torch.equal(small(picture), expected)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_local_attention_moves_with_the_map_by_tens(dtype):
    torch.manual_seed(0)
    attention = PyramidAttention(channel=6).to(dtype).to_local((9, 11))
    x = torch.randn(1, 6, 60, 70, dtype=dtype)
    part = attention(x[..., 10:50, 20:60])
    inner = (..., slice(10, 30), slice(10, 30))
    torch.testing.assert_close(part[inner], attention(x)[..., 10:50, 20:60][inner])


def test_the_local_form_shares_what_the_global_one_has():
    attention = PyramidAttention(channel=6)
    local = attention.to_local((9, 9))
    assert local.conv_match is attention.conv_match
    with pytest.raises(ConversionError, match="local already"):
        local.to_local((9, 9))
    assert attention.window is None
    assert isinstance(local.conv_assembly[1], nn.PReLU)
