"""Making degraded pictures of clean ones: by name, and by the folder."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from fullres.data.blur import BLURS
from fullres.data.degradations import DEGRADATIONS as OTHERS
from fullres.errors import FullresError
from fullres.io.image import open_image


class Degradation(Protocol):
    """Makes a degraded picture of a clean one; the same for the same state of the generator."""

    @property
    def scale(self) -> int:
        """Factor by which the degraded picture is smaller, rounded up."""

    @property
    def needs_whole(self) -> bool:
        """Whether it varies over the picture, so that crops are cut after it."""

    def __call__(self, clean: Tensor, random: np.random.Generator) -> Tensor:
        """Degrade (C, H, W), float32 in [0, 1]."""


@dataclass(frozen=True)
class OneOf:
    """One of several degradations, drawn for each picture."""

    of: tuple[Degradation, ...]

    def __post_init__(self) -> None:
        if not self.of:
            raise FullresError("one_of: needs a list of degradations, of=[...]")
        if len({degradation.scale for degradation in self.of}) > 1:
            raise FullresError("one_of: degradations of different scales cannot be mixed")

    @property
    def scale(self) -> int:
        return self.of[0].scale

    @property
    def needs_whole(self) -> bool:
        return any(degradation.needs_whole for degradation in self.of)

    def __call__(self, clean: Tensor, random: np.random.Generator) -> Tensor:
        """Degrade (C, H, W) in [0, 1]."""
        return self.of[random.integers(len(self.of))](clean, random)


@dataclass(frozen=True)
class Chain:
    """Several degradations, one after another."""

    of: tuple[Degradation, ...]

    @property
    def scale(self) -> int:
        return math.prod(degradation.scale for degradation in self.of)

    @property
    def needs_whole(self) -> bool:
        return any(degradation.needs_whole for degradation in self.of)

    def __call__(self, clean: Tensor, random: np.random.Generator) -> Tensor:
        """Degrade (C, H, W) in [0, 1]."""
        for degradation in self.of:
            clean = degradation(clean, random)
        return clean


DEGRADATIONS: dict[str, type] = {**OTHERS, **BLURS, "one_of": OneOf, "chain": Chain}
"""Every degradation by the name that recipes and `fullres degrade` use."""


def create_degradation(name: str, **parameters: Any) -> Degradation:
    """A degradation by name.

    >>> create_degradation("noise", sigma=[0, 50])
    Noise(sigma=(0, 50), varying=False, clip=False)

    Raises:
        FullresError: no such degradation or parameter, or a value that cannot be.
    """
    if name not in DEGRADATIONS:
        raise FullresError(f"unknown degradation {name!r}; known: {', '.join(DEGRADATIONS)}")
    kind = DEGRADATIONS[name]
    known = [f.name for f in dataclasses.fields(kind)]
    unknown = [p for p in parameters if p not in known]
    if unknown:
        raise FullresError(f"{name}: unknown parameter {unknown[0]!r}; known: {', '.join(known)}")
    values: dict[str, Any] = {}
    for parameter, value in parameters.items():
        if isinstance(value, dict):  # one degradation within another has its name
            values[parameter] = create_degradation(parameter, **value)
        elif isinstance(value, list):
            values[parameter] = tuple(
                create_degradation(**part) if isinstance(part, dict) else part for part in value
            )
        else:
            values[parameter] = value
    try:
        made: Degradation = kind(**values)
    except TypeError as error:
        raise FullresError(f"{name}: {error}") from None
    return made


def parse_degradation(text: str) -> Degradation:
    """A degradation as it is written on the command line: its name, then its parameters.

    >>> parse_degradation("noise sigma=[0,50]")
    Noise(sigma=(0, 50), varying=False, clip=False)

    Raises:
        FullresError: as `create_degradation`, or a parameter is not written so.
    """
    name, *rest = text.split() or [""]
    parameters = {}
    for parameter in rest:
        key, equals, value = parameter.partition("=")
        try:
            parameters[key] = json.loads(value)
        except ValueError:
            parameters[key] = value
        if not equals:
            raise FullresError(
                f"{parameter!r}: write parameters without spaces in them, as in "
                "'noise sigma=[0,50]'"
            )
    return create_degradation(name, **parameters)


def picture_random(seed: int, name: str, version: int = 0) -> np.random.Generator:
    """The generator that degrades a picture: by its name, whatever else the folder holds."""
    digest = hashlib.sha256(name.encode()).digest()
    return np.random.default_rng([seed, version, int.from_bytes(digest[:8], "little")])


def degrade_folder(
    pictures: Sequence[tuple[str, Path]],
    target: str | Path,
    degradation: Degradation,
    *,
    seed: int = 0,
    versions: int = 1,
    bits: int = 8,
    progress: Callable[[str], None] = lambda name: None,
) -> Path:
    """Write degraded pictures to `target/input` and the clean ones to `target/target`, as PNG.

    What is there already stays, so a run that was stopped goes on.

    Args:
        pictures: names, unique (a slash makes a subfolder), and the clean files.
        target: the folder of pairs.
        degradation: how.
        seed: the same seed makes the same pictures.
        versions: degraded pictures of each clean one; from 2 on, names end in `_v0`, `_v1`, …
        bits: 8 or 16 per channel of the degraded pictures.
        progress: is told each name that is done.

    Raises:
        ImageError: a picture cannot be read or written.
        FullresError: two pictures have the same name.
    """
    target = Path(target)
    names = [name for name, _ in pictures]
    twice = {name for name in names if names.count(name) > 1}
    if twice:
        raise FullresError(f"two pictures are named {min(twice)}; rename one of them")
    for name, path in pictures:
        first: Path | None = None
        for version in range(versions):
            stem = f"{name}_v{version}" if versions > 1 else name
            clean, degraded = target / "target" / f"{stem}.png", target / "input" / f"{stem}.png"
            for parent in (clean.parent, degraded.parent):
                parent.mkdir(parents=True, exist_ok=True)
            if not clean.exists():
                _copy_clean(path, clean, first)
            if not degraded.exists():
                _degrade(path, degraded, degradation, picture_random(seed, name, version), bits)
            first = first or clean
        progress(name)
    return target


def _copy_clean(path: Path, target: Path, copy: Path | None) -> None:
    """The clean picture as PNG; a further name of the same file where that goes."""
    if copy is None and path.suffix.lower() != ".png":
        with open_image(path) as source, source.create(target) as sink:
            sink.write(0, 0, source.read(0, 0, source.height, source.width))
        return
    part = target.with_name(f".{target.name}.part")
    part.unlink(missing_ok=True)
    try:
        os.link(copy or path, part)
    except OSError:
        shutil.copyfile(copy or path, part)
    part.replace(target)


def _degrade(
    path: Path, target: Path, degradation: Degradation, random: np.random.Generator, bits: int
) -> None:
    with open_image(path) as source:
        clean = source.read(0, 0, source.height, source.width).clamp(0, 1)
        degraded = degradation(clean, random).clamp(0, 1)
        if degradation.scale != 1 or degraded.shape[0] != clean.shape[0]:
            _write(degraded, target, bits)
            return
        with source.create(target, bits=max(bits, source.bits)) as sink:
            sink.write(0, 0, degraded)


def _write(x: Tensor, target: Path, bits: int) -> None:
    """A picture of its own size as PNG."""
    import pyvips

    kind, peak = (np.uint8, 255) if bits == 8 else (np.uint16, 65535)
    values = (x * peak).round().numpy().astype(kind).transpose(1, 2, 0)
    part = target.with_name(f".{target.stem}.part.png")
    pyvips.Image.new_from_array(np.ascontiguousarray(values)).pngsave(str(part))
    part.replace(target)
