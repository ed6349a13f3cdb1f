"""Means that are put off until somebody asks for them, with the layers that follow.

A layer that squeezes channels is cheaper before the mean than after it, and linear. The others,
and the product with the map in which they usually end, are cheaper together than one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fullres.local.forms import Window
from fullres.ops.box import local_mean
from fullres.ops.frames import Frame
from fullres.ops.gate import Layer, attended, gated, layered


class ChangedInPlaceError(RuntimeError):
    """A map was changed before the mean that had been put off: it must not be put off."""


class Mean:
    """Local means of a map (B, C, H, W) over the windows that it contains, computed once."""

    def __init__(self, x: Tensor, window: Window, squeeze: Layer | None = None) -> None:
        self.window = window
        self.squeeze = squeeze
        """A convolution that comes before the mean, to fewer channels."""
        self._map: Tensor | None = x
        self._version = None if x.is_inference() else x._version  # where versions are counted
        self._values: Tensor | None = None

    def source(self) -> Tensor | None:
        """The map; None once the means are known.

        Raises:
            ChangedInPlaceError: the map was changed in place.
        """
        x, version = self._map, self._version
        if x is not None and version is not None and version != x._version:
            raise ChangedInPlaceError("a map was changed in place before its mean was used")
        return x

    def squeezed(self, layer: Layer) -> Mean | None:
        """Means of what a convolution makes of the map, if it squeezes channels."""
        x, weight = self.source(), layer.weight
        if x is None or self.squeeze is not None or weight is None:
            return None
        return Mean(x, self.window, layer) if 2 * len(weight) <= weight.shape[1] else None

    def values(self) -> Tensor:
        """The means, (B, C, h, w).

        Raises:
            ChangedInPlaceError: the map was changed in place.
        """
        x = self.source()
        if x is not None:
            x = x if self.squeeze is None else self.squeeze(x)
            self._values, self._map = local_mean(x, self.window, replicate=False), None
        if self._values is None:
            raise ChangedInPlaceError("a product was written over a map before its mean was used")
        return self._values

    def lost(self) -> None:
        """Say that the map was written over before the means were known."""
        self._map = None


@dataclass(frozen=True)
class Head:
    """Pooled values and the layers that follow."""

    pooled: Mean | Tensor
    """(B, C, h, w), of the windows that a map contains."""
    layers: tuple[Layer, ...] = ()

    def then(self, layer: Layer) -> Head:
        """The same with one more layer."""
        if isinstance(self.pooled, Mean) and not self.layers:
            squeezed = self.pooled.squeezed(layer)
            if squeezed is not None:
                return Head(squeezed)
        return Head(self.pooled, (*self.layers, layer))

    def plus(self, other: Head) -> Head | None:
        """The sum with another, where both end in convolutions to as many channels or more: one
        convolution of what comes before either, which is all that is written.
        """
        heads = self, other
        ends = [head.layers[-1] for head in heads if head.layers]
        weights = [end.weight for end in ends if end.weight is not None]
        biases = [end.bias for end in ends if end.bias is not None]
        if len(weights) < 2 or len(weights[0]) != len(weights[1]):
            return None
        if any(len(weight) < weight.shape[1] for weight in weights):
            return None
        before = torch.cat([layered(head._pooled(), head.layers[:-1]) for head in heads], 1)
        bias = torch.stack(biases).sum(0) if biases else None
        return Head(before, (Layer(torch.cat(weights, 1), bias),))

    def values(self) -> Tensor:
        """What the layers give, (B, C', h, w)."""
        return layered(self._pooled(), self.layers)

    def times(self, x: Tensor, frame: Frame, plus: Tensor | None, *, in_place: bool) -> Tensor:
        """Its product with a map (B, C', H, W), `plus` added to it."""
        mean = self.pooled
        if isinstance(mean, Mean) and mean.squeeze is not None and mean.source() is x:
            squeeze, layers = mean.squeeze, self.layers
            y = attended(x, mean.window, squeeze, layers, plus=plus, in_place=in_place)
            if in_place:
                mean.lost()
            return y
        return gated(x, self._pooled(), self.layers, frame, plus=plus, in_place=in_place)

    def _pooled(self) -> Tensor:
        return self.pooled.values() if isinstance(self.pooled, Mean) else self.pooled


def layer_of(func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """The layer that a call is on a vector (B, C) or (B, C, 1, 1), its first argument, or None."""
    if func in _ACTIVATIONS:
        return Layer(activation=_ACTIVATIONS[func])
    if func is F.linear:
        return Layer(*args[1:], **kwargs) if args[0].dim() == 2 else None
    if func in (F.conv2d, torch.conv2d) and args[0].dim() == 4:
        return _convolution(*args[1:], **kwargs)
    return None


_ACTIVATIONS: Mapping[Any, Any] = {
    torch.relu: "relu", torch.relu_: "relu", Tensor.relu: "relu", Tensor.relu_: "relu",
    F.relu: "relu", F.relu_: "relu",
    torch.sigmoid: "sigmoid", Tensor.sigmoid: "sigmoid", F.sigmoid: "sigmoid",
    torch.sigmoid_: "sigmoid", Tensor.sigmoid_: "sigmoid",
}  # fmt: skip


def _convolution(
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Layer | None:
    plain = stride in (1, (1, 1)) and padding in (0, (0, 0)) and groups == 1
    return Layer(weight[:, :, 0, 0], bias) if plain and weight.shape[2:] == (1, 1) else None
