"""The contact sheet of an evaluation: pictures that gain and lose most by local over global."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from fullres.evaluation.examples import Example
from fullres.evaluation.modes import LOCAL
from fullres.evaluation.results import GLOBAL, INPUT, Evaluation, number, signed, title
from fullres.io.contact_sheet import Strip, where_they_differ

SHEET = "contact-sheet.png"
SHOWN = 3
"""Pictures that gain most, and pictures that lose most, on a sheet."""


def extremes(gains: Mapping[str, float], count: int = SHOWN) -> list[str]:
    """The pictures that gain most, the best first, and those that lose most, the worst last.

    >>> extremes({"a": 0.1, "b": -0.2, "c": 0.5, "d": 0.0, "e": -0.1}, 2)
    ['c', 'a', 'e', 'b']
    """
    order = sorted(gains, key=gains.__getitem__, reverse=True)
    gaining = [name for name in order if gains[name] > 0]
    losing = [name for name in order if gains[name] < 0]
    return gaining[:count] + losing[-count:]


def strip(example: Example, pictures: Mapping[str, Tensor], evaluation: Evaluation) -> Strip:
    """The crop in which global and local differ most: input, global, local and target.

    Args:
        example: the picture.
        pictures: its restored pictures, (C, H, W), by mode; global and local among them.
        evaluation: with its rows.
    """
    box = (..., *where_they_differ(pictures[GLOBAL], pictures[LOCAL]))
    metric = evaluation.metric
    cells = []
    for mode, picture in ((INPUT, example.shown), *((m, pictures[m]) for m in (GLOBAL, LOCAL))):
        row = evaluation.of(mode).get(example.name)
        score = "" if row is None else f"  {number(row.metrics[metric], metric)}"
        cells.append((f"{mode}{score}", _seen(picture[box])))
    cells.append(("target", _seen(example.target[box])))
    gain = evaluation.gains(LOCAL)[example.name]
    words = f"local {signed(gain, metric)} over global"
    return Strip(f"{example.name}   {title(metric)}: {words}", cells)


def _seen(crop: Tensor) -> Tensor:
    """A copy of 1 or 3 channels, so that the picture is not kept for its crop."""
    return (crop if len(crop) in (1, 3) else crop[:1]).clone()
