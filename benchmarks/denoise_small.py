"""The model card's table: PSNR of whole pictures, local and global, and of patches.

    python benchmarks/denoise_small.py FOLDER… [--network NAME_OR_PATH]

Noise is drawn from `numpy.random.default_rng(0)` for every picture and not rounded; the level is
either the same everywhere or rises smoothly from 0 to the stated sigma over a random field. Results
are rounded to 8 bit; figures are the mean over pictures of the PSNR over RGB. Non-local means
(scikit-image) is told the true sigma, or its mean where it varies.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from scipy import ndimage
from skimage.metrics import peak_signal_noise_ratio
from skimage.restoration import denoise_nl_means
from torch import Tensor

import fullres as fr
from fullres.io.image import SUFFIXES, open_image

SIGMAS = (15, 25, 50)


def pictures(folder: Path) -> Iterator[Tensor]:
    """Every picture of a folder, (1, 3, H, W) in [0, 1]."""
    for path in sorted(p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES):
        with open_image(path) as source:
            yield source.read(0, 0, source.height, source.width)[None]


def noise_level(shape: tuple[int, int], sigma: float, varying: bool) -> np.ndarray:
    """Standard deviation at every pixel, on the scale 0 to 1."""
    if not varying:
        return np.full(shape, sigma / 255, np.float32)
    field = np.random.default_rng(1).standard_normal(shape)
    field = ndimage.gaussian_filter(field, min(shape) / 6, mode="reflect")
    field = (field - field.min()) / (field.max() - field.min())
    return (field * sigma / 255).astype(np.float32)


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
        for varying in (False, True):
            for sigma in SIGMAS:
                found: dict[str, list[float]] = {mode: [] for mode in modes}
                spent = dict.fromkeys(modes, 0.0)
                for clean in pictures(folder):
                    level = noise_level(clean.shape[-2:], sigma, varying)
                    noise = np.random.default_rng(0).standard_normal(clean.shape, np.float32)
                    noisy = clean + torch.from_numpy(noise * level)
                    noisy = noisy.contiguous(memory_format=torch.channels_last)
                    for mode, run in modes.items():
                        start = time.perf_counter()
                        found[mode].append(psnr(run(noisy, level), clean))
                        spent[mode] += time.perf_counter() - start
                gains = [a - b for a, b in zip(found["local"], found["global"], strict=True)]
                cells = [f"{statistics.mean(values):.2f}" for values in found.values()]
                spread = f"{statistics.mean(gains):+.3f} ({min(gains):+.2f} to {max(gains):+.2f})"
                what = f"0 to {sigma}, varying" if varying else f"{sigma}"
                print(f"| {folder.name} | {what} |", " | ".join(cells), f"| {spread} |", flush=True)


if __name__ == "__main__":
    main()
