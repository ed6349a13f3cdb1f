"""Pooled values: code for one vector gives, at every position, what it gives for that vector."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn

from fullres.local import Local, convert, plan
from fullres.local.pooled import Pooled
from fullres.ops.box import local_max, local_mean

C = 6


class Head(nn.Module):
    """A head between pooled values and a map; subclasses say how it is written."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.fc = nn.Sequential(
            nn.Linear(C, 3), nn.ReLU(inplace=True), nn.Linear(3, C), nn.Sigmoid()
        )
        self.conv = nn.Sequential(nn.Conv2d(C, 4, 1), nn.PReLU(), nn.Conv2d(4, C, 1))
        self.conv1d = nn.Conv1d(1, 1, 3, padding=1)
        self.norm = nn.LayerNorm(C)
        self.batch_norm = nn.BatchNorm2d(C).eval()


class Classic(Head):
    def forward(self, x, pooled):
        b, c, _, _ = x.size()
        return x * self.fc(pooled.view(b, c)).view(b, c, 1, 1).expand_as(x)


class Flattened(Head):
    def forward(self, x, pooled):
        return x + self.norm(self.fc(torch.flatten(pooled, 1)))[:, :, None, None]


class Convolved(Head):
    def forward(self, x, pooled):
        return self.batch_norm(self.conv(pooled)).sigmoid() * x


class Channelwise(Head):  # ECA
    def forward(self, x, pooled):
        y = self.conv1d(pooled.squeeze(-1).transpose(-1, -2)).transpose(-1, -2).unsqueeze(-1)
        return x * torch.sigmoid(y)


