"""Plain-text reports about one network and about all of them."""

from __future__ import annotations

import os
from collections.abc import Iterable

from fullres.networks.catalog import bundled, networks, open_network
from fullres.networks.spec import Architecture, Network, Spec


def describe(network: Network) -> str:
    """What is known of a network, one fact a line.

    >>> from fullres.networks.catalog import create_network
    >>> print(describe(create_network("nafnet", width=8)))
    architecture     NAFNet (nafnet)
    hyperparameters  img_channel=3, width=8, middle_blk_num=1, enc_blk_nums=[1, 1, 1, 28], ...
    parameters       1,121,883
    ...
    """
    spec, architecture = network.spec, networks().get(network.spec.architecture)
    known = architecture.tasks if architecture else ()
    published = f" (published for {', '.join(known)})" if known else ""
    facts = {
        "architecture": _named(spec, architecture),
        "hyperparameters": ", ".join(f"{k}={_plain(v)}" for k, v in spec.hyperparameters.items()),
        "parameters": f"{sum(p.numel() for p in network.module.parameters()):,}",
        "task": spec.task or f"unknown{published}",
        "training size": f"{spec.train_size} by {spec.train_size} pixels"
        if spec.train_size
        else "unknown, so say it (--train-size) where it matters",
        "input multiple": f"{spec.multiple} pixels (other sizes are padded and cropped)",
        "scale": f"{spec.scale}",
        "input": _input(spec),
        "channels": f"{spec.in_channels} in, {spec.out_channels} out",
    }
    if architecture:
        facts |= {
            "paper": architecture.paper,
            "authors": architecture.authors,
            "published weights": f"{architecture.weights}, licence {architecture.licence}",
        }
    if spec.frames_lost is not None:
        facts["frames lost"] = "{} at the start, {} at the end".format(*spec.frames_lost)
    return _table(facts.items())


def _input(spec: Spec) -> str:
    """What a user has to give, in words."""
    channels = spec.in_channels - (spec.condition is not None and not spec.blind)
    kind = {1: "grey pictures", 3: "colour pictures"}.get(channels, f"maps of {channels} channels")
    if spec.frames_lost is not None:
        kind = "video"
    elif spec.views == 2:
        kind = "the left and the right view of a dual-pixel camera (--right)"
    elif spec.task == "demosaic":
        how = "as they are" if spec.mosaic == "samples" else "interpolated by fullres"
        kind = f"mosaics of a Bayer sensor (--bayer), {how}"
    told = {"noise level": "--noise-level", "JPEG quality": "--jpeg-quality"}
    beside = ""
    if spec.condition:
        known = ", if it is known" if spec.blind else ""
        beside = f", and the {spec.condition} ({told[spec.condition]}){known}"
    return f"{kind}{beside}; values from 0 to {spec.value_range:g}"


def _named(spec: Spec, architecture: Architecture | None) -> str:
    if architecture:
        return f"{architecture.title} ({architecture.name})"
    return f"{spec.architecture}, by way of spandrel"


def networks_table(folder: str | os.PathLike[str] | None = None) -> str:
    """The architectures, and the bundled weights (or those in `folder`), one a line."""
    header = ("network", "title", "tasks", "trained on", "licence", "published weights")
    rows = [
        (a.name, a.title, ", ".join(a.tasks), f"{a.train_size}", a.licence, a.weights)
        for a in networks().values()
    ]
    names = bundled(folder)
    opened = [open_network(name, folder=folder).spec for name in names]
    weights = [
        (name, spec.architecture, spec.task or "unknown", f"{spec.train_size}")
        for name, spec in zip(names, opened, strict=True)
    ]
    bundle = _table([("bundled weights", "network", "task", "trained on"), *weights])
    return f"{_table([header, *rows])}\n\n{bundle if weights else 'bundled weights: none'}"


def _plain(value: object) -> str:
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_plain, value))}]"
    return str(value)


def _table(rows: Iterable[tuple[str, ...]]) -> str:
    rows = list(rows)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = (
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )
    return "\n".join(lines)
