"""Data sets on disc: which files belong together, and how their results are usually measured.

>>> print(layouts()["gopro"])
{train,test}/GOPR*/{blur,sharp}/*.png
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from fullres.data.folders import SPLITS
from fullres.data.layouts import LAYOUTS, Layout
from fullres.data.pairing import Block, Clip, Pair, Request, contents, folders, natural, some
from fullres.data.sidd import read_block
from fullres.errors import FullresError

__all__ = ["Block", "Clip", "Dataset", "Pair", "layouts", "open_dataset", "read_block"]


@dataclass(frozen=True)
class Dataset:
    """The files of one split of a data set."""

    name: str
    layout: str
    pairs: tuple[Pair, ...]
    """In natural order of their names."""
    clips: tuple[Clip, ...]
    """The same pairs as videos; empty where they are none."""
    task: str
    protocol: str
    """Name of the usual protocol of evaluation."""
    scale: int
    """Size of the target over that of the degraded picture."""


def layouts() -> dict[str, str]:
    """What each layout expects in a folder, by name; from the most to the least specific."""
    return {layout.name: layout.expects for layout in LAYOUTS}


def open_dataset(
    root: str | os.PathLike[str],
    layout: str = "auto",
    split: str = "test",
    target_folder: str | os.PathLike[str] | None = None,
    scale: int | None = None,
) -> Dataset:
    """Find the pairs of a data set; no picture is read.

    Args:
        root: folder of the data set, or with `target_folder` that of the degraded pictures.
        layout: one of `layouts()`; "auto" takes the most specific that fits.
        split: "train", "val" or "test"; all the same where a set has but one.
        target_folder: folder of the targets.
        scale: which of several scales; for clean pictures, the one to degrade them by.

    Raises:
        FullresError: the folder does not hold what the layout expects, or pictures lack partners.
    """
    folder = Path(root)
    if not folder.is_dir():
        raise FullresError(f"{folder}: no such folder; name the one that holds the data set")
    if split not in SPLITS:
        raise FullresError(f"split={split}: choose one of {', '.join(SPLITS)}")
    if target_folder is not None and layout not in ("auto", "pairs"):
        raise FullresError(
            f"layout={layout}: knows where its targets are; leave out target_folder, or take "
            "layout=pairs"
        )
    chosen = _layout("pairs" if target_folder is not None else layout, folder)
    targets = None if target_folder is None else Path(target_folder)
    try:
        found = chosen.find(Request(folder, split, scale, targets))
    except FullresError as error:
        raise FullresError(f"{error} (layout {chosen.name}: {chosen.expects})") from error
    if scale is not None and found.scale != scale:
        raise FullresError(f"{folder}: its scale is {found.scale}, not {scale}; leave out scale")
    pairs = tuple(sorted(found.pairs, key=lambda pair: natural(pair.name)))
    for one, other in pairwise(pairs):
        if one.name == other.name:
            raise FullresError(f"{one.target} and {other.target} have the same name; take one out")
    return Dataset(
        name=found.name or chosen.title or folder.resolve().name,
        layout=chosen.name,
        pairs=pairs,
        clips=tuple(sorted(found.clips, key=lambda clip: natural(clip.name))),
        task=found.task or chosen.task,
        protocol=found.protocol or chosen.protocol,
        scale=found.scale,
    )


def _layout(name: str, root: Path) -> Layout:
    if name != "auto":
        for layout in LAYOUTS:
            if layout.name == name:
                return layout
        raise FullresError(f"layout={name}: choose auto or one of {', '.join(layouts())}")
    for layout in LAYOUTS:
        if layout.fits(root):
            return layout
    inside = [path.name for path in folders(root)]
    hint = f"open a folder in it, such as {some(inside, 2)}" if inside else "name its layout"
    raise FullresError(
        f"{root}: fits no layout of a data set: expected a folder of pictures, one of degraded "
        f"pictures beside one of targets, or a set as its owners lay it out; found "
        f"{contents(root)}; {hint}"
    )
