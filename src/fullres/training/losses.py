"""The losses of the papers. Pictures are (B, C, H, W); a loss is a scalar."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

Loss = Callable[[Tensor, Tensor], Tensor]


def psnr(restored: Tensor, target: Tensor) -> Tensor:
    """Negative mean PSNR in dB, each picture on its own (HINet, NAFNet)."""
    error = (restored - target).square().mean((1, 2, 3))
    return 10 * torch.log10(error + 1e-8).mean()


def charbonnier(restored: Tensor, target: Tensor) -> Tensor:
    """Mean of sqrt(d² + 10⁻⁶) (MPRNet, equation 4)."""
    loss: Tensor = ((restored - target).square() + 1e-6).sqrt().mean()
    return loss


def edge(restored: Tensor, target: Tensor) -> Tensor:
    """Charbonnier loss of Laplacians of Gaussians (MPRNet, equation 5)."""
    return charbonnier(_laplacian(restored), _laplacian(target))


def fft(restored: Tensor, target: Tensor) -> Tensor:
    """Mean absolute difference of Fourier coefficients (MIMO-UNet, equation 5)."""
    loss: Tensor = (torch.fft.rfft2(restored) - torch.fft.rfft2(target)).abs().mean()
    return loss


LOSSES: dict[str, Loss] = {
    "psnr": psnr,
    "l1": F.l1_loss,
    "mse": F.mse_loss,
    "charbonnier": charbonnier,
    "edge": edge,
    "fft": fft,
}
"""By the name that recipes use."""


def weighted(weights: Mapping[str, float], outputs: Sequence[Tensor], target: Tensor) -> Tensor:
    """Sum of weighted losses over all pictures that a network restores on its way."""
    terms = [
        weight * LOSSES[name](output, target)
        for output in outputs
        for name, weight in weights.items()
    ]
    return torch.stack(terms).sum()


def _laplacian(x: Tensor) -> Tensor:
    """What a picture loses when it is blurred, halved, doubled and blurred again."""
    halved = torch.zeros_like(x)
    halved[..., ::2, ::2] = 4 * _blur(x)[..., ::2, ::2]
    return x - _blur(halved)


def _blur(x: Tensor) -> Tensor:
    """Gaussian of 5 × 5, borders repeated."""
    taps = x.new_tensor([0.05, 0.25, 0.4, 0.25, 0.05])
    channels = x.shape[1]
    kernel = torch.outer(taps, taps).expand(channels, 1, 5, 5)
    return F.conv2d(F.pad(x, (2, 2, 2, 2), mode="replicate"), kernel, groups=channels)
