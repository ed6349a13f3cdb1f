"""Ways to run a network on a picture larger than its crops: whole, local, patch by patch.

As in table A1 of *Improving Image Restoration by Revisiting Global Information Aggregation*
(Chu et al., ECCV 2022), with a measure of the seams and the crops where they are worst.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from fullres.data.datasets import Dataset
from fullres.evaluation.examples import condition_for, load_example
from fullres.evaluation.modes import LOCAL, PATCHES, Mode, open_modes, overlap_of
from fullres.evaluation.results import GLOBAL, number, signed, title
from fullres.feed import as_picture
from fullres.metrics import Protocol
from fullres.patches import seams
from fullres.restore import Size, settings_for
from fullres.studies.figures import check_matplotlib, new_figure
from fullres.studies.pictures import (
    AnyNetwork,
    Data,
    as_network_takes,
    dataset_of,
    network_of,
    protocol_of,
    side_of,
)
from fullres.studies.sheet import Sheet, difference, save

if TYPE_CHECKING:
    from matplotlib.figure import Figure

log = logging.getLogger(__name__)

OVERLAPS = (0, 16, 128)
"""Of the paper's patches, in pixels."""
OVERLAPPED = 256
"""Side of the paper's patches."""
SHOWN = 128
"""Side of the crops in the picture, in pixels."""
INPUT, TARGET = "input", "target"


@dataclass(frozen=True)
class Row:
    """One way over all pictures."""

    method: str
    """As `fullres.evaluate.evaluate` calls its modes: global, local, patches-16, …"""
    overlap: int | None
    """Of the patches, in pixels."""
    values: Mapping[str, float]
    """Means of the protocol's metrics over the pictures."""
    gain: float
    """Mean over the pictures of what it gains over global in the first metric."""
    seconds_per_megapixel: float
    seams: float
    """How much more the error jumps at the borders of patches than elsewhere
    (`fullres.patches.seams`), over the same of the whole picture's result: 1 without seams.
    Without patches: at the borders that patches without overlap would have."""


@dataclass(frozen=True)
class Crops:
    """Where the seams are worst."""

    name: str
    """Of the picture."""
    lines: tuple[tuple[int, ...], tuple[int, ...]]
    """Rows and columns of the crop where a patch begins."""
    shown: Mapping[str, Tensor]
    """By method, and input and target: (C, h, w) in [0, 1]."""
    seams: Mapping[str, float]
    """Of the whole picture, by method."""


@dataclass(frozen=True)
class Methods:
    """Several ways to run a network, side by side."""

    network: str
    data: str
    pictures: int
    patch: tuple[int, int]
    """Height and width of the patches: the training size."""
    metric: str
    """The protocol's first."""
    rows: tuple[Row, ...]
    crops: Crops = field(repr=False)

    def __str__(self) -> str:
        return _sheet(self).body


@dataclass(frozen=True)
class _Found:
    """One picture restored in one way."""

    values: Mapping[str, float]
    seconds: float
    megapixels: float
    seams: float


def methods(
    network: AnyNetwork,
    data: Data,
    overlaps: Sequence[int] | None = None,
    *,
    window: Size | None = None,
    train_size: Size | None = None,
    protocol: str | Protocol | None = None,
    layout: str = "auto",
    split: str = "test",
    noise_level: float | None = None,
    jpeg_quality: int | None = None,
    output: str | os.PathLike[str] | None = None,
    device: str = "auto",
    dtype: str = "auto",
) -> Methods:
    """Restore a data set whole, local, and in patches of the training size with several overlaps.

    Each picture is restored in all ways before the next one is, in turning order, so that times
    compare; the first part of each way is not timed.

    Args:
        network: an open network (left unchanged), a bundled one, or a checkpoint.
        data: a data set or its folder; pairs of degraded pictures and targets.
        overlaps: of the patches in pixels; if None the paper's, 0, 16 and 128 of 256, in
            proportion to the training size.
        window: local window in pixels; 1.5 × the training size if None.
        train_size: of the crops; what the network says if None.
        protocol: as in `fullres.evaluate.evaluate`.
        layout: likewise.
        split: likewise.
        noise_level: likewise.
        jpeg_quality: likewise.
        output: folder for `methods.md`, `.csv` and `.png`; nothing is written if None.
        device: as in `fullres.restore.restore`.
        dtype: likewise.

    Raises:
        FullresError: an overlap is as large as a patch, or as `fullres.evaluate.evaluate`.
    """
    if output is not None:
        check_matplotlib()
    opened = network_of(network)
    dataset = dataset_of(data, layout, split, opened)
    settings = settings_for(opened, True, window, train_size)
    assert settings is not None
    patch = side_of(settings.train_size)
    if overlaps is None:
        overlaps = [round(overlap * min(patch) / OVERLAPPED) for overlap in OVERLAPS]
    patchwise = [f"{PATCHES}-{n}" if n else PATCHES for n in dict.fromkeys(overlaps)]
    modes = [GLOBAL, LOCAL, *patchwise]
    condition = condition_for(opened, dataset, None, noise_level, jpeg_quality)
    how = protocol_of(protocol, dataset)
    with open_modes(opened, modes, settings, patch, (device, dtype, None)) as running:
        found, crops = _run(running, dataset, patch, how, condition)
    rows = tuple(_row(mode, found, how.metrics[0]) for mode in modes)
    name, count = opened.spec.architecture, len(dataset.pairs)
    result = Methods(name, dataset.name, count, patch, how.metrics[0], rows, crops)
    if output is not None:
        save(output, "methods", _sheet(result), rows, figure(result))
    return result


