from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fullres.local import Local, convert, plan
from fullres.networks.catalog import create_network
from fullres.networks.hinet import ARCHITECTURE, HINet

SMALL = {"wf": 4, "depth": 3, "hin_position_right": 2}
CASES = ["hinet", "hinet_local"]


@pytest.fixture
def small() -> HINet:
    torch.manual_seed(0)
    return HINet(**SMALL).eval()


def restored(golden, name, dtype):
    """Both outputs of a reference case, and what they should be."""
    case = golden(name)
    config = dict(case.config)
    window, calibration = config.pop("window", None), config.pop("calibration", None)
    network = create_network("hinet", **config).module.to(dtype)
    network.load_state_dict(case.state)
    if window is not None:
        convert(network, Local(tuple(calibration), tuple(window)))
    with torch.no_grad():
        outputs = network.outputs(case.input.to(dtype))
        assert network(case.input.to(dtype)).equal(outputs[1])
    assert len(case.outputs) == len(outputs) == 2
    return zip(outputs, case.outputs, strict=True)


@pytest.mark.parametrize("name", CASES)
def test_reference_outputs_in_float64(golden, name):
    for output, expected in restored(golden, name, torch.float64):
        assert (output - expected).abs().max() < 1e-6


@pytest.mark.parametrize("name", CASES)
def test_reference_outputs_in_float32(golden, name):
    for output, expected in restored(golden, name, torch.float32):
        assert (output - expected).abs().max() < 1e-4 * expected.abs().max()


def test_names_and_shapes_are_those_of_published_checkpoints(golden):
    case = golden("hinet")
    state = create_network("hinet", **case.config).module.state_dict()
    shapes = {name: tuple(value.shape) for name, value in state.items()}
    assert list(shapes.items()) == list(case.parameters.items())


def test_parameters_and_multiply_adds_are_those_of_the_paper():
    with torch.device("meta"):
        network = HINet(hin_position_left=3, hin_position_right=4)
        picture = torch.empty(1, 3, 256, 256)
    assert round(sum(p.numel() for p in network.parameters()) / 1e6, 2) == 88.67
    counts = []

    def count(layer, _, output):
        # the paper takes a transposed convolution for a convolution at its output's size
        counts.append(output.numel() * layer.in_channels * layer.weight[0, 0].numel())

    for layer in network.modules():
        if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
            layer.register_forward_hook(count)
    network(picture)
    assert sum(counts) / 1e9 == pytest.approx(170.7, rel=0.005)


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
