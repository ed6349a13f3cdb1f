"""Pictures out: gathered rectangle by rectangle, then written whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np
import pyvips
import torch
from torch import Tensor

from fullres.errors import ImageError
from fullres.io import encode, vips

IN_MEMORY = 256 * 2**20
"""Bytes of output up to which it is gathered in memory, beyond in an unnamed file."""

_NO_ROOM = ("No space left", "File too large", "Disk quota", "quota exceeded")


class Sink:
    """The output picture; a context manager that completes the file on leaving its block.

    Until then, and after an error or an interrupt, nothing is at the target that was not there
    before. While it runs, a hidden file whose name ends in `.part` lies in the target's folder.
    """

    def __init__(self, origin: encode.Origin, plan: encode.Plan) -> None:
        self.path = plan.target
        self.height, self.width, self.channels = plan.height, plan.width, plan.channels
        self._origin, self._plan = origin, plan
        self._resources = ExitStack()
        self._part: Path | None = None
        self._canvas: np.ndarray[Any, Any] | None = None
        self._written: set[tuple[int, int, int, int]] = set()

    def __enter__(self) -> Sink:
        with ExitStack() as opened, _writing(self.path):
            # A link at the target stays a link: the picture goes where it points.
            self._final = Path(os.path.realpath(self.path))
            if self._final.is_dir():
                raise ImageError(f"{self.path}: is a folder; name a file to write")
            self._final.parent.mkdir(parents=True, exist_ok=True)
            self._part = opened.enter_context(_part_file(self._final.parent))
            shape = (self.height, self.width, self.channels)
            canvas = _canvas(shape, self._plan.canvas.dtype, self._final.parent)
            self._canvas = opened.enter_context(canvas)
            self._resources = opened.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with self._resources:
            if error is None:
                self._complete()
            self._canvas = None

    def write(self, top: int, left: int, tensor: Tensor) -> None:
        """Write a rectangle: float, shape (channels, height, width), values in [0, 1].

        Integer outputs are clamped and rounded to nearest; float outputs take values as they are.
        A later rectangle overwrites an earlier one.

        Raises:
            ValueError: the shape does not fit or the rectangle is not inside the picture.
            ImageError: the tensor holds NaN or infinity.
        """
        if self._canvas is None:
            raise ValueError(f"{self.path} is not open for writing")
        height, width = tensor.shape[-2:]
        inside = 0 <= top <= top + height <= self.height and 0 <= left <= left + width <= self.width
        if tensor.ndim != 3 or tensor.shape[0] != self.channels or not inside:
            raise ValueError(
                f"a tensor of shape {tuple(tensor.shape)} at ({top}, {left}) does not fit "
                f"{self.path} of shape {(self.channels, self.height, self.width)}"
            )
        if not torch.isfinite(tensor).all():
            raise ImageError(
                f"{self._origin.path}: the network produced NaN or infinity near row {top}, "
                f"column {left}; try --dtype float32"
            )
        values = tensor.detach().to("cpu", torch.float32).permute(1, 2, 0).numpy()
        self._canvas[top : top + height, left : left + width] = self._plan.canvas.quantise(values)
        self._written.add((top, left, top + height, left + width))

    def _complete(self) -> None:
        assert self._part is not None
        assert self._canvas is not None
        missing = _missing(self._written, self.height, self.width)
        if missing:
            raise ImageError(
                f"{self.path}: {missing} of {self.height * self.width} pixels were never written, "
                "so nothing is saved; run it again"
            )
        with _writing(self.path):
            image = encode.compose(self._origin, self._plan, self._canvas)
            encode.save(self._origin, self._plan, image, self._part)
            with self._part.open("rb+") as file:
                os.fsync(file.fileno())
            self._part.replace(self._final)
            _sync_folder(self._final.parent)


@contextmanager
def _part_file(folder: Path) -> Iterator[Path]:
    """An empty file for the encoder, gone afterwards unless it was renamed."""
    part = folder / f".fullres-{secrets.token_hex(8)}.part"
    part.touch(exist_ok=False)
    try:
        yield part
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def _canvas(shape: tuple[int, ...], dtype: Any, folder: Path) -> Iterator[np.ndarray[Any, Any]]:
    """An array in memory, or if large on an unnamed file in `folder` with its room reserved."""
    size = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
    if size <= IN_MEMORY:
        yield np.zeros(shape, dtype=dtype)
        return
    with tempfile.TemporaryFile(dir=folder, prefix=".fullres-", suffix=".part") as file:
        _reserve(file, size)
        yield np.memmap(file, dtype=dtype, mode="r+", shape=shape)


def _reserve(file: IO[bytes], size: int) -> None:
    """Take up the room on disc now: a full disc would later kill the process by SIGBUS."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file.fileno(), 0, size)
        return
    block = bytes(2**20)
    for start in range(0, size, len(block)):
        file.write(block[: size - start])
    file.flush()


def _sync_folder(folder: Path) -> None:
    """Make the new name last through a power cut, where the system lets folders be synced."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _missing(rectangles: set[tuple[int, int, int, int]], height: int, width: int) -> int:
    """The number of pixels outside the union of (top, left, bottom, right) rectangles."""
    bounds = np.array([*rectangles, (0, 0, height, width)], dtype=np.int64)
    rows, columns = np.unique(bounds[:, [0, 2]]), np.unique(bounds[:, [1, 3]])
    steps = np.zeros((len(rows), len(columns)), dtype=np.int32)
    tops, bottoms = np.searchsorted(rows, bounds[:-1, [0, 2]]).T
    lefts, rights = np.searchsorted(columns, bounds[:-1, [1, 3]]).T
    for row, column, step in (
        (tops, lefts, 1), (bottoms, rights, 1), (tops, rights, -1), (bottoms, lefts, -1)
    ):  # fmt: skip
        np.add.at(steps, (row, column), step)
    uncovered = steps.cumsum(axis=0).cumsum(axis=1)[:-1, :-1] == 0
    return int(np.diff(rows) @ uncovered @ np.diff(columns))


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Turn what libvips or the system say while `path` is written into one sentence."""
    try:
        yield
    except (pyvips.Error, UnicodeDecodeError) as error:
        raise _writing_error(path, vips.condense(error)) from error
    except OSError as error:
        raise _writing_error(path, error.strerror or str(error), error.errno) from error


def _writing_error(path: Path, reason: str, code: int | None = None) -> ImageError:
    no_room = code in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)
    if no_room or any(words in reason for words in _NO_ROOM):
        return ImageError(
            f"{path}: the disc is full or a size limit is reached ({reason}); free some room or "
            "write to another folder with --output"
        )
    return ImageError(
        f"{path}: cannot be written ({reason}); check the folder and its permissions, or write to "
        "another with --output"
    )
