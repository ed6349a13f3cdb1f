"""Local mean against a summed-area table and against a plain copy, at a typical feature map.

    python benchmarks/box.py [--threads N] [--rounds N]

All of one row run in turn, round by round, in one process; the table gives medians of the times
and of the ratios within a round.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from fullres.ops.box import local_mean, local_mean_var

SHAPE, WINDOW = (1, 64, 720, 1280), (384, 384)


def summed_area_table(x: Tensor, window: tuple[int, int]) -> Tensor:
    """The textbook way: two cumulative sums, four corners, edge replication."""
    kh, kw = window
    table = F.pad(x.cumsum(2).cumsum(3), (1, 0, 1, 0))
    sums = table[..., kh:, kw:] - table[..., :-kh, kw:] - table[..., kh:, :-kw]
    mean = (sums + table[..., :-kh, :-kw]) / (kh * kw)
    bottom, right = (x.shape[d] - mean.shape[d] - (k - 1) // 2 for d, k in ((2, kh), (3, kw)))
    return F.pad(mean, ((kw - 1) // 2, right, (kh - 1) // 2, bottom), mode="replicate")


def seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"map {SHAPE}, window {WINDOW}, float32, {options.threads} threads")
    print(f"torch {torch.__version__}; medians of {options.rounds} rounds\n")
    print(
        "| memory | clone | local mean | mean and variance | summed-area table "
        "| local mean ÷ clone | table ÷ local mean | error | error of table |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for name, memory in (("NCHW", torch.contiguous_format), ("NHWC", torch.channels_last)):
        x = (torch.rand(SHAPE) + 1).to(memory_format=memory)
        calls: list[Callable[[], object]] = [
            x.clone,
            lambda x=x: local_mean(x, WINDOW),
            lambda x=x: local_mean_var(x, WINDOW),
            lambda x=x: summed_area_table(x, WINDOW),
        ]
        for call in calls:
            call()
        rounds = [[seconds(call) for call in calls] for _ in range(options.rounds)]
        times = [statistics.median(column) for column in zip(*rounds, strict=True)]
        copies = statistics.median(r[1] / r[0] for r in rounds)
        tables = statistics.median(r[3] / r[1] for r in rounds)
        exact = summed_area_table(x[:, :4].double(), WINDOW)
        errors = [
            ((f(x[:, :4], WINDOW).double() - exact).abs() / exact).max().item()
            for f in (local_mean, summed_area_table)
        ]
        cells = [f"{1000 * t:.0f} ms" for t in times]
        cells += [f"{copies:.2f}", f"{tables:.1f}", *(f"{e:.0e}" for e in errors)]
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
