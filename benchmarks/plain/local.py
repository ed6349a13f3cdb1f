"""Local forms as the paper makes them (TLC: Chu et al., ECCV 2022, sections 4.1 and 4.2)."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fullres.local import Local, plan
from fullres.networks.restormer import TransposedAttention
from fullres.networks.spdnet import SqueezeExcitation
from fullres.networks.spec import Network
from fullres.ops.windows import window_starts
from plain.restormer import attended
from plain.spdnet import gated

Window = tuple[int, int]


class NoLocalForm(LookupError):  # noqa: N818 - a finding more than a fault
    """The paper makes no such operation local."""


def local_forms(
    network: Network, module: nn.Module, local: Local
) -> Iterator[tuple[nn.Module, Callable, Window]]:
    """Parts of `module`, the network's plain form, that become local: how, and their windows.

    Raises:
        NoLocalForm: the paper has none of an operation.
    """
    for operation in plan(network.module, local).converted:
        part = module.get_submodule(operation.name)
        forms = [form for kind, form in FORMS.items() if isinstance(part, kind)]
        if not forms or len(operation.windows) != 1:
            raise NoLocalForm(f"{operation.label} has no local form in the paper")
        yield part, forms[0], operation.windows[0]


def window_means(x: Tensor, window: Window) -> Tensor:
    """Means over the windows that the map contains, by differences of a summed-area table."""
    kh, kw = (min(k, side) for k, side in zip(window, x.shape[-2:], strict=True))
    table = F.pad(x.cumsum(3).cumsum(2), (1, 0, 1, 0))
    sums = table[..., kh:, kw:] - table[..., :-kh, kw:] - table[..., kh:, :-kw]
    return (sums + table[..., :-kh, :-kw]) / (kh * kw)


def replicated(x: Tensor, size: torch.Size) -> Tensor:
    """Edges repeated up to the height and width of `size`."""
    rows, columns = size[-2] - x.shape[-2], size[-1] - x.shape[-1]
    before = columns // 2, rows // 2
    pad = (before[0], columns - before[0], before[1], rows - before[1])
    return F.pad(x, pad, mode="replicate")


def mean_map(x: Tensor, window: Window) -> Tensor:
    return replicated(window_means(x, window), x.shape)


def average_pool(self: nn.AdaptiveAvgPool2d, x: Tensor) -> Tensor:
    return mean_map(x, self.plain_window)


def max_pool(self: nn.AdaptiveMaxPool2d, x: Tensor) -> Tensor:
    kh, kw = (min(k, side) for k, side in zip(self.plain_window, x.shape[-2:], strict=True))
    y = F.max_pool2d(F.max_pool2d(x, (1, kw), stride=1), (kh, 1), stride=1)
    return replicated(y, x.shape)


def instance_norm(self: nn.InstanceNorm2d, x: Tensor) -> Tensor:
    mean = mean_map(x, self.plain_window)
    var = mean_map(x * x, self.plain_window) - mean * mean
    return scaled(x, mean, var, self)


def group_norm(self: nn.GroupNorm, x: Tensor) -> Tensor:
    groups = self.num_groups
    grouped = x.unflatten(1, (groups, -1))
    mean = mean_map(grouped.mean(2), self.plain_window)
    var = mean_map((grouped * grouped).mean(2), self.plain_window) - mean * mean
    each = x.shape[1] // groups
    return scaled(x, mean.repeat_interleave(each, 1), var.repeat_interleave(each, 1), self)


def scaled(x: Tensor, mean: Tensor, var: Tensor, norm: nn.Module) -> Tensor:
    y = (x - mean) / torch.sqrt(var + norm.eps)
    if norm.weight is None:
        return y
    return y * norm.weight.view(1, -1, 1, 1) + norm.bias.view(1, -1, 1, 1)


def transposed_attention(self: TransposedAttention, x: Tensor) -> Tensor:
    """Attention in each of the overlapping windows, put back and averaged where they overlap."""
    q, k, v = self.qkv_dwconv(self.qkv(x)).chunk(3, dim=1)
    height, width = x.shape[-2:]
    kh, kw = (min(k, side) for k, side in zip(self.plain_window, (height, width), strict=True))
    total, count = torch.zeros_like(v), v.new_zeros(1, 1, height, width)
    for top in window_starts(height, kh):
        for left in window_starts(width, kw):
            here = (..., slice(top, top + kh), slice(left, left + kw))
            total[here] += attended(q[here], k[here], v[here], self.temperature)
            count[here] += 1
    return self.project_out(total / count)


def squeeze_excitation(self: SqueezeExcitation, x: Tensor) -> Tensor:
    return gated(self, x, mean_map(x, self.plain_window))


FORMS: dict[type[nn.Module], Callable] = {
    nn.AdaptiveAvgPool2d: average_pool,
    nn.AdaptiveMaxPool2d: max_pool,
    nn.InstanceNorm2d: instance_norm,
    nn.GroupNorm: group_norm,
    TransposedAttention: transposed_attention,
    SqueezeExcitation: squeeze_excitation,
}
