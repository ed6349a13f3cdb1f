"""Examples of a data set as tensors, and what a network is told beside them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch.nn.functional as F
from torch import Tensor

from fullres.data.datasets import Dataset, Pair
from fullres.data.degradations import Bicubic, Jpeg, Mosaic, Noise
from fullres.data.degrade import Degradation, picture_random
from fullres.data.reading import read_picture
from fullres.errors import FullresError
from fullres.feed import Given
from fullres.networks.spec import Network


@dataclass(frozen=True)
class Example:
    """One degraded picture and its target; tensors are (C, H, W), float32."""

    name: str
    path: Path
    """File of the degraded picture, or of the one that it was made of."""
    degraded: Tensor
    """In [0, 1], or as the degradation made it."""
    right: Tensor | None
    """The right view, where `degraded` is the left one."""
    target: Tensor
    """In [0, 1], as large as the restored picture or up to the scale smaller."""

    @property
    def shown(self) -> Tensor:
        """The degraded picture in the size of its target, by bicubic interpolation."""
        height, width = self.target.shape[-2:]
        if self.degraded.shape[-2:] == (height, width):
            return self.degraded
        # the filter of MATLAB's imresize, which "antialias" stands for
        shown = F.interpolate(self.degraded[None], (height, width), mode="bicubic", antialias=True)
        return shown[0].clamp(0, 1)


def load_example(pair: Pair, scale: int, degradation: Degradation | None, seed: int) -> Example:
    """Read a pair, or degrade its target.

    The target loses the rows and columns that the scale leaves over.

    Args:
        pair: its files.
        scale: of the network.
        degradation: of a pair without a degraded picture.
        seed: of the degradation.

    Raises:
        FullresError: a file cannot be read, or the sizes do not fit the scale.
    """
    target = read_picture(pair.target, pair.target_key).clamp(0, 1)
    right = None if pair.right is None else read_picture(pair.right)
    if pair.degraded is None:
        assert degradation is not None
        target = _fitting(target, [side // scale * scale for side in target.shape[-2:]])
        degraded = degradation(target, picture_random(seed, pair.name)).float()
    else:
        degraded = read_picture(pair.degraded, pair.degraded_key)
    sides = [scale * side for side in degraded.shape[-2:]]
    if any(abs(a - b) >= scale for a, b in zip(sides, target.shape[-2:], strict=True)):
        raise FullresError(
            f"{pair.degraded or pair.target}: the degraded picture is {_size(degraded)} pixels and "
            f"its target {_size(target)}, but the network enlarges by {scale}; take a network or "
            "pictures that fit"
        )
    if right is not None and right.shape != degraded.shape:
        raise FullresError(
            f"{pair.right}: is {_size(right)} pixels where its left view, {pair.degraded}, is "
            f"{_size(degraded)}; give the views of one shot"
        )
    path = pair.degraded or pair.target
    return Example(pair.name, path, degraded, right, _fitting(target, sides))


def degradation_for(
    network: Network, dataset: Dataset, degradation: Degradation | None
) -> Degradation | None:
    """What degrades the pictures of a data set: None for one of pairs.

    A mosaic is made in the form that the network takes; networks that enlarge get bicubic
    downscaling where nothing else is asked for.

    Raises:
        FullresError: clean pictures and no degradation, or the other way round.
    """
    spec = network.spec
    clean = [pair for pair in dataset.pairs if pair.degraded is None]
    if not clean:
        if degradation is not None:
            raise FullresError(
                f"{dataset.name}: has degraded pictures of its own; leave out --degrade"
            )
        return None
    if degradation is None and spec.scale > 1:
        return Bicubic(spec.scale)
    if degradation is None:
        raise FullresError(
            f"{dataset.name}: has clean pictures and no degraded ones; say how to degrade them "
            "with --degrade, 'noise sigma=[25,25]' for instance"
        )
    if isinstance(degradation, Mosaic):
        return replace(degradation, form=spec.mosaic)
    return degradation


def condition_for(
    network: Network,
    dataset: Dataset,
    degradation: Degradation | None,
    noise_level: float | None = None,
    jpeg_quality: int | None = None,
) -> float | None:
    """Value of the channel that a network takes beside the picture, if it takes one.

    Raises:
        FullresError: the network needs what is not given, has no use for what is, or restores
            other pictures than those of the data set.
    """
    spec = network.spec
    name = spec.architecture
    views = any(pair.right is not None for pair in dataset.pairs)
    if views != (spec.views == 2):
        raise FullresError(
            f"{name}: takes one picture, and {dataset.name} has pairs of views; take another layout"
            if views
            else f"{name}: takes the left and right view of a dual-pixel camera, and "
            f"{dataset.name} has no right views; take a data set that does"
        )
    mosaic = degradation if isinstance(degradation, Mosaic) else None
    if spec.task == "demosaic" and mosaic is None:
        raise FullresError(
            f"{name}: restores mosaics; degrade clean pictures with --degrade mosaic"
        )
    if isinstance(degradation, Noise) and spec.condition == "noise level":
        low, high = degradation.sigma
        noise_level = low if noise_level is None and low == high else noise_level
    if isinstance(degradation, Jpeg) and spec.condition == "JPEG quality":
        least, most = degradation.quality
        jpeg_quality = least if jpeg_quality is None and least == most else jpeg_quality
    pattern = None if mosaic is None else mosaic.pattern
    given = Given(pattern, noise_level, jpeg_quality, views)
    return given.condition(spec)


def _fitting(x: Tensor, sides: list[int]) -> Tensor:
    return x[..., : sides[0], : sides[1]]


def _size(x: Tensor) -> str:
    return f"{x.shape[-1]} × {x.shape[-2]}"
