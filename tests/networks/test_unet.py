from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fullres.errors import NetworkError
from fullres.local import Local, NothingToConvert, convert, plan
from fullres.networks.catalog import create_network
from fullres.networks.unet import (
    ARCHITECTURE,
    ConvBlockAttention,
    GatherExcite,
    SqueezeExcitation,
    UNet,
)

SMALL = {"width": 4, "depth": 2}
ATTENTIONS = ["none", "se", "ge", "cbam"]
NORMS = ["none", "in", "gn"]
VARIANTS = [("none", "none"), ("none", "in"), ("none", "gn"), ("se", "none"), ("ge", "none")]
VARIANTS += [("cbam", "none"), ("cbam", "in")]


@pytest.fixture(params=VARIANTS, ids="-".join)
def small(request) -> UNet:
    torch.manual_seed(0)
    attention, norm = request.param
    return UNet(**SMALL, attention=attention, norm=norm).eval()


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_multiply_adds_of_the_paper(multiply_adds, attention):
    with torch.device("meta"):
        network = UNet(attention=attention)
        picture = torch.empty(1, 3, 512, 512)
    assert multiply_adds(network, picture) / 1e9 == pytest.approx(62, rel=0.05)


@settings(deadline=None, max_examples=25)
@given(data=st.data())
def test_hyperparameters_are_read_back_from_names_and_shapes(data):
    hyperparameters = {
        "in_chn": data.draw(st.integers(1, 6)),
        "width": data.draw(st.integers(1, 70)),
        "depth": data.draw(st.integers(1, 6)),
        "attention": data.draw(st.sampled_from(ATTENTIONS)),
        "norm": data.draw(st.sampled_from(NORMS)),
    }
    if hyperparameters["attention"] in ("se", "cbam"):
        # others leave as many channels as the usual one
        deepest = hyperparameters["width"] * 2 ** (hyperparameters["depth"] - 1)
        divisors = [n for n in range(1, 33) if deepest % n == 0]
        telling = [n for n in divisors if deepest // n != max(deepest // 16, 1)]
        hyperparameters["reduction"] = data.draw(st.sampled_from([16, *telling]))
    with torch.device("meta"):
        state = UNet(**hyperparameters).state_dict()
    assert ARCHITECTURE.hyperparameters(state) == hyperparameters


def test_what_becomes_local(small):
    kinds = (nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, nn.InstanceNorm2d, nn.GroupNorm)
    wanted = {id(module) for module in small.modules() if isinstance(module, kinds)}
    planned = plan(small, Local(32))
    assert {id(op.module) for op in planned.converted} == wanted
    assert not planned.kept
    if not wanted:
        with pytest.raises(NothingToConvert):
            convert(small, Local(32))


@settings(deadline=None, max_examples=15)
@given(width=st.integers(1, 9), depth=st.integers(1, 3), variant=st.sampled_from(VARIANTS))
def test_any_width_and_depth_runs_on_a_single_pixel(width, depth, variant):
    network = UNet(width=width, depth=depth, attention=variant[0], norm=variant[1])
    with torch.no_grad():
        assert network(torch.rand(1, 3, 1, 1)).isfinite().all()


def test_group_norm_has_16_channels_a_group():
    with torch.device("meta"):
        network = UNet(norm="gn")
    norms = [m for m in network.modules() if isinstance(m, nn.GroupNorm)]
    assert [m.num_channels // m.num_groups for m in norms] == [16] * 5


def test_attention_formulas():
    torch.manual_seed(0)
    x = torch.randn(2, 32, 6, 7)
    se, cbam = SqueezeExcitation(32, 16), ConvBlockAttention(32, 16)
    mean, largest = x.mean((2, 3)), x.amax((2, 3))

    def two_layers(first, second, vector):
        hidden = (vector @ first.weight[..., 0, 0].T + first.bias).relu()
        assert hidden.shape == (2, 2)
        return hidden @ second.weight[..., 0, 0].T + second.bias

    with torch.no_grad():
        torch.testing.assert_close(GatherExcite()(x), x * mean.sigmoid()[..., None, None])
        gate = two_layers(se.gate[1], se.gate[3], mean).sigmoid()
        torch.testing.assert_close(se(x), x * gate[..., None, None])
        mlp = (cbam.mlp[0], cbam.mlp[2])
        gate = (two_layers(*mlp, mean) + two_layers(*mlp, largest)).sigmoid()
        y = x * gate[..., None, None]
        planes = torch.stack([y.mean(1), y.max(1).values], 1)
        torch.testing.assert_close(cbam(x), y * cbam.spatial(planes).sigmoid())


def test_attention_follows_the_second_convolution_and_norm_the_first():
    block = UNet(**SMALL, attention="se", norm="in").down_path[0]
    seen = {}
    for name in ("conv_1", "norm", "conv_2", "attention"):
        part = getattr(block, name)
        part.register_forward_hook(lambda _, x, y, name=name: seen.update({name: (x[0], y)}))
    with torch.no_grad():
        block(torch.randn(1, 4, 8, 8))
    assert list(seen) == ["conv_1", "norm", "conv_2", "attention"]
    assert seen["norm"][0] is seen["conv_1"][1]
    assert seen["attention"][0] is seen["conv_2"][1]


def test_every_parameter_learns(small):
    small.train()(torch.rand(1, 3, 16, 16)).square().mean().backward()
    assert all(parameter.grad is not None for parameter in small.parameters())


def test_spec():
    spec = create_network("unet", depth=4).spec
    assert (spec.multiple, spec.scale, spec.train_size, spec.task) == (8, 1, 256, None)
    assert (spec.hyperparameters["width"], spec.hyperparameters["attention"]) == (32, "none")


def test_impossible_hyperparameters():
    for name in ("in_chn", "width", "depth"):
        with pytest.raises(ValueError, match="must be positive"):
            UNet(**{name: 0})
    with pytest.raises(NetworkError, match="attention must be one of 'none', 'se', 'ge', 'cbam'"):
        create_network("unet", attention="eca")
