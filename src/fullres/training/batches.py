"""Training batches: crops of pairs, or of clean pictures that are degraded on the way.

A crop is a function of the recipe, the step and its place in the batch alone, so that training
that was stopped, or that several processes share, sees the same crops.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from fullres.data.datasets import Block, Pair, read_block
from fullres.data.reading import with_channels
from fullres.errors import FullresError
from fullres.io.image import open_image
from fullres.memory import free_memory
from fullres.networks.spec import Spec
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
        self._held: OrderedDict[tuple[Path, Block | None], Stored] = OrderedDict()
        self._bytes = 0

    def get(self, path: Path, key: Block | None = None) -> Stored:
        """A picture; with a key, one of the many that the file holds."""
        name = (path, key)
        if name in self._held:
            self._held.move_to_end(name)
            return self._held[name]
        stored = self._held[name] = _stored(path, key)
        self._bytes += stored.nbytes
        while self._bytes > self.budget and len(self._held) > 1:
            self._bytes -= self._held.popitem(last=False)[1].nbytes
        return stored


def _stored(path: Path, key: Block | None) -> Stored:
    if key is not None:
        return read_block(path, key).transpose(2, 0, 1)
    with open_image(path) as source:
        values = source.read(0, 0, source.height, source.width).numpy()
        bits = source.bits
    if bits == 32:
        return values
    kind = np.uint8 if bits == 8 else np.uint16
    integers: Stored = (values * (2**bits - 1)).round().astype(kind)
    return integers


def picture_pixels(path: Path) -> int:
    """Height times width, by reading no more than the header."""
    import pyvips

    try:
        image = pyvips.Image.new_from_file(os.fspath(path))
    except pyvips.Error:
        with open_image(path) as source:  # says what is wrong
            return source.height * source.width
    return int(image.height * image.width)


class Crops(Dataset[tuple[Tensor, Tensor]]):
    """Degraded and target crops, (C, crop, crop) and (C, scale * crop, scale * crop), by place.

    Pictures are drawn by their area. Those smaller than a crop are extended by reflection.
    """

    def __init__(self, recipe: Recipe, pairs: list[Pair], spec: Spec) -> None:
        self.recipe = recipe
        self.pairs = pairs
        self.scale = spec.scale
        self.channels = spec.out_channels
        self.degradation = recipe.make_degradation() if pairs[0].degraded is None else None
        readers = recipe.devices * max(recipe.workers, 1)
        self.pictures = Pictures(int(HELD * free_memory(torch.device("cpu")) / readers))
        alike = any(pair.target_key for pair in pairs)
        areas = np.array([1 if alike else picture_pixels(pair.target) for pair in pairs])
        self.ends = np.cumsum(areas / areas.sum())

    def __getitem__(self, place: Place) -> tuple[Tensor, Tensor]:
        recipe, (step, _) = self.recipe, place
        random = np.random.default_rng([recipe.seed, *place])
        index = int(np.searchsorted(self.ends, random.random()))
        pair = self.pairs[min(index, len(self.pairs) - 1)]
        crop = recipe.stage(step).crop
        pictures, scales = self._pictures(pair)
        side = _side(crop, recipe.augment, random)
        lengths = [n // scales[0] for n in pictures[0].shape[1:]]
        origin = [int(random.integers(max(n - side, 0) + 1)) for n in lengths]
        turn = _turn(recipe.augment, pair.right is not None, random)
        crops = [
            turn(_cut(picture, [scale * n for n in origin], scale * side))
            for picture, scale in zip(pictures, scales, strict=True)
        ]
        if side != crop:
            crops = [
                F.interpolate(x[None], size=2 * [crop * scale], mode="bicubic")[0].clamp(0, 1)
                for x, scale in zip(crops, scales, strict=True)
            ]
        crops = [with_channels(x, self.channels) for x in crops]
        *degraded, target = _recoloured(crops, recipe.augment, random)
        if self.degradation is not None:
            degraded = [self.degradation(target, random)]
        return torch.cat(degraded).contiguous(), target.contiguous()

    def _pictures(self, pair: Pair) -> tuple[list[Stored], list[int]]:
        """Degraded views, then the target; and the scale of each."""
        pictures = []
        if pair.degraded is not None:
            pictures.append(self.pictures.get(pair.degraded, pair.degraded_key))
        if pair.right is not None:
            pictures.append(self.pictures.get(pair.right))
        scales = [1] * len(pictures) + [self.scale]
        return [*pictures, self.pictures.get(pair.target, pair.target_key)], scales


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


def _cut(picture: Stored, origin: list[int], side: int) -> Tensor:
    """A crop, float32 in [0, 1]; what lies beyond the picture is its reflection."""
    rows, columns = (
        _reflected(first, side, length)
        for first, length in zip(origin, picture.shape[1:], strict=True)
    )
    crop = picture[:, rows][:, :, columns]
    peak = {np.dtype("u1"): 255, np.dtype("u2"): 65535}.get(picture.dtype, 1)
    return torch.from_numpy(crop.astype(np.float32) / np.float32(peak))


def _reflected(first: int, side: int, length: int) -> slice | npt.NDArray[np.int64]:
    if first + side <= length:
        return slice(first, first + side)
    turn = np.arange(first, first + side) % (2 * length)
    return np.minimum(turn, 2 * length - 1 - turn)


def _turn(augment: Augment, dual: bool, random: np.random.Generator) -> Callable[[Tensor], Tensor]:
    """One of the eight ways to lay a square, or of those that the recipe and the views allow."""
    turns = int(random.integers(4)) if augment.turn else 0
    axes = [2] if random.random() < 0.5 and augment.flip else []
    if dual:  # the two views differ along rows, left from right
        return lambda x: x.flip([1] if axes else [])
    if not augment.turn and random.random() < 0.5 and augment.flip:
        axes.append(1)
    return lambda x: torch.rot90(x.flip(axes), turns, (1, 2))


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
