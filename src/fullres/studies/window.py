"""How the size of the local window decides the gain, on pictures that did not choose it.

As in figure 3b of *Improving Image Restoration by Revisiting Global Information Aggregation*
(Chu et al., ECCV 2022).
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import TYPE_CHECKING

import numpy as np

from fullres.errors import FullresError
from fullres.evaluate import evaluate
from fullres.evaluation.results import GLOBAL, number, signed, title
from fullres.local import Local, convert
from fullres.metrics import Protocol
from fullres.restore import Size, settings_for
from fullres.studies.figures import (
    BLUE,
    GREY,
    LEAST_SPAN,
    RED,
    at_least,
    check_matplotlib,
    new_figure,
    plain,
)
from fullres.studies.pictures import AnyNetwork, Data, dataset_of, network_of, protocol_of
from fullres.studies.sheet import Sheet, difference, save

if TYPE_CHECKING:
    from matplotlib.figure import Figure

log = logging.getLogger(__name__)

FACTORS = (0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 3.0, 4.0)
"""Sides of windows over the training size."""


@dataclass(frozen=True)
class Row:
    """One window over all pictures."""

    factor: float | None
    """Its side over the training size; None for the network as it is, over the whole picture."""
    window: tuple[int, int] | None
    """Height and width in pixels."""
    value: float
    """Mean of the metric over the pictures."""
    gain: float
    """Mean over the pictures of what it gains over the network as it is."""
    spread: float
    """Standard deviation of the gain over the pictures."""
    least: float
    """Gain of the picture that gains least."""
    most: float
    """Gain of the picture that gains most."""


@dataclass(frozen=True)
class Windows:
    """What every window gains, and what the best one gains where it was not chosen."""

    network: str
    data: str
    metric: str
    """The protocol's first."""
    rows: tuple[Row, ...]
    """From the smallest window to the whole picture."""
    best: Row
    """The row that is best on the pictures that choose: the first, third, … by name."""
    chosen_gain: float
    """Mean gain of the best window on the pictures that chose it."""
    held_out_gain: float | None
    """Mean gain of the best window on the other pictures; None where there are none."""
    gains: Mapping[str, tuple[float, ...]]
    """By picture, in the order of its name: the gain of every row."""

    def __str__(self) -> str:
        return _sheet(self).body


def window(
    network: AnyNetwork,
    data: Data,
    factors: Sequence[float] = FACTORS,
    *,
    train_size: Size | None = None,
    protocol: str | Protocol | None = None,
    layout: str = "auto",
    split: str = "test",
    noise_level: float | None = None,
    jpeg_quality: int | None = None,
    output: str | os.PathLike[str] | None = None,
    device: str = "auto",
    dtype: str = "auto",
) -> Windows:
    """Restore a data set with windows of several sizes, and with the network as it is.

    The best window is chosen on every other picture by name, and its gain is also given on the
    rest, which had no say. The network as it is takes part in the choice.

    Args:
        network: an open network (left unchanged), a bundled one, or a checkpoint.
        data: a data set or its folder; pairs of degraded pictures and targets.
        factors: sides of the windows over the training size.
        train_size: of the crops; what the network says if None.
        protocol: as in `fullres.evaluate.evaluate`, of which the first metric counts; PSNR in all
            that come with fullres.
        layout: as in `fullres.evaluate.evaluate`.
        split: likewise.
        noise_level: likewise.
        jpeg_quality: likewise.
        output: folder for `window.md`, `.csv` and `.png`; nothing is written if None.
        device: as in `fullres.restore.restore`.
        dtype: likewise.

    Raises:
        NothingToConvert: no window would change anything.
        FullresError: a factor is not positive, or as `fullres.evaluate.evaluate`.
    """
    if output is not None:
        check_matplotlib()
    if not factors or min(factors) <= 0:
        raise FullresError(f"windows {list(factors)}: give factors of the training size above 0")
    opened = network_of(network)
    dataset = dataset_of(data, layout, split, opened)
    settings = settings_for(opened, True, None, train_size)
    assert settings is not None
    convert(opened.module, settings).revert()  # to hear now if there is nothing to convert
    how = protocol_of(protocol, dataset)
    how = replace(how, metrics=how.metrics[:1])
    values: dict[float | None, dict[str, float]] = {}
    windows = {factor: _window(settings, factor) for factor in sorted(set(factors))}
    for factor, size in [*windows.items(), (None, None)]:
        mode = GLOBAL if size is None else "local"
        log.info("%s", "whole pictures" if size is None else f"window {size[0]} × {size[1]}")
        found = evaluate(
            opened,
            dataset,
            modes=(mode,),
            protocol=how,
            window=size,
            train_size=None if size is None else settings.train_size,
            noise_level=noise_level,
            jpeg_quality=jpeg_quality,
            device=device,
            dtype=dtype,
        )
        values[factor] = {name: row.metrics[how.metrics[0]] for name, row in found.of(mode).items()}
    result = _compared(opened.spec.architecture, dataset.name, how.metrics[0], windows, values)
    if output is not None:
        save(output, "window", _sheet(result), result.rows, figure(result))
    return result


