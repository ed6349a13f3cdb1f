"""What conversion gains for networks that aggregate in different ways, and what it costs.

As in table 7 of *Improving Image Restoration by Revisiting Global Information Aggregation*
(Chu et al., ECCV 2022), with the spread over pictures.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from fullres.errors import FullresError
from fullres.evaluate import evaluate
from fullres.evaluation.results import GLOBAL, Evaluation, number, signed, title
from fullres.local import Local, NothingToConvert, convert
from fullres.metrics import Protocol
from fullres.networks.spec import Network
from fullres.restore import Size, settings_for
from fullres.shadow import quiet, shadow
from fullres.studies.figures import (
    COLOURS,
    LEAST_SPAN,
    at_least,
    check_matplotlib,
    new_figure,
    plain,
    shortened,
)
from fullres.studies.pictures import AnyNetwork, Data, dataset_of, network_of, protocol_of
from fullres.studies.sheet import Sheet, save

if TYPE_CHECKING:
    from matplotlib.figure import Figure

log = logging.getLogger(__name__)

LOCAL = "local"
SIZE = (720, 1280)
"""Of GoPro's pictures."""


@dataclass(frozen=True)
class Row:
    """One network before and after conversion."""

    network: str
    parameters: int
    converted: int
    """Operations that become local."""
    multiply_adds: int
    """Of the network as it is, for one picture of the study's size: of convolutions, linear
    layers, matrix products and attention, as torch counts them."""
    multiply_adds_local: int
    """Of its local form; means, maxima and kernels of fullres' own do not count."""
    values: Mapping[str, float]
    """Means of the protocol's metrics over the pictures, of the network as it is."""
    values_local: Mapping[str, float]
    """Of its local form."""
    gain: float
    """Mean over the pictures of what the local form gains in the first metric."""
    spread: float
    """Standard deviation of the gain over the pictures."""
    least: float
    """Gain of the picture that gains least."""
    most: float
    """Gain of the picture that gains most."""


@dataclass(frozen=True)
class Modules:
    """Several networks before and after conversion."""

    data: str
    pictures: int
    metric: str
    """The protocol's first."""
    size: tuple[int, int]
    """Height and width that multiply-adds are counted at."""
    rows: tuple[Row, ...]
    gains: Mapping[str, Mapping[str, float]]
    """By network and picture."""

    def __str__(self) -> str:
        return _sheet(self).body


def modules(
    networks: Sequence[AnyNetwork] | Mapping[str, AnyNetwork],
    data: Data,
    *,
    size: Size = SIZE,
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
) -> Modules:
    """Measure networks on one data set, each before and after conversion.

    Args:
        networks: as many as wanted, each an open network (left unchanged), a bundled one or a
            checkpoint; with names of their own as a mapping.
        data: a data set or its folder; pairs of degraded pictures and targets.
        size: height and width of the picture that multiply-adds are counted for.
        window: local window in pixels; 1.5 × each network's training size if None.
        train_size: of the crops; what each network says if None.
        protocol: as in `fullres.evaluate.evaluate`; gains are of its first metric.
        layout: likewise.
        split: likewise.
        noise_level: likewise.
        jpeg_quality: likewise.
        output: folder for `modules.md`, `.csv` and `.png`; nothing is written if None.
        device: as in `fullres.restore.restore`.
        dtype: likewise.

    Raises:
        FullresError: there are no networks, or as `fullres.evaluate.evaluate`.
    """
    if output is not None:
        check_matplotlib()
    named = dict(networks) if isinstance(networks, Mapping) else _named(networks)
    if not named:
        raise FullresError("no networks to compare: give one or more")
    first = network_of(next(iter(named.values())))
    dataset = dataset_of(data, layout, split, first)
    how = protocol_of(protocol, dataset)
    at = (size, size) if isinstance(size, int) else size
    rows, gains = [], {}
    for name, network in named.items():
        log.info("%s", name)
        opened = network_of(network)
        settings = settings_for(opened, True, window, train_size)
        assert settings is not None
        found = evaluate(
            opened,
            dataset,
            modes=(GLOBAL, LOCAL),
            protocol=how,
            window=settings.window,
            train_size=settings.train_size,
            noise_level=noise_level,
            jpeg_quality=jpeg_quality,
            device=device,
            dtype=dtype,
        )
        gains[name] = found.gains(LOCAL)
        rows.append(_row(name, opened, settings, found, at))
    result = Modules(dataset.name, len(dataset.pairs), how.metrics[0], at, tuple(rows), gains)
    if output is not None:
        save(output, "modules", _sheet(result), result.rows, figure(result))
    return result


def _named(networks: Sequence[AnyNetwork]) -> dict[str, AnyNetwork]:
    """Networks by the shortest name that tells them apart."""
    named: dict[str, AnyNetwork] = {}
    for network in networks:
        path = None if isinstance(network, Network) else Path(network)
        name = network.spec.architecture if isinstance(network, Network) else Path(network).stem
        if name in named and path is not None:
            name = (path.parent / path.stem).as_posix()
        number = 2
        while name in named:
            name, number = f"{name.rpartition(' ')[0] or name} {number}", number + 1
        named[name] = network
    return named


