"""Distributions of what global operations aggregate: over training crops and over full pictures.

As in figures 3a and A3 of *Improving Image Restoration by Revisiting Global Information
Aggregation* (Chu et al., ECCV 2022), with a distance between the distributions.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch

from fullres.data.pairing import Pair
from fullres.errors import FullresError
from fullres.feed import Given
from fullres.local import Local
from fullres.networks.spec import Spec
from fullres.restore import Restorer, Size, ready, settings_for
from fullres.studies.aggregates import Inputs, Key, Values, collect, covered_operations
from fullres.studies.figures import (
    COLOURS,
    check_matplotlib,
    new_figure,
    paired_bars,
    plain,
    shortened,
)
from fullres.studies.pictures import (
    AnyNetwork,
    Data,
    check_memory,
    dataset_of,
    degraded_of,
    input_of,
    network_of,
    picture_size,
    side_of,
)
from fullres.studies.sheet import Sheet, save

if TYPE_CHECKING:
    from matplotlib.figure import Figure, SubFigure

log = logging.getLogger(__name__)

POSITIONS = 4096
"""That all pictures together give to the local statistics of one operation, about."""
BATCH = 8
"""Crops that run at a time."""
DRAWS = 10
"""Of as many crops as there are pictures, for the distance by chance."""
BARS = 40
"""Most groups of bars in the picture."""


@dataclass(frozen=True)
class Row:
    """One statistic of one global operation."""

    operation: str
    """Name of the module."""
    kind: str
    statistic: str
    """mean, standard deviation or maximum."""
    channels: int
    """That vary over the training crops; the distances are means over these."""
    whole: float
    """Distance of the statistics of full pictures, global, from those of training crops."""
    local: float
    """Distance of the statistics of full pictures, local, from those of training crops."""
    chance: float
    """Distance of as many training crops as there are pictures from all of them, on average."""
    whole_ks: float
    """Largest difference of the cumulative distributions, global from training, 0 to 1."""
    local_ks: float
    """Largest difference of the cumulative distributions, local from training, 0 to 1."""


@dataclass(frozen=True)
class Samples:
    """Values of one statistic, each (number, channels)."""

    training: Values
    whole: Values
    local: Values


@dataclass(frozen=True)
class Statistics:
    """Distances between distributions, in standard deviations over the training crops."""

    network: str
    local: Local
    crops: int
    pictures: int
    rows: tuple[Row, ...]
    """In the order in which the network runs them."""
    not_covered: Mapping[str, str]
    """Global operations without a row, and why."""
    samples: Mapping[Key, Samples] = field(repr=False)
    """By operation and statistic."""

    def __str__(self) -> str:
        return _sheet(self).body


def statistics(
    network: AnyNetwork,
    data: Data,
    training: Data | None = None,
    *,
    layout: str = "auto",
    split: str = "test",
    train_size: Size | None = None,
    window: Size | None = None,
    crops: int = 500,
    seed: int = 0,
    layer: str | None = None,
    output: str | os.PathLike[str] | None = None,
    bayer: str | None = None,
    noise_level: float | None = None,
    jpeg_quality: int | None = None,
    device: str = "auto",
    dtype: str = "auto",
) -> Statistics:
    """Compare what global operations aggregate over training crops and over full pictures.

    The statistic of a pooling is what it gives; that of a norm is the mean and the standard
    deviation that it normalises by, of each channel or group. The distance between two
    distributions is the 1-D Wasserstein distance of a channel, over the channel's standard
    deviation over the training crops, averaged over channels; the Kolmogorov-Smirnov distance is
    given beside it, which a few far values do not move. Local statistics are those of the
    converted network, at positions evenly spaced over each picture.

    Args:
        network: an open network (left unchanged), a bundled one, or a checkpoint.
        data: the full pictures: a data set or its folder, whose degraded pictures are taken, or a
            folder of single pictures.
        training: the same, to cut the training crops from; the training split of `data` if None.
        layout: of `data`, as in `fullres.evaluate.evaluate`.
        split: of the full pictures; that of `training` is "train".
        train_size: of the crops; what the network says if None.
        window: of the local statistics in pixels; 1.5 × the training size if None.
        crops: how many are cut, at random places.
        seed: of those places.
        layer: operation whose distributions are drawn; the one with the largest distance if None.
        output: folder for `statistics.md`, `.csv` and `.png`; nothing is written if None.
        bayer: as in `fullres.restore.restore`.
        noise_level: likewise.
        jpeg_quality: likewise.
        device: likewise.
        dtype: likewise.

    Raises:
        FullresError: the network has no such operation, its training size is not known, a picture
            does not fit the network or memory, or none is as large as a crop.
    """
    if output is not None:
        check_matplotlib()
    opened = network_of(network)
    settings = settings_for(opened, True, window, train_size)
    assert settings is not None
    covered, not_covered = covered_operations(opened.module, settings)
    if layer is not None and layer not in covered:
        raise FullresError(f"layer={layer}: choose one of {', '.join(covered)}")
    full = dataset_of(data, layout, split, opened).pairs
    if training is None:
        source = dataset_of(data, layout, "train", opened).pairs
    else:
        source = dataset_of(training, "auto", "train", opened).pairs
    side = min(max(math.isqrt(POSITIONS // len(full)), 2), 16)
    spec = opened.spec
    given = Given(bayer, noise_level, jpeg_quality, views=spec.views == 2)
    with ready(opened, None, device, dtype) as restorer:
        log.info("statistics of %d training crops", crops)
        cut = _crops(source, settings, crops, seed, given, spec)
        of_crops = collect(restorer, covered, cut, None)
        log.info("statistics of %d full pictures, global", len(full))
        of_whole = collect(restorer, covered, _whole(full, restorer, given), None)
    with ready(opened, settings, device, dtype) as restorer:
        log.info("statistics of %d full pictures, local", len(full))
        of_parts = collect(restorer, covered, _whole(full, restorer, given), side)
    samples = {key: Samples(of_crops[key], of_whole[key], of_parts[key]) for key in of_crops}
    rows = tuple(_row(key, covered[key[0]].kind, each, seed) for key, each in samples.items())
    name = spec.architecture
    found = Statistics(name, settings, crops, len(full), rows, not_covered, samples)
    if output is not None:
        save(output, "statistics", _sheet(found), rows, figure(found, layer))
    return found


# What the network runs on ----------------------------------------------------------------------


def _whole(pairs: Sequence[Pair], restorer: Restorer, given: Given) -> Inputs:
    largest = 0
    for pair in pairs:
        path, x = degraded_of(pair), input_of(pair, restorer.spec, given)
        if x.shape[-2] * x.shape[-1] > largest:
            largest = x.shape[-2] * x.shape[-1]
            check_memory(restorer, (x.shape[-2], x.shape[-1]), path)
        for index in range(len(x)):
            yield x[index : index + 1], path


def _crops(
    pairs: Sequence[Pair], settings: Local, number: int, seed: int, given: Given, spec: Spec
) -> Inputs:
    """Random crops of the training size in batches; every pixel of the pictures is as likely."""
    height, width = side_of(settings.train_size)
    sizes = np.array([picture_size(degraded_of(pair)) for pair in pairs])
    fits = (sizes[:, 0] >= height) & (sizes[:, 1] >= width)
    if not fits.any():
        raise FullresError(
            f"{degraded_of(pairs[0]).parent}: no picture holds a crop of {height} × {width} "
            "pixels, the training size; give larger pictures to cut the crops from"
        )
    random = np.random.default_rng(seed)
    shares = sizes.prod(1) * fits
    step = 2 if given.bayer else 1  # a mosaic's colours stay where they are
    for index, times in enumerate(random.multinomial(number, shares / shares.sum())):
        if not times:
            continue
        x = input_of(pairs[index], spec, given)
        rows, columns = (
            step * random.integers((length - side) // step + 1, size=times)
            for length, side in zip(x.shape[-2:], (height, width), strict=True)
        )
        crops = torch.cat(
            [x[..., r : r + height, c : c + width] for r, c in zip(rows, columns, strict=True)]
        )
        for start in range(0, len(crops), BATCH):
            yield crops[start : start + BATCH], degraded_of(pairs[index])


# Distances ------------------------------------------------------------------------------------


def wasserstein(a: Values, b: Values) -> Values:
    """1-D Wasserstein distance of the columns of two arrays, (n, C) and (m, C) to (C,).

    >>> wasserstein(np.array([[0.0], [2.0]]), np.array([[1.0], [3.0], [3.0], [5.0]]))
    array([2.])
    """
    differences, widths = _cumulative(a, b)
    distance: Values = (differences * widths).sum(0)
    return distance


def kolmogorov_smirnov(a: Values, b: Values) -> Values:
    """Largest difference of the columns' cumulative distributions, (n, C) and (m, C) to (C,).

    Between 0 and 1; unlike the Wasserstein distance it does not grow with a few far values.

    >>> kolmogorov_smirnov(np.array([[0.0], [2.0]]), np.array([[1.0], [3.0], [3.0], [5.0]]))
    array([0.75])
    """
    differences, widths = _cumulative(a, b)
    distance: Values = np.where(widths > 0, differences, 0).max(0)
    return distance


def _cumulative(a: Values, b: Values) -> tuple[Values, Values]:
    """Between neighbouring values: how much the cumulative distributions differ; how far apart."""
    both = np.concatenate([a, b])
    order = both.argsort(0)
    steps = np.where(order < len(a), 1 / len(a), -1 / len(b)).cumsum(0)
    widths = np.diff(np.take_along_axis(both, order, 0), axis=0)
    return np.abs(steps[:-1]), widths


def _row(key: Key, kind: str, samples: Samples, seed: int) -> Row:
    training = samples.training
    spread = training.std(0)
    varies = spread > 1e-6 * np.abs(training).max(0)
    channels = int(varies.sum())
    if not channels:  # dead in training: there is nothing to measure by
        return Row(key[0], kind, key[1], 0, *[math.nan] * 5)
    training, spread = training[:, varies], spread[varies]

    def distance(values: Values) -> float:
        return float((wasserstein(training, values) / spread).mean())

    random = np.random.default_rng(seed)
    draws = [
        distance(training[random.integers(len(training), size=len(samples.whole))])
        for _ in range(DRAWS)
    ]
    full = [samples.whole[:, varies], samples.local[:, varies]]
    apart = [float(kolmogorov_smirnov(training, values).mean()) for values in full]
    chance = float(np.mean(draws))
    whole, local = map(distance, full)
    return Row(key[0], kind, key[1], channels, whole, local, chance, *apart)


# Table and picture ----------------------------------------------------------------------------


def _sheet(found: Statistics) -> Sheet:
    notes = [
        "Distances from the training crops, in standard deviations of a channel over them, mean "
        f"over channels: {found.crops} crops of {_pixels(found.local.train_size)}, "
        f"{found.pictures} full pictures, windows of {_pixels(found.local.window)}. Chance: as "
        "many training crops as there are pictures, drawn at random. KS: the largest difference of "
        "the cumulative distributions, mean over channels."
    ]
    if found.not_covered:
        listed = "; ".join(f"{name} ({reason})" for name, reason in found.not_covered.items())
        notes.append(f"Not covered: {listed}.")
    return Sheet(
        f"What {found.network} aggregates",
        ("operation", "kind", "statistic", "global", "local", "chance", "global KS", "local KS"),
        [
            (
                row.operation or "(the network)",
                row.kind,
                row.statistic,
                *(f"{value:.2f}" for value in _distances(row)),
            )
            for row in found.rows
        ],
        notes,
    )


def _distances(row: Row) -> tuple[float, ...]:
    return row.whole, row.local, row.chance, row.whole_ks, row.local_ks


def _pixels(size: object) -> str:
    return " × ".join(map(str, size)) if isinstance(size, tuple) else str(size)


def figure(found: Statistics, layer: str | None = None) -> Figure:
    """Distributions of one channel beside the distances of all operations.

    Args:
        found: what `statistics` returned.
        layer: operation that the channel is of; the one with the largest distance if None. The
            channel is the one whose distance is nearest to the operation's.

    Raises:
        FullresError: there is no such operation, or matplotlib is not installed.
    """
    rows = [row for row in found.rows if layer in (None, row.operation)]
    if not rows:
        known = dict.fromkeys(row.operation for row in found.rows)
        raise FullresError(f"layer={layer}: choose one of {', '.join(known)}")
    shown = sorted(found.rows, key=lambda row: -_known(row.whole))[:BARS]
    bars = [row for row in found.rows if row in shown]
    drawn = new_figure(11, max(4.0, 1.2 + 0.28 * len(bars)))
    grid = drawn.add_gridspec(1, 2, width_ratios=(1, 1.2))
    left, right = (drawn.add_subfigure(grid[0, column]) for column in (0, 1))
    _draw_channel(left, found, max(rows, key=lambda row: _known(row.whole)))
    axes = plain(
        right.subplots(),
        f"Distance from training crops{f', the {BARS} largest' if len(found.rows) > BARS else ''}",
        "Kolmogorov-Smirnov distance",
    )
    labels = [f"{shortened(row.operation or '(the network)')}, {row.statistic}" for row in bars]
    values = {
        "global": [row.whole_ks for row in bars],
        "local": [row.local_ks for row in bars],
    }
    paired_bars(axes, labels, values)
    return drawn


def _known(value: float) -> float:
    return -1.0 if math.isnan(value) else value


def _draw_channel(part: SubFigure, found: Statistics, row: Row) -> None:
    samples = found.samples[row.operation, row.statistic]
    spread = samples.training.std(0).clip(1e-12)
    distances = wasserstein(samples.training, samples.whole) / spread
    varies = spread > 1e-6 * np.abs(samples.training).max(0)
    channel = int(np.where(varies, np.abs(distances - row.whole), np.inf).argmin())
    sets = {
        "training": (f"{found.crops} training crops", samples.training),
        "global": (f"{found.pictures} full pictures, global", samples.whole),
        "local": (f"{found.pictures} full pictures, local", samples.local),
    }
    every = np.concatenate([values[:, channel] for _, values in sets.values()])
    bins = np.linspace(every.min(), every.max(), 41) if np.ptp(every) else 1
    panels = part.subplots(3, 1, sharex=True)
    for axes, (name, (title, values)) in zip(panels, sets.items(), strict=True):
        axes.hist(values[:, channel], bins, density=True, color=COLOURS[name])
        plain(axes, title).set_yticks([])
    name = shortened(row.operation or "(the network)")
    panels[-1].set_xlabel(f"{name}: {row.statistic} of channel {channel}", fontsize=9)
