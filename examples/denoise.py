"""Denoise a photograph: add noise to one of scikit-image's samples, restore it, compare.

    python examples/denoise.py [FOLDER]

Writes noisy.png, restored.png and restored-compare.png to FOLDER (default: restored/).
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import skimage.data
import skimage.io
from skimage.metrics import peak_signal_noise_ratio

import fullres as fr

SIGMA = 25


def main() -> None:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "restored")
    folder.mkdir(parents=True, exist_ok=True)
    clean = skimage.data.coffee()
    noise = np.random.default_rng(0).normal(0, SIGMA, clean.shape)
    noisy = (clean + noise).round().clip(0, 255).astype(np.uint8)
    skimage.io.imsave(folder / "noisy.png", noisy)

    fr.restore(folder / "noisy.png", folder / "restored.png", overwrite=True, compare=True)

    restored = skimage.io.imread(folder / "restored.png")
    print(f"PSNR of the noisy picture:    {peak_signal_noise_ratio(clean, noisy):.2f} dB")
    print(f"PSNR of the restored picture: {peak_signal_noise_ratio(clean, restored):.2f} dB")
    print(f"Before and after: {folder / 'restored-compare.png'}")


if __name__ == "__main__":
    main()
