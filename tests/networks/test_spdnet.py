"""SPDNet: the reference case's names and shapes, and what the paper's parts are."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from fullres.errors import ConversionError
from fullres.local import Local, convert
from fullres.networks.spdnet import Haar, SPDNet, SqueezeExcitation, WaveletNetwork, residue
from fullres.ops.box import local_mean_reference


def test_names_and_shapes_are_those_of_the_reference(golden):
    case = golden("spdnet")
    network = SPDNet(**case.config)
    mine = {name: tuple(value.shape) for name, value in network.state_dict().items()}
    theirs = {name: tuple(value.shape) for name, value in case.state.items()}
    fixed = {name for name in mine if "DWT" in name}
    assert {name: shape for name, shape in mine.items() if name not in fixed} == theirs
    assert len(fixed) == 72
    network.load_state_dict(case.state, strict=False)
    outputs = network.eval().outputs(case.input.float())
    assert [tuple(y.shape) for y in outputs] == [tuple(y.shape) for y in case.outputs]


def test_the_number_of_parameters_is_that_of_the_reference():
    parameters = SPDNet(n_resblocks=1).named_parameters()
    assert sum(p.numel() for name, p in parameters if "DWT" not in name) == 1_640_853


def test_the_residue_is_the_largest_minus_the_smallest_colour():
    x = torch.rand(2, 3, 4, 5)
    assert torch.equal(residue(x), (x.max(1).values - x.min(1).values)[:, None].repeat(1, 3, 1, 1))
    grey = x[:, :1].expand(-1, 3, -1, -1)
    assert not residue(grey).any()


def test_the_haar_transform_is_its_filters():
    haar = Haar()
    x = torch.rand(1, 2, 6, 8, dtype=torch.float64)
    filters = [
        (getattr(haar, f"{a}_col") * getattr(haar, f"{b}_row")).double().expand(2, 1, 2, 2)
        for a in ("h0", "h1")
        for b in ("h0", "h1")
    ]
    bands = {
        name: nn.functional.conv2d(x, weight, stride=2, groups=2)
        for name, weight in zip(("ll", "lh", "hl", "hh"), filters, strict=True)
    }
    found = dict(zip(("ll", "hl", "lh", "hh"), haar(x).chunk(4, 1), strict=True))
    for name, band in bands.items():
        torch.testing.assert_close(found[name], band, rtol=0, atol=2e-7)
    torch.testing.assert_close(haar(x).square().sum(), x.square().sum())


@torch.no_grad()
@pytest.mark.parametrize("size", [(1, 1), (2, 3), (5, 4), (17, 9)])
def test_levels_take_any_size(size):
    network = WaveletNetwork(32, 1).eval()
    x, prior = torch.rand(2, 2, 32, *size)
    assert network(x, prior).shape == x.shape


@torch.no_grad()
def test_every_attention_in_use_becomes_local():
    network = SPDNet(n_resblocks=1).eval()
    with convert(network, Local(16)) as conversion:
        assert {op.kind for op in conversion.converted} == {"SqueezeExcitation"}
        # three turns of three levels, two fusions, for each of three networks; three priors
        assert len(conversion.converted) == 3 * (9 + 2) + 3
        assert not conversion.plan.still_global


@pytest.mark.parametrize("size", [(9, 14), (7, 30), (40, 9)])
@pytest.mark.parametrize("derived", [False, True])
def test_local_attention_is_that_of_float64(size, derived):
    torch.manual_seed(0)
    attention = SqueezeExcitation(32)
    x, plus = (torch.randn(2, 32, *size).to(memory_format=torch.channels_last) for _ in range(2))
    wide = copy.deepcopy(attention).double()
    means = local_mean_reference(x.double(), (8, 9)).permute(0, 2, 3, 1)
    expected = x.double() * wide.fc(means).permute(0, 3, 1, 2) + plus.double()
    with torch.set_grad_enabled(derived):
        found = attention.to_local((8, 9))(x.clone(), plus)
    assert found.requires_grad == derived
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-6)
    with pytest.raises(ConversionError, match="already"):
        attention.to_local((8, 9)).to_local((8, 9))


def test_only_the_published_number_of_channels():
    with pytest.raises(ValueError, match="n_feats"):
        SPDNet(n_feats=16)
