"""What the command line shows while it works: a line a picture, a bar on a terminal, a summary."""

from __future__ import annotations

import logging
import sys
import time

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn

from fullres.batch import Batch, Job, Outcome, Report

PATIENCE = 30.0
"""Seconds without a line after which a large picture gets one, where no bar can be shown."""


def plural(number: int, one: str) -> str:
    """A number and its noun.

    >>> plural(1, "picture"), plural(2000, "picture")
    ('1 picture', '2,000 pictures')
    """
    return f"{number:,} {one}{'' if number == 1 else 's'}"


def duration(seconds: float) -> str:
    """A length of time as one says it.

    >>> duration(4.21), duration(75), duration(8000)
    ('4.2 s', '1 min 15 s', '2 h 13 min')
    """
    if seconds < 10:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes == 0:
        return f"{rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


class Display:
    """Shows how a batch goes on: `fullres.batch.Progress` for people.

    Lines and the bar go to standard output, failures to standard error.
    """

    def __init__(self, quiet: bool = False) -> None:
        self.console = Console(
            quiet=quiet, highlight=False, markup=False, emoji=False, soft_wrap=True
        )
        self.bar = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TextColumn("{task.fields[state]}", markup=False),
            console=self.console,
            transient=True,
            redirect_stderr=sys.stderr.isatty(),
            disable=quiet or not self.console.is_terminal,
        )
        self.task = self.bar.add_task("", total=None, state="")
        self.alone = False
        self.files, self.ended, self.failed, self.pixels = 0, 0, 0, 0
        self.open, self.open_pixels, self.open_done = "", 0, 0
        self.begun = self.last_line = time.monotonic()

    def __enter__(self) -> Display:
        self.bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.stop()

    def begin(self, batch: Batch, waiting: int) -> None:
        self.alone, self.files = batch.alone, waiting
        done = len(batch.jobs) - waiting
        if batch.passed_over:
            self._line(f"left out {plural(batch.passed_over, 'earlier result')} among the pictures")
        if done:
            self._line(
                f"{done:,} of {plural(len(batch.jobs), 'picture')} done already "
                "(--overwrite does them again)"
            )
        self.begun = self.last_line = time.monotonic()

    def picture(self, job: Job, pixels: int) -> None:
        self.open, self.open_pixels, self.open_done = str(job.source), pixels, 0
        self._update()

    def tile(self, pixels: int) -> None:
        self.open_done += pixels
        self.pixels += pixels
        self._update()
        whole = self.open_done >= self.open_pixels
        if self.bar.disable and not whole and time.monotonic() - self.last_line > PATIENCE:
            share = self.open_done / self.open_pixels
            self._line(f"{self._count()}{self.open}: {share:.0%}, {self._left()}")

    def end(self, outcome: Outcome) -> None:
        self.ended += 1
        self.open_pixels = self.open_done = 0
        if outcome.error is not None:
            self.failed += 1
            if not self.alone:
                print(f"error: {outcome.error}", file=sys.stderr)  # noqa: T201
        else:
            facts = f"{outcome.pixels / 1e6:.1f} MP in {duration(outcome.seconds)}"
            left = f", {self._left()}" if self.ended < self.files else ""
            self._line(f"{self._count()}{outcome.summary}  {facts}{left}")
        self._update()

    def summarise(self, report: Report) -> None:
        """One line for the whole batch; nothing for one picture, whose line says it all."""
        self.bar.stop()
        if self.alone:
            return
        parts = [f"{len(report.restored):,} restored"]
        parts += [f"{report.already_done:,} done already"] if report.already_done else []
        parts += [f"{len(report.failed):,} failed"] if report.failed else []
        line = ", ".join(parts)
        if report.restored:
            rate = report.megapixels / max(report.seconds, 1e-9)
            line += f": {report.megapixels:,.1f} MP in {duration(report.seconds)}, {rate:.2f} MP/s"
        self._line(line)

    def _line(self, text: str) -> None:
        self.console.print(text)
        self.last_line = time.monotonic()

    def _count(self) -> str:
        number = self.ended + (1 if self.open_pixels else 0)
        return "" if self.alone else f"[{number}/{self.files}] "

    def _progress(self) -> float:
        """Pictures done, the open one in part."""
        return self.ended + (self.open_done / self.open_pixels if self.open_pixels else 0)

    def _left(self) -> str:
        # pictures that failed took next to no time, so they say nothing about the others
        worked = self._progress() - self.failed
        if not worked:
            return ""
        pace = (time.monotonic() - self.begun) / worked
        return f"{duration(pace * (self.files - self._progress()))} left"

    def _update(self) -> None:
        rate = self.pixels / 1e6 / max(time.monotonic() - self.begun, 1e-9)
        facts = [f"{self.ended}/{self.files}"] if self.files > 1 else []
        facts += [f"{rate:.2f} MP/s", self._left()] if self.pixels else []
        self.bar.update(
            self.task,
            description=self.open,
            total=self.files if self._progress() else None,
            completed=self._progress(),
            state=", ".join(filter(None, facts)),
        )


class LogLines(logging.Handler):
    """Shows what the package logs as lines of a console."""

    def __init__(self, console: Console) -> None:
        super().__init__(logging.INFO)
        self.console = console

    def emit(self, record: logging.LogRecord) -> None:
        self.console.print(record.getMessage())


def show_log(console: Console) -> None:
    """Show the package's log on `console` from now on."""
    package = logging.getLogger("fullres")
    package.setLevel(logging.INFO)
    package.addHandler(LogLines(console))
