"""Examples of a data set: the files of each, and which degraded picture belongs to which target."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fullres.errors import FullresError
from fullres.io.probe import SUFFIXES

_ROLES = (
    "blurred|blurry|blur|noisy|noise|hazy|haze|norain|rainy|rain|degraded|input|lq|lr|"
    "target|sharp|clean|clear|gt|hq|hr|x[234568]"
)
_ROLE = re.compile(rf"(?:^|[ _.-]|(?<=\d))(?:{_ROLES})(?=$|[ _.-])", re.IGNORECASE)


@dataclass(frozen=True)
class Block:
    """Where a picture lies in an array of pictures (image, block, height, width, colour)."""

    variable: str
    """Name of the array in its file."""
    image: int
    block: int


@dataclass(frozen=True)
class Pair:
    """The files of one example."""

    name: str
    """Unique in its data set; a path without suffix, with slashes."""
    degraded: Path | None
    """The picture to restore, the left view of a dual-pixel pair; None: degrade the target."""
    target: Path
    right: Path | None = None
    """The right view of a dual-pixel pair."""
    degraded_key: Block | None = None
    """Where the degraded picture lies, if its file holds many."""
    target_key: Block | None = None


@dataclass(frozen=True)
class Clip:
    """The frames of one video, in order."""

    name: str
    degraded: tuple[Path, ...]
    target: tuple[Path, ...]


@dataclass(frozen=True)
class Request:
    """What is asked of a layout."""

    root: Path
    split: str = "test"
    scale: int | None = None
    target_folder: Path | None = None

    def place(self, holds: Callable[[Path], bool], expected: str) -> Path:
        """The split's folder, or else the root, whichever holds the pictures.

        Raises:
            FullresError: neither does.
        """
        of_split = self.root / self.split
        for folder in (of_split, self.root):
            if holds(folder):
                return folder
        folder = of_split if of_split.is_dir() else self.root
        raise misfit(folder, f"{expected} for the split {self.split}")


@dataclass(frozen=True)
class Found:
    """What a layout found; None where what the layout says of itself holds."""

    pairs: list[Pair]
    clips: list[Clip] = field(default_factory=list)
    name: str | None = None
    task: str | None = None
    protocol: str | None = None
    scale: int = 1


def natural(path: str | Path) -> tuple[list[str | int], str]:
    """Sorting key by which numbers go by value: `2.png` before `10.png`.

    >>> sorted(["10.png", "2.png", "a1.png"], key=natural)
    ['2.png', '10.png', 'a1.png']
    """
    text = path if isinstance(path, str) else path.as_posix()
    parts: list[str | int] = list(re.split(r"(\d+)", text.casefold()))
    parts[1::2] = [int(number) for number in parts[1::2]]
    return parts, text


def pictures(folder: Path, recursive: bool = False) -> list[Path]:
    """The pictures in a folder, hidden ones left out, in natural order."""
    found = folder.rglob("*") if recursive else folder.iterdir()
    kept = [
        path
        for path in found
        if path.suffix.lower() in SUFFIXES
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
        and path.is_file()
    ]
    return sorted(kept, key=natural)


def folders(folder: Path) -> list[Path]:
    """The folders in a folder, hidden ones left out, in natural order; none if it is missing."""
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")]
    return sorted(found, key=natural)


def some(names: Iterable[str], limit: int = 5) -> str:
    """A few names of many, for a message.

    >>> some(["a", "b", "c"], limit=2)
    'a, b and 1 more'
    """
    every = list(names)
    more = f" and {len(every) - limit} more" if len(every) > limit else ""
    return ", ".join(every[:limit]) + more


def contents(folder: Path) -> str:
    """A few names of what a folder holds, its folders first."""
    if not folder.is_dir():
        return "no such folder"
    found = sorted(folder.iterdir(), key=lambda path: (path.is_file(), natural(path)))
    names = [path.name + ("" if path.is_file() else "/") for path in found]
    return some(name for name in names if not name.startswith(".")) or "nothing"


def misfit(folder: Path, expected: str) -> FullresError:
    """The error of a folder that does not hold what it should."""
    return FullresError(f"{folder}: expected {expected}; found {contents(folder)}")


def bare(stem: str) -> str:
    """A stem without the words that tell the degraded picture from the target.

    >>> bare("norain-1x2"), bare("001gt"), bare("babyx4"), bare("12_outdoor_hazy"), bare("blurb_7")
    ('1', '001', 'baby', '12_outdoor', 'blurb_7')
    """
    return _ROLE.sub("", re.sub(r"[xX][234568]$", "", stem)).strip(" _.-")


def match(
    degraded: Sequence[Path],
    targets: Sequence[Path],
    key: Callable[[Path], str],
    target_key: Callable[[Path], str],
) -> list[tuple[Path, Path]]:
    """Each degraded picture with the target that has the same key.

    Raises:
        FullresError: a degraded picture has no target, or more than one.
    """
    partners: dict[str, list[Path]] = {}
    for path in targets:
        partners.setdefault(target_key(path), []).append(path)
    alone = [path for path in degraded if key(path) not in partners]
    if alone:
        raise FullresError(
            f"{alone[0].parent}: no partner in {_where(targets)} for "
            f"{some(path.name for path in alone)}; names must be equal but for a word such as "
            "blur, gt or x2: add the partner or take the picture out"
        )
    for path in degraded:
        several = partners[key(path)]
        if len(several) > 1:
            raise FullresError(
                f"{path}: {some(map(str, several))} could each be its partner; take all but one out"
            )
    return [(path, partners[key(path)][0]) for path in degraded]


def match_folders(degraded: Path, target: Path, prefix: str = "") -> list[Pair]:
    """One-to-one matches of all pictures in two folders and in the folders within them.

    Names are equal, or equal but for a word such as `blur`, `gt` or `x2`.

    Raises:
        FullresError: a folder is missing or has no pictures, or a picture has no partner, or more
            than one.
    """
    found = pictures_or_misfit(degraded), pictures_or_misfit(target)
    first, second = _keys(found[0], degraded, str), _keys(found[1], target, str)
    names = second
    if set(first.values()) != set(second.values()):
        first, second = _keys(found[0], degraded, bare), _keys(found[1], target, bare)
    matches = match(found[0], found[1], first.__getitem__, second.__getitem__)
    match(found[1], found[0], second.__getitem__, first.__getitem__)
    return [Pair(prefix + names[partner], path, partner) for path, partner in matches]


def pictures_or_misfit(folder: Path) -> list[Path]:
    """The pictures in a folder and in the folders within it.

    Raises:
        FullresError: there are none.
    """
    found = pictures(folder, recursive=True) if folder.is_dir() else []
    if not found:
        raise misfit(folder, "pictures")
    return found


def listed(path: Path) -> Iterator[tuple[Path, Path]]:
    """The two pictures of each line of a list; they lie beside the list.

    Raises:
        FullresError: the list or a picture is missing, or a line does not name two.
    """
    if not path.is_file():
        raise misfit(path.parent, path.name)
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        names = line.split()
        if len(names) != 2:
            raise FullresError(f"{path}: line {number} should name two pictures, not: {line}")
        first, second = (path.parent / name.lstrip("./") for name in names)
        missing = [picture for picture in (first, second) if not picture.is_file()]
        if missing:
            raise FullresError(
                f"{missing[0]}: no such file, named in line {number} of {path.name}; unpack the "
                "pictures beside their list"
            )
        yield first, second


def clips_in(pairs: Sequence[Pair]) -> list[Clip]:
    """The clips of frames that are named `clip/frame`, in their order."""
    frames: dict[str, list[tuple[Path, Path]]] = {}
    for pair in pairs:
        if pair.degraded is not None:
            clip, _, _ = pair.name.rpartition("/")
            frames.setdefault(clip, []).append((pair.degraded, pair.target))
    return [
        Clip(name, tuple(degraded for degraded, _ in both), tuple(target for _, target in both))
        for name, both in frames.items()
    ]


def stem(path: Path) -> str:
    """The name of a file without its suffix."""
    return path.stem


def _keys(paths: Sequence[Path], folder: Path, reduce: Callable[[str], str]) -> dict[Path, str]:
    return {
        path: (path.relative_to(folder).parent / reduce(path.stem)).as_posix() for path in paths
    }


def _where(paths: Sequence[Path]) -> str:
    return str(paths[0].parent) if paths else "an empty folder"
