"""Evaluating a network on a data set: as it is, local, and patch by patch, side by side."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fullres.batch import Batch, Job, Outcome, Progress, Silent
from fullres.data.datasets import Dataset, Pair, open_dataset
from fullres.data.degrade import Degradation
from fullres.errors import FullresError
from fullres.evaluation.examples import Example, condition_for, degradation_for, load_example
from fullres.evaluation.ledger import Ledger
from fullres.evaluation.modes import (
    LOCAL,
    PATCHES,
    Mode,
    Restored,
    Size,
    open_modes,
    overlap_of,
    patch_side,
)
from fullres.evaluation.results import GLOBAL, INPUT, Evaluation, Row, number, title
from fullres.evaluation.sheet import SHEET, extremes, strip
from fullres.feed import as_input, as_picture, stacked
from fullres.io.contact_sheet import Strip, write_contact_sheet
from fullres.local import Local
from fullres.memory import use_huge_pages
from fullres.metrics import Protocol
from fullres.metrics import protocol as find_protocol
from fullres.networks.catalog import open_network
from fullres.networks.spec import Network
from fullres.restore import settings_for

MODES = (GLOBAL, LOCAL, PATCHES)
"""Modes where none are named."""


def evaluate(
    network: str | Path | Network,
    data: str | Path | Dataset,
    *,
    modes: Sequence[str] = MODES,
    protocol: str | Protocol | None = None,
    layout: str = "auto",
    split: str = "test",
    degradation: Degradation | None = None,
    seed: int = 0,
    noise_level: float | None = None,
    jpeg_quality: int | None = None,
    window: Size | None = None,
    train_size: Size | None = None,
    only: Sequence[str] = (),
    stride: Size | None = None,
    patch_size: Size | None = None,
    device: str = "auto",
    dtype: str = "auto",
    tile: int | None = None,
    output: str | Path | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Evaluation:
    """Measure how well a network restores the pictures of a data set, in several modes.

    Modes are `global`, the network as it is over the whole picture; `local`, converted; `patches`,
    patches of the training size that do not overlap; `patches-16`, or another number, patches that
    overlap by so many pixels. The degraded pictures themselves are measured too, as `input`, where
    they have the channels of their targets (enlarged by bicubic interpolation if need be). A
    network with nothing to convert has in local mode what it has in global mode.

    With an output folder every result is on the disc at once, in `results.csv`, and a run that was
    stopped goes on where it was; at the end there are `results.json`, `results.md`, and
    `contact-sheet.png` with the pictures that gain and lose most by local over global.

    Args:
        network: name of a bundled network, a checkpoint, or an open network (left unchanged).
        data: folder of a data set, or an open one.
        modes: which, in the order of the table.
        protocol: how pictures are measured; as is usual for the data set if None.
        layout: of the folder, one of `fullres.data.datasets.layouts()`; "auto" finds out.
        split: of the data set, "train", "val" or "test".
        degradation: makes the degraded pictures of a clean data set. If None, and the network
            enlarges, bicubic downscaling; values beyond [0, 1] reach the network as they are.
        seed: of the degradation; the same seed makes the same pictures.
        noise_level: as in `restore`; that of the degradation if it has a single one.
        jpeg_quality: likewise.
        window: of the local mode, as in `restore`.
        train_size: as in `restore`.
        only: as in `restore`.
        stride: as in `restore`.
        patch_size: one number or (height, width); the training size if None.
        device: as in `restore`.
        dtype: as in `restore`.
        tile: as in `restore`; of the global and the local mode.
        output: folder of the results.
        overwrite: drop the results that the folder holds.
        progress: is told how the work goes on; a picture's pixels count once a mode.

    Returns:
        A row for each picture and mode. Seconds are those of restoring alone, after a part of the
        first picture that is not timed. Memory is, on CUDA, the peak that torch has allocated in
        the passes; elsewhere an estimate, the peak of the tensors alive in the largest pass.

    Raises:
        FullresError: something does not fit: folder and layout, network and pictures, results of
            other settings in the output folder; or a picture cannot be read or restored.
    """
    use_huge_pages()
    opened = network if isinstance(network, Network) else open_network(network)
    dataset = data if isinstance(data, Dataset) else _open(data, layout, split, opened)
    modes = tuple(dict.fromkeys(modes))
    patchwise = any(overlap_of(mode) is not None for mode in modes)
    patch = patch_side(opened, train_size, patch_size) if patchwise else None
    local = _local(opened, window, train_size, only, stride) if LOCAL in modes else None
    how = protocol or dataset.protocol
    if isinstance(how, str):
        how = find_protocol(how)
    made = degradation_for(opened, dataset, degradation)
    condition = condition_for(opened, dataset, made, noise_level, jpeg_quality)
    with open_modes(opened, modes, local, patch, (device, dtype, tile)) as running:
        work = _Work(opened, running, how, made, seed, condition)
        begun = Evaluation(
            network=opened.spec.architecture if isinstance(network, Network) else str(network),
            data=dataset.name,
            protocol=how.name,
            modes=(INPUT, *modes),
            rows=(),
            settings={
                "weights": _digest(opened),
                "data": dataset.name if isinstance(data, Dataset) else str(Path(data).resolve()),
                "layout": dataset.layout,
                "split": None if isinstance(data, Dataset) else split,
                "protocol": repr(how),
                "degradation": made and repr(made),
                "seed": None if made is None else seed,
                "condition": condition,
                "device": next(iter(running.values())).restorer.device.type,
                "data type": dtype,
                "tile": tile,
                **_of_modes(local, patch),
            },
        )
        ledger = None if output is None else Ledger(Path(output), begun, overwrite)
        return _evaluated(work, dataset, begun, ledger, progress or Silent())


@dataclass(frozen=True)
class Scored(Outcome):
    """What became of one picture, and what it scored."""

    rows: tuple[Row, ...] = ()

    @property
    def summary(self) -> str:
        metric = next(iter(self.rows[0].metrics))
        scores = (f"{row.mode} {number(row.metrics[metric], metric)}" for row in self.rows)
        return f"{self.rows[0].name}  {title(metric)} {', '.join(scores)}"


@dataclass(frozen=True)
class _Work:
    """What every picture is restored and measured with."""

    network: Network
    modes: Mapping[str, Mode]
    protocol: Protocol
    degradation: Degradation | None
    seed: int
    condition: float | None
    """Value of the channel that the network takes beside the picture."""
    warm: set[str] = field(default_factory=set)
    """Modes that have run."""

    @property
    def local_is_global(self) -> bool:
        """Whether there is nothing to convert."""
        return LOCAL in self.modes and self.modes[LOCAL].restorer.window is None

    def load(self, pair: Pair) -> Example:
        return load_example(pair, self.network.spec.scale, self.degradation, self.seed)

    def restore(self, example: Example, mode: str, progress: Progress) -> tuple[Tensor, Restored]:
        """The restored picture, (C, H, W) as its target, and how it came about."""
        spec, degraded = self.network.spec, example.degraded
        if example.right is not None:
            x = stacked(degraded, example.right, spec)
        else:
            x = as_input(degraded, spec, self.condition, example.path)
        if mode not in self.warm:
            self.modes[mode].warm_up(x, example.path)
            self.warm.add(mode)
        restored = self.modes[mode].run(x, example.path, progress.tile)
        height, width = example.target.shape[-2:]
        picture = as_picture(restored.output, len(degraded) == 1)
        return picture[..., :height, :width], restored

    def score(self, example: Example, mode: str, picture: Tensor, restored: Restored | None) -> Row:
        """Measure a picture (C, H, W)."""
        height, width = example.degraded.shape[-2:]
        tiles, seconds, memory = (
            (restored.tiles, restored.seconds, restored.memory) if restored else (0, 0.0, 0)
        )
        try:
            values = self.protocol.measure(picture, example.target, self.network.spec.scale)
        except FullresError as error:
            raise FullresError(f"{example.path}: {error}") from error
        return Row(example.name, mode, height, width, tiles, seconds, memory, values)


Rows = dict[tuple[str, str], Row]


@torch.inference_mode()
def _evaluated(
    work: _Work, dataset: Dataset, begun: Evaluation, ledger: Ledger | None, progress: Progress
) -> Evaluation:
    """Restore and measure what the ledger does not have, and write the reports."""
    rows: Rows = {} if ledger is None else dict(ledger.rows)
    jobs = {pair.name: Job(pair.degraded or pair.target, pair.target) for pair in dataset.pairs}
    waiting = [p for p in dataset.pairs if any((p.name, mode) not in rows for mode in work.modes)]
    progress.begin(Batch(tuple(jobs.values()), alone=False), len(waiting))
    strips: dict[str, Strip] = {}
    for pair in waiting:
        start = time.perf_counter()
        example = work.load(pair)
        pixels = example.degraded[0].numel()
        missing = [mode for mode in work.modes if (pair.name, mode) not in rows]
        progress.picture(jobs[pair.name], pixels * len(missing))
        pictures: dict[str, Tensor] = {}
        for row in _scores(work, example, missing, rows, pictures, progress):
            rows[pair.name, row.mode] = row
            if ledger is not None:
                ledger.add(row)
        if ledger is not None and {GLOBAL, LOCAL} <= pictures.keys():
            so_far = _in_order(begun, dataset, rows)
            strips[pair.name] = strip(example, pictures, so_far)
            kept = extremes(so_far.gains(LOCAL))
            strips = {name: strips[name] for name in kept if name in strips}
        found = tuple(rows[pair.name, m] for m in begun.modes if (pair.name, m) in rows)
        taken = time.perf_counter() - start
        progress.end(Scored(jobs[pair.name], pixels * len(missing), taken, rows=found))
    if ledger is not None:
        whole = _in_order(ledger.begun, dataset, rows)
        ledger.finish(whole)
        missing_sheet = not (ledger.folder / SHEET).exists()
        if {GLOBAL, LOCAL} <= work.modes.keys() and (waiting or missing_sheet):
            _write_sheet(work, dataset, whole, strips, ledger.folder / SHEET)
    return _in_order(begun, dataset, rows)


def _scores(
    work: _Work,
    example: Example,
    missing: Sequence[str],
    rows: Rows,
    pictures: dict[str, Tensor],
    progress: Progress,
) -> Iterator[Row]:
    """The missing rows of a picture; what a contact sheet shows is left in `pictures`, by mode."""
    name, comparable = example.name, len(example.degraded) == len(example.target)
    if comparable and (name, INPUT) not in rows:
        yield work.score(example, INPUT, example.shown, None)
    for mode in missing:
        if mode == LOCAL and work.local_is_global and (name, GLOBAL) in rows:
            progress.tile(example.degraded[0].numel())
            yield replace(rows[name, GLOBAL], mode=LOCAL)
        else:
            picture, restored = work.restore(example, mode, progress)
            if mode in (GLOBAL, LOCAL):
                pictures[mode] = picture
            yield work.score(example, mode, picture, restored)


def _in_order(begun: Evaluation, dataset: Dataset, rows: Rows) -> Evaluation:
    keys = ((pair.name, mode) for pair in dataset.pairs for mode in begun.modes)
    return replace(begun, rows=tuple(rows[key] for key in keys if key in rows))


def _write_sheet(
    work: _Work, dataset: Dataset, evaluation: Evaluation, strips: dict[str, Strip], target: Path
) -> None:
    """Write the contact sheet; pictures that an earlier run restored are restored again."""
    names = extremes(evaluation.gains(LOCAL))
    if names:
        pairs = {pair.name: pair for pair in dataset.pairs}
        for name in names:
            if name not in strips:
                example = work.load(pairs[name])
                both = {m: work.restore(example, m, Silent())[0] for m in (GLOBAL, LOCAL)}
                strips[name] = strip(example, both, evaluation)
        write_contact_sheet([strips[name] for name in names], target)


def _open(data: str | Path, layout: str, split: str, network: Network) -> Dataset:
    scale = network.spec.scale
    return open_dataset(data, layout, split, scale=None if scale == 1 else scale)


def _local(
    network: Network,
    window: Size | None,
    train_size: Size | None,
    only: Sequence[str],
    stride: Size | None,
) -> Local | None:
    """Settings of the local mode, with the remedy that an evaluation has."""
    try:
        return settings_for(network, True, window, train_size, only, stride)
    except FullresError:
        if train_size or network.spec.train_size:
            raise
        raise FullresError(
            f"{network.spec.architecture}: the network does not say the size of the crops it was "
            f"trained on; give it with --train-size, or evaluate --mode {GLOBAL} alone"
        ) from None


def _of_modes(local: Local | None, patch: Size | None) -> dict[str, Any]:
    """Settings that matter to some modes alone; without those of modes that are not run."""
    settings: dict[str, Any] = {} if patch is None else {"patch size": patch}
    if local is not None:
        settings |= {"training size": local.train_size, "window": local.window}
        settings |= {"only": local.only, "stride": local.stride}
    return settings


def _digest(network: Network) -> str:
    """The architecture, and a number by which its weights are known."""
    digest = hashlib.sha256()
    for name, tensor in network.module.state_dict().items():
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        values = tensor.detach().cpu().contiguous().flatten()
        digest.update(values.view(torch.uint8).numpy().tobytes())
    return f"{network.spec.architecture} {digest.hexdigest()[:16]}"