@torch.inference_mode()
def _run(
    running: Mapping[str, Mode],
    dataset: Dataset,
    patch: tuple[int, int],
    how: Protocol,
    condition: float | None,
) -> tuple[dict[str, list[_Found]], Crops]:
    """Every picture in every way, and the crops of the picture whose seams are worst."""
    found: dict[str, list[_Found]] = {mode: [] for mode in running}
    spec = running[GLOBAL].restorer.spec
    worst = next((mode for mode in running if overlap_of(mode) is not None), LOCAL)
    crops = None
    for index, pair in enumerate(dataset.pairs):
        log.info("%s", pair.name)
        example = load_example(pair, spec.scale, None, 0)
        x = as_network_takes(example, spec, condition)
        pictures, seconds = {}, {}
        for mode in list(running)[:: 1 if index % 2 == 0 else -1]:
            if index == 0:
                running[mode].warm_up(x, example.path)
            restored = running[mode].run(x, example.path, lambda _: None)
            pictures[mode] = as_picture(restored.output, len(example.degraded) == 1).clamp(0, 1)
            seconds[mode] = restored.seconds
        for mode, each in found.items():
            values = how.measure(pictures[mode], example.target, spec.scale)
            strength = _seams(pictures, mode, example.target, patch, spec.scale)
            each.append(_Found(values, seconds[mode], x.shape[-2] * x.shape[-1] / 1e6, strength))
        here = {mode: each[-1].seams for mode, each in found.items()}
        if crops is None or here[worst] > crops.seams[worst]:
            shown = {INPUT: example.shown, **{m: pictures[m] for m in running}}
            shown[TARGET] = example.target
            size = (patch[0] * spec.scale, patch[1] * spec.scale)
            box = worst_box(pictures[worst] - pictures[GLOBAL], size, SHOWN)
            crops = _crops(example.name, shown, box, size, here)
    assert crops is not None
    return found, crops


def _seams(
    pictures: Mapping[str, Tensor], mode: str, target: Tensor, patch: tuple[int, int], scale: int
) -> float:
    """The seams of a mode over those of the whole picture's result at the same borders."""
    size, overlap = (patch[0] * scale, patch[1] * scale), (overlap_of(mode) or 0) * scale
    here, whole = (seams(pictures[each], target, size, overlap) for each in (mode, GLOBAL))
    return 1.0 if here == whole else here / whole


def _row(mode: str, found: Mapping[str, Sequence[_Found]], metric: str) -> Row:
    here, base = found[mode], found[GLOBAL]
    both = zip(here, base, strict=True)
    gains = [difference(a.values[metric], b.values[metric]) for a, b in both]
    return Row(
        mode,
        overlap_of(mode),
        {name: fmean(each.values[name] for each in here) for name in here[0].values},
        fmean(gains),
        sum(each.seconds for each in here) / sum(each.megapixels for each in here),
        fmean(each.seams for each in here),
    )


# Where the seams are worst --------------------------------------------------------------------


def _crops(
    name: str,
    shown: Mapping[str, Tensor],
    box: tuple[slice, slice],
    size: tuple[int, int],
    seams: Mapping[str, float],
) -> Crops:
    rows, columns = (
        tuple(line - part.start for line in range(part.start, part.stop) if line and line % n == 0)
        for part, n in zip(box, size, strict=True)
    )
    crops = {each: picture[:, box[0], box[1]].clone() for each, picture in shown.items()}
    return Crops(name, (rows, columns), crops, dict(seams))


