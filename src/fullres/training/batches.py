"""Training batches: crops of pairs, or of clean pictures that are degraded on the way.

A crop is a function of the recipe, the step and its place in the batch alone, so that training
that was stopped, or that several processes share, sees the same crops.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from fullres.data.datasets import Pair
from fullres.errors import FullresError
from fullres.io.image import open_image
from fullres.memory import free_memory
from fullres.training.recipe import Augment, Recipe

Place = tuple[int, int]
"""Step, and place in its batch."""
Stored = npt.NDArray[np.uint8] | npt.NDArray[np.uint16] | npt.NDArray[np.float32]

HELD = 0.3
"""Share of the free memory that decoded pictures may take, over all processes that read them."""


class Pictures:
    """Decoded pictures, (C, H, W) as they are stored; those used last are held in memory."""

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self._held: OrderedDict[Path, Stored] = OrderedDict()
        self._bytes = 0

    def __getitem__(self, path: Path) -> Stored:
        if path in self._held:
            self._held.move_to_end(path)
            return self._held[path]
        with open_image(path) as source:
            values = source.read(0, 0, source.height, source.width).numpy()
            bits = source.bits
        stored: Stored = values
        if bits < 32:
            stored = (values * (2**bits - 1)).round().astype(np.uint8 if bits == 8 else np.uint16)
        self._held[path] = stored
        self._bytes += stored.nbytes
        while self._bytes > self.budget and len(self._held) > 1:
            self._bytes -= self._held.popitem(last=False)[1].nbytes
        return stored


def picture_size(path: Path) -> tuple[int, int]:
    """Height and width, by decoding no more than the header."""
    import pyvips

    try:
        image = pyvips.Image.new_from_file(os.fspath(path))
    except pyvips.Error:
        with open_image(path) as source:  # says what is wrong
            return source.height, source.width
    return image.height, image.width


class Crops(Dataset[tuple[Tensor, Tensor]]):
    """Degraded and target crops, (C, crop, crop) and (C, scale * crop, scale * crop), by place."""

    def __init__(self, recipe: Recipe, pairs: list[Pair], scale: int) -> None:
        self.recipe = recipe
        self.pairs = pairs
        self.scale = scale
        self.degradation = recipe.make_degradation() if pairs[0].degraded is None else None
        readers = recipe.devices * max(recipe.workers, 1)
        self.pictures = Pictures(int(HELD * free_memory(torch.device("cpu")) / readers))
        sizes = np.array([picture_size(pair.target) for pair in pairs])
        self.shares = sizes.prod(1) / sizes.prod(1).sum()
        largest = scale * max(stage.crop for stage in recipe.stages)
        small = np.flatnonzero(sizes.min(1) < largest)
        if len(small):
            height, width = sizes[small[0]]
            raise FullresError(
                f"{pairs[small[0]].target}: {height} × {width} pixels is smaller than a crop of "
                f"{largest}; remove it or train on smaller crops"
            )

    def __getitem__(self, place: Place) -> tuple[Tensor, Tensor]:
        recipe, (step, _) = self.recipe, place
        random = np.random.default_rng([recipe.seed, *place])
        pair = self.pairs[random.choice(len(self.pairs), p=self.shares)]
        crop = recipe.stage(step).crop
        views = [path for path in (pair.degraded, pair.right) if path is not None]
        pictures = [self.pictures[path] for path in (*views, pair.target)]
        scales = [1] * len(views) + [self.scale]
        side = _side(crop, recipe.augment, random)
        origin = [random.integers(n // self.scale - side + 1) for n in pictures[-1].shape[1:]]
        turns, flip = int(random.integers(4)), random.random() < 0.5
        if pair.right is not None:
            turns = 0  # the views of a dual pixel differ along rows; turning would undo that
            flip = False
        crops = [
            _cut(picture, [scale * n for n in origin], scale * side, turns, flip)
            for picture, scale in zip(pictures, scales, strict=True)
        ]
        if side != crop:
            crops = [
                F.interpolate(x[None], size=2 * [crop * scale], mode="bicubic")[0].clamp(0, 1)
                for x, scale in zip(crops, scales, strict=True)
            ]
        *degraded, target = _recoloured(crops, recipe.augment, random)
        if self.degradation is not None:
            degraded = [self.degradation(target, random)]
        return torch.cat(degraded).contiguous(), target.contiguous()


class Steps(Sampler[list[Place]]):
    """Places of the crops that one of `count` processes takes at each step of `first … last`."""

    def __init__(self, recipe: Recipe, first: int, last: int, rank: int = 0) -> None:
        self.recipe, self.first, self.last, self.rank = recipe, first, last, rank

    def __len__(self) -> int:
        return self.last - self.first

    def __iter__(self) -> Iterator[list[Place]]:
        for step in range(self.first, self.last):
            share = self.recipe.stage(step).batch // self.recipe.devices
            yield [(step, self.rank * share + place) for place in range(share)]


def hold_out(recipe: Recipe, pairs: list[Pair]) -> tuple[list[Pair], list[Pair]]:
    """Pairs to train on, and evenly spaced ones to validate on.

    Versions of one picture fall on the same side.

    Raises:
        FullresError: there are too few.
    """
    versions = recipe.versions if _is_versioned(pairs) else 1
    pictures = len(pairs) // versions
    if pictures <= recipe.held_out:
        raise FullresError(
            f"{recipe.data.root}: {pictures} pictures are too few to train on, with "
            f"{recipe.held_out} of them held out for validation"
        )
    every = pictures // recipe.held_out
    held = {index * every for index in range(recipe.held_out)}
    training = [pair for n, pair in enumerate(pairs) if n // versions not in held]
    return training, [pairs[index * versions] for index in sorted(held)]


def _is_versioned(pairs: list[Pair]) -> bool:
    return all(pair.name.rpartition("_v")[2].isdecimal() for pair in pairs)


def _side(crop: int, augment: Augment, random: np.random.Generator) -> int:
    enlarged = random.random() < augment.zoom
    return round(crop / random.uniform(1, 2)) if enlarged else crop


def _cut(picture: Stored, origin: list[int], side: int, turns: int, flip: bool) -> Tensor:
    """A crop, turned and flipped, float32 in [0, 1]."""
    top, left = origin
    crop = picture[:, top : top + side, left : left + side]
    crop = np.rot90(crop, turns, (1, 2))
    crop = crop[:, :, ::-1] if flip else crop
    peak = {np.dtype("u1"): 255, np.dtype("u2"): 65535}.get(picture.dtype, 1)
    return torch.from_numpy(crop.astype(np.float32) / np.float32(peak))


def _recoloured(crops: list[Tensor], augment: Augment, random: np.random.Generator) -> list[Tensor]:
    """The same change of colour and contrast on all crops of a pair."""
    if random.random() < augment.colour:
        order, saturation = torch.from_numpy(random.permutation(3)), random.uniform(0, 2)
        shuffled = [x[order] for x in crops]
        greys = [x.mean(0, keepdim=True) for x in shuffled]
        crops = [g + (x - g) * saturation for g, x in zip(greys, shuffled, strict=True)]
    if random.random() < augment.contrast:
        pivot, gain = random.random(), 4 ** random.random()
        crops = [pivot + (x - pivot) * gain for x in crops]
    return [x.clamp(0, 1) for x in crops]
