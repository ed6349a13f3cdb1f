from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fullres.local import Local, plan
from fullres.networks.catalog import create_network
from fullres.networks.hinet import ARCHITECTURE, HINet

SMALL = {"wf": 4, "depth": 3, "hin_position_right": 2}


@pytest.fixture
def small() -> HINet:
    torch.manual_seed(0)
    return HINet(**SMALL).eval()


def test_parameters_and_multiply_adds_are_those_of_the_paper(multiply_adds):
    with torch.device("meta"):
        network = HINet(hin_position_left=3, hin_position_right=4)
        picture = torch.empty(1, 3, 256, 256)
    assert round(sum(p.numel() for p in network.parameters()) / 1e6, 2) == 88.67
    assert multiply_adds(network, picture) / 1e9 == pytest.approx(170.7, rel=0.005)


@settings(deadline=None, max_examples=25)
@given(data=st.data(), depth=st.integers(1, 6))
def test_hyperparameters_are_read_back_from_names_and_shapes(data, depth):
    left = data.draw(st.integers(0, depth - 1))
    positions = st.just((0, -1)) | st.tuples(st.just(left), st.integers(left, depth - 1))
    left, right = data.draw(positions)
    hyperparameters = {
        "in_chn": data.draw(st.integers(1, 6)),
        "wf": data.draw(st.integers(2, 70)),
        "depth": depth,
        "hin_position_left": left,
        "hin_position_right": right,
    }
    with torch.device("meta"):
        state = HINet(**hyperparameters).state_dict()
    assert ARCHITECTURE.hyperparameters(state) == hyperparameters


def test_positions_beyond_the_levels_leave_no_trace():
    with torch.device("meta"):
        state = HINet(wf=4, depth=3, hin_position_left=-2, hin_position_right=9).state_dict()
    detected = ARCHITECTURE.hyperparameters(state)
    assert (detected["hin_position_left"], detected["hin_position_right"]) == (0, 2)


def test_a_single_position_normalises_to_the_bias():
    network = HINet(wf=4, depth=1).eval()
    with torch.no_grad():
        network.down_path_1[0].norm.bias.fill_(3)
        mean = network.down_path_1[0].norm(torch.rand(1, 2, 5, 5)).mean()
        torch.testing.assert_close(mean, torch.tensor(3.0))
        normed = []
        network.down_path_1[0].conv_2.register_forward_pre_hook(lambda _, x: normed.append(x[0]))
        network(torch.rand(1, 3, 1, 1))
    torch.testing.assert_close(normed[0][:, :2], torch.full((1, 2, 1, 1), 3.0))


def test_every_norm_becomes_local(small):
    planned = plan(small, Local(32))
    assert (len(planned.converted), len(planned.kept)) == (6, 0)


def test_both_stages_restore_any_size_and_learn(small):
    picture = torch.rand(2, 3, 13, 18)
    first, second = small.train().outputs(picture)
    assert first.shape == second.shape == picture.shape
    (first.square().mean() + second.square().mean()).backward()
    assert all(parameter.grad is not None for parameter in small.parameters())


def test_spec():
    spec = create_network("hinet", wf=4).spec
    assert (spec.multiple, spec.scale, spec.train_size, spec.task) == (16, 1, 256, None)
    assert spec.hyperparameters["relu_slope"] == 0.2


@pytest.mark.parametrize("hyperparameters", [{"wf": 1}, {"in_chn": 0}, {"depth": 0}])
def test_impossible_hyperparameters(hyperparameters):
    with pytest.raises(ValueError, match="in_chn and depth must be positive"):
        HINet(**hyperparameters)


def test_maps_stay_channels_last():
    network = HINet(**SMALL).eval().to(memory_format=torch.channels_last)
    met = []
    for part in network.modules():
        if isinstance(part, torch.nn.Conv2d):
            part.register_forward_pre_hook(lambda _, args: met.append(args[0]))
    with torch.inference_mode():
        network(torch.rand(1, 3, 24, 32).contiguous(memory_format=torch.channels_last))
    assert met
    assert all(x.is_contiguous(memory_format=torch.channels_last) for x in met)