def worst_box(x: Tensor, size: tuple[int, int], side: int) -> tuple[slice, slice]:
    """Rows and columns of the square where (C, H, W) jumps most at borders of patches.

    A jump counts by how much it exceeds those three pixels away. The middle of the picture where
    one patch covers it.

    >>> x = torch.zeros(1, 64, 64)
    >>> x[:, 40:, 32:] = 1
    >>> worst_box(x, (32, 32), 16)
    (slice(40, 56, None), slice(24, 40, None))
    """
    lengths = (x.shape[-2], x.shape[-1])
    sides = [min(side, length) for length in lengths]
    best, place = -1.0, [(n - s) // 2 for n, s in zip(lengths, sides, strict=True)]
    for axis in (0, 1):
        across, along = lengths[axis], lengths[1 - axis]
        jumps = x.diff(dim=axis + 1).abs().mean(0)
        jumps = jumps if axis == 0 else jumps.T  # (across - 1, along)
        for line in range(size[axis], across - 3, size[axis]):
            beside = (jumps[max(line - 4, 0)] + jumps[min(line + 2, across - 2)]) / 2
            parts = (jumps[line - 1] - beside).unfold(0, sides[1 - axis], 8).mean(1)
            strength, at = float(parts.max()), int(parts.argmax()) * 8
            if strength > best:
                best = strength
                start = min(max(line - sides[axis] // 2, 0), across - sides[axis])
                place = [start, min(at, along)] if axis == 0 else [min(at, along), start]
    rows, columns = (slice(p, p + s) for p, s in zip(place, sides, strict=True))
    return rows, columns


# Table and picture ----------------------------------------------------------------------------


def _sheet(found: Methods) -> Sheet:
    names = list(found.rows[0].values)
    cells = [
        (
            _label(row.method),
            *(number(row.values[name], name) for name in names),
            "—" if row.method == GLOBAL else signed(row.gain, found.metric),
            f"{row.seconds_per_megapixel:.3f}",
            f"{row.seams:.2f}",
        )
        for row in found.rows
    ]
    note = (
        f"Means over {found.pictures} pictures; patches of {found.patch[0]} × {found.patch[1]}, "
        "the training size. Seams: the mean jump of the error across borders of patches over that "
        "elsewhere, over the same of the whole picture's result: 1 without seams."
    )
    header = ("method", *map(title, names), "gain", "s/MP", "seams")
    return Sheet(f"Ways to run {found.network} on {found.data}", header, cells, [note])


def _label(method: str) -> str:
    overlap = overlap_of(method) if method not in (INPUT, TARGET) else None
    if overlap is None:
        return "whole picture" if method == GLOBAL else method
    return f"patches, overlap {overlap}"


def figure(found: Methods) -> Figure:
    """Crops where the seams are worst, and what sets them apart from the whole picture's result.

    Raises:
        FullresError: matplotlib is not installed.
    """
    crops = found.crops
    drawn = new_figure(1.7 * len(crops.shown), 4)
    panels = drawn.subplots(2, len(crops.shown), squeeze=False)
    changes = {
        name: (crop - crops.shown[GLOBAL]).mean(0).numpy()
        for name, crop in crops.shown.items()
        if name not in (INPUT, GLOBAL, TARGET)
    }
    top = max(float(np.quantile(np.abs(list(changes.values())), 0.99)), 1e-6)
    for column, (name, crop) in enumerate(crops.shown.items()):
        above, below = panels[:, column]
        above.set_title(_label(name), fontsize=9)
        above.imshow(_seen(crop), cmap="gray", vmin=0, vmax=1)
        if name in changes:
            below.imshow(changes[name], cmap="RdBu", vmin=-top, vmax=top)
            below.set_xlabel(f"seams {crops.seams[name]:.2f}", fontsize=9)
        else:
            below.set_axis_off()
        for axes in (above, below):
            axes.set_yticks(crops.lines[0], labels=[])
            axes.set_xticks(crops.lines[1], labels=[])
    beside = panels[1, list(crops.shown).index(GLOBAL)]
    words = f"what sets them apart\nfrom the whole picture:\n−{top:.2g} (red)\nto {top:.2g} (blue)"
    beside.text(0.5, 0.5, words, transform=beside.transAxes, ha="center", va="center", fontsize=9)
    drawn.suptitle(f"{crops.name}: ticks are where patches without overlap begin", fontsize=9)
    return drawn


def _seen(crop: Tensor) -> Any:
    crop = crop.clamp(0, 1)
    return (crop.permute(1, 2, 0) if len(crop) == 3 else crop[0]).numpy()
