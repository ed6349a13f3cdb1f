"""Draw what pyramid attention and GRL's blocks look at from one position of a photograph.

    python examples/hierarchies.py [FOLDER]

Writes pyramid.png and stripes.png to FOLDER (default: docs/hierarchies). Nothing is drawn by
hand: a position counts as looked at where it has a derivative of the result.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from skimage import data
from torch import Tensor

from fullres.networks.grl_attention import StripeAxis, WindowAttention, stripe_attention
from fullres.ops.pyramid import SCALES, pyramid_attention

QUERY = (118, 150)
"""Row and column of the position that looks."""
SIZE = (192, 256)
"""Height and width of the photograph, and of the maps."""
DOWN = 4
"""Positions along the side of an anchor's cell."""


def photograph() -> Tensor:
    """(3, H, W) in [0, 1]."""
    picture = Image.fromarray(data.chelsea()).resize(SIZE[::-1], Image.Resampling.LANCZOS)
    return (
        torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
        .view(*SIZE, 3)
        .permute(2, 0, 1)
        / 255
    )


def weights_of_pyramid(photo: Tensor, window: tuple[int, int] | None) -> list[Tensor]:
    """Attention paid to each position of each scale, where pixels themselves are the features."""
    features = [(photo - photo.mean((1, 2), keepdim=True))[None]]
    for scale in SCALES[1:]:
        smaller = F.interpolate(features[0], scale_factor=scale, mode="bicubic", antialias=True)
        features.append(smaller)
    values = [torch.zeros_like(x[:, :1]).requires_grad_() for x in features]
    result = pyramid_attention(features[0], features, values, window=window)
    return [g[0, 0] for g in torch.autograd.grad(result[0, 0, QUERY[0], QUERY[1]], values)]


def seen_in_windows(size: tuple[int, int], window: int, shifted: bool) -> Tensor:
    """What window attention looks at: a mask (H, W)."""
    qkv = torch.randn(1, 6, *size).requires_grad_()
    result = WindowAttention(2, window, shifted)(qkv)
    return _reached(result, qkv)


def seen_in_stripes(
    size: tuple[int, int], rows: StripeAxis, columns: StripeAxis, window: tuple[int, int] | None
) -> Tensor:
    """What anchored stripe attention looks at: a mask (H, W).

    With a window it is the local form, calibrated on crops of the window's size.
    """
    attention = stripe_attention(2, (rows, columns), DOWN)
    if window is not None:
        attention = attention.to_local(window, window)
    qkv = torch.randn(1, 6, *size).requires_grad_()
    anchors = F.avg_pool2d(qkv[:, :2], DOWN, ceil_mode=True)
    return _reached(attention(qkv, anchors), qkv)


def _reached(result: Tensor, x: Tensor) -> Tensor:
    (gradient,) = torch.autograd.grad(result[0, :, QUERY[0], QUERY[1]].sum(), x)
    return gradient[0].abs().sum(0) > 0


def panel(photo: Tensor, light: Tensor, title: str) -> Image.Image:
    """The photograph, dark where `light` (H, W) is 0, with the query marked and a title above."""
    shown = photo * (0.22 + 0.78 * light)
    pixels = (shown.clamp(0, 1) * 255).byte().permute(1, 2, 0).contiguous().numpy()
    image = Image.new("RGB", (SIZE[1], SIZE[0] + 18), "white")
    image.paste(Image.fromarray(pixels), (0, 18))
    draw = ImageDraw.Draw(image)
    draw.text((2, 3), title, fill="black")
    y, x = QUERY[0] + 18, QUERY[1]
    draw.rectangle((x - 3, y - 3, x + 3, y + 3), outline="red", width=2)
    return image


def heat(weights: Tensor) -> Tensor:
    """Attention as light: 1 where it is largest, at the size of the photograph."""
    x = F.interpolate(weights[None, None], size=SIZE, mode="nearest")[0, 0]
    x = F.max_pool2d(x[None], 3, 1, 1)[0]
    return (x / x.max()) ** 0.35


def sheet(rows: list[list[Image.Image]]) -> Image.Image:
    """Panels in rows, on white."""
    gap = 6
    width, height = rows[0][0].size
    columns = max(map(len, rows))
    page = Image.new("RGB", (columns * (width + gap) - gap, len(rows) * (height + gap)), "white")
    for i, row in enumerate(rows):
        for j, image in enumerate(row):
            page.paste(image, (j * (width + gap), i * (height + gap)))
    return page.quantize(192)


def main() -> None:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "docs/hierarchies")
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    photo = photograph()
    every = weights_of_pyramid(photo, None)
    near = weights_of_pyramid(photo, (72, 72))
    shown = (0, 2, 4)
    pyramid = [
        [panel(photo, heat(found[i]), f"{name}, scale {SCALES[i]:g}") for i in shown]
        for name, found in (("every position", every), ("window 72 x 72", near))
    ]
    sheet(pyramid).save(folder / "pyramid.png", optimize=True)

    fixed = StripeAxis(24, 1, False), StripeAxis(96, 1, False)
    share = StripeAxis(None, 4, False), StripeAxis(None, 1, False)
    stripes = [
        [
            panel(photo, seen_in_windows(SIZE, 24, False), "window 24 x 24"),
            panel(photo, seen_in_windows(SIZE, 24, True), "window, shifted by half"),
            panel(photo, seen_in_stripes(SIZE, *fixed, None), "stripe of fixed 24 x 96"),
        ],
        [
            panel(photo, seen_in_stripes(SIZE, *share, None), "stripe: 1/4 of rows x all columns"),
            panel(photo, seen_in_stripes(SIZE, *share[::-1], None), "stripe across, as published"),
            panel(photo, seen_in_stripes(SIZE, *share, (96, 96)), "the same, local (crops of 96)"),
        ],
    ]
    sheet(stripes).save(folder / "stripes.png", optimize=True)


if __name__ == "__main__":
    main()