class Selective(Head):  # SKNet
    def forward(self, x, pooled):
        weights = torch.softmax(pooled.reshape(x.shape[0], 2, C // 2), dim=1)
        first, second = weights.reshape(x.shape[0], C, 1, 1).chunk(2, dim=1)
        return x[:, : C // 2] * first + x[:, C // 2 :] * second


class Mixed(Head):
    def forward(self, x, pooled):
        y = torch.cat([pooled, 2 * pooled], 1).mean(1, keepdim=True)
        z = pooled.clone()
        z += 1
        z.mul_(2).relu_()
        return torch.where(z > 2.5, x, -x) * (z - y) / (pooled.std(1, keepdim=True) + 1)


class Upsampled(Head):  # ASPP
    def forward(self, x, pooled):
        y = nn.functional.interpolate(self.conv(pooled), size=x.shape[2:], mode="bilinear")
        return torch.cat([x, y, pooled.expand(-1, -1, *x.shape[2:])], 1)


class Reused(Head):
    def forward(self, x, pooled):
        gate = self.fc(pooled.view(*x.shape[:2])).view(*x.shape[:2], 1, 1)
        once, again = x * gate, (-2 * x).mul_(gate)
        return once + again + gate * pooled + x * pooled.relu()


HEADS = [Classic, Flattened, Convolved, Channelwise, Selective, Mixed, Upsampled, Reused]


@torch.no_grad()
@pytest.mark.parametrize("head", HEADS)
def test_every_position_is_computed_by_itself(head):
    head = head()
    x, vectors = torch.randn(2, C, 4, 5), torch.randn(2, C, 4, 5)
    result = head(x, Pooled(vectors[:, :, None, None]))
    assert type(result) is torch.Tensor
    for i in range(4):
        for j in range(5):
            position = (..., slice(i, i + 1), slice(j, j + 1))
            torch.testing.assert_close(result[position], head(x[position], vectors[position]))


class Net(nn.Module):
    def __init__(self, head, pool):
        super().__init__()
        self.first = nn.Conv2d(3, C, 3, padding=1)
        self.pool = pool
        self.head = head()

    def forward(self, x):
        y = self.first(x)
        return self.head(y, self.pool(y))


@torch.no_grad()
@pytest.mark.parametrize("pool", [nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d])
@pytest.mark.parametrize("head", HEADS)
def test_networks_with_such_heads_become_local(head, pool):
    net = Net(head, pool(1)).eval()
    small, large = torch.rand(2, 3, 16, 16), torch.rand(2, 3, 40, 30)
    globally = net(small)
    y = net.first(large)
    statistic = local_mean if pool is nn.AdaptiveAvgPool2d else local_max
    expected = net.head(y, Pooled(statistic(y, (24, 24))[:, :, None, None]))
    with convert(net, Local(train_size=16)):
        assert torch.equal(net(small), globally)
        torch.testing.assert_close(net(large), expected)


@torch.no_grad()
@pytest.mark.parametrize("window", [8, 24, 32, 100])
@pytest.mark.parametrize("head", HEADS)
def test_maps_serve_where_they_would_do(head, window):
    net = Net(head, nn.AdaptiveAvgPool2d(1)).eval()
    (op,) = plan(net, Local(train_size=16, window=window)).converted
    assert op.form.attributes["local_gives"] == ("either" if head is Convolved else "vectors")


def test_gradients_flow_through_pooled_values():
    net = Net(Classic, nn.AdaptiveAvgPool2d(1))
    with convert(net, Local(train_size=8)):
        net(torch.rand(1, 3, 20, 20)).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.head.fc.parameters())


@pytest.mark.parametrize("window", [8, 16, 64])
@pytest.mark.parametrize("by_module", [False, True])
def test_pooled_values_that_reach_the_output_stay_global(by_module, window):
    class Classifier(nn.Module):
        def __init__(self):
            super().__init__()
            self.pool = nn.AdaptiveAvgPool2d(1) if by_module else None
            self.fc = nn.Linear(3, 10)

        def forward(self, x):
            return self.fc(self.pool(x).flatten(1) if self.pool else x.mean((2, 3)))

    (op,) = plan(Classifier(), Local(train_size=8, window=window)).kept
    assert "output" in op.reason


def test_maps_of_another_size_are_refused():
    pooled = Pooled(torch.rand(1, C, 1, 1, 8, 8))
    with pytest.raises(ValueError, match="another size"):
        _ = pooled * torch.rand(1, C, 16, 16)
    with pytest.raises(ValueError, match="different size"):
        _ = pooled * Pooled(torch.rand(1, C, 1, 1, 4, 4))


@torch.no_grad()
def test_what_is_added_in_place_may_be_the_map_but_not_lie_half_over_it():
    base = torch.rand(1, C, 9, 8).contiguous(memory_format=torch.channels_last)
    x, plus = base[:, :, 1:], base[:, :, :-1]
    pooled = Pooled(torch.rand(1, C, 1, 1, 8, 8))
    with pytest.raises(RuntimeError, match="memory location"):
        torch.addcmul(plus, x, pooled, out=x)
    expected = x + x * pooled
    torch.testing.assert_close(torch.addcmul(x, x, pooled, out=x), expected)


class Squeezed(nn.Module):
    def __init__(self, in_place):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.gate = nn.Sequential(nn.Conv2d(8, 2, 1), nn.ReLU(), nn.Conv2d(2, 8, 1), nn.Sigmoid())
        self.act = nn.ReLU(inplace=in_place)

    def forward(self, x):
        x = self.first(x)
        pooled = self.pool(x)
        return self.act(x) * self.gate(pooled)


class Attention(nn.Module):
    """Squeeze and excitation as most write it, with one way to write the layers or the other."""

    def __init__(self, channels, reduced, linear, residual):
        super().__init__()
        layer = nn.Linear if linear else partial(nn.Conv2d, kernel_size=1)
        self.residual = residual
        self.first = nn.Conv2d(3, channels, 3, padding=1)
        self.pool = nn.AdaptiveAvgPool2d(1)
        layers = [layer(channels, reduced), nn.ReLU(True), layer(reduced, channels), nn.Sigmoid()]
        self.gate = nn.Sequential(*layers)
        self.linear = linear

    def forward(self, x):
        x = self.first(x)
        pooled = self.pool(x).flatten(1) if self.linear else self.pool(x)
        weights = self.gate(pooled).view(*x.shape[:2], 1, 1)
        if self.residual == "in place" and not torch.is_grad_enabled():
            return torch.addcmul(x.flip(1), x, weights, out=x)
        return torch.addcmul(x.flip(1), x, weights) if self.residual else x * weights


@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize("reduced", [4, 20, 32])
@pytest.mark.parametrize("residual", ["", "beside", "in place"])
def test_attention_is_the_same_in_compiled_kernels(reduced, linear, residual):
    torch.manual_seed(0)
    net = Attention(32, reduced, linear, residual)
    x = torch.rand(2, 3, 40, 50)
    with convert(net.double(), Local(train_size=16)):
        exact = net(x.double())  # derivatives are recorded: torch's own operators
    kind = torch.channels_last
    with convert(net.float().to(memory_format=kind), Local(train_size=16)), torch.inference_mode():
        found = net(x.contiguous(memory_format=kind))
    assert found.is_contiguous(memory_format=kind)
    torch.testing.assert_close(found.double(), exact, rtol=0, atol=1e-6)


class Summed(nn.Module):
    """Gates from the sum of what layers make of means and of maxima."""

    def __init__(self, reduced, biases, rectified):
        super().__init__()
        self.first = nn.Conv2d(3, 32, 3, padding=1)
        self.mean, self.maximum = nn.AdaptiveAvgPool2d(1), nn.AdaptiveMaxPool2d(1)
        self.heads = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(32, reduced, 1), nn.ReLU(), nn.Conv2d(reduced, 32, 1, bias=bias)
            )
            for bias in biases
        )
        self.end = nn.ReLU() if rectified else nn.Identity()

    def forward(self, x):
        x = self.first(x)
        pooled = self.mean(x), self.maximum(x)
        one, other = (self.end(head(y)) for head, y in zip(self.heads, pooled, strict=True))
        return x * torch.sigmoid(one + other)