def _row(
    name: str, network: Network, settings: Local, found: Evaluation, size: tuple[int, int]
) -> Row:
    values = {each.mode: each for each in found.summary()}
    gains = list(found.gains(LOCAL).values())
    channels = network.spec.in_channels
    before = multiply_adds(network.module, (1, channels, *size))
    try:
        with convert(network.module, settings) as conversion:
            converted = len(conversion.converted)
            after = multiply_adds(network.module, (1, channels, *size))
    except NothingToConvert:
        converted, after = 0, before
    return Row(
        name,
        sum(parameter.numel() for parameter in network.module.parameters()),
        converted,
        before,
        after,
        dict(values[GLOBAL].metrics),
        dict(values[LOCAL].metrics),
        fmean(gains),
        float(np.std(gains)),
        min(gains),
        max(gains),
    )


def multiply_adds(module: nn.Module, shape: tuple[int, ...]) -> int:
    """Multiply-adds of a pass on an input of a shape (B, C, H, W), as torch counts them.

    Counted are convolutions, linear layers, matrix products and attention, on tensors without
    values, so that the size costs nothing; a network that looks at values runs for real.

    >>> multiply_adds(nn.Conv2d(3, 8, 3, padding=1), (1, 3, 10, 20))
    43200
    """
    try:
        with quiet():
            return _counted(module, shape, FakeTensorMode(allow_non_fake_inputs=True))
    except (RuntimeError, TypeError, ValueError):
        return _counted(module, shape, None)


def _counted(module: nn.Module, shape: tuple[int, ...], mode: FakeTensorMode | None) -> int:
    run = shadow(module, mode)
    dtype = next((p.dtype for p in module.parameters()), torch.float32)
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), mode or nullcontext(), counter:
        run(torch.zeros(shape, dtype=dtype))
    return int(counter.get_total_flops()) // 2


def _sheet(found: Modules) -> Sheet:
    metric = found.metric
    names = list(found.rows[0].values)
    header = ["network", "parameters", "GMAC", "GMAC local"]
    header += [f"{title(name)}{form}" for name in names for form in ("", " local")]
    cells = [
        [
            row.network,
            f"{row.parameters / 1e6:.2f} M",
            f"{row.multiply_adds / 1e9:.2f}",
            f"{row.multiply_adds_local / 1e9:.2f}",
            *(number(v[name], name) for name in names for v in (row.values, row.values_local)),
            signed(row.gain, metric),
            number(row.spread, metric),
            signed(row.least, metric),
            signed(row.most, metric),
        ]
        for row in found.rows
    ]
    height, width = found.size
    note = (
        f"Means over {found.pictures} pictures. Gains in {title(metric)} by conversion, picture "
        "by picture: mean, standard deviation, least and most. GMAC: billions of multiply-adds for "
        f"a picture of {height} × {width}; those of local means are no multiply-adds."
    )
    title_ = f"Before and after conversion, on {found.data}"
    return Sheet(title_, [*header, "gain", "spread", "least", "most"], cells, [note])


def figure(found: Modules) -> Figure:
    """The metric of each network before and after conversion, and the gain on every picture.

    Raises:
        FullresError: matplotlib is not installed.
    """
    drawn = new_figure(10, max(2.5, 1.2 + 0.45 * len(found.rows)))
    left, right = drawn.subplots(1, 2, sharey=True)
    unit = f"{title(found.metric)}{' in dB' if found.metric == 'psnr' else ''}"
    plain(left, f"Mean {title(found.metric)} over {found.pictures} pictures", unit)
    plain(right, "Gain by conversion", f"{unit}, local − global")
    places = range(len(found.rows))
    before = [row.values[found.metric] for row in found.rows]
    after = [row.values_local[found.metric] for row in found.rows]
    left.hlines(places, before, after, color=COLOURS["training"], linewidth=1.5)
    left.plot(before, places, "o", color=COLOURS["global"], label="global")
    left.plot(after, places, "o", color=COLOURS["local"], label="local")
    left.legend(fontsize=8, frameon=False)
    left.set_yticks(places, [shortened(row.network) for row in found.rows])
    left.set_ylim(len(found.rows) - 0.5, -0.5)
    right.barh(places, [row.gain for row in found.rows], 0.6, color=COLOURS["local"])
    right.axvline(0, color="black", linewidth=0.8)
    for place, row in zip(places, found.rows, strict=True):
        each = list(found.gains[row.network].values())
        right.plot(each, [place] * len(each), "|", color="black", markersize=7, alpha=0.6)
    for axes in (left, right):
        at_least(axes, "x", LEAST_SPAN.get(found.metric, 0.0))
    return drawn
