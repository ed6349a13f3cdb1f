"""Large pictures in parts: the plan, the halo, the streaming run.

A tile is kept without its halo, the margin that is run with it and thrown away. Tiles start on
multiples of the network's input multiple, so that its downsampling grids fall as in a run of the
whole picture.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fullres.errors import FullresError

log = logging.getLogger(__name__)

REACH = 64
"""Pixels of halo that a network's convolutions get, beyond half the window of local operations."""


@dataclass(frozen=True)
class Span:
    """One axis of a tile, in pixels of the input: `start:stop` is kept, the rest is halo."""

    start: int
    stop: int
    run_start: int
    run_stop: int

    @property
    def kept(self) -> int:
        return self.stop - self.start

    @property
    def run(self) -> int:
        return self.run_stop - self.run_start

    def inside(self, scale: int) -> slice:
        """Where the kept part lies in the network's output for the run part."""
        start = (self.start - self.run_start) * scale
        return slice(start, start + self.kept * scale)


@dataclass(frozen=True)
class Tile:
    """A part of a picture, and the larger part that is run for it."""

    rows: Span
    columns: Span

    @property
    def pixels(self) -> int:
        """Pixels kept."""
        return self.rows.kept * self.columns.kept

    @property
    def run_pixels(self) -> int:
        """Pixels run, the halo included."""
        return self.rows.run * self.columns.run


@dataclass(frozen=True)
class Grid:
    """What every tile of one picture has in common: lengths in pixels, as (height, width)."""

    size: tuple[int, int]
    halo: tuple[int, int]
    multiple: int

    def tiles(self, kept: tuple[int, int]) -> list[Tile]:
        """Tiles that keep `kept` pixels each, rounded up to the multiple; row by row."""
        rows, columns = (self._spans(axis, 0, self.size[axis], kept[axis]) for axis in (0, 1))
        return [Tile(row, column) for row in rows for column in columns]

    def halves(self, tile: Tile) -> list[Tile]:
        """The same kept pixels in two tiles, cut where that saves more; [tile] if nothing saves."""
        best = [tile]
        for axis, span in enumerate((tile.rows, tile.columns)):
            parts = self._spans(axis, span.start, span.stop, math.ceil(span.kept / 2))
            cut = [Tile(p, tile.columns) if axis == 0 else Tile(tile.rows, p) for p in parts]
            if largest_run(cut).run_pixels < largest_run(best).run_pixels:
                best = cut
        return best

    def _spans(self, axis: int, first: int, last: int, kept: int) -> list[Span]:
        length, halo = self.size[axis], self.halo[axis]
        spans = []
        for start in range(first, last, _round_up(kept, self.multiple)):
            stop = min(start + _round_up(kept, self.multiple), last)
            # a tile at the border reaches as far inward as any other reaches both ways together:
            # a window clipped by the border is as long as one in the middle
            run_start = max(min(start - halo, length - 2 * halo), 0)
            run_stop = min(max(stop + halo, 2 * halo), length)
            spans.append(Span(start, stop, run_start - run_start % self.multiple, run_stop))
        return spans


