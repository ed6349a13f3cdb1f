"""Many files: which pictures, where each result goes, what is done already, what went wrong."""

from __future__ import annotations

import glob
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from fullres.errors import FullresError, ImageError
from fullres.io.image import SUFFIXES

SUFFIX = "-restored"
"""Ends the name of a result that is written next to its picture."""

COMPARISON = "-compare.png"
"""Ends the name of a before/after picture."""

Paths = str | Path | Sequence[str | Path]


@dataclass(frozen=True)
class Job:
    """One picture and where its result goes."""

    source: Path
    target: Path
    comparison: Path | None = None
    """Where the before/after picture goes, if one is wanted."""
    right: Path | None = None
    """The right view, where the picture is the left one of two."""

    @property
    def outputs(self) -> tuple[Path, ...]:
        return (self.target,) if self.comparison is None else (self.target, self.comparison)


@dataclass(frozen=True)
class Batch:
    """What one call has to do."""

    jobs: tuple[Job, ...]
    alone: bool
    """One picture named by itself, not found in a folder or by a pattern."""
    passed_over: int = 0
    """Earlier results among the pictures found, left out."""


@dataclass(frozen=True)
class _Place:
    """A picture, its place in a target folder, and the folder it was found in, if in one."""

    picture: Path
    relative: Path
    folder: Path | None = None


@dataclass(frozen=True)
class Outcome:
    """What became of one picture."""

    job: Job
    pixels: int = 0
    """Pixels of the picture."""
    seconds: float = 0.0
    error: FullresError | None = None

    @property
    def summary(self) -> str:
        """What was done, where it succeeded."""
        return f"{self.job.source} → {self.job.target}"


@dataclass(frozen=True)
class Report:
    """What became of all pictures."""

    outcomes: tuple[Outcome, ...]
    already_done: int = 0
    passed_over: int = 0
    seconds: float = 0.0
    failed: tuple[Outcome, ...] = field(init=False)
    restored: tuple[Outcome, ...] = field(init=False)

    def __post_init__(self) -> None:
        failed = tuple(outcome for outcome in self.outcomes if outcome.error is not None)
        restored = tuple(outcome for outcome in self.outcomes if outcome.error is None)
        object.__setattr__(self, "failed", failed)
        object.__setattr__(self, "restored", restored)

    @property
    def megapixels(self) -> float:
        """Megapixels restored."""
        return sum(outcome.pixels for outcome in self.restored) / 1e6


class Progress(Protocol):
    """Is told how a batch goes on; every method returns at once."""

    def begin(self, batch: Batch, waiting: int) -> None:
        """The batch begins; `waiting` of its pictures are not done yet."""

    def picture(self, job: Job, pixels: int) -> None:
        """A picture of `pixels` pixels is open."""

    def tile(self, pixels: int) -> None:
        """`pixels` more pixels of the open picture are done."""

    def end(self, outcome: Outcome) -> None:
        """A picture is done, or failed."""


class Silent:
    """The progress that nobody watches."""

    def begin(self, batch: Batch, waiting: int) -> None: ...
    def picture(self, job: Job, pixels: int) -> None: ...
    def tile(self, pixels: int) -> None: ...
    def end(self, outcome: Outcome) -> None: ...


