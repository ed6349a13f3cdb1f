"""How near a restored picture is to its target, computed as the papers compute it.

Two pictures differ by tenths of a dB and by hundredths of SSIM between published ways to measure:
rounding to 8 bits, a cropped border, luma instead of RGB, MATLAB's SSIM. A `Protocol` fixes them;
`PROTOCOLS` has those of the usual data sets. All is computed in float64 but LPIPS, whose network
is float32. SSIM's window is separable here: torchmetrics gives the same numbers in float64, at
some 75 times the time and 4 GB for a picture of 1280 × 720.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from fullres.errors import FullresError

if TYPE_CHECKING:
    from torchmetrics.image import LearnedPerceptualImagePatchSimilarity

_HALF = 5
"""Pixels of SSIM's Gaussian window to each side of its middle."""
_UNIFORM = 7
"""Side of scikit-image's default window for SSIM."""


def psnr(restored: Tensor, target: Tensor) -> float:
    """Peak signal-to-noise ratio in dB, the peak being 1: -10 log10 of the mean squared error.

    Args:
        restored: (C, H, W) or (B, C, H, W), floating point in [0, 1].
        target: of the same shape and range.

    Returns:
        The mean of the batch's pictures; infinite where one equals its target.

    Raises:
        FullresError: the shapes differ, or values are outside [0, 1] or not finite.

    >>> round(psnr(torch.full((3, 8, 8), 0.5), torch.full((3, 8, 8), 0.75)), 2)
    12.04
    """

    def of_picture(x: Tensor, y: Tensor) -> float:
        error = float((x - y).square().mean())
        return -10 * math.log10(error) if error else math.inf

    return _mean(of_picture, *_batches(restored, target))


def mae(restored: Tensor, target: Tensor) -> float:
    """Mean absolute error, in [0, 1]; arguments and errors as for `psnr`.

    >>> mae(torch.full((3, 8, 8), 0.5), torch.full((3, 8, 8), 0.75))
    0.25
    """
    return _mean(lambda x, y: float((x - y).abs().mean()), *_batches(restored, target))


def ssim(restored: Tensor, target: Tensor) -> float:
    """Structural similarity (Wang et al., 2004), at most 1: the mean over pixels and channels.

    A Gaussian window of 11 × 11 pixels and sigma 1.5, where it lies inside the picture; no sample
    covariance. Equal to the authors' `ssim_index.m` without its downsampling, and to scikit-image's
    `structural_similarity` with `gaussian_weights=True, sigma=1.5, use_sample_covariance=False`.

    Args:
        restored: (C, H, W) or (B, C, H, W), floating point in [0, 1], at least 11 × 11 pixels.
        target: of the same shape and range.

    Raises:
        FullresError: as for `psnr`, or the picture is smaller than the window.
    """
    x, y = _batches(restored, target)
    _check_side("SSIM", x, 2 * _HALF + 1)
    # a channel at a time: of a large picture, memory does not hold all sums of all channels
    channels = (each.flatten(0, 1)[:, None] for each in (x, y))
    return _mean(lambda x, y: _similarity(x, y, _gaussian_blur), *channels)


def ssim_volume(restored: Tensor, target: Tensor) -> float:
    """SSIM as MATLAB's `ssim(restored, target)` gives it for RGB: the channels are a third axis.

    The Gaussian window is 11 × 11 × 11, the border is repeated and every pixel counts: higher than
    `ssim` where colours differ. Of grey pictures it is MATLAB's too. Any size; else as for `psnr`.
    """
    return _mean(lambda x, y: _similarity(x, y, _volume_blur), *_batches(restored, target))


def ssim_uniform(restored: Tensor, target: Tensor) -> float:
    """SSIM by scikit-image's defaults: a flat 7 × 7 window, inside the picture, sample covariance.

    At least 7 × 7 pixels; else arguments and errors as for `ssim`.
    """
    x, y = _batches(restored, target)
    _check_side("SSIM", x, _UNIFORM)
    blur = functools.partial(F.avg_pool2d, kernel_size=_UNIFORM, stride=1)
    sample = _UNIFORM**2 / (_UNIFORM**2 - 1)
    return _mean(lambda x, y: _similarity(x, y, blur, sample), x, y)


