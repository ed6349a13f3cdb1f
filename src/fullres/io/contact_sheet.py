"""Contact sheets: crops side by side under a title, one row a picture."""

from __future__ import annotations

import html
import os
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyvips
import torch.nn.functional as F
from torch import Tensor

from fullres.errors import ImageError
from fullres.io import vips

SIDE = 224
"""Height and width of a crop in pixels, at most."""
GAP = 8
LINE = 22
"""Height of a line of text in pixels."""
FONT = "sans 10"

Box = tuple[slice, slice]


@dataclass(frozen=True)
class Strip:
    """One picture of a sheet."""

    title: str
    cells: Sequence[tuple[str, Tensor]]
    """Captions and crops, (1 or 3, H, W) in [0, 1], all of one size."""


def where_they_differ(first: Tensor, second: Tensor, side: int = SIDE) -> Box:
    """Rows and columns of the square in which two pictures differ most, to an eighth of its side.

    Args:
        first: (C, H, W).
        second: of the same shape.
        side: of the square in pixels; cut where the picture is smaller.
    """
    difference = (first - second).abs().mean(0)
    height, width = (min(side, n) for n in difference.shape)
    step = max(side // 8, 1)
    means = F.avg_pool2d(difference[None], (height, width), step)[0]
    top, left = (step * n for n in divmod(int(means.argmax()), means.shape[1]))
    return slice(top, top + height), slice(left, left + width)


def write_contact_sheet(strips: Sequence[Strip], target: Path) -> None:
    """Write a PNG of 8 bits with a row a picture; it appears complete or not at all.

    Raises:
        ImageError: it cannot be written.
    """
    part = target.with_name(f".{target.name}.{secrets.token_hex(4)}.part")
    try:
        sheet = _stacked([_drawn(strip) for strip in strips])
        vips.from_array(sheet, "srgb").pngsave(os.fsencode(part))
        part.replace(target)
    except (pyvips.Error, OSError) as error:
        raise ImageError(f"{target}: cannot be written ({vips.condense(error)})") from error
    finally:
        part.unlink(missing_ok=True)


Pixels = np.ndarray[Any, Any]


def _drawn(strip: Strip) -> Pixels:
    """A title over cells, each a caption over its crop."""
    count, (height, width) = len(strip.cells), strip.cells[0][1].shape[-2:]
    pitch = max(width, SIDE) + GAP
    drawn = np.full((2 * LINE + height + 2 * GAP, count * pitch + GAP, 3), 255, np.uint8)
    _write(drawn[GAP : GAP + LINE, GAP:], f"<b>{html.escape(strip.title, quote=False)}</b>")
    for number, (caption, crop) in enumerate(strip.cells):
        left = GAP + number * pitch
        _write(
            drawn[GAP + LINE : GAP + 2 * LINE, left : left + pitch - GAP],
            html.escape(caption, quote=False),
        )
        values = (crop.clamp(0, 1) * 255).round().expand(3, -1, -1).permute(1, 2, 0)
        top = GAP + 2 * LINE
        drawn[top : top + height, left : left + width] = values.byte().numpy()
    return drawn


def _write(field: Pixels, markup: str) -> None:
    """Draw black text into a white field, cut where it does not fit."""
    text = pyvips.Image.text(markup, font=FONT, dpi=96)
    height, width = min(text.height, field.shape[0]), min(text.width, field.shape[1])
    ink = vips.fetch(text, 0, 0, height, width)
    field[:height, :width] = 255 - ink


def _stacked(rows: Sequence[Pixels]) -> Pixels:
    width = max(row.shape[1] for row in rows)
    margins = [((0, 0), (0, width - row.shape[1]), (0, 0)) for row in rows]
    padded = [np.pad(r, m, constant_values=255) for r, m in zip(rows, margins, strict=True)]
    return np.ascontiguousarray(np.concatenate(padded))
