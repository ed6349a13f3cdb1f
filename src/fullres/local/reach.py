"""How much of a tensor one value of a result takes in, by the aten operation that computes it.

Functions of torch, its modules and scripted functions all come down to aten operations. One that
reduces or contracts over more when the picture is larger acts over the whole of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_MOVES = {
    "cat", "stack", "gather", "take", "embedding", "index", "_unsafe_index", "index_put",
    "_unsafe_index_put", "index_select", "index_copy", "index_fill", "scatter", "select_scatter",
    "slice_scatter", "masked_select", "masked_scatter", "nonzero", "roll", "flip",
    "repeat_interleave", "unsafe_split", "unsafe_split_with_sizes", "squeeze", "unsqueeze",
    "constant_pad_nd", "grid_sampler_2d", "grid_sampler_3d", "renorm",
}  # fmt: skip
"""Operations that move values, or sample them, and take none together but neighbours."""
_CHECKS = {"any", "all", "equal", "allclose", "_local_scalar_dense"}
"""Operations that answer yes or no, by which networks guard against NaN and the like."""

Extent = Callable[[Mapping[str, Any], list[Tensor]], int]


def extent(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any) -> int | None:
    """Number of elements that an aten operation takes together for one element of its result.

    None where it takes none together: it computes element by element, or moves them.
    """
    name = func._schema.name.partition("::")[2].rstrip("_")
    if func.is_view or name in _MOVES | _CHECKS:
        return None
    given = _by_name(func, args, kwargs)
    tensors = [x for x in tree_leaves((args, dict(kwargs))) if isinstance(x, Tensor)]
    if name.startswith("upsample") and "_aa" not in name:
        return _resampled(tensors[0], result)
    if name in _PRODUCTS:
        return _PRODUCTS[name](given, tensors)
    for part, measure in _BY_PART.items():
        if part in name:
            return measure(given, tensors)
    for argument, measure in _BY_ARGUMENT.items():
        if argument in given:
            return measure(given, tensors)
    largest = max((x.numel() for x in tree_leaves(result) if isinstance(x, Tensor)), default=0)
    shrinks = max(x.numel() for x in tensors) // max(largest, 1)
    return shrinks if shrinks > 1 else None


def _resampled(x: Tensor, result: Tensor) -> int:
    """How far apart resampling takes its samples: in factors of four of the area, from 64 on.

    By a factor that is the same at any size, but for rounding, against which the steps between the
    numbers lie where no usual factor does. Only a result of fixed size has its samples further
    apart when the picture is larger.
    """
    return 64 + math.floor(math.log2(max(x.numel(), 1) / max(result.numel(), 1)) / 2 - 0.175)


def _by_name(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    named = {a.name: a.default_value for a in func._schema.arguments}
    return named | dict(zip(named, args, strict=False)) | dict(kwargs)


def _last(at: int) -> Extent:
    return lambda _, tensors: tensors[at].shape[-1]


_PRODUCTS: dict[str, Extent] = {
    "mm": _last(0),
    "bmm": _last(0),
    "mv": _last(0),
    "dot": _last(0),
    "vdot": _last(0),
    "linear": _last(0),
    "addmm": _last(1),
    "_addmm_activation": _last(1),
    "baddbmm": _last(1),
    "addmv": _last(1),
    "addbmm": lambda _, tensors: tensors[1].shape[0] * tensors[1].shape[-1],
    "_cdist_forward": _last(0),
}
"""Products, which contract one axis, by name."""


def _convolution(given: Mapping[str, Any], tensors: list[Tensor]) -> int:
    weight: Tensor = given["weight"]
    if given.get("transposed"):
        return weight.shape[0] // int(given["groups"]) * math.prod(weight.shape[2:])
    return math.prod(weight.shape[1:])


def _batch_norm(given: Mapping[str, Any], tensors: list[Tensor]) -> int:
    if not given.get("training"):
        return 1
    return tensors[0].numel() // max(tensors[0].shape[1], 1)


def _group_norm(given: Mapping[str, Any], tensors: list[Tensor]) -> int:
    return int(given["HxW"]) * int(given["C"]) // int(given["group"])


def _gathered(given: Mapping[str, Any], tensors: list[Tensor]) -> int:
    return tensors[-1].numel() // max(tensors[0].numel(), 1)


_BY_PART: dict[str, Extent] = {
    "convolution": _convolution,
    "scaled_dot_product": lambda _, tensors: tensors[1].shape[-2],
    "multi_head_attention": lambda _, tensors: tensors[1].shape[1],
    "transformer_encoder": lambda _, tensors: tensors[0].shape[1],
    "batch_norm": _batch_norm,
    "native_group_norm": _group_norm,
    "index_add": _gathered,
    "index_reduce": _gathered,
    "scatter_add": _gathered,
    "scatter_reduce": _gathered,
    "unique": lambda _, tensors: tensors[0].numel(),
}
"""Operations of many names, by what these have in common."""


def _along(given: Mapping[str, Any], tensors: list[Tensor]) -> int:
    shape, dim = tensors[0].shape, given["dim"]
    if not shape:
        return 1
    dims = [dim] if isinstance(dim, int) else dim or range(len(shape))
    return math.prod(shape[d] for d in dims)


def _kernel(given: Mapping[str, Any], tensors: list[Tensor]) -> int:
    kernel = given["kernel_size"]
    return math.prod(kernel if len(kernel) > 1 else (*kernel,) * (tensors[0].dim() - 2))


def _cells(given: Mapping[str, Any], tensors: list[Tensor]) -> int:
    wanted = given["output_size"]
    sizes = tensors[0].shape[-len(wanted) :]
    return math.prod(-(-n // max(m, 1)) for n, m in zip(sizes, wanted, strict=True))


_BY_ARGUMENT: dict[str, Extent] = {
    "kernel_size": _kernel,
    "output_size": _cells,
    "normalized_shape": lambda given, _: math.prod(given["normalized_shape"]),
    "dim": _along,
}
"""Reductions, by the argument that says over what."""


class Reach(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Tells how much each operation on what comes from the picture takes together.

    What is made of sizes alone, position codes or masks, does not come from the picture.
    """

    def __init__(
        self, inputs: Any, seen: Callable[[str, int], None], used: Callable[[list[Tensor]], None]
    ) -> None:
        """`seen` is told of name and extent, `used` of the tensors of every operation."""
        super().__init__()  # type: ignore[no-untyped-call]
        self._seen, self._used = seen, used
        self._from_picture = {_storage(x) for x in tree_leaves(inputs) if isinstance(x, Tensor)}

    def __torch_dispatch__(
        self, func: Any, types: Iterable[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if not isinstance(func, torch._ops.OpOverload) or func.namespace == "prim":
            return func(*args, **kwargs)  # what only asks about a tensor, its device for instance
        if func.has_kernel_for_dispatch_key(torch._C.DispatchKey.CompositeImplicitAutograd):
            with self:  # not yet taken apart: in inference mode
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        result = func(*args, **kwargs)
        if tensors:
            self._used(tensors)
        if any(_storage(x) in self._from_picture for x in tensors) and not _takes_sizes_only(func):
            size = extent(func, args, kwargs, result)
            if size is not None:
                self._seen(func._schema.name.partition("::")[2], size)
            change = self._from_picture.add
        else:  # a new tensor may have the storage of one that is gone
            change = self._from_picture.discard
        for x in tree_leaves(result):
            if isinstance(x, Tensor):
                change(_storage(x))
        return result


def _takes_sizes_only(func: Any) -> bool:
    """Whether it makes a new tensor of the size of another, such as `zeros_like`."""
    name: str = func._schema.name.partition("::")[2]
    return name.endswith("_like") or name.startswith("new_")


def _storage(x: Tensor) -> int:
    """What tells the memory of a tensor, which its views share, from that of others."""
    try:
        return int(x.untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError):  # sparse tensors have none
        return 0
