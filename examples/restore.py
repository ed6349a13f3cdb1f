"""Denoise and deblur a photograph: degrade one of scikit-image's samples, restore it, compare.

    python examples/restore.py [FOLDER]

Writes the picture before, after and compared, for each job, to FOLDER (default: restored/).
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import skimage.data
import skimage.io
import torch
from skimage.metrics import peak_signal_noise_ratio

import fullres as fr
from fullres.data.degrade import parse_degradation

JOBS = {
    "denoised": ("noise sigma=[25,25]", "denoise-small"),
    "deblurred": ("defocus radius=[0,6]", "deblur-small"),  # varies over the picture
}
"""The degradation and the bundled network that undoes it, by the name of the result."""


def main() -> None:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "restored")
    folder.mkdir(parents=True, exist_ok=True)
    clean = skimage.data.coffee()
    for name, (degradation, network) in JOBS.items():
        before, after = folder / f"before-{name}.png", folder / f"{name}.png"
        skimage.io.imsave(before, degraded(clean, degradation))
        fr.restore(before, after, network=network, overwrite=True, compare=True)
        scores = [peak_signal_noise_ratio(clean, skimage.io.imread(p)) for p in (before, after)]
        print(f"{name}, PSNR in dB: {scores[0]:.2f} before, {scores[1]:.2f} after")
        print(f"  to look at: {folder / f'{name}-compare.png'}")


def degraded(clean: np.ndarray, how: str) -> np.ndarray:
    """(height, width, 3), uint8, to the same."""
    picture = torch.from_numpy(clean).permute(2, 0, 1) / 255
    made = parse_degradation(how)(picture, np.random.default_rng(0)).permute(1, 2, 0)
    return (made * 255).round().clamp(0, 255).byte().numpy()


if __name__ == "__main__":
    main()
