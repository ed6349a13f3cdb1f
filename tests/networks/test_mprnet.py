from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fullres.networks.catalog import create_network
from fullres.networks.mprnet import ARCHITECTURE, MPRNet

SMALL = {"n_feat": 8, "scale_unetfeats": 4, "scale_orsnetfeats": 4, "num_cab": 1}


@pytest.fixture
def small() -> MPRNet:
    torch.manual_seed(0)
    return MPRNet(**SMALL).eval()


def test_parameter_count_of_the_published_deblurring_network():
    with torch.device("meta"):
        network = MPRNet()
    assert round(sum(p.numel() for p in network.parameters()) / 1e6, 2) == 20.13


@settings(deadline=None, max_examples=15)
@given(data=st.data(), reduction=st.integers(1, 6))
def test_hyperparameters_are_read_back_from_names_and_shapes(data, reduction):
    channels = data.draw(st.integers(1, 6))
    hyperparameters = {
        "in_c": channels,
        "out_c": channels,
        "n_feat": reduction * data.draw(st.integers(1, 20)),
        "scale_unetfeats": data.draw(st.integers(0, 60)),
        "scale_orsnetfeats": data.draw(st.integers(0, 60)),
        "num_cab": data.draw(st.integers(0, 12)),
        "kernel_size": data.draw(st.sampled_from([1, 3, 5])),
        "reduction": reduction,
        "bias": data.draw(st.booleans()),
    }
    with torch.device("meta"):
        state = MPRNet(**hyperparameters).state_dict()
    assert ARCHITECTURE.hyperparameters(state) == hyperparameters


@settings(deadline=None, max_examples=8)
@given(n_feat=st.integers(7, 60), step=st.integers(0, 40), reduction=st.integers(1, 7))
def test_a_reduction_that_does_not_divide_gives_the_same_shapes(n_feat, step, reduction):
    with torch.device("meta"):
        state = MPRNet(3, 3, n_feat, step, num_cab=1, reduction=reduction).state_dict()
        again = MPRNet(**ARCHITECTURE.hyperparameters(state)).state_dict()
    assert [(n, v.shape) for n, v in again.items()] == [(n, v.shape) for n, v in state.items()]


def test_the_activation_is_one(small):
    assert sum(isinstance(part, torch.nn.PReLU) for part in small.modules()) == 1


def test_padding_is_reflection_at_the_bottom_and_right(small):
    picture = torch.rand(1, 3, 13, 22)
    rows = torch.tensor([*range(13), 11, 10, 9])
    columns = torch.tensor([*range(22), 20, 19])
    padded = picture[:, :, rows][:, :, :, columns]
    with torch.no_grad():
        torch.testing.assert_close(small(picture), small(padded)[..., :13, :22])


def test_every_stage_adds_to_the_picture(small):
    picture = torch.rand(1, 3, 16, 24)
    with torch.no_grad():
        assert small.outputs(picture)[0].equal(small(picture))
        for number, last in enumerate((small.tail, small.sam23.conv2, small.sam12.conv2)):
            assert not small.outputs(picture)[number].equal(picture)
            last.weight.zero_()
            assert small.outputs(picture)[number].equal(picture)


@torch.no_grad()
def test_every_stage_restores_any_size_and_batch(small):
    pictures = torch.rand(3, 3, 13, 17)
    alone = zip(*map(small.outputs, pictures.split(1)), strict=True)
    for together, outputs in zip(small.outputs(pictures), alone, strict=True):
        assert together.shape == pictures.shape
        torch.testing.assert_close(together, torch.cat(outputs))


@pytest.mark.parametrize("dim", [-2, -1])
def test_the_first_stage_sees_half_the_picture_and_the_second_all(small, dim):
    picture = torch.rand(1, 3, 32, 32)
    changed = picture.clone()
    changed.narrow(dim, 16, 16).uniform_()
    with torch.no_grad():
        same = [
            torch.equal(a.narrow(dim, 0, 4), b.narrow(dim, 0, 4))
            for a, b in zip(small.outputs(picture), small.outputs(changed), strict=True)
        ]
    # the decoder of the first stage joins the left and right quarters, none joins top and bottom
    assert same == [False, False, dim == -2]


def test_spec():
    spec = create_network("mprnet", **SMALL).spec
    assert (spec.multiple, spec.scale, spec.train_size) == (8, 1, 256)
    assert spec.task is None


@pytest.mark.parametrize(
    "hyperparameters",
    [
        {"in_c": 0, "out_c": 0},
        {"in_c": 1},
        {"reduction": 0},
        {"n_feat": 3},
        {"scale_unetfeats": -1},
        {"scale_orsnetfeats": -1},
        {"num_cab": -1},
        {"kernel_size": 2},
        {"kernel_size": -1},
    ],
)
def test_impossible_hyperparameters(hyperparameters):
    with pytest.raises(ValueError, match=r"in_c|n_feat|kernel_size"):
        MPRNet(**hyperparameters)
