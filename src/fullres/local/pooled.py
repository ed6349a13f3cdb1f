"""Pooled values, one a position.

A network that pools a map to a vector goes on with code for vectors: `view`, `flatten`, linear
layers, `chunk`, softmax over channels, and back to (B, C, 1, 1). When the pooling becomes local
there is a vector at every position, and the same code has to run on each. `Pooled` is a tensor
that looks like the one vector the code expects and holds a map of them; what is called on it is
mapped over the positions. Where it meets a map of its own size again, by broadcasting, the result
is an ordinary map.

The vectors held are those of the windows that the map contains: fewer than positions, which they
stand for by edge replication (`Frame`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from fullres.errors import ConversionError
from fullres.local.deferred import Head, Mean, layer_of
from fullres.local.forms import Gives, Window
from fullres.local.positions import ELEMENTWISE, at_all_positions, dense_again
from fullres.ops.arrays import jit_traced, recorded, share_memory
from fullres.ops.box import local_mean
from fullres.ops.frames import Frame

_PROPERTIES = ("shape", "dtype", "device", "ndim", "layout", "requires_grad", "is_cuda")
_ABOUT = {
    *(vars(torch._C.TensorBase)[name].__get__ for name in _PROPERTIES),
    Tensor.size,
    Tensor.dim,
    Tensor.numel,
    Tensor.nelement,
    Tensor.is_floating_point,
    Tensor.is_complex,
    torch.is_floating_point,
}
"""What asks about the vector, not for its values."""


# Functions that compute each position by itself on a map too, as on pooled values.
_POSITIONWISE = {
    "conv2d 1x1", "batch_norm", "prelu", "relu", "relu_", "relu6", "leaky_relu", "leaky_relu_",
    "elu", "gelu", "silu", "hardswish", "hardsigmoid", "hardtanh", "sigmoid", "sigmoid_", "tanh",
    "softplus", "exp", "dropout", "clone", "contiguous", "expand_as", "expand",
    "mul", "mul_", "__mul__", "__rmul__", "__imul__", "add", "add_", "__add__", "__radd__",
    "__iadd__", "sub", "sub_", "__sub__", "__rsub__", "__isub__", "div", "div_", "__truediv__",
    "__rtruediv__", "__itruediv__", "addcmul",
}  # fmt: skip

_calls: ContextVar[list[str] | None] = ContextVar("calls on pooled values", default=None)


@contextmanager
def calls_on_pooled() -> Iterator[Callable[[], bool]]:
    """Watch what is called on pooled values meanwhile.

    Yields a function that says whether an ordinary map in their place would have given the same,
    which is faster and all that most channel attention needs.
    """
    calls: list[str] = []
    token = _calls.set(calls)
    try:
        yield lambda: _POSITIONWISE.issuperset(calls)
    finally:
        _calls.reset(token)


def _name(func: Callable[..., Any], args: tuple[Any, ...]) -> str:
    name: str = getattr(func, "__name__", "")
    if name == "conv2d" and tuple(args[1].shape[2:]) == (1, 1):
        return "conv2d 1x1"
    return name


class Pooled(Tensor):
    """A tensor of the shape that pooling gave, with other values at each position of a map.

    `vectors` is (*shape, h, w), those of the contained windows.
    """

    frame: Frame
    """What they stand for."""
    head: Head | None
    """What gives the vectors, while nobody has asked for their values."""
    _vectors: Tensor | None

    @staticmethod
    def __new__(cls: type[Pooled], vectors: Tensor, frame: Frame | None = None) -> Pooled:
        pooled = cls._like(vectors, vectors.shape[:-2])
        height, width = vectors.shape[-2:]
        pooled._vectors, pooled.head = vectors, None
        pooled.frame = frame or Frame.whole((height, width))
        return pooled

    @classmethod
    def of_mean(cls, x: Tensor, window: Window) -> Pooled:
        """Means (B, C, 1, 1) of a map, computed once somebody asks for them."""
        frame = Frame.of((x.shape[2], x.shape[3]), window)
        return cls._put_off(Head(Mean(x, window)), frame, x, (*x.shape[:2], 1, 1))

    @classmethod
    def _put_off(cls, head: Head, frame: Frame, like: Tensor, shape: tuple[int, ...]) -> Pooled:
        pooled = cls._like(like, shape)
        pooled._vectors, pooled.head, pooled.frame = None, head, frame
        return pooled

    @classmethod
    def _like(cls, x: Tensor, shape: tuple[int, ...]) -> Pooled:
        pooled: Pooled = Tensor._make_wrapper_subclass(cls, shape, dtype=x.dtype, device=x.device)
        return pooled

    @property
    def vectors(self) -> Tensor:
        if self._vectors is None:
            assert self.head is not None
            values = self.head.values()
            self.vectors = values.reshape(*self.shape, *values.shape[2:])
        assert self._vectors is not None
        return self._vectors

    @vectors.setter
    def vectors(self, vectors: Tensor) -> None:
        self._vectors, self.head = vectors, None

    def put_off(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Pooled | None:
        """What a call on these values gives, if it is a layer that may wait or only reshapes."""
        vector = self.dim() == 2 or self.is_one_value()
        if not vector or recorded():
            return None
        if self.head is not None and getattr(func, "__name__", "") in _RESHAPES:
            shape = func(torch.empty(self.shape), *args[1:], **kwargs).shape
            flat = tuple(self.shape[:2])
            if tuple(shape) not in (flat, (*flat, 1, 1)):
                return None
            return self._put_off(self.head, self.frame, self, shape)
        if func in _SUMS and len(args) == 2 and not kwargs:
            head = self._plus(args[1])
            return None if head is None else self._put_off(head, self.frame, self, self.shape)
        layer = layer_of(func, args, kwargs)
        if layer is None or not layer.takes(self):
            return None
        head = (self.head or Head(self.within())).then(layer)
        if _in_place(func, kwargs):
            self._vectors, self.head = None, head
            return self
        channels = self.shape[1] if layer.weight is None else len(layer.weight)
        shape = (self.shape[0], channels, *self.shape[2:])
        return self._put_off(head, self.frame, self, shape)

    def _plus(self, other: Any) -> Head | None:
        """What gives the sum with other values, where nobody has asked for either."""
        if not isinstance(other, Pooled) or self.head is None or other.head is None:
            return None
        alike = self.shape == other.shape and self.frame == other.frame
        return self.head.plus(other.head) if alike and self.dtype == other.dtype else None

    def times(self, x: Tensor, plus: Tensor | None, *, in_place: bool) -> Tensor:
        """Product of a map (B, C, H, W) and the values of (B, C, 1, 1), `plus` added to it."""
        if self.head is None:
            return self.frame.scaled(x, self.within(), plus=plus, in_place=in_place)
        return self.head.times(x, self.frame, plus, in_place=in_place)

    def is_one_value(self) -> bool:
        """Whether it looks like one value a channel, (B, C, 1, 1)."""
        return self.dim() == 4 and self.shape[2:] == (1, 1)

    @property
    def positions(self) -> tuple[int, int]:
        """Height and width of the map."""
        return self.frame.size

    def within(self) -> Tensor:
        """The values of (B, C, 1, 1) or (B, C) as a map of the contained windows, (B, C, h, w)."""
        vectors = self.vectors
        return dense_again(vectors[:, :, 0, 0] if self.dim() == 4 else vectors)

    def as_map(self) -> Tensor:
        """The values of (B, C, 1, 1) as a map (B, C, H, W)."""
        return self.frame.extended(self.within())

    def everywhere(self) -> Pooled:
        """The same with a vector at each position."""
        *shape, height, width = self.vectors.shape
        flat = self.frame.extended(self.vectors.reshape(1, -1, height, width))
        return Pooled(flat.reshape(*shape, *self.positions))

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        height, width = self.positions
        return f"Pooled({tuple(self.vectors.shape[:-2])} at {height} × {width} positions)"

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func in _ABOUT:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        calls = _calls.get()
        if calls is not None:
            calls.append(_name(func, args))
        with torch._C.DisableTorchFunctionSubclass():
            result: Any = _product(func, args, kwargs)
            if result is None and args and isinstance(args[0], Pooled):
                result = args[0].put_off(func, args, kwargs)
        if result is None:
            result = _landed(func, args, kwargs)
        return _at_each_position(func, args, kwargs) if result is None else result

    @classmethod
    def __torch_dispatch__(cls, func: Any, *_: Any) -> Any:
        raise TypeError(f"{func} cannot be mapped over the positions of pooled values")


def _product(
    func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Tensor | None:
    """What a map times pooled values gives, with a map added or not; None of any other call."""
    plus: Any = None
    if func in _PRODUCTS and len(args) == 2 and not kwargs:
        in_place = func in _PRODUCTS_IN_PLACE
        x, values = reversed(args) if isinstance(args[0], Pooled) and not in_place else args
    elif func is torch.addcmul and len(args) == 3 and kwargs.keys() <= {"out"}:
        plus, x, values = args
        in_place = kwargs.get("out") is x
        if not in_place and kwargs.get("out") is not None:
            return None
    else:
        return None
    if not isinstance(values, Pooled) or not values.is_one_value():
        return None
    maps = (x,) if plus is None else (x, plus)
    meet = all(_is_map(m) and tuple(m.shape[2:]) == values.positions for m in maps)
    if meet and in_place and plus is not None and share_memory(plus, x):
        return None  # torch knows what may be written over
    return values.times(x, plus, in_place=in_place) if meet else None


def _is_map(x: Any) -> bool:
    return isinstance(x, Tensor) and not isinstance(x, Pooled) and x.dim() == 4


def _landed(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The ordinary map that a call gives where pooled values meet a map, otherwise None."""
    leaves, tree = tree_flatten((args, kwargs))
    pooled = [leaf for leaf in leaves if isinstance(leaf, Pooled)]
    positions = pooled[0].positions
    if any(p.positions != positions for p in pooled):
        raise ValueError("pooled values of maps of different size meet")
    if any(p.frame != pooled[0].frame for p in pooled):
        same = [leaf.everywhere() if isinstance(leaf, Pooled) else leaf for leaf in leaves]
        plain_args, plain_kwargs = tree_unflatten(same, tree)
        return func(*plain_args, **plain_kwargs)
    if not all(p.is_one_value() for p in pooled):
        return _landed_in_order(func, leaves, tree)
    if func in _SPREADS and _spreads_to(func, args, kwargs) == positions:
        return pooled[0].as_map()
    if func in (F.conv2d, torch.conv2d) and tuple(args[1].shape[2:]) == (1, 1):
        within = pooled[0].within()
        result = func(within, *args[1:], **kwargs)
        if result.shape[2:] != within.shape[2:]:
            return None
        return Pooled(result[:, :, None, None], pooled[0].frame)
    maps = [x for x in leaves if isinstance(x, Tensor) and not isinstance(x, Pooled)]
    if not any(x.dim() == 4 and tuple(x.shape[2:]) == positions for x in maps):
        return _landed_in_order(func, leaves, tree)
    ordinary = [leaf.as_map() if isinstance(leaf, Pooled) else leaf for leaf in leaves]
    plain_args, plain_kwargs = tree_unflatten(ordinary, tree)
    return func(*plain_args, **plain_kwargs)


