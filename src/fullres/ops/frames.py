"""Statistics of the windows that a map contains, which stand for a statistic at every position.

A window that would reach over the border has the statistic of the nearest one within: the values
of the contained windows, extended to the map by edge replication. Whatever acts position by
position may act on the contained windows alone, before they are extended, and a product with the
map needs no extended copy of them at all.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fullres.ops.arrays import transformed

Size = tuple[int, int]


@dataclass(frozen=True)
class Frame:
    """A map and the windows that it contains: how (…, h, w) stands for (…, H, W)."""

    size: Size
    """Height and width of the map, H and W."""
    before: Size
    """Rows above the first window's position, and columns left of it."""
    windows: Size
    """Numbers of contained windows, h and w."""

    @property
    def window(self) -> Size:
        """Height and width of a window, clipped to the map's."""
        return self.size[0] - self.windows[0] + 1, self.size[1] - self.windows[1] + 1

    @classmethod
    def of(cls, size: Size, window: Size) -> Frame:
        """That of windows of one height and width, clipped to the map's.

        >>> Frame.of((5, 9), (3, 20))
        Frame(size=(5, 9), before=(1, 4), windows=(3, 1))
        """
        clipped = [min(k, n) for k, n in zip(window, size, strict=True)]
        before = ((clipped[0] - 1) // 2, (clipped[1] - 1) // 2)
        return cls(size, before, (size[0] - clipped[0] + 1, size[1] - clipped[1] + 1))

    @classmethod
    def whole(cls, size: Size) -> Frame:
        """That of a statistic which is there at every position already."""
        return cls(size, (0, 0), size)

    def extended(self, inner: Tensor) -> Tensor:
        """The statistic (B, C, h, w) at every position, (B, C, H, W)."""
        if self.windows == self.size:
            return inner
        (height, width), (top, left), (rows, columns) = self.size, self.before, self.windows
        if not inner.is_floating_point():
            inner = inner.index_select(-2, self._nearest(0, inner.device))
            return inner.index_select(-1, self._nearest(1, inner.device))
        margins = (left, width - columns - left, top, height - rows - top)
        return F.pad(inner, margins, mode="replicate")

    def _nearest(self, axis: int, device: torch.device) -> Tensor:
        positions = torch.arange(self.size[axis], device=device) - self.before[axis]
        return positions.clamp(0, self.windows[axis] - 1)

    def scaled(
        self, x: Tensor, inner: Tensor, *, plus: Tensor | None = None, in_place: bool = False
    ) -> Tensor:
        """Product of a map (B, C, H, W) and the statistic (B, C, h, w) at every position.

        With a map `plus`, of the type of the product, added; written to `x` where `in_place`, for
        which `plus` has memory of its own.
        """
        given = [x, inner] if plus is None else [x, inner, plus]
        derived = torch.is_grad_enabled() and any(t.requires_grad for t in given)
        if derived or transformed() or x.shape[:2] != inner.shape[:2] or self.windows == self.size:
            y = self.extended(inner)
            product = x.mul_(y) if in_place else x * y
            return product if plus is None else product.add_(plus)
        out = x if in_place else torch.empty_like(x, dtype=torch.result_type(x, inner))
        for rows, rows_within in self._runs(0):
            for columns, columns_within in self._runs(1):
                place, within = (..., rows, columns), (..., rows_within, columns_within)
                if plus is None:
                    torch.mul(x[place], inner[within], out=out[place])
                else:
                    torch.addcmul(plus[place], x[place], inner[within], out=out[place])
        return out

    def _runs(self, axis: int) -> Iterator[tuple[slice, slice]]:
        """Runs of positions along an axis, each with its windows: one for all, or each its own."""
        first, last = self.before[axis], self.before[axis] + self.windows[axis]
        if first:
            yield slice(0, first), slice(0, 1)
        yield slice(first, last), slice(0, self.windows[axis])
        if last < self.size[axis]:
            yield slice(last, self.size[axis]), slice(self.windows[axis] - 1, self.windows[axis])
