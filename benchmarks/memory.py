"""Peak memory of a pass: our local and global forms beside the plain form.

    python benchmarks/memory.py [CASE…] [--size 1080x1920] [--threads N]

Each figure is what one pass in float32 adds to the resident memory of a process of its own, weights
not counted, windows 384 × 384. Freed memory goes back to the kernel at once in all forms: what
`fullres restore` keeps of it where there is room, to be faster, is not what a pass needs. A form
that would not fit the free memory is not run; the figure in brackets is that of its tensors.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from cases import SMALLER, cases, form, lean, options, size_of
from fullres.measure import Size, peak_memory_of, table
from fullres.memory import free_memory

HEADER = (
    "network",
    "picture",
    "plain",
    "global",
    "local",
    "plain ÷ local",
    "local ÷ global",
)
KINDS = ("plain", "global", "local")
ROOM = 0.8
"""Share of the free memory that a form's tensors may take."""


def peak(case: str, kind: str, size: Size) -> tuple[int, bool]:
    """Bytes, and whether they were measured."""
    with form(case, kind) as found:
        expected = found.peak(*size)
    if expected > ROOM * free_memory(torch.device("cpu")):
        return expected, False
    return peak_memory_of(lean, case, kind, size=size), True


def row(case: str, size: Size) -> tuple[str, ...]:
    found: dict[str, int] = {}
    cells = []
    for kind in KINDS:
        found[kind], measured = peak(case, kind, size)
        figure = f"{found[kind] / 1e9:.2f} GB"
        cells.append(figure if measured else f"({figure})")
    return (
        case,
        f"{size[0]} × {size[1]}",
        *cells,
        f"{found['plain'] / found['local']:.2f}",
        f"{found['local'] / found['global']:.2f}",
    )


def main() -> None:
    given = options(__doc__, size=(1080, 1920), repeats=1)

    def rows() -> Iterator[tuple[str, ...]]:
        for case in given.cases or [case for case in cases() if case not in SMALLER]:
            yield row(case, size_of(case, given))

    for line in table(HEADER, rows()):
        print(line, flush=True)


if __name__ == "__main__":
    main()
