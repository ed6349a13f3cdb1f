"""Blur that varies over the picture: defocus, camera shake, things that move on their own.

Light adds up, code values do not: all blur is computed in linear light.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from fullres.data.degradations import CELLS, Noise, Range, check_range, smooth_field
from fullres.errors import FullresError

Path = npt.NDArray[np.float64]
"""(samples, axes), the way of the camera or of a thing over the exposure."""


def to_linear(x: Tensor) -> Tensor:
    """Linear light of sRGB code values; both in [0, 1] (IEC 61966-2-1).

    >>> to_linear(torch.tensor([0.0, 0.5, 1.0]))
    tensor([0.0000, 0.2140, 1.0000])
    """
    return torch.where(x <= 0.04045, x / 12.92, ((x.clamp_min(0) + 0.055) / 1.055) ** 2.4)


def to_srgb(x: Tensor) -> Tensor:
    """SRGB code values of linear light; both in [0, 1]. Undoes `to_linear`."""
    curve = 1.055 * x.clamp_min(0.0031308) ** (1 / 2.4) - 0.055
    return torch.where(x <= 0.0031308, 12.92 * x, curve)


@dataclass(frozen=True)
class Defocus:
    """Disc blur whose radius is a smooth random field over the picture, then Gaussian noise."""

    radius: Range = (0.0, 8.0)
    """Smallest and largest radius in pixels; a picture has both where it varies."""
    varying: bool = True
    """Otherwise one radius for the whole picture."""
    cells: int = CELLS
    """Of the field along the longer side: the more, the faster the radius changes."""
    noise: float = 2.0
    """Standard deviation in 1/255."""
    needs_whole: ClassVar[bool] = True
    scale: ClassVar[int] = 1

    def __post_init__(self) -> None:
        check_range("radius", self.radius, 0, 100)
        check_range("noise", (self.noise, self.noise), 0, 255)
        if self.cells < 1:
            raise FullresError(f"cells={self.cells}: a field has at least one cell")

    def __call__(self, clean: Tensor, random: np.random.Generator) -> Tensor:
        """Degrade (C, H, W) in [0, 1]."""
        height, width = clean.shape[-2:]
        low, high = self.radius
        if self.varying:
            field = low + (high - low) * smooth_field(random, height, width, self.cells)
        else:
            field = torch.full((height, width), random.uniform(low, high))
        return _with_noise(disc_blur(clean, field), self.noise, random)


@dataclass(frozen=True)
class Shake:
    """Camera shake: the picture shifted, turned and zoomed along a smooth random way.

    With `rotation` and `zoom` at zero the blur is alike over the whole picture.
    """

    shift: Range = (0.0, 6.0)
    """Largest distance in pixels of the way from its middle; one draw per picture."""
    rotation: Range = (0.0, 0.0)
    """Largest angle in degrees, about a random point of the picture."""
    zoom: Range = (0.0, 0.0)
    """Largest change of scale, in per cent, about the same point."""
    samples: int = 21
    """Moments of the exposure."""
    noise: float = 2.0
    """Standard deviation in 1/255."""
    needs_whole: ClassVar[bool] = True
    scale: ClassVar[int] = 1

    def __post_init__(self) -> None:
        check_range("shift", self.shift, 0, 100)
        check_range("rotation", self.rotation, 0, 45)
        check_range("zoom", self.zoom, 0, 50)
        check_range("noise", (self.noise, self.noise), 0, 255)
        if self.samples < 1:
            raise FullresError(f"samples={self.samples}: an exposure has at least one moment")

    def __call__(self, clean: Tensor, random: np.random.Generator) -> Tensor:
        """Degrade (C, H, W) in [0, 1]."""
        light = to_linear(clean)
        total = torch.zeros_like(light)
        for moment in self.moments((clean.shape[-2], clean.shape[-1]), random):
            total += warp(light, moment)
        return _with_noise(to_srgb(total / self.samples), self.noise, random)

    def moments(self, size: tuple[int, int], random: np.random.Generator) -> list[Tensor]:
        """(2, 3) per moment: where the camera's pixels (x, y, 1) come from, in pixels."""
        reach = [random.uniform(*r) for r in (self.shift, self.rotation, self.zoom)]
        pivot = np.array([random.uniform(0, size[1] - 1), random.uniform(0, size[0] - 1)])
        way = smooth_way(random, self.samples, 2) * reach[0]
        angle = np.deg2rad(smooth_way(random, self.samples, 1)[:, 0] * reach[1])
        scale = 1 + smooth_way(random, self.samples, 1)[:, 0] * reach[2] / 100
        found = []
        for shift, a, s in zip(way, angle, scale, strict=True):
            turn = s * np.array([[math.cos(a), -math.sin(a)], [math.sin(a), math.cos(a)]])
            move = pivot - turn @ pivot + shift
            found.append(torch.from_numpy(np.column_stack([turn, move])).float())
        return found