def _landed_in_order(func: Callable[..., Any], leaves: list[Any], tree: Any) -> Any:
    """What `_landed` gives where the map's positions lie elsewhere than in its last two axes.

    Maps of pixels (B, H, W, C) meet pooled values (B, 1, 1, C); tokens (B, H·W, C) meet (B, 1, C),
    and (B, C, H·W) meet (B, C, 1). Only functions that compute each element by itself count.
    """
    if getattr(func, "__name__", "") not in ELEMENTWISE:
        return None
    for axes in _AXES_OF_POSITIONS:
        placed = [_placed(x, axes) if isinstance(x, Pooled) else x for x in leaves]
        ours: list[Any] = [x for x, y in zip(placed, leaves, strict=True) if isinstance(y, Pooled)]
        maps = [y for y in leaves if isinstance(y, Tensor) and not isinstance(y, Pooled)]
        if any(x is None for x in ours):
            continue
        place = [ours[0].shape[a] for a in axes]
        if any(y.dim() == len(axes) + 2 and [y.shape[a] for a in axes] == place for y in maps):
            plain_args, plain_kwargs = tree_unflatten(placed, tree)
            return func(*plain_args, **plain_kwargs)
    return None


_AXES_OF_POSITIONS: tuple[tuple[int, ...], ...] = ((1, 2), (1,), (2,))


