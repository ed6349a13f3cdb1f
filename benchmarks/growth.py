"""How cost grows with the picture: time and memory of local forms, 0.25 to 16 megapixels.

    python benchmarks/growth.py [CASE…] [--repeats 1] [--threads N]

NAFNet and Restormer if no case is named. Pictures are 3 : 4, windows 384 × 384, float32. Memory is
what a pass adds to the resident memory of a process of its own. Where memory holds it, freed memory
is kept from pass to pass: those sizes run in turn in one process, after two passes of the largest,
and times are those of the turn in the middle. Larger sizes return large blocks, and time and memory
are of one pass. Sizes that memory does not hold are left out.

A machine that is faster now than ten minutes ago would show as growth. So a picture of half a
megapixel runs before and after every pass, and the last column is the time of a megapixel over that
of theirs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch

from cases import form, lean, options
from fullres.measure import Pass, Size, first_pass, peak_memory_of, seconds, table
from fullres.memory import free_memory

MEGAPIXELS = (0.25, 0.5, 1, 2, 4, 8, 16)
HEADER = (
    *("network", "picture", "megapixels", "freed memory", "pass", "s/MP", "memory", "GB/MP"),
    "s/MP ÷ beside",
)
ROOM = 0.75
"""Share of the free memory that a pass may take."""


def picture_size(megapixels: float) -> Size:
    """Height and width, 3 : 4, of whole multiples of 16.

    >>> picture_size(1)
    (864, 1152)
    """
    height = 16 * round(math.sqrt(megapixels * 1e6 * 3 / 4) / 16)
    return height, 16 * round(megapixels * 1e6 / height / 16)


BESIDE = picture_size(0.5)
"""The picture that runs before and after every other."""


class Timed(NamedTuple):
    """Seconds of a pass, and of those at `BESIDE` before and after it on average."""

    seconds: float
    beside: float


def rows(case: str, repeats: int) -> Iterator[tuple[str, ...]]:
    sizes = [picture_size(m) for m in MEGAPIXELS]
    room = ROOM * free_memory(torch.device("cpu"))
    one = picture_size(1)
    a_pixel = peak_memory_of(form, case, "local", size=one) / math.prod(one)
    kept = [size for size in sizes if a_pixel * math.prod(size) < room]
    with form(case, "local") as found:
        need = {size: found.peak(*size) for size in sizes}
        took = passes(found, kept, repeats)
    for size, timed in zip(kept, took, strict=True):
        yield row(case, size, "kept", timed, peak_memory_of(lean, case, "local", size=size))
    for size in sizes:
        if size not in kept and need[size] < room:
            before = beside(case)
            memory, time = first_pass(partial(lean, all_of_it=False), case, "local", size=size)
            timed = Timed(time, (before + beside(case)) / 2)
            yield row(case, size, "returned", timed, memory)


def passes(run: Pass, sizes: Sequence[Size], repeats: int) -> list[Timed]:
    """Times at each size, of the turn with the median ratio; the largest size comes last."""
    for size in sizes[-1:] * 2:  # the first leaves memory in pieces, the second takes more
        run(size)
    found: dict[Size, list[Timed]] = {size: [] for size in sizes}
    for _ in range(repeats):
        before = seconds(partial(run, BESIDE))
        for size in sizes:
            time, after = (seconds(partial(run, s)) for s in (size, BESIDE))
            found[size].append(Timed(time, (before + after) / 2))
            before = after
    return [sorted(t, key=lambda t: t.seconds / t.beside)[len(t) // 2] for t in found.values()]


def beside(case: str) -> float:
    """Seconds of a pass at `BESIDE` in this process, the second one."""
    with form(case, "local") as run:
        run(BESIDE)
        return seconds(partial(run, BESIDE))


def row(case: str, size: Size, manner: str, timed: Timed, memory: int) -> tuple[str, ...]:
    megapixels, gigabytes = math.prod(size) / 1e6, memory / 1e9
    return (
        case,
        f"{size[0]} × {size[1]}",
        f"{megapixels:.2f}",
        manner,
        f"{timed.seconds:.2f} s",
        f"{timed.seconds / megapixels:.2f}",
        f"{gigabytes:.2f} GB",
        f"{gigabytes / megapixels:.2f}",
        f"{timed.seconds / math.prod(size) / (timed.beside / math.prod(BESIDE)):.2f}",
    )


def main() -> None:
    given = options(__doc__, size=(0, 0), repeats=1)
    cases = given.cases or ("nafnet", "restormer")
    found = (line for case in cases for line in rows(case, given.repeats))
    for line in table(HEADER, found):
        print(line, flush=True)


if __name__ == "__main__":
    main()
