"""Global operations written as function calls: all spellings are found and become local."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fullres.local import Local, NothingToConvert, convert, plan
from fullres.ops.box import local_max, local_mean, local_mean_var

TRAIN, WINDOW = 16, (24, 24)


def var(x, correction):
    n = WINDOW[0] * WINDOW[1]
    return local_mean_var(x, WINDOW)[1] * n / (n - correction)


def mean(x):
    return local_mean(x, WINDOW)


def total(x):
    """As if all positions were like those of the window."""
    return x.shape[2] * x.shape[3] * mean(x)


def count(x):
    return torch.ones_like(x[:, :1]).sum((2, 3), keepdim=True)


SPELLINGS = {
    "mean dims": (lambda x: x.mean((2, 3), keepdim=True), mean),
    "mean negative dims": (lambda x: torch.mean(x, dim=[-2, -1], keepdim=True), mean),
    "mean swapped": (lambda x: x.mean(dim=(-1, -2))[:, :, None, None], mean),
    "mean of mean": (lambda x: x.mean(3, keepdim=True).mean(2, keepdim=True), mean),
    "mean of mean, no keepdim": (lambda x: x.mean(2).mean(2)[..., None, None], mean),
    "flattened": (lambda x: x.flatten(2).mean(-1)[:, :, None, None], mean),
    "viewed": (lambda x: x.view(*x.shape[:2], -1).mean(2, keepdim=True).unsqueeze(-1), mean),
    "sum": (lambda x: x.sum((2, 3), keepdim=True), total),
    "sum of sum": (lambda x: x.sum(-1, keepdim=True).sum(-2, keepdim=True), total),
    "sum by the number": (
        lambda x: x.sum((2, 3), keepdim=True) / (x.shape[2] * x.shape[3]),
        mean,
    ),
    "sum by a sum of ones": (lambda x: x.sum((2, 3), keepdim=True) / count(x), mean),
    "amax": (lambda x: x.amax((2, 3), keepdim=True), lambda x: local_max(x, WINDOW)),
    "amax of amax": (lambda x: x.amax(3).amax(2)[:, :, None, None], lambda x: local_max(x, WINDOW)),
    "max": (lambda x: x.flatten(2).max(-1)[0][:, :, None, None], lambda x: local_max(x, WINDOW)),
    "max of max": (
        lambda x: torch.max(x.max(3, keepdim=True).values, 2, keepdim=True)[0],
        lambda x: local_max(x, WINDOW),
    ),
    "var": (lambda x: x.var((2, 3), keepdim=True), lambda x: var(x, 1)),
    "var, biased": (
        lambda x: torch.var(x, (2, 3), unbiased=False, keepdim=True),
        lambda x: var(x, 0),
    ),
    "std": (lambda x: x.std(dim=(2, 3), keepdim=True), lambda x: var(x, 1).sqrt()),
    "std, correction": (
        lambda x: x.flatten(2).std(2, correction=0)[..., None, None],
        lambda x: var(x, 0).sqrt(),
    ),
    "var and mean": (
        lambda x: sum(torch.var_mean(x, (2, 3), keepdim=True)),
        lambda x: var(x, 1) + mean(x),
    ),
    "std and mean": (
        lambda x: sum(torch.std_mean(x.flatten(2), dim=2, correction=0))[..., None, None],
        lambda x: var(x, 0).sqrt() + mean(x),
    ),
    "amin": (lambda x: x.amin((2, 3), keepdim=True), lambda x: -local_max(-x, WINDOW)),
    "min": (
        lambda x: x.flatten(2).min(-1).values[:, :, None, None],
        lambda x: -local_max(-x, WINDOW),
    ),
    "mean in another type": (
        lambda x: x.mean((2, 3), keepdim=True, dtype=torch.float64).float(),
        lambda x: mean(x.double()).float(),
    ),
    "mean of a row a channel": (
        lambda x: x.reshape(-1, x.shape[2] * x.shape[3]).mean(1).view(*x.shape[:2], 1, 1),
        mean,
    ),
    "mean of tokens": (lambda x: x.flatten(2).transpose(1, 2).mean(1)[..., None, None], mean),
    "mean of tokens, keepdim": (
        lambda x: (x.flatten(2).mT - x.flatten(2).mT.mean(1, True)).mT.view_as(x),
        lambda x: x - mean(x),
    ),
    "adaptive average": (lambda x: F.adaptive_avg_pool2d(x, 1), mean),
    "adaptive maximum": (
        lambda x: F.adaptive_max_pool2d(x, (1, 1)),
        lambda x: local_max(x, WINDOW),
    ),
    "average of the full size": (lambda x: F.avg_pool2d(x, x.shape[2:]), mean),
    "average, no padding": (lambda x: F.avg_pool2d(x, x.shape[2:], padding=(0, 0)), mean),
    "maximum of the full size": (
        lambda x: F.max_pool2d(x, kernel_size=x.size()[2:]),
        lambda x: local_max(x, WINDOW),
    ),
}


class Scaled(nn.Module):
    """A map beside one value a channel, however that is computed."""

    def __init__(self, pool):
        super().__init__()
        self.first = nn.Conv2d(3, 5, 3, padding=1)
        self.pool = pool

    def forward(self, x):
        y = self.first(x)
        return y + self.pool(y)


@torch.no_grad()
@pytest.mark.parametrize("name", SPELLINGS)
def test_every_spelling_becomes_local(name):
    torch.manual_seed(0)
    function, local_form = SPELLINGS[name]
    net = Scaled(function)
    small, large = torch.rand(2, 3, TRAIN, TRAIN), torch.rand(2, 3, 40, 52)
    before, y = net(small), net.first(large)
    conversion = convert(net, Local(TRAIN))
    (op,) = conversion.converted
    assert not conversion.kept
    assert op.site is not None
    assert "test_functional.py" in op.label
    assert torch.equal(net(small), before)
    torch.testing.assert_close(net(large), y + local_form(y))
    conversion.revert()
    assert type(net) is Scaled
    torch.testing.assert_close(net(large), y + function(y))


class Normalised(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(6))
        self.bias = nn.Parameter(torch.rand(6))

    def forward(self, x):
        x = x.repeat(1, 2, 1, 1)
        y = F.instance_norm(x, weight=self.weight, bias=self.bias, eps=1e-3)
        return y + F.group_norm(x, 3, self.weight, eps=1e-4)


@torch.no_grad()
def test_functional_norms_are_those_of_the_modules():
    net = Normalised()
    instance, group = nn.InstanceNorm2d(6, eps=1e-3, affine=True), nn.GroupNorm(3, 6, eps=1e-4)
    instance.weight, instance.bias, group.weight = net.weight, net.bias, net.weight
    x = torch.rand(1, 3, 40, 33)
    example = torch.rand(1, 6, TRAIN, TRAIN)
    assert len(convert(net, Local(TRAIN)).converted) == 2
    for module in (instance, group):
        convert(module, Local(TRAIN), example)
    y = x.repeat(1, 2, 1, 1)
    torch.testing.assert_close(net(x), instance(y) + group(y))


class Deep(nn.Module):
    """Means at two sizes, one in a helper called in a loop, beside a module and a linear head."""

    def __init__(self):
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(3, 3)

    def squeeze(self, x):
        return self.head(x.mean((2, 3)))[:, :, None, None]

    def forward(self, x):
        for size in (1, 2):
            y = F.avg_pool2d(x, size)
            x = x * F.interpolate((y * self.squeeze(y)).sigmoid(), size=x.shape[2:])
        return x * self.pool(x)


@torch.no_grad()
def test_a_site_called_at_several_sizes_keeps_a_window_each():
    net = Deep()
    conversion = convert(net, Local(TRAIN))
    windows = {op.kind: op.windows for op in conversion.converted}
    assert windows == {"average pool": ((24, 24),), "mean": ((24, 24), (12, 12))}
    x = torch.rand(1, 3, 64, 48)
    first, again = net(x), net(x)
    assert torch.equal(first, again)
    y = x
    for size, window in ((1, 24), (2, 12)):
        z = F.avg_pool2d(y, size)
        m = local_mean(z, (window, window))
        s = F.conv2d(m, net.head.weight[:, :, None, None], net.head.bias)
        y = y * F.interpolate((z * s).sigmoid(), size=y.shape[2:])
    torch.testing.assert_close(first, y * mean(y))


@torch.no_grad()
def test_modules_and_calls_of_several_levels_do_not_meet():
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.ModuleList(Scaled(lambda x: x.mean((2, 3), True)) for _ in range(2))
            for inner in self.inner:
                inner.first = nn.Conv2d(3, 3, 1)

        def forward(self, x):
            for inner in self.inner:
                x = inner(x) - x.amax((2, 3), True)
            return x

    net = Outer()
    x = torch.rand(1, 3, 50, 40)
    expected = x
    for inner in net.inner:
        y = inner.first(expected)
        expected = y + mean(y) - local_max(expected, WINDOW)
    conversion = convert(net, Local(TRAIN))
    assert sorted(op.name for op in conversion.converted) == ["", "inner.0", "inner.1"]
    torch.testing.assert_close(net(x), expected)
    torch.testing.assert_close(copy.deepcopy(net)(x), expected)


@torch.no_grad()
def test_it_is_reentrant(in_threads):
    net = Deep()
    convert(net, Local(TRAIN))
    pictures = [torch.rand(1, 3, 40 + 4 * k, 48) for k in range(4)]
    alone = [net(x) for x in pictures]
    wrong = []

    def work(k):
        wrong.extend(k for _ in range(10) if not torch.equal(net(pictures[k]), alone[k]))

    in_threads(work)
    assert not wrong


GLOBAL = {
    "mean": lambda x: x.permute(0, 2, 3, 1).mean((1, 2))[:, :, None, None] + x,
    "var": lambda x: x.flatten(1).var(1)[:, None, None, None] + x,
    "fft_rfft2": lambda x: torch.fft.rfft2(x).abs().amax(1, True)[..., :1] + x,
}


@pytest.mark.parametrize("name", GLOBAL)
def test_what_no_rule_covers_is_reported(name):
    net = Scaled(GLOBAL[name])
    planned = plan(net, Local(TRAIN))
    (op,) = planned.kept
    assert op.kind == name
    assert str(planned).endswith("\n0 of 1 global operation becomes local.")
    with pytest.raises(NothingToConvert, match="no rule"):
        convert(net, Local(TRAIN))


@torch.no_grad()
def test_half_a_mean_that_is_used_by_itself_stays_global():
    def rows_and_all(x):
        rows = x.mean(3, keepdim=True)
        return rows.mean(2, keepdim=True) * x + rows

    net = Scaled(rows_and_all)
    x = torch.rand(1, 3, 40, 52)
    with convert(net, Local(TRAIN)) as conversion:
        assert [op.kind for op in conversion.converted] == ["mean"]
        assert [op.kind for op in conversion.plan.still_global] == ["mean"]
        y = net.first(x)
        torch.testing.assert_close(net(x), y + mean(y) * y + y.mean(3, keepdim=True))


def test_half_a_mean_that_leaves_the_network_stays_global():
    class Two(nn.Module):
        def forward(self, x):
            rows = x.mean(3, keepdim=True)
            return x - rows.mean(2, keepdim=True), rows

    planned = plan(Two(), Local(TRAIN))
    assert (len(planned.converted), len(planned.still_global)) == (1, 1)


@torch.no_grad()
def test_a_map_changed_since_it_was_flattened_is_not_mistaken_for_it():
    def changed(x):
        y = x.transpose(2, 3).contiguous().transpose(2, 3)
        flat = y.flatten(2)  # a copy
        y.mul_(3)
        return flat.mean(2)[..., None, None]

    net = Scaled(changed)
    x = torch.rand(1, 3, 40, 52)
    expected = net(x)
    assert [op.kind for op in plan(net, Local(TRAIN)).kept] == ["mean"]
    torch.testing.assert_close(net(x), expected)


def test_what_does_not_grow_with_the_picture_is_not_global():
    class Windows(nn.Module):
        def forward(self, x):
            b, c, h, w = x.shape
            y = x.view(b, c, h // 4, 4, w // 4, 4)
            y = y - y.mean((3, 5), keepdim=True)
            y = y.view(b, c, h, w)
            return y * torch.softmax(y, 1) + y.mean(1, keepdim=True)

    with pytest.raises(NothingToConvert):
        convert(Windows(), Local(TRAIN))


def test_pooling_to_a_share_of_the_map_and_transforms_of_windows_are_not_global():
    class Cells(nn.Module):
        def forward(self, x):
            b, c, h, w = x.shape
            y = F.adaptive_max_pool2d(x, (h // 4, w // 4)) + F.max_pool2d(x, 4)
            windows = x.view(b, c, h // 4, 4, w // 4, 4).transpose(3, 4)
            spectra = torch.fft.irfft2(torch.fft.rfft2(windows), s=(4, 4))
            return F.interpolate(y, scale_factor=4) + spectra.transpose(3, 4).reshape(x.shape)

    with pytest.raises(NothingToConvert) as nothing:
        convert(Cells(), Local(TRAIN))
    assert not nothing.value.plan.operations


@torch.no_grad()
def test_values_that_leave_the_network_stay_global():
    class Two(nn.Module):
        def forward(self, x):
            m = x.mean((2, 3))
            return x - m[:, :, None, None], m

    (op,) = plan(Two(), Local(TRAIN)).kept
    assert "output" in op.reason


def test_gradients_and_export():
    net = Scaled(lambda y: torch.sigmoid(y.mean((2, 3), keepdim=True)))
    x = torch.rand(1, 3, 40, 40)
    convert(net, Local(TRAIN))
    net(x).square().sum().backward()
    assert net.first.weight.grad.isfinite().all()
    with torch.no_grad():
        exported = torch.export.export(net, (x,))
        torch.testing.assert_close(exported.module()(x), net(x))


class Standardised(nn.Module):
    """Its forward calls its first argument by another name."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, padding=1)

    def forward(this, x):  # noqa: N805 - what the test is about
        y = this.first(x)
        return (y - mean_of(y)) / (y.std((2, 3), keepdim=True) + 0.1)


def mean_of(module_or_not):
    return module_or_not.mean((2, 3), keepdim=True)


def test_calls_belong_to_the_module_that_runs_whatever_the_names():
    net = Standardised()
    kinds = [(op.kind, op.name) for op in plan(net, Local(TRAIN)).converted]
    assert kinds == [("mean", ""), ("std", "")]
    assert not plan(net, Local(TRAIN)).kept


@torch.no_grad()
def test_compiled_networks_stay_local():
    net = nn.Sequential(Standardised(), nn.Conv2d(4, 3, 1), nn.Sigmoid())
    x = torch.rand(1, 3, 40, 56)
    globally = net(x)
    with convert(net, Local(TRAIN)):
        locally = net(x)
        compiled = torch.compile(net, backend="eager")
        torch.testing.assert_close(compiled(x), locally)
        torch.testing.assert_close(net(x), locally)
    assert (locally - globally).abs().max() > 1e-3
