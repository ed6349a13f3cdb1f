"""Layouts of sets for deblurring: motion blur, in pictures and video, and defocus."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

from fullres.data.pairing import (
    Found,
    Pair,
    Request,
    clips_in,
    folders,
    listed,
    match,
    match_folders,
    misfit,
    pictures,
    pictures_or_misfit,
    stem,
)
from fullres.errors import FullresError

DVD_TEST = (
    *("720p_240fps_2", "IMG_0003", "IMG_0021", "IMG_0030", "IMG_0031"),
    *("IMG_0032", "IMG_0033", "IMG_0037", "IMG_0039", "IMG_0049"),
)
"""The videos that the authors of DVD test on; they train on the others."""


def find_gopro(request: Request, degraded: str) -> Found:
    """Every frame of every scene; each scene is a clip."""
    expected = f"GOPR…/{degraded} and GOPR…/sharp"
    folder = request.place(_has_scenes, expected)
    pairs = []
    for scene in _scenes(folder):
        pairs += match_folders(scene / degraded, scene / "sharp", f"{scene.name}/")
    return Found(pairs, clips_in(pairs))


def gopro_fits(root: Path, degraded: str) -> bool:
    places = (root, root / "train", root / "test")
    return any((s / degraded).is_dir() for place in places for s in _scenes(place))


def _scenes(folder: Path) -> list[Path]:
    found = [path for path in folders(folder) if path.name.startswith("GOPR")]
    return [path for path in found if (path / "sharp").is_dir()]


def _has_scenes(folder: Path) -> bool:
    return bool(_scenes(folder))


def find_hide(request: Request) -> Found:
    """The pictures of a split; the targets of both lie in one folder."""
    folder = request.root / request.split
    if not folder.is_dir() or not (request.root / "GT").is_dir():
        raise misfit(request.root, f"{request.split} and GT")
    degraded, targets = pictures_or_misfit(folder), pictures(request.root / "GT")
    matches = match(degraded, targets, stem, stem)
    return Found([Pair(path.stem, path, target) for path, target in matches])


def hide_fits(root: Path) -> bool:
    """Whether GT holds the target of what train or test begins with."""
    if not (root / "GT").is_dir():
        return False
    places = [root / split for split in ("test", "train") if (root / split).is_dir()]
    begins = {path.stem for place in places for path in pictures(place, recursive=True)[:1]}
    return bool(begins.intersection(map(stem, pictures(root / "GT"))))


def find_reds(request: Request, kind: str, scale: int = 1, tenth: bool = False) -> Found:
    """Every frame of every clip; with `tenth`, the split test has frames 9, 19, … of val alone."""
    split = "val" if request.split == "test" else request.split
    asked = replace(request, split=split)
    expected = f"{split}_{kind} and {split}_sharp"
    folder = asked.place(lambda place: (place / f"{split}_sharp").is_dir(), expected)
    pairs = match_folders(folder / f"{split}_{kind}", folder / f"{split}_sharp")
    if tenth and request.split == "test":
        return Found([pair for pair in pairs if pair.name.endswith("9")])
    return Found(pairs, clips_in(pairs), scale=scale)


def reds_fits(root: Path, kind: str) -> bool:
    splits = ("train", "val")
    return any((p / f"{s}_{kind}").is_dir() for s in splits for p in (root, root / s))


def find_dvd(request: Request) -> Found:
    """Every frame of the authors' test videos, or of all others."""
    folder = request.root / request.split
    sorted_by_split = _has_videos(folder)
    if not sorted_by_split:
        folder = _dvd_folder(request.root)
        if request.split == "val" or not _has_videos(folder):
            raise misfit(folder, f"videos with input and GT for the split {request.split}")
    pairs = []
    for video in folders(folder):
        chosen = (video.name in DVD_TEST) == (request.split == "test")
        if (video / "GT").is_dir() and (sorted_by_split or chosen):
            pairs += match_folders(video / "input", video / "GT", f"{video.name}/")
    if not pairs:
        some_videos = "some of " if request.split == "test" else "videos other than "
        raise misfit(folder, some_videos + ", ".join(DVD_TEST))
    return Found(pairs, clips_in(pairs))


def dvd_fits(root: Path) -> bool:
    return _has_videos(root / "quantitative_datasets") or (
        root.resolve().name == "quantitative_datasets" and _has_videos(root)
    )


def _dvd_folder(root: Path) -> Path:
    inside = root / "quantitative_datasets"
    return inside if inside.is_dir() else root


def _has_videos(folder: Path) -> bool:
    return any((v / "input").is_dir() and (v / "GT").is_dir() for v in folders(folder))


def find_realblur(request: Request, camera: str) -> Found:
    """The pairs of a list, whose lines name the sharp picture first."""
    pairs = []
    for target, degraded in listed(request.root / f"RealBlur_{camera}_{request.split}_list.txt"):
        number = target.stem.rpartition("_")[2]
        pairs.append(Pair(f"{target.parent.parent.name}/{number}", degraded, target))
    return Found(pairs)


def realblur_fits(root: Path, camera: str) -> bool:
    return any((root / f"RealBlur_{camera}_{s}_list.txt").is_file() for s in ("train", "test"))


def find_dpdd(request: Request) -> Found:
    """The pictures of both pixel halves together."""
    centre = _dpdd_folder(request.root) / f"{request.split}_c"
    if not (centre / "source").is_dir():
        raise misfit(centre.parent, f"{request.split}_c/source and {request.split}_c/target")
    degraded = pictures_or_misfit(centre / "source")
    targets = _in_order(degraded, centre / "target")
    return Found([Pair(d.stem, d, t) for d, t in zip(degraded, targets, strict=True)])


def find_dpdd_dual(request: Request) -> Found:
    """The left and the right views."""
    base, split = _dpdd_folder(request.root), request.split
    sides = [base / f"{split}_{side}" / "source" for side in "lr"]
    if not all(side.is_dir() for side in sides):
        raise misfit(base, f"{split}_l/source, {split}_r/source and {split}_c/target")
    left, right = (pictures_or_misfit(side) for side in sides)
    views = match(left, right, _view, _view)
    match(right, left, _view, _view)
    folders_of_targets = [base / f"{split}_{side}" / "target" for side in "cl"]
    folder = next((path for path in folders_of_targets if path.is_dir()), folders_of_targets[0])
    targets = _in_order(left, folder)
    pairs = [
        Pair(_view(first), first, target, second)
        for (first, second), target in zip(views, targets, strict=True)
    ]
    return Found(pairs)


def _in_order(degraded: list[Path], folder: Path) -> list[Path]:
    """A target for each picture, in order: the camera numbered each pair's shots in turn."""
    targets = pictures_or_misfit(folder)
    if len(targets) != len(degraded):
        raise FullresError(
            f"{folder}: {len(targets)} pictures, but {degraded[0].parent} has {len(degraded)}; "
            "they belong together in order, so unpack both completely"
        )
    return targets


def _dpdd_folder(root: Path) -> Path:
    inside = (root / "dd_dp_dataset_png", root / "dd_dp_dataset_canon" / "dd_dp_dataset_png")
    return next((path for path in inside if path.is_dir()), root)


def dpdd_fits(root: Path, views: str) -> bool:
    base = _dpdd_folder(root)
    splits = ("train", "val", "test")
    return any(all((base / f"{s}_{v}" / "source").is_dir() for v in views) for s in splits)


def _view(path: Path) -> str:
    """The name that the left and the right view share."""
    return re.sub(r"_[LR]$", "", path.stem)