def lpips(restored: Tensor, target: Tensor) -> float:
    """Learned perceptual distance (Zhang et al., 2018) by AlexNet, version 0.1; 0 for equals.

    Args:
        restored: (C, H, W) or (B, C, H, W), floating point in [0, 1], at least 31 × 31 pixels;
            C is 3, or 1 for a grey picture, which is taken as three equal channels.
        target: of the same shape and range.

    Raises:
        FullresError: as for `psnr`; torchmetrics is missing; AlexNet's weights are neither on this
            computer nor to be downloaded.
    """
    x, y = _batches(restored, target)
    _check_side("LPIPS", x, 31)
    if x.shape[1] not in (1, 3):
        raise FullresError(f"LPIPS is for 1 or 3 channels, not {x.shape[1]}: take another metric")
    network = _alexnet().to(x.device)
    value = float(network(*(each.float().expand(-1, 3, -1, -1) for each in (x, y))))
    network.reset()
    return value


METRICS: dict[str, Callable[[Tensor, Tensor], float]] = {
    each.__name__: each for each in (psnr, ssim, ssim_volume, ssim_uniform, mae, lpips)
}
"""What a protocol can measure, by name."""


def luma(rgb: Tensor) -> Tensor:
    """Y of ITU-R BT.601 as MATLAB's `rgb2ycbcr` has it, over 255: from 16/255 to 235/255.

    Args:
        rgb: (..., 3, H, W), in [0, 1].

    Returns:
        (..., 1, H, W), float64.

    Raises:
        FullresError: `rgb` has not three channels.

    >>> (255 * luma(torch.ones(3, 1, 1))).round().item()
    235.0
    """
    if rgb.dim() < 3 or rgb.shape[-3] != 3:
        raise FullresError(f"luma is of three channels (..., 3, H, W), not of {_sides(rgb)}")
    weights = torch.tensor([65.481, 128.553, 24.966], dtype=torch.float64, device=rgb.device)
    return (16 + (rgb.double() * weights[:, None, None]).sum(-3, keepdim=True)) / 255