def find(
    source: Paths,
    target: str | Path | None = None,
    suffix: str | None = None,
    comparison: bool = False,
    right: str | Path | None = None,
) -> Batch:
    """Find the pictures and decide where every result goes, before any work begins.

    Args:
        source: a picture, a folder (searched recursively, without hidden files and without
            following links to folders), a glob pattern, or several of them.
        target: the result of a single picture, or a folder, whose structure follows that of the
            source; without it a picture's result goes next to it and those of a folder into
            `FOLDER-restored` next to the folder. What exists as a folder, ends with a slash or
            has no ending is a folder.
        suffix: added to the name of every result, or of the folder of results; "-restored" where
            no target is given, otherwise nothing.
        comparison: whether a before/after picture goes next to every result.
        right: the right view of a single picture, or the folder that holds the right views under
            the names that the pictures have in theirs.

    Raises:
        ImageError: nothing is there, two pictures would have the same result, or a result would
            replace one of the pictures.
    """
    sources = [source] if isinstance(source, str | Path) else list(source)
    named = len(sources) == 1 and Path(sources[0]).is_file()
    folder = _as_folder(target, named)
    found = {place.picture: place for place in _places(sources, folder)}
    if not found:
        raise ImageError(
            f"{', '.join(map(str, sources))}: no pictures found (looked for "
            f"{', '.join(sorted(SUFFIXES))})"
        )
    jobs = []
    for place in _without_results(found, suffix or SUFFIX):
        result = Path(target) if target and not folder else _result(place, folder, suffix)
        both = result.with_name(result.stem + COMPARISON) if comparison else None
        other = None if right is None else _right(place, Path(right), named)
        jobs.append(Job(place.picture, result, both, other))
    _check(jobs)
    return Batch(tuple(jobs), named, len(found) - len(jobs))


def waiting(batch: Batch, overwrite: bool) -> list[Job]:
    """The jobs whose results are not there yet: a run that was stopped goes on from here.

    A result appears whole or not at all, so one that is there and newer than its picture is done.

    Raises:
        ImageError: the only picture, named by itself, has its result already.
    """
    if overwrite:
        return list(batch.jobs)
    if batch.alone:
        for path in batch.jobs[0].outputs:
            _refuse_to_replace(path)
    return [job for job in batch.jobs if not all(is_done(path, job) for path in job.outputs)]


def is_done(path: Path, job: Job) -> bool:
    """Whether this result of the job is there, and newer than the picture."""
    try:
        newest = max(p.stat().st_mtime_ns for p in (job.source, job.right) if p is not None)
        return path.stat().st_mtime_ns >= newest
    except OSError:
        return False


def run(
    batch: Batch,
    work: Callable[[Job], int],
    overwrite: bool = False,
    progress: Progress | None = None,
    map: Callable[[Callable[[Job], Outcome], Iterable[Job]], Iterator[Outcome]] = map,
) -> Report:
    """Do what is not done yet; a picture that fails is reported and the others go on.

    Args:
        batch: what there is to do.
        work: restores one picture; returns its pixels.
        overwrite: do everything again.
        progress: is told how the batch goes on.
        map: applies a function to every job and yields the outcomes in order, as the built-in
            does in this process.
    """
    progress = progress or Silent()
    begun = time.monotonic()
    jobs = waiting(batch, overwrite)
    progress.begin(batch, len(jobs))
    outcomes = []
    for outcome in map(lambda job: _attempt(job, work, overwrite), jobs):
        progress.end(outcome)
        outcomes.append(outcome)
    return Report(
        tuple(outcomes), len(batch.jobs) - len(jobs), batch.passed_over, time.monotonic() - begun
    )


def _attempt(job: Job, work: Callable[[Job], int], overwrite: bool) -> Outcome:
    begun = time.monotonic()
    try:
        if not overwrite and not is_done(job.target, job):
            _refuse_to_replace(job.target)
        return Outcome(job, work(job), time.monotonic() - begun)
    except FullresError as error:
        return Outcome(job, 0, time.monotonic() - begun, error)
    except OSError as error:
        path, reason = error.filename or job.target, error.strerror or str(error)
        return Outcome(job, 0, time.monotonic() - begun, ImageError(f"{path}: {reason}"))


def _refuse_to_replace(path: Path) -> None:
    if os.path.lexists(path):
        raise ImageError(f"{path}: exists already; allow it to be replaced with --overwrite")


def _as_folder(target: str | Path | None, named: bool) -> Path | None:
    """The target if it is a folder, None if there is none or it is a file."""
    if target is None:
        return None
    path = Path(target)
    if path.is_dir() or str(target).endswith(("/", os.sep)) or not path.suffix:
        return path
    if named:
        return None
    if path.suffix.lower() in SUFFIXES:
        raise ImageError(f"{path}: is a file's name, but several pictures need a folder")
    return path


