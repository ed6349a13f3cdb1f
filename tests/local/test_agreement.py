"""A module's own local form is tried on numbers before it is taken."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from fullres.local import Local, NothingToConvert, agreement, convert, plan
from fullres.ops.box import local_mean

TRAIN = 16


class Centred(nn.Module):
    """Subtracts the mean over the map; `wrong` is what its local form does beside."""

    def __init__(self, wrong=None):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3, 1, 1))
        self.wrong = wrong

    def mean(self, x):
        return x.mean((2, 3), keepdim=True)

    def forward(self, x, gain=1.0):
        return gain * (x - self.scale * self.mean(x))

    def to_local(self, window):
        if self.wrong == "raises":
            raise KeyError("no such window")
        local = copy.copy(self)
        local.__class__, local.window = CentredLocally, window
        return local


class CentredLocally(Centred):
    to_local = None

    def mean(self, x):
        return local_mean(x, self.window)

    def forward(self, x, gain=1.0):
        y = super().forward(x, gain)
        wrong = {
            "factor": lambda: 7 * y,
            "shape": lambda: y[..., :1],
            "NaN": lambda: y / 0,
            "forward raises": lambda: y.view(3),
        }
        return wrong[self.wrong]() if self.wrong in wrong else y


@pytest.mark.parametrize("root", [False, True], ids=["inside", "root"])
@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        ("factor", "something else .* by 6.0e"),
        ("shape", "another shape"),
        ("NaN", "something else"),
        ("forward raises", "does not run .*RuntimeError"),
        ("raises", "to_local. fails .*KeyError: 'no such window'"),
    ],
)
def test_a_wrong_form_is_kept_global_with_the_reason(wrong, reason, root):
    net = Centred(wrong) if root else nn.Sequential(nn.Conv2d(3, 3, 1), Centred(wrong))
    with pytest.raises(NothingToConvert, match=reason) as nothing:
        convert(net, Local(TRAIN))
    assert len(nothing.value.plan.still_global) == 1


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_a_right_form_is_taken(dtype):
    net = nn.Sequential(nn.Conv2d(3, 3, 1), Centred()).to(dtype)
    state = {key: value.clone() for key, value in net.state_dict().items()}
    with convert(net, Local(TRAIN)) as conversion:
        assert not conversion.kept
        assert isinstance(net[1], CentredLocally)
    assert all(torch.equal(state[key], value) for key, value in net.state_dict().items())


def test_other_arguments_are_those_of_the_call():
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Centred()

        def forward(self, x):
            return self.inner(x, gain=torch.sigmoid(x))

    assert not plan(Outer(), Local(TRAIN)).kept


def test_of_other_results_than_numbers_the_shapes_count():
    class Many(Centred):
        def forward(self, x, gain=1.0):
            y = super().forward(x, gain)
            return y, y > 0, torch.fft.rfft2(x), None

        def to_local(self, window):
            local = super().to_local(window)
            local.__class__ = type("ManyLocally", (Many,), {"to_local": None})
            return local

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Many()

        def forward(self, x):
            return self.inner(x)[0]

    assert not plan(Outer(), Local(TRAIN)).kept


def test_a_root_that_changes_shape_beyond_its_window_is_kept_global():
    class Shrinks(CentredLocally):
        def forward(self, x, gain=1.0):
            return super().forward(x, gain)[..., : self.window[0], : self.window[1]]

    class Root(Centred):
        def to_local(self, window):
            local = super().to_local(window)
            local.__class__ = Shrinks
            return local

    (op,) = plan(Root(), Local(TRAIN)).still_global
    assert op.form is None


def test_large_maps_are_tried_in_part_and_alike_modules_once(monkeypatch):
    sizes = []

    class Noted(Centred):
        def mean(self, x):
            if type(x) is torch.Tensor:
                sizes.append(tuple(x.shape))
            return super().mean(x)

    net = nn.Sequential(*(Noted() for _ in range(5)))
    assert len(plan(net, Local(1024)).converted) == 5
    assert len(sizes) == 1
    assert sizes[0][2] * sizes[0][3] * 3 <= agreement.SMALL


def test_a_module_bound_to_its_size_is_tried_there_or_says_why_not(monkeypatch):
    class Bound(Centred):
        def forward(self, x, gain=1.0):
            if x.shape[-1] % 300:
                raise ValueError("bound to its size")
            return super().forward(x, gain)

    assert not plan(nn.Sequential(Bound()), Local(300)).kept
    monkeypatch.setattr(agreement, "LARGE", 3 * 299**2)
    (op,) = plan(nn.Sequential(Bound()), Local(300)).kept
    assert "could not be tried on numbers (ValueError: bound to its size)" in op.reason
