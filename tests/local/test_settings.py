"""Settings of a conversion: which operations, which windows, which stride."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fullres as fr
from fullres.local import Local, NothingToConvert, convert, plan
from fullres.ops.box import local_mean_var_reference
from fullres.ops.windows import transposed_attention_reference


class Scale(nn.Module):
    def forward(self, x):
        return x * x.mean((2, 3), keepdim=True)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.InstanceNorm2d(4), Scale())
        self.decoder = nn.Sequential(nn.InstanceNorm2d(4), nn.Conv2d(4, 3, 3, padding=1))

    def forward(self, x):
        return self.decoder(self.encoder(x))


def names(operations):
    return [op.name for op in operations]


@pytest.mark.parametrize(
    ("only", "converted"),
    [
        (None, ["encoder.1", "decoder.0", "encoder.2"]),
        ("encoder.*", ["encoder.1", "encoder.2"]),
        (["decoder.?", "*.2"], ["decoder.0", "encoder.2"]),
        (lambda name, module: isinstance(module, nn.InstanceNorm2d), ["encoder.1", "decoder.0"]),
        (lambda name, module: name.startswith("dec"), ["decoder.0"]),
    ],
)
def test_only_what_is_asked_for_becomes_local(only, converted):
    planned = plan(Net(), Local(32, only=only))
    assert names(planned.converted) == converted
    assert {op.reason for op in planned.kept} <= {"is not among those that `only` asks for"}
    assert names(planned.still_global) == names(planned.kept)


def test_a_partial_conversion_leaves_the_rest_as_it_was():
    net, x = Net().eval(), torch.rand(1, 3, 40, 50)
    hidden = net.encoder[0](x)
    with convert(net, Local(16, only="encoder.1")):
        assert not torch.allclose(net.encoder[1](hidden), nn.InstanceNorm2d(4)(hidden), atol=1e-3)
        assert torch.equal(net.decoder[0](hidden), nn.InstanceNorm2d(4)(hidden))
        assert torch.equal(net.encoder[2](hidden), Scale()(hidden))


def test_none_of_what_is_asked_for_is_nothing_to_convert():
    with pytest.raises(NothingToConvert, match=r"encoder\.1 stays: is not among those") as caught:
        convert(Net(), Local(32, only="middle"))
    assert len(caught.value.plan.still_global) == 3


def test_a_kind_has_a_window_of_its_own():
    local = Local(32, window=40, windows={"instance norm": (16, 20), "mean": 64})
    assert local.widest == (64, 64)
    net, x = Net().eval(), torch.rand(1, 3, 70, 60)
    planned = plan(net, local)
    assert [op.windows for op in planned.converted] == [((16, 20),), ((16, 20),), ((64, 64),)]
    with convert(net, local):
        hidden = net.encoder[0](x)
        mean, var = local_mean_var_reference(hidden.double(), (16, 20))
        want = (hidden - mean) / (var + 1e-5).sqrt()
        torch.testing.assert_close(net.encoder[1](hidden).double(), want, atol=1e-4, rtol=0)


def test_settings_that_reach_nothing_are_mistakes():
    with pytest.raises(fr.ConversionError, match=r"'max pool'.*'instance norm', 'mean'"):
        plan(Net(), Local(32, windows={"max pool": 8}))
    with pytest.raises(fr.ConversionError, match="nothing in the network attends"):
        plan(Net(), Local(32, stride=8))


@pytest.mark.parametrize(
    "settings",
    [
        {"train_size": 0},
        {"train_size": 32, "window": (4, 0)},
        {"train_size": 32, "windows": {"mean": "8"}},
        {"train_size": 32, "stride": 0},
        {"train_size": 32, "stride": 49},
        {"train_size": 32, "stride": 20, "windows": {"mean": 16}},
    ],
)
def test_sizes_that_cannot_be_are_refused(settings):
    with pytest.raises(fr.ConversionError):
        Local(**settings)


@pytest.mark.parametrize("stride", [(1, 1), (2, 3), (6, 6), None])
def test_attention_overlaps_as_the_stride_says(stride):
    torch.manual_seed(0)
    options = {"dim": 4, "num_blocks": [1] * 4, "heads": [1, 2, 2, 2], "num_refinement_blocks": 1}
    module = fr.create_network("restormer", **options).module.double()
    attention = module.encoder_level1[0].attn
    x = torch.randn(1, 4, 17, 14, dtype=torch.float64)
    with torch.inference_mode(), convert(module, Local(16, window=(6, 8), stride=stride)):
        q, k, v = attention.qkv_dwconv(attention.qkv(x)).chunk(3, 1)
        want = transposed_attention_reference(q, k, v, attention.temperature, (6, 8), stride)
        torch.testing.assert_close(attention(x), attention.project_out(want))
    assert attention.stride is None


def test_a_still_global_operation_is_one_that_sees_the_whole_picture():
    class Spare(nn.Sequential):
        def forward(self, x):
            return self[2](self[1](self[0](x)))

    stay, go = nn.InstanceNorm2d(4, track_running_stats=True), nn.InstanceNorm2d(4)
    net = Spare(nn.Conv2d(3, 4, 3), stay, go, nn.AdaptiveAvgPool2d(1))
    planned = plan(net.eval(), Local(16))
    assert names(planned.kept) == ["1", "3"]
    assert planned.still_global == ()


def test_a_module_is_told_what_its_to_local_asks_for():
    class Own(nn.Module):
        told = None

        def forward(self, x):
            return x * 2

        def to_local(self, window, feature_size):
            local = OwnLocal.__new__(OwnLocal)
            vars(local).update(vars(self))
            local.told = (window, feature_size)
            return local

    class OwnLocal(Own):
        to_local = None

    net = nn.Sequential(nn.AvgPool2d(2), Own())
    with convert(net, Local(train_size=(16, 32))):
        assert net[1].told == ((12, 24), (8, 16))
    assert net[1].told is None