def halo_for(window: tuple[int, int] | None, multiple: int) -> tuple[int, int]:
    """Halo per axis: half the window, if any, plus `REACH`, rounded up to the input multiple."""
    rows, columns = (_round_up(side // 2 + REACH, multiple) for side in window or (0, 0))
    return rows, columns


def largest_run(tiles: list[Tile]) -> Tile:
    """The tile that runs the most pixels."""
    return max(tiles, key=lambda tile: tile.run_pixels)


def tiles_within(grid: Grid, pixels: int) -> list[Tile]:
    """Tiles that each run at most `pixels` pixels, halo included, and the fewest in total.

    Keeps the smallest useful tile where `pixels` would ask for less: one that keeps as many pixels
    a side as its halo has.
    """
    height, width = grid.size
    if height * width <= pixels:
        return grid.tiles((height, width))
    least = [max(_round_up(side, grid.multiple), 64) for side in grid.halo]
    best, least_area = (least[0], least[1]), math.inf
    for count in range(1, math.ceil(width / least[1]) + 1):
        columns = _round_up(math.ceil(width / count), grid.multiple)
        run_width = min(columns + 2 * grid.halo[1], width)
        run_height = pixels // run_width
        rows = run_height - 2 * grid.halo[0]
        rows -= rows % grid.multiple
        if run_height >= height:
            strips = 1
        elif rows >= least[0]:
            strips = math.ceil(height / rows)
        else:
            continue
        area = (width + 2 * (count - 1) * grid.halo[1]) * (height + 2 * (strips - 1) * grid.halo[0])
        if area < least_area:
            best, least_area = (math.ceil(height / strips), columns), area
    return grid.tiles(best)


def choose_tiles(grid: Grid, peak: Callable[[int, int], int], budget: int, free: int) -> list[Tile]:
    """The largest tiles whose pass stays within `budget` bytes; the whole picture if it does.

    Args:
        grid: the picture's.
        peak: bytes that a pass at a height and width needs.
        budget: bytes that a pass should need at most.
        free: bytes that it can need at most.

    Raises:
        FullresError: the smallest useful tile needs more than `free`.
    """
    height, width = grid.size
    needed, run_pixels = peak(height, width), height * width
    tiles, pixels = grid.tiles(grid.size), run_pixels
    while needed > budget:
        # a step of its own beside the proportion: some networks need more than in proportion
        pixels = min(int(budget / needed * run_pixels), int(0.9 * pixels))
        tiles = tiles_within(grid, pixels)
        largest = largest_run(tiles)
        needed, run_pixels = peak(largest.rows.run, largest.columns.run), largest.run_pixels
        if run_pixels > pixels:
            if needed > free:
                raise FullresError(
                    f"{free / 1e9:.1f} GB of free memory is too little: a tile of "
                    f"{largest.columns.run} × {largest.rows.run} pixels needs {needed / 1e9:.1f} "
                    "GB; close other programs, or take a smaller window or network"
                )
            break
    return tiles


def run_tiles(
    tiles: list[Tile],
    grid: Grid,
    run: Callable[[Tile], None],
    done: Callable[[int], None],
    too_large: float = math.inf,
) -> float:
    """Run every tile; one that memory does not hold is halved, and so are those as large.

    Args:
        tiles: what to run.
        grid: the picture's.
        run: reads, restores and writes one tile.
        done: told the pixels of every tile that is finished.
        too_large: pixels of a run that earlier proved too many.

    Returns:
        `too_large`, lower if memory ran out.

    Raises:
        FullresError: memory does not hold the smallest tile either.
    """
    waiting = tiles[::-1]
    while waiting:
        tile = waiting.pop()
        if tile.run_pixels < too_large:
            if not _runs_out_of_memory(run, tile):
                done(tile.pixels)
                continue
            too_large = tile.run_pixels
            log.warning(
                "out of memory at %d × %d pixels: smaller tiles", tile.columns.run, tile.rows.run
            )
        halves = grid.halves(tile)
        if largest_run(halves).run_pixels > 0.9 * tile.run_pixels:
            raise FullresError(
                f"out of memory even with a tile of {tile.columns.run} × {tile.rows.run} pixels; "
                "close other programs, or take a smaller window or network"
            )
        waiting += halves[::-1]
    return too_large


def _runs_out_of_memory(run: Callable[[Tile], None], tile: Tile) -> bool:
    try:
        run(tile)
    except MemoryError:
        pass
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
    else:
        return False
    # out of the handler, so that the frames that held the tensors are gone
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return True


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether torch raised this because memory ran out, on whatever device."""
    signs = ("out of memory", "can't allocate memory", "not enough memory")
    return any(sign in str(error).lower() for sign in signs)


def paste(write: Callable[[int, int, Tensor], None], tile: Tile, output: Tensor) -> None:
    """Write the kept part of `output` (C, sH, sW), the network's output for the tile's run part."""
    scale = output.shape[-2] // tile.rows.run
    kept = output[:, tile.rows.inside(scale), tile.columns.inside(scale)]
    write(tile.rows.start * scale, tile.columns.start * scale, kept)


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
