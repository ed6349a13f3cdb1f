"""How cost grows with the picture: time and memory of local forms, 0.25 to 16 megapixels.

    python benchmarks/growth.py [CASE…] [--repeats 1] [--threads N]

NAFNet and Restormer if no case is named. Pictures are 3 : 4, one pass each, windows 384 × 384,
float32. All sizes run in turn in one process; times are medians. Memory is what a pass adds to the
resident memory of a process of its own. Freed memory is kept, which takes up to twice a pass's
tensors; sizes that need it all return it, and are slower. Sizes that memory does not hold are left
out.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from functools import partial

import torch

from cases import Form, form, lean, options, times
from fullres.measure import Size, interleaved, peak_memory_of, table
from fullres.memory import free_memory

MEGAPIXELS = (0.25, 0.5, 1, 2, 4, 8, 16)
HEADER = ("network", "picture", "megapixels", "freed memory", "pass", "s/MP", "memory", "GB/MP")
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
    free = ROOM * free_memory(torch.device("cpu"))
    sizes = [picture_size(m) for m in MEGAPIXELS]
    for case in given.cases or ("nafnet", "restormer"):
        with form(case, "local") as found:
            need = {size: found.peak(*size) for size in sizes}
        kept = [size for size in sizes if 2 * need[size] < free]
        returned = [size for size in sizes if size not in kept and need[size] < free]
        for manner, run, these in (("kept", form, kept), ("returned", lean, returned)):
            for size, took in zip(these, passes(run, case, these, given.repeats), strict=True):
                megapixels = size[0] * size[1] / 1e6
                memory = peak_memory_of(lean, case, "local", size=size) / 1e9
                yield (
                    case,
                    f"{size[0]} × {size[1]}",
                    f"{megapixels:.2f}",
                    manner,
                    times(took),
                    f"{sorted(took)[len(took) // 2] / megapixels:.2f}",
                    f"{memory:.2f} GB",
                    f"{memory / megapixels:.2f}",
                )


def passes(
    run: Callable[[str, str], AbstractContextManager[Form]],
    case: str,
    sizes: Sequence[Size],
    repeats: int,
) -> list[list[float]]:
    """Seconds of each pass at each size, in turns."""
    if not sizes:
        return []
    with run(case, "local") as found:
        found(sizes[0])
        calls = {f"{size}": partial(found, size) for size in sizes}
        return list(interleaved(calls, repeats, warm_up=False).values())


def main() -> None:
    given = options(__doc__, size=(0, 0), repeats=1)
    for line in table(HEADER, rows(given)):
        print(line, flush=True)


if __name__ == "__main__":
    main()
