"""Speed of the networks against their plain forms, in float32 and in bfloat16.

    python benchmarks/networks.py [CASE…] [--size 512x768] [--repeats 3] [--threads N]

Plain is NCHW, eager, the papers' equations operation by operation (`benchmarks/plain`). It leaves
freed memory to the C library; "memory kept" is the same with memory kept as ours keeps it, so that
what remains is the networks' own gain. All forms of a network run in turn in one process; times
and ratios are medians over turns. Weights are random; results change the picture by 0.1 of white,
root mean square. The share of the peak is multiply-adds of the plain form, twice, over the fastest
of a product of 4096 × 4096 matrices and 1 × 1 and 3 × 3 convolutions of 256 channels in the same
run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial

import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from cases import Form, cases, form, options, size_of, times
from fullres.measure import Size, interleaved, median_ratio, seconds, table

HEADER = (
    "network",
    "picture",
    "plain",
    "float32",
    "speed",
    "speed, memory kept",
    "of the peak",
    "largest difference",
    "bfloat16",
    "speed over float32",
    "PSNR",
)


def operations(plain: Form, size: Size) -> int:
    """Floating-point operations of convolutions and matrix products of a pass."""
    with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True):
        x = torch.zeros(1, plain.spec.in_channels, *size)
        with FlopCounterMode(display=False) as counter:
            plain.module(x)
    return int(counter.get_total_flops())


def peak_rate(side: int = 4096) -> float:
    """Floating-point operations a second of the fastest float32 product or convolution found."""
    a, b = torch.rand(2, side, side).unbind()
    rates = [2 * side**3 / _best(partial(torch.mm, a, b))]
    x = torch.rand(1, 256, 256, 256).contiguous(memory_format=torch.channels_last)
    for k in (1, 3):
        weight = torch.rand(256, 256, k, k).contiguous(memory_format=torch.channels_last)
        convolve = partial(torch.conv2d, x, weight, padding=k // 2)
        rates.append(2 * x.numel() * weight[0].numel() / _best(convolve))
    return max(rates)


@torch.inference_mode()
def _best(call: Callable[[], object]) -> float:
    return min(seconds(call) for _ in range(5))


def psnr(found: Tensor, exact: Tensor) -> float:
    """In decibels, where white is 1."""
    error = (found - exact).square().mean().item()
    return -10 * math.log10(error) if error else math.inf


def row(case: str, size: Size, repeats: int, peak: float) -> tuple[str, ...]:
    with ExitStack() as stack:
        plain, kept, ours, half = (
            stack.enter_context(form(case, kind, dtype=dtype))
            for kind, dtype in (
                ("plain", "float32"),
                ("plain kept", "float32"),
                ("global", "float32"),
                ("global", "bfloat16"),
            )
        )
        exact, found, rounded = plain(size), ours(size), half(size)
        calls = {"plain": plain, "kept": kept, "float32": ours, "bfloat16": half}
        took = interleaved(
            {name: partial(call, size) for name, call in calls.items()}, repeats, warm_up=False
        )
        rate = operations(plain, size) / sorted(took["float32"])[repeats // 2]
    return (
        case,
        f"{size[0]} × {size[1]}",
        times(took["plain"]),
        times(took["float32"]),
        f"{median_ratio(took, 'plain', 'float32'):.2f}",
        f"{median_ratio(took, 'kept', 'float32'):.2f}",
        f"{rate / peak:.0%}",
        f"{(found - exact).abs().max():.0e}",
        times(took["bfloat16"]),
        f"{median_ratio(took, 'float32', 'bfloat16'):.2f}",
        f"{psnr(rounded, found):.1f} dB",
    )


def main() -> None:
    given = options(__doc__, size=(512, 768), repeats=3)
    peak = peak_rate()
    print(f"float32 at the fastest: {peak / 1e9:.0f} GFLOP/s\n")

    def rows() -> Iterator[tuple[str, ...]]:
        for case in given.cases or cases():
            yield row(case, size_of(case, given), given.repeats, peak)

    for line in table(HEADER, rows()):
        print(line, flush=True)


if __name__ == "__main__":
    main()
