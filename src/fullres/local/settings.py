"""How a network becomes local: windows, and which of its operations."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from types import MappingProxyType
from typing import Any

from torch import nn

from fullres.errors import ConversionError
from fullres.local.forms import Window

Size = int | tuple[int, int]
Only = str | Sequence[str] | Callable[[str, nn.Module], bool]


@dataclass(frozen=True)
class Local:
    """How local: the window of every global operation, by the size of the training crops.

    Raises:
        ConversionError: a size is not one, or the stride is larger than a window.

    >>> Local(256).window
    (384, 384)
    >>> Local(256, windows={"instance norm": 512}).window_at((64, 64), "instance norm")
    (128, 128)
    """

    train_size: Size
    """Height and width, in pixels, of the crops that the network was trained on."""
    window: Size | None = None
    """Height and width of the window in input pixels; by default 1.5 × the training size."""
    only: Only | None = None
    """Which operations become local: patterns for module names as in a shell (`encoder.*`), or a
    function of name and module; by default all."""
    windows: Mapping[str, Size] = field(default_factory=dict, hash=False)
    """Windows of some kinds of operation, by the kind's name in the plan, in input pixels."""
    stride: Size | None = None
    """Input pixels between the overlapping windows of attention, at most the window: the smaller,
    the more windows are averaged, 1 for all there are. By default as few as cover the map."""

    def __post_init__(self) -> None:
        train = _pair("train_size", self.train_size)
        window = self.window
        if window is None:
            window = (3 * train[0] // 2, 3 * train[1] // 2)
        windows = {kind: _pair(f"the window of {kind!r}", w) for kind, w in self.windows.items()}
        object.__setattr__(self, "train_size", train)
        object.__setattr__(self, "window", _pair("window", window))
        object.__setattr__(self, "windows", MappingProxyType(windows))
        if not (self.only is None or isinstance(self.only, str) or callable(self.only)):
            object.__setattr__(self, "only", tuple(self.only))
        if self.stride is not None:
            stride = _pair("stride", self.stride)
            object.__setattr__(self, "stride", stride)
            for sides in (_pair("window", window), *windows.values()):
                if stride[0] > sides[0] or stride[1] > sides[1]:
                    raise ConversionError(
                        f"a stride of {stride} is larger than a window of {sides} and would leave "
                        "gaps; give one at most as large"
                    )

    @property
    def widest(self) -> Window:
        """Height and width that hold every window, in input pixels."""
        heights, widths = zip(_pair("window", self.window), *self.windows.values(), strict=True)
        return max(heights), max(widths)

    def window_at(self, feature: tuple[int, int], kind: str = "") -> Window:
        """Window on a map that measures `feature` (height, width) at the training size."""
        return self._scaled(feature, _pair("window", self.windows.get(kind, self.window)))

    def stride_at(self, feature: tuple[int, int]) -> Window | None:
        """Stride on a map that measures `feature` (height, width) at the training size."""
        return None if self.stride is None else self._scaled(feature, _pair("", self.stride))

    def _scaled(self, feature: tuple[int, int], size: Window) -> Window:
        train = _pair("train_size", self.train_size)
        return max(1, feature[0] * size[0] // train[0]), max(1, feature[1] * size[1] // train[1])

    def narrowed(self) -> Local:
        """The same with windows of at most the training size, which any larger picture exceeds."""
        most = _pair("train_size", self.train_size)
        kinds = {kind: _smaller(_pair(kind, size), most) for kind, size in self.windows.items()}
        window = _smaller(_pair("window", self.window), most)
        return replace(self, window=window, windows=kinds, stride=None)

    def takes(self, names: Sequence[str], module: nn.Module) -> bool:
        """Whether an operation of this module is one of those that become local."""
        if self.only is None:
            return True
        if callable(self.only):
            return any(self.only(name, module) for name in names)
        patterns = (self.only,) if isinstance(self.only, str) else self.only
        return any(fnmatchcase(name, pattern) for name in names for pattern in patterns)


def _smaller(one: Window, other: Window) -> Window:
    return min(one[0], other[0]), min(one[1], other[1])


def _pair(what: str, size: Any) -> tuple[int, int]:
    pair = (size, size) if isinstance(size, int) else size
    if (
        not isinstance(pair, tuple)
        or len(pair) != 2
        or not all(isinstance(n, int) and n >= 1 for n in pair)
    ):
        raise ConversionError(f"{what} is a number of pixels or a (height, width), got {size!r}")
    return pair
