"""Copies of modules, those included that torch does not copy."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import nn

from fullres.errors import ConversionError
from fullres.local import Local, convert, plan
from fullres.shadow import copied, shadow


class Keeps(nn.Module):
    """Keeps what a pass computed, also in a container."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 3, padding=1), nn.InstanceNorm2d(3)
        self.kept = []

    def forward(self, x):
        self.last = self.conv(x)
        self.kept.append({"y": self.last})
        return self.norm(self.last) + self.kept[0]["y"].mean(1, keepdim=True)[..., :1, :1]


def kept():
    net = Keeps()
    net(torch.rand(1, 3, 16, 16))
    return net


def normed():
    with pytest.warns(FutureWarning, match="weight_norm"):
        conv = nn.utils.weight_norm(nn.Conv2d(3, 3, 3, padding=1))
    return nn.Sequential(conv, nn.InstanceNorm2d(3))


@pytest.mark.parametrize("build", [kept, normed])
def test_modules_that_hold_what_a_graph_computed_are_planned_and_copied(build):
    net = build()
    assert len(plan(net, Local(16)).converted) == 1
    x = torch.rand(1, 3, 40, 48)
    twin = copied(net)
    assert torch.equal(twin(x), net(x))
    mine = {p.data_ptr() for p in net.parameters()}
    assert all(p.data_ptr() not in mine and p.requires_grad for p in twin.parameters())
    with convert(net, Local(16)):
        net(x).sum().backward()


def test_a_copy_keeps_what_was_one_tensor_one():
    net = kept()
    twin = copied(net)
    assert twin.last is twin.kept[0]["y"]
    assert twin.last is not net.last
    assert twin.last.is_leaf
    assert torch.equal(twin.last, net.last)


def test_a_shadow_shares_no_kept_values():
    net = kept()
    twin = shadow(net, None)
    twin.last.add_(1)
    assert not torch.equal(twin.last, net.last)
    assert twin.conv.weight is net.conv.weight


@pytest.mark.parametrize(("path", "name"), [("", "guard"), ("1", "1.guard")])
def test_what_cannot_be_copied_is_named(path, name):
    net = nn.Sequential(nn.Conv2d(3, 3, 1), Keeps())
    net.get_submodule(path).guard = {"of": threading.Lock()}
    wanted = rf"Sequential cannot be copied for the attribute `{name}` .*lock.*`__deepcopy__`"
    for attempt in (lambda: plan(net, Local(16)), lambda: copied(net)):
        with pytest.raises(ConversionError, match=wanted):
            attempt()
