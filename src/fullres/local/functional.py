"""Global operations written as function calls inside a forward: `x.mean((2, 3))` and its like.

They are found by comparing two passes at two picture sizes (`watch.py`): a call that reduces over
something that grew with the picture is global. Where a map is reduced to one value a channel, or
normalised by its own statistics, the call becomes local: the module's forward then runs under a
function mode that recognises the call by its site, the code and the instruction that calls, and
answers with local statistics. What follows sees the shape that it expects, by way of `Pooled`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fullres.local.forms import Gives, LocalForm, Window, covers, window_of_call
from fullres.local.pooled import Pooled, pooled
from fullres.local.rules import local_group_norm, local_instance_norm
from fullres.local.sites import Site, calling
from fullres.ops.box import local_max, local_mean, local_mean_var


@dataclass(frozen=True)
class Reduction:
    """A call that has a local form."""

    map: Tensor
    local: tuple[Callable[..., Tensor], ...]
    """The statistics of a window that it gives."""
    shape: tuple[int, ...] | None
    """Of the result, where one value a channel comes out; None where a map does."""
    gives: Callable[..., Any] = lambda statistic: statistic
    """Makes the call's result of the statistics."""
    half: Tensor | None = None
    """The map reduced along one axis, where this call reduces along the other."""


@dataclass(frozen=True)
class _Alias:
    """A tensor that is a map in other clothes, and the axis that holds (the rest of) positions."""

    result: Tensor
    source: Tensor
    axis: int
    versions: tuple[int, int]


class Aliases:
    """Tensors that are a map in other clothes: flattened, or reduced over one of its axes.

    Holds on to the tensors it knows, so that none of them is mistaken for a later one.
    """

    def __init__(self) -> None:
        self._known: dict[tuple[int, str], _Alias] = {}

    def note(self, result: Tensor, how: str, source: Tensor, axis: int) -> None:
        versions = (_version(result), _version(source))
        self._known[id(result), how] = _Alias(result, source, axis, versions)

    def of(self, x: Tensor, how: str) -> tuple[Tensor, int] | None:
        """The map that x is, and the axis of x; None if either was changed in place since."""
        alias = self._known.get((id(x), how))
        if alias is None or (_version(x), _version(alias.source)) != alias.versions:
            return None
        return alias.source, alias.axis


def _version(x: Tensor) -> int:
    return 0 if x.is_inference() else x._version


def _local_sum(x: Tensor, window: Window, *, replicate: bool = True) -> Tensor:
    """As if all positions were like the window: what follows divides by their number, if any."""
    return local_mean(x, window, replicate=replicate) * (x.shape[2] * x.shape[3])


def _local_min(x: Tensor, window: Window, *, replicate: bool = True) -> Tensor:
    return -local_max(-x, window, replicate=replicate)


def _spread(correction: float, root: bool) -> Callable[..., Tensor]:
    def local(x: Tensor, window: Window, *, replicate: bool = True) -> Tensor:
        count = min(window[0], x.shape[2]) * min(window[1], x.shape[3])
        var = local_mean_var(x, window, replicate=replicate)[1] * (
            count / max(count - correction, 1e-12)
        )
        return var.sqrt() if root else var

    return local


def _in_type(statistic: Callable[..., Tensor], kind: torch.dtype) -> Callable[..., Tensor]:
    def local(x: Tensor, window: Window, *, replicate: bool = True) -> Tensor:
        return statistic(x.to(kind), window, replicate=replicate)

    return local


_LOCAL: dict[str, Callable[..., Tensor]] = {
    "mean": local_mean,
    "sum": _local_sum,
    "amax": local_max,
    "max": local_max,
    "amin": _local_min,
    "min": _local_min,
}
_SPREADS = {"var", "std", "var_mean", "std_mean"}
_WITH_PLACES = {"max": torch.return_types.max, "min": torch.return_types.min}
_POOLS = {
    "adaptive_avg_pool2d": "mean",
    "adaptive_max_pool2d": "amax",
    "_adaptive_max_pool2d": "amax",
    "avg_pool2d": "mean",
    "max_pool2d": "amax",
    "_max_pool2d": "amax",
}
_RESHAPES = {"flatten", "view", "reshape"}
_TRANSPOSES = {"transpose", "swapaxes", "swapdims", "permute", "__get__"}
"""`__get__` is what gives `x.mT`."""


def _argument(args: tuple[Any, ...], kwargs: Mapping[str, Any], at: int, *names: str) -> Any:
    return args[at] if len(args) > at else next((kwargs[n] for n in names if n in kwargs), None)


def _axes(x: Tensor, dim: Any) -> tuple[int, ...]:
    """The dimensions meant by `dim`, none where it is something else (`torch.max(x, y)`)."""
    if dim is None:
        return tuple(range(x.dim()))
    dims = dim if isinstance(dim, tuple | list) else (dim,)
    return tuple(sorted(d % x.dim() for d in dims if isinstance(d, int)))


