"""What the global operations of a network aggregate, collected while it runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from fullres.errors import FullresError
from fullres.local import Local, plan
from fullres.local.plan import Operation
from fullres.ops.box import local_max, local_mean, local_mean_var
from fullres.ops.group import group_moments
from fullres.restore import Restorer, restore_tensor

Values = npt.NDArray[np.float64]
Key = tuple[str, str]
"""Operation and statistic."""
Inputs = Iterable[tuple[Tensor, Path]]
"""What a network takes, and the file that it is from."""


def covered_operations(
    module: nn.Module, settings: Local
) -> tuple[dict[str, Operation], dict[str, str]]:
    """The operations whose statistics are known, by name; the others, and why not."""
    covered: dict[str, Operation] = {}
    others: dict[str, str] = {}
    for op in plan(module, settings).operations:
        if op.form is None:
            if op.is_global:
                others[op.label] = op.reason or "stays global"
        elif op.site is not None:
            others[op.label] = "is a call of a function within a forward"
        elif op.kind not in _AGGREGATES:
            others[op.label] = "is of a kind of its own"
        else:
            covered[op.name] = op
    if not covered:
        found = "".join(f"; {label} {reason}" for label, reason in others.items())
        raise FullresError(
            f"{type(module).__name__} has no pooling and no norm over whole pictures, whose "
            f"statistics could be compared{found}"
        )
    return covered, others


def _of_average(_: nn.Module, x: Tensor, window: tuple[int, int]) -> dict[str, Tensor]:
    return {"mean": local_mean(x, window, replicate=False)}


def _of_maximum(_: nn.Module, x: Tensor, window: tuple[int, int]) -> dict[str, Tensor]:
    return {"maximum": local_max(x, window, replicate=False)}


def _of_channels(_: nn.Module, x: Tensor, window: tuple[int, int]) -> dict[str, Tensor]:
    mean, var = local_mean_var(x, window, replicate=False)
    return {"mean": mean, "standard deviation": var.sqrt()}


def _of_groups(norm: nn.Module, x: Tensor, window: tuple[int, int]) -> dict[str, Tensor]:
    assert isinstance(norm, nn.GroupNorm)
    mean_within, var_within = group_moments(x, norm.num_groups)
    mean, var_between = local_mean_var(mean_within, window, replicate=False)
    var = local_mean(var_within, window, replicate=False) + var_between
    return {"mean": mean, "standard deviation": var.sqrt()}


_AGGREGATES: dict[str, Callable[[nn.Module, Tensor, tuple[int, int]], dict[str, Tensor]]] = {
    "average pool": _of_average,
    "max pool": _of_maximum,
    "instance norm": _of_channels,
    "group norm": _of_groups,
}
"""By kind: what it aggregates over each window that a map (B, C, H, W) contains."""


def collect(
    restorer: Restorer, operations: Mapping[str, Operation], inputs: Inputs, side: int | None
) -> dict[Key, Values]:
    """Values of each statistic, (number, channels), as the network runs on the inputs.

    Over the whole map, or with `side` over the operations' windows at side × side positions.
    """
    found: dict[Key, list[Tensor]] = {}
    with torch.inference_mode(), _watched(restorer.module, operations, side, found):
        for x, path in inputs:
            restore_tensor(x, restorer, path)
    return {key: torch.cat(parts).double().numpy() for key, parts in found.items()}


@contextmanager
def _watched(
    module: nn.Module,
    operations: Mapping[str, Operation],
    side: int | None,
    found: dict[Key, list[Tensor]],
) -> Iterator[None]:
    def watcher(op: Operation) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        calls = count()

        def watch(part: nn.Module, args: tuple[Any, ...]) -> None:
            x: Tensor = args[0].float() if args[0].element_size() < 4 else args[0]
            x = x if x.dim() == 4 else x[None]
            size = (x.shape[2], x.shape[3])
            window = size
            if side is not None:
                of_call = op.windows[next(calls) % len(op.windows)]
                window = (min(of_call[0], size[0]), min(of_call[1], size[1]))
            for statistic, values in _AGGREGATES[op.kind](part, x, window).items():
                some = values.flatten(2) if side is None else _at_positions(values, size, side)
                found.setdefault((op.name, statistic), []).append(
                    some.movedim(1, -1).flatten(0, 1).float().cpu()
                )

        return watch

    handles = [
        module.get_submodule(name).register_forward_pre_hook(watcher(op))
        for name, op in operations.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _at_positions(values: Tensor, size: tuple[int, int], side: int) -> Tensor:
    """Of the values of contained windows, those at side × side positions of the map.

    (B, C, h, w) to (B, C, side²); positions near the border have the nearest window.
    """
    for dim, length in zip((2, 3), size, strict=True):
        windows = values.shape[dim]
        before = (length - windows) // 2  # a window reaches (k - 1) // 2 up, k = length - h + 1
        at = ((torch.arange(side, device=values.device) + 0.5) * length / side).long() - before
        values = values.index_select(dim, at.clamp(0, windows - 1))
    return values.flatten(2)
