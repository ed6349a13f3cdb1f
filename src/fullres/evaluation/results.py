"""Results of an evaluation: rows, their means and tables."""

from __future__ import annotations

import csv
import io
import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fullres.errors import FullresError
from fullres.metrics import mean_of

INPUT = "input"
"""Mode of the rows that measure the degraded pictures themselves."""
GLOBAL = "global"
"""Mode that gains are counted from."""

_FIXED = ("name", "mode", "height", "width", "tiles", "seconds", "memory")


@dataclass(frozen=True)
class Row:
    """One picture in one mode."""

    name: str
    """Of the picture in its data set."""
    mode: str
    height: int
    """Of the degraded picture, in pixels."""
    width: int
    tiles: int
    """Passes that the picture was restored in; 0 for the picture as it came."""
    seconds: float
    memory: int
    """Bytes that the largest pass takes: on CUDA the peak that torch has allocated, elsewhere the
    peak of the tensors alive, estimated."""
    metrics: Mapping[str, float]
    """Values of the protocol's metrics, by name."""

    @property
    def megapixels(self) -> float:
        return self.height * self.width / 1e6


@dataclass(frozen=True)
class Summary:
    """One mode over all pictures."""

    mode: str
    pictures: int
    metrics: Mapping[str, float]
    """Means over the pictures."""
    gains: Sequence[float]
    """Of the first metric over the global mode, picture by picture; empty without that mode."""
    seconds_per_megapixel: float
    memory: int
    """The most of any picture, in bytes."""

    @property
    def gain(self) -> float | None:
        """The mean gain."""
        return statistics.fmean(self.gains) if self.gains else None


@dataclass(frozen=True)
class Evaluation:
    """How well a network restores the pictures of a data set, in several modes."""

    network: str
    data: str
    protocol: str
    modes: tuple[str, ...]
    rows: tuple[Row, ...]
    """Picture by picture, in the order of the data set, and mode by mode."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """All that decides the results."""

    @property
    def metric(self) -> str:
        """The protocol's first metric, which gains are counted in."""
        return next(iter(self.rows[0].metrics))

    def of(self, mode: str) -> dict[str, Row]:
        """The rows of one mode, by picture."""
        return {row.name: row for row in self.rows if row.mode == mode}

    def gains(self, mode: str, over: str = GLOBAL) -> dict[str, float]:
        """What one mode gains over another in the first metric, by picture."""
        base, metric = self.of(over), self.metric
        return {
            name: _difference(row.metrics[metric], base[name].metrics[metric])
            for name, row in self.of(mode).items()
            if name in base
        }

    def summary(self) -> list[Summary]:
        """Every mode over all pictures: means, gains, time, memory."""
        found = []
        for mode in self.modes:
            rows = list(self.of(mode).values())
            if rows:
                found.append(
                    Summary(
                        mode,
                        len(rows),
                        mean_of([row.metrics for row in rows]),
                        [] if mode in (INPUT, GLOBAL) else list(self.gains(mode).values()),
                        sum(row.seconds for row in rows) / sum(row.megapixels for row in rows),
                        max(row.memory for row in rows),
                    )
                )
        return found

    def table(self) -> str:
        """A Markdown table with a line a mode.

        Means of the metrics over the pictures; the mean gain of the first over the global mode,
        with that of the picture that gains least and most; seconds a megapixel; the most memory.
        """
        header = ["mode", *map(title, self.rows[0].metrics), "gain", "least … most"]
        return _table([*header, "s/MP", "memory"], map(_cells, self.summary()))

    def per_picture(self, metric: str | None = None) -> str:
        """A Markdown table with a line a picture: a metric, the first if None, in each mode.

        Raises:
            FullresError: the protocol has no such metric.
        """
        metric = metric or self.metric
        if metric not in self.rows[0].metrics:
            known = ", ".join(self.rows[0].metrics)
            raise FullresError(f"metric {metric!r} was not measured: take one of {known}")
        modes = {summary.mode: self.of(summary.mode) for summary in self.summary()}
        lines = []
        for name in dict.fromkeys(row.name for row in self.rows):
            rows = [of.get(name) for of in modes.values()]
            size = next(f"{row.width} × {row.height}" for row in rows if row)
            values = ["—" if row is None else number(row.metrics[metric], metric) for row in rows]
            lines.append([name, size, *values])
        return _table(["picture", "pixels", *(f"{title(metric)} {mode}" for mode in modes)], lines)

    def csv(self) -> str:
        """All rows as CSV, with a header."""
        return as_csv(self.rows)

    def json(self) -> str:
        """Settings, summary and rows as JSON; null for what is infinite."""
        modes = [
            {
                "mode": each.mode,
                "pictures": each.pictures,
                **each.metrics,
                "gain": each.gain,
                "least_gain": min(each.gains, default=None),
                "most_gain": max(each.gains, default=None),
                "seconds_per_megapixel": each.seconds_per_megapixel,
                "memory": each.memory,
            }
            for each in self.summary()
        ]
        content = {
            "network": self.network,
            "data": self.data,
            "protocol": self.protocol,
            "settings": self.settings,
            "modes": modes,
            "rows": [_fields(row) for row in self.rows],
        }
        return json.dumps(_finite(content), indent=2, ensure_ascii=False) + "\n"

    def markdown(self) -> str:
        """A report: what was run, the table, and every picture."""
        settings = {key: value for key, value in self.settings.items() if value is not None}
        lines = [f"- {key}: {value}" for key, value in settings.items() if key != "protocol"]
        count = len({row.name for row in self.rows})
        return "\n".join(
            [
                f"# {self.network} on {self.data}",
                f"\n{count} pictures, protocol {self.protocol}; means over the pictures.\n",
                self.table(),
                f"\n{self.per_picture()}",
                "\nSettings:\n",
                *lines,
                "",
            ]
        )


