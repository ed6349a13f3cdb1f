"""Layouts of sets for removing rain and haze."""

from __future__ import annotations

from pathlib import Path

from fullres.data.folders import plain
from fullres.data.pairing import (
    Found,
    Pair,
    Request,
    listed,
    match,
    match_folders,
    misfit,
    pictures,
    stem,
)

RAIN_TESTS = ("Rain100H", "Rain100L", "Test100", "Test1200", "Test2800")
"""The test sets that go with Rain13k."""


def find_spa(request: Request) -> Found:
    """The pairs of the list, or without it those of the folders `rain` and `gt`."""
    name = "real_world" if request.split == "train" else "real_test_1000"
    if (request.root / f"{name}.txt").is_file():
        lines = listed(request.root / f"{name}.txt")
        return Found([Pair(degraded.stem, degraded, target) for degraded, target in lines])
    folder = request.root / name
    if not folder.is_dir():
        raise misfit(request.root, f"{name}.txt and {name}")
    return Found(match_folders(folder / "rain", folder / "gt"))


def spa_fits(root: Path) -> bool:
    names = ("real_test_1000.txt", "real_world.txt", "real_test_1000/rain")
    return any((root / name).exists() for name in names)


def find_rain13k(request: Request) -> Found:
    """The pairs to train on, or those of all test sets, named `SET/PICTURE`; or of one such set."""
    sets = _rain_train(request.root) if request.split == "train" else []
    if request.split == "test":
        sets = _rain_tests(request.root)
    if not sets:
        expected = "train/input and train/target" if request.split == "train" else "test/SET/input"
        raise misfit(request.root, f"{expected} for the split {request.split}")
    pairs = []
    for folder in sets:
        prefix = f"{folder.name}/" if request.split == "test" and folder != request.root else ""
        pairs += match_folders(folder / "input", folder / "target", prefix)
    return Found(pairs, name=request.root.resolve().name if sets == [request.root] else None)


def _rain_train(root: Path) -> list[Path]:
    places = (root / "train" / "Rain13K", root / "train")
    return [place for place in places if (place / "input").is_dir()][:1]


def _rain_tests(root: Path) -> list[Path]:
    for base in (root / "test", root):
        found = [base / name for name in RAIN_TESTS if (base / name / "input").is_dir()]
        if found:
            return found
    return [root] if root.resolve().name in RAIN_TESTS and (root / "input").is_dir() else []


def rain13k_fits(root: Path) -> bool:
    named = plain(root.resolve().name) == "rain13k"
    return bool(_rain_tests(root)) or (named and bool(_rain_train(root)))


def find_reside(request: Request) -> Found:
    """Each hazy picture with the clear one whose name is its own up to the first underscore."""
    sets = _hazy_sets(request.root, request.split)
    if not sets:
        expected = "ITS or OTS" if request.split == "train" else "indoor or outdoor"
        raise misfit(request.root, f"{expected} with hazy (1400_1.png) and gt or clear (1400.png)")
    pairs = []
    for hazy, clear in sets:
        prefix = "" if hazy.parent == request.root else f"{hazy.parent.name}/"
        matches = match(pictures(hazy), pictures(clear), _before_underscore, stem)
        pairs += [Pair(prefix + path.stem, path, target) for path, target in matches]
    return Found(pairs)


def reside_fits(root: Path) -> bool:
    return any(_hazy_sets(root, split) for split in ("test", "train"))


def _hazy_sets(root: Path, split: str) -> list[tuple[Path, Path]]:
    """Folders of hazy pictures that are named after their clear one, and those of clear ones."""
    tests = ("indoor", "indoor/nyuhaze500", "nyuhaze500", "outdoor", "test")
    places = ("ITS", "OTS", "train") if split == "train" else tests
    bases = (root,) if split == "train" else (root, root / "SOTS")
    found = []
    for place in (*(base / place for base in bases for place in places), root):
        hazy = place / "hazy"
        clear = next((place / c for c in ("gt", "clear", "GT") if (place / c).is_dir()), None)
        if hazy.is_dir() and clear is not None:
            first = [path for path in pictures(hazy)[:1] if "_" in path.stem]
            if first and _before_underscore(first[0]) in map(stem, pictures(clear)):
                found.append((hazy, clear))
    return found


def _before_underscore(path: Path) -> str:
    return path.stem.partition("_")[0]