def _placed(x: Pooled, axes: tuple[int, ...]) -> Tensor | None:
    """Pooled values as a map whose positions lie in these axes, each of length one so far."""
    if x.dim() != len(axes) + 2 or any(x.shape[a] != 1 for a in axes):
        return None
    vectors = x.everywhere().vectors
    if len(axes) == 1:
        vectors = vectors.flatten(-2)
    return vectors.squeeze(axes).movedim(tuple(range(-len(axes), 0)), axes)


_RESHAPES = ("view", "reshape", "flatten", "squeeze", "unsqueeze")
_SUMS = (torch.add, Tensor.add, Tensor.__add__)
_PRODUCTS_IN_PLACE = (Tensor.mul_, Tensor.__imul__)
_PRODUCTS = (torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__, *_PRODUCTS_IN_PLACE)
_SPREADS = (Tensor.expand, Tensor.expand_as, Tensor.repeat, F.interpolate, F.upsample)


def _spreads_to(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int, ...]:
    """Height and width that a call which spreads one value over a map gives it."""
    if func is Tensor.expand_as:
        return tuple(args[1].shape[2:])
    if func in (F.interpolate, F.upsample):
        size = args[1] if len(args) > 1 else kwargs.get("size")
        return (size, size) if isinstance(size, int) else tuple(size or ())
    sizes = args[1] if isinstance(args[1], tuple | list | torch.Size) else args[1:]
    return tuple(sizes[2:])


