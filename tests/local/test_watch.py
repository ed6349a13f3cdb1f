"""What acts over all positions is found, however it is written, and nothing else is."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fullres.local import Local, plan
from fullres.local.calibrate import calibrate
from fullres.local.reach import extent

TRAIN = 16


class Behind(nn.Module):
    """Whatever it is, behind a convolution to five channels."""

    def __init__(self, part):
        super().__init__()
        self.first, self.part = nn.Conv2d(3, 5, 3, padding=1), part

    def forward(self, x):
        return self.part(self.first(x))


class Flat(nn.Module):
    """A module on (B, C, H·W), or on (B, H·W, C)."""

    def __init__(self, module, tokens=False):
        super().__init__()
        self.module, self.tokens = module, tokens

    def forward(self, x):
        y = x.flatten(2)
        y = self.module(y.mT).mT if self.tokens else self.module(y)
        return y.view_as(x) if y.numel() == x.numel() else y[..., None]


class Deep(nn.Module):
    """A module on (B, C, 1, H, W)."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, x):
        return self.module(x[:, :, None])[:, :, 0]


class First(nn.Module):
    """The first result of a module, of tokens or of what attends to itself."""

    def __init__(self, module, inputs=1):
        super().__init__()
        self.module, self.inputs = module, inputs

    def forward(self, x):
        return self.module(*self.inputs * (x,))[0]


MODULES = {
    "AdaptiveAvgPool1d": Flat(nn.AdaptiveAvgPool1d(1)),
    "AdaptiveMaxPool1d": Flat(nn.AdaptiveMaxPool1d(1)),
    "AdaptiveAvgPool3d": Deep(nn.AdaptiveAvgPool3d(1)),
    "InstanceNorm1d": Flat(nn.InstanceNorm1d(5)),
    "InstanceNorm3d": Deep(nn.InstanceNorm3d(5)),
    "Softmax": Flat(nn.Softmax(-1)),
    "LayerNorm": nn.LayerNorm([5, TRAIN, TRAIN]),
    "Linear": Flat(nn.Linear(TRAIN**2, TRAIN**2)),
    "MultiheadAttention": Flat(First(nn.MultiheadAttention(5, 1, batch_first=True), 3), True),
    "LSTM": Flat(First(nn.LSTM(5, 5, batch_first=True)), True),
}


@pytest.mark.parametrize("kind", MODULES)
def test_torch_modules_without_a_rule_are_reported_by_name(kind):
    (op,) = plan(Behind(MODULES[kind]), Local(TRAIN)).still_global
    assert op.kind == kind
    assert op.name.startswith("part")
    assert op.site is None
    assert "over all positions" in op.reason


def centred(x: torch.Tensor):
    return x - x.mean((2, 3), keepdim=True)


with warnings.catch_warnings():
    warnings.simplefilter("ignore", FutureWarning)
    scripted = torch.jit.script(centred)


@torch.inference_mode()
def in_inference(x):
    return (x.flatten(2) @ x.flatten(2).mT @ x.flatten(2)).view_as(x)


def gram(x):
    y = x.flatten(2)
    return torch.einsum("bcd,bdl->bcl", torch.einsum("bcl,bdl->bcd", y, y), y).view_as(x)


def first_of(x):
    return torch.zeros(x[0, 0].numel(), dtype=torch.long, device=x.device)


