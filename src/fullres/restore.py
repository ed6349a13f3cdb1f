"""Restoring pictures: read, open the network, convert it, run it in tiles, write."""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from fullres import batch
from fullres.batch import Job, Paths, Progress, Report, Silent
from fullres.budget import leaves_room, tiles_for_memory
from fullres.errors import FullresError
from fullres.feed import Feed, Given, open_feed
from fullres.io.comparison import write_comparison
from fullres.local import Local, NothingToConvert, convert, plan
from fullres.memory import (
    freed_memory_kept,
    freed_memory_returned,
    peak_memory,
    use_huge_pages,
)
from fullres.networks.catalog import open_network
from fullres.networks.spec import Network, Spec
from fullres.shadow import copied
from fullres.tiles import Grid, Tile, halo_for, is_out_of_memory, paste, run_tiles

log = logging.getLogger(__name__)

DTYPES = {
    "auto": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "float64": torch.float64,
}
"""Data types a network can run in; "auto" is exact everywhere."""

NOTHING_GIVEN = Given()
NOMINAL_SIZE = 64
"""Size at which a network of unknown training size is looked at for global operations."""

Size = int | tuple[int, int]


def restore(
    source: Paths,
    target: str | Path | None = None,
    network: str | Path | Network = "denoise-small",
    *,
    right: str | Path | None = None,
    bayer: str | None = None,
    noise_level: float | None = None,
    jpeg_quality: int | None = None,
    local: bool | Local = True,
    window: Size | None = None,
    train_size: Size | None = None,
    only: Sequence[str] = (),
    stride: Size | None = None,
    device: str = "auto",
    dtype: str = "auto",
    tile: int | None = None,
    suffix: str | None = None,
    overwrite: bool = False,
    compare: bool = False,
    bits: int | None = None,
    quality: int = 95,
    progress: Progress | None = None,
) -> Report:
    """Restore a picture, a folder of pictures, or all that a glob pattern matches.

    Results that are there already and newer than their pictures are left as they are, so a run
    that was stopped goes on where it was. A result appears whole or not at all.

    Args:
        source: a picture, a folder (searched recursively), a glob pattern, or several of them.
        target: the result of a single picture, or a folder; without it a picture's result goes
            next to it (`photo-restored.jpg`) and those of a folder into `FOLDER-restored`.
        network: name of a bundled network, a checkpoint, or an open network (left unchanged).
        right: right view of a dual-pixel picture whose left view is `source`, or the folder of
            the right views, under the same names.
        bayer: pattern of the mosaics that the pictures are, `RGGB`, `BGGR`, `GRBG` or `GBRG`.
        noise_level: standard deviation of the noise in 1/255 of white, for networks that ask.
        jpeg_quality: quality that the pictures were compressed with, for networks that ask.
        local: convert the network's global operations to local ones; False runs it as it is. A
            `Local` says all about the conversion, in place of the four arguments that follow.
        window: local window in pixels, one number or (height, width); 1.5 × the training size
            if None.
        train_size: size of the crops the network was trained on, if the network does not say.
        only: names of the modules that become local, as shell patterns; all if empty.
        stride: pixels between the overlapping windows of attention; as few windows as cover the
            picture if None.
        device: "auto" (CUDA, else MPS, else the CPU) or a device as torch names it.
        dtype: "auto" (float32), "float16", "bfloat16", "float32" or "float64".
        tile: side in pixels of the tiles that large pictures run in; from the free memory if None.
        suffix: added to the name of every result, or of the folder of results; "-restored" where
            no target is given, otherwise nothing.
        overwrite: replace results that exist.
        compare: write a before/after picture `NAME-compare.png` next to every result.
        bits: bits per channel of the results; those of the pictures if None.
        quality: of lossy formats, 1 to 100.
        progress: is told how the work goes on.

    Returns:
        What was restored, what was done already, and what failed, each with its reason.

    Raises:
        FullresError: nothing can begin (no such picture or network, two pictures with the same
            result, …), or the only picture, named by itself, failed.
    """
    use_huge_pages()
    progress = progress or Silent()
    given = Given(bayer, noise_level, jpeg_quality, views=right is not None)
    found = batch.find(source, target, suffix, compare, right)
    if not batch.waiting(found, overwrite):
        return batch.run(found, _nothing, overwrite, progress)
    opened = network if isinstance(network, Network) else open_network(network)
    given.condition(opened.spec)
    settings = settings_for(opened, local, window, train_size, only, stride)
    with ready(opened, settings, device, dtype, tile) as restorer:

        def work(job: Job) -> int:
            pixels = 0
            if overwrite or not batch.is_done(job.target, job):
                pixels = restore_picture(job, restorer, given, bits, quality, progress)
            if job.comparison:
                write_comparison(job.source, job.target, job.comparison)
            return pixels

        report = batch.run(found, work, overwrite, progress)
    if found.alone and report.failed and report.failed[0].error:
        raise report.failed[0].error
    return report


