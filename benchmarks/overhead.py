"""Overhead of conversion: local over global, of our forms and of the papers'.

    python benchmarks/overhead.py [CASE…] [--size 720x1280] [--repeats 5] [--threads N] [--ours]

Windows are 384 × 384. All forms of a network run in turn in one process; times are medians, ratios
medians of the ratios within a turn. The papers' forms (`benchmarks/plain`) take means and variances
from summed-area tables and cut attention's windows out; `--ours` leaves them away.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial

from cases import SMALLER, cases, form, options, size_of, times
from fullres.measure import Size, interleaved, median_ratio, table

HEADER = (
    "network",
    "picture",
    "global",
    "local",
    "local ÷ global",
    "plain global",
    "plain local",
    "plain local ÷ plain global",
)
CASES = [case for case in cases() if case not in SMALLER]


def row(case: str, size: Size, repeats: int, kinds: tuple[str, ...]) -> tuple[str, ...]:
    with ExitStack() as stack:
        calls = {kind: partial(stack.enter_context(form(case, kind)), size) for kind in kinds}
        took = interleaved(calls, repeats)
    cells = [case, f"{size[0]} × {size[1]}"]
    for i in range(0, len(kinds), 2):
        under, over = kinds[i : i + 2]
        cells += [times(took[under]), times(took[over]), f"{median_ratio(took, over, under):.3f}"]
    return tuple(cells)


def main() -> None:
    ours = "--ours" in sys.argv
    sys.argv = [word for word in sys.argv if word != "--ours"]
    given = options(__doc__, size=(720, 1280), repeats=5)
    kinds = ("global", "local") if ours else ("global", "local", "plain", "plain local")

    def rows() -> Iterator[tuple[str, ...]]:
        for case in given.cases or CASES:
            yield row(case, size_of(case, given), given.repeats, kinds)

    for line in table(HEADER[: 2 + 3 * len(kinds) // 2], rows()):
        print(line, flush=True)


if __name__ == "__main__":
    main()
