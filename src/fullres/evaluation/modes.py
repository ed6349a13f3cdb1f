"""Modes of an evaluation: the ways in which a network is run on a picture, with time and memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from fullres.budget import KEPT, MEMORY_SHARE, leaves_room, tiles_for_memory
from fullres.errors import FullresError
from fullres.evaluation.results import GLOBAL
from fullres.local import Local
from fullres.measure import seconds
from fullres.memory import free_memory, freed_memory_returned
from fullres.networks.spec import Network
from fullres.patches import restore_patches
from fullres.restore import Restorer, ready, restore_tensor
from fullres.tiles import Grid, Tile, halo_for, is_out_of_memory, largest_run, paste, run_tiles

LOCAL, PATCHES = "local", "patches"
BATCH = 8
"""Patches that run at a time, at most."""
WARM = 64
"""Pixels a side, beyond the window, of the first part that a mode runs, which is not timed."""

Size = int | tuple[int, int]


@dataclass(frozen=True)
class Restored:
    """A picture that a mode has restored."""

    output: Tensor
    """(B, out_channels, scale H, scale W), float32, on the CPU."""
    seconds: float
    memory: int
    """Bytes, as `Row.memory` has them."""
    tiles: int
    """Passes; of patches, the batches."""


class Mode(Protocol):
    """A way to run a network on a picture."""

    @property
    def restorer(self) -> Restorer: ...

    def run(self, x: Tensor, path: Path, done: Callable[[int], None]) -> Restored:
        """Restore (B, in_channels, H, W) in [0, 1], float32, on the CPU.

        Args:
            x: the picture as the network takes it.
            path: its file, for errors.
            done: told the pixels of every part that is finished.

        Raises:
            FullresError: the network fails, or memory does not hold the least that runs.
        """

    def warm_up(self, x: Tensor, path: Path) -> None:
        """Load and compile what a run needs, on a part of a picture."""


@dataclass(frozen=True)
class Whole:
    """The network over the whole picture, in tiles where memory does not hold it."""

    restorer: Restorer

    def run(self, x: Tensor, path: Path, done: Callable[[int], None]) -> Restored:
        restorer = self.restorer
        size = (x.shape[-2], x.shape[-1])
        tiles, grid = _tiles(size, restorer)
        keeps = restorer.tile is not None or leaves_room(tiles, restorer.peak, restorer.device)
        output = x.new_zeros(0)
        passes = 0

        def run(tile: Tile) -> None:
            nonlocal output, passes
            rows, columns = tile.rows, tile.columns
            part = x[..., rows.run_start : rows.run_stop, columns.run_start : columns.run_stop]
            restored = restore_tensor(part, restorer, path)
            if not output.numel():
                scale = restored.shape[-2] // rows.run
                output = restored.new_empty(*restored.shape[:2], *(scale * n for n in size))

            def write(top: int, left: int, kept: Tensor) -> None:
                height, width = kept.shape[-2:]
                at = (slice(top, top + height), slice(left, left + width))
                output.flatten(0, 1)[:, at[0], at[1]] = kept

            paste(write, tile, restored.flatten(0, 1))
            passes += 1

        def call() -> None:
            with nullcontext() if keeps else freed_memory_returned():
                restorer.too_large = run_tiles(tiles, grid, run, done, restorer.too_large)

        largest = largest_run(tiles)
        taken, memory = _measured(call, restorer)
        if memory is None:
            memory = len(x) * restorer.peak(largest.rows.run, largest.columns.run)
        return Restored(output, taken, memory, passes)

    def warm_up(self, x: Tensor, path: Path) -> None:
        height, width = (side + WARM for side in self.restorer.window or (0, 0))
        restore_tensor(x[..., :height, :width], self.restorer, path)


@dataclass(frozen=True)
class Patchwise:
    """The network over patches of the training size."""

    restorer: Restorer
    size: tuple[int, int]
    overlap: int

    def run(self, x: Tensor, path: Path, done: Callable[[int], None]) -> Restored:
        restorer = self.restorer
        height, width = (min(n, side) for n, side in zip(x.shape[-2:], self.size, strict=True))
        each = len(x) * restorer.peak(height, width)
        room = MEMORY_SHARE * free_memory(restorer.device) / KEPT
        batch, passes = max(1, min(BATCH, int(room / each))), 0
        output = x.new_zeros(0)

        def network(patches: Tensor) -> Tensor:
            nonlocal passes
            passes += 1
            return restore_tensor(patches, restorer, path)

        def call() -> None:
            nonlocal output, passes
            passes = 0
            output = restore_patches(network, x, self.size, self.overlap, batch)

        while True:
            try:
                taken, memory = _measured(call, restorer)
                break
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                if batch == 1:
                    raise FullresError(
                        f"{path}: memory does not hold a patch of {width} × {height} pixels; "
                        "close other programs, or take a smaller --patch-size"
                    ) from None
                batch //= 2
        done(x.shape[-2] * x.shape[-1])
        if memory is None:
            memory = math.ceil(each * batch)
        return Restored(output, taken, memory, passes)

    def warm_up(self, x: Tensor, path: Path) -> None:
        restore_tensor(x[..., : self.size[0], : self.size[1]], self.restorer, path)


def overlap_of(mode: str) -> int | None:
    """Pixels by which the patches of a mode overlap; None if it has no patches.

    Raises:
        FullresError: there is no such mode.

    >>> overlap_of("patches"), overlap_of("patches-16"), overlap_of("local")
    (0, 16, None)
    """
    name, dash, number = mode.partition("-")
    if name == PATCHES and (number.isdecimal() if dash else True):
        return int(number or 0)
    if mode in (GLOBAL, LOCAL):
        return None
    raise FullresError(
        f"unknown mode {mode!r}; known are {GLOBAL}, {LOCAL}, {PATCHES}, and {PATCHES}-16, or "
        "another number of pixels, for patches that overlap"
    )


def patch_side(network: Network, train_size: Size | None, patch_size: Size | None) -> Size:
    """Size of the patches: what is asked for, or the training size.

    Raises:
        FullresError: neither is known.
    """
    size = patch_size or train_size or network.spec.train_size
    if not size:
        raise FullresError(
            f"{network.spec.architecture}: the network does not say the size of the crops it was "
            "trained on, which patches take; give --train-size or --patch-size, or name only "
            f"other modes, --mode {GLOBAL} --mode {LOCAL}"
        )
    return size


@contextmanager
def open_modes(
    network: Network,
    modes: Sequence[str],
    settings: Local | None,
    patch_size: Size | None,
    where: tuple[str, str, int | None],
) -> Iterator[dict[str, Mode]]:
    """Every mode by name, ready to run.

    Args:
        network: is left unchanged.
        modes: their names.
        settings: of the local mode.
        patch_size: of the patches.
        where: device, data type and side of tiles, as in `restore`.

    Raises:
        FullresError: a mode is unknown or cannot be, or as `fullres.restore.ready`.
    """
    overlaps = {mode: overlap_of(mode) for mode in modes}
    sides = (patch_size, patch_size) if isinstance(patch_size, int) else patch_size
    for mode, overlap in overlaps.items():
        if overlap is not None and sides and overlap >= min(sides):
            raise FullresError(
                f"{mode}: patches of {sides[0]} × {sides[1]} pixels cannot overlap by {overlap}; "
                "give a larger --patch-size or another mode"
            )
    with ExitStack() as stack:
        opened: dict[str, Mode] = {}
        if set(modes) - {LOCAL}:
            as_it_is = stack.enter_context(ready(network, None, *where))
        for mode, overlap in overlaps.items():
            if mode == LOCAL:
                opened[mode] = Whole(stack.enter_context(ready(network, settings, *where)))
            elif overlap is None:
                opened[mode] = Whole(as_it_is)
            else:
                assert sides is not None
                opened[mode] = Patchwise(as_it_is, sides, overlap)
        yield opened


def _tiles(size: tuple[int, int], restorer: Restorer) -> tuple[list[Tile], Grid]:
    multiple = restorer.spec.multiple
    grid = Grid(size, halo_for(restorer.window, multiple), multiple)
    if restorer.tile:
        tiles = grid.tiles((restorer.tile, restorer.tile))
    else:
        tiles = tiles_for_memory(grid, restorer.peak, restorer.device)
    if len(tiles) > 1 and restorer.has_global:
        restorer.say_once("large pictures run in tiles: global operations see one tile at a time")
    return tiles, grid


def _measured(call: Callable[[], None], restorer: Restorer) -> tuple[float, int | None]:
    """Seconds, and bytes where the device counts them."""
    if restorer.device.type != "cuda":
        return seconds(call), None
    torch.cuda.reset_peak_memory_stats(restorer.device)
    held = torch.cuda.memory_allocated(restorer.device)
    taken = seconds(call)
    return taken, torch.cuda.max_memory_allocated(restorer.device) - held
