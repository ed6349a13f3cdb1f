"""What spoils pictures: noise, compression, lost resolution, mosaics, rain and haze.

A degradation is a frozen dataclass of ranges. Called with a clean picture and a random generator,
it draws from the ranges and spoils the picture; the generator alone decides the outcome. Blur is
in `fullres.data.blur`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fullres.errors import FullresError
from fullres.ops.bayer import REACH, interpolated, sparse

Range = tuple[float, float]
"""Lowest and highest value of a uniform draw; equal where the value is fixed."""

Pattern = Literal["RGGB", "BGGR", "GRBG", "GBRG"]
"""Colours of a sensor's top left 2 × 2 samples, row by row."""

Form = Literal["mosaic", "samples", "interpolated"]
"""Of a degraded mosaic: itself, (1, H, W), as in files that `fullres restore --bayer` takes; or as
a network is fed with it (`Spec.mosaic`), (3, H, W): the samples with 0 for the colours that are not
there, or colours interpolated between the samples."""

BLOCK = 16
"""Sides in pixels of the blocks that a JPEG file with colour at half resolution is made of."""
CELLS = 4
"""Of the fields that noise and haze vary with, along the longer side of the picture."""


@dataclass(frozen=True)
class Noise:
    """Gaussian noise, alike and independent in every channel."""

    sigma: Range = (0.0, 50.0)
    """Standard deviation in 1/255: one draw per picture."""
    varying: bool = False
    """Instead of one draw, a smooth random field over the picture from lowest to highest."""
    clip: bool = False
    """Cut to [0, 1], as files do; the papers do not."""
    scale: ClassVar[int] = 1

    def __post_init__(self) -> None:
        check_range("sigma", self.sigma, 0, 255)

    @property
    def needs_whole(self) -> bool:
        return self.varying

    def __call__(self, clean: Tensor, random: np.random.Generator) -> Tensor:
        """Degrade (C, H, W) in [0, 1]."""
        low, high = self.sigma
        sigma: Tensor | float
        if self.varying:
            height, width = clean.shape[-2:]
            sigma = low + (high - low) * smooth_field(random, height, width, CELLS)
        else:
            sigma = random.uniform(low, high)
        noise = torch.from_numpy(random.standard_normal(clean.shape, np.float32))
        noisy = clean + noise * (sigma / 255)
        return noisy.clamp(0, 1) if self.clip else noisy


@dataclass(frozen=True)
class Jpeg:
    """JPEG compression of the picture in 8 bit."""

    quality: tuple[int, int] = (10, 90)
    """Of libjpeg, 1 to 100, a whole number: one draw per picture."""
    subsampling: bool = True
    """Colour at half resolution (4:2:0), as most software has it below quality 90."""
    anywhere: bool = False
    """Whether the file's blocks begin anywhere, as in a part of a photograph: one draw per picture.
    Otherwise they begin in its corner."""
    scale: ClassVar[int] = 1
    needs_whole: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_range("quality", self.quality, 1, 100)
        if not all(isinstance(quality, int) for quality in self.quality):
            raise FullresError(f"quality={self.quality}: a JPEG quality is a whole number")

    def __call__(self, clean: Tensor, random: np.random.Generator) -> Tensor:
        """Degrade (C, H, W) in [0, 1], C being 1 or 3.

        Raises:
            FullresError: the picture has another number of channels.
        """
        if len(clean) not in (1, 3):
            raise FullresError(
                f"a JPEG file has 1 or 3 channels, not {len(clean)}; leave out the jpeg degradation"
            )
        quality = int(random.integers(*self.quality, endpoint=True))
        above, left = random.integers(BLOCK, size=2).tolist() if self.anywhere else (0, 0)
        whole = F.pad(to_eight_bit(clean), (left, 0, above, 0), mode="replicate")
        pixels = whole.byte().permute(1, 2, 0).contiguous()
        stored = _through_jpeg(pixels, quality, self.subsampling)[above:, left:]
        return stored.permute(2, 0, 1).float() / 255


