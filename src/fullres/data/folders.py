"""Layouts of no owner: a pair of folders, folders of clips, clean pictures, two resolutions."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from pathlib import Path

from fullres.data.pairing import (
    Found,
    Pair,
    Request,
    clips_in,
    folders,
    match,
    match_folders,
    misfit,
    pictures,
    some,
)
from fullres.errors import FullresError

log = logging.getLogger(__name__)

DEGRADED = {
    **dict.fromkeys(("blur", "blurred", "blurry"), "deblur"),
    **dict.fromkeys(("noisy", "noise"), "denoise"),
    **dict.fromkeys(("hazy", "haze"), "dehaze"),
    **dict.fromkeys(("rain", "rainy"), "derain"),
    "lr": "super-resolution",
    **dict.fromkeys(("input", "degraded", "lq", "source"), None),
}
"""Usual names of a folder of degraded pictures, in lower case, and the task that each tells."""

TARGETS = ("target", "gt", "sharp", "clean", "clear", "hq", "hr", "groundtruth", "norain")
"""Usual names of a folder of targets, in lower case."""

CLEAN_FOLDERS = ("original_png", "original", "refimgs", "GTmod12", "HR", "GT", "gt")
"""Where in their folder some sets keep the clean pictures."""

SPLITS = ("train", "val", "test")


def has_roles(folder: Path) -> bool:
    """Whether a folder holds one of degraded pictures and one of targets, by usual names."""
    return all(_roles(folder))


def pairs_fit(root: Path) -> bool:
    """Whether a folder, or one of its splits, holds a pair of folders."""
    return any(has_roles(folder) for folder in (root, *(root / split for split in SPLITS)))


def clips_fit(root: Path) -> bool:
    """Whether the folders in a folder, or in one of its splits, hold a pair of folders each."""
    return any(_has_clips(folder) for folder in (root, *(root / split for split in SPLITS)))


def find_pairs(request: Request) -> Found:
    """Two folders whose pictures belong together by name."""
    if request.target_folder is not None:
        degraded, target = request.root, request.target_folder
    else:
        folder = request.place(
            has_roles,
            f"a folder of degraded pictures ({', '.join(DEGRADED)}) and one of targets "
            f"({', '.join(TARGETS)})",
        )
        degraded, target = two_folders(folder)
    pairs = match_folders(degraded, target)
    task = DEGRADED.get(degraded.name.lower())
    if task != "super-resolution":
        return Found(pairs, task=task, scale=request.scale or 1)
    scale = request.scale or _scale_in_names(pairs)
    if scale is None:
        raise FullresError(f"{degraded}: name the scale of these low resolutions with scale=N")
    return Found(pairs, task=task, protocol="sr", scale=scale)


def find_clips(request: Request) -> Found:
    """Folders of frames, each with a folder of degraded ones and one of targets."""
    folder = request.place(
        _has_clips,
        f"folders that each hold one of degraded frames ({', '.join(DEGRADED)}) and one of "
        f"targets ({', '.join(TARGETS)})",
    )
    pairs = []
    for clip in folders(folder):
        if any(_roles(clip)) and clip.name not in SPLITS:
            pairs += match_folders(*two_folders(clip), f"{clip.name}/")
    tasks = {DEGRADED.get(p.degraded.parent.name.lower()) for p in pairs if p.degraded is not None}
    task = tasks.pop() if len(tasks) == 1 else None
    return Found(pairs, clips_in(pairs), task=task, scale=request.scale or 1)


def two_folders(folder: Path) -> tuple[Path, Path]:
    """The folder of degraded pictures in a folder, and that of targets.

    Raises:
        FullresError: one is missing, or there are several.
    """
    found = _roles(folder)
    for paths, names in zip(found, (tuple(DEGRADED), TARGETS), strict=True):
        if not paths:
            raise misfit(folder, f"a folder with one of the names {', '.join(names)}")
        if len(paths) > 1:
            raise FullresError(
                f"{folder}: {some(path.name for path in paths)} could each be meant; open one of "
                "them and name the other folder with target_folder"
            )
    return found[0][0], found[1][0]


def resolutions(root: Path) -> dict[int, tuple[Path, Path]]:
    """Scale, to the folder of low and that of high resolutions; SelfExSR's form or that of EDSR."""
    found = {}
    for folder in (*folders(root), root):
        srf = re.fullmatch(r"image_SRF_(\d)", folder.name)
        if srf and folder.is_dir():
            found[int(srf[1])] = (folder, folder)
    if (root / "HR").is_dir():
        for folder in folders(root / "LR_bicubic"):
            if re.fullmatch(r"[xX]\d", folder.name):
                found[int(folder.name[1])] = (folder, root / "HR")
    return dict(sorted(found.items()))


