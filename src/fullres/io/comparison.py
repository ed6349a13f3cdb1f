"""Before/after pictures."""

from __future__ import annotations

import contextlib
import os
import secrets
from pathlib import Path
from typing import Any

import pyvips

from fullres.errors import ImageError
from fullres.io import vips

DIVIDER = 4
"""Width of the line between the two halves, in pixels."""


def write_comparison(before: Path, after: Path, target: Path) -> None:
    """Write `before` and `after` side by side to `target`, a PNG of 8 bits, upright and opaque.

    A smaller `before` is enlarged pixel by pixel to the size of `after`.

    Raises:
        ImageError: one of the files cannot be read, or `target` not written.
    """
    # hidden, so that a part left by a kill is never taken for a picture
    part = target.with_name(f".{target.name}.{secrets.token_hex(4)}.part")
    try:
        left, right = _viewable(before), _viewable(after)
        if left.width != right.width:
            left = left.resize(
                right.width / left.width, vscale=right.height / left.height, kernel="nearest"
            )
        shape = {"shim": DIVIDER, "background": [255.0] * max(left.bands, right.bands)}
        left.join(right, "horizontal", **shape).pngsave(os.fsencode(part))
        part.replace(target)
    except pyvips.Error as error:
        raise ImageError(f"{target}: cannot be written ({vips.condense(error)})") from error
    finally:
        with contextlib.suppress(OSError):
            part.unlink()


def _viewable(path: Path) -> Any:
    """A picture as it is meant to be seen, 8 bits a channel, 1 or 3 channels."""
    image = pyvips.Image.new_from_file(os.fsencode(path)).autorot()
    if image.interpretation == "cmyk":
        image = image.icc_transform("srgb", embedded=True, input_profile="cmyk")
    grey = image.bands < 3
    if image.format == "float":
        # libvips takes floats to lie between 0 and 255, fullres between 0 and 1
        image = (image * 255).copy(interpretation="b-w" if grey else "srgb")
    image = image.colourspace("b-w" if grey else "srgb").cast("uchar")
    return image.flatten(background=255) if image.hasalpha() else image
