"""Gates of channel attention: a map times what a few layers make of its pooled values.

Made local, the pooled values are a map too, of the windows that the map contains. Layers and
product then are passes over maps as large as the map itself; on the CPU one kernel does them all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fullres.ops.arrays import for_kernel, written
from fullres.ops.box import local_mean
from fullres.ops.convolution import convolution
from fullres.ops.frames import Frame, Size

Activation = Literal["relu", "sigmoid"]

LARGE = 2**13
"""Weights above which a convolution by itself is faster than in the kernel."""
LARGER = 2**14
"""The same where one pass has the means, too, and saves more."""


@dataclass(frozen=True)
class Layer:
    """A 1 × 1 convolution or an activation, of maps (B, C, h, w)."""

    weight: Tensor | None = None
    """Of the convolution, (C', C)."""
    bias: Tensor | None = None
    """Of the convolution, (C',)."""
    activation: Activation | None = None

    def takes(self, x: Tensor) -> bool:
        """Whether vectors (B, C, …) have the channels and the type of its weights."""
        if self.weight is None:
            return True
        return self.weight.shape[1] == x.shape[1] and self.weight.dtype == x.dtype

    def weights(self) -> int:
        """How many its convolution has, if it is one."""
        return 0 if self.weight is None else self.weight.numel()

    def __call__(self, x: Tensor) -> Tensor:
        if self.weight is not None:
            return convolution(x, self.weight[:, :, None, None], self.bias)
        return x if self.activation is None else getattr(torch, self.activation)(x)


def layered(inner: Tensor, layers: Sequence[Layer]) -> Tensor:
    """What layers make of a map (B, C, h, w), one after the other."""
    for layer in layers:
        inner = layer(inner)
    return inner


def gated(
    x: Tensor,
    inner: Tensor,
    layers: Sequence[Layer],
    frame: Frame,
    *,
    plus: Tensor | None = None,
    in_place: bool = False,
) -> Tensor:
    """Product of a map and what layers make of pooled values, at every position.

    Args:
        x: map (B, C', H, W) of a floating-point type, any values, any strides.
        inner: pooled values (B, C, h, w) of the windows that the map contains, in the type of `x`.
        layers: take C channels, give C'.
        frame: how the windows stand for the positions of the map.
        plus: map (B, C', H, W) in the type of `x`, with memory of its own if `in_place`, that is
            added to the product; None for none.
        in_place: whether the result is written to `x`.

    Returns:
        (B, C', H, W), in the type and memory format of `x`; on the CPU computed in float32 or
        better, with one rounding.
    """
    while any(layer.weights() > LARGE for layer in layers):
        inner, layers = layers[0](inner), layers[1:]
    if _serves(x, inner, layers, plus):
        from fullres.ops import gate_cpu

        out = written(x) if in_place else torch.empty_like(x)
        return gate_cpu.gated(x, inner, layers, frame, plus, out)
    return frame.scaled(x, layered(inner, layers), plus=plus, in_place=in_place)


def attended(
    x: Tensor,
    window: Size,
    squeeze: Layer,
    layers: Sequence[Layer],
    *,
    plus: Tensor | None = None,
    in_place: bool = False,
) -> Tensor:
    """Channel attention: a map `gated` by what layers make of its own local means.

    Args:
        x: map (B, C', H, W) of a floating-point type, any values, any strides.
        window: height and width of the windows whose means are taken.
        squeeze: the first layer, a convolution to fewer channels, C. It comes before the mean: the
            same, for less.
        layers: the others, take C channels, give C'.
        plus: as `gated` has it.
        in_place: as `gated` has it.

    Returns:
        As `gated`.
    """
    frame = Frame.of((x.shape[2], x.shape[3]), window)
    every = (squeeze, *layers)
    small = layers and all(layer.weights() <= LARGER for layer in every)
    if small and x.dtype == torch.float32 and _serves(x, x, every, plus):
        from fullres.ops import attention_cpu

        if attention_cpu.serves(frame):
            out = written(x) if in_place else torch.empty_like(x)
            return attention_cpu.attended(x, squeeze, layers, frame, plus, out)
    inner = local_mean(squeeze(x), window, replicate=False)
    return gated(x, inner, layers, frame, plus=plus, in_place=in_place)


def _serves(x: Tensor, inner: Tensor, layers: Sequence[Layer], plus: Tensor | None) -> bool:
    """Whether a kernel may take these."""
    channels = [inner.shape[1], *(len(y.weight) for y in layers if y.weight is not None)]
    if x.shape[:2] != (len(inner), channels[-1]):
        return False
    if plus is not None and (plus.shape != x.shape or plus.stride() != x.stride()):
        return False
    others = (plus, *(t for y in layers for t in (y.weight, y.bias)))
    given = [inner, *(t for t in others if t is not None)]
    return (
        bool(layers)
        and x.numel() > 0
        and for_kernel(x, *given, dtypes=(torch.float32, torch.bfloat16))
        and all(t.dtype == x.dtype and t.device == x.device for t in given)
    )