@dataclass(frozen=True)
class Protocol:
    """One way to measure pictures; `PROTOCOLS` has those of the usual data sets."""

    name: str
    """How `protocol` finds it."""
    metrics: tuple[str, ...]
    """Keys of `METRICS`, in the order of their columns."""
    channels: Literal["rgb", "y"] = "rgb"
    """All channels as they are, or the luma of a colour picture; a grey one is taken as it is."""
    bits: int | None = 8
    """The restored picture is clamped and rounded to so many bits; None: clamped only."""
    border: int | Literal["scale"] = 0
    """Pixels cropped at each side, or as many as the factor of enlargement."""
    round_luma: bool = False
    """Luma is rounded to 8 bits, as MATLAB's `rgb2ycbcr` does for 8-bit pictures."""
    source: str = ""
    """Whose evaluation it is, and where it differs."""

    def measure(self, restored: Tensor, target: Tensor, scale: int = 1) -> dict[str, float]:
        """The values of `metrics`, by name; of a batch, the means over its pictures.

        Args:
            restored: (C, H, W) or (B, C, H, W), floating point, before clamping.
            target: of the same shape, in [0, 1].
            scale: the network's factor of enlargement, for a border of "scale".

        Raises:
            FullresError: the shapes differ, a value is not finite, the border leaves nothing, or
                what the metrics raise.

        >>> black, grey = torch.zeros(1, 16, 16), torch.full((1, 16, 16), 0.1)
        >>> PROTOCOLS["grey-denoising"].measure(grey, black)["psnr"]  # 0.1 is 26/255 in 8 bits
        19.8...
        """
        _check_pair(restored, target)
        pair = self._rounded(restored.double(), target.double())
        if self.channels == "y":
            pair = self._luma(pair[0]), self._luma(pair[1])
        border = scale if self.border == "scale" else self.border
        height, width = target.shape[-2:]
        if min(height, width) <= 2 * border:
            raise FullresError(
                f"a picture of {width} × {height} pixels has nothing left after {border} pixels "
                f"are cropped at each side, as protocol {self.name!r} does: take a larger one"
            )
        rows, columns = slice(border, height - border), slice(border, width - border)
        x, y = (each[..., rows, columns] for each in pair)
        return {metric: METRICS[metric](x, y) for metric in self.metrics}

    def _rounded(self, restored: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        restored = restored.clamp(0, 1)
        if self.bits is None:
            return restored, target
        peak = 2**self.bits - 1
        # a target read as float32 misses its level by a rounding error, which would hide that the
        # pictures are equal
        levels = (target * peak).round() / peak
        target = torch.where((target - levels).abs() < 2**-23, levels, target)
        return (restored * peak).round() / peak, target

    def _luma(self, picture: Tensor) -> Tensor:
        if picture.shape[-3] == 1:
            return picture
        y = luma(picture)
        # exactly, it has steps of 1/255000: what comes this near to half is half
        return (255 * y + 0.5 + 1e-9).floor() / 255 if self.round_luma else y


_PLAIN = ("psnr", "ssim")
_MATLAB = (*_PLAIN, "ssim_volume")
_DEFOCUS = (*_PLAIN, "ssim_uniform", "mae", "lpips")
_THEIRS = "their SSIM is MATLAB's, here ssim_volume"

_PROTOCOLS = (
    Protocol("gopro", _MATLAB, source=f"MPRNet, HINet, NAFNet, Restormer: 8-bit RGB; {_THEIRS}"),
    Protocol("hide", _MATLAB, source=f"MPRNet, Restormer: 8-bit RGB; {_THEIRS}"),
    Protocol("reds", _MATLAB, source=f"HINet, NAFNet: 8-bit RGB; {_THEIRS}"),
    Protocol("sidd", _MATLAB, source=f"MPRNet, NAFNet: 8-bit RGB; {_THEIRS}"),
    Protocol(
        "realblur",
        _PLAIN,
        source="8-bit RGB without RealBlur's alignment: its published values are higher, taken "
        "after each picture is aligned with its target by ECC",
    ),
    Protocol("dpdd", _DEFOCUS, bits=16, source="DPDNet: 16-bit RGB; its SSIM is ssim_uniform"),
    Protocol("colour-denoising", _PLAIN, source="CBSD68, Kodak24, McMaster, Urban100: 8-bit RGB"),
    Protocol("grey-denoising", _PLAIN, source="Set12, BSD68, Urban100: 8-bit grey"),
    Protocol(
        "sr",
        _PLAIN,
        "y",
        border="scale",
        source="BasicSR on Set5 to Manga109: Y of 8-bit RGB, not rounded; cropped by the factor",
    ),
    Protocol("jpeg", _PLAIN, "y", source="Classic5, LIVE1: 8-bit grey or Y; without PSNR-B"),
    Protocol("demosaic", _PLAIN, border=10, source="DPIR: 8-bit RGB, cropped; PANet's is not"),
    Protocol(
        "derain",
        _PLAIN,
        "y",
        round_luma=True,
        source="MSPFN, MPRNet on Rain100 to Test2800: MATLAB's Y of 8-bit RGB, rounded",
    ),
    Protocol("dehaze", _PLAIN, bits=None, source="RESIDE: RGB, not rounded; SSIM varies by paper"),
    Protocol("rgb", _PLAIN, bits=None, source="no paper's: RGB, clamped, not rounded"),
)
PROTOCOLS: dict[str, Protocol] = {each.name: each for each in _PROTOCOLS}


def protocol(name: str) -> Protocol:
    """The protocol of that name.

    Raises:
        FullresError: there is none; the message lists them.
    """
    if name not in PROTOCOLS:
        raise FullresError(f"no protocol {name!r}: take one of {', '.join(sorted(PROTOCOLS))}")
    return PROTOCOLS[name]


def mean_of(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The mean of every value over pictures; infinite where one is.

    Raises:
        FullresError: there are no rows, or they do not have the same values.

    >>> mean_of([{"psnr": 30.0}, {"psnr": 32.0}])
    {'psnr': 31.0}
    """
    if not rows:
        raise FullresError("there is no picture to take a mean of: measure at least one")
    if any(row.keys() != rows[0].keys() for row in rows):
        raise FullresError("the pictures were not measured alike: take one protocol for all")
    return {name: math.fsum(row[name] for row in rows) / len(rows) for name in rows[0]}


def _mean(of_picture: Callable[[Tensor, Tensor], float], x: Tensor, y: Tensor) -> float:
    values = [of_picture(*pair) for pair in zip(x, y, strict=True)]
    return math.fsum(values) / len(values)


def _similarity(
    x: Tensor, y: Tensor, blur: Callable[[Tensor], Tensor], sample: float = 1.0
) -> float:
    """SSIM of pictures (C, H, W); `sample` turns the window's covariance into a sample's."""
    mean_x, mean_y = blur(x), blur(y)
    covariance = sample * (blur(x * y) - mean_x * mean_y)
    variances = sample * (blur(x * x) - mean_x**2 + blur(y * y) - mean_y**2)
    first, second = 0.01**2, 0.03**2
    above = (2 * mean_x * mean_y + first) * (2 * covariance + second)
    below = (mean_x**2 + mean_y**2 + first) * (variances + second)
    return float((above / below).mean())


def _gaussian(like: Tensor) -> Tensor:
    offsets = torch.arange(-_HALF, _HALF + 1, dtype=like.dtype, device=like.device)
    weights = torch.exp(-(offsets**2) / (2 * 1.5**2))
    return weights / weights.sum()


def _gaussian_blur(x: Tensor) -> Tensor:
    """(C, H, W) to (C, H - 10, W - 10)."""
    weights = _gaussian(x).tolist()
    for axis in (-1, -2):
        kept = x.shape[axis] - 2 * _HALF
        blurred = torch.zeros_like(x.narrow(axis, 0, kept))
        for start, weight in enumerate(weights):
            blurred.add_(x.narrow(axis, start, kept), alpha=weight)
        x = blurred
    return x


def _volume_blur(x: Tensor) -> Tensor:
    """(C, H, W) to the same shape: blurred along all three axes, the border repeated."""
    channels = x.shape[0]
    blurred = _gaussian_blur(F.pad(x, (_HALF,) * 4, mode="replicate"))
    # mixing[i, j]: weight of channel j in the window around channel i
    mixing = x.new_zeros(channels, channels)
    for offset, weight in enumerate(_gaussian(x), start=-_HALF):
        for channel in range(channels):
            mixing[channel, min(max(channel + offset, 0), channels - 1)] += weight
    return torch.einsum("ij,jhw->ihw", mixing, blurred)


@functools.lru_cache(maxsize=1)
def _alexnet() -> LearnedPerceptualImagePatchSimilarity:
    try:
        from torchmetrics.image import LearnedPerceptualImagePatchSimilarity

        return LearnedPerceptualImagePatchSimilarity(net_type="alex", normalize=True)
    except ImportError as error:  # torchmetrics is missing, or torchvision, which it builds on
        raise FullresError("LPIPS needs torchmetrics: pip install 'fullres[evaluate]'") from error
    except (OSError, RuntimeError) as error:
        raise FullresError(
            f"LPIPS needs AlexNet's weights, which could not be had ({error}): run it once with a "
            "network connection, or copy torchvision's alexnet-owt-7be5be79.pth to "
            f"{torch.hub.get_dir()}/checkpoints, or measure without LPIPS"
        ) from error


def _batches(restored: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Both as (B, C, H, W) of float64."""
    _check_pair(restored, target)
    for name, picture in (("restored picture", restored), ("target", target)):
        low, high = (float(value) for value in picture.aminmax())
        if low < 0 or high > 1:
            raise FullresError(
                f"the {name} has values from {low:.4g} to {high:.4g}: clamp or scale it to [0, 1]"
            )
    x, y = restored.double(), target.double()
    return (x[None], y[None]) if x.dim() == 3 else (x, y)


def _check_pair(restored: Tensor, target: Tensor) -> None:
    if restored.shape != target.shape:
        raise FullresError(
            f"the restored picture is {_sides(restored)} and its target {_sides(target)}: "
            "measure pictures of one shape"
        )
    if restored.dim() not in (3, 4) or not restored.numel():
        raise FullresError(
            f"pictures are (C, H, W) or (B, C, H, W) and not empty, not {_sides(restored)}"
        )
    for name, picture in (("restored picture", restored), ("target", target)):
        if not picture.is_floating_point():
            raise FullresError(f"the {name} is {picture.dtype}: scale it to floats in [0, 1]")
        if not picture.isfinite().all():
            raise FullresError(
                f"the {name} has values that are NaN or infinite: restore it with more precision"
            )


def _check_side(metric: str, picture: Tensor, side: int) -> None:
    if min(picture.shape[-2:]) < side:
        height, width = picture.shape[-2:]
        raise FullresError(
            f"{metric} needs at least {side} × {side} pixels, and {width} × "
            f"{height} are left of the picture: take a larger picture, or another metric"
        )


def _sides(picture: Tensor) -> str:
    return " × ".join(str(side) for side in picture.shape) or "a number"
