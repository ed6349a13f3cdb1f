"""What a function of one vector gives at every position of a map of vectors, computed in one go.

A map of vectors has shape (*shape, H, W), where the function takes (*shape). Most of what heads of
channel attention are made of carries over by shifting dimensions: no loop, no `vmap`, and nothing
that `torch.export` could not follow.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fullres.ops.arrays import derives

ELEMENTWISE = {
    "relu", "relu_", "relu6", "leaky_relu", "leaky_relu_", "elu", "gelu", "silu", "hardswish",
    "hardsigmoid", "hardtanh", "sigmoid", "sigmoid_", "tanh", "tanh_", "softplus", "exp", "exp_",
    "log", "sqrt", "rsqrt", "square", "abs", "neg", "__neg__", "reciprocal", "pow", "__pow__",
    "clamp", "clamp_", "clamp_min", "clamp_max", "dropout", "clone", "contiguous", "detach",
    "to", "type_as", "float", "double", "half", "bfloat16",
    "mul", "mul_", "__mul__", "__rmul__", "__imul__", "add", "add_", "__add__", "__radd__",
    "__iadd__", "sub", "sub_", "__sub__", "__rsub__", "__isub__", "div", "div_", "__truediv__",
    "__rtruediv__", "__itruediv__", "maximum", "minimum", "where", "lt", "gt", "le", "ge",
    "__lt__", "__gt__", "__le__", "__ge__",
}  # fmt: skip
_ALONG = {
    "softmax": 1, "log_softmax": 1, "sum": 1, "mean": 1, "amax": 1, "amin": 1, "std": 1, "var": 1,
    "chunk": 2, "split": 2, "unbind": 1, "select": 1, "narrow": 1, "index_select": 1, "flip": 1,
    "cat": 1, "stack": 1, "unsqueeze": 1,
}  # fmt: skip
"""Functions along dimensions, and the place of those among the arguments."""
_FIRST_UNLESS_TOLD = {"chunk", "split", "unbind", "cat", "stack"}
_ALL_UNLESS_TOLD = {"sum", "mean", "amax", "amin"}


def at_all_positions(
    func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], cls: Any
) -> Any:
    """Vectors (*shape, H, W), or several, that a call gives; NotImplemented if it is not known.

    Args:
        func: function of vectors.
        args: its arguments; maps of vectors are instances of `cls`, with an attribute `vectors`.
        kwargs: more of them.
        cls: class of the maps of vectors.
    """
    name = getattr(func, "__name__", "")
    if name in ELEMENTWISE:
        return _elementwise(func, args, kwargs, cls)
    if name in ("cat", "stack"):
        parts = args[0] if args else kwargs.get("tensors")
        if not isinstance(parts, list | tuple) or not all(isinstance(x, cls) for x in parts):
            return NotImplemented
        first, vectors = parts[0], [x.vectors for x in parts]
    else:
        if not args or not isinstance(args[0], cls) or _holds(cls, *args[1:], *kwargs.values()):
            return NotImplemented
        first, vectors = args[0], args[0].vectors
    if name in _ALONG:
        return _along(func, name, vectors, first.dim(), args[1:], kwargs)
    special = _SPECIAL.get(name)
    if special is None:
        return NotImplemented
    return special(vectors, first.dim(), *args[1:], **kwargs)


def _holds(cls: type, *values: Any) -> bool:
    return any(
        isinstance(v, cls) or (isinstance(v, list | tuple) and _holds(cls, *v)) for v in values
    )


def _elementwise(
    func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], cls: Any
) -> Any:
    given = [v for v in (*args, *kwargs.values()) if isinstance(v, Tensor)]
    try:  # of the vectors alone: whole maps among them are not for here
        grown = torch.broadcast_shapes(*(v.shape for v in given))  # type: ignore[no-untyped-call]
    except RuntimeError:
        return NotImplemented
    if len(grown) == 4 and min(grown[2:]) > 1:
        return NotImplemented

    def at_positions(value: Any) -> Any:
        if isinstance(value, cls):
            return value.vectors
        if isinstance(value, Tensor) and value.dim() > 0:
            return value[..., None, None]
        return value

    in_place = isinstance(given[0], cls) is False and _writes(func)
    if in_place:  # an ordinary tensor cannot take other values at each position
        return NotImplemented
    return func(*map(at_positions, args), **{k: at_positions(v) for k, v in kwargs.items()})


def _writes(func: Callable[..., Any]) -> bool:
    name = getattr(func, "__name__", "")
    return (name.endswith("_") and not name.endswith("__")) or name.startswith("__i")


def _dims(dim: Any, of: int) -> Any:
    return tuple(d % of for d in dim) if isinstance(dim, list | tuple) else dim % of


def _along(
    func: Callable[..., Any],
    name: str,
    vectors: Any,
    dims: int,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    at = _ALONG[name] - 1
    given = args[at] if len(args) > at else kwargs.get("dim")
    if given is None:
        if name in _FIRST_UNLESS_TOLD:
            given = 0
        elif name in _ALL_UNLESS_TOLD:
            given = tuple(range(dims))
        else:
            return NotImplemented
    along = _dims(given, dims + (name in ("unsqueeze", "stack")))
    rest = {key: value for key, value in kwargs.items() if key not in ("dim", "tensors")}
    if len(args) > at:
        return func(vectors, *args[:at], along, *args[at + 1 :], **rest)
    return func(vectors, *args, dim=along, **rest)


def _linear(vectors: Tensor, dims: int, weight: Tensor, bias: Tensor | None = None) -> Any:
    """A linear layer on (…, C) is a 1 × 1 convolution of (…, C, H, W)."""
    maps = dense_again(vectors.flatten(0, dims - 2) if dims > 2 else vectors)
    y = F.conv2d(maps, weight[:, :, None, None], bias)
    return y.reshape(*vectors.shape[: dims - 1], *y.shape[-3:])


def dense_again(x: Tensor) -> Tensor:
    """A single map (1, C, H, W) whose pixels are contiguous, so that torch sees that it is dense.

    A view may leave the first axis with a stride that means nothing and hides the memory format;
    convolutions would copy the map.
    """
    if x.dim() != 4 or len(x) != 1 or derives():
        return x
    _, c, h, w = x.shape
    if x.stride()[1:] != (1, w * c, c):
        return x
    return x.as_strided(x.shape, (c * h * w, 1, w * c, c))


def _conv1d(
    vectors: Tensor,
    dims: int,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Any:
    """A convolution of (B, C, L) at each position is one of (B, C, L, H·W) along L."""
    if dims != 3 or isinstance(padding, str):
        return NotImplemented

    def along(value: Any, other: int) -> tuple[int, int]:
        return (value if isinstance(value, int) else value[0], other)

    y = F.conv2d(
        vectors.flatten(-2),
        weight[..., None],
        bias,
        along(stride, 1),
        along(padding, 0),
        along(dilation, 1),
        groups,
    )
    return y.reshape(*y.shape[:-1], *vectors.shape[-2:])


def _view(vectors: Tensor, dims: int, *sizes: Any, **other: Any) -> Any:
    if other:
        return NotImplemented
    wanted = sizes[0] if len(sizes) == 1 and isinstance(sizes[0], list | tuple) else sizes
    if not all(isinstance(n, int | torch.SymInt) for n in wanted):
        return NotImplemented  # a view of another type
    return vectors.reshape(*wanted, *vectors.shape[-2:])


def _flatten(vectors: Tensor, dims: int, start_dim: int = 0, end_dim: int = -1) -> Any:
    return vectors.flatten(start_dim % dims, end_dim % dims) if dims else NotImplemented


def _unflatten(vectors: Tensor, dims: int, dim: int, sizes: Any) -> Any:
    return vectors.unflatten(dim % dims, sizes)  # type: ignore[no-untyped-call]


def _squeeze(vectors: Tensor, dims: int, dim: Any = None) -> Any:
    if dim is None:
        dim = tuple(d for d in range(dims) if vectors.shape[d] == 1)
    return vectors.squeeze(_dims(dim, dims))


def _transpose(vectors: Tensor, dims: int, dim0: int, dim1: int) -> Any:
    return vectors.transpose(dim0 % dims, dim1 % dims)


def _permute(vectors: Tensor, dims: int, *order: Any) -> Any:
    wanted = order[0] if len(order) == 1 and isinstance(order[0], list | tuple) else order
    return vectors.permute(*(d % dims for d in wanted), dims, dims + 1)


def _expand(vectors: Tensor, dims: int, *sizes: Any) -> Any:
    wanted = sizes[0] if len(sizes) == 1 and isinstance(sizes[0], list | tuple) else sizes
    return vectors.expand(*wanted, *vectors.shape[-2:])


def _item(vectors: Tensor, dims: int, index: Any) -> Any:
    parts = list(index) if isinstance(index, tuple) else [index]
    if not all(part is None or part is ... or isinstance(part, int | slice) for part in parts):
        return NotImplemented
    if ... in parts:
        at = parts.index(...)
        named = sum(part is not None for part in parts) - 1
        parts[at : at + 1] = [slice(None)] * (dims - named)
    return vectors[tuple(parts)]


def _prelu(vectors: Tensor, dims: int, weight: Tensor) -> Any:
    return F.prelu(vectors, weight) if dims > 1 else NotImplemented


_SPECIAL: dict[str, Callable[..., Any]] = {
    "linear": _linear,
    "conv1d": _conv1d,
    "view": _view,
    "reshape": _view,
    "flatten": _flatten,
    "unflatten": _unflatten,
    "squeeze": _squeeze,
    "transpose": _transpose,
    "swapaxes": _transpose,
    "permute": _permute,
    "expand": _expand,
    "__getitem__": _item,
    "prelu": _prelu,
}
"""(vectors, number of dimensions of one, the function's other arguments) to vectors."""
