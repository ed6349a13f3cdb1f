"""What it takes for a module to be local, and to be itself again.

A module takes its local form by changing its class and gaining a few attributes. It stays the
same object: its parameters, buffers, hooks, state-dict keys, aliases and place in the network
are not touched, and the change is undone exactly.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from fullres.errors import ConversionError

Window = tuple[int, int]
Gives = Literal["map", "vectors", "either"]
"""What stands for pooled values: a map of them, `Pooled`, or whichever is faster."""


@dataclass(frozen=True)
class Form:
    """A local form: the class that a module takes and the attributes that it gains."""

    cls: type[nn.Module]
    attributes: Mapping[str, Any]


class LocalForm:
    """Mixed into the class of every module that is local."""


class LocalModule(LocalForm):
    """Mixed into every local form of a module that is one global operation.

    `local_windows` holds one window if all calls share it, otherwise one a call, in the order of
    the calls within one forward pass of the network.
    """

    local_windows: tuple[Window, ...]
    local_gives: Gives = "map"
    """What a pooling gives to the code that follows."""
    local_defers: bool = False
    """Whether a mean may wait until it is used."""

    def local_window(self) -> Window:
        """Window of the present call."""
        return window_of_call(self, None, self.local_windows)

    def extra_repr(self) -> str:
        base: str = super().extra_repr()  # type: ignore[misc]
        windows = ", ".join(f"{kh}×{kw}" for kh, kw in self.local_windows)
        return f"{base}{', ' if base else ''}window={windows}"


_calls: ContextVar[dict[Any, int] | None] = ContextVar("calls of local operations", default=None)


def window_of_call(module: object, site: object, windows: tuple[Window, ...]) -> Window:
    """Window of the present call of a module, or of the call at a site of its forward.

    Raises:
        ConversionError: it has several windows, and which is not known.
    """
    if len(windows) == 1:
        return windows[0]
    calls = _calls.get()
    name = type(module).__name__
    if calls is None:
        raise ConversionError(
            f"{name} has a window for each of its calls within the converted network; it was "
            "called outside of it"
        )
    key = (id(module), site)
    call = calls[key] = calls.get(key, -1) + 1
    if call >= len(windows):
        raise ConversionError(
            f"{name} was called more often than the {len(windows)} times of the calibration, so "
            "its window is unknown"
        )
    return windows[call]


class CountsCalls:
    """Mixed into the root of a network in which some module has several windows.

    Counts live in a context variable for the time of one forward pass, never on a module, so
    that passes in several threads do not meet.
    """

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        token = _calls.set({})
        try:
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        finally:
            _calls.reset(token)


def covers(window: Window, x: Tensor) -> bool:
    """Whether the window covers the map (…, H, W), so that local and global are the same."""
    return window[0] >= x.shape[-2] and window[1] >= x.shape[-1]


def mixed(mixin: type, cls: type[nn.Module]) -> type[nn.Module]:
    """A module's class with the behaviour of `mixin` on top."""
    if issubclass(mixin, cls):
        return mixin
    return type(f"{mixin.__name__}[{cls.__name__}]", (mixin, cls), {"__module__": mixin.__module__})


def form_of(module: nn.Module, local: nn.Module) -> Form:
    """What sets `local`, a local form that the module made of itself, apart from the module.

    Raises:
        ConversionError: the local form does not share the module's parameters and buffers.
    """
    mine = dict(module.named_parameters()) | dict(module.named_buffers())
    other = dict(local.named_parameters()) | dict(local.named_buffers())
    if mine.keys() != other.keys() or any(mine[name] is not other[name] for name in mine):
        raise ConversionError(
            f"{type(module).__name__}.to_local() returned a module that does not share the "
            "parameters and buffers of the original under the same names"
        )
    blank = nn.Module().__dict__.keys()
    attributes = {
        name: value
        for name, value in vars(local).items()
        if name not in blank and vars(module).get(name, blank) is not value
    }
    return Form(type(local), attributes)


_ABSENT = object()


def take_form(module: nn.Module, form: Form) -> Form:
    """Change the module into `form`; returns the form to go back to."""
    before = {name: vars(module).get(name, _ABSENT) for name in form.attributes}
    original = Form(type(module), before)
    module.__class__ = form.cls
    for name, value in form.attributes.items():
        if value is _ABSENT:
            vars(module).pop(name, None)
        else:
            vars(module)[name] = value
    return original