def reduction(
    name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], aliases: Aliases
) -> Reduction | None:
    """The call as one that has a local form, None where it has none."""
    x = _argument(args, kwargs, 0, "input", "self")
    if not isinstance(x, Tensor) or isinstance(x, Pooled) or not x.is_floating_point():
        return None
    if name in _POOLS:
        return _pooling(name, x, args, kwargs)
    if name in ("instance_norm", "group_norm"):
        return _normalisation(name, x, args, kwargs)
    if name not in _LOCAL and name not in _SPREADS:
        return None
    axes = _axes(x, _argument(args, kwargs, 1, "dim", "axis"))
    source, half = x, None
    if x.dim() != 4 or axes != (2, 3):
        whole, rest = aliases.of(x, "whole"), aliases.of(x, name)
        alias = whole or rest
        if alias is None or axes != alias[1:] or x.shape[axes[0]] == 1:
            return None
        source, half = alias[0], None if whole else x
    at = 3 if name in _SPREADS else 2
    keepdim = bool(_argument(args, kwargs, at, "keepdim"))
    sizes = ((d in axes, n) for d, n in enumerate(x.shape))
    shape = tuple(1 if gone else n for gone, n in sizes if keepdim or not gone)
    local, gives = _statistics(name, args, kwargs)
    kind = kwargs.get("dtype") or x.dtype
    if source.dtype != kind:
        local = tuple(_in_type(statistic, kind) for statistic in local)
    return Reduction(source, local, shape, gives, half)


def _statistics(
    name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[tuple[Callable[..., Tensor], ...], Callable[..., Any]]:
    """Local statistics that stand for those of a call, and what makes its result of them."""
    if name in _WITH_PLACES:  # the places have no local form: None fails where it is used
        named = _WITH_PLACES[name]
        return (_LOCAL[name],), lambda extreme: named((extreme, None))  # type: ignore[arg-type]
    if name in _LOCAL:
        return (_LOCAL[name],), lambda statistic: statistic
    unbiased = _argument(args, kwargs, 2, "unbiased")
    correction = kwargs.get("correction", 0 if unbiased is False else 1)
    spread = _spread(1 if correction is None else correction, name.startswith("std"))
    if name.endswith("_mean"):
        return (spread, local_mean), lambda *both: both
    return (spread,), lambda statistic: statistic


def _pooling(
    name: str, x: Tensor, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Reduction | None:
    if x.dim() != 4 or tuple(x.shape[2:]) == (1, 1) or kwargs.get("return_indices"):
        return None
    size = _argument(args, kwargs, 1, "output_size", "kernel_size")
    pair = (size, size) if isinstance(size, int) else tuple(size)
    adaptive = "adaptive" in name
    if pair != ((1, 1) if adaptive else tuple(x.shape[2:])):
        return None
    if not adaptive and _argument(args, kwargs, 3, "padding") not in (None, 0, (0, 0), [0, 0]):
        return None
    return Reduction(x, (_LOCAL[_POOLS[name]],), (*x.shape[:2], 1, 1))


def _normalisation(
    name: str, x: Tensor, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Reduction | None:
    if x.dim() != 4:
        return None
    if name == "group_norm":
        groups, weight, bias, eps = (
            _argument(args, kwargs, at, key)
            for at, key in enumerate(("num_groups", "weight", "bias", "eps"), 1)
        )
        eps = 1e-5 if eps is None else eps

        def group_norm(x: Tensor, window: Window) -> Tensor:
            return local_group_norm(x, window, groups, weight, bias, eps)

        return Reduction(x, (group_norm,), None)
    names = ("running_mean", "running_var", "weight", "bias", "use_input_stats", "momentum", "eps")
    running, _, weight, bias, uses, _, eps = (
        _argument(args, kwargs, at, key) for at, key in enumerate(names, 1)
    )
    if running is not None or uses is False:
        return None
    eps = 1e-5 if eps is None else eps

    def instance_norm(x: Tensor, window: Window) -> Tensor:
        return local_instance_norm(x, window, weight, bias, eps)

    return Reduction(x, (instance_norm,), None)


def note_aliases(
    name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any, aliases: Aliases
) -> Tensor | None:
    """Note what a call makes of a map; its result if that is the map reduced along one axis."""
    x = _argument(args, kwargs, 0, "input", "self")
    if name in _WITH_PLACES and isinstance(result, tuple):
        result = result[0]
    if not isinstance(x, Tensor) or not isinstance(result, Tensor) or isinstance(x, Pooled):
        return None
    shape = tuple(result.shape)
    if name in _RESHAPES and x.dim() == 4:
        b, c, h, w = x.shape
        if shape in ((b, c, h * w), (b * c, h * w)):
            aliases.note(result, "whole", x, len(shape) - 1)
    elif name in _TRANSPOSES and x.dim() == 3:
        flat = aliases.of(x, "whole")
        swapped = (x.stride(0), x.stride(2), x.stride(1))
        if flat is not None and flat[1] == 2 and result.dim() == 3 and result.stride() == swapped:
            aliases.note(result, "whole", flat[0], 1)
    elif name in _LOCAL and x.dim() == 4 and min(x.shape[2:]) > 1:
        axes = _axes(x, _argument(args, kwargs, 1, "dim", "axis"))
        if axes in ((2,), (3,)):
            aliases.note(result, name, x, 3 if axes == (2,) and result.dim() == 4 else 2)
            return result
    return None


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
        self._aliases = Aliases()

    def __torch_function__(
        self, func: Any, types: Iterable[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        found = reduction(name, args, kwargs, self._aliases)
        if found is not None:
            at = calling(sys._getframe(1))
            if at is not None and at[0] is self._module and at[1] is not None:
                windows = self._sites.get(at[1])
                if windows is not None:
                    window = window_of_call(self._module, at[1], windows)
                    if not covers(window, found.map):
                        return _answer(found, window, self._gives)
        result = func(*args, **kwargs)
        note_aliases(name, args, kwargs, result, self._aliases)
        return result


def _answer(found: Reduction, window: Window, gives: Gives) -> Any:
    if found.shape is None:
        return found.gives(*(local(found.map, window) for local in found.local))
    what: Gives = "vectors" if len(found.shape) < 4 else gives
    return found.gives(
        *(pooled(found.map, window, local, what, found.shape) for local in found.local)
    )