CALLS = {
    "linalg_vector_norm": lambda x: x / torch.linalg.vector_norm(x, dim=(2, 3), keepdim=True),
    "linalg_norm": lambda x: x / torch.linalg.norm(x, dim=(2, 3), keepdim=True),
    "norm": lambda x: x / torch.norm(x, p=2, dim=(2, 3), keepdim=True),
    "rms_norm": lambda x: F.rms_norm(x, x.shape[1:]),
    "layer_norm": lambda x: F.layer_norm(x, x.shape[1:]),
    "normalize": lambda x: F.normalize(x.flatten(2), dim=-1).view_as(x),
    "softmax": lambda x: x * torch.softmax(x.flatten(2), -1).view_as(x),
    "einsum": gram,
    "matmul": in_inference,
    "baddbmm": lambda x: x + torch.baddbmm(torch.zeros(()), x.flatten(2), x.flatten(2).mT).mean(),
    "tensordot": lambda x: x + torch.tensordot(x, x, dims=([2, 3], [2, 3])).mean(),
    "linear": lambda x: F.linear(x.flatten(2), torch.ones(1, x[0, 0].numel()))[..., None],
    "nanmean": lambda x: x.nanmean((2, 3), keepdim=True),
    "median": lambda x: x.flatten(2).median(-1).values[..., None, None],
    "quantile": lambda x: x.flatten(2).quantile(0.5, -1)[..., None, None],
    "kthvalue": lambda x: x.flatten(2).kthvalue(3, -1)[0][..., None, None],
    "aminmax": lambda x: x.flatten(2).aminmax(dim=-1)[0][..., None, None],
    "sort": lambda x: x.flatten(2).sort(-1).values.view_as(x),
    "topk": lambda x: x.flatten(2).topk(4)[0].mean(-1)[..., None, None],
    "cumsum": lambda x: x.cumsum(2),
    "logcumsumexp": lambda x: x.flatten(2).logcumsumexp(-1).view_as(x),
    "cosine_similarity": lambda x: F.cosine_similarity(x, x.square(), dim=3)[..., None],
    "histc": lambda x: x * torch.histc(x, 10).mean(),
    "index_add": lambda x: (
        x + x.new_zeros(1, 5, 1).index_add(2, first_of(x), x.flatten(2))[..., None]
    ),
    "lp_pool2d": lambda x: F.lp_pool2d(x, 2.0, x.shape[2:]),
    "interpolate": lambda x: F.interpolate(x, size=1, mode="area"),
    "interpolate to a fixed size": lambda x: F.interpolate(
        F.interpolate(x, size=(8, 12), mode="bilinear"), x.shape[2:]
    ),
    "conv2d": lambda x: F.conv2d(x, torch.ones(5, 5, *x.shape[2:])),
    "mean": lambda x: torch.ops.aten.mean.dim(x, [2, 3], True),
    "mean (scripted)": lambda x: scripted(x),
}


@pytest.mark.parametrize("kind", CALLS)
def test_calls_without_a_rule_are_reported_by_site(kind):
    kept = plan(Behind(CALLS[kind]), Local(TRAIN)).still_global
    assert {op.kind for op in kept} == {kind.partition(" ")[0]}
    assert all("test_watch.py" in op.label for op in kept)
    assert all("over all positions" in op.reason for op in kept)