def _at_each_position(
    func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    leaves, tree = tree_flatten((args, kwargs))
    where = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Pooled)]
    frame = leaves[where[0]].frame
    result = at_all_positions(func, args, kwargs, Pooled)
    if result is NotImplemented:
        result = _mapped(func, leaves, tree, where, frame.windows)
    if any(isinstance(x, Tensor) and _is_of_maps(x) for x in tree_leaves(result)):
        raise ValueError("pooled values meet a map of another size than the one they come from")
    result = tree_map(lambda x: Pooled(x, frame) if isinstance(x, Tensor) else x, result)
    if _in_place(func, kwargs) and isinstance(args[0], Pooled):
        args[0].vectors = result.vectors
        return args[0]
    return result


def _mapped(
    func: Callable[..., Any],
    leaves: list[Any],
    tree: Any,
    where: list[int],
    positions: tuple[int, int],
) -> Any:
    """What the call gives at each position, (*shape, H, W), by `vmap`."""

    def at_one(*vectors: Tensor) -> Any:
        filled = list(leaves)
        for i, vector in zip(where, vectors, strict=True):
            filled[i] = vector
        vector_args, vector_kwargs = tree_unflatten(filled, tree)
        return func(*vector_args, **vector_kwargs)

    flat = [leaves[i].vectors.flatten(-2) for i in where]
    result = torch.vmap(at_one, in_dims=-1, out_dims=-1)(*flat)
    return tree_map(
        lambda x: x.reshape(*x.shape[:-1], *positions) if isinstance(x, Tensor) else x, result
    )


def _is_of_maps(vectors: Tensor) -> bool:
    """Whether one vector a window has grown to a whole map a window."""
    return vectors.dim() == 6 and min(vectors.shape[2:4]) > 1


def _in_place(func: Callable[..., Any], kwargs: dict[str, Any]) -> bool:
    name = getattr(func, "__name__", "")
    return bool(kwargs.get("inplace")) or (name.endswith("_") and not name.endswith("__"))


def pooled(
    x: Tensor,
    window: tuple[int, int],
    statistic: Callable[..., Tensor],
    gives: Gives,
    shape: tuple[int, ...] | None = None,
    defers: bool = False,
) -> Tensor:
    """A statistic of the window around every position of a map, for the code that follows.

    Args:
        x: map (B, C, H, W).
        window: height and width in positions.
        statistic: of (map, window), with `replicate=False` for the contained windows alone.
        gives: what that code takes. Where a graph is recorded maps are faster than vectors.
        shape: of the one statistic that it expects, (B, C, 1, 1) if None.
        defers: whether a mean may wait until it is used: nothing changes the map before.

    Raises:
        ConversionError: `torch.jit.trace` records a vector's layers.
    """
    whole = recorded()
    if gives == "map" or (gives == "either" and whole):
        return statistic(x, window, replicate=True)
    if not whole and defers and statistic is local_mean and shape is None:
        return Pooled.of_mean(x, window)
    if jit_traced():
        raise ConversionError(
            "torch.jit.trace does not see what layers make of pooled values; torch.export does"
        )
    values = statistic(x, window, replicate=whole)
    size = (x.shape[2], x.shape[3])
    frame = Frame.whole(size) if whole else Frame.of(size, window)
    return Pooled(values.reshape(*(shape or (*x.shape[:2], 1, 1)), *values.shape[2:]), frame)
