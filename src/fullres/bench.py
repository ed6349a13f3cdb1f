"""What networks cost on this machine: time, overhead of conversion, peak memory.

What is measured is what `fullres.restore` runs: a pass of the network, prepared by
`fullres.restore.ready`, on a picture in memory. Times compared are of one process and of passes
that take turns; ratios are medians of the ratios within a turn. Peak memory is measured in a
process of its own.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path

import torch
from torch import Tensor, nn

from fullres.errors import FullresError
from fullres.local import Local
from fullres.measure import (
    TOO_LARGE,
    Pass,
    Size,
    interleaved,
    median_ratio,
    peak_memory_of,
    seconds,
    table,
)
from fullres.memory import free_memory, use_huge_pages
from fullres.networks.catalog import bundled, create_network, networks, open_network
from fullres.networks.spec import Network, Spec
from fullres.restore import Restorer, ready, restore_tensor, settings_for
from fullres.tiles import is_out_of_memory

PATIENCE = 60.0
"""Seconds from which a pass is left out of a run for which no network was named."""

AnySize = int | Size


@dataclass(frozen=True)
class Cost:
    """What a network costs at one size."""

    name: str
    """As it was named."""
    size: Size
    """Height and width of the picture in pixels."""
    seconds: float
    """Time of a pass, with local operations where the network has any; a median."""
    overhead: float | None
    """Time of the local form over that of the network as it is; None where they are the same."""
    peak: int
    """Bytes that a pass takes beside the weights."""

    @property
    def megapixels_a_second(self) -> float:
        """Megapixels restored in a second."""
        return self.size[0] * self.size[1] / 1e6 / self.seconds


@dataclass(frozen=True)
class Left:
    """A network that was left out, and why."""

    name: str
    reason: str


def bench(
    names: Sequence[str] = (),
    size: AnySize = (720, 1280),
    *,
    device: str = "auto",
    dtype: str = "auto",
    repeats: int = 3,
    window: AnySize | None = None,
    train_size: AnySize | None = None,
) -> Iterator[Cost | Left]:
    """Measure networks, one after the other.

    Args:
        names: architectures (published configuration, random weights), bundled networks or
            checkpoints; all that are bundled and all architectures if empty, but for those whose
            pass would take longer than `PATIENCE`.
        size: height and width of the picture in pixels.
        device: as in `fullres.restore.restore`.
        dtype: likewise.
        repeats: turns, of one pass of each form.
        window: likewise.
        train_size: likewise.

    Yields:
        For each name what it costs, or why it could not be measured.
    """
    use_huge_pages()
    run = _Run(
        size=(size, size) if isinstance(size, int) else size,
        repeats=repeats,
        patience=float("inf") if names else PATIENCE,
        local=(window, train_size),
        where=(device, dtype),
    )
    for name in names or (*bundled(), *networks()):
        try:
            yield _cost(name, run)
        except FullresError as error:
            yield Left(name, str(error))
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            yield Left(name, TOO_LARGE)


def opened(name: str) -> Network:
    """An architecture with random weights, a bundled network or a checkpoint.

    A video network becomes one that restores a picture (`Still`).

    Raises:
        NetworkError: there is no such network.
    """
    return as_picture_network(create_network(name) if name in networks() else open_network(name))


class Still(nn.Module):
    """A video network that restores one picture, as a video of `frames` in which nothing moves.

    Shapes: (B, C, H, W) to the first frame restored, (B, C, H, W).
    """

    def __init__(self, network: nn.Module, frames: int) -> None:
        super().__init__()
        self.network = network
        self.frames = frames

    def forward(self, picture: Tensor) -> Tensor:
        video: Tensor = self.network(picture[:, None].expand(-1, self.frames, -1, -1, -1))
        return video[:, 0]


def as_picture_network(network: Network) -> Network:
    """A video network as one that restores a picture from as few frames as it takes."""
    lost = network.spec.frames_lost
    if lost is None:
        return network
    return Network(Still(network.module, 1 + sum(lost)), replace(network.spec, frames_lost=None))


@contextmanager
def running(
    network: Network, settings: Local | None, device: str = "auto", dtype: str = "auto"
) -> Iterator[tuple[Pass, Restorer]]:
    """A pass as `fullres.restore` runs it, local with `settings`, and what it runs."""
    with ready(network, settings, device, dtype) as restorer:
        yield lambda size: _restored(restorer, size), restorer


@torch.inference_mode()
def _restored(restorer: Restorer, size: Size) -> Tensor:
    x = picture(restorer.spec, size)
    return restore_tensor(x, restorer, Path(restorer.spec.architecture))


@contextmanager
def _named_pass(
    name: str, local: bool, sizes: tuple[AnySize | None, AnySize | None], *where: str
) -> Iterator[Pass]:
    network = opened(name)
    settings = settings_for(network, local, *sizes) if local else None
    with running(network, settings, *where) as (run, _):
        yield run


@lru_cache(maxsize=4)
def _noise(channels: int, height: int, width: int) -> Tensor:
    return torch.rand(1, channels, height, width, generator=torch.Generator().manual_seed(0))


def picture(spec: Spec, size: Size) -> Tensor:
    """Random values in [0, 1], (1, in_channels, height, width), the same for every call."""
    return _noise(spec.in_channels, *size)


@dataclass(frozen=True)
class _Run:
    """What `bench` measures every network with."""

    size: Size
    repeats: int
    patience: float
    local: tuple[AnySize | None, AnySize | None]
    """Window and training size."""
    where: tuple[str, str]
    """Device and data type."""


def _cost(name: str, run: _Run) -> Cost:
    network = opened(name)
    settings = settings_for(network, True, *run.local)
    with ExitStack() as stack:
        passes = {
            form: stack.enter_context(running(network, local, *run.where))
            for form, local in (("global", None), ("local", settings))
        }
        if passes["local"][1].window is None:
            del passes["local"]  # nothing to convert
        for each, restorer in passes.values():
            _check(each, restorer, run)
        calls = {form: partial(each, run.size) for form, (each, _) in passes.items()}
        times = interleaved(calls, run.repeats)
    is_local = "local" in times
    return Cost(
        name,
        run.size,
        statistics.median(times["local" if is_local else "global"]),
        median_ratio(times, "local", "global") if is_local else None,
        peak_memory_of(_named_pass, name, is_local, run.local, *run.where, size=run.size),
    )


def _check(once: Pass, restorer: Restorer, run: _Run) -> None:
    """Refuse what memory does not hold or takes longer than one waits."""
    needed, free = restorer.peak(*run.size), free_memory(restorer.device)
    if needed > free:
        raise FullresError(
            f"a pass needs {needed / 1e9:.1f} GB and {free / 1e9:.1f} GB are free; "
            "give a smaller --size"
        )
    if run.patience < float("inf"):
        part = (max(run.size[0] // 4, 1), max(run.size[1] // 4, 1))
        # a sixteenth of the pixels takes no more than a sixteenth of the time
        expected = 16 * min(seconds(partial(once, part)) for _ in range(2))
        if expected > run.patience:
            raise FullresError(
                f"a pass takes {expected:.0f} s or more; name it to measure it all the same"
            )


HEADER = ("network", "picture", "pass", "MP/s", "local ÷ global", "peak memory")


def row(found: Cost) -> tuple[str, ...]:
    """One line of a table, as `HEADER`.

    >>> row(Cost("nafnet", (720, 1280), 2.0, 1.05, 10**9))
    ('nafnet', '720 × 1280', '2.00 s', '0.46', '1.050', '1.00 GB')
    """
    return (
        found.name,
        f"{found.size[0]} × {found.size[1]}",
        f"{found.seconds:.2f} s" if found.seconds >= 1 else f"{1000 * found.seconds:.0f} ms",
        f"{found.megapixels_a_second:.2f}",
        "—" if found.overhead is None else f"{found.overhead:.3f}",
        f"{found.peak / 1e9:.2f} GB",
    )


def show(found: Iterable[Cost | Left], markdown: bool = False) -> list[Left]:
    """Print a table that grows with every network; returns those left out."""
    left: list[Left] = []
    rows = map(row, _costs(found, left))
    if markdown:
        for line in table(HEADER, rows):
            print(line, flush=True)  # noqa: T201
        return left
    from rich.console import Console
    from rich.live import Live
    from rich.table import Table

    shown, console = Table(*HEADER), Console()
    with Live(shown, console=console):
        for cells in rows:
            shown.add_row(*cells)
    if not console.is_terminal:
        console.print()  # where it cannot be drawn anew, the table ends without a line break
    return left


def _costs(found: Iterable[Cost | Left], left: list[Left]) -> Iterator[Cost]:
    for one in found:
        if isinstance(one, Left):
            left.append(one)
        else:
            yield one