@dataclass(frozen=True)
class Motion:
    """Camera shake, and things of random shape that move along ways of their own before it."""

    shake: Shake = Shake(shift=(0.0, 3.0), rotation=(0.0, 1.0), zoom=(0.0, 1.0))
    """Of the background. Its noise is that of the result."""
    objects: tuple[int, int] = (1, 4)
    """Fewest and most things in a picture."""
    size: Range = (0.15, 0.4)
    """Diameter of a thing, over the picture's longer side."""
    speed: Range = (4.0, 12.0)
    """Length of a thing's way in pixels."""
    needs_whole: ClassVar[bool] = True
    scale: ClassVar[int] = 1

    def __post_init__(self) -> None:
        check_range("objects", self.objects, 0, 100)
        check_range("size", self.size, 0, 1)
        check_range("speed", self.speed, 0, 100)

    def __call__(self, clean: Tensor, random: np.random.Generator) -> Tensor:
        """Degrade (C, H, W) in [0, 1]."""
        light = to_linear(clean)
        size = (clean.shape[-2], clean.shape[-1])
        camera = self.shake.moments(size, random)
        fewest, most = self.objects
        things = [
            self._thing(light, random) for _ in range(random.integers(fewest, most, endpoint=True))
        ]
        total = torch.zeros_like(light)
        for moment, ground in enumerate(camera):
            scene = warp(light, ground)
            for thing in things:
                thing.put_on(scene, moment)
            total += scene
        return _with_noise(to_srgb(total / len(camera)), self.shake.noise, random)

    def _thing(self, light: Tensor, random: np.random.Generator) -> Thing:
        """A part of the picture, ragged like a blob, on a nearly straight way."""
        height, width = light.shape[-2:]
        diameter = random.uniform(*self.size) * max(height, width)
        y = torch.arange(height).float()[:, None] - random.uniform(0, height)
        x = torch.arange(width).float() - random.uniform(0, width)
        ragged = smooth_field(random, height, width, 12) - 0.5
        distance = (x.square() + y.square()).sqrt() / (diameter / 2) + ragged
        cover = ((1 - distance) * diameter / 4).clamp(0, 1)
        direction, length = random.uniform(0, 2 * math.pi), random.uniform(*self.speed)
        along = np.linspace(-0.5, 0.5, self.shake.samples)[:, None] * length
        bend = smooth_way(random, self.shake.samples, 2) * 0.1 * length
        way = along * np.array([math.cos(direction), math.sin(direction)]) + bend
        reach = math.ceil(np.abs(way).max()) + 2
        box = []
        for axis, size in ((1, height), (0, width)):
            inside = cover.any(axis).nonzero()
            first, last = (int(inside[0]), int(inside[-1])) if len(inside) else (0, 0)
            box.append(slice(max(first - reach, 0), min(last + reach + 1, size)))
        layer = torch.cat([light, cover[None]])[:, box[0], box[1]]
        return Thing(layer, (box[0], box[1]), torch.from_numpy(way).float())


@dataclass(frozen=True)
class Thing:
    """What moves on its own before the background."""

    layer: Tensor
    """Colours and cover, (C + 1, h, w)."""
    box: tuple[slice, slice]
    """Rows and columns of the picture that it stays within."""
    way: Tensor
    """(samples, 2), pixels along x and y."""

    def put_on(self, scene: Tensor, moment: int) -> None:
        """Lay it over (C, H, W), where it is at a moment; what it carries moves with it."""
        place = torch.eye(2, 3)
        place[:, 2] = self.way[moment]
        *colours, cover = warp(self.layer, place)
        below = scene[:, self.box[0], self.box[1]]
        below += cover * (torch.stack(colours) - below)