@dataclass
class Restorer:
    """A network ready to run: on its device, in its data type, local or not."""

    module: torch.nn.Module
    spec: Spec
    device: torch.device
    dtype: torch.dtype
    window: tuple[int, int] | None
    """Of the local operations, in pixels; None if the network has no local ones."""
    has_global: bool
    """Whether a tile's result depends on the tile's bounds."""
    tile: int | None = None
    too_large: float = math.inf
    """Pixels of a run that memory did not hold."""
    peak: Callable[[int, int], int] = field(init=False)
    """Bytes that a pass at a height and width needs."""
    said: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.peak = functools.cache(self._peak)

    def _peak(self, height: int, width: int) -> int:
        shape = (1, self.spec.in_channels, height, width)
        return peak_memory(self.module, shape, self.dtype, str(self.device))

    def say_once(self, line: str) -> None:
        if line not in self.said:
            self.said.add(line)
            log.info("%s", line)


@contextmanager
def ready(
    network: Network,
    settings: Local | None,
    device: str = "auto",
    dtype: str = "auto",
    tile: int | None = None,
) -> Iterator[Restorer]:
    """Move a copy of a network to its device and make it local.

    Args:
        network: is left unchanged.
        settings: how it becomes local; None runs it as it is.
        device: as in `restore`.
        dtype: as in `restore`.
        tile: as in `restore`.

    Raises:
        FullresError: the device or data type is not there, or the network restores video or cannot
            be copied.
    """
    spec = network.spec
    if spec.frames_lost is not None:
        raise FullresError(f"{spec.architecture}: restores video, not single pictures")
    where, kind = _device(device), _dtype(dtype)
    # the caller's network stays where and as it is
    module = copied(network.module).eval().requires_grad_(False).to(where, kind)
    if where.type == "cpu":
        module = module.to(memory_format=torch.channels_last)
    restorer = Restorer(module, spec, where, kind, None, settings is None, tile)
    keeping = freed_memory_kept() if where.type == "cpu" else nullcontext()
    with keeping, _made_local(restorer, settings):
        yield restorer


def _made_local(restorer: Restorer, settings: Local | None) -> AbstractContextManager[object]:
    if settings is None:
        return nullcontext()
    try:
        conversion = convert(restorer.module, settings)
    except NothingToConvert as nothing:
        restorer.has_global = bool(nothing.plan.still_global)
        restorer.say_once(f"{nothing}; it runs as it is")
        return nullcontext()
    restorer.has_global = bool(conversion.plan.still_global)
    restorer.window = settings.widest
    return conversion


def settings_for(
    network: Network,
    local: bool | Local = True,
    window: Size | None = None,
    train_size: Size | None = None,
    only: Sequence[str] = (),
    stride: Size | None = None,
) -> Local | None:
    """How the network becomes local: what is asked for, the rest from its spec; None for not.

    Raises:
        FullresError: the training size is not known, or two arguments contradict.
    """
    if local is not True and (window or train_size or only or stride):
        raise FullresError(
            "--window, --train-size, --only and --stride have no effect with "
            f"{'a Local that says it all' if local else '--global'}: leave out either"
        )
    if local is not True:
        return local or None
    size = train_size or network.spec.train_size
    if not size and not plan(network.module, Local(NOMINAL_SIZE)).operations:
        size = NOMINAL_SIZE  # any would do: there is nothing to convert
    if not size:
        raise FullresError(
            f"{network.spec.architecture}: the network does not say the size of the crops it was "
            "trained on; give it with --train-size, or run it as it is with --global"
        )
    return Local(size, window, only=tuple(only) or None, stride=stride)


