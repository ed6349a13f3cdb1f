"""How cost grows with the picture: time and memory of local forms, 0.25 to 16 megapixels.

    python benchmarks/growth.py [CASE…] [--repeats 1] [--threads N]

NAFNet and Restormer if no case is named. Pictures are 3 : 4, one pass each, windows 384 × 384,
float32. All sizes run in turn in one process; times are medians. Memory is what a pass adds to the
resident memory of a process of its own. Freed memory goes back to the kernel at once, as it must
where a picture fills memory. A size that memory does not hold is left out.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from functools import partial

import torch

from cases import lean, options, times
from fullres.measure import Size, interleaved, peak_memory_of, table
from fullres.memory import free_memory

MEGAPIXELS = (0.25, 0.5, 1, 2, 4, 8, 16)
HEADER = ("network", "picture", "megapixels", "pass", "s/MP", "memory", "GB/MP")
ROOM = 0.8
"""Share of the free memory that a pass's tensors may take."""


def picture_size(megapixels: float) -> Size:
    """Height and width, 3 : 4, of whole multiples of 16.

    >>> picture_size(1)
    (864, 1152)
    """
    height = 16 * round(math.sqrt(megapixels * 1e6 * 3 / 4) / 16)
    return height, 16 * round(megapixels * 1e6 / height / 16)


def rows(given: argparse.Namespace) -> Iterator[tuple[str, ...]]:
    for case in given.cases or ("nafnet", "restormer"):
        with lean(case, "local") as found:
            free = ROOM * free_memory(torch.device("cpu"))
            sizes = [picture_size(m) for m in MEGAPIXELS]
            sizes = [size for size in sizes if found.peak(*size) < free]
            found(sizes[0])
            calls = {f"{size}": partial(found, size) for size in sizes}
            took = interleaved(calls, given.repeats, warm_up=False)
        for size in sizes:
            megapixels = size[0] * size[1] / 1e6
            took_one = took[f"{size}"]
            memory = peak_memory_of(lean, case, "local", size=size)
            yield (
                case,
                f"{size[0]} × {size[1]}",
                f"{megapixels:.2f}",
                times(took_one),
                f"{sorted(took_one)[len(took_one) // 2] / megapixels:.2f}",
                f"{memory / 1e9:.2f} GB",
                f"{memory / 1e9 / megapixels:.2f}",
            )


def main() -> None:
    given = options(__doc__, size=(0, 0), repeats=1)
    for line in table(HEADER, rows(given)):
        print(line, flush=True)


if __name__ == "__main__":
    main()
