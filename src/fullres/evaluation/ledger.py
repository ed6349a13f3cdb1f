"""The folder of an evaluation's results, which a stopped run goes on from."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from fullres.errors import FullresError
from fullres.evaluation.results import Evaluation, Row, as_csv, from_csv

ROWS, SUMMARY, REPORT = "results.csv", "results.json", "results.md"
"""Files of the folder."""


class Ledger:
    """The rows of a folder: those that an earlier run left, and those that are added.

    A row is on the disc when `add` returns; what a kill leaves of a line is dropped. `begun` is
    the evaluation without rows, with the modes and settings of earlier runs too.
    """

    def __init__(self, folder: Path, begun: Evaluation, overwrite: bool = False) -> None:
        """Open a folder, which is made if need be.

        Args:
            folder: of the results.
            begun: the evaluation, without rows.
            overwrite: drop what the folder holds.

        Raises:
            FullresError: it holds results of other settings, or cannot be written.
        """
        self.folder = folder
        self.begun = begun
        self.rows: dict[tuple[str, str], Row] = {}
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if (folder / ROWS).exists() and not overwrite:
                begun = replace(begun, settings=self._earlier(begun) | dict(begun.settings))
                rows = from_csv((folder / ROWS).read_text(encoding="utf-8"))
                self.rows = {(row.name, row.mode): row for row in rows}
            modes = dict.fromkeys([*(mode for _, mode in self.rows), *begun.modes])
            self.begun = replace(begun, modes=tuple(modes))
            _write(folder / SUMMARY, self.begun.json())
            _write(folder / ROWS, as_csv(self.rows.values()))
        except OSError as error:
            raise FullresError(f"{folder}: cannot be written ({error.strerror})") from error

    def add(self, row: Row) -> None:
        """Append a row to the file."""
        with (self.folder / ROWS).open("a", encoding="utf-8", newline="") as file:
            file.write(as_csv([row], header=not self.rows))
            file.flush()
            os.fsync(file.fileno())
        self.rows[row.name, row.mode] = row

    def finish(self, evaluation: Evaluation) -> None:
        """Write the summary and the report."""
        _write(self.folder / SUMMARY, evaluation.json())
        _write(self.folder / REPORT, evaluation.markdown())

    def _earlier(self, begun: Evaluation) -> dict[str, Any]:
        """Settings of the earlier runs, which agree with those of this run."""
        remedy = "choose another --output, or --overwrite these results"
        try:
            text = (self.folder / SUMMARY).read_text(encoding="utf-8")
            earlier = dict(json.loads(text)["settings"])
        except (OSError, ValueError, KeyError, TypeError):
            raise FullresError(
                f"{self.folder}: holds results of unknown settings, {SUMMARY} is missing or "
                f"damaged; {remedy}"
            ) from None
        now = json.loads(begun.json())["settings"]
        for key, after in now.items():
            before = earlier.get(key, after)
            if before != after:
                raise FullresError(
                    f"{self.folder}: holds results of other settings, {key} was {before} and is "
                    f"{after} now; {remedy}"
                )
        return earlier


def _write(path: Path, text: str) -> None:
    """A file appears complete or not at all."""
    part = path.with_name(f".{path.name}.part")
    part.write_text(text, encoding="utf-8", newline="")
    part.replace(path)