def _places(sources: Sequence[str | Path], target: Path | None) -> Iterator[_Place]:
    for source in sources:
        path = Path(source)
        if path.is_dir():
            named = path if path.name not in ("", "..") else path.resolve()
            inner = named.name if target and len(sources) > 1 else ""
            for picture in _inside(path, target):
                yield _Place(picture, inner / picture.relative_to(path), named)
        elif path.exists():
            yield _Place(path, Path(path.name))
        elif glob.has_magic(str(source)):
            root = _fixed_part(path)
            for picture in sorted(root.glob(str(path.relative_to(root)))):
                relative = picture.relative_to(root)
                hidden = any(part.startswith(".") for part in relative.parts)
                ours = target is not None and target.resolve() in picture.resolve().parents
                if _is_picture(picture) and not hidden and (not ours or target == root):
                    yield _Place(picture, relative)
        else:
            raise ImageError(f"{path}: no such file or folder")


def _inside(folder: Path, target: Path | None) -> Iterator[Path]:
    """Pictures of a folder, sorted, without hidden ones and what lies in the target folder."""
    for entry in sorted(folder.iterdir()):
        if entry.name.startswith("."):
            continue
        if entry.is_dir() and not entry.is_symlink():
            if not (target and target.exists() and entry.samefile(target)):
                yield from _inside(entry, target)
        elif _is_picture(entry):
            yield entry


def _is_picture(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES and path.is_file()


def _fixed_part(pattern: Path) -> Path:
    """The folder of a glob pattern before its first wildcard."""
    parts = pattern.parts[:-1]
    fixed = next((i for i, part in enumerate(parts) if glob.has_magic(part)), len(parts))
    return Path(*parts[:fixed])


def _without_results(found: dict[Path, _Place], suffix: str) -> list[_Place]:
    """Leave out what earlier runs wrote: `a-restored.jpg` beside `a.jpg`, `b-restored/` by `b/`."""
    if len(found) == 1:
        return list(found.values())
    known = {picture.with_suffix("") for picture in found}
    known |= {folder for picture in found for folder in picture.parents}

    def is_result(path: Path) -> bool:
        for ending in (COMPARISON.removesuffix(".png"), suffix, SUFFIX):
            if path.name.endswith(ending) and path.name != ending:
                path = path.with_name(path.name.removesuffix(ending))
                if path in known:
                    return True
        return False

    return [
        place
        for picture, place in found.items()
        if not any(is_result(path) for path in (picture.with_suffix(""), *picture.parents))
    ]


def _right(place: _Place, right: Path, named: bool) -> Path:
    """The right view of a picture."""
    path = right if named and not right.is_dir() else right / place.relative
    if not path.is_file():
        raise ImageError(
            f"{path}: no such file, the right view of {place.picture}; give --right a picture, or "
            "a folder with pictures of the same names"
        )
    return path


def _result(place: _Place, target: Path | None, suffix: str | None) -> Path:
    """A suffix names the result, or the folder of results where those have no target."""
    picture, added = place.picture, SUFFIX if suffix is None else suffix
    if target is None and place.folder is not None:
        return place.folder.with_name(place.folder.name + added) / place.relative
    name = picture.stem + ((suffix or "") if target else added) + picture.suffix
    return target / place.relative.with_name(name) if target else picture.with_name(name)


def _check(jobs: Sequence[Job]) -> None:
    """No result may replace a picture, be it by another name, or another result."""
    read = [path for job in jobs for path in (job.source, job.right) if path is not None]
    pictures = {_identity(path): path for path in read}
    claimed: dict[Path, Path] = {}
    for job in jobs:
        for path in job.outputs:
            picture = pictures.get(_identity(path)) if path.exists() else None
            if picture is not None:
                raise ImageError(
                    f"{picture}: the result of {job.source} would replace this picture; choose "
                    "another --output or --suffix"
                )
            other = claimed.setdefault(path.parent.resolve() / path.name, job.source)
            if other is not job.source:
                raise ImageError(
                    f"{other} and {job.source} would both become {path}; restore them in two "
                    "calls with different --output"
                )


def _identity(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_dev, status.st_ino
