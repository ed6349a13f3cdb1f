"""Training batches: crops of clean pictures, augmented, and the same crops with noise.

A batch is a function of the recipe and the step alone.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from fullres.errors import FullresError
from fullres.io.image import SUFFIXES, open_image
from fullres.training.recipe import Recipe

Picture = npt.NDArray[np.uint8]
"""(H, W, 3)"""


def read_pictures(recipe: Recipe) -> tuple[list[Picture], list[Picture]]:
    """The recipe's pictures for training and those held out for validation.

    Raises:
        FullresError: the folder is missing or has too few pictures, or they are too small.
    """
    if not recipe.data.is_dir():
        raise FullresError(
            f"{recipe.data}: no such folder of training pictures; name yours with data=FOLDER"
        )
    paths = sorted(p for p in recipe.data.rglob("*") if p.suffix.lower() in SUFFIXES)
    if len(paths) <= recipe.held_out:
        raise FullresError(
            f"{recipe.data}: {len(paths)} pictures are too few to train on, with "
            f"{recipe.held_out} of them held out for validation"
        )
    pictures = [_read(path, recipe.crop) for path in paths]
    every = len(pictures) // recipe.held_out
    held_out = set(range(0, every * recipe.held_out, every))
    training = [p for index, p in enumerate(pictures) if index not in held_out]
    return training, [pictures[index] for index in sorted(held_out)]


def _read(path: Path, crop: int) -> Picture:
    with open_image(path) as source:
        if min(source.height, source.width) < crop:
            raise FullresError(
                f"{path}: {source.height} × {source.width} pixels is smaller than a crop of "
                f"{crop}; take it out or train with crop={min(source.height, source.width)}"
            )
        pixels = source.read(0, 0, source.height, source.width)
    stored = (pixels * 255).round().byte().expand(3, -1, -1).permute(1, 2, 0)
    return stored.contiguous().numpy()


def to_tensor(pictures: Picture) -> Tensor:
    """uint8 (B, H, W, 3) to float32 (B, 3, H, W) in [0, 1], channels last in memory."""
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255


def training_batch(recipe: Recipe, pictures: list[Picture], step: int) -> tuple[Tensor, Tensor]:
    """Noisy and clean crops of a step, (B, 3, crop, crop) in [0, 1] but for the noise."""
    random = np.random.default_rng([recipe.seed, step])
    areas = np.array([p.shape[0] * p.shape[1] for p in pictures], float)
    chosen = random.choice(len(pictures), recipe.batch, p=areas / areas.sum())
    clean = torch.cat([_crop(recipe, pictures[index], random) for index in chosen])
    sigma = random.uniform(*recipe.sigma, size=(recipe.batch, 1, 1, 1)) / 255
    noise = random.standard_normal((recipe.batch, recipe.crop, recipe.crop, 3), np.float32)
    noise *= sigma.astype(np.float32)
    return clean + torch.from_numpy(noise).permute(0, 3, 1, 2), clean


def _crop(recipe: Recipe, picture: Picture, random: np.random.Generator) -> Tensor:
    """One augmented crop, (1, 3, crop, crop), channels last in memory."""
    enlarged = random.random() < recipe.zoom
    side = round(recipe.crop / random.uniform(1, 2)) if enlarged else recipe.crop
    top = random.integers(picture.shape[0] - side + 1)
    left = random.integers(picture.shape[1] - side + 1)
    crop = np.rot90(picture[top : top + side, left : left + side], int(random.integers(4)))
    crop = crop[:, ::-1] if random.random() < 0.5 else crop
    clean = to_tensor(np.ascontiguousarray(crop)[None])
    if side != recipe.crop:
        clean = F.interpolate(clean, size=(recipe.crop, recipe.crop), mode="bicubic")
    if random.random() < recipe.colour:
        clean = clean[:, random.permutation(3)]
        grey = clean.mean(1, keepdim=True)
        clean = grey + (clean - grey) * random.uniform(0, 2)
    if random.random() < recipe.contrast:
        pivot, gain = random.random(), 4 ** random.random()
        clean = pivot + (clean - pivot) * gain
    return clean.clamp(0, 1).contiguous(memory_format=torch.channels_last)