def find_resolutions(request: Request) -> Found:
    """Low resolutions of one scale and their high resolutions."""
    found = resolutions(request.root)
    if not found:
        raise misfit(
            request.root, "image_SRF_{2,3,4} with *_HR and *_LR, or HR and LR_bicubic/X{2,3,4}"
        )
    scales = some(map(str, found))
    if request.scale is None and len(found) > 1:
        raise FullresError(f"{request.root}: holds the scales {scales}; choose one with scale=N")
    scale = request.scale or next(iter(found))
    if scale not in found:
        raise FullresError(f"{request.root}: has no scale {scale}; choose among {scales}")
    low, high = found[scale]
    pairs = _in_one_folder(low) if low == high else match_folders(low, high)
    return Found(pairs, task="super-resolution", protocol="sr", scale=scale)


def holds_clean(root: Path) -> bool:
    """Whether clean pictures lie in a folder, or where some sets keep them in it."""
    return _clean_folder(root) is not None


def find_clean(request: Request) -> Found:
    """Clean pictures, to be degraded on the fly; by `scale`, where one is given.

    Those in folders within theirs are left out, since results may lie there, and that is said.
    """
    folder = _clean_folder(request.root)
    if folder is None:
        raise misfit(request.root, f"clean pictures in it or in {', '.join(CLEAN_FOLDERS)}")
    found = pictures(folder)
    below = [path for inner in folders(folder) for path in pictures(inner, recursive=True)]
    if below:
        names = some(path.relative_to(folder).as_posix() for path in below)
        log.warning(
            "%s: left out pictures in the folders within it, %s; open these folders by themselves",
            folder,
            names,
        )
    pairs = [Pair(path.stem, None, path) for path in found]
    if request.scale is None or request.scale == 1:
        return Found(pairs)
    return Found(pairs, task="super-resolution", protocol="sr", scale=request.scale)


def plain(name: str) -> str:
    """The letters and digits of a name, in lower case.

    >>> plain("Urban-100")
    'urban100'
    """
    return re.sub(r"[^a-z0-9]", "", name.lower())


def find_set(request: Request) -> Found:
    """A well-known set: in two resolutions where it has them, otherwise its clean pictures."""
    return find_resolutions(request) if resolutions(request.root) else find_clean(request)


def _roles(folder: Path) -> tuple[list[Path], list[Path]]:
    inside = folders(folder)
    degraded = [path for path in inside if path.name.lower() in DEGRADED]
    return degraded, [path for path in inside if path.name.lower() in TARGETS]


def _has_clips(folder: Path) -> bool:
    return any(has_roles(clip) for clip in folders(folder) if clip.name not in SPLITS)


def _clean_folder(root: Path) -> Path | None:
    for folder in (root, *(root / name for name in CLEAN_FOLDERS)):
        if folder.is_dir() and pictures(folder):
            return folder
    return None


def _scale_in_names(pairs: Sequence[Pair]) -> int | None:
    """The N of the `xN` that ends the name of every degraded picture."""
    ends = {re.search(r"x(\d)$", p.degraded.stem, re.I) for p in pairs if p.degraded is not None}
    scales = {int(end[1]) if end else None for end in ends}
    return scales.pop() if len(scales) == 1 else None


def _in_one_folder(folder: Path) -> list[Pair]:
    """The `_LR` and `_HR` of the same name; other methods' results lie there too."""
    found = pictures(folder)
    low = [path for path in found if path.stem.endswith("_LR")]
    high = [path for path in found if path.stem.endswith("_HR")]
    if not low or not high:
        raise misfit(folder, "pictures with names that end with _LR and _HR")
    matches = match(low, high, _without_resolution, _without_resolution)
    match(high, low, _without_resolution, _without_resolution)
    return [Pair(_without_resolution(path), path, partner) for path, partner in matches]


def _without_resolution(path: Path) -> str:
    return re.sub(r"_[LH]R$", "", path.stem)
