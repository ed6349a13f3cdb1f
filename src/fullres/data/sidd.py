"""The layouts of SIDD: scenes to train on, blocks in MATLAB files to test on."""

from __future__ import annotations

import importlib
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from types import ModuleType

import numpy as np
import numpy.typing as npt

from fullres.data.pairing import Block, Found, Pair, Request, folders, match, misfit, pictures, some
from fullres.errors import FullresError

NOISY, CLEAN = "ValidationNoisyBlocksSrgb", "ValidationGtBlocksSrgb"


def find_sidd(request: Request) -> Found:
    """The scenes of SIDD-Medium to train on; the blocks for validation otherwise."""
    return _find_sidd_scenes(request) if request.split == "train" else _find_sidd_blocks(request)


def sidd_fits(root: Path) -> bool:
    if (root / f"{NOISY}.mat").is_file():
        return True
    scenes = [*folders(root / "Data"), *folders(root)]
    return any(re.match(r"\d{4}_\d{3}_", scene.name) for scene in scenes)


def read_block(path: Path, key: Block) -> npt.NDArray[np.uint8]:
    """Read one picture of a MATLAB file of blocks, as SIDD's, as (H, W, 3).

    The arrays of the last two files stay in memory, 250 MB each for SIDD.

    Raises:
        FullresError: the file is missing or damaged, or SciPy is.
    """
    pixels: npt.NDArray[np.uint8] = _blocks(path, key.variable)[key.image, key.block]
    return pixels


def _find_sidd_scenes(request: Request) -> Found:
    folder = request.root / "Data" if (request.root / "Data").is_dir() else request.root
    pairs = []
    for scene in folders(folder):
        found = pictures(scene)
        noisy = [path for path in found if "_NOISY_SRGB" in path.stem]
        clean = [path for path in found if "_GT_SRGB" in path.stem]
        if noisy or clean:
            matches = match(noisy, clean, _shot, _shot)
            match(clean, noisy, _shot, _shot)
            pairs += [Pair(f"{scene.name}/{_shot(d)}", d, t) for d, t in matches]
    if not pairs:
        raise misfit(folder, "folders with *_NOISY_SRGB_*.PNG and *_GT_SRGB_*.PNG")
    return Found(pairs)


def _shot(path: Path) -> str:
    return path.stem.rpartition("SRGB_")[2]


def _find_sidd_blocks(request: Request) -> Found:
    noisy, clean = (request.root / f"{name}.mat" for name in (NOISY, CLEAN))
    if not noisy.is_file() or not clean.is_file():
        raise misfit(request.root, f"{noisy.name} and {clean.name}")
    shapes = _block_shape(noisy, NOISY), _block_shape(clean, CLEAN)
    if shapes[0] != shapes[1]:
        raise FullresError(
            f"{clean}: holds {shapes[1]} pictures, but {noisy.name} holds {shapes[0]}; fetch both "
            "again from their origin"
        )
    pairs = []
    for image in range(shapes[0][0]):
        for block in range(shapes[0][1]):
            keys = (Block(name, image, block) for name in (NOISY, CLEAN))
            pairs.append(Pair(f"{image:02}/{block:02}", noisy, clean, None, *keys))
    return Found(pairs)


def _block_shape(path: Path, variable: str) -> tuple[int, int]:
    """How many images of how many blocks a MATLAB file holds."""
    with _reading(path) as matlab:
        arrays = {name: shape for name, shape, _ in matlab.whosmat(str(path))}
    shape = arrays.get(variable, ())
    if len(shape) != 5:
        raise FullresError(
            f"{path}: expected an array {variable} of (images, blocks, height, width, 3); found "
            f"{some(f'{name} {shape}' for name, shape in arrays.items()) or 'nothing'}"
        )
    return int(shape[0]), int(shape[1])


@contextmanager
def _reading(path: Path) -> Iterator[ModuleType]:
    """SciPy's module for MATLAB files, and its errors as sentences."""
    try:
        matlab = importlib.import_module("scipy.io.matlab")
    except ImportError as error:
        raise FullresError(
            f"{path}: reading it takes SciPy, which is not installed: pip install scipy"
        ) from error
    damages = (KeyError, TypeError, ValueError, OSError, NotImplementedError, zlib.error)
    try:
        yield matlab
    except (matlab.MatReadError, *damages) as error:
        raise FullresError(
            f"{path}: is no readable MATLAB file ({error}); fetch it again from its origin"
        ) from error


@lru_cache(maxsize=2)
def _blocks(path: Path, variable: str) -> npt.NDArray[np.uint8]:
    with _reading(path) as matlab:
        blocks: npt.NDArray[np.uint8] = matlab.loadmat(str(path), variable_names=[variable])[
            variable
        ]
    return blocks
