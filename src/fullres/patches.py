"""Patch-wise inference as the papers know it: patches of the training size, put together again.

Patches differ from tiles in what they are for. Tiles bound the memory and give what the whole
picture gives; patches show a network what it saw in training, and each is restored by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from fullres.errors import FullresError

Size = int | tuple[int, int]


def restore_patches(
    network: Callable[[Tensor], Tensor], x: Tensor, size: Size, overlap: int = 0, batch: int = 8
) -> Tensor:
    """Restore a picture patch by patch; where patches overlap, the mean of their results.

    The last patch of a row or column ends flush with the border and so may overlap by more.

    Args:
        network: maps (B, C, h, w) to (B, C', s h, s w), for a whole number s, the scale.
        x: (B, C, H, W).
        size: height and width of the patches in pixels; a smaller picture is one patch.
        overlap: pixels that neighbours share at least, less than the size.
        batch: patches that run at a time, at least 1.

    Returns:
        (B, C', s H, s W); of a picture that one patch covers, the network's own output.

    Raises:
        FullresError: the size, overlap or batch cannot be.

    >>> x = torch.rand(1, 3, 50, 70)
    >>> torch.allclose(restore_patches(torch.sigmoid, x, 32, overlap=8), torch.sigmoid(x))
    True
    """
    corners, shape = _corners((x.shape[-2], x.shape[-1]), size, overlap)
    if batch < 1:
        raise FullresError(f"{batch} patches at a time are none; give 1 or more")
    if len(corners) == 1:
        return network(x)
    total = count = x.new_zeros(0)
    for start in range(0, len(corners), batch):
        some = corners[start : start + batch]
        outputs = network(torch.cat([_cut(x, corner, shape) for corner in some]))
        scale = outputs.shape[-2] // shape[0]
        if not total.numel():
            height, width = x.shape[-2] * scale, x.shape[-1] * scale
            total = outputs.new_zeros(len(x), outputs.shape[1], height, width)
            count = outputs.new_zeros(height, width)
        scaled = (shape[0] * scale, shape[1] * scale)
        for (top, left), output in zip(
            some, outputs.view(-1, len(x), *outputs.shape[1:]), strict=True
        ):
            corner = (top * scale, left * scale)
            _cut(total, corner, scaled).add_(output)
            _cut(count, corner, scaled).add_(1)
    return total.div_(count)


def seams(restored: Tensor, target: Tensor, size: Size, overlap: int = 0) -> float:
    """How much stronger the error jumps where patches begin and end than elsewhere.

    The mean absolute difference of the error `restored - target` between neighbouring rows, and
    neighbouring columns, across the borders of patches, over the same mean across all other
    neighbours. It is 1 without seams and grows with them.

    Args:
        restored: (..., H, W), put together from patches.
        target: of the same shape.
        size: height and width of the patches in pixels of `restored`.
        overlap: pixels that neighbours share at least, in pixels of `restored`.

    Returns:
        The ratio; 1 if one patch covers the picture, infinite if the error jumps nowhere else.

    Raises:
        FullresError: the shapes differ, or the size or overlap cannot be.

    >>> error = torch.tensor([[0.0, 1, 0, 1, 4, 5, 4, 5]])  # a jump of 3 where others are of 1
    >>> seams(error, torch.zeros(1, 8), 4)
    3.0
    """
    if restored.shape != target.shape:
        raise FullresError(
            f"the restored picture is {tuple(restored.shape)} and its target "
            f"{tuple(target.shape)}: compare pictures of one shape"
        )
    error = restored.double() - target.double()
    corners, shape = _corners((error.shape[-2], error.shape[-1]), size, overlap)
    across, elsewhere = error.new_zeros(2), error.new_zeros(2)
    for axis, dim in ((0, -2), (1, -1)):
        jumps = error.diff(dim=dim).abs().movedim(dim, 0).flatten(1)
        lines = torch.zeros(len(jumps), dtype=torch.bool)
        starts = {corner[axis] for corner in corners}
        for line in starts | {start + shape[axis] for start in starts}:
            if 0 < line < error.shape[dim]:
                lines[line - 1] = True
        for found, kept in ((across, jumps[lines]), (elsewhere, jumps[~lines])):
            found += torch.stack([kept.sum(), kept.new_tensor(kept.numel())])
    if not across[1]:
        return 1.0
    if not elsewhere[0]:
        return float("inf") if across[0] else 1.0
    return float((across[0] / across[1]) / (elsewhere[0] / elsewhere[1]))


Corner = tuple[int, int]


def _corners(picture: Corner, size: Size, overlap: int) -> tuple[Sequence[Corner], Corner]:
    """Top and left of every patch, row by row, and the patches' height and width."""
    sides = (size, size) if isinstance(size, int) else size
    if min(sides) < 1 or not 0 <= overlap < min(sides):
        raise FullresError(
            f"patches of {sides[0]} × {sides[1]} pixels cannot overlap by {overlap}; give an "
            "overlap from 0 to less than the size"
        )
    rows, columns = (
        list(_starts(length, side, overlap)) for length, side in zip(picture, sides, strict=True)
    )
    shape = (min(picture[0], sides[0]), min(picture[1], sides[1]))
    return [(top, left) for top in rows for left in columns], shape


def _starts(length: int, side: int, overlap: int) -> Iterator[int]:
    yield from range(0, length - side, side - overlap)
    yield max(length - side, 0)


def _cut(x: Tensor, corner: Corner, shape: Corner) -> Tensor:
    return x[..., corner[0] : corner[0] + shape[0], corner[1] : corner[1] + shape[1]]
