"""Rules: which modules are global operations, and the local form of each.

A rule is a function that looks at a module and returns None (not mine), a class to mix into it
(its local form) or `Stays` (it stays as it is, and why). Rules go by what a module computes: a
subclass with a forward of its own is not the module that a rule knows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from fullres.local.forms import LocalModule, Window, covers
from fullres.local.pooled import pooled
from fullres.ops.box import local_max, local_mean, local_mean_var, local_normalise
from fullres.ops.group import group_moments, group_normalised


class LocalAvgPool2d(LocalModule, nn.AdaptiveAvgPool2d):
    """Average pooling to 1 × 1, made local: (B, C, H, W) to a map of means of the same size.

    Where the window covers the map, the result is the global mean, (B, C, 1, 1).
    """

    def forward(self, x: Tensor) -> Tensor:
        return _pooled_locally(self, super().forward, local_mean, x)


class LocalMaxPool2d(LocalModule, nn.AdaptiveMaxPool2d):
    """Max pooling to 1 × 1, made local: (B, C, H, W) to a map of maxima of the same size.

    Where the window covers the map, the result is the global maximum, (B, C, 1, 1).
    """

    def forward(self, x: Tensor) -> Tensor:
        return _pooled_locally(self, super().forward, local_max, x)


def _pooled_locally(
    module: LocalModule,
    globally: Callable[[Tensor], Tensor],
    locally: Callable[..., Tensor],
    x: Tensor,
) -> Tensor:
    window = module.local_window()
    if covers(window, x):
        return globally(x)
    if x.dim() == 3:
        return locally(x[None], window, replicate=True)[0]
    gives = module.local_gives
    if gives == "either" and cast(nn.Module, module)._forward_hooks:
        gives = "map"  # which hooks understand
    return pooled(x, window, locally, gives, defers=module.local_defers)


class LocalInstanceNorm2d(LocalModule, nn.InstanceNorm2d):
    """Instance normalisation with the statistics of the window around each position."""

    def forward(self, x: Tensor) -> Tensor:
        window = self.local_window()
        if covers(window, x):
            return super().forward(x)
        batch = x if x.dim() == 4 else x[None]
        y = local_instance_norm(batch, window, self.weight, self.bias, self.eps)
        return y if x.dim() == 4 else y[0]


class LocalGroupNorm(LocalModule, nn.GroupNorm):
    """Group normalisation with the statistics of the window around each position."""

    def forward(self, x: Tensor) -> Tensor:
        window = self.local_window()
        if covers(window, x):
            return super().forward(x)
        return local_group_norm(x, window, self.num_groups, self.weight, self.bias, self.eps)


def local_instance_norm(
    x: Tensor, window: Window, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    """Instance normalisation of maps (B, C, H, W) with the statistics of a window."""
    return local_normalise(x, window, weight, bias, eps)


def local_group_norm(
    x: Tensor,
    window: Window,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> Tensor:
    """Group normalisation of maps (B, C, H, W) with the statistics of a window."""
    wide = _at_least_float32(x)
    mean_within, var_within = group_moments(wide, num_groups)
    # one map a group is averaged: the variance within the window is the mean of the variances over
    # channels and the variance of the means
    mean, var_between = local_mean_var(mean_within, window)
    scale = torch.rsqrt(local_mean(var_within, window) + var_between + eps)
    return group_normalised(wide, mean, scale, weight, bias).to(x.dtype)


def _at_least_float32(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


@dataclass(frozen=True)
class Stays:
    """Why a module that a rule knows stays as it is."""

    reason: str
    is_global: bool = True
    """Whether its result depends on the whole picture."""


@dataclass(frozen=True)
class Rule:
    """One kind of global operation."""

    kind: str
    """What a report calls it."""
    look: Callable[[nn.Module], type | Stays | None]
    """Local form of the module, or why it stays, or None where the rule does not apply."""
    dims: tuple[int, ...] = (4,)
    """Numbers of dimensions that its local form takes."""


def _computes_as(module: nn.Module, cls: type[nn.Module]) -> bool:
    return isinstance(module, cls) and type(module).forward is cls.forward


def _average_pool(module: nn.Module) -> type | Stays | None:
    if not _computes_as(module, nn.AdaptiveAvgPool2d):
        return None
    return _unless_to_one(module.output_size, LocalAvgPool2d)


def _unless_to_one(size: Any, form: type) -> type | Stays | None:
    """The form of a pooling to 1 × 1; why it stays global if it pools to another size."""
    height, width = size if isinstance(size, tuple) else (size, size)
    if (height, width) == (1, 1):
        return form
    if height is None and width is None:
        return None
    shape = " × ".join("the input's" if n is None else str(n) for n in (height, width))
    return Stays(f"pools to {shape}, not to 1 × 1")


def _max_pool(module: nn.Module) -> type | Stays | None:
    if not _computes_as(module, nn.AdaptiveMaxPool2d):
        return None
    if module.return_indices:
        return Stays("also gives the position of the maximum, which has no local form")
    return _unless_to_one(module.output_size, LocalMaxPool2d)


def _instance_norm(module: nn.Module) -> type | Stays | None:
    if not _computes_as(module, nn.InstanceNorm2d):
        return None
    if module.track_running_stats:
        return Stays(
            "normalises with running statistics, which are the same for every picture size",
            is_global=False,
        )
    return LocalInstanceNorm2d


def _group_norm(module: nn.Module) -> type | Stays | None:
    return LocalGroupNorm if _computes_as(module, nn.GroupNorm) else None


def _batch_norm(module: nn.Module) -> type | Stays | None:
    if _computes_as(module, nn.BatchNorm2d) and not module.track_running_stats:
        return Stays("normalises over the batch as well, which has no window")
    return None


RULES = (
    Rule("average pool", _average_pool, dims=(3, 4)),
    Rule("max pool", _max_pool, dims=(3, 4)),
    Rule("instance norm", _instance_norm, dims=(3, 4)),
    Rule("group norm", _group_norm),
    Rule("batch norm", _batch_norm),
)
"""All rules; the first that applies to a module is its rule."""

SOUGHT = (
    "pooling to 1 × 1, instance norm, group norm, reductions over both spatial axes, modules with "
    "a `to_local` method"
)
"""What the rules can make local, in words."""
