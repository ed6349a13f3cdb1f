"""Whether the local form that a module brings itself is one: tried on numbers, at small size."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from fullres.local.calibrate import Arguments, first_words
from fullres.local.forms import Window
from fullres.shadow import copied

SMALL, LARGE = 2**17, 2**22
"""Elements of a map that it is tried on; at most, where the module takes no smaller ones."""
TOLERANCE = 1e-3
"""Of float32 results, relative to the largest magnitude in them."""


def options_of(module: nn.Module) -> Collection[str]:
    """Names of what a module's `to_local` takes, none if it has no such method."""
    own = getattr(module, "to_local", None)
    return inspect.signature(own).parameters if callable(own) else ()


def own_local(module: Any, window: Window, feature: Window, stride: Window | None) -> nn.Module:
    """What a module's `to_local` gives, told what it asks for by its parameters."""
    told = {"feature_size": feature, "stride": stride}
    taken = {name: value for name, value in told.items() if name in options_of(module)}
    local: nn.Module = module.to_local(window, **taken)
    return local


@torch.no_grad()
def disagreement(module: nn.Module, arguments: Arguments, feature: Window) -> str | None:
    """Why a module's own local form is not one, None if it agrees where its window covers the map.

    Both run once on random numbers, where the map is large on a part of its size.

    Args:
        module: has `to_local`.
        arguments: of a call; of tensors only the shapes count.
        feature: height and width of its map.
    """
    if any(p.is_meta for p in (*module.parameters(), *module.buffers())):
        return None  # which holds no numbers
    twin = copied(module).eval()
    if any(p.dtype in (torch.float16, torch.bfloat16) for p in twin.parameters()):
        twin = twin.float()
    pixels = max(feature[0] * feature[1], 1)
    largest = max((x.numel() for x in _tensors(arguments)), default=0)
    sizes = [feature] if largest <= LARGE else []
    size = feature
    while largest * size[0] * size[1] // pixels > SMALL and min(size) > 1:
        size = (size[0] // 2, size[1] // 2)
    failure: Exception | None = None
    for tried in dict.fromkeys([size, *sizes]):
        args, kwargs = _random(arguments, feature, tried, twin)
        try:
            wanted = _run(copy.deepcopy(twin), args, kwargs)
        except Exception as error:  # noqa: BLE001 - may be bound to its size
            failure = error
            continue
        try:
            got = _run(own_local(twin, tried, tried, None), args, kwargs)
        except Exception as error:  # noqa: BLE001 - the answer is: it does not run
            return f"its local form does not run ({first_words(error, 110)})"
        return _difference(got, wanted)
    return f"its local form could not be tried on numbers ({first_words(failure, 110)})"


def _tensors(value: Any) -> list[Tensor]:
    return [x for x in tree_leaves(value) if isinstance(x, Tensor)]


def _random(
    arguments: Arguments, feature: Window, size: Window, module: nn.Module
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of another size, in the type and on the device of the module."""
    like = next((p for p in module.parameters() if p.is_floating_point()), torch.empty(0))
    generator = torch.Generator().manual_seed(0)

    def drawn(x: Any) -> Any:
        if isinstance(x, nn.Module):  # a shadow's, without numbers
            return copy.deepcopy(x, {id(t): drawn(t) for t in (*x.parameters(), *x.buffers())})
        if not isinstance(x, Tensor):
            return x
        shape = tuple(x.shape)
        if shape[-2:] == feature:
            shape = (*shape[:-2], *size)
        if x.is_floating_point():
            return torch.randn(shape, generator=generator).to(like)
        return torch.zeros(shape, dtype=x.dtype, device=like.device)

    args, kwargs = tree_map(drawn, arguments)
    return args, kwargs


def _run(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    args, kwargs = tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, (args, kwargs))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return module(*args, **kwargs)


def _difference(got: Any, wanted: Any) -> str | None:
    ours, theirs = _tensors(got), _tensors(wanted)
    if [x.shape for x in ours] != [x.shape for x in theirs]:
        return "its local form gives another shape where the window covers the map"
    for x, y in zip(ours, theirs, strict=True):
        finite = y.isfinite()
        if not (y.is_floating_point() or y.is_complex()) or not finite.any():
            continue
        scale = max(y[finite].abs().max().item(), 1e-12)
        error = (x - y)[finite].abs().max().item() / scale
        if not error <= TOLERANCE:
            return (
                "its local form gives something else where the window covers the map, by "
                f"{error:.1e} of the largest value"
            )
    return None
