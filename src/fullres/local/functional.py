"""Global operations written as function calls inside a forward: `x.mean((2, 3))` and its like.

They are found by comparing two passes at two picture sizes: a call that reduces over something
that grew with the picture is global. Where a map is reduced to one value a channel, or normalised
by its own statistics, the call becomes local: the module's forward then runs under a function mode
that recognises the call by its site, the code and the instruction that calls, and answers with
local statistics. What follows sees the shape that it expects, by way of `Pooled`.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fullres.local.forms import Gives, LocalForm, Window, covers, window_of_call
from fullres.local.pooled import Pooled, pooled
from fullres.local.rules import local_group_norm, local_instance_norm
from fullres.ops.box import local_max, local_mean, local_mean_var

_TORCH = str(Path(torch.__file__).parent)
_STOCK = str(Path(nn.__file__).parent / "modules")
_CALL = nn.Module._call_impl.__code__
"""Of what runs the forward of every module."""
_ATTENTION = nn.MultiheadAttention.forward.__code__
"""The one stock module whose reach no rule knows: it may get windows or whole maps."""


@dataclass(frozen=True)
class Site:
    """Where a call stands in the code."""

    file: str
    line: int
    instruction: int

    def __str__(self) -> str:
        return f"{Path(self.file).name}:{self.line}"


@dataclass(frozen=True)
class Call:
    """A call that may be global, as seen in one pass."""

    module: nn.Module
    """The module whose forward made it."""
    site: Site
    name: str
    """Of the function."""
    reduced: tuple[int, ...]
    """Sizes of what it reduces over."""
    map: tuple[int, ...] | None
    """Shape (B, C, H, W) of the map that it reduces, where it has a local form."""


@dataclass(frozen=True)
class _Reduction:
    """A call that has a local form."""

    map: Tensor
    local: Callable[..., Tensor]
    shape: tuple[int, ...] | None
    """Of the result, where one value a channel comes out; None where a map does."""
    with_indices: bool = False
    """Whether it gives the places of the maxima beside them."""


class _Aliases:
    """Tensors that are a map in other clothes: flattened, or reduced over one of its axes.

    Holds on to the tensors it knows, so that none of them is mistaken for a later one.
    """

    def __init__(self) -> None:
        self._known: dict[tuple[int, str], tuple[Tensor, Tensor]] = {}

    def note(self, result: Tensor, how: str, source: Tensor) -> None:
        self._known[id(result), how] = (result, source)

    def source(self, x: Tensor, how: str) -> Tensor | None:
        return self._known.get((id(x), how), (None, None))[1]


def _local_sum(x: Tensor, window: Window, *, replicate: bool = True) -> Tensor:
    return local_mean(x, window, replicate=replicate) * _count(x, window)


def _count(x: Tensor, window: Window) -> int:
    return min(window[0], x.shape[2]) * min(window[1], x.shape[3])


def _spread(correction: float, root: bool) -> Callable[..., Tensor]:
    def local(x: Tensor, window: Window, *, replicate: bool = True) -> Tensor:
        count = _count(x, window)
        var = local_mean_var(x, window, replicate=replicate)[1] * (
            count / max(count - correction, 1e-12)
        )
        return var.sqrt() if root else var

    return local


_LOCAL: dict[str, Callable[..., Tensor]] = {
    "mean": local_mean,
    "sum": _local_sum,
    "amax": local_max,
    "max": local_max,
}
_POOLS = {
    "adaptive_avg_pool2d": "mean",
    "adaptive_max_pool2d": "amax",
    "_adaptive_max_pool2d": "amax",
    "avg_pool2d": "mean",
    "max_pool2d": "amax",
    "_max_pool2d": "amax",
}
_RESHAPES = {"flatten", "view", "reshape"}
_OVER_DIM = {
    "mean", "sum", "amax", "amin", "max", "min", "var", "std", "var_mean", "std_mean", "norm",
    "vector_norm", "prod", "logsumexp", "softmax", "log_softmax", "normalize", "argmax", "cumsum",
    "sort", "argsort", "topk",
}  # fmt: skip
_TRANSFORMS = {f"{a}{b}fft{n}" for a in ("", "i") for b in ("", "r") for n in ("", "2", "n")}
_PRODUCTS = {"matmul", "__matmul__", "bmm", "mm"}


def _argument(args: tuple[Any, ...], kwargs: Mapping[str, Any], at: int, *names: str) -> Any:
    return args[at] if len(args) > at else next((kwargs[n] for n in names if n in kwargs), None)


def _axes(x: Tensor, dim: Any) -> tuple[int, ...]:
    """The dimensions meant by `dim`, none where it is something else (`torch.max(x, y)`)."""
    if dim is None:
        return tuple(range(x.dim()))
    dims = dim if isinstance(dim, tuple | list) else (dim,)
    return tuple(sorted(d % x.dim() for d in dims if isinstance(d, int)))


def _reduced(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Sizes of what a call reduces over, None where it is not of a kind that reduces."""
    x = _argument(args, kwargs, 0, "input", "self", "A")
    if not isinstance(x, Tensor):
        return None
    if name.removeprefix("_").startswith("adaptive_"):
        return _over_cells(x, _argument(args, kwargs, 1, "output_size"))
    if name in _POOLS:
        kernel = _argument(args, kwargs, 1, "kernel_size")
        return (kernel, kernel) if isinstance(kernel, int) else tuple(kernel)
    if name == "instance_norm":
        return tuple(x.shape[-2:])
    if name == "group_norm":
        return tuple(x.shape[2:])
    if name == "layer_norm":
        return tuple(_argument(args, kwargs, 1, "normalized_shape"))
    if name in _OVER_DIM:
        at = {"normalize": 2, "norm": 2, "vector_norm": 2}.get(name, 1)
        dim = 1 if name == "normalize" else None
        given = _argument(args, kwargs, at, "dim", "axis")
        return tuple(x.shape[d] for d in _axes(x, dim if given is None else given))
    if name in _PRODUCTS:
        return (x.shape[-1],)
    if name == "scaled_dot_product_attention":
        return (_argument(args, kwargs, 1, "key").shape[-2],)
    if name.removeprefix("fft_") in _TRANSFORMS:
        axes = _argument(args, kwargs, 2, "dim")
        last = -2 if name.endswith("2") else -1 if not name.endswith("n") else 0
        return tuple(x.shape[d] for d in _axes(x, axes)) if axes else tuple(x.shape[last:])
    if name == "multi_head_attention_forward":
        return (_argument(args, kwargs, 1, "key").shape[0],)
    return None