def windows(x, size=4):
    """(B, C, H, W) to (B · windows, size², C)."""
    b, c, h, w = x.shape
    y = x.view(b, c, h // size, size, w // size, size)
    return y.permute(0, 2, 4, 3, 5, 1).reshape(-1, size * size, c)


def joined(y, x, size=4):
    b, c, h, w = x.shape
    y = y.view(b, h // size, w // size, size, size, c)
    return y.permute(0, 5, 1, 3, 2, 4).reshape(x.shape)


def shifted_attention(x):
    y = windows(x.roll((2, 2), (2, 3)))
    return joined(F.scaled_dot_product_attention(y, y, y), x).roll((-2, -2), (2, 3))


def dynamic_filters(x):
    kernel = torch.softmax(x.mean(1, keepdim=True).expand(-1, 9, -1, -1), 1)
    return (F.unfold(x, 3, padding=1).view(*x.shape[:2], 9, *x.shape[2:]) * kernel[:, None]).sum(2)


def codes_of_positions(x):
    rows = torch.ones_like(x[:1, :1]).cumsum(2)
    columns = torch.arange(x.shape[3], dtype=x.dtype, device=x.device)
    return x + rows / rows.amax((2, 3), keepdim=True) + columns / columns.max()


def padded_to_windows(x):
    y = F.pad(x, (0, -x.shape[3] % 12, 0, -x.shape[2] % 12))
    y = y + joined(windows(y, 12).softmax(1), y, 12)
    return y[..., : x.shape[2], : x.shape[3]]


def guarded(x):
    return x.nan_to_num() if torch.isnan(x).any() else x


WITHIN_REACH = {
    "shifted windows": shifted_attention,
    "padded windows": padded_to_windows,
    "window norm": lambda x: joined(F.layer_norm(windows(x), (16, 5)), x),
    "dynamic filters": dynamic_filters,
    "codes of positions": codes_of_positions,
    "a guard against NaN": guarded,
    "channels": lambda x: x.softmax(1) + x.mean(1, True) + F.normalize(x) + x.sort(1).values,
    "layer norm over channels": lambda x: F.layer_norm(x.permute(0, 2, 3, 1), (5,)).movedim(3, 1),
    "tokens": Flat(nn.Sequential(nn.LayerNorm(5), nn.Linear(5, 8), nn.Linear(8, 5)), tokens=True),
    "small pools": lambda x: F.interpolate(F.max_pool2d(x, 3, 2, 1), x.shape[2:]),
    "small pools of odd maps": lambda x: F.avg_pool2d(F.avg_pool2d(x, 3), 3, 2, 1),
    "resizing": lambda x: F.interpolate(
        F.interpolate(x, scale_factor=0.5, mode="area"), x.shape[2:], mode="bicubic"
    ),
    "resizing odd maps": lambda x: F.interpolate(
        F.interpolate(F.avg_pool2d(x, 3, 3), scale_factor=1.7), x.shape[2:]
    ),
    "shuffles": lambda x: F.pixel_shuffle(F.pixel_unshuffle(x, 2), 2).flip(2),
    "transposed": nn.Sequential(nn.Conv2d(5, 8, 2, 2), nn.ConvTranspose2d(8, 5, 2, 2)),
    "batch norm": nn.BatchNorm2d(5),
    "weight norm": nn.utils.parametrizations.weight_norm(nn.Conv2d(5, 5, 3, padding=1)),
    "crop": lambda x: x[..., :8, :8] + x[..., -8:, -8:],
    "splats": lambda x: x + torch.zeros_like(x).scatter_add(3, (x > 0).long(), x),
    "comparisons": lambda x: x if torch.allclose(x, x.relu()) or torch.equal(x, x) else -x,
}


@pytest.mark.parametrize("name", WITHIN_REACH)
def test_what_does_not_reach_over_the_map_is_not_reported(name):
    assert not plan(Behind(WITHIN_REACH[name]), Local(TRAIN)).operations


class Asks(nn.Module):
    """Asks its map where it is and of which type."""

    def forward(self, x):
        assert not x.is_cuda
        return x + torch.ones(x.shape[2:], dtype=x.dtype, device=x.device)


def test_a_plan_computes_nothing():
    net = Behind(nn.Sequential(Asks(), nn.InstanceNorm2d(5), nn.LayerNorm([5, TRAIN, TRAIN])))
    calibration = calibrate(net, ["part.1"], (TRAIN, TRAIN))
    assert calibration.shadow.mode is not None
    assert [call.name for call in calibration.calls if "norm" in call.name]


def test_what_breaks_at_another_size_is_told_from_what_it_follows():
    class Fixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.code = nn.Parameter(torch.zeros(1, 5, TRAIN, TRAIN))

        def forward(self, x):
            return (x + self.code).softmax(1)

    assert not plan(Behind(Fixed()), Local(TRAIN)).operations


def test_sites_in_packages_whose_name_begins_like_torch_are_found():
    def reach(x):
        return x + x.median()

    other = f"{torch.__path__[0]}vision/models.py"
    reach.__code__ = reach.__code__.replace(co_filename=other)
    (op,) = plan(Behind(reach), Local(TRAIN)).kept
    assert op.site.file == other


def test_extents_of_operations():
    aten, x = torch.ops.aten, torch.rand(2, 6, 8, 10)
    weight = torch.rand(6, 3, 3, 3)
    none = [None] * 2
    cases = [
        (aten.mean.dim, (x, [2, 3]), 80),
        (aten.sum.default, (x,), 960),
        (aten.mm.default, (x[0, 0], x[0, 0].T), 10),
        (aten.addmm.default, (x[0, 0, 0, :8], x[0, 0], x[0, 0].T), 10),
        (aten.bmm.default, (x[0], x[0].mT), 10),
        (aten._softmax.default, (x, 1, False), 6),
        (aten.native_layer_norm.default, (x, [8, 10], *none, 1e-5), 80),
        (aten.native_group_norm.default, (x, *none, 2, 6, 80, 3, 1e-5), 160),
        (aten.native_batch_norm.default, (x, *none, *none, True, 0.1, 1e-5), 160),
        (aten.max_pool2d_with_indices.default, (x, [2, 2]), 4),
        (aten._adaptive_avg_pool2d.default, (x, [3, 5]), 6),
        (aten._fft_r2c.default, (x, [2, 3], 0, True), 80),
        (aten.convolution.default, (x, weight, None, [1, 1], [0, 0], [1, 1], False, [0, 0], 2), 27),
        (aten.convolution.default, (x, weight, None, [1, 1], [0, 0], [1, 1], True, [0, 0], 1), 54),
        (aten.relu.default, (x,), None),
        (aten.cat.default, ([x, x], 2), None),
        (aten.view.default, (x, [12, 80]), None),
        (aten.index.Tensor, (x, [None, torch.tensor([0])]), None),
        (aten.upsample_nearest2d.default, (x, [4, 5]), 64),
        (aten.upsample_nearest2d.default, (x, [32, 40]), 61),
    ]
    for func, args, wanted in cases:
        assert extent(func, args, {}, func(*args)) == wanted, func
