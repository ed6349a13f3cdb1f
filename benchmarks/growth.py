"""How cost grows with the picture: time and memory of local forms, 0.25 to 16 megapixels.

    python benchmarks/growth.py [CASE…] [--repeats 1] [--threads N]

NAFNet and Restormer if no case is named. Pictures are 3 : 4, windows 384 × 384, float32. Memory is
what a pass adds to the resident memory of a process of its own. Where memory holds it, freed memory
is kept from pass to pass: those sizes run in turn in one process, after two passes of the largest,
and times are medians. Larger sizes return large blocks, and time and memory are of one pass. Sizes
that memory does not hold are left out.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import partial
from statistics import median

import torch

from cases import form, lean, options
from fullres.measure import Pass, Size, first_pass, interleaved, peak_memory_of, table
from fullres.memory import free_memory

MEGAPIXELS = (0.25, 0.5, 1, 2, 4, 8, 16)
HEADER = ("network", "picture", "megapixels", "freed memory", "pass", "s/MP", "memory", "GB/MP")
ROOM = 0.75
"""Share of the free memory that a pass may take."""


def picture_size(megapixels: float) -> Size:
    """Height and width, 3 : 4, of whole multiples of 16.

    >>> picture_size(1)
    (864, 1152)
    """
    height = 16 * round(math.sqrt(megapixels * 1e6 * 3 / 4) / 16)
    return height, 16 * round(megapixels * 1e6 / height / 16)


def rows(case: str, repeats: int) -> Iterator[tuple[str, ...]]:
    sizes = [picture_size(m) for m in MEGAPIXELS]
    room = ROOM * free_memory(torch.device("cpu"))
    one = picture_size(1)
    a_pixel = peak_memory_of(form, case, "local", size=one) / math.prod(one)
    kept = [size for size in sizes if a_pixel * math.prod(size) < room]
    with form(case, "local") as found:
        need = {size: found.peak(*size) for size in sizes}
        took = passes(found, kept, repeats)
    for size, time in zip(kept, took, strict=True):
        yield row(case, size, "kept", time, peak_memory_of(lean, case, "local", size=size))
    for size in sizes:
        if size not in kept and need[size] < room:
            memory, time = first_pass(partial(lean, all_of_it=False), case, "local", size=size)
            yield row(case, size, "returned", time, memory)


def passes(run: Pass, sizes: Sequence[Size], repeats: int) -> list[float]:
    """Seconds of a pass at each size, medians; the largest comes last."""
    for size in sizes[-1:] * 2:  # the first leaves memory in pieces, the second takes more
        run(size)
    calls = {f"{size}": partial(run, size) for size in sizes}
    return [median(times) for times in interleaved(calls, repeats, warm_up=False).values()]


def row(case: str, size: Size, manner: str, time: float, memory: int) -> tuple[str, ...]:
    megapixels, gigabytes = math.prod(size) / 1e6, memory / 1e9
    return (
        case,
        f"{size[0]} × {size[1]}",
        f"{megapixels:.2f}",
        manner,
        f"{time:.2f} s",
        f"{time / megapixels:.2f}",
        f"{gigabytes:.2f} GB",
        f"{gigabytes / megapixels:.2f}",
    )


def main() -> None:
    given = options(__doc__, size=(0, 0), repeats=1)
    cases = given.cases or ("nafnet", "restormer")
    found = (line for case in cases for line in rows(case, given.repeats))
    for line in table(HEADER, found):
        print(line, flush=True)


if __name__ == "__main__":
    main()