def _over_cells(x: Tensor, size: Any) -> tuple[int, ...]:
    """Sizes of the cells that a pooling to a size reduces over."""
    sizes = size if isinstance(size, tuple | list) else (size, size)
    wanted = [n if m is None else m for n, m in zip(x.shape[-2:], sizes, strict=True)]
    return tuple(-(-n // m) for n, m in zip(x.shape[-2:], wanted, strict=True))


def _reduction(
    name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], aliases: _Aliases
) -> _Reduction | None:
    """The call as one that has a local form."""
    x = _argument(args, kwargs, 0, "input", "self")
    if not isinstance(x, Tensor) or isinstance(x, Pooled) or not x.is_floating_point():
        return None
    if name in _POOLS:
        return _pooling(name, x, args, kwargs)
    if name in ("instance_norm", "group_norm"):
        return _normalisation(name, x, args, kwargs)
    local = _spread_of(name, args, kwargs) if name in ("var", "std") else _LOCAL.get(name)
    if local is None or kwargs.get("dtype") is not None:
        return None
    axes = _axes(x, _argument(args, kwargs, 1, "dim", "axis"))
    keepdim = _keeps_dim(name, args, kwargs)
    source, rest = x, axes
    if x.dim() != 4 or axes != (2, 3):
        if len(axes) != 1:
            return None
        flat, half = aliases.source(x, "flat"), aliases.source(x, name)
        known = flat if flat is not None else half
        if known is None or x.shape[axes[0]] == 1 or axes[0] < 2:
            return None
        source, rest = known, axes
    shape = tuple(1 if d in rest else n for d, n in enumerate(x.shape))
    if not keepdim:
        shape = tuple(n for d, n in enumerate(shape) if d not in rest)
    if math.prod(shape[2:]) != 1:
        return None
    return _Reduction(source, local, shape, with_indices=name == "max")


def _keeps_dim(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    at = 3 if name in ("var", "std") else 2
    return bool(_argument(args, kwargs, at, "keepdim"))


def _spread_of(
    name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Callable[..., Tensor]:
    unbiased = _argument(args, kwargs, 2, "unbiased")
    correction = kwargs.get("correction", 0 if unbiased is False else 1)
    return _spread(1 if correction is None else correction, name == "std")


def _pooling(
    name: str, x: Tensor, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> _Reduction | None:
    if x.dim() != 4 or tuple(x.shape[2:]) == (1, 1) or kwargs.get("return_indices"):
        return None
    size = _argument(args, kwargs, 1, "output_size", "kernel_size")
    pair = (size, size) if isinstance(size, int) else tuple(size)
    adaptive = "adaptive" in name
    if pair != ((1, 1) if adaptive else tuple(x.shape[2:])):
        return None
    if not adaptive and _argument(args, kwargs, 3, "padding") not in (None, 0, (0, 0), [0, 0]):
        return None
    return _Reduction(x, _LOCAL[_POOLS[name]], (*x.shape[:2], 1, 1))


def _normalisation(
    name: str, x: Tensor, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> _Reduction | None:
    if x.dim() != 4:
        return None
    if name == "group_norm":
        groups, weight, bias, eps = (
            _argument(args, kwargs, at, key)
            for at, key in enumerate(("num_groups", "weight", "bias", "eps"), 1)
        )
        eps = 1e-5 if eps is None else eps
        return _Reduction(x, lambda x, k: local_group_norm(x, k, groups, weight, bias, eps), None)
    names = ("running_mean", "running_var", "weight", "bias", "use_input_stats", "momentum", "eps")
    running, _, weight, bias, uses, _, eps = (
        _argument(args, kwargs, at, key) for at, key in enumerate(names, 1)
    )
    if running is not None or uses is False:
        return None
    eps = 1e-5 if eps is None else eps
    return _Reduction(x, lambda x, k: local_instance_norm(x, k, weight, bias, eps), None)


def _note_aliases(
    name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any, aliases: _Aliases
) -> None:
    x = _argument(args, kwargs, 0, "input", "self")
    if name == "max" and isinstance(result, tuple):
        result = result[0]
    if not isinstance(x, Tensor) or not isinstance(result, Tensor) or isinstance(x, Pooled):
        return
    if name in _RESHAPES and x.dim() == 4 and result.dim() == 3:
        if tuple(result.shape) == (*x.shape[:2], x.shape[2] * x.shape[3]):
            aliases.note(result, "flat", x)
    elif name in _LOCAL and x.dim() == 4 and min(x.shape[2:]) > 1:
        axes = _axes(x, _argument(args, kwargs, 1, "dim", "axis"))
        if axes in ((2,), (3,)):
            aliases.note(result, name, x)


def _calling(frame: FrameType | None) -> tuple[nn.Module, Site] | None:
    """The module whose code makes the call that is being handled, and where it stands.

    None for calls from within torch's own modules, whose rules go by their class.
    """
    site, attends = None, False
    while frame is not None:
        file = frame.f_code.co_filename
        attends |= frame.f_code is _ATTENTION
        if site is None and not attends and file.startswith(_STOCK):
            return None
        if file != __file__ and not file.startswith(_TORCH):
            site = site or Site(file, frame.f_lineno, frame.f_lasti)
        if site is not None and frame.f_code is _CALL:
            return frame.f_locals["self"], site
        frame = frame.f_back
    return None


class Watch(TorchFunctionMode):
    """Notes the calls of a pass that may be global."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self._aliases = _Aliases()

    def __torch_function__(
        self, func: Any, types: Iterable[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        reduced = _reduced(name, args, kwargs)
        if reduced is not None:
            calling = _calling(sys._getframe(1))
            if calling is not None:
                found = _reduction(name, args, kwargs, self._aliases)
                shape = None if found is None else tuple(found.map.shape)
                self.calls.append(Call(*calling, name, reduced, shape))
        result = func(*args, **kwargs)
        _note_aliases(name, args, kwargs, result, self._aliases)
        return result


class LocalCalls(LocalForm):
    """Mixed into a module whose forward calls global operations as functions."""

    local_sites: dict[Site, tuple[Window, ...]]
    """The windows of each call that is answered."""
    local_gives: Gives = "map"

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if "torch._dynamo" in sys.modules:  # compiling would move the calls to other places
            eager = torch.compiler.disable(self._answered)  # type: ignore[no-untyped-call]
            return eager(*args, **kwargs)
        return self._answered(*args, **kwargs)

    def _answered(self, *args: Any, **kwargs: Any) -> Any:
        assert isinstance(self, nn.Module)
        with _Answer(self, self.local_sites, self.local_gives):
            return super().forward(*args, **kwargs)  # type: ignore[misc]


class _Answer(TorchFunctionMode):
    """Answers the calls of one module's sites with local statistics, during one forward."""

    def __init__(
        self, module: nn.Module, sites: Mapping[Site, tuple[Window, ...]], gives: Gives
    ) -> None:
        super().__init__()
        self._module, self._sites, self._gives = module, sites, gives
        self._aliases = _Aliases()

    def __torch_function__(
        self, func: Any, types: Iterable[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        found = _reduction(name, args, kwargs, self._aliases)
        if found is not None:
            calling = _calling(sys._getframe(1))
            if calling is not None and calling[0] is self._module:
                windows = self._sites.get(calling[1])
                if windows is not None:
                    window = window_of_call(self._module, calling[1], windows)
                    if not covers(window, found.map):
                        return _answer(found, window, self._gives)
        result = func(*args, **kwargs)
        _note_aliases(name, args, kwargs, result, self._aliases)
        return result


def _answer(found: _Reduction, window: Window, gives: Gives) -> Any:
    if found.shape is None:
        return found.local(found.map, window)
    gives = "vectors" if len(found.shape) < 4 else gives
    result = pooled(found.map, window, found.local, gives, found.shape)
    if found.with_indices:  # the places of the maxima have no local form: None fails where used
        return torch.return_types.max((result, None))  # type: ignore[arg-type]
    return result
