from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fullres.local import Local, convert
from fullres.networks import nafnet
from fullres.networks.catalog import create_network, open_network
from fullres.networks.ffanet import ARCHITECTURE, FFANet

SMALL = {"gps": 3, "blocks": 1, "dim": 16}


@pytest.fixture
def small() -> FFANet:
    torch.manual_seed(0)
    return FFANet(**SMALL).eval()


def reference(case, dtype):
    config = {name: case.config[name] for name in ("gps", "blocks")}
    module = create_network("ffanet", **config).module.to(dtype)
    module.load_state_dict(case.state)
    return module


@pytest.mark.parametrize("name", ["ffanet", "ffanet_local"])
def test_reference_output_in_float64(golden, name):
    case = golden(name)
    module = reference(case, torch.float64)
    if "window" in case.config:
        local = Local(tuple(case.config["calibration"]), tuple(case.config["window"]))
        conversion = convert(module, local)
        assert (len(conversion.converted), len(conversion.kept)) == (7, 0)
    with torch.no_grad():
        output = module(case.input)
    assert (output - case.outputs[0]).abs().max() < 1e-6


def test_reference_output_in_float32(golden):
    case = golden("ffanet")
    with torch.no_grad():
        output = reference(case, torch.float32)(case.input.float())
    assert (output - case.outputs[0]).abs().max() < 1e-4 * case.outputs[0].abs().max()


def test_names_and_shapes_are_those_of_published_checkpoints(golden):
    case = golden("ffanet")
    state = reference(case, torch.float32).state_dict()
    assert {name: tuple(value.shape) for name, value in state.items()} == case.parameters
    assert list(state) == list(case.parameters)


def test_published_size():
    with torch.device("meta"):
        network = FFANet()
    assert sum(p.numel() for p in network.parameters()) == 4_455_913


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 12), st.integers(0, 12), st.integers(16, 100), st.integers(1, 6))
def test_hyperparameters_are_read_back_from_names_and_shapes(gps, blocks, dim, img_channel):
    hyperparameters = {"gps": gps, "blocks": blocks, "dim": dim, "img_channel": img_channel}
    with torch.device("meta"):
        state = FFANet(**hyperparameters).state_dict()
    assert ARCHITECTURE.hyperparameters(state) == hyperparameters


def test_other_architectures_are_not_claimed(small):
    with torch.device("meta"):
        other = nafnet.NAFNet().state_dict()
    assert ARCHITECTURE.hyperparameters(other) is None
    assert ARCHITECTURE.hyperparameters({}) is None
    assert nafnet.ARCHITECTURE.hyperparameters(small.state_dict()) is None


@pytest.mark.parametrize("missing", ["pre.0.weight", "ca.1.weight", "palayer.pa.0.weight"])
def test_a_part_of_the_network_is_not_claimed(small, missing):
    state = small.state_dict()
    del state[missing]
    assert ARCHITECTURE.hyperparameters(state) is None


def test_opens_a_training_state(tmp_path, small):
    state = {f"module.{name}": value for name, value in small.state_dict().items()}
    torch.save({"step": 1, "max_psnr": 0.0, "psnrs": [1.0], "model": state}, tmp_path / "its.pk")
    network = open_network(tmp_path / "its.pk")
    assert network.spec.architecture == "ffanet"
    assert network.spec.hyperparameters["dim"] == 16
    picture = torch.rand(1, 3, 9, 8)
    with torch.no_grad():
        torch.testing.assert_close(network.module(picture), small(picture), rtol=0, atol=0)


@settings(deadline=None, max_examples=20)
@given(height=st.integers(1, 20), width=st.integers(1, 20))
def test_any_size_is_restored_at_its_own_size(height, width):
    network = FFANet(**SMALL)
    with torch.no_grad():
        assert network(torch.rand(1, 3, height, width)).shape == (1, 3, height, width)


def test_a_batch_is_restored_picture_by_picture(small):
    pictures = torch.rand(2, 3, 24, 17)
    with torch.no_grad():
        alone = torch.cat([small(pictures[:1]), small(pictures[1:])])
        torch.testing.assert_close(small(pictures), alone)


def test_grey_pictures():
    network = create_network("ffanet", img_channel=1, **SMALL)
    assert (network.spec.in_channels, network.spec.out_channels) == (1, 1)
    with torch.no_grad():
        assert network.module(torch.rand(1, 1, 9, 8)).shape == (1, 1, 9, 8)


def test_groups_are_weighed_position_by_position_where_local(small):
    torch.nn.init.normal_(small.ca[3].weight, std=3)
    left, right = torch.rand(1, 3, 16, 40), torch.rand(1, 3, 16, 40) / 9
    pictures = torch.cat([left, right], 3), torch.cat([left, left], 3)
    with convert(small, Local(16, 16)), torch.no_grad():
        a, b = (small(picture) for picture in pictures)
    torch.testing.assert_close(a[..., :8], b[..., :8])
    assert (a[..., -8:] - b[..., -8:]).abs().max() > 0.01


@pytest.mark.parametrize("batch", [1, 2])
def test_conversion_changes_nothing_where_the_window_covers_the_picture(small, batch):
    picture = torch.rand(batch, 3, 24, 30)
    with torch.no_grad():
        expected = small(picture)
        with convert(small, Local(32)):
            torch.testing.assert_close(small(picture), expected)


def test_pictures_are_normalised_by_mean_and_std(small):
    mean, std = (0.6, 0.5, 0.4), (0.1, 0.2, 0.3)
    network = FFANet(**SMALL, mean=mean, std=std).eval()
    network.load_state_dict(small.state_dict())
    picture = torch.rand(1, 3, 12, 10)
    normal = (picture - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    with torch.no_grad():
        torch.testing.assert_close(network(picture), small(normal))


def test_channels_last_equals_contiguous(small):
    picture = torch.rand(1, 3, 33, 20)
    with torch.no_grad():
        expected = small(picture)
        small.to(memory_format=torch.channels_last)
        output = small(picture.contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(output, expected)
    assert output.is_contiguous(memory_format=torch.channels_last)


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


def test_spec():
    spec = create_network("ffanet", blocks=1).spec
    assert (spec.multiple, spec.scale, spec.train_size, spec.task) == (1, 1, 240, "dehaze")
    assert spec.hyperparameters["gps"] == 3


@pytest.mark.parametrize(
    "hyperparameters",
    [
        {"gps": 0},
        {"blocks": -1},
        {"dim": 15},
        {"img_channel": 0},
        {"mean": [0.5]},
        {"mean": [0.5] * 3, "std": [1.0, 1.0]},
        {"mean": [0.5] * 3, "std": [1.0, 1.0, 0.0]},
    ],
)
def test_impossible_hyperparameters(hyperparameters):
    with pytest.raises(ValueError, match=r"img_channel|mean and std"):
        FFANet(**(SMALL | hyperparameters))
