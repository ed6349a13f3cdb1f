"""Conversion: which operations become local, that nothing else changes, that it is undone."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fullres.errors import ConversionError
from fullres.local import Local, NothingToConvert, convert, plan
from fullres.ops.box import local_mean, local_mean_var_reference


class Attention(nn.Module):
    """Squeeze-and-excitation with convolutions."""

    def __init__(self, channels):
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.squeeze = nn.Conv2d(channels, channels, 1)

    def forward(self, x):
        return x * torch.sigmoid(self.squeeze(self.pool(x)))


class Net(nn.Module):
    """Every kind of operation that a rule knows, at two scales."""

    def __init__(self, channels=8):
        super().__init__()
        self.head = nn.Conv2d(3, channels, 3, padding=1)
        self.first = Attention(channels)
        self.norm = nn.InstanceNorm2d(channels, affine=True)
        self.down = nn.Conv2d(channels, channels, 2, stride=2)
        self.group = nn.GroupNorm(2, channels)
        self.second = Attention(channels)
        self.plain = nn.InstanceNorm2d(channels)
        self.up = nn.Upsample(scale_factor=2)
        self.tail = nn.Conv2d(channels, 3, 3, padding=1)

    def forward(self, x):
        y = self.norm(self.first(self.head(x)))
        y = self.plain(self.second(self.group(self.down(y))))
        return x + self.tail(self.up(y))


@pytest.fixture
def net():
    torch.manual_seed(0)
    net = Net().eval()
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.3)
    return net


def picture(height, width, batch=1, channels=3):
    torch.manual_seed(height * 1000 + width)
    return torch.rand(batch, channels, height, width)


def test_every_rule_applies_with_its_window(net):
    planned = plan(net, Local(train_size=32))
    windows = {op.name: op.windows for op in planned.converted}
    assert windows == {
        "first.pool": ((48, 48),),
        "norm": ((48, 48),),
        "group": ((24, 24),),
        "second.pool": ((24, 24),),
        "plain": ((24, 24),),
    }
    assert not planned.kept
    assert type(net.norm) is nn.InstanceNorm2d


@given(
    train=st.tuples(st.integers(8, 40), st.integers(8, 40)),
    window=st.tuples(st.integers(1, 90), st.integers(1, 90)),
)
@settings(max_examples=15, deadline=None)
def test_windows_scale_by_axis_and_round_down(train, window):
    net = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2), nn.GroupNorm(2, 4))
    (op,) = plan(net, Local(train, window)).converted
    feature = op.shapes[0][-2:]
    expected = tuple(
        max(1, int(f * w // t)) for f, w, t in zip(feature, window, train, strict=True)
    )
    assert op.windows == (expected,)


def test_the_default_window_is_one_and_a_half_training_sizes():
    assert Local(256).window == (384, 384)
    assert Local((100, 61)).window == (150, 91)


@pytest.mark.parametrize("wrong", [0, -3, (4,), (4, 4, 4), 2.5, "256"])
def test_sizes_are_checked(wrong):
    with pytest.raises(ConversionError, match="train_size"):
        Local(wrong)


@torch.no_grad()
def test_it_is_exact_at_the_training_size_and_local_beyond(net):
    small, large = picture(32, 32), picture(96, 128)
    before = net(small), net(large)
    with convert(net, Local(train_size=32)):
        assert torch.equal(net(small), before[0])
        assert not torch.allclose(net(large), before[1])


@torch.no_grad()
@given(height=st.integers(4, 48), width=st.integers(4, 48), batch=st.integers(1, 3))
@settings(max_examples=25, deadline=None)
def test_where_the_window_covers_the_picture_nothing_changes(height, width, batch):
    torch.manual_seed(3)
    net = Net().eval()
    x = picture(2 * (height // 2), 2 * (width // 2), batch)
    before = net(x)
    with convert(net, Local(train_size=32)):
        assert torch.equal(net(x), before)


@torch.no_grad()
def test_the_local_forms_are_those_of_the_definition():
    x = picture(20, 30, batch=2, channels=6).double() * 3 + 5
    local = Local(train_size=10, window=(8, 12))

    def mean(values, k=(8, 12)):
        return local_mean(values, k)

    pool, norm = nn.AdaptiveAvgPool2d(1), nn.InstanceNorm2d(6, affine=True).double()
    group = nn.GroupNorm(3, 6).double()
    for layer in (norm, group):
        nn.init.normal_(layer.weight)
        nn.init.normal_(layer.bias)
    example = torch.rand(1, 6, 10, 10, dtype=torch.float64)
    for layer in (pool, norm, group):
        convert(layer, local, example)
    torch.testing.assert_close(pool(x), mean(x))
    m, v = local_mean_var_reference(x, (8, 12))
    affine = lambda y, f: y * f.weight[:, None, None] + f.bias[:, None, None]  # noqa: E731
    torch.testing.assert_close(norm(x), affine((x - m) / (v + norm.eps).sqrt(), norm))
    pairs = x.unflatten(1, (3, 2))
    m = mean(pairs.mean(2)).repeat_interleave(2, 1)
    v = mean(pairs.square().mean(2)).repeat_interleave(2, 1) - m.square()
    torch.testing.assert_close(group(x), affine((x - m) / (v + group.eps).sqrt(), group))


@torch.no_grad()
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_any_type_format_and_batch(net, dtype, memory_format):
    x = picture(64, 80, batch=3)
    with convert(net, Local(train_size=32)):
        expected = torch.cat([net(one[None]) for one in x])
        net.to(dtype=dtype, memory_format=memory_format)
        y = net(x.to(dtype=dtype, memory_format=memory_format))
        net.to(torch.float32)
    assert y.dtype == dtype
    bound = 0.15 if dtype == torch.bfloat16 else 1e-4
    assert (y.float() - expected).abs().max() <= bound * expected.abs().max()


@torch.no_grad()
def test_revert_is_bit_exact_and_complete(net):
    x = picture(64, 96)
    before, classes = net(x), [type(m) for m in net.modules()]
    attributes = [sorted(vars(m)) for m in net.modules()]
    modules, parameters = list(net.modules()), list(net.parameters())
    conversion = convert(net, Local(train_size=32))
    assert [type(m) for m in net.modules()] != classes
    conversion.revert()
    conversion.revert()
    assert [type(m) for m in net.modules()] == classes
    assert [sorted(vars(m)) for m in net.modules()] == attributes
    assert all(a is b for a, b in zip(net.modules(), modules, strict=True))
    assert all(a is b for a, b in zip(net.parameters(), parameters, strict=True))
    assert torch.equal(net(x), before)


def test_the_network_stays_the_same_network(net):
    keys, parameters = list(net.state_dict()), list(net.parameters())
    modules = list(net.modules())
    convert(net, Local(train_size=32))
    assert list(net.state_dict()) == keys
    assert all(a is b for a, b in zip(net.parameters(), parameters, strict=True))
    assert all(a is b for a, b in zip(net.modules(), modules, strict=True))
    assert isinstance(net.norm, nn.InstanceNorm2d)
    assert "window=48×48" in repr(net.norm)


@torch.no_grad()
@pytest.mark.parametrize("assign", [False, True])
def test_weights_load_before_and_after(net, assign):
    weights = {name: torch.randn_like(value) for name, value in net.state_dict().items()}
    x = picture(64, 64)
    first, second = copy.deepcopy(net), copy.deepcopy(net)
    first.load_state_dict(weights, assign=assign)
    convert(first, Local(train_size=32))
    convert(second, Local(train_size=32))
    second.load_state_dict(weights, assign=assign)
    assert torch.equal(first(x), second(x))


@torch.no_grad()
def test_hooks_stay_and_calibration_does_not_fire_them(net):
    fired = []
    net.first.pool.register_forward_hook(lambda m, i, o: fired.append(tuple(o.shape)))
    net.register_forward_pre_hook(lambda m, i: fired.append("root"))
    conversion = convert(net, Local(train_size=32))
    assert not fired
    net(picture(64, 96))
    assert fired == ["root", (1, 8, 64, 96)]
    conversion.revert()
    net(picture(64, 96))
    assert fired[2:] == ["root", (1, 8, 1, 1)]


@torch.no_grad()
def test_aliases_are_one_operation():
    class Aliased(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.InstanceNorm2d(3)
            self.b = self.a
            self.inner = nn.ModuleList([self.a])

        def forward(self, x):
            return self.b(x)

    net = Aliased()
    conversion = convert(net, Local(train_size=8))
    (op,) = conversion.converted
    assert op.names == ("a", "b", "inner.0")
    assert net.a is net.b is net.inner[0]
    assert "window=12×12" in repr(net.b)
    conversion.revert()
    assert type(net.a) is nn.InstanceNorm2d


@torch.no_grad()
def test_the_root_itself_is_converted():
    pool = nn.AdaptiveAvgPool2d(1)
    x = picture(20, 20)
    with convert(pool, Local(train_size=8)):
        assert torch.equal(pool(x), local_mean(x, (12, 12)))
    assert torch.equal(pool(x), x.mean((2, 3), keepdim=True))


class TwoSizes(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.InstanceNorm2d(3)

    def forward(self, x):
        return self.norm(x), self.norm(nn.functional.avg_pool2d(x, 2))


@torch.no_grad()
def test_several_calls_with_different_sizes_keep_a_window_each():
    net, x = TwoSizes(), picture(64, 64)
    single = nn.InstanceNorm2d(3)
    with convert(net, Local(train_size=16)) as conversion:
        assert conversion.converted[0].windows == ((24, 24), (12, 12))
        results = [net(x), net(x)]
        with pytest.raises(ConversionError, match="outside"):
            net.norm(x)
    assert type(net) is TwoSizes
    for a, b in results:
        with convert(single, Local(16)):
            assert torch.equal(a, single(x))
        with convert(single, Local(8)):
            assert torch.equal(b, single(nn.functional.avg_pool2d(x, 2)))


@torch.no_grad()
def test_it_is_reentrant(in_threads):
    net = TwoSizes()
    pictures = [picture(40 + 8 * k, 64) for k in range(4)]
    convert(net, Local(train_size=16))
    alone = [net(x) for x in pictures]
    wrong = []

    def work(k):
        results = [net(pictures[k]) for _ in range(10)]
        wrong.extend(r for r in results if not all(map(torch.equal, r, alone[k])))

    in_threads(work)
    assert not wrong


def test_nothing_is_written_in_forward(net):
    convert(net, Local(train_size=32))
    state = {name: dict(vars(m)) for name, m in net.named_modules()}
    net(picture(64, 64))
    after = {name: dict(vars(m)) for name, m in net.named_modules()}
    assert all(
        after[name][key] is value for name, kept in state.items() for key, value in kept.items()
    )
    assert {n: sorted(a) for n, a in after.items()} == {n: sorted(a) for n, a in state.items()}


def test_what_stays_global_says_why():
    class Kept(nn.Module):
        def __init__(self):
            super().__init__()
            self.running = nn.InstanceNorm2d(3, track_running_stats=True)
            self.pyramid = nn.AdaptiveAvgPool2d(2)
            self.strip = nn.AdaptiveAvgPool2d((None, 1))
            self.max = nn.AdaptiveMaxPool2d(1, return_indices=True)
            self.unused = nn.GroupNorm(1, 3)
            self.flat = nn.GroupNorm(1, 3)
            self.batch = nn.BatchNorm2d(3, track_running_stats=False)
            self.pool = nn.AdaptiveAvgPool2d(1)

        def forward(self, x):
            self.pyramid(x), self.strip(x), self.max(x), self.flat(x.flatten(2))
            x = self.batch(self.running(x))
            return x * float(self.pool(x).mean())

    net = Kept()
    reasons = {op.name: op.reason for op in plan(net, Local(train_size=16)).kept}
    assert "running statistics" in reasons["running"]
    assert "2 × 2" in reasons["pyramid"]
    assert "the input's × 1" in reasons["strip"]
    assert "position of the maximum" in reasons["max"]
    assert "not called" in reasons["unused"]
    assert "3 dimensions" in reasons["flat"]
    assert "batch" in reasons["batch"]
    assert "does not run at each position" in reasons["pool"]
    with pytest.raises(NothingToConvert, match=r"pooling to 1 × 1.*running statistics"):
        convert(net, Local(train_size=16))
    assert type(net.pool) is nn.AdaptiveAvgPool2d


def test_nothing_to_convert_says_what_was_looked_for():
    with pytest.raises(NothingToConvert, match="instance norm, group norm"):
        convert(nn.Conv2d(3, 3, 3), Local(train_size=16))


def test_a_subclass_with_its_own_forward_is_left_alone():
    class Own(nn.AdaptiveAvgPool2d):
        def forward(self, x):
            return x

    class Same(nn.AdaptiveAvgPool2d):
        note = "kept"

    with pytest.raises(NothingToConvert):
        convert(Own(1), Local(train_size=8))
    same = Same(1)
    convert(same, Local(train_size=8))
    assert isinstance(same, Same)
    assert same.note == "kept"
    assert same(picture(20, 20)).shape == (1, 3, 20, 20)


def test_a_network_that_looks_at_values_is_run_for_real():
    class Looks(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.InstanceNorm2d(3)
            self.register_buffer("count", torch.zeros(()))

        def forward(self, x):
            self.count += 1
            return self.norm(x) if float(x.sum()) > 0 else x

    net = Looks()
    assert plan(net, Local(train_size=16)).converted[0].windows == ((24, 24),)
    assert net.count == 0


def test_channels_are_found_and_an_example_helps_where_they_cannot_be():
    grey = nn.Sequential(nn.Conv2d(1, 4, 3), nn.InstanceNorm2d(4))
    assert len(plan(grey, Local(train_size=16)).converted) == 1

    class Video(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.InstanceNorm2d(3)

        def forward(self, frames, gain):
            return self.norm(frames.flatten(0, 1)).unflatten(0, frames.shape[:2]) * gain

    with pytest.raises(ConversionError, match=r"does not run at its training size.*example"):
        plan(Video(), Local(train_size=16))
    example = (torch.zeros(1, 5, 3, 16, 16), 2.0)
    assert len(plan(Video(), Local(train_size=16), example).converted) == 1
    with pytest.raises(ConversionError, match="16 × 16, got 8 × 8"):
        plan(Video(), Local(train_size=16), (torch.zeros(1, 5, 3, 8, 8), 2.0))


def test_converting_twice_is_refused(net):
    conversion = convert(net, Local(train_size=32))
    with pytest.raises(ConversionError, match="local already"):
        convert(net, Local(train_size=32))
    conversion.revert()
    convert(net, Local(train_size=32))


def test_modules_that_bring_their_own_local_form():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3, 1, 1))

        def forward(self, x):
            return x - self.weight * x.mean((2, 3), keepdim=True)

        def to_local(self, window):
            form = OwnLocal()
            form.weight = self.weight
            form.window = window
            return form

    class OwnLocal(Own):
        def forward(self, x):
            return x - self.weight * local_mean(x, self.window)

    class Copies(Own):
        def to_local(self, window):
            return OwnLocal()

    net = nn.Sequential(Own())
    x = picture(20, 20)
    with torch.no_grad(), convert(net, Local(train_size=8)) as conversion:
        assert conversion.converted[0].windows == ((12, 12),)
        net.load_state_dict({"0.weight": torch.full((3, 1, 1), 2.0)}, assign=True)
        assert torch.equal(net(x), x - 2 * local_mean(x, (12, 12)))
    assert type(net[0]) is Own
    assert not hasattr(net[0], "window")
    with pytest.raises(ConversionError, match="share"):
        convert(nn.Sequential(Copies()), Local(train_size=8))


@torch.no_grad()
def test_copies_and_pickles_stay_local(net):
    x = picture(64, 64)
    convert(net, Local(train_size=32))
    expected = net(x)
    assert torch.equal(copy.deepcopy(net)(x), expected)
    file = io.BytesIO()
    torch.save(net.first.pool, file)
    file.seek(0)
    assert "window=48×48" in repr(torch.load(file, weights_only=False))


def test_a_converted_network_exports_and_compiles(net):
    x = picture(64, 64)
    convert(net, Local(train_size=32))
    with torch.no_grad():
        expected = net(x)
        torch.testing.assert_close(torch.export.export(net, (x,)).module()(x), expected)
        compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), expected)


def test_gradients_flow_through_a_converted_network(net):
    convert(net, Local(train_size=16))
    net(picture(48, 48)).square().mean().backward()
    for name, parameter in net.named_parameters():
        assert torch.isfinite(parameter.grad).all(), name


def test_the_table_reads_well():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList(Attention(3) for _ in range(3))
            self.last = nn.InstanceNorm2d(3, track_running_stats=True)

        def forward(self, x):
            for block in self.blocks:
                x = block(x)
            return self.last(x)

    lines = str(plan(Two(), Local(train_size=16))).splitlines()
    assert lines == [
        "Two: training size 16 × 16, window 24 × 24",
        "",
        "operation                           kind           map at training size   window",
        "blocks.0.pool … blocks.2.pool (3)   average pool   16 × 16                24 × 24",
        "",
        "stays global   kind            because it",
        "last           instance norm   normalises with running statistics, which are the same for "
        "every picture size",
        "",
        "3 of 4 global operations become local.",
    ]