@torch.no_grad()
@pytest.mark.parametrize("reduced", [2, 40])
@pytest.mark.parametrize("biases", [(True, True), (False, True), (False, False)])
@pytest.mark.parametrize("rectified", [False, True])
@pytest.mark.parametrize("kind", [torch.channels_last, torch.contiguous_format])
def test_sums_of_heads_are_those_of_their_values(reduced, biases, rectified, kind):
    torch.manual_seed(0)
    net = Summed(reduced, biases, rectified).to(memory_format=kind)
    x = torch.rand(2, 3, 30, 40).contiguous(memory_format=kind)
    y = net.first(x)
    pooled = local_mean(y, (24, 24)), local_max(y, (24, 24))
    each = [net.end(head(values)) for head, values in zip(net.heads, pooled, strict=True)]
    with convert(net, Local(train_size=16)):
        torch.testing.assert_close(net(x), y * sum(each).sigmoid())


class Twice(nn.Module):
    """A map weighed in place, and one that is weighed by the map's means later."""

    def __init__(self, pools):
        super().__init__()
        self.first = nn.Conv2d(3, 32, 3, padding=1)
        self.pools = nn.ModuleList(nn.AdaptiveAvgPool2d(1) for _ in range(pools))
        self.gate = nn.Sequential(nn.Conv2d(32, 4, 1), nn.ReLU(), nn.Conv2d(4, 32, 1), nn.Sigmoid())

    def forward(self, x):
        x = self.first(x)
        other, gates = x.flip(1), [self.gate(pool(x)) for pool in self.pools]
        x.mul_(gates[0])
        return x + other * gates[-1]


@torch.no_grad()
@pytest.mark.parametrize("pools", [1, 2])
@pytest.mark.parametrize("without", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("kind", [torch.channels_last, torch.contiguous_format])
def test_means_are_those_of_the_map_before_it_is_weighed(pools, without, kind):
    torch.manual_seed(0)
    net = Twice(pools).to(memory_format=kind)
    x = torch.rand(1, 3, 40, 100).contiguous(memory_format=kind)
    y = net.first(x)
    weights = net.gate(local_mean(y, (36, 36)))
    with convert(net, Local(train_size=24)), without():
        torch.testing.assert_close(net(x.clone()), y * weights + y.flip(1) * weights)
        if pools == 2 and without is torch.inference_mode:
            return  # nobody counts the map's versions
        for pool in net.pools:
            pool.local_defers = True
        with pytest.raises(RuntimeError, match="before its mean"):
            net(x)


@torch.no_grad()
@pytest.mark.parametrize("without", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("in_place", [False, True])
def test_means_wait_for_a_squeeze_unless_the_map_changes_meanwhile(in_place, without):
    torch.manual_seed(0)
    net = Squeezed(in_place)
    x = torch.rand(2, 3, 30, 40)
    y = net.first(x)
    expected = y.relu() * net.gate(local_mean(y, (24, 24)))
    with convert(net, Local(train_size=16)), without():
        assert net.pool.local_defers == (not in_place)
        torch.testing.assert_close(net(x.clone()), expected)
    with convert(net, Local(train_size=16)):
        net.pool.local_defers = True
        if in_place:
            with pytest.raises(RuntimeError, match="in place"):
                net(x)
