"""Tiles that the memory free now holds, and whether their passes may keep what they free."""

from __future__ import annotations

from collections.abc import Callable

import torch

from fullres.memory import free_memory, return_freed_memory
from fullres.tiles import Grid, Tile, choose_tiles, largest_run

MEMORY_SHARE = 0.5
"""Share of the free memory that a pass is planned to take."""
KEPT = 3
"""Memory that a pass takes over that of its tensors where freed memory is kept, about the most."""
KEPT_PAYS = 1.2
"""Pixels run in the smaller tiles that leave room for keeping memory, over those without."""

Peak = Callable[[int, int], int]
"""Bytes that a pass at a height and width needs."""


def tiles_for_memory(grid: Grid, peak: Peak, device: torch.device) -> list[Tile]:
    """The largest tiles whose pass takes its share of the memory free on `device`.

    On the CPU smaller ones, if it costs little: those that leave room for keeping freed memory.

    Raises:
        FullresError: the free memory does not hold the smallest useful tile.
    """
    free = free_memory(device)
    if KEPT * peak(*grid.size) > MEMORY_SHARE * free:
        return_freed_memory()  # that the last picture left
        free = free_memory(device)
    budget = int(MEMORY_SHARE * free)
    tiles = choose_tiles(grid, peak, budget, free)
    if device.type != "cpu":
        return tiles
    smaller = choose_tiles(grid, peak, budget // KEPT, free)
    return smaller if _pixels_run(smaller) <= KEPT_PAYS * _pixels_run(tiles) else tiles


def _pixels_run(tiles: list[Tile]) -> int:
    """Pixels of all passes, halos included."""
    return sum(tile.run_pixels for tile in tiles)


def leaves_room(tiles: list[Tile], peak: Peak, device: torch.device) -> bool:
    """Whether the pass of the largest tile may keep freed memory."""
    largest = largest_run(tiles)
    needed = KEPT * peak(largest.rows.run, largest.columns.run)
    return needed <= MEMORY_SHARE * free_memory(device)
