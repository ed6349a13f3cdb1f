"""A plan as a table of plain text."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fullres.local.operations import Operation, Plan


def table(plan: Plan) -> str:
    """The operations that become local with their windows, those that stay with their reasons.

    Runs of alike operations whose names differ in one number share a line.
    """
    local = plan.local
    lines = [
        f"{plan.network}: training size {_size(local.train_size)}, window {_size(local.window)}"
    ]
    if plan.converted:
        rows = [
            ("operation", "kind", "map at training size", "window"),
            *(
                (name, op.kind, _each(op, [s[-2:] for s in op.shapes]), _each(op, op.windows))
                for name, op in _runs(plan.converted)
            ),
        ]
        lines += ["", *_columns(rows)]
    if plan.kept:
        kept = [(name, op.kind, op.reason or "") for name, op in _runs(plan.kept)]
        lines += ["", *_columns([("stays global", "kind", "because it"), *kept])]
    count = len(plan.operations)
    if not count:
        return "\n".join([*lines, "", "No global operation found."])
    become = len(plan.converted)
    verb, plural = ("becomes" if 1 in (become, count) else "become"), ("" if count == 1 else "s")
    return "\n".join([*lines, "", f"{become} of {count} global operation{plural} {verb} local."])


def _runs(operations: Iterable[Operation]) -> list[tuple[str, Operation]]:
    """Lines of the table: a label and the operation that stands for it."""
    runs: list[tuple[list[str], Operation]] = []
    for op in operations:
        if runs and _alike(runs[-1][1], op) and _span([*runs[-1][0], op.label]) is not None:
            runs[-1][0].append(op.label)
        else:
            runs.append(([op.label], op))
    return [(_span(labels) or labels[0], op) for labels, op in runs]


def _alike(a: Operation, b: Operation) -> bool:
    return (a.kind, a.shapes, a.windows, a.reason) == (b.kind, b.shapes, b.windows, b.reason)


def _span(labels: list[str]) -> str | None:
    """`a.0.b … a.7.b` for labels that differ in one number, counting up by one."""
    if len(labels) == 1:
        return labels[0]
    parts = [re.split(r"(\d+)", label) for label in labels]
    if len({len(p) for p in parts}) > 1:
        return None
    differing = [i for i, column in enumerate(zip(*parts, strict=True)) if len(set(column)) > 1]
    if len(differing) != 1 or not all(p[differing[0]].isdigit() for p in parts):
        return None
    numbers = [int(p[differing[0]]) for p in parts]
    if numbers != list(range(numbers[0], numbers[0] + len(numbers))):
        return None
    return f"{labels[0]} … {labels[-1]} ({len(labels)})"


def _each(op: Operation, sizes: Iterable[tuple[int, ...]]) -> str:
    """The size, or one a call where the calls differ."""
    return ", ".join(dict.fromkeys(_size(size) for size in sizes))


def _size(size: object) -> str:
    return " × ".join(map(str, size)) if isinstance(size, tuple) else str(size)


def _columns(rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["   ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)) for r in rows]
    return [line.rstrip() for line in lines]
