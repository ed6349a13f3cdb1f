from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fullres.local import Local, convert, plan
from fullres.networks.catalog import create_network, open_network
from fullres.networks.ffanet import ARCHITECTURE, FFANet

SMALL = {"gps": 3, "blocks": 1, "dim": 16}


@pytest.fixture
def small() -> FFANet:
    torch.manual_seed(0)
    return FFANet(**SMALL).eval()


def test_published_size():
    with torch.device("meta"):
        network = FFANet()
    assert sum(p.numel() for p in network.parameters()) == 4_455_913


def test_every_attention_becomes_local():
    with torch.device("meta"):
        network = FFANet(gps=3, blocks=2)
    planned = plan(network, Local(256))
    assert (len(planned.converted), len(planned.kept)) == (7, 0)


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 12), st.integers(0, 12), st.integers(16, 100), st.integers(1, 6))
def test_hyperparameters_are_read_back_from_names_and_shapes(gps, blocks, dim, img_channel):
    hyperparameters = {"gps": gps, "blocks": blocks, "dim": dim, "img_channel": img_channel}
    with torch.device("meta"):
        state = FFANet(**hyperparameters).state_dict()
    assert ARCHITECTURE.hyperparameters(state) == hyperparameters


@pytest.mark.parametrize("missing", ["pre.0.weight", "ca.1.weight", "palayer.pa.0.weight"])
def test_a_part_of_the_network_is_not_claimed(small, missing):
    state = small.state_dict()
    del state[missing]
    assert ARCHITECTURE.hyperparameters(state) is None


def test_groups_are_weighed_position_by_position_where_local(small):
    torch.nn.init.normal_(small.ca[3].weight, std=3)
    left, right = torch.rand(1, 3, 16, 40), torch.rand(1, 3, 16, 40) / 9
    pictures = torch.cat([left, right], 3), torch.cat([left, left], 3)
    with convert(small, Local(16, 16)), torch.no_grad():
        a, b = (small(picture) for picture in pictures)
    torch.testing.assert_close(a[..., :8], b[..., :8])
    assert (a[..., -8:] - b[..., -8:]).abs().max() > 0.01


def test_pictures_are_normalised_by_mean_and_std(small):
    mean, std = (0.6, 0.5, 0.4), (0.1, 0.2, 0.3)
    network = FFANet(**SMALL, mean=mean, std=std).eval()
    network.load_state_dict(small.state_dict())
    picture = torch.rand(1, 3, 12, 10)
    normal = (picture - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    with torch.no_grad():
        torch.testing.assert_close(network(picture), small(normal))


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


def test_the_authors_training_state_normalises(tmp_path):
    network = create_network("ffanet", blocks=1, dim=16)
    state = {f"module.{name}": x for name, x in network.module.state_dict().items()}
    notes = {"step": 1, "max_psnr": 1.0, "max_ssim": 1.0, "psnrs": [1.0], "ssims": [1.0]}
    torch.save({**notes, "losses": [0.1], "model": state}, tmp_path / "its_train_ffa_1_1.pk")
    torch.save(state, tmp_path / "mine.pth")
    opened = open_network(tmp_path / "its_train_ffa_1_1.pk")
    assert opened.spec.hyperparameters["mean"] == (0.64, 0.6, 0.58)
    assert opened.spec.hyperparameters["std"] == (0.14, 0.15, 0.152)
    assert open_network(tmp_path / "mine.pth").spec.hyperparameters["mean"] == ()