def title(metric: str) -> str:
    """A metric as a table writes it.

    >>> title("psnr"), title("ssim_volume")
    ('PSNR', 'SSIM volume')
    """
    first, _, rest = metric.partition("_")
    return f"{first.upper()} {rest.replace('_', ' ')}".strip()


def number(value: float, metric: str) -> str:
    """A value as a table writes it: decibels with two places, others with four.

    >>> number(31.416, "psnr"), number(0.91234, "ssim")
    ('31.42', '0.9123')
    """
    return f"{value:.2f}" if metric == "psnr" else f"{value:.4f}"


def signed(value: float, metric: str) -> str:
    """A difference as a table writes it.

    >>> signed(0.834, "psnr"), signed(-0.001, "psnr")
    ('+0.83', '0.00')
    """
    text = number(value, metric)
    if float(text) == 0:
        return text.removeprefix("-")
    return f"+{text}" if value > 0 else text


def _cells(each: Summary) -> list[str]:
    metric = next(iter(each.metrics))
    gain = spread = "—"
    if each.gain is not None:
        gain, least, most = (
            signed(value, metric) for value in (each.gain, min(each.gains), max(each.gains))
        )
        spread = f"{least} … {most}"
    cost = ["—", "—"]
    if each.mode != INPUT:
        cost = [f"{each.seconds_per_megapixel:.2f}", f"{each.memory / 1e9:.2f} GB"]
    values = [number(value, name) for name, value in each.metrics.items()]
    return [each.mode, *values, gain, spread, *cost]


def _table(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A Markdown table whose columns line up as plain text too."""
    cells = [list(header), *map(list, lines)]
    widths = [max(3, *map(len, column)) for column in zip(*cells, strict=True)]
    rule = [":" + "-" * (widths[0] - 1), *("-" * (width - 1) + ":" for width in widths[1:])]
    return "\n".join(
        f"| {' | '.join(_padded(line, widths))} |" for line in (cells[0], rule, *cells[1:])
    )


def _padded(line: Sequence[str], widths: Sequence[int]) -> list[str]:
    return [
        cell.rjust(width) if column else cell.ljust(width)
        for column, (cell, width) in enumerate(zip(line, widths, strict=True))
    ]


def _difference(value: float, base: float) -> float:
    return 0.0 if value == base else value - base  # of two infinite ones too


def as_csv(rows: Iterable[Row], header: bool = True) -> str:
    """Rows as CSV, numbers to their last digit; nothing if there are none.

    >>> row = Row("kodim01", "global", 512, 768, 1, 0.25, 10**6, {"psnr": 31.5})
    >>> print(as_csv([row]), end="")
    name,mode,height,width,tiles,seconds,memory,psnr
    kodim01,global,512,768,1,0.25,1000000,31.5
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    for row in rows:
        if header:
            writer.writerow([*_FIXED, *row.metrics])
            header = False
        writer.writerow(_fields(row).values())
    return text.getvalue()


def from_csv(text: str) -> list[Row]:
    r"""Rows of a CSV with a header; a last line without an end, as a kill leaves it, is dropped.

    >>> from_csv("name,mode,height,width,tiles,seconds,memory,psnr\nb,local,8,9,1,0.5,1,30\nc,gl")
    [Row(name='b', mode='local', height=8, width=9, tiles=1, seconds=0.5, memory=1, metrics=...)]
    """
    lines = csv.DictReader(io.StringIO(text.rpartition("\n")[0]))
    return [_row(line) for line in lines]


def _row(line: dict[str, str]) -> Row:
    return Row(
        name=line["name"],
        mode=line["mode"],
        height=int(line["height"]),
        width=int(line["width"]),
        tiles=int(line["tiles"]),
        seconds=float(line["seconds"]),
        memory=int(line["memory"]),
        metrics={key: float(value) for key, value in line.items() if key not in _FIXED},
    )


def _fields(row: Row) -> dict[str, Any]:
    return {name: getattr(row, name) for name in _FIXED} | dict(row.metrics)


def _finite(content: Any) -> Any:
    """JSON knows no infinity."""
    if isinstance(content, Mapping):
        return {key: _finite(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content
