"""The model card's table: PSNR of whole pictures, local and global, and of patches.

    python benchmarks/denoise_small.py FOLDER… [--network NAME_OR_PATH]

Noise is drawn from `numpy.random.default_rng(0)` for every picture and not rounded; the level is
either the same everywhere or rises smoothly from 0 to the stated sigma over a random field. Noisy
pictures may have been saved as JPEG, of the stated quality and with colour at half resolution.
Results are rounded to 8 bit; figures are the mean over pictures of the PSNR over RGB. Non-local
means (scikit-image) is told the true sigma, or its mean where it varies.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from scipy import ndimage
from skimage.metrics import peak_signal_noise_ratio
from skimage.restoration import denoise_nl_means
from torch import Tensor

import fullres as fr
from fullres.data.degradations import Jpeg
from fullres.io.image import SUFFIXES, open_image

SIGMAS = (15, 25, 50)
QUALITIES = (95, 80)


@dataclass(frozen=True)
class Case:
    """How pictures get noisy."""

    sigma: float
    varying: bool = False
    quality: int | None = None

    def __str__(self) -> str:
        if self.varying:
            return f"0 to {self.sigma}, varying"
        return f"{self.sigma}" if self.quality is None else f"{self.sigma}, JPEG {self.quality}"

    def level(self, shape: tuple[int, int]) -> np.ndarray:
        """Standard deviation at every pixel, on the scale 0 to 1."""
        if not self.varying:
            return np.full(shape, self.sigma / 255, np.float32)
        field = np.random.default_rng(1).standard_normal(shape)
        field = ndimage.gaussian_filter(field, min(shape) / 6, mode="reflect")
        field = (field - field.min()) / (field.max() - field.min())
        return (field * self.sigma / 255).astype(np.float32)

    def noisy(self, clean: Tensor, level: np.ndarray) -> Tensor:
        random = np.random.default_rng(0)
        noisy = clean + torch.from_numpy(random.standard_normal(clean.shape, np.float32) * level)
        if self.quality is not None:
            noisy = Jpeg((self.quality, self.quality))(noisy[0], random)[None]
        return noisy.contiguous(memory_format=torch.channels_last)


CASES = (
    *(Case(sigma) for sigma in SIGMAS),
    *(Case(sigma, varying=True) for sigma in SIGMAS),
    *(Case(sigma, quality=quality) for quality in QUALITIES for sigma in SIGMAS),
)


def pictures(folder: Path) -> Iterator[Tensor]:
    """Every picture of a folder, (1, 3, H, W) in [0, 1]."""
    for path in sorted(p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES):
        with open_image(path) as source:
            yield source.read(0, 0, source.height, source.width)[None]


def psnr(restored: Tensor, clean: Tensor) -> float:
    rounded = (restored.clamp(0, 1) * 255).round() / 255
    return float(peak_signal_noise_ratio(clean.numpy(), rounded.numpy(), data_range=1))


def in_patches(module: torch.nn.Module, x: Tensor, side: int) -> Tensor:
    """Patches of the training size, restored one by one."""
    y = torch.empty_like(x)
    for top in range(0, x.shape[2], side):
        for left in range(0, x.shape[3], side):
            part = (..., slice(top, top + side), slice(left, left + side))
            y[part] = module(x[part])
    return y


def non_local_means(x: Tensor, level: np.ndarray) -> Tensor:
    sigma = float(level.mean())
    y = denoise_nl_means(
        x[0].permute(1, 2, 0).numpy(),
        patch_size=5,
        patch_distance=6,
        h=0.6 * sigma,
        sigma=sigma,
        fast_mode=True,
        channel_axis=-1,
    )
    return torch.from_numpy(y).permute(2, 0, 1)[None].float()


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--network", default="denoise-small")
    parser.add_argument("--window", type=int, default=None)
    options = parser.parse_args()
    network = fr.open_network(options.network)
    module, side = network.module, network.spec.train_size
    module.to(memory_format=torch.channels_last)

    def local(x: Tensor, level: np.ndarray) -> Tensor:
        with fr.convert(module, fr.Local(side, options.window)):
            return module(x)

    modes: dict[str, Callable[[Tensor, np.ndarray], Tensor]] = {
        "noisy": lambda x, level: x,
        "non-local means": non_local_means,
        "patches": lambda x, level: in_patches(module, x, side),
        "global": lambda x, level: module(x),
        "local": local,
    }
    print("| pictures | noise |", " | ".join(modes), "| local − global |")
    print("|---" * (len(modes) + 3) + "|")
    for folder in options.folders:
        for case in CASES:
            found: dict[str, list[float]] = {mode: [] for mode in modes}
            for clean in pictures(folder):
                level = case.level(clean.shape[-2:])
                noisy = case.noisy(clean, level)
                for mode, run in modes.items():
                    found[mode].append(psnr(run(noisy, level), clean))
            gains = [a - b for a, b in zip(found["local"], found["global"], strict=True)]
            cells = [f"{statistics.mean(values):.2f}" for values in found.values()]
            spread = f"{statistics.mean(gains):+.3f} ({min(gains):+.2f} to {max(gains):+.2f})"
            print(f"| {folder.name} | {case} |", " | ".join(cells), f"| {spread} |", flush=True)


if __name__ == "__main__":
    main()