def _window(settings: Local, factor: float) -> tuple[int, int]:
    train = settings.train_size
    assert isinstance(train, tuple)
    return max(1, round(factor * train[0])), max(1, round(factor * train[1]))


def _compared(
    network: str,
    data: str,
    metric: str,
    windows: Mapping[float, tuple[int, int]],
    values: Mapping[float | None, Mapping[str, float]],
) -> Windows:
    """Gains over the whole picture, and the window that half of the pictures choose."""
    names = sorted(values[None])
    rows, gains = [], {}
    for factor, of_window in values.items():
        each = [difference(of_window[name], values[None][name]) for name in names]
        gains[factor] = each
        size = None if factor is None else windows[factor]
        value, spread = fmean(of_window[name] for name in names), float(np.std(each))
        rows.append(Row(factor, size, value, fmean(each), spread, min(each), max(each)))
    best = max(rows, key=lambda row: fmean(gains[row.factor][::2]))
    others = gains[best.factor][1::2]
    return Windows(
        network,
        data,
        metric,
        tuple(rows),
        best,
        fmean(gains[best.factor][::2]),
        fmean(others) if others else None,
        {name: tuple(gains[row.factor][i] for row in rows) for i, name in enumerate(names)},
    )


def _label(row: Row) -> str:
    return "whole picture" if row.factor is None else f"{row.factor:g} ×"


def _sheet(found: Windows) -> Sheet:
    cells = [
        (
            _label(row),
            "—" if row.window is None else f"{row.window[0]} × {row.window[1]}",
            number(row.value, found.metric),
            *(
                ("—",) * 4
                if row.factor is None
                else (
                    signed(row.gain, found.metric),
                    number(row.spread, found.metric),
                    signed(row.least, found.metric),
                    signed(row.most, found.metric),
                )
            ),
        )
        for row in found.rows
    ]
    name = "the network as it is" if found.best.factor is None else _label(found.best)
    chosen = signed(found.chosen_gain, found.metric)
    other = found.held_out_gain
    held_out = "there are no others" if other is None else f"{signed(other, found.metric)} there"
    count = f"{len(found.gains)} picture{'s' * (len(found.gains) != 1)}"
    note = (
        f"Best on every other picture by name: {name}, which gains {chosen} on these; on the "
        f"pictures that had no say: {held_out}. {count} in all; gains are over "
        "the network as it is, spread is the standard deviation over pictures."
    )
    header = ("window", "pixels", title(found.metric), "gain", "spread", "least", "most")
    return Sheet(f"Windows of {found.network} on {found.data}", header, cells, [note])


def figure(found: Windows) -> Figure:
    """The metric and the gain over windows, with every picture.

    Raises:
        FullresError: matplotlib is not installed.
    """
    drawn = new_figure(10, 4)
    left, right = drawn.add_subplot(1, 2, 1), drawn.add_subplot(1, 2, 2)
    places = range(len(found.rows))
    unit = f"{title(found.metric)}{' in dB' if found.metric == 'psnr' else ''}"
    plain(left, f"Mean {title(found.metric)}", "window over training size", unit)
    left.plot(places, [row.value for row in found.rows], "o-", color=BLUE)
    left.axhline(found.rows[-1].value, color=RED, linewidth=1, linestyle="--")
    plain(right, "Gain over the whole picture", "window over training size", f"gain of {unit}")
    for gains in found.gains.values():
        right.plot(places, gains, color=GREY, linewidth=0.7, alpha=0.6)
    right.axhline(0, color=RED, linewidth=1, linestyle="--")
    right.plot(places, [row.gain for row in found.rows], "o-", color=BLUE, label="mean")
    right.plot([], [], color=GREY, linewidth=0.7, label="each picture")
    at = found.rows.index(found.best)
    right.plot(at, found.best.gain, "o", markersize=11, mfc="none", color=BLUE, label="chosen")
    right.legend(fontsize=8, frameon=False)
    labels = ["whole" if row.factor is None else f"{row.factor:g}" for row in found.rows]
    for axes in (left, right):
        axes.set_xticks(places, labels)
        at_least(axes, "y", LEAST_SPAN.get(found.metric, 0.0))
    return drawn
