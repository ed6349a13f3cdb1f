"""What a study leaves in its folder: a table to read, a table to compute with, a picture."""

from __future__ import annotations

import csv
import dataclasses
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fullres.errors import FullresError
from fullres.measure import table

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Sheet:
    """The readable table of a study."""

    title: str
    header: Sequence[str]
    cells: Sequence[Sequence[str]]
    notes: Sequence[str] = ()
    """Paragraphs below the table."""

    def __str__(self) -> str:
        return "\n".join([f"# {self.title}", "", self.body])

    @property
    def body(self) -> str:
        """The table and the notes, in Markdown."""
        lines = [*table(self.header, self.cells)]
        for note in self.notes:
            lines += ["", note]
        return "\n".join(lines)


def save(
    folder: str | os.PathLike[str], name: str, sheet: Sheet, rows: Iterable[Any], figure: Figure
) -> None:
    """Write `NAME.md`, `NAME.csv` and `NAME.png`; the folder is made if it is not there.

    Args:
        folder: where to.
        name: of the study.
        sheet: the readable table.
        rows: dataclasses of one kind, whose fields are the columns of the CSV file; a field that
            is a mapping gives a column a key.
        figure: the picture.

    Raises:
        FullresError: the folder cannot be written to.
    """
    target = Path(folder)
    try:
        target.mkdir(parents=True, exist_ok=True)
        (target / f"{name}.md").write_text(f"{sheet}\n", encoding="utf-8")
        with (target / f"{name}.csv").open("w", newline="", encoding="utf-8") as file:
            flat = [flattened(row) for row in rows]
            writer = csv.DictWriter(file, dict.fromkeys(key for row in flat for key in row))
            writer.writeheader()
            writer.writerows(flat)
        figure.savefig(target / f"{name}.png")
    except OSError as error:
        raise FullresError(f"{target}: cannot be written to ({error.strerror})") from error


def flattened(row: Any) -> dict[str, Any]:
    """A dataclass as the columns of a table."""
    columns: dict[str, Any] = {}
    for field in dataclasses.fields(row):
        value = getattr(row, field.name)
        if isinstance(value, dict):
            columns |= {f"{field.name} {key}": inner for key, inner in value.items()}
        else:
            columns[field.name] = " × ".join(map(str, value)) if isinstance(value, tuple) else value
    return columns


def difference(value: float, base: float) -> float:
    """What a value has over another, of two infinite ones too."""
    return 0.0 if value == base else value - base
