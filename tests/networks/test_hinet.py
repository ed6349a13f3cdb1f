from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fullres.local import Local, convert
from fullres.networks.catalog import create_network, networks, open_network
from fullres.networks.hinet import ARCHITECTURE, HINet

SMALL = {"wf": 4, "depth": 3, "hin_position_right": 2}
CASES = ["hinet", "hinet_local"]
GLOBAL, LOCAL = HINet(**SMALL).eval(), HINet(**SMALL).eval()
convert(LOCAL, Local(8, 8))


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


@pytest.mark.parametrize("name", sorted(networks()))
def test_checkpoints_are_told_apart(name):
    with torch.device("meta"):
        state = create_network(name).module.state_dict()
    assert (ARCHITECTURE.hyperparameters(state) is not None) == (name == "hinet")


def test_a_checkpoint_opens(tmp_path, small):
    torch.save({"params": small.state_dict()}, tmp_path / "w.pth")
    opened = open_network(tmp_path / "w.pth")
    assert opened.spec.architecture == "hinet"
    picture = torch.rand(1, 3, 12, 16)
    with torch.no_grad():
        assert opened.module(picture).equal(small(picture))


@pytest.mark.parametrize("local", [False, True])
@settings(deadline=None, max_examples=10)
@given(height=st.integers(1, 20), width=st.integers(1, 20))
def test_any_size_is_restored_at_its_own_size(local, height, width):
    network = LOCAL if local else GLOBAL
    picture = torch.rand(1, 3, height, width)
    with torch.no_grad():
        first, second = network.outputs(picture)
    assert first.shape == second.shape == picture.shape
    assert first.isfinite().all()
    assert second.isfinite().all()


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


def test_every_norm_becomes_local_and_a_window_over_all_changes_nothing(small):
    picture = torch.rand(1, 3, 40, 52)
    with torch.no_grad():
        expected = small(picture)
        with convert(small, Local(32, 64)) as conversion:
            assert len(conversion.converted) == 6
            assert not conversion.kept
            assert small(picture).equal(expected)
        with convert(small, Local(32, 16)):
            assert (small(picture) - expected).abs().max() > 1e-3


def test_a_batch_is_restored_picture_by_picture(small):
    pictures = torch.rand(2, 3, 24, 17)
    with torch.no_grad():
        alone = torch.cat([small(pictures[:1]), small(pictures[1:])])
        torch.testing.assert_close(small(pictures), alone)


def test_grey_pictures():
    network = create_network("hinet", in_chn=1, **SMALL)
    assert (network.spec.in_channels, network.spec.out_channels) == (1, 1)
    with torch.no_grad():
        assert network.module(torch.rand(1, 1, 9, 8)).shape == (1, 1, 9, 8)


def test_channels_last_is_kept_and_equals_contiguous(small):
    picture = torch.rand(1, 3, 32, 20)
    with torch.no_grad():
        expected = small(picture)
        small.to(memory_format=torch.channels_last)
        output = small(picture.contiguous(memory_format=torch.channels_last))
    assert output.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(output, expected)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.05), (torch.float32, 1e-5)])
def test_lower_precision_is_as_good_as_its_rounding(small, dtype, tolerance):
    picture = torch.rand(1, 3, 24, 24, dtype=torch.float64)
    with torch.no_grad():
        exact = small.double()(picture)
        output = small.to(dtype)(picture.to(dtype))
    assert output.dtype == dtype
    assert (output.double() - exact).abs().max() < tolerance * exact.abs().max()


def test_exports(small):
    picture = torch.rand(1, 3, 21, 16)
    exported = torch.export.export(small, (picture,)).module()
    with torch.no_grad():
        torch.testing.assert_close(exported(picture), small(picture))


def test_both_stages_learn(small):
    first, second = small.train().outputs(torch.rand(1, 3, 16, 16))
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
