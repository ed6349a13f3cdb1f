"""A 512 × 512 colour picture through PANet of published size: local, in parts, and the direct form.

    python benchmarks/pyramid.py [--threads N] [--rounds N] [--budget GIB] [--side PIXELS]

Every case runs in a process of its own, so that its peak memory is its own; the cases take turns,
round by round. Times are medians, and ratios medians of the ratios within a round. Memory is what
the process takes at its peak beyond what it took before the picture.

- local: the network as `fullres restore` runs it, window 72 × 72.
- parts: as the published code runs larger pictures. Every picture is cut into its four quarters,
  each 10 pixels larger than a quarter towards the middle, again and again until a quarter has
  fewer than 6800 pixels; attention is global within each part, and parts meet without blending.
- direct: scores of all pairs of patches at once, as published: convolution with patches as
  kernels, softmax, transposed convolution.
- exact: the same result as the direct form, in blocks.

"Largest" is the largest multiple of 16 pixels a side whose direct form stays within the budget,
found by running it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor

import fullres as fr
from fullres.memory import use_huge_pages
from fullres.networks import panet
from fullres.ops.pyramid import EPS, SCALES, window_spans

SHAVE, LEAST = 10, 6800
GIB = 2**30


def direct(q: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor], **options: Any) -> Tensor:
    """Pyramid attention with patches as kernels, picture by picture."""
    pictures = []
    for n in range(q.shape[0]):
        kernels, patches = (
            torch.cat([F.unfold(x[n : n + 1], 3, padding=1) for x in maps], 2)[0].mT
            for maps in (keys, values)
        )
        kernels = kernels / kernels.norm(dim=1, keepdim=True).clamp_min(EPS)
        kernels = kernels.reshape(-1, q.shape[1], 3, 3)
        scores = F.conv2d(q[n : n + 1], kernels, padding=1).mul_(options["softmax_scale"])
        patches = patches.reshape(len(kernels), -1, 3, 3)
        pictures.append(F.conv_transpose2d(scores.softmax(1), patches, padding=1) / 4)
    return torch.cat(pictures)


def in_parts(network: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """The tiling of the published code: quarters of quarters, each with a margin inwards."""
    height, width = x.shape[-2:]
    rows, columns = height // 2 + SHAVE, width // 2 + SHAVE
    call = network if rows * columns < LEAST else lambda part: in_parts(network, part)
    out = torch.empty_like(x)
    top, left = height // 2, width // 2
    out[..., :top, :left] = call(x[..., :rows, :columns])[..., :top, :left]
    out[..., :top, left:] = call(x[..., :rows, -columns:])[..., :top, left - width :]
    out[..., top:, :left] = call(x[..., -rows:, :columns])[..., top - height :, :left]
    out[..., top:, left:] = call(x[..., -rows:, -columns:])[..., top - height :, left - width :]
    return out


CASES = ("local", "parts, direct", "parts, exact", "exact", "direct", "convolutions")


@torch.inference_mode()
def measure(case: str, side: int, threads: int) -> dict[str, float]:
    """Seconds and peak bytes of a case on a square picture."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    module = fr.create_network("panet").module.to(memory_format=torch.channels_last)
    convolutions = torch.nn.Sequential(*(m for m in module.body if not hasattr(m, "to_local")))
    if case == "local":
        fr.convert(module, fr.Local(train_size=48))
    run: Callable[[Tensor], Tensor] = module
    if case.startswith("parts"):
        run = lambda x: in_parts(module, x)  # noqa: E731
    if case == "convolutions":
        run = lambda x: convolutions(module.head(x))  # noqa: E731
    attention = direct if "direct" in case else panet.pyramid_attention
    with patch.object(panet, "pyramid_attention", attention):
        run(picture(24))  # compiles
        x = picture(side)
        before = memory("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        start = time.perf_counter()
        run(x)
        seconds = time.perf_counter() - start
    return {"seconds": seconds, "bytes": memory("VmHWM") - before}


def memory(name: str) -> int:
    """Bytes of this process, as Linux counts them."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(name)).split()[1])


def picture(side: int) -> Tensor:
    return torch.rand(1, 3, side, side).to(memory_format=torch.channels_last)


def run_alone(case: str, side: int, threads: int) -> dict[str, float] | None:
    """Measure in a process of its own; None if it ran out of memory."""
    command = [sys.executable, __file__, "--case", case, "--side", str(side)]
    process = subprocess.run([*command, "--threads", str(threads)], capture_output=True, text=True)
    if process.returncode:
        return None
    result: dict[str, float] = json.loads(process.stdout)
    return result


def largest_direct(budget: float, threads: int) -> int:
    side = 48
    while True:
        result = run_alone("direct", side + 16, threads)
        if result is None or result["bytes"] > budget:
            return side
        side += 16


def pairs(side: int, window: int) -> int:
    """Pairs of a query and a key."""
    seen = 0
    for scale in SCALES:
        spans = window_spans(side, window, int(side * scale), scale)
        seen += sum(last - first for first, last in spans) ** 2
    return seen


def peak_of_machine(threads: int) -> float:
    """Operations a second that products of large matrices reach."""
    torch.set_num_threads(threads)
    a, b = torch.rand(2, 2048, 2048).unbind()
    best = 0.0
    for _ in range(12):
        start = time.perf_counter()
        a @ b
        best = max(best, 2 * 2048**3 / (time.perf_counter() - start))
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--budget", type=float, default=8, help="GiB for the direct form")
    parser.add_argument("--side", type=int, default=512)
    parser.add_argument("--case", choices=CASES, help="measure only this, and print JSON")
    options = parser.parse_args()
    threads, side = options.threads, options.side
    if options.case:
        print(json.dumps(measure(options.case, side, threads)))
        return
    large = largest_direct(options.budget * GIB, threads)
    cases = [
        ("local", side),
        ("parts, direct", side),
        ("parts, exact", side),
        ("convolutions", side),
        ("local", large),
        ("exact", large),
        ("direct", large),
    ]
    rounds = [[run_alone(*case, threads) for case in cases] for _ in range(options.rounds)]
    print(f"PANet, 80 blocks, 64 features, colour, float32; {threads} threads")
    print(f"torch {torch.__version__}; medians of {options.rounds} rounds; ", end="")
    print(f"direct form within {options.budget:g} GiB: up to {large} × {large}\n")
    print("| picture | network | time | ÷ local | peak memory |")
    print("|---|---|---|---|---|")
    for n, (case, size) in enumerate(cases):
        column = [r[n] for r in rounds]
        times = [c["seconds"] for c in column]
        base = [r[0 if size == side else 4]["seconds"] for r in rounds]
        ratio = statistics.median(a / b for a, b in zip(times, base, strict=True))
        memory = statistics.median(c["bytes"] for c in column) / GIB
        print(
            f"| {size} × {size} | {case} | {statistics.median(times):.2f} s | {ratio:.2f} "
            f"| {memory:.2f} GiB |"
        )
    attention = statistics.median(r[0]["seconds"] - r[3]["seconds"] for r in rounds)
    needed = pairs(side, 72) * 2 * (32 + 64)
    peak = peak_of_machine(threads)
    print(
        f"\nAttention itself: {attention:.1f} s for {pairs(side, 72):.2g} pairs, "
        f"{needed / attention / 1e9:.0f} GFLOP/s of {peak / 1e9:.0f} "
        f"({needed / attention / peak:.0%}), counting one product of pixels and one of values."
    )


if __name__ == "__main__":
    use_huge_pages()
    main()
