from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fullres import Local, convert, plan
from fullres.errors import NetworkError
from fullres.networks.catalog import create_network, open_network
from fullres.networks.pa_edsr import ARCHITECTURE, PAEDSR

SMALL = {"n_resblocks": 2, "n_feats": 16, "pyramid_channel": 16, "pyramid_reduction": 4}
FIXED = ["sub_mean.weight", "sub_mean.bias", "add_mean.weight", "add_mean.bias"]


@pytest.fixture
def small() -> PAEDSR:
    torch.manual_seed(0)
    return PAEDSR(**SMALL).eval()


# Hyperparameters --------------------------------------------------------------------------------


@settings(deadline=None, max_examples=20)
@given(
    n_resblocks=st.integers(1, 30).map(lambda n: 2 * n),
    reduced=st.integers(1, 40),
    reduction=st.integers(1, 8),
    scale=st.sampled_from([2, 3, 4]),
)
def test_hyperparameters_are_read_back_from_names_and_shapes(
    n_resblocks, reduced, reduction, scale
):
    n_feats = 2 * reduced * reduction
    wanted = {
        "n_resblocks": n_resblocks,
        "n_feats": n_feats,
        "scale": scale,
        "n_colors": 3,
        "pyramid_channel": n_feats,
        "pyramid_reduction": reduction,
    }
    with torch.device("meta"):
        state = PAEDSR(**wanted).state_dict()
    assert ARCHITECTURE.hyperparameters(state) == wanted


def test_the_range_of_values_is_read_from_the_mean_colour():
    found = ARCHITECTURE.hyperparameters(PAEDSR(**SMALL, rgb_range=1.0).state_dict())
    assert found == {**SMALL, "scale": 2, "n_colors": 3, "rgb_range": 1.0}


@pytest.mark.parametrize(
    "hyperparameters",
    [
        {"n_resblocks": 31},
        {"n_feats": 15, "pyramid_channel": 15},
        {"n_colors": 1},
        {"scale": 5},
        {"pyramid_channel": 64},
        {"rgb_range": -1.0},
        {"pyramid_reduction": 0},
        {"pyramid_reduction": 17},
    ],
)
def test_impossible_hyperparameters(hyperparameters):
    words = next(iter(hyperparameters)).removeprefix("pyramid_")
    with pytest.raises(NetworkError, match=words):
        create_network("pa_edsr", **(SMALL | hyperparameters))


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_a_published_checkpoint_opens(tmp_path, scale):
    network = PAEDSR(**SMALL, scale=scale).eval()
    torch.save({"module." + k: v for k, v in network.state_dict().items()}, tmp_path / "model_x.pt")
    opened = open_network(tmp_path / "model_x.pt")
    assert opened.spec.scale == scale
    assert opened.module.msa is opened.module.body[1]
    picture = 255 * torch.rand(1, 3, 8, 9)
    with torch.no_grad():
        assert torch.equal(opened.module(picture), network(picture))


def test_spec():
    spec = create_network("pa_edsr", **SMALL).spec
    assert (spec.multiple, spec.scale, spec.train_size) == (1, 2, 48)
    assert (spec.in_channels, spec.out_channels, spec.value_range) == (3, 3, 255.0)
    assert spec.task == "super-resolution"


# What it computes -------------------------------------------------------------------------------


@settings(deadline=None, max_examples=15)
@given(height=st.integers(1, 16), width=st.integers(1, 16), scale=st.sampled_from([2, 3, 4]))
def test_any_size_grows_by_the_scale(height, width, scale):
    torch.manual_seed(0)
    network = PAEDSR(**SMALL, scale=scale)
    with torch.no_grad():
        restored = network(255 * torch.rand(1, 3, height, width))
    assert restored.shape == (1, 3, scale * height, scale * width)
    assert restored.isfinite().all()


def test_a_network_that_adds_nothing_gives_the_mean_colour(small):
    with torch.no_grad():
        small.tail[1].weight.zero_()
        small.tail[1].bias.zero_()
        restored = small(255 * torch.rand(1, 3, 6, 7))
    mean = 255 * torch.tensor([0.4488, 0.4371, 0.4040])
    torch.testing.assert_close(restored, mean.view(1, 3, 1, 1).expand(1, 3, 12, 14))


def test_exports(small):
    picture = 255 * torch.rand(1, 3, 13, 16)
    exported = torch.export.export(small, (picture,)).module()
    with torch.no_grad():
        torch.testing.assert_close(exported(picture), small(picture))


def test_gradients_reach_every_parameter_but_the_mean(small):
    small(255 * torch.rand(1, 3, 9, 10)).square().mean().backward()
    for name, parameter in small.named_parameters():
        assert (parameter.grad is None) == (name in FIXED)
        assert parameter.grad is None or parameter.grad.isfinite().all()


# Local ------------------------------------------------------------------------------------------


@torch.no_grad()
def test_the_one_attention_becomes_local_under_both_names(small):
    planned = plan(small, Local(train_size=48))
    assert [(op.names, op.windows) for op in planned.converted] == [
        (("msa", "body.1"), ((72, 72),))
    ]
    assert not planned.kept
    picture = 255 * torch.rand(1, 3, 24, 40)
    expected = small(picture)
    with convert(small, Local(train_size=8, window=12)):
        assert not torch.allclose(small(picture), expected)
    with convert(small, Local(train_size=8, window=40)):
        assert torch.equal(small(picture), expected)
    assert torch.equal(small(picture), expected)