@dataclass(frozen=True)
class Bicubic:
    """Bicubic downscaling equal to MATLAB's `imresize(picture, 1 / scale)`."""

    scale: int = 4
    """2, 3 or 4."""
    eight_bit: bool = False
    """As of a uint8 array, rounded and cut to [0, 1]; otherwise as of an array of doubles."""
    needs_whole: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.scale not in (2, 3, 4):
            raise FullresError(f"scale={self.scale}: bicubic downscaling is by 2, 3 or 4")

    def __call__(self, clean: Tensor, random: np.random.Generator) -> Tensor:
        """Degrade (C, H, W) in [0, 1] to (C, ceil(H / scale), ceil(W / scale)); no draw is made."""
        if not self.eight_bit:
            return downscale(downscale(clean.double(), self.scale, 1), self.scale, 2).float()
        x = to_eight_bit(clean).double()
        for axis in (1, 2):  # MATLAB stores the picture between the axes
            x = (downscale(x, self.scale, axis) + 0.5).floor().clamp(0, 255)
        return x.float() / 255


@dataclass(frozen=True)
class Mosaic:
    """Samples of a Bayer sensor: one of the three colours at each pixel."""

    pattern: Pattern = "RGGB"
    form: Form = "mosaic"
    scale: ClassVar[int] = 1
    needs_whole: ClassVar[bool] = False

    def __post_init__(self) -> None:
        for name, value, kind in (("pattern", self.pattern, Pattern), ("form", self.form, Form)):
            if value not in get_args(kind):
                raise FullresError(f"{name}={value!r}: known are {', '.join(get_args(kind))}")

    def __call__(self, clean: Tensor, random: np.random.Generator) -> Tensor:
        """Degrade (3, H, W) in [0, 1]; no draw is made.

        Raises:
            FullresError: the picture is grey, or too small to be interpolated.
        """
        if len(clean) != 3:
            raise FullresError(
                f"a mosaic is made of 3 channels, not {len(clean)}; use colour pictures"
            )
        mosaic = torch.empty_like(clean[:1])
        for number, colour in enumerate(self.pattern):
            at = (slice(number // 2, None, 2), slice(number % 2, None, 2))
            mosaic[0][at] = clean["RGB".index(colour)][at]
        return mosaic if self.form == "mosaic" else self._fed(mosaic)

    def _fed(self, mosaic: Tensor) -> Tensor:
        """(1, H, W) to (3, H, W), through an RGGB mosaic reflected at its borders."""
        height, width = mosaic.shape[-2:]
        reach = REACH if self.form == "interpolated" else 0
        if reach and min(height, width) < 2:
            raise FullresError(
                f"a mosaic of {height} × {width} pixels cannot be interpolated; "
                "take out pictures smaller than 2 × 2"
            )
        rows, columns = divmod(self.pattern.index("R"), 2)
        across = _reflected(height, rows + reach, reach)
        along = _reflected(width, columns + reach, reach)
        samples = mosaic[None, :, across][..., along]
        x = interpolated(samples) if reach else sparse(samples)
        return x[0, :, rows:, columns:]


@dataclass(frozen=True)
class Rain:
    """Bright streaks of rain, alike in all channels, laid over the picture by screen blending.

    J + R - J R for a picture J and streaks R; nothing gets darker, nothing brighter than white.
    """

    density: Range = (0.05, 0.3)
    """Share of the picture that the streaks would cover if none met; 0 to 1."""
    length: Range = (10.0, 40.0)
    """Of a streak in pixels, 1 to 200."""
    angle: Range = (-30.0, 30.0)
    """In degrees from the vertical, -90 to 90; at a positive angle rain falls to the right."""
    strength: Range = (0.3, 0.8)
    """Of the brightest streaks, 0 to 1; the faintest have half of it."""
    scale: ClassVar[int] = 1
    needs_whole: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_range("density", self.density, 0, 1)
        check_range("length", self.length, 1, 200)
        check_range("angle", self.angle, -90, 90)
        check_range("strength", self.strength, 0, 1)

    def __call__(self, clean: Tensor, random: np.random.Generator) -> Tensor:
        """Degrade (C, H, W) in [0, 1]; every parameter is one draw per picture."""
        rain = self.streaks(random, *clean.shape[-2:])
        return clean + rain * (1 - clean)

    def streaks(self, random: np.random.Generator, height: int, width: int) -> Tensor:
        """The streaks alone, (H, W) in [0, 1]."""
        ranges = (self.density, self.length, self.angle, self.strength)
        density, length, angle, strength = (random.uniform(*each) for each in ranges)
        shape = streak(length, angle)
        reach = len(shape) // 2
        # streaks enter the picture from a margin, in which the convolution also wraps around
        size = (height + 2 * reach, width + 2 * reach)
        middles = random.random(size, np.float32) < density / float(shape.sum())
        drops = torch.from_numpy(middles * random.uniform(strength / 2, strength, size))
        kernel = drops.new_zeros(size)
        kernel[: len(shape), : len(shape)] = shape
        spectrum = torch.fft.rfft2(drops) * torch.fft.rfft2(kernel.roll((-reach, -reach), (0, 1)))
        layer: Tensor = torch.fft.irfft2(spectrum, s=size)
        return layer[reach : reach + height, reach : reach + width].clamp(0, 1).float()


@dataclass(frozen=True)
class Haze:
    """Haze by the model of atmospheric scattering: J t + A (1 - t), t = exp(-beta d).

    The depth d is synthetic: it grows from the bottom of the picture to its top, with smooth
    random relief. The defaults of beta and A are those of RESIDE (Li et al., *Benchmarking
    Single-Image Dehazing and Beyond*, IEEE TIP 2019, section II-A).
    """

    beta: Range = (0.6, 1.8)
    """Scattering coefficient, 0 to 10, per the largest depth: one draw per picture."""
    airlight: Range = (0.7, 1.0)
    """A, alike in all channels, 0 to 1: one draw per picture."""
    relief: float = 0.4
    """Share of the depth that is random, 0 to 1."""
    scale: ClassVar[int] = 1
    needs_whole: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_range("beta", self.beta, 0, 10)
        check_range("airlight", self.airlight, 0, 1)
        check_range("relief", (self.relief, self.relief), 0, 1)

    def __call__(self, clean: Tensor, random: np.random.Generator) -> Tensor:
        """Degrade (C, H, W) in [0, 1]."""
        beta, airlight = random.uniform(*self.beta), random.uniform(*self.airlight)
        transmission = torch.exp(-beta * self.depth(random, *clean.shape[-2:]))
        return clean * transmission + airlight * (1 - transmission)

    def depth(self, random: np.random.Generator, height: int, width: int) -> Tensor:
        """A depth map, (H, W) in [0, 1]."""
        rise = 1 - (torch.arange(height) + 0.5) / height
        relief = smooth_field(random, height, width, CELLS)
        return (1 - self.relief) * rise[:, None] + self.relief * relief


DEGRADATIONS: dict[str, type] = {
    "noise": Noise,
    "jpeg": Jpeg,
    "bicubic": Bicubic,
    "mosaic": Mosaic,
    "rain": Rain,
    "haze": Haze,
}
"""By the name that recipes and `fullres degrade` use; those of this file."""


def check_range(name: str, value: Range, least: float, most: float) -> None:
    """Check that a parameter is a pair in order, within limits.

    Raises:
        FullresError: it is not.

    >>> check_range("sigma", (0, 50), 0, 255)
    """
    try:
        low, high = value
        fits = least <= low <= high <= most
    except (TypeError, ValueError):
        fits = False
    if not fits:
        raise FullresError(
            f"{name}={value!r}: is a range, (lowest, highest), from {least:g} to {most:g}; "
            "give the same number twice to fix it"
        )


def smooth_field(random: np.random.Generator, height: int, width: int, cells: int) -> Tensor:
    """A smooth random field whose values are spread evenly over [0, 1].

    Uniform noise on a coarse grid, upsampled by bicubic interpolation; then every value is
    replaced by its rank among the pixels.

    Args:
        random: where the noise is drawn.
        height: in pixels.
        width: in pixels.
        cells: of the grid along the longer side, at least 1; they are nearly square.

    Returns:
        (H, W), float32: the N values (0.5, 1.5, …, N - 0.5) / N, each once.

    >>> smooth_field(np.random.default_rng(0), 2, 2, 1).flatten().sort().values
    tensor([0.1250, 0.3750, 0.6250, 0.8750])
    """
    longer = max(height, width)
    knots = [max(round(cells * side / longer), 1) + 1 for side in (height, width)]
    grid = torch.from_numpy(random.random((1, 1, *knots)))
    smooth = F.interpolate(grid, size=(height, width), mode="bicubic", align_corners=True)
    count = height * width
    field = torch.empty(count)
    field[smooth.flatten().argsort(stable=True)] = ((torch.arange(count) + 0.5) / count).float()
    return field.view(height, width)


def to_eight_bit(x: Tensor) -> Tensor:
    """Code values of an 8-bit file, 0 to 255, for values in [0, 1]: nearest, cut at the ends."""
    return (x.clamp(0, 1) * 255).round()


def cubic_weights(scale: int) -> list[float]:
    """Weights of the pixels that MATLAB's `imresize` averages in downscaling by a whole number.

    Keys' cubic kernel with a = -0.5 (Keys, *Cubic convolution interpolation for digital image
    processing*, IEEE TASSP 1981, equation 15), stretched by `scale` against aliasing.

    >>> cubic_weights(2)[:4]
    [-0.01171875, -0.03515625, 0.11328125, 0.43359375]
    """
    # an output pixel lies between two inputs where the scale is even, and on one where it is odd
    count = 4 * scale - scale % 2
    weights = [_cubic((index - (count - 1) / 2) / scale) for index in range(count)]
    total = math.fsum(weights)
    return [weight / total for weight in weights]


def _cubic(x: float) -> float:
    x = abs(x)
    if x <= 1:
        return (1.5 * x - 2.5) * x * x + 1
    return ((-0.5 * x + 2.5) * x - 4) * x + 2 if x < 2 else 0.0


def downscale(x: Tensor, scale: int, axis: int) -> Tensor:
    """Downscale one axis by a whole number as MATLAB's `imresize` does; length rounded up.

    The picture is mirrored at its borders, the outermost pixel included.
    """
    length, weights = x.shape[axis], cubic_weights(scale)
    result = math.ceil(length / scale)
    before, span = 3 * scale // 2, scale * (result - 1) + len(weights)
    turn = torch.arange(-before, span - before) % (2 * length)
    padded = x.index_select(axis, torch.minimum(turn, 2 * length - 1 - turn)).movedim(axis, 0)
    total = torch.zeros_like(padded[:result])
    for first, weight in enumerate(weights):
        total += weight * padded[first::scale][:result]
    return total.movedim(0, axis)


def streak(length: float, angle: float) -> Tensor:
    """A line about a pixel wide with soft edges, in an odd square; 1 in the middle.

    Its length is in pixels; the angle in degrees from the vertical, positive to the lower right.

    >>> streak(3, 0)[:, 2]
    tensor([0., 1., 1., 1., 0.])
    """
    reach, turn = math.ceil((length + 1) / 2), math.radians(angle)
    steps = torch.arange(-reach, reach + 1).float()
    y, x = steps[:, None], steps
    along = x * math.sin(turn) + y * math.cos(turn)
    across = x * math.cos(turn) - y * math.sin(turn)
    beyond = (along.abs() - (length - 1) / 2).clamp_min(0)
    return (1 - torch.hypot(across, beyond)).clamp_min(0)


def _reflected(length: int, before: int, after: int) -> Tensor:
    """Indices of an axis and of its mirror images at both ends, the outermost pixel not repeated.

    Every index keeps its parity, and a sample so its colour.
    """
    period = max(2 * length - 2, 1)
    turn = torch.arange(-before, length + after) % period
    return torch.minimum(turn, 2 * length - 2 - turn)


def _through_jpeg(pixels: Tensor, quality: int, subsampling: bool) -> Tensor:
    """Compress and decompress uint8 (H, W, C)."""
    import pyvips

    from fullres.io.vips import fetch, from_array

    height, width, channels = pixels.shape
    image = from_array(pixels.numpy(), "srgb" if channels == 3 else "b-w")
    data = image.jpegsave_buffer(Q=quality, subsample_mode="on" if subsampling else "off")
    found = fetch(pyvips.Image.jpegload_buffer(data), 0, 0, height, width)
    return torch.from_numpy(found.copy())