@torch.inference_mode()
def restore_picture(
    job: Job,
    restorer: Restorer,
    given: Given = NOTHING_GIVEN,
    bits: int | None = None,
    quality: int = 95,
    progress: Progress | None = None,
) -> int:
    """Restore one picture, tile by tile; returns its pixels.

    Raises:
        ImageError: the picture cannot be read or its result not written.
        FullresError: the network does not take such pictures, or fails on this one.
    """
    progress = progress or Silent()
    with open_feed(job.source, job.right, restorer.spec, given) as feed:
        height, width = feed.size
        progress.picture(job, height * width)
        with feed.create(job.target, bits, quality) as sink:
            grid, tiles = plan_picture(feed, restorer)
            keeps = restorer.tile is not None or leaves_room(tiles, restorer.peak, restorer.device)

            def run(tile: Tile) -> None:
                rows, columns = tile.rows, tile.columns
                part = feed.read(rows.run_start, columns.run_start, rows.run, columns.run)
                restored = restore_tensor(part, restorer, job.source)
                paste(sink.write, tile, feed.result(restored))

            with nullcontext() if keeps else freed_memory_returned():
                restorer.too_large = run_tiles(tiles, grid, run, progress.tile, restorer.too_large)
        return height * width


def plan_picture(feed: Feed, restorer: Restorer) -> tuple[Grid, list[Tile]]:
    """Tiles that the memory free now holds, or of the side that was asked for."""
    halo = halo_for(restorer.window, feed.multiple)
    grid = Grid(feed.size, halo, feed.multiple)
    if restorer.tile:
        tiles = grid.tiles((restorer.tile, restorer.tile))
    else:
        with _naming(feed.source.path):
            tiles = tiles_for_memory(grid, restorer.peak, restorer.device)
    if len(tiles) > 1 and restorer.has_global:
        restorer.say_once("large pictures run in tiles: global operations see one tile at a time")
    return grid, tiles


def restore_tensor(x: Tensor, restorer: Restorer, path: Path) -> Tensor:
    """Restore (B, in_channels, H, W) in [0, 1]; in and out are float32 and on the CPU.

    Raises:
        FullresError: the network fails, or gives NaN or infinity; names the picture, `path`.
    """
    x = x.to(restorer.device, restorer.dtype) * restorer.spec.value_range
    if restorer.device.type == "cpu":
        x = x.contiguous(memory_format=torch.channels_last)
    with _naming(path):
        y: Tensor = restorer.module(x).float() / restorer.spec.value_range
    y = y.cpu()
    if not y.isfinite().all():
        remedy = (
            "try --dtype float32"
            if restorer.dtype in (torch.float16, torch.bfloat16)
            else "try another network"
        )
        raise FullresError(f"{path}: the network gave NaN or infinity; {remedy}")
    return y


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Errors of the network and of its tile plan name the picture; out of memory passes."""
    try:
        yield
    except FullresError as error:
        raise FullresError(f"{path}: {error}") from None
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise FullresError(
            f"{path}: the network fails on this picture ({reason}); try another network"
        ) from error


def _device(name: str) -> torch.device:
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).strip().splitlines()[0]
        raise FullresError(
            f"device {name!r} cannot be used here ({reason}); try --device cpu"
        ) from None
    return device


def _dtype(name: str) -> torch.dtype:
    if name not in DTYPES:
        raise FullresError(f"unknown data type {name!r}; known: {', '.join(DTYPES)}")
    return DTYPES[name]


def _nothing(job: Job) -> int:
    raise AssertionError(f"{job.source} is done already")