BLURS: dict[str, type] = {"defocus": Defocus, "shake": Shake, "motion": Motion}
"""By the name that recipes and `fullres degrade` use."""


def disc_blur(x: Tensor, radius: Tensor) -> Tensor:
    """Blur with discs, in linear light.

    Between radii a pixel apart the two blurred pictures are mixed.

    Args:
        x: (C, H, W), sRGB in [0, 1].
        radius: (H, W) in pixels.
    """
    light = to_linear(x)
    first, last = math.floor(float(radius.min())), math.ceil(float(radius.max()))
    total = torch.zeros_like(light)
    if first == last:
        last += 1
    margin = last + 1
    padded = _reflected(light, margin)
    spectrum = torch.fft.rfft2(padded)
    for level in range(first, last + 1):
        weight = (1 - (radius - level).abs()).clamp_min(0)
        if not bool(weight.any()):
            continue
        blurred = light
        if level:
            kernel = torch.zeros(padded.shape[-2:])
            disc = disc_kernel(level)
            side = len(disc)
            kernel[:side, :side] = disc
            kernel = kernel.roll((-(side // 2), -(side // 2)), (0, 1))
            whole = torch.fft.irfft2(spectrum * torch.fft.rfft2(kernel), s=padded.shape[-2:])
            blurred = whole[:, margin:-margin, margin:-margin]
        total += weight * blurred
    return to_srgb(total.clamp(0, 1))


def disc_kernel(radius: float) -> Tensor:
    """A disc of a radius in pixels, edges weighted by the share of a pixel inside; sums to 1.

    >>> disc_kernel(1).shape
    torch.Size([3, 3])
    """
    reach, fine = math.ceil(radius), 8
    steps = (torch.arange((2 * reach + 1) * fine) + 0.5) / fine - 0.5 - reach
    inside = (steps[:, None].square() + steps.square()) <= max(radius, 0.5) ** 2
    kernel = F.avg_pool2d(inside.float()[None], fine)[0]
    return kernel / kernel.sum()


def smooth_way(random: np.random.Generator, samples: int, axes: int) -> Path:
    """A smooth random way about zero, (samples, axes); its farthest point is 1 away."""
    waves = np.arange(1, 5)
    time = np.linspace(0, 1, samples)[:, None]
    way = np.zeros((samples, axes))
    for axis in range(axes):
        size, phase = random.standard_normal(4) / waves, random.uniform(0, 2 * np.pi, 4)
        way[:, axis] = (size * np.sin(np.pi * waves * time + phase)).sum(1)
    way -= way.mean(0)
    farthest: float = np.sqrt((way**2).sum(1)).max()
    moved: Path = way / farthest
    return moved


def warp(x: Tensor, source: Tensor) -> Tensor:
    """Sample (C, H, W) where `source`, (2, 3), says that pixels (x, y, 1) come from; bicubic."""
    height, width = x.shape[-2:]
    # affine_grid counts from -1 to 1 over the outer edges of the pixels
    half = torch.tensor([width / 2, height / 2])
    middle = half - 0.5
    turn = source[:, :2] * half / half[:, None]
    move = (source[:, :2] @ middle + source[:, 2] - middle) / half
    grid = F.affine_grid(
        torch.column_stack([turn, move])[None], [1, 1, height, width], align_corners=False
    )
    # bicubic sampling overshoots at edges; light is never negative
    return F.grid_sample(
        x[None], grid, mode="bicubic", padding_mode="reflection", align_corners=False
    )[0].clamp(0, 1)


def _reflected(x: Tensor, margin: int) -> Tensor:
    """Mirror the picture over its edges, also where the margin is longer than a side."""
    indices = []
    for length in x.shape[-2:]:
        turn = torch.arange(-margin, length + margin) % (2 * length)
        indices.append(torch.minimum(turn, 2 * length - 1 - turn))
    return x[:, indices[0]][:, :, indices[1]]


def _with_noise(x: Tensor, sigma: float, random: np.random.Generator) -> Tensor:
    return Noise((sigma, sigma), clip=True)(x, random) if sigma else x
